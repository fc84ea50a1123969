"""Global MP on a torch module: what is prunable, how much goes, masks in one shot and masks that grow in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.flops import COUNTED
from compress.recipes.global_mp.floors import budget as exact_budget
from compress.recipes.global_mp.magnitude import global_masks
from compress.recipes.global_mp.options import NetworkOptions
from compress.recipes.global_mp.schedule import Shape, targets
from compress.train import Moment, Remask


def prunable(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, Tensor]:
    """Every weight of a convolution or a linear layer by its parameter name, first layer and classifier included.

    Norms and biases are left alone. A weight that several layers share stands once, under its first name.

    Args:
        skip: shell patterns of names that are left out.

    Raises:
        CompressError: there is none.
        UsageError: a pattern matches nothing.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, COUNTED):
            continue
        weight = module.weight
        # A weight of one dimension or none is a scale, not a matrix.
        if weight.dim() >= 2 and weight.numel() and id(weight) not in seen:
            seen.add(id(weight))
            found[f"{name}.weight" if name else "weight"] = weight.detach()
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise UsageError(
                f"the pattern {pattern!r} matches no prunable layer",
                where="global-mp.skip",
                fix=f"the layers are: {', '.join(list(found)[:4])} ...",
            )
    kept = {name: w for name, w in found.items() if not any(fnmatchcase(name, p) for p in skip)}
    if not kept:
        raise CompressError(
            "the model has no prunable weight: no convolution, no linear layer"
            + (" that is not skipped" if skip else ""),
            where=type(model).__name__,
            fix="build it from torch.nn.Conv1d, Conv2d, Conv3d and Linear",
        )
    return kept


def budget(weights: Mapping[str, Any], sparsity: float, options: NetworkOptions) -> tuple[int, dict[str, int]]:
    """How many weights go in all, and how many every layer keeps at least; checked to be feasible.

    Raises:
        UsageError, CompressError: see `floors`; or the sparsity is less than one weight.
    """
    sizes = {name: int(w.numel()) for name, w in weights.items()}
    return exact_budget(sizes, sparsity, options.floor, options.floors)


def masks_of(model: nn.Module, prune: int, floors: Mapping[str, int], skip: Sequence[str] = ()) -> dict[str, Tensor]:
    """Masks that keep all but the ``prune`` smallest weights of the model as it is now."""
    return global_masks(prunable(model, skip), prune, floors)


def increments(final: int, epochs: int, per_epoch: int, until: float, shape: Shape) -> dict[int, int]:
    """A gradual schedule: step -> weights that are to be gone from it on, once an epoch, ``final`` at the last.

    The paper spreads the sparsity over the epochs without giving the increments: here they are cubic or linear, from
    the second epoch's start to that of the epoch ``until`` (a share of all).
    """
    times = max(1, min(epochs - 1, round(until * epochs)))
    return {(i + 1) * per_epoch: count for i, count in enumerate(targets(final, times, shape)) if count}


def gradual(steps: Mapping[int, int], floors: Mapping[str, int], skip: Sequence[str] = ()) -> Remask:
    """Masks that grow while the network is trained: ``steps`` as `increments` gives them.

    A weight that was masked is zero, so that the next threshold takes it again.
    """

    def remask(moment: Moment, model: nn.Module) -> dict[str, Tensor] | None:
        if moment.step not in steps:
            return None
        with torch.no_grad():
            return masks_of(model, steps[moment.step], floors, skip)

    return remask
