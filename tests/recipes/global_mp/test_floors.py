"""Counts: how many weights go, how few a layer keeps, and that the two are reconciled exactly."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.recipes.global_mp.floors import allot, check_feasible, layer_floors, target_count

SIZES = {"conv.weight": 100, "layers.0.q.weight": 1000, "layers.1.q.weight": 1000, "head.weight": 10}


def test_a_decimal_sparsity_means_the_decimal() -> None:
    assert target_count(0.7, 10) == 7  # in binary 0.7 * 10 is below 7
    assert target_count(0.29, 100) == 29
    assert target_count(0.25, 2) == 1  # a half goes upwards
    assert target_count(0, 10) == 0
    assert target_count(1e-7, 10**9) == 100


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), 0.96])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError) as error:
        target_count(sparsity, 10)
    assert error.value.where == "sparsity" and error.value.fix


def test_one_floor_for_all_keeps_a_smaller_layer_whole() -> None:
    assert layer_floors(SIZES, 50) == {**dict.fromkeys(SIZES, 50), "head.weight": 10}
    # The paper's 0.2 % of 2,110 weights is 4.22: at least that many are 5.
    assert layer_floors(SIZES, 0.002) == dict.fromkeys(SIZES, 5)
    assert layer_floors(SIZES) == dict.fromkeys(SIZES, 0)


def test_a_floor_by_name_replaces_the_one_for_all_and_the_last_pattern_decides() -> None:
    floors = layer_floors(SIZES, 20, {"layers.*": 0.1, "layers.1.*": 7, "head.weight": 1.0})
    assert floors == {"conv.weight": 20, "layers.0.q.weight": 100, "layers.1.q.weight": 7, "head.weight": 10}


@pytest.mark.parametrize(
    ("sigma", "by_name", "part"),
    [
        (-1, {}, "out of range"),
        (1.0, {}, "out of range"),
        (float("nan"), {}, "out of range"),
        (0, {"heads.*": 1}, "matches no prunable layer"),
        (0, {"head.*": 11}, "larger than the layer head.weight (10)"),
        (0, {"head.*": -1}, "out of range"),
        (0, {"head.*": 1.1}, "out of range"),
    ],
)
def test_a_floor_that_cannot_be_is_refused(sigma: float, by_name: dict[str, float], part: str) -> None:
    with pytest.raises(UsageError, match=re.escape(part)):
        layer_floors(SIZES, sigma, by_name)


def test_an_infeasible_target_names_the_layers_and_the_largest_sparsity_that_is_feasible() -> None:
    floors = {"layers.0.q.weight": 900, "head.weight": 10}
    check_feasible(SIZES, floors, 1200)
    with pytest.raises(CompressError) as error:
        check_feasible(SIZES, floors, 1201)
    assert "hold 910 of 2,110 weights" in error.value.what
    assert error.value.where.startswith("layers.0.q.weight (900 of 1,000), head.weight")
    said = re.search(r"at most ([\d.]+) \(1,200 weights\)", error.value.fix)
    assert said and target_count(float(said[1]), 2110) == 1200


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_the_feasible_sparsity_that_is_named_is_feasible(sizes: list[int], data: st.DataObject) -> None:
    floors = {f"l{i}": data.draw(st.integers(0, size)) for i, size in enumerate(sizes)}
    named = {f"l{i}": size for i, size in enumerate(sizes)}
    free = sum(sizes) - sum(floors.values())
    if free == sum(sizes):
        return
    with pytest.raises(CompressError) as error:
        check_feasible(named, floors, free + 1)
    said = re.search(r"at most ([\d.]+) ", error.value.fix)
    assert said
    check_feasible(named, floors, target_count(float(said[1]), sum(sizes)))


def test_ties_are_given_in_order_up_to_each_cap() -> None:
    # 5 + 1 lie below; of 4 more, the first layer's cap allows 2, the second layer has 1, the third gives the rest.
    assert allot([5, 1, 0], [9, 2, 6], [7, 9, 9], 10) == [7, 2, 1]


def test_a_threshold_that_is_not_the_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="is not between 3 and 5"):
        allot([1, 2], [2, 3], [9, 9], 6)


def test_pouring_is_the_same_as_protecting_the_largest() -> None:
    """The water-fill of the docstring against a sort in which the protected weights do not take part."""
    draw = random.Random(0)
    for _ in range(2000):
        layers = [sorted(draw.randint(0, 8) for _ in range(draw.randint(1, 12))) for _ in range(draw.randint(1, 4))]
        floors = [draw.randint(0, len(layer)) for layer in layers]
        caps = [len(layer) - floor for layer, floor in zip(layers, floors, strict=True)]
        target = draw.randint(0, sum(caps))
        free = sorted((w, i) for i, layer in enumerate(layers) for w in layer[: caps[i]])
        want = [sum(i == j for _, i in free[:target]) for j in range(len(layers))]
        threshold = free[target - 1][0] if target else 0
        below = [sum(w < threshold for w in layer) for layer in layers]
        upto = [sum(w <= threshold for w in layer) for layer in layers]
        assert allot(below, upto, caps, target) == want
