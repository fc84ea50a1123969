"""FastGRNN in structure: the columns that go are the smallest, and the smaller cell is the same function."""

from __future__ import annotations

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.models.zoo import build
from compress.recipes.global_mp.fastgrnn import cut, kept_columns

SHAPE = {"channels": 4, "hidden": 6, "classes": 3, "r_W": 4, "r_U": 6}


def model(seed: int = 0) -> torch.nn.Module:
    return build("fastgrnn", SHAPE, seed)


def test_the_columns_with_the_smallest_absolute_sums_go() -> None:
    net = model()
    kept = kept_columns(net, {"r_W": 2, "r_U": 5})
    for name, factors, rank in (("r_W", net.W, 2), ("r_U", net.U, 5)):
        left, right = factors.left.weight.tolist(), factors.right.weight.tolist()
        sums = [sum(abs(row[j]) for row in left) + sum(abs(v) for v in right[j]) for j in range(len(right))]
        want = sorted(sorted(range(len(sums)), key=lambda j: -sums[j])[:rank])
        assert kept[name].tolist() == want


def test_the_smaller_cell_computes_what_the_zeroed_one_does() -> None:
    net = model()
    kept = kept_columns(net, {"r_W": 2, "r_U": 3})
    smaller = cut(net, build("fastgrnn", {**SHAPE, "r_W": 2, "r_U": 3}, seed=9), kept)
    with torch.no_grad():
        for name, factors in (("r_W", net.W), ("r_U", net.U)):
            gone = [j for j in range(factors.left.in_features) if j not in kept[name].tolist()]
            factors.left.weight[:, gone] = 0
            factors.right.weight[gone] = 0
        x = torch.randn(5, 4, 11)
        torch.testing.assert_close(smaller(x), net(x))
    assert smaller.ranks == (2, 3)
    assert sum(p.numel() for p in smaller.parameters()) == sum(p.numel() for p in net.parameters()) - 2 * 10 - 3 * 12


def test_of_equal_columns_the_first_stay() -> None:
    net = model()
    with torch.no_grad():
        net.U.left.weight.fill_(1)
        net.U.right.weight.fill_(1)
    assert kept_columns(net, {"r_U": 4})["r_U"].tolist() == [0, 1, 2, 3]


def test_what_cannot_be_cut_is_told() -> None:
    with pytest.raises(UsageError, match="only FastGRNN"):
        kept_columns(build("resnet", {"depth": 8}), {"r_U": 1})
    with pytest.raises(UsageError, match="cannot become 7"):
        kept_columns(model(), {"r_U": 7})
    broken = model()
    with torch.no_grad():
        broken.W.left.weight[0, 0] = torch.nan
    with pytest.raises(CompressError, match="NaN"):
        kept_columns(broken, {"r_W": 1})
