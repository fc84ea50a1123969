"""2:4 sparsity: of every 4 consecutive input channels at most 2 weights are not zero.

It is what the sparse kernels of NVIDIA's tensor cores run faster. As TensorRT's developer guide has it, the four are
counted along the input channels, for each output channel and each place of the kernel by itself: weights
(out, in, ...) of a convolution, (out, in) of a linear layer. A layer whose input channels are no multiple of 4 (a
first convolution on 3 colours, a depthwise one) has no such kernel and stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compress.errors import CompressError

if TYPE_CHECKING:
    from torch import Tensor

PATTERN = "2:4"


def fits(weight: Tensor) -> bool:
    """Whether the layer can be given the pattern: (out, in, ...) with in a multiple of 4."""
    return weight.dim() >= 2 and weight.numel() > 0 and weight.shape[1] % 4 == 0


def two_four_mask(weight: Tensor) -> Tensor:
    """Keeps the 2 largest of every 4; of equal ones the first goes. A layer that does not fit is kept whole.

    Returns:
        Bool, of the weight's shape: True where the weight stays.
    """
    import torch

    if not fits(weight):
        return torch.ones_like(weight, dtype=torch.bool)
    size = _groups(weight.detach().abs())  # (..., in / 4, 4)
    columns = size.unbind(-1)
    # How many of the four go before each: smaller ones, and equal ones further to the left.
    ranks = [
        sum(((b <= a) if j < i else (b < a)).to(torch.int8) for j, b in enumerate(columns) if j != i)
        for i, a in enumerate(columns)
    ]
    kept: Tensor = torch.stack([rank >= 2 for rank in ranks if not isinstance(rank, int)], -1)
    return kept.flatten(-2).movedim(-1, 1).contiguous()


def two_four_masks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`two_four_mask` of every layer.

    Raises:
        CompressError: a weight is NaN or infinite, or no layer fits the pattern.
    """
    import torch

    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise CompressError(
                f"the weight {name} holds NaN or infinite values",
                where=name,
                fix="repair or fetch the model again; nothing was pruned",
            )
    if not any(fits(weight) for weight in weights.values()):
        raise CompressError(
            "no prunable layer has input channels in fours", where=f"pattern {PATTERN}", fix="use pattern: unstructured"
        )
    return {name: two_four_mask(weight) for name, weight in weights.items()}


def check_two_four(weights: Mapping[str, Tensor]) -> list[str]:
    """The layers that have the pattern; the others are those that do not fit it.

    Raises:
        CompressError: a layer that fits has more than 2 non-zeros in some 4 (the layers are named).
    """
    having: list[str] = []
    broken: list[str] = []
    for name, weight in weights.items():
        if fits(weight):
            (broken if int(((_groups(weight) != 0).sum(-1) > 2).sum()) else having).append(name)
    if broken:
        raise CompressError(
            f"{len(broken)} layers do not have the pattern {PATTERN}, the first is {broken[0]}",
            where=", ".join(broken[:4]) + (f" and {len(broken) - 4} more" if len(broken) > 4 else ""),
            fix="apply the masks again: a weight that was zero has moved",
        )
    return having


def _groups(weight: Tensor) -> Tensor:
    """(out, in, ...) as (out, ..., in / 4, 4)."""
    groups: Tensor = weight.movedim(1, -1).unflatten(-1, (-1, 4))
    return groups
