"""What every shape of a sublayer costs in time, measured in whole small models of random weights: a time depends on
shapes, not on what the weights are.

Each small model has a few blocks, all but the first at one level, and is timed in fresh processes beside those of the
dense one, by the bench's own protocol (`compress.exporters.bench`); the fastest call counts. A sublayer that is gone
costs nothing; what a level costs is told by the difference to it. What is left of the whole dense model's time is what
no pruning changes. That such costs add up is an assumption: it is checked on models of mixed levels that the table has
not seen, and its error stands beside it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import CompressError
from compress.exporters.gate import Budget, throttled
from compress.language.limits import PICOSECONDS, Limit, Prices, limit
from compress.report.stats import paired_ratio
from compress.run.progress import Progress, say

if TYPE_CHECKING:
    from compress.language.setup import Setup
    from compress.schema.recipe import BenchSection

BLOCKS = 4  # of a small model; the first stays dense, so that there is a cache
VOCABULARY = 256  # of a small model: what the head costs is no sublayer's
CHECKS = 3  # models of mixed levels that the table is held against
ROUNDS = 3  # processes of a shape
SAMPLE = {"min_seconds": 0.3, "min_runs": 3}  # of a figure in one process of the table

Key = str  # of a figure at a length: "tpot@512"
Layer = tuple[int, int, int]  # query heads, KV groups, neurons


def errors_of(table: Mapping[str, Any], key: Key) -> dict[str, float | int]:
    """How far off a table was on the models that it had not seen: the median and the worst, as shares."""
    off = [abs(row["seconds"][key]["error"]) for row in table["checks"]]
    return {"models": len(off), "median": median(off), "worst": max(off)}


def key_of(budget: Budget) -> Key:
    return f"{budget.figure}@{budget.length}"


@dataclass(frozen=True)
class Levels:
    """The shapes that are timed: of attention (KV groups, query heads in each), of the FFN neurons. The dense ones come
    first, what is gone last."""

    heads: tuple[tuple[int, int], ...]
    neurons: tuple[int, ...]


def check_times(setup: Setup) -> None:
    """Refuses times that cannot be priced by shapes.

    Raises:
        CompressError: the blocks differ, hold parts that are never cut, or nothing is exported.
    """
    blocks = setup.geometry.blocks
    if len(set(blocks)) > 1 or any(block.attention_whole or block.ffn_whole for block in blocks):
        raise CompressError(
            "the blocks of this model differ or hold parts that are never cut: a time is priced by the shapes of blocks"
            " that are alike",
            where="budget",
            fix="say how much goes in parameters, size or kv_cache",
        )
    if setup.recipe.export is None or setup.recipe.bench is None:
        raise CompressError(
            "a time is measured on the export as bench says, and one of them is null",
            where="budget",
            fix="leave export and bench out of the recipe, or the budgets of tpot and ttft",
        )


def shaped(setup: Setup, layers: Sequence[Layer], vocabulary: int | None = None) -> Any:
    """A model of random weights with blocks of these shapes, in float32; else as the dense one."""
    import torch

    from compress.models.families.base import Geometry

    family, geometry, depth = setup.family, setup.geometry, len(layers)
    config = setup.config.to_dict()
    every = [n for n, v in config.items() if "layer" in n and isinstance(v, list) and len(v) == geometry.layers]
    config |= {name: config[name][:depth] for name in every} | {"num_hidden_layers": depth}
    if vocabulary is not None:
        config |= {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    family.write_layers(config, layers, Geometry(geometry.blocks[:depth], geometry.vocab, geometry.tied))
    made = type(setup.config).from_dict(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.ragged_class()(made).float().eval()
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Clock:
    """Times models of ``setup``'s shapes here, in ONNX Runtime.

    ``budgets`` are those of times; ``dense`` makes the folder of the dense model's export when it is first asked for,
    by all processes together.
    """

    setup: Setup
    budgets: tuple[Budget, ...]
    dense: Callable[[], Path]

    @property
    def bench(self) -> BenchSection:
        assert self.setup.recipe.bench is not None  # see `check_times`
        return self.setup.recipe.bench

    def spec(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """How one process measures: at the lengths of the budgets, and shortly where a figure is none of theirs."""

        def lengths(figure: str) -> list[int]:
            return sorted({b.length or 0 for b in self.budgets if b.figure == figure}) or [16]

        return {"prompts": lengths("ttft"), "contexts": lengths("tpot"), "threads": self.bench.threads, **sample}

    def facts(self) -> dict[str, Any]:
        """What decides the table beside the levels: shapes, runtime, machine, and how it is measured."""
        import onnxruntime

        from compress.system import host

        g = self.setup.geometry
        return {
            "block": vars(g.blocks[0]),
            "layers": g.layers,
            "family": self.setup.family.name,
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "machine": host.processor(),
            "cores": host.allowed_processors(),
            "spec": self.spec(SAMPLE),
            "blocks": BLOCKS,
            "rounds": ROUNDS,
        }

    def table(self, folder: Path, levels: Levels, dense: Path) -> None:
        """Measures every level and the whole ``dense`` export, checks the sum on unseen models, and writes table.json
        into ``folder``."""
        keys = [key_of(b) for b in self.budgets]
        block = self.setup.geometry.blocks[0]
        whole = (block.heads, block.kv_heads, block.ffn)
        named: dict[Any, list[Layer]] = {
            **{("heads", h): [whole] + [(h[0] * h[1], h[0], block.ffn)] * (BLOCKS - 1) for h in levels.heads[1:]},
            **{("neurons", n): [whole] + [(*whole[:2], n)] * (BLOCKS - 1) for n in levels.neurons[1:]},
        }
        mixed = self._mixed(levels)
        times: dict[Any, dict[Key, float]] = {}
        base: list[dict[Key, float]] = []
        with (
            tempfile.TemporaryDirectory(dir=folder) as there,
            Progress(len(named) + len(mixed) + 1, "latency table: shapes") as bar,
        ):
            small = self._export([whole] * BLOCKS, Path(there) / "dense")
            for name, layers in [*named.items(), *enumerate(mixed)]:
                place = self._export(layers, Path(there) / f"shape-{len(times)}")
                # A process of the dense model beside those of every shape: what drifts shows in it.
                base.append(self._once(small, SAMPLE, len(times), VOCABULARY))
                times[name] = _fastest([self._once(place, SAMPLE, i, VOCABULARY) for i in range(ROUNDS)])
                shutil.rmtree(place)
                bar.update(1)
            all_of_it = _fastest([self._once(dense, SAMPLE, i, None) for i in range(ROUNDS)])
            bar.update(1)
        fastest = _fastest(base)
        costs = _costs(
            levels, {n: {k: (fastest[k] - t[k]) / (BLOCKS - 1) for k in keys} for n, t in times.items()}, keys
        )
        _refuse_noise(levels, costs)
        drift = {k: throttled([t[k] for t in base]) for k in keys}
        found = {
            "facts": self.facts(),
            "heads": [{"groups": g, "per_group": p, "seconds": costs["heads", (g, p)]} for g, p in levels.heads],
            "neurons": [{"neurons": n, "seconds": costs["neurons", n]} for n in levels.neurons],
            "dense": {k: all_of_it[k] for k in keys},
            "small": {"dense": {k: [t[k] for t in base] for k in keys}, "slower_at_the_end_by": drift},
            "checks": [_checked(layers, costs, fastest, times[k], levels) for k, layers in enumerate(mixed)],
        }
        for k, by in drift.items():
            if by is not None:
                say(f"latency table, {k}: the dense model was {100 * by:.0f} % slower at the end than at the start")
        (folder / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _mixed(self, levels: Levels) -> list[list[Layer]]:
        rng = np.random.default_rng(self.setup.recipe.seed)
        block = self.setup.geometry.blocks[0]
        found = []
        for _ in range(CHECKS):
            layers = [(block.heads, block.kv_heads, block.ffn)]
            for _ in range(BLOCKS - 1):
                groups, per_group = levels.heads[int(rng.integers(len(levels.heads)))]
                layers.append((groups * per_group, groups, levels.neurons[int(rng.integers(len(levels.neurons)))]))
            found.append(layers)
        return found

    def whole(self, layers: Sequence[Layer], folder: Path, dense: Path) -> None:
        """Times a whole model of these shapes and random weights against the ``dense`` export; see `shares`."""
        with tempfile.TemporaryDirectory(dir=folder) as there:
            self.shares(dense, self._export(layers, Path(there) / "whole", None), folder)

    def shares(self, dense: Path, pruned: Path, folder: Path) -> None:
        """Times two exports in as many pairs of processes as the bench has, and writes shares.json into ``folder``: of
        every figure both times in seconds and the share of the dense one's with its interval."""
        sample = {"min_seconds": self.bench.min_seconds, "min_runs": self.bench.min_runs}
        pairs = self._pairs(dense, pruned, self.bench.processes, sample)
        found = {}
        for k in map(key_of, self.budgets):
            before, after = [a[k] for a, _ in pairs], [b[k] for _, b in pairs]
            ratio = paired_ratio(after, before)  # pruned / dense
            found[k] = {"dense": median(before), "pruned": median(after), **ratio}
        (folder / "shares.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _export(self, layers: Sequence[Layer], folder: Path, vocabulary: int | None = VOCABULARY) -> Path:
        from compress.exporters.onnx import export_llm

        folder.mkdir()
        export_llm(shaped(self.setup, layers, vocabulary), folder)
        return folder

    def _pairs(
        self,
        dense: Path,
        other: Path,
        rounds: int,
        sample: Mapping[str, Any],
    ) -> list[tuple[dict[Key, float], dict[Key, float]]]:
        """(dense, other) seconds of so many pairs of fresh processes, in turn (ABBA)."""
        found = []
        for i in range(rounds):
            both = {}
            for place in (dense, other) if i % 2 == 0 else (other, dense):
                both[place] = self._once(place, sample, i, None)
            found.append((both[dense], both[other]))
        return found

    def _once(self, place: Path, sample: Mapping[str, Any], seed: int, vocabulary: int | None) -> dict[Key, float]:
        """Seconds of the fastest call of every figure and length in one fresh process: what disturbs only ever adds."""
        from compress.exporters.bench.local import measure_once

        vocab = self.setup.geometry.vocab if vocabulary is None else vocabulary
        measured = measure_once(place, self.spec(sample), vocab=vocab, seed=seed)
        return {
            f"{figure}@{row[length]}": min(row["fastest"])
            for figure, length in (("ttft", "prompt"), ("tpot", "context"))
            for row in measured["grid"][figure]
        }


def _fastest(times: Sequence[Mapping[Key, float]]) -> dict[Key, float]:
    """Of every figure the least of several processes: what slows a whole process down only ever adds."""
    return {k: min(t[k] for t in times) for k in times[0]}


def _refuse_noise(levels: Levels, costs: Mapping[Any, Mapping[Key, float]]) -> None:
    """Raises CompressError where a model without any attention, or FFN, was no faster than the dense one."""
    for kind, name in (("heads", levels.heads[0]), ("neurons", levels.neurons[0])):
        for key, seconds in costs[kind, name].items():
            if seconds <= 0:
                what = "attention" if kind == "heads" else "an FFN"
                raise CompressError(
                    f"small models without {what} were no faster than with it ({key}: {1e3 * seconds:+.3f} ms a block):"
                    " what shapes take cannot be told from this machine's noise",
                    where="latency-table",
                    fix="give the same command again when less else runs here",
                )


def _checked(
    layers: Sequence[Layer],
    costs: Mapping[Any, Mapping[Key, float]],
    dense: Mapping[Key, float],
    measured: Mapping[Key, float],
    levels: Levels,
) -> dict[str, Any]:
    """An unseen model's time against the dense one's less what the table says is saved."""
    found: dict[str, Any] = {"layers": [list(layer) for layer in layers], "seconds": {}}
    heads, neurons = levels.heads[0], levels.neurons[0]
    for k in costs["neurons", neurons]:
        said = dense[k]
        for n, groups, width in layers:
            said -= costs["heads", heads][k] - costs["heads", (groups, n // groups if groups else 0)][k]
            said -= costs["neurons", neurons][k] - costs["neurons", width][k]
        found["seconds"][k] = {"table": said, "measured": measured[k], "error": said / measured[k] - 1}
    return found


def _costs(
    levels: Levels, differences: Mapping[Any, Mapping[Key, float]], keys: Sequence[Key]
) -> dict[Any, dict[Key, float]]:
    """Seconds of every level: what the dense one costs is what is saved where it is gone."""
    found: dict[Any, dict[Key, float]] = {}
    for kind, rows in (("heads", levels.heads), ("neurons", levels.neurons)):
        dense = differences[kind, rows[-1]]
        found[kind, rows[0]] = {k: dense[k] for k in keys}
        for row in rows[1:]:
            saved = differences[kind, row]
            found[kind, row] = {k: max(0.0, dense[k] - saved[k]) for k in keys}
    return found


def timed_limits(setup: Setup, budgets: Sequence[Budget], table: Mapping[str, Any], source: str) -> tuple[Limit, ...]:
    """The budgets of times with the prices of a table; ``source`` is its hash."""
    return tuple(replace(limit(b, *prices_of(setup, table, key_of(b))), source=(source,)) for b in budgets)


def prices_of(setup: Setup, table: Mapping[str, Any], key: Key) -> tuple[Prices, int]:
    """(prices in picoseconds, the dense model's) of one figure. What stands between two levels is taken to lie on the
    line between them: widths by neurons, attention by its parameters. Where the blocks by themselves take more than the
    whole dense model, which noise alone can do, they are taken to be all of it."""
    costs, layers = setup.costs.blocks[0], setup.geometry.layers
    inside = layers * (table["heads"][0]["seconds"][key] + table["neurons"][0]["seconds"][key])
    least = min(1.0, float(table["dense"][key]) / float(inside))

    def whole(seconds: float) -> int:
        return round(least * seconds * PICOSECONDS)

    widths = sorted((row["neurons"], row["seconds"][key]) for row in table["neurons"])
    states = {(row["groups"], row["per_group"]): row["seconds"][key] for row in table["heads"]}
    sizes = sorted((costs.attention(*state), seconds) for state, seconds in states.items())

    def attention(_: int, groups: int, per_group: int) -> int:
        known = states.get((groups, per_group))
        return whole(_between(sizes, costs.attention(groups, per_group)) if known is None else known)

    def ffn(_: int, neurons: int) -> int:
        return whole(_between(widths, neurons))

    block, dense = setup.geometry.blocks[0], round(table["dense"][key] * PICOSECONDS)
    blocks = layers * (attention(0, block.kv_heads, block.group) + ffn(0, block.ffn))
    return Prices(max(0, dense - blocks), attention, ffn), dense


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    return float(np.interp(at, [x for x, _ in points], [y for _, y in points]))
