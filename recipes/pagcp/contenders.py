"""Plans of one size that share out the channels differently, for a short recovery to choose among.

The greedy pass judges a network that is just cut. Training brings some losses back and others not, so its plan may cut
a group too deep; one width for all cuts none deep and knows no task. Between the two lie plans that neither finds.
Only how many channels a group keeps differs: which go first is settled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.recipes.pagcp.greedy import Pruner, State

GRID = 1000  # shares of a group's width that the uniform plan is looked for among


def nearest(pruner: Pruner, wanted: Mapping[str, float]) -> State:
    """Every group at the width it may have that is nearest to ``wanted`` (units); the wider of two as near."""
    return {name: min(pruner.levels(name), key=lambda n: (abs(n - want), -n)) for name, want in wanted.items()}


def fitted(pruner: Pruner, wanted: Mapping[str, float], target: float) -> State:
    """The widths near ``wanted`` that remove ``target`` and leave nothing to give back.

    Groups that are furthest above what is wanted, by their own width, are narrowed until the target is met; then those
    furthest below are widened as long as it stays met. A group that is wanted whole keeps all it has.

    Raises:
        ValueError: with every group that may be narrowed as narrow as it may be, the target is not met.
    """
    state = nearest(pruner, wanted)
    own = sorted(name for name, want in wanted.items() if want < pruner.full[name])

    def over(name: str, kept: int) -> float:
        return (kept - wanted[name]) / pruner.full[name]

    def beside(name: str, by: int) -> int | None:
        levels = pruner.levels(name)
        at = levels.index(state[name]) + by
        return levels[at] if 0 <= at < len(levels) else None

    while pruner.removal(state) < target:
        narrower = {name: kept for name in own if (kept := beside(name, 1)) is not None}
        if not narrower:
            raise ValueError(f"{target:g} of the FLOPs cannot go")
        name = max(narrower, key=lambda n: over(n, narrower[n]))
        state[name] = narrower[name]
    while True:
        wider = {name: kept for name in own if (kept := beside(name, -1)) is not None}
        wider = {name: kept for name, kept in wider.items() if pruner.removal(state | {name: kept}) >= target}
        if not wider:
            return state
        name = min(wider, key=lambda n: over(n, wider[n]))
        state[name] = wider[name]


def uniform(pruner: Pruner, names: Sequence[str], target: float) -> State:
    """The groups ``names`` at one share of their width, the others whole."""

    def wanted(share: int) -> dict[str, float]:
        return {name: units * share / GRID if name in names else float(units) for name, units in pruner.full.items()}

    low, high = 0, GRID  # the largest share that removes the target lies from low on, below high
    while high - low > 1:
        middle = (low + high) // 2
        enough = pruner.removal(nearest(pruner, wanted(middle))) >= target
        low, high = (middle, high) if enough else (low, middle)
    return fitted(pruner, wanted(low), target)


def blend(pruner: Pruner, one: State, other: State, share: float, target: float) -> State:
    """Widths that lie ``share`` of the way from ``one`` to ``other``."""
    return fitted(pruner, {name: (1 - share) * one[name] + share * other[name] for name in one}, target)


def contenders(
    pruner: Pruner, greedy: Mapping[str, State], names: Sequence[str], shares: Sequence[float], target: float
) -> dict[str, State]:
    """The greedy plans, the uniform one and the blends of each with it, by name; of two alike the first.

    Args:
        greedy: plans that remove ``target``, by name.
        names: the groups that may be narrowed.
        shares: of the way from a greedy plan to the uniform one.
    """
    even = uniform(pruner, names, target)
    found = {**greedy, "uniform": even}
    for name, state in greedy.items():
        for share in shares:
            found[f"{name}, {100 * share:g} % uniform"] = blend(pruner, state, even, share, target)
    different: dict[str, State] = {}
    for name, state in found.items():
        if state not in different.values():
            different[name] = state
    return different
