"""The oracle: how much worse each task is on the calibration split, in units of the tolerance that the task was given.

A reading of 0 is the dense network's value and 1 the worst that is allowed. With a tolerance tau relative to a loss it
is log(loss / base) / log(1 + tau), so that readings of groups add up where the paper's factors multiply; the other
kinds are alike (`used`). What is measured is the sliced network itself, the one that would be saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.folder_images import FolderImages
from compress.data.images import Split, Splits, batches
from compress.data.job import Figure
from compress.data.tasks import KINDS, Counts, Task, by_task, exact, task_loss, together
from compress.errors import CompressError, UsageError
from compress.processes.distributed import gather, rank, world
from compress.recipes.pagcp.options import PAGCPOptions, Tolerance
from compress.recipes.pagcp.replay import Replay
from compress.run.folder import Journal, Notes
from compress.schema.recipe import nearest

Readings = dict[str, float]  # task -> share of its tolerance


# --- tolerances -------------------------------------------------------------------------------------------------------


def tolerances(options: PAGCPOptions, tasks: Sequence[str]) -> dict[str, Tolerance]:
    """Every task's tolerance.

    Raises:
        UsageError: one is named that is no task, or some are named and a task is left without.
    """
    for name in options.tolerances:
        if name not in tasks:
            raise UsageError(f"there is no task {name!r}", where="pagcp.tolerances", fix=nearest(name, list(tasks)))
    default = options.tolerance
    if default is None and not options.tolerances:
        default = Tolerance(measure="loss", relative=options.total - 1)
    found = {}
    for name in tasks:
        own = options.tolerances.get(name, default)
        if own is None:
            raise UsageError(
                f"the task {name!r} has no tolerance",
                where="pagcp.tolerances",
                fix=f"give it one (pagcp.tolerances.{name}), or pagcp.tolerance for every task not named",
            )
        found[name] = own
    return found


def used(tolerance: Tolerance, base: float, value: float, rising: bool) -> float:
    """The share of a tolerance that ``value`` uses up; negative where it is better than ``base``.

    Args:
        rising: whether more is better.
    """
    tau = tolerance.absolute
    if tau is not None:
        return (base - value) / tau if rising else (value - base) / tau
    assert tolerance.relative is not None  # one of the two is given
    worse = math.log1p(-tolerance.relative) if rising else math.log1p(tolerance.relative)
    if base <= 0:
        raise CompressError(
            f"a relative tolerance of a value that is {base:g}",
            where="pagcp.tolerances",
            fix="give that task an absolute tolerance",
        )
    if value <= 0:
        return math.inf if rising else -math.inf
    return math.log(value / base) / worse


# --- calibration ------------------------------------------------------------------------------------------------------


def calibration(data: Splits, samples: int | None) -> Split:
    """The samples that are looked at: ``samples`` of the calibration split, spread over it.

    Raises:
        CompressError: one of them is in the test split too.
    """
    split = data.calibration
    if samples is not None and samples < len(split):
        split = split.take(torch.arange(samples) * len(split) // samples)
    both = _prints(split) & _prints(data.test)
    if both:
        raise CompressError(
            f"{len(both)} samples are in the calibration split and in the test split",
            where="data",
            fix="keep them apart: what decides must not be what is reported",
        )
    return split


def _prints(split: Split) -> set[bytes]:
    import hashlib

    if isinstance(split.inputs, FolderImages):
        return {hashlib.sha256(path.read_bytes()).digest() for path in split.inputs.paths}
    return {hashlib.sha256(x.contiguous().numpy().tobytes()).digest() for x in split.inputs}


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What the oracle says of one network: values by task where it was measured whole, else how bad it is at least."""

    values: dict[str, dict[str, float]] | None
    least: Readings  # readings, or lower bounds of them


class Judge:
    """What is remembered of networks that were measured, and how bad that makes them.

    Every measurement is noted in ``journal`` under its key and never made twice, so a run that was stopped decides as
    one that was not. Work is counted in passes: FLOPs that were run, over those of the dense network on the whole
    split. Readings of the tasks in ``weights`` count so many times."""

    def __init__(
        self,
        tasks: Sequence[Task | Figure],
        limits: Mapping[str, Tolerance],
        journal: Journal | Notes,
        of: str,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.tasks, self.limits = tasks, limits
        self.journal, self.of, self.weights = journal, of, dict(weights or {})
        self.base: dict[str, dict[str, float]] | None = None
        self.known: dict[str, dict[str, Any]] = {}
        for row in journal.rows():
            if row["of"] == of:
                self._learn(row)

    def _learn(self, row: dict[str, Any]) -> None:
        self.known[row["key"]] = row

    def _note(self, key: str, values: Any, work: float, least: Readings | None = None) -> dict[str, Any]:
        """What was measured, in the journal and known from now on."""
        row = {"of": self.of, "key": key, "values": values, "least": least or {}, "work": work}
        self.journal.append(row)
        self._learn(row)
        return row

    @property
    def passes(self) -> float:
        """Forward passes of the dense network over the split that all measurements so far amount to."""
        return float(sum(row["work"] for row in self.journal.rows() if row["of"] == self.of))

    @property
    def measurements(self) -> int:
        return sum(row["of"] == self.of and row["work"] > 0 for row in self.journal.rows())

    def noted(self, key: str, measure: Callable[[], float]) -> float:
        """Another figure that is measured once and remembered, such as a latency."""
        if key not in self.known:
            self._note(key, measure(), 0.0)
        value: float = self.known[key]["values"]
        return value

    def measure(
        self,
        key: str,
        model: Any,
        share: float,
        *,
        bound: Readings | None = None,
        replay: Replay | None = None,
        replayed_share: float = 0.0,
        extra: float = 0.0,
    ) -> Found:
        """Measures a network, or tells what was found before.

        Args:
            key: what tells it from others.
            model: the network in evaluation mode, or a function that makes it.
            share: its FLOPs over the dense network's.
            bound: readings above which it is of no interest: it is given up as soon as one is certain to be.
            replay: runs it; ``replayed_share`` is ``share`` less what is not run again.
            extra: passes that making it takes.
        """
        raise NotImplementedError

    def settling(self, samples: int) -> float:
        """What taking batch norms' statistics on so many samples comes to, in passes."""
        raise NotImplementedError

    def rise(self, before: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, float]:
        """How much worse each task is than ``before``, relative to it."""
        raise NotImplementedError

    def _found(self, row: Mapping[str, Any]) -> Found:
        if row["values"] is None:
            return Found(None, dict(row["least"]))
        return Found(row["values"], self.readings(row["values"]))

    def readings(self, values: Mapping[str, Mapping[str, float]]) -> Readings:
        """Shares of the tolerances; 0 for every task until there is a base."""
        if self.base is None:
            return {name: 0.0 for name in values}
        found = {}
        for task in self.tasks:
            key, rising = measure_of(task, self.limits[task.name])
            reading = used(self.limits[task.name], self.base[task.name][key], values[task.name][key], rising)
            found[task.name] = self.weights.get(task.name, 1.0) * reading
        return found


class Oracle(Judge):
    """Measures networks on one split of our data."""

    def __init__(
        self,
        data: Splits,
        split: Split,
        limits: Mapping[str, Tolerance],
        batch: int,
        journal: Journal | Notes,
        of: str,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(data.tasks, limits, journal, of, weights)
        self.data, self.split, self.batch = data, split, batch

    def weighed(self, weights: Mapping[str, float]) -> Oracle:
        """Another oracle on the same split, with other weights; it knows what this one has measured whole."""
        other = Oracle(
            self.data,
            self.split,
            self.limits,
            self.batch,
            self.journal,
            f"{self.of} {json.dumps(dict(weights), sort_keys=True)}",
            weights,
        )
        other.base = self.base
        # What was given up was so by these weights.
        other.known = {k: row for k, row in self.known.items() if row["values"] is not None} | other.known
        return other

    def measure(
        self,
        key: str,
        model: Any,
        share: float,
        *,
        bound: Readings | None = None,
        replay: Replay | None = None,
        replayed_share: float = 0.0,
        extra: float = 0.0,
    ) -> Found:
        row = self.known.get(key)
        if row is not None:
            whole = row["values"] is not None
            if whole or (bound is not None and any(row["least"][t] > bound[t] for t in bound)):
                return self._found(row)
        net = model() if not isinstance(model, nn.Module) else model
        losses, counts, seen, work = self._sums(net, share, bound, replay, replayed_share)
        if seen < len(self.split):
            return self._found(self._note(key, None, work + extra, self._least(losses, counts, seen)))
        values = {
            task.name: {"loss": loss / seen, **KINDS[task.kind].measure(task, together(own))}
            for task, loss, own in zip(self.data.tasks, losses, counts, strict=True)
        }
        return self._found(self._note(key, values, work + extra))

    def settling(self, samples: int) -> float:
        return samples / len(self.split)

    def rise(self, before: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, float]:
        return {t: values[t]["loss"] / before[t]["loss"] - 1 for t in before}

    def _least(self, losses: Sequence[float], counts: Sequence[Sequence[Counts]], seen: int) -> Readings:
        """Readings that the whole split cannot fall below, whatever is still to come."""
        found = {}
        assert self.base is not None  # nothing is given up before there is one
        for task, loss, own in zip(self.data.tasks, losses, counts, strict=True):
            limit, base = self.limits[task.name], self.base[task.name]
            at_best = -math.inf
            if limit.measure == "loss":
                at_best = used(limit, base["loss"], loss / len(self.split), False)
            elif task.kind == "classes":
                # All that is still to come may be right.
                hits, left = sum(float(c.sums[0]) for c in own), len(self.split) - seen
                at_best = used(limit, base["accuracy"], (hits + left) / len(self.split), True)
            found[task.name] = self.weights.get(task.name, 1.0) * at_best
        return found

    @torch.no_grad()
    def _sums(
        self, model: nn.Module, share: float, bound: Readings | None, replay: Replay | None, replayed_share: float
    ) -> tuple[list[float], list[list[Counts]], int, float]:
        """Losses summed and counts by task, samples seen, and the work.

        Processes take batches in turn, and what each gives is added in the order of the batches, up to the batch behind
        which the network is given up: so one process and several find the same, to the last bit.
        """
        model.eval()
        place = next(model.parameters()).device
        losses = [0.0 for _ in self.data.tasks]
        counts: list[list[Counts]] = [[] for _ in self.data.tasks]
        seen, work = 0, 0.0
        parts = list(enumerate(batches(len(self.split), self.batch)))
        for start in range(0, len(parts), world()):
            mine = [self._batch(model, n, at, place, replay) for n, at in parts[start : start + world()][rank() :][:1]]
            for count, more, own, kept in gather(mine):
                losses = [a + b for a, b in zip(losses, more, strict=True)]
                for found, one in zip(counts, own, strict=True):
                    found.append(one)
                seen += count
                work += count / len(self.split) * (replayed_share if kept else share)
                if bound is not None and self.base is not None and seen < len(self.split):
                    least = self._least(losses, counts, seen)
                    if any(least[t] > bound[t] for t in bound):
                        return losses, counts, seen, work
        return losses, counts, seen, work

    def _batch(
        self, model: nn.Module, number: int, at: Tensor, place: torch.device, replay: Replay | None
    ) -> tuple[int, list[float], list[Counts], bool]:
        x = self.data.prepare(self.split.inputs[at].to(place))
        raw, kept = replay.run(model, number, x) if replay is not None else (model(x), False)
        outputs = by_task(raw, self.data.tasks)
        losses, counts = [], []
        for task in self.data.tasks:
            target, output = self.split.targets[task.name][at].to(place), outputs[task.name]
            loss = float(exact(task_loss(task, output, target)))
            losses.append(loss if math.isfinite(loss) else math.inf)
            counts.append(KINDS[task.kind].count(task, output, target))
        return len(at), losses, counts, kept


def measure_of(task: Task | Figure, limit: Tolerance) -> tuple[str, bool]:
    """Which of a task's figures a tolerance is about, and whether more of it is better."""
    return ("loss", False) if limit.measure == "loss" else (task.metric, task.higher_is_better)
