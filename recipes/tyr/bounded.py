"""The search under budgets: what every level takes of each, solutions to start from, and offspring. All of them keep
every budget; the knapsack is an integer program (`compress.language.constrained`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.language.budget import Option
from compress.language.constrained import Bound, Bounds, solve
from compress.processes.distributed import main_says
from compress.recipes.tyr.choice import left_alone
from compress.recipes.tyr.search import RULES, Breed, Genome, offspring_of, penalised

if TYPE_CHECKING:
    from compress.language.limits import Limit

NEAR = 0.01  # an answer under noise or a penalty need not be the best of its losses: a share above the least

ATTEMPTS = 6  # at each offspring; where few solutions keep the budgets, most of what is drawn has been seen


def bounds_of(limits: Sequence[Limit], described: Sequence[Sequence[Sequence[int]]]) -> Bounds:
    """The budgets over a supernet's levels.

    Args:
        described: every sublayer's levels in genome order: [KV groups, query heads in each] or [neurons].
    """
    each = []
    for limit in limits:
        prices = limit.prices
        costs = tuple(
            tuple(prices.ffn(i // 2, *level) if i % 2 else prices.attention(i // 2, *level) for level in menu)
            for i, menu in enumerate(described)
        )
        each.append(Bound(limit.text, costs, limit.most - prices.rest))
    return Bounds(tuple(each))


def starts(options: Sequence[Sequence[Option]], bounds: Bounds, base: Genome | None) -> dict[str, Genome]:
    """Genomes worth starting from, as `compress.recipes.tyr.search.starts` gives them, that keep every bound."""
    found: dict[str, Genome] = {"knapsack": tuple(_best(options, bounds, 0.0))}
    if base is not None and bounds.hold(base):
        found["incumbent"] = base
    for label, bent in penalised(options, found["knapsack"], base):
        found[label] = tuple(_best(bent, bounds, NEAR))
    if base is None:
        layers = len(options) // 2
        front, back = left_alone(layers)
        edges = {*range(front), *range(layers - back, layers)}
        for label, spared in zip(RULES, (set(), edges), strict=True):
            rule = _alike(options, bounds, spared)
            if rule is not None:
                found[label] = rule
    return found


def _alike(options: Sequence[Sequence[Option]], bounds: Bounds, spared: set[int]) -> Genome | None:
    """Every block but the ``spared`` cut alike and as little as the bounds let it, attention only where the FFNs cannot
    give enough; None where that is not enough either."""
    shares = [sorted({o.saving / (max(p.saving for p in menu) or 1) for o in menu}) for menu in options]
    for attention in sorted({s for menu in shares[::2] for s in menu}):
        for ffn in sorted({s for menu in shares[1::2] for s in menu}):
            genome = tuple(
                _level(menu, 0.0 if i // 2 in spared else (ffn if i % 2 else attention))
                for i, menu in enumerate(options)
            )
            if bounds.hold(genome):
                return genome
    return None


def _level(menu: Sequence[Option], share: float) -> int:
    """The level that gives up least of those that give up that share of the most."""
    most = max(o.saving for o in menu) or 1
    able = [e for e, o in enumerate(menu) if o.saving >= share * most - 1e-9 * most]
    return min(able, key=lambda e: (menu[e].saving, e))


def breeder(options: Sequence[Sequence[Option]], bounds: Bounds) -> Breed:
    """Offspring that keep every bound: in turn level swaps, and solutions under losses disturbed by noise."""
    return lambda parent, count, rng, seen: offspring_of(
        options, parent, lambda noisy: _best(noisy, bounds, NEAR), bounds.hold, count, rng, seen, ATTEMPTS
    )


def _best(options: Sequence[Sequence[Option]], bounds: Bounds, gap: float) -> list[int]:
    """The main process's solution, for all: nobody has said that a solver gives the same on every processor."""
    return main_says(lambda: solve(options, bounds, gap))
