"""One level per sublayer under several bounds: as good as every combination tried, and never over a bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.errors import CompressError
from compress.language.budget import Option, knapsack
from compress.language.constrained import Bound, Bounds, solve


def drawn(seed: int, large: int) -> tuple[list[list[Option]], Bounds]:
    """Menus of 2 to 4 options, whose costs fall as their losses rise, and three bounds between the least and the
    most."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, 6)
    menus = [[Option(0, float(v)) for v in np.sort(rng.gamma(1.0, 1.0, n)) - 0.1] for n in sizes]
    each = []
    for k in range(3):
        costs = tuple(tuple(int(c) for c in -np.sort(-rng.integers(0, large, n))) for n in sizes)
        least, most = sum(map(min, costs)), sum(map(max, costs))
        each.append(Bound(f"bound {k}", costs, int(least + (most - least) * rng.uniform(0.2, 0.9))))
    return menus, Bounds(tuple(each))


def every(menus: list[list[Option]], bounds: Bounds) -> list[tuple[float, tuple[int, ...]]]:
    """(loss, choice) of all that keep the bounds."""
    choices = itertools.product(*(range(len(menu)) for menu in menus))
    return [
        (sum(menus[i][e].loss for i, e in enumerate(choice)), choice)
        for choice in choices
        if all(sum(b.costs[i][e] for i, e in enumerate(choice)) <= b.most for b in bounds.each)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_the_choice_is_the_best_of_all_that_keep_every_bound(seed: int) -> None:
    menus, bounds = drawn(seed, large=(50, 10**6, 10**12)[seed % 3])
    able = every(menus, bounds)
    chosen = solve(menus, bounds)
    assert tuple(chosen) in {choice for _, choice in able}
    assert sum(menu[e].loss for menu, e in zip(menus, chosen, strict=True)) == pytest.approx(min(able)[0], rel=1e-9)


def test_a_bound_that_is_met_to_the_last_unit_is_kept_and_one_less_is_another_choice() -> None:
    large = 10**15
    menus = [[Option(0, 0.0), Option(0, 1.0)], [Option(0, 0.0), Option(0, 5.0)]]
    costs = ((large + 1, 3), (large + 1, 3))
    assert solve(menus, Bounds((Bound("b", costs, large + 4),))) == [1, 0]
    # A unit in 10^15 is less than the solver's tolerance: only whole numbers tell.
    assert solve(menus, Bounds((Bound("b", costs, large + 3),))) == [1, 1]


def test_one_bound_on_savings_is_the_plain_knapsack() -> None:
    rng = np.random.default_rng(3)
    menus = [
        [Option(int(s), float(v)) for s, v in zip(range(0, 40, 8), np.cumsum(rng.gamma(1, 1, 5)), strict=True)]
        for _ in range(8)
    ]
    total = 8 * 16
    kept = tuple(tuple(32 - option.saving for option in menu) for menu in menus)
    bounds = Bounds((Bound("kept", kept, 8 * 32 - total),))
    # Every level is 8 apart and losses rise with it, so that nothing is gained by saving more than is asked.
    exact, bounded = knapsack(menus, total), solve(menus, bounds)
    loss = [sum(menu[e].loss for menu, e in zip(menus, c, strict=True)) for c in (exact, bounded)]
    assert loss[1] == pytest.approx(loss[0], rel=1e-9)


def test_a_bound_below_the_least_is_refused_by_its_name() -> None:
    bounds = Bounds((Bound("size<=1MB", ((9, 5), (9, 5)), 9),))
    with pytest.raises(CompressError, match=r"size<=1MB is out of reach: the levels take at least 1\.111 times"):
        solve([[Option(0, 0.0), Option(0, 1.0)]] * 2, bounds)


def test_bounds_that_can_be_kept_one_by_one_but_not_together_are_all_named() -> None:
    bounds = Bounds((Bound("a", ((9, 1),), 1), Bound("b", ((1, 9),), 1)))
    with pytest.raises(CompressError, match=r"no choice of levels keeps all budgets at once \(a, b\)"):
        solve([[Option(0, 0.0), Option(0, 1.0)]], bounds)
