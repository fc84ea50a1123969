"""Budgets: integer costs, and the exact choice of one level per sublayer.

Nothing here knows a model: a *menu* is the list of options of one sublayer, each with an integer saving
(parameters it removes) and a loss. All sums are exact integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.errors import CompressError


@dataclass(frozen=True)
class Option:
    """One level of one sublayer: ``saving`` parameters removed (int), ``loss`` what it costs (any unit)."""

    saving: int
    loss: float


def target_removed(sparsity: float, backbone: int) -> int:
    """The number of parameters a sparsity (share of ``backbone``) asks to remove, rounded to the nearest integer."""
    return round(sparsity * backbone)


def _reachable(menus: Sequence[Sequence[Option]], unit: int, capacity: int) -> np.ndarray:
    """Boolean (capacity + 1,): which totals, in ``unit``s, some combination reaches."""
    reach = np.zeros(capacity + 1, dtype=bool)
    reach[0] = True
    for menu in menus:
        new = np.zeros_like(reach)
        for saving in {o.saving // unit for o in menu}:
            if saving <= capacity:
                new[saving:] |= reach[: capacity + 1 - saving]
        reach = new
    return reach


def common_unit(menus: Sequence[Sequence[Option]]) -> int:
    """The greatest common divisor of all savings: every total is a multiple of it."""
    return math.gcd(*(o.saving for menu in menus for o in menu)) or 1


def nearest_feasible(menus: Sequence[Sequence[Option]], target: int) -> int:
    """The total saving nearest to ``target`` that one option per menu can reach (the larger of two equally near).

    Raises:
        CompressError: the target lies above what all menus together can save.
    """
    most = sum(max(o.saving for o in menu) for menu in menus)
    if target > most:
        raise CompressError(
            f"the budget asks to remove {target:,} parameters, but the sublayers can give up at most {most:,}",
            where="sparsity",
            fix="lower the sparsity, or allow more of the model to be pruned (levels, interval, attention)",
        )
    unit = common_unit(menus)
    reach = np.flatnonzero(_reachable(menus, unit, most // unit)) * unit
    distance = np.abs(reach - target)
    return int(reach[distance == distance.min()].max())


def _infeasible(menus: Sequence[Sequence[Option]], total: int) -> CompressError:
    most = sum(max(o.saving for o in menu) for menu in menus)
    return CompressError(
        f"no choice of levels removes exactly {total:,} parameters",
        where="budget",
        fix=f"the nearest feasible total is {nearest_feasible(menus, min(total, most)):,}",
    )


def knapsack_cells(menus: Sequence[Sequence[Option]], total: int) -> tuple[int, int]:
    """(cells of the tables that `knapsack` goes through, its capacity in units)."""
    capacity = total // common_unit(menus)
    return capacity * sum(map(len, menus)), capacity


def knapsack(menus: Sequence[Sequence[Option]], total: int) -> list[int]:
    """Chooses one option per menu so that the savings sum to ``total`` exactly and the losses to the least possible.

    Exact dynamic programming over integer totals (multiple-choice knapsack with equality); ties go to the option
    that stands first. Time and memory are O(menus x options x total / gcd).

    Returns:
        The index of the option taken from each menu.

    Raises:
        CompressError: no combination sums to ``total``; the nearest feasible total is named.
    """
    unit = common_unit(menus)
    if total % unit or total < 0:
        raise _infeasible(menus, total)
    capacity = total // unit
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    taken: list[np.ndarray] = []
    for menu in menus:
        new = np.full(capacity + 1, np.inf)
        pick = np.full(capacity + 1, -1, dtype=np.int32)
        for index, option in enumerate(menu):
            saving = option.saving // unit
            if saving > capacity:
                continue
            value = best[: capacity + 1 - saving] + option.loss
            better = value < new[saving:]
            new[saving:][better] = value[better]
            pick[saving:][better] = index
        best = new
        taken.append(pick)
    if not np.isfinite(best[capacity]):
        raise _infeasible(menus, total)
    choice: list[int] = []
    at = capacity
    for menu, pick in zip(reversed(menus), reversed(taken), strict=True):
        index = int(pick[at])
        choice.append(index)
        at -= menu[index].saving // unit
    return choice[::-1]
