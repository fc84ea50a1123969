"""A short recovery decides among contenders: each is cut, trained a little on the training split and measured on the
calibration split. Successive halving (Jamieson and Talwalkar 2016): all for few epochs, the better half for more.

**What counts** is the worst task. Where the recipe gives tolerances, it has said what each task's loss is worth, and a
task's reading (the share of its tolerance that is used up) is what it lost. Where it gives a target of FLOPs alone, the
default tolerance lets every loss grow six times. That weighs tasks just behind a cut, but says nothing of a network
that was trained again, whose losses hardly rise: then what a task lost is its `drop`, in points of its own metric.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.data.images import Split, Splits
from compress.data.tasks import KINDS, Task
from compress.networks.train import Trainer, evaluate, train
from compress.processes.distributed import alone, gather, rank, world
from compress.recipes.pagcp.contenders import contenders
from compress.recipes.pagcp.greedy import Decision, Pruner, State
from compress.recipes.pagcp.options import PAGCPOptions
from compress.recipes.pagcp.oracle import Oracle
from compress.run.folder import Journal, Notes, fingerprint
from compress.schema.sections import TrainSpec

Values = Mapping[str, Mapping[str, float]]  # task -> figures by name


def drop(task: Task, base: float, value: float) -> float:
    """Points that a task's metric lost, below 0 where it gained: hundredths of one that is a share (an accuracy), per
    cent of the dense value of one that has a unit (metres, degrees)."""
    worse = base - value if task.higher_is_better else value - base
    return 100 * worse / (base if KINDS[task.kind].regression else 1.0)


def drops(tasks: Sequence[Task], base: Values, values: Values) -> dict[str, float]:
    """Every task's `drop`."""
    return {t.name: drop(t, base[t.name][t.metric], values[t.name][t.metric]) for t in tasks}


def by_tolerances(options: PAGCPOptions) -> bool:
    """Whether readings are what counts, see above."""
    return options.tolerance is not None or bool(options.tolerances)


def short(spec: TrainSpec, epochs: int) -> TrainSpec:
    """A training's schedule in fewer epochs, or more."""
    warm = spec.warmup_epochs * epochs / max(1, spec.epochs)
    return spec.model_copy(update={"epochs": epochs, "warmup_epochs": warm})


def heats(count: int, epochs: Sequence[int]) -> list[tuple[int, int]]:
    """(contenders, epochs) of every heat: each takes the better half of the one before, until one is left."""
    found = []
    for each in epochs:
        if count > 1:
            found.append((count, each))
        count = -(-count // 2)
    return found


@dataclass(frozen=True)
class Trials:
    """Contenders and how they are told apart.

    Args:
        spec: the fine-tuning that the winner will get; a trial is the same in short.
        base: the dense network's figures on ``split``.
        of: hash of all that decides the outcome.
        place: a folder for checkpoints; what was measured is noted in ``journal``.
        trainer: how the network is trained, where it is not by `compress.networks.train.train`.
    """

    pruner: Pruner
    data: Splits
    split: Split
    batch: int
    spec: TrainSpec
    seed: int
    base: Values
    journal: Journal | Notes
    of: str
    place: Path
    trainer: Trainer | None = None

    def hold(self, states: Mapping[str, State], epochs: Sequence[int]) -> tuple[str, list[dict[str, Any]]]:
        """The winner's name, and a row a contender, the best first: its last heat's epochs, values, drops and what its
        worst task lost.

        Every process tries another contender, all by itself, so that the outcome is that of one process.
        """
        left = list(states)
        rows: dict[str, dict[str, Any]] = {}
        for count, each in heats(len(states), epochs):
            left = left[:count]
            for name, values in self._heat({n: states[n] for n in left}, each).items():
                found = drops(self.data.tasks, self.base, values)
                lost = self.pruner.oracle.readings(values) if by_tolerances(self.pruner.options) else found
                rows[name] = {
                    "name": name,
                    "removed": self.pruner.removal(states[name]),
                    "epochs": each,
                    "values": values,
                    "drops": found,
                    "worst": max(lost.values()),
                }
            left.sort(key=lambda n: (rows[n]["worst"], n))
        return left[0], sorted(rows.values(), key=lambda r: (-r["epochs"], r["worst"], r["name"]))

    def _heat(self, states: Mapping[str, State], epochs: int) -> dict[str, Values]:
        known = {r["key"]: r["values"] for r in self.journal.rows() if r["of"] == self.of}
        keys = {name: f"{name}: {epochs} epochs" for name in states}
        todo = [name for name in states if keys[name] not in known]
        for start in range(0, len(todo), world()):
            mine = todo[start : start + world()][rank() :][:1]
            with alone():
                said = [(keys[name], self._tried(name, states[name], epochs)) for name in mine]
            for key, values in gather(said):
                self.journal.append({"of": self.of, "key": key, "values": values})
                known[key] = values
            for name in mine:
                self._checkpoint(name, epochs).unlink()
        return {name: known[key] for name, key in keys.items()}

    def _checkpoint(self, name: str, epochs: int) -> Path:
        return self.place / f"{fingerprint({'of': self.of, 'name': name, 'epochs': epochs})[:16]}.safetensors"

    def _tried(self, name: str, state: State, epochs: int) -> Values:
        # A copy: what a plan leaves whole is the dense network's own.
        network = copy.deepcopy(self.pruner.cut(state))
        (self.trainer or train)(
            network,
            self.data,
            short(self.spec, epochs),
            seed=self.seed,
            checkpoint=self._checkpoint(name, epochs),
            label=f"trial of {name}",
            identity={"of": self.of, "state": state},
        )
        return evaluate(network, self.data, self.split, self.batch)


def weights(tasks: Sequence[Task], spare: float) -> dict[str, float]:
    """How often the second greedy plan counts a task's readings; empty where it would be the first one again."""
    dense = [t.name for t in tasks if KINDS[t.kind].dense]
    return {name: spare for name in dense} if spare > 1 and len(dense) < len(tasks) else {}


def choose(
    trials: Trials, decision: Decision, target: float, contribution: Callable[[str, State], float] | None = None
) -> tuple[Decision, dict[str, Any]]:
    """The decision with the winner's widths in place of the greedy plan's, and the report's facts of the trials."""
    pruner, options = trials.pruner, trials.pruner.options.trials
    assert options is not None
    greedy, passes, measurements = {"greedy": decision.state}, 0.0, 0
    spared = weights(trials.data.tasks, options.spare)
    if spared:
        assert isinstance(pruner.oracle, Oracle)  # trials are on our data
        other = pruner.judged_by(pruner.oracle.weighed(spared))
        greedy["greedy, pixels spared"] = other.decide(target, contribution).state
        passes, measurements = other.oracle.passes, other.oracle.measurements
    states = contenders(pruner, greedy, decision.order, options.blends, target)
    winner, rows = trials.hold(states, options.epochs)
    found = pruner.measure(states[winner])
    assert found.values is not None
    facts = {
        "winner": winner,
        "epochs": sum(count * each for count, each in heats(len(states), options.epochs)),
        "by_tolerances": by_tolerances(pruner.options),
        "contenders": rows,
        "passes": passes,
        "measurements": measurements,
    }
    return replace(decision, state=states[winner], readings=found.least, values=found.values), facts
