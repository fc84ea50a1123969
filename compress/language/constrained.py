"""The exact choice of one level per sublayer under several limits at once: integer programming, checked in integers.

As in `compress.language.budget` nothing here knows a model. A bound's costs are whole numbers (bytes, parameters,
picoseconds), so that a sum is exact whatever a solver's tolerance is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.language.budget import Option

ATTEMPTS = 32  # solutions that lie over a bound by less than a solver sees are refused one by one: so many


@dataclass(frozen=True)
class Bound:
    """``costs[i][e]`` is what option ``e`` of menu ``i`` takes; all that are chosen together take at most ``most``.

    ``title`` names it in messages.
    """

    title: str
    costs: tuple[tuple[int, ...], ...]
    most: int

    def used(self, choice: Sequence[int]) -> int:
        return sum(costs[e] for costs, e in zip(self.costs, choice, strict=True))

    @property
    def least(self) -> int:
        """What the cheapest option of every menu takes together."""
        return sum(map(min, self.costs))


@dataclass(frozen=True)
class Bounds:
    """What a search keeps to, in place of an exact total."""

    each: tuple[Bound, ...]

    def hold(self, choice: Sequence[int]) -> bool:
        return all(bound.used(choice) <= bound.most for bound in self.each)


def solve(menus: Sequence[Sequence[Option]], bounds: Bounds, gap: float = 0.0) -> list[int]:
    """Chooses one option per menu so that the losses sum to the least possible and every bound holds, in integers.

    Args:
        gap: how much more than the least, as a share of it, the losses may sum to: an answer that need not be the best
            comes sooner.

    Returns:
        The index of the option taken from each menu.

    Raises:
        CompressError: no combination keeps all bounds.
    """
    for bound in bounds.each:
        if bound.least > bound.most:
            raise beyond(bound)
    places = np.concatenate([[0], np.cumsum([len(menu) for menu in menus])])
    refused: list[list[int]] = []
    for _ in range(ATTEMPTS):
        x = _solved(menus, bounds, refused, gap)
        choice = [int(x[a:b].argmax()) for a, b in pairwise(places)]
        if bounds.hold(choice):
            return choice
        refused.append([int(a) + e for a, e in zip(places[:-1], choice, strict=True)])
    raise CompressError(
        "the solver's choices lie over a budget by its rounding, however often it is asked",
        where="budget",
        fix="allow a little more of one of the budgets",
    )


def _solved(
    menus: Sequence[Sequence[Option]], bounds: Bounds, refused: Sequence[Sequence[int]], gap: float
) -> np.ndarray[Any, Any]:
    """The solver's own answer: a number near 0 or 1 for every option of every menu, none of ``refused`` among them.

    Raises:
        CompressError: there is none.
    """
    from scipy.optimize import Bounds as Box
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_matrix

    sizes = [len(menu) for menu in menus]
    losses = np.array([option.loss for menu in menus for option in menu])
    options = len(losses)
    one = csr_matrix((np.ones(options), (np.repeat(np.arange(len(menus)), sizes), np.arange(options))))
    rows = [LinearConstraint(one, 1, 1)]
    for bound in bounds.each:
        # A menu's cheapest option is taken for granted, so that the numbers are no larger than they must be.
        extra = np.array([c - min(costs) for costs in bound.costs for c in costs], dtype=float)
        unit = float(extra.max()) or 1.0
        rows.append(LinearConstraint(extra[None] / unit, -np.inf, (bound.most - bound.least) / unit))
    for chosen in refused:
        row = np.zeros((1, options))
        row[0, chosen] = 1
        rows.append(LinearConstraint(row, -np.inf, len(chosen) - 1))
    # The solver stops within 1e-6 of the optimum whatever the unit is: the unit is made small.
    scale = float(np.abs(losses).max()) or 1.0
    found = milp(
        1e4 * losses / scale,
        integrality=np.ones(options),
        bounds=Box(0, 1),
        constraints=rows,
        options={"mip_rel_gap": gap},
    )
    if found.x is None:
        raise CompressError(
            f"no choice of levels keeps all budgets at once ({', '.join(b.title for b in bounds.each)})",
            where="budget",
            fix="allow more of one of them",
        )
    x: np.ndarray[Any, Any] = found.x
    return x


def beyond(bound: Bound) -> CompressError:
    """That a bound is below what stays when every menu gives up all it can."""
    return CompressError(
        f"{bound.title} is out of reach: the levels take at least {bound.least / bound.most:.4g} times as much"
        if bound.most > 0
        else f"{bound.title} is out of reach: what is never pruned alone takes more",
        where="budget",
        fix="allow more, or let more of the model be pruned (levels, interval, tyr.attention)",
    )
