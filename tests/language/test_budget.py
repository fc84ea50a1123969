"""Budgets: exact against brute force."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.language.budget import Option, knapsack, nearest_feasible, target_removed

menu = st.lists(st.tuples(st.integers(0, 12), st.floats(0, 10)), min_size=1, max_size=4)
menus = st.lists(menu, min_size=1, max_size=4).map(lambda ms: [[Option(36 * s, loss) for s, loss in m] for m in ms])


def brute(options: list[list[Option]], total: int) -> float | None:
    sums = [sum(o.loss for o in c) for c in product(*options) if sum(o.saving for o in c) == total]
    return min(sums, default=None)


@settings(max_examples=150, deadline=None)
@given(menus, st.integers(0, 50))
def test_knapsack_is_the_brute_force_optimum(options: list[list[Option]], units: int) -> None:
    best = brute(options, 36 * units)
    if best is None:
        with pytest.raises(CompressError, match="no choice of levels"):
            knapsack(options, 36 * units)
        return
    chosen = knapsack(options, 36 * units)
    assert sum(m[i].saving for m, i in zip(options, chosen, strict=True)) == 36 * units
    assert sum(m[i].loss for m, i in zip(options, chosen, strict=True)) == pytest.approx(best)


@settings(max_examples=150, deadline=None)
@given(menus, st.integers(0, 1800))
def test_nearest_feasible_is_the_brute_force_nearest(options: list[list[Option]], target: int) -> None:
    totals = {sum(o.saving for o in c) for c in product(*options)}
    if target > sum(max(o.saving for o in m) for m in options):
        with pytest.raises(CompressError, match="at most"):
            nearest_feasible(options, target)
        return
    found = nearest_feasible(options, target)
    assert found in totals
    assert abs(found - target) == min(abs(t - target) for t in totals)


def test_an_infeasible_total_names_the_nearest_feasible() -> None:
    options = [[Option(0, 0.0), Option(10, 1.0)], [Option(0, 0.0), Option(25, 1.0)]]
    with pytest.raises(CompressError) as error:
        knapsack(options, 30)
    assert "35" in error.value.fix


def test_the_target_is_an_integer_without_floating_point_loss() -> None:
    assert target_removed(0.29, 100) == 29  # int(100 * 0.29) is 28
