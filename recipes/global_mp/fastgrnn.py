"""FastGRNN in structure: the columns of its low-rank factors with the smallest absolute sums are cut out.

Column j of W = L R is column j of L (hidden, r) with row j of R (r, inputs): both go, so the rank falls by one and the
cell is really smaller. A column's score is the sum of |.| over both of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError

FACTORS = {"r_W": "W", "r_U": "U"}


def column_scores(left: Tensor, right: Tensor) -> Tensor:
    """Absolute sums (r,) of the columns of ``left`` (out, r) and the rows of ``right`` (r, in), in float64."""
    return left.double().abs().sum(0) + right.double().abs().sum(1)


def kept_columns(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The columns that stay, rising: ``{"r_W": (k,) int64, ...}``; of equal scores the first column stays.

    Raises:
        UsageError: the model is no FastGRNN, or a rank is larger than its own.
        CompressError: a factor holds NaN or infinity.
    """
    found = {}
    for name, rank in ranks.items():
        factors: Any = getattr(model, FACTORS[name], None)
        if factors is None or not hasattr(factors, "left"):
            raise UsageError(
                "only FastGRNN has low-rank factors", where="global-mp.ranks", fix="give a sparsity instead"
            )
        scores = column_scores(factors.left.weight.detach(), factors.right.weight.detach())
        if not bool(torch.isfinite(scores).all()):
            raise CompressError(
                f"a factor of {FACTORS[name]} holds NaN or infinity", where=FACTORS[name], fix="train it anew"
            )
        if rank > len(scores):
            raise UsageError(
                f"{name} is {len(scores)}, it cannot become {rank}",
                where="global-mp.ranks",
                fix="give at most the rank there is",
            )
        # Stable: of equal scores the first counts as the larger.
        found[name] = scores.sort(descending=True, stable=True).indices[:rank].sort().values
    return found


@torch.no_grad()
def cut(model: nn.Module, smaller: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """Fills ``smaller``, built with the ranks that are left, from ``model``; returns it."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, at in kept.items():
        prefix = FACTORS[name]
        state[f"{prefix}.left.weight"] = state[f"{prefix}.left.weight"][:, at]
        state[f"{prefix}.right.weight"] = state[f"{prefix}.right.weight"][at]
    smaller.load_state_dict(state)
    return smaller
