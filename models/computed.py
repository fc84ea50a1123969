"""Weights that are computed at every call."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from compress.errors import UsageError


def refuse_computed_weights(model: nn.Module, where: str) -> None:
    """Refuses weights that are computed anew at every call from others (weight norm, spectral norm): what is pruned in
    them is not what is trained.

    Raises:
        UsageError: the first such layer is named, and how it becomes a plain one.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            (weight, parts), *_ = module.parametrizations.items()  # type: ignore[union-attr,operator]
            kind = type(parts[0]).__name__.strip("_")
            fix = f"torch.nn.utils.parametrize.remove_parametrizations({name or 'model'}, {weight!r})"
        else:
            # The older ones are hooks in front of the call that know which weight they compute.
            hook = next((h for h in module._forward_pre_hooks.values() if _computes(h)), None)
            if hook is None:
                continue
            kind, weight = type(hook).__name__, str(hook.name)  # type: ignore[attr-defined]
            remove = "remove_spectral_norm" if "spectral" in kind.lower() else "remove_weight_norm"
            fix = f"torch.nn.utils.{remove}({name or 'model'})"
        raise UsageError(
            f"{name or 'the network'}.{weight} is computed at every call ({kind}), and cannot be pruned itself",
            where=where,
            fix=f"make it a plain weight in the function, and prune then: {fix}",
        )


def _computes(hook: Any) -> bool:
    return hasattr(hook, "name") and hasattr(hook, "compute_weight")
