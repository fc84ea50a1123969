"""Global MP on a torch module: what is prunable, masks in one shot, masks that grow while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.flops import COUNTED
from compress.recipes.global_mp.magnitude import global_masks
from compress.train import Moment, Remask


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of a convolution or a linear layer by its parameter name, first layer and classifier included.

    Norms and biases are left alone. A weight that several layers share stands once, under its first name.

    Raises:
        CompressError: there is none.
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
    if not found:
        raise CompressError(
            "the model has no prunable weight: no convolution, no linear layer",
            where=type(model).__name__,
            fix="build it from torch.nn.Conv1d, Conv2d, Conv3d and Linear",
        )
    return found


def masks_of(model: nn.Module, prune: int, floors: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks that keep all but the ``prune`` smallest weights of the model as it is now."""
    return global_masks(prunable(model), prune, floors)


def gradual(targets: Callable[[Moment], int | None], floors: Mapping[str, int]) -> Remask:
    """Masks that follow a schedule: asked before every step, ``targets`` says how many weights are to be gone by then.

    None, or the number that is gone already, leaves the masks as they are. A weight that was masked is zero, so the
    next threshold takes it again: masks only grow.
    """
    gone = 0

    def remask(moment: Moment, model: nn.Module) -> dict[str, Tensor] | None:
        nonlocal gone
        prune = targets(moment)
        if prune is None or prune <= gone:
            return None
        gone = prune
        with torch.no_grad():
            return masks_of(model, prune, floors)

    return remask
