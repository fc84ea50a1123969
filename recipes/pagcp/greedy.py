"""The greedy pass (Algorithm 1 of the paper): group after group, as much as the worst-hit task tolerates.

Every state of the pass is the number of units each group keeps; which units those are is settled before it. What is
measured is the network cut to that state, so the last accepted measurement is that of the network that is saved.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.data.inputs import Inputs
from compress.errors import CompressError
from compress.networks.surgery import cut
from compress.recipes.pagcp.costs import Costs
from compress.recipes.pagcp.groups import Group
from compress.recipes.pagcp.norms import Settle
from compress.recipes.pagcp.options import PAGCPOptions
from compress.recipes.pagcp.oracle import Found, Judge, Readings
from compress.recipes.pagcp.replay import Replay, calls
from compress.run.progress import Progress

State = dict[str, int]  # group -> units kept
REFERENCE_RATIOS = 19  # the reference tries .05, .10 ... .95 of every group
SCALES = 6  # greedy passes that look for the scale of the tolerances, at most
CLOSE = 0.04  # overshoot of the share removed that is given back rather than looked for again
WIDER = 4  # groups that are tried when some is given back: those whose probe was the dearest


def decay(r0: float, count: int, total: float) -> float:
    """lambda with prod over i < count of (1 + r0 lambda^i) = total (section 3.4 of the paper).

    Raises:
        CompressError: there is none above 0: the first group alone takes more than ``total``.
    """

    def log_product(value: float) -> float:
        return sum(math.log1p(r0 * value**i) for i in range(count))

    if math.log1p(r0) > math.log(total):
        raise CompressError(
            f"r0 = {r0:g} alone is more than T = {total:g} allows",
            where="pagcp.r0",
            fix="lower r0 or raise pagcp.total",
        )
    low, high = 0.0, 1.0
    while log_product(high) < math.log(total):
        high *= 2
        if high > 1e6:  # a single group: r0 is all it takes
            break
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if log_product(middle) < math.log(total) else (low, middle)
    return (low + high) / 2


def first_rate(r0: float | None, count: int, total: float) -> float:
    """r0 where none is given: as far above equal parts as the reference's .06 is for 51 groups."""
    if r0 is not None:
        return r0
    return total - 1 if count == 1 else 1.68 * (total ** (1 / count) - 1)


def portions(r0: float, count: int, total: float) -> list[float]:
    """The share of every task's tolerance that each of ``count`` groups may use up; they sum to 1."""
    value = decay(r0, count, total)
    logs = [math.log1p(r0 * value**i) for i in range(count)]
    return [x / sum(logs) for x in logs]


@dataclass(frozen=True)
class Probe:
    """A group cut alone by about the share `PAGCPOptions.probe`: what that saves, and what it costs every task."""

    group: str
    kept: int
    saved_flops: int
    saved_parameters: int
    contribution: float
    rise: Readings  # readings, less those of the network before
    loss: dict[str, float]  # relative rise of every task's loss; of a job, how much worse its figure is


@dataclass(frozen=True)
class Decision:
    """What the oracle decided, and how."""

    state: State
    scale: float  # of the tolerances
    readings: Readings
    values: dict[str, dict[str, float]]
    probes: tuple[Probe, ...]
    order: tuple[str, ...]
    unpruned: dict[str, str]  # group -> why it was never tried
    decay: float
    trail: list[dict[str, Any]] = field(default_factory=list)


class Pruner:
    """One round: a network, its groups, the order in which their units go, and the oracle that judges."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        rankings: Mapping[str, Sequence[int]],
        oracle: Judge,
        options: PAGCPOptions,
        sample: Inputs,
        dense_flops: int,
        label: str = "pruning",
        settle: Settle | None = None,
    ) -> None:
        self.model, self.rankings, self.oracle, self.options = model, rankings, oracle, options
        self.groups = {g.name: g for g in groups}
        self.costs, self.dense_flops, self.label = Costs(model, sample), dense_flops, label
        self.settle = settle
        self.full: State = {g.name: g.units for g in groups}
        self.seen = calls(model, sample)
        self.prices: dict[str, float] = {}  # worst rise for FLOPs saved, by group
        self._replays: dict[str, Replay] = {}
        self._bar: Progress | None = None

    def judged_by(self, oracle: Judge) -> Pruner:
        """The same round before another oracle."""
        other = copy.copy(self)
        other.oracle, other._replays = oracle, {}
        return other

    # --- states ---

    def removed(self, state: Mapping[str, int]) -> dict[tuple[str, str], list[int]]:
        """The channels that are gone in a state."""
        found: dict[tuple[str, str], list[int]] = {}
        for name, kept in state.items():
            group = self.groups[name]
            for at, gone in group.removed(self.rankings[name][: group.units - kept]).items():
                found.setdefault(at, []).extend(gone)
        return {at: sorted(gone) for at, gone in found.items()}

    def cut(self, state: Mapping[str, int]) -> nn.Module:
        """The network of a state, its norms settled."""
        network = cut(self.model, self.removed(state)).eval()
        return self.settle(network) if self.settle is not None else network

    def flops(self, state: Mapping[str, int]) -> int:
        return sum(self.costs.flops(self.removed(state)).values())

    def removal(self, state: Mapping[str, int]) -> float:
        """Share of the dense network's FLOPs that are gone."""
        return 1 - self.flops(state) / self.dense_flops

    def levels(self, name: str) -> tuple[int, ...]:
        return self.groups[name].levels(self.options.keep)

    def least(self) -> State:
        """Every group as narrow as it may become."""
        return {name: self.levels(name)[-1] for name in self.groups}

    # --- measuring ---

    def measure(self, state: Mapping[str, int], bound: Readings | None = None, at: str | None = None) -> Found:
        """Measures a state; ``at`` is the group in which it differs from those that were measured just before."""
        replay, kept_share = None, 0.0
        flops = self.costs.flops(self.removed(state))
        if at is not None and self.options.cache_bytes:
            others = json.dumps({k: v for k, v in state.items() if k != at}, sort_keys=True)
            key = f"{at} {others}"
            if key not in self._replays:
                changed = {m.layer for m in self.groups[at].members}
                # One group at a time: what is kept of another is of no more use.
                self._replays = {key: Replay(self.seen, changed, self.options.cache_bytes)}
            replay = self._replays[key]
            kept_share = sum(v for name, v in flops.items() if not replay.covers(name)) / self.dense_flops
        key = " ".join(f"{name}:{kept}" for name, kept in sorted(state.items()) if kept != self.full[name]) or "base"
        found = self.oracle.measure(
            key,
            lambda: self.cut(state),
            sum(flops.values()) / self.dense_flops,
            bound=bound,
            replay=replay,
            replayed_share=kept_share,
            extra=self._settling() * sum(flops.values()) / self.dense_flops,
        )
        if self._bar is not None:
            worst = max(found.least.values())
            self._bar.update(1, f"{100 * self.removal(state):.0f} % of FLOPs gone, worst task at {worst:.2f}")
        return found

    def _settling(self) -> float:
        """What the norms' samples come to in passes over the dense network."""
        return self.oracle.settling(self.settle.samples) if self.settle is not None else 0.0

    # --- the parts of the algorithm ---

    def probe(self, contribution: Callable[[str, State], float] | None) -> list[Probe]:
        """Every group cut alone; ``contribution`` (of a state with one group cut) replaces FLOPs and parameters."""
        start = self.measure(self.full)
        assert start.values is not None
        found = []
        for name, group in self.groups.items():
            levels = self.levels(name)
            if len(levels) < 2:
                continue
            kept = min(levels[1:], key=lambda n: abs(n - group.units * (1 - self.options.probe)))
            state = self.full | {name: kept}
            alone = self.measure(state, at=name)
            assert alone.values is not None
            saved = self.flops(self.full) - self.flops(state)
            slim = self.costs.parameters({}) - self.costs.parameters(self.removed(state))
            worth = {"flops": float(saved), "parameters": float(slim)}
            found.append(
                Probe(
                    name,
                    kept,
                    saved,
                    slim,
                    worth[self.options.contribution] if contribution is None else contribution(name, state),
                    {t: alone.least[t] - start.least[t] for t in start.least},
                    self.oracle.rise(start.values, alone.values),
                )
            )
        return found

    def greedy(self, order: Sequence[str], parts: Sequence[float], scale: float, cap: float) -> tuple[State, Found]:
        """One pass over the groups with all tolerances times ``scale``; no reading passes ``cap``."""
        state, now = dict(self.full), self.measure(self.full)
        for name, part in zip(order, parts, strict=True):
            levels = self.levels(name)
            bound = {t: min(max(0.0, v) + scale * part, max(cap, v)) for t, v in now.least.items()}
            low, high = levels.index(state[name]), len(levels)
            while high - low > 1:
                middle = (low + high) // 2
                found = self.measure(state | {name: levels[middle]}, bound, at=name)
                if found.values is not None and all(found.least[t] <= bound[t] for t in bound):
                    low, now = middle, found
                else:
                    high = middle
            state[name] = levels[low]
        return state, now

    def scan(self, order: Sequence[str], parts: Sequence[float], scale: float, cap: float) -> tuple[State, Found]:
        """The same pass as the reference makes it: every level in turn until one is too much. For comparison."""
        state, now = dict(self.full), self.measure(self.full)
        for name, part in zip(order, parts, strict=True):
            bound = {t: min(max(0.0, v) + scale * part, max(cap, v)) for t, v in now.least.items()}
            for kept in self.levels(name)[1:]:
                found = self.measure(state | {name: kept})
                if not all(found.least[t] <= bound[t] for t in bound):
                    break
                state[name], now = kept, found
        return state, now

    def decide(
        self,
        target: float | None,
        contribution: Callable[[str, State], float] | None = None,
        must: bool = True,
    ) -> Decision:
        """The whole round.

        Args:
            target: share of the dense network's FLOPs to be gone behind it; None takes the tolerances as they are.
            must: nothing within the tolerances is an error; in a later round it is not.

        Raises:
            CompressError: nothing can be pruned: every task's tolerance, or the network's own shape, forbids it.
        """
        tried = [name for name in self.groups if len(self.levels(name)) > 1]
        unpruned = {
            name: f"{g.units * g.channels} channels cannot be fewer in steps of {g.step * g.channels}"
            for name, g in self.groups.items()
            if name not in tried
        }
        if not tried:
            raise CompressError(
                f"no group can lose channels in multiples of {self.options.round_to}",
                where="pagcp.round_to",
                fix="lower it (pagcp.round_to=4), or prune a wider network",
            )
        with Progress(10 * len(tried), self.label) as self._bar:
            probes = self.probe(contribution)
            probes, dropped = self._filtered(probes)
            unpruned |= dropped
            r0 = first_rate(self.options.r0, len(probes), self.options.total)
            lam = decay(r0, len(probes), self.options.total)
            parts = portions(r0, len(probes), self.options.total)
            # The group that saves most gets the largest part, which comes last where the parts grow.
            order = [p.group for p in sorted(probes, key=lambda p: (-p.contribution, p.group))][
                :: 1 if lam <= 1 else -1
            ]
            if target is None:
                state, found, scale = *self.greedy(order, parts, 1.0, 1.0), 1.0
                if must:
                    self._refuse_nothing(state, max(parts), probes)
            else:
                state, found, scale = self._reach(target, order, parts, self._guess(target, probes))
        self._bar = None
        assert found.values is not None
        return Decision(state, scale, found.least, found.values, tuple(probes), tuple(order), unpruned, lam)

    def _filtered(self, probes: list[Probe]) -> tuple[list[Probe], dict[str, str]]:
        """The layer filter: the share P of the groups that cost the worst-hit task least for what they save."""

        def price(p: Probe) -> float:
            return max(0.0, *p.rise.values()) / max(1, p.saved_flops)

        self.prices = {p.group: price(p) for p in probes}
        keep = max(1, round(self.options.share * len(probes)))
        best = {p.group for p in sorted(probes, key=lambda p: (price(p), p.group))[:keep]}
        reason = f"the layer filter keeps {keep} of {len(probes)} groups"
        return [p for p in probes if p.group in best], {p.group: reason for p in probes if p.group not in best}

    def _refuse_nothing(self, state: State, part: float, probes: Sequence[Probe]) -> None:
        if state != self.full:
            return
        cheapest = min(probes, key=lambda p: max(p.rise.values()))
        task = max(cheapest.rise, key=lambda t: cheapest.rise[t])
        raise CompressError(
            f"no group can lose a step of channels within the tolerances: the least harm ({cheapest.group} alone, to"
            f" {cheapest.kept} of {self.full[cheapest.group]}) takes {100 * cheapest.rise[task]:.3g} % of the tolerance"
            f" of {task!r}, and the largest part of a group is {100 * part:.3g} %",
            where="pagcp.tolerances",
            fix="allow more, raise pagcp.r0, or set pagcp.round_to lower; nothing was changed",
        )

    def _guess(self, target: float, probes: Sequence[Probe]) -> float:
        """The scale to begin with: what all probes take of the worst-hit task, grown as the square of FLOPs."""
        gone = self.removal(self.full | {p.group: p.kept for p in probes})
        tasks = probes[0].rise
        taken = max(sum(max(0.0, p.rise[t]) for p in probes) for t in tasks)
        left = max(1e-3, target - self.removal(self.full))
        return min(8.0, max(0.01, taken * (left / max(1e-3, gone - self.removal(self.full))) ** 2))

    def _reach(
        self, target: float, order: Sequence[str], parts: Sequence[float], scale: float
    ) -> tuple[State, Found, float]:
        """The smallest scale of the tolerances at which a greedy pass removes the ``target``, and its overshoot given
        back where that is cheapest for the worst-hit task."""
        least = {name: self.levels(name)[-1] if name in order else self.full[name] for name in self.groups}
        most = self.removal(least)
        if most < target:
            raise CompressError(
                f"{100 * target:.1f} % of the FLOPs cannot go: with every group as narrow as it may be it is"
                f" {100 * most:.1f} %",
                where="pagcp.flops",
                fix=f"ask for {math.floor(1000 * most) / 1000:g} at most, or lower pagcp.keep or pagcp.round_to",
            )
        low: tuple[float, float] | None = None  # scale, share removed: too little, enough
        high: tuple[float, float] | None = None
        best: tuple[float, State, Found, float] | None = None
        for _ in range(SCALES):
            state, found = self.greedy(order, parts, scale, math.inf)
            reached = self.removal(state)
            if reached >= target:
                high = scale, reached
                worst = max(found.least.values())
                if best is None or worst < best[0]:
                    best = worst, state, found, scale
                if reached - target < CLOSE:
                    break
            else:
                low = scale, reached
            if low is None or high is None:
                scale *= 2.0 if high is None else 0.5
                continue
            # Where a line between the two would meet the target, kept off both ends.
            at = (target + CLOSE / 2 - low[1]) / max(1e-9, high[1] - low[1])
            scale = low[0] * (high[0] / low[0]) ** min(0.9, max(0.1, at))
        if best is None:
            # However large the scale, the tasks' losses stay finite: the narrowest network is what is left.
            state = least
            best = 0.0, state, self.measure(state), scale
        _, state, found, scale = best
        return *self._given_back(state, found, target), scale

    def _given_back(self, state: State, found: Found, target: float) -> tuple[State, Found]:
        """Widens groups while the target stays reached, each time where it helps the worst-hit task most, of the groups
        that were the dearest to cut."""
        while True:
            wider: list[State] = []
            for name in sorted(self.groups, key=lambda n: (-self.prices.get(n, 0.0), n)):
                if len(wider) == WIDER:
                    break
                levels = self.levels(name)
                at = levels.index(state[name])
                if at and self.removal(state | {name: levels[at - 1]}) >= target:
                    wider.append(state | {name: levels[at - 1]})
            if not wider:
                return state, found
            measured = [(self.measure(s), s) for s in wider]
            found, state = min(measured, key=lambda v: max(v[0].least.values()))
