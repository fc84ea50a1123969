"""A network as it is to be: plain modules with weights of their own, that are there, and are numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from compress.errors import UsageError


def refuse_odd(model: nn.Module, where: str) -> None:
    """Refuses what cannot be trained, pruned and written as plain layers with weights in float32.

    Args:
        where: what makes the network, for the error.

    Raises:
        UsageError: it is wrapped, compiled or quantised; a weight is not there yet, is of half precision, no number or
            computed at every call. The first such module or weight is named, and how it becomes a plain one.
    """
    for name, module in model.named_modules():
        kind = _wrapped(module)
        if kind is not None:
            raise UsageError(
                f"{name or 'the network'} is {kind[0]}, which hides its layers",
                where=where,
                fix=f"return the plain module{kind[1]}",
            )
    if next(model.parameters(), None) is None:
        raise UsageError("the network has no weights", where=where, fix="return one with layers")
    for name, weight in model.named_parameters():
        _refuse_weight(name, weight, where)
    refuse_computed_weights(model, where)


def _wrapped(module: nn.Module) -> tuple[str, str] | None:
    """(what stands around a module or in its place, how the plain one is had); None of a plain one."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript", ", not what torch.jit makes of it"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f"in {type(module).__name__}", " that it holds: its .module"
    if type(module).__name__ == "OptimizedModule":  # of torch._dynamo, which is slow to import
        return "compiled", ": take torch.compile out"
    if ".quantized." in f".{type(module).__module__}.":
        return f"quantised ({type(module).__name__})", " in float32"
    return None


def _refuse_weight(name: str, weight: nn.Parameter, where: str) -> None:
    if nn.parameter.is_lazy(weight):
        what, fix = (
            "has no shape yet (a lazy layer)",
            "call the network once in the function, or give the layer its sizes",
        )
    elif weight.is_meta:
        if torch.empty(0).is_meta:  # that is how it is asked for here
            return
        what, fix = "is on the meta device, where there are no numbers", "make it on the CPU: to_empty, and weights"
    elif weight.is_floating_point() and weight.dtype.itemsize < 4:
        what = f"is {str(weight.dtype).removeprefix('torch.')}; a network is trained, pruned and checked in float32"
        fix = "let the function make it in float32 (--set train.precision=bfloat16 multiplies in bfloat16)"
    elif not torch.isfinite(weight).all():
        what, fix = "holds NaN or infinity", "give finite weights"
    else:
        return
    raise UsageError(f"the weight {name} {what}", where=where, fix=fix)


def refuse_computed_weights(model: nn.Module, where: str) -> None:
    """Refuses weights that are computed anew at every call from others (weight norm, spectral norm, torch's own masks):
    what is pruned in them is not what is trained.

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
            kind = type(hook).__name__
            if isinstance(hook, prune.BasePruningMethod):
                weight = str(hook._tensor_name)
                fix = f"torch.nn.utils.prune.remove({name or 'model'}, {weight!r})"
            else:
                weight = str(hook.name)  # type: ignore[attr-defined]
                remove = "remove_spectral_norm" if "spectral" in kind.lower() else "remove_weight_norm"
                fix = f"torch.nn.utils.{remove}({name or 'model'})"
        raise UsageError(
            f"{name or 'the network'}.{weight} is computed at every call ({kind}), and cannot be pruned itself",
            where=where,
            fix=f"make it a plain weight in the function, and prune then: {fix}",
        )


def _computes(hook: Any) -> bool:
    return isinstance(hook, prune.BasePruningMethod) or (hasattr(hook, "name") and hasattr(hook, "compute_weight"))
