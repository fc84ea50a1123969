"""Budgets of a language model: what they are of, what every sublayer takes of each, and what a saved model takes.

A budget is written as a gate's are (`compress.exporters.gate`). All that is counted here is counted in whole units
(parameters, bytes, picoseconds), so that a sum over sublayers is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.exporters.gate import Budget, Grammar, parse_budget
from compress.schema.section import LARGEST
from compress.words.wording import megabytes, milliseconds

if TYPE_CHECKING:
    from compress.language.setup import Setup
    from compress.models.families.base import Costs, Family
    from compress.schema.recipe import BenchSection

FIGURES = {"parameters": "parameters", "size": "bytes", "kv_cache": "bytes", "tpot": "seconds", "ttft": "seconds"}
LENGTHS = {"kv_cache": "context", "tpot": "context", "ttft": "prompt"}  # figure -> key of `bench` with its default
TIMES = ("tpot", "ttft")
EXAMPLES = "parameters<=100M, size<=0.8x, kv_cache@4096<=64MB, tpot<=0.7x, ttft@512<=0.7x"
GRAMMAR = Grammar(FIGURES, (), tuple(LENGTHS), EXAMPLES, "the dense model's")
PICOSECONDS = 10**12

Counts = tuple[int, int, int]  # of a block: KV groups, query heads in each of them, FFN neurons


@dataclass(frozen=True)
class Prices:
    """What a model takes of one figure: ``rest`` whatever is pruned, and each sublayer by what it keeps.

    Args:
        attention: (block, KV groups, query heads in each) -> units.
        ffn: (block, neurons) -> units.
    """

    rest: int
    attention: Callable[[int, int, int], int]
    ffn: Callable[[int, int], int]

    def total(self, counts: Iterable[Counts]) -> int:
        return self.rest + sum(self.attention(i, g, p) + self.ffn(i, n) for i, (g, p, n) in enumerate(counts))


@dataclass(frozen=True)
class Limit:
    """A budget with its prices: the model may take at most ``most`` units; the dense one takes ``dense``. Where a time
    that was measured is off what its prices say, ``most`` is put right by as much.

    ``source``: of prices that were measured, the hash of what they come from.
    """

    budget: Budget
    prices: Prices
    dense: int
    most: int
    source: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.budget.text

    def facts(self, counts: Sequence[Counts], floor: int) -> dict[str, Any]:
        """What a report says of it: of a model with these ``counts``; ``floor`` is the least that can be left."""
        b = self.budget
        return {
            "budget": b.text,
            "figure": b.figure,
            **({"length": b.length} if b.length is not None else {}),
            "unit": FIGURES[b.figure],
            "asked": in_unit(b.figure, allowed(b, self.dense)),
            "dense": in_unit(b.figure, self.dense),
            "floor": in_unit(b.figure, floor),
            "table": in_unit(b.figure, self.prices.total(counts)),
        }


def parse(texts: Sequence[str], bench: BenchSection | None) -> tuple[Budget, ...]:
    """The budgets of a recipe; a figure that is taken at a length has that of ``bench`` where it says none.

    Raises:
        UsageError: one cannot be read, two are of one figure, or one is a time in seconds.
    """
    from compress.schema.recipe import BenchSection

    spec = bench if bench is not None else BenchSection()
    found: dict[tuple[str, int | None], Budget] = {}
    for text in texts:
        budget = parse_budget(text, GRAMMAR)
        if budget.limit > LARGEST:
            raise UsageError(
                f"no limit is beyond {LARGEST:.0e}", where=f"budget {text[:60]!r}", fix=f"for example: {EXAMPLES}"
            )
        if budget.figure in LENGTHS and budget.length is None:
            budget = replace(budget, length=getattr(spec, LENGTHS[budget.figure]))
        if budget.figure in TIMES and budget.kind == "absolute":
            raise UsageError(
                "a time in seconds holds on one named, pinned device, and what a block costs is measured on this"
                " machine alone",
                where=f"budget {text!r}",
                fix=f"say it relative to the dense model, {budget.figure}<=0.7x; `compress gate --pinned` holds the"
                " result to seconds on a device",
            )
        key = (budget.figure, None if budget.kind == "relative" and budget.figure == "kv_cache" else budget.length)
        if key in found:
            raise UsageError(
                f"two budgets are of {budget.figure}: {found[key].text} and {budget.text}",
                where="budget",
                fix="keep the tighter one",
            )
        found[key] = budget
    return tuple(found.values())


def limits(setup: Setup) -> tuple[Limit, ...]:
    """The recipe's budgets that are counted, with their prices; those of times are measured first."""
    budgets = parse(setup.recipe.budget or (), setup.recipe.bench)
    return tuple(limit(b, *counted(b, setup)) for b in budgets if b.figure not in TIMES)


def limit(budget: Budget, prices: Prices, dense: int) -> Limit:
    """A budget with its prices."""
    return Limit(budget, prices, dense, allowed(budget, dense))


def allowed(budget: Budget, dense: int) -> int:
    """The whole units that a budget allows of ``dense``: the largest number that is not over it."""
    told = Fraction(repr(budget.limit))  # as it was written: 0.8 is no float
    return int(told * dense if budget.kind == "relative" else told)


def held(share: Mapping[str, float], most: float) -> bool | None:
    """Whether a time is within ``most`` times the dense one's by its interval; None where the limit lies in it."""
    return True if share["high"] <= most else False if share["low"] > most else None


def counted(budget: Budget, setup: Setup) -> tuple[Prices, int]:
    """(prices, what the dense model takes) of a figure that is counted from shapes.

    Raises:
        CompressError: it is of a cache, and there is attention whose cache is not told by its heads.
    """
    costs = setup.costs
    size = setup.stored_dtype.itemsize
    if budget.figure == "kv_cache" and any(block.geometry.attention_whole for block in costs.blocks):
        raise CompressError(
            "this model has attention that is never cut, and what it keeps for a token is not counted in heads",
            where=f"budget {budget.text!r}",
            fix="say how much goes in parameters or size",
        )
    if budget.figure == "kv_cache":
        assert budget.length is not None  # filled in by `parse`
        each = [2 * block.geometry.head_dim * size * budget.length for block in costs.blocks]
        prices = Prices(0, lambda i, groups, _: groups * each[i], lambda _, __: 0)
    else:
        header = _header_bytes(setup) if budget.figure == "size" else 0
        prices = _held(costs, _norms(setup), size if budget.figure == "size" else 1, header)
    return prices, prices.total(dense_counts(costs))


def dense_counts(costs: Costs) -> list[Counts]:
    return [(g.kv_heads, g.group, g.ffn) for g in costs.geometry.blocks]


def _held(costs: Costs, norms: Sequence[tuple[int, int]], size: int, more: int) -> Prices:
    """Parameters, ``size`` units each, with ``more`` units beside them. ``norms``: of every block, what goes with the
    last head and with the last neuron beside linear layers."""
    rest = size * (costs.total - costs.backbone - sum(map(sum, norms))) + more

    def attention(i: int, groups: int, per_group: int) -> int:
        return size * (costs.blocks[i].attention(groups, per_group) + (norms[i][0] if groups and per_group else 0))

    def ffn(i: int, neurons: int) -> int:
        return size * (costs.blocks[i].ffn(neurons) + (norms[i][1] if neurons else 0))

    return Prices(rest, attention, ffn)


def _meta(setup: Setup) -> Any:
    """The dense model without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(setup.config)


def _norms(setup: Setup) -> list[tuple[int, int]]:
    """Of every block, the parameters beside linear layers that go with its last head, and with its last neuron."""
    import torch

    from compress.models.decoder import blocks

    none = torch.arange(0)

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    found = []
    for dense, costs in zip(blocks(_meta(setup)), setup.costs.blocks, strict=True):
        g, sliced, whole = costs.geometry, setup.family.sliced, count(dense)
        gone = (
            0 if g.attention_whole else whole - count(sliced(dense, heads=none, neurons=None)) - costs.attention_dense,
            0 if g.ffn_whole else whole - count(sliced(dense, heads=None, neurons=none)) - costs.ffn_dense,
        )
        found.append(gone)
    return found


def _header_bytes(setup: Setup) -> int:
    """What the headers of the weight files take at most: those of the dense model, whose numbers have no fewer digits
    and whose tensors are no fewer."""
    from compress.language.checkpoint import SHARD_BYTES

    size, at = setup.stored_dtype.itemsize, 0
    named: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, parameter in _meta(setup).named_parameters():
        end = at + parameter.numel() * size
        named[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [at, end]}
        at = end
    one = len(json.dumps(named, separators=(",", ":"))) + 16  # its length in front, spaces up to the next 8 bytes
    return one + 64 * (2 * at // SHARD_BYTES)  # the same of every further file; none is less than half full


def measured(folder: Path, family: Family, wanted: Mapping[str, tuple[str, int | None]]) -> dict[str, int]:
    """What the saved model in ``folder`` takes of figures that are counted: in its files, and for its cache in the
    module that transformers makes of them.

    Args:
        wanted: name -> (figure, length).

    Raises:
        CompressError: a file is missing or cannot be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from compress.exporters.onnx import cached_layers
    from compress.models.reading import load_config, weight_files

    files = weight_files(folder)
    found = {"parameters": 0, "size": sum(path.stat().st_size for path in files), "kv_cache": 0}
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                found["parameters"] += sum(prod(file.get_slice(n).get_shape()) for n in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise CompressError(f"the weights cannot be read: {e}", where=str(folder), fix="fetch them again") from e
    if any(figure == "kv_cache" for figure, _ in wanted.values()):
        config = load_config(folder)
        named = getattr(config, "dtype", None)
        size = named.itemsize if isinstance(named, torch.dtype) else 4
        with torch.device("meta"):
            model = family.ragged_class()(config)
        found["kv_cache"] = 2 * size * sum(heads * width for _, heads, width in cached_layers(model))
    return {
        name: found[figure] * ((length or 0) if figure == "kv_cache" else 1)
        for name, (figure, length) in wanted.items()
        if figure in found
    }


def in_unit(figure: str, units: int) -> int | float:
    """A number of whole units as a report holds it: seconds of picoseconds."""
    return units / PICOSECONDS if FIGURES[figure] == "seconds" else units


def shown(row: dict[str, Any], key: str) -> str:
    """A figure of a report's row as a person reads it, with how many times the dense model's it is."""
    value, dense = row[key], row["dense"]
    if key == "measured" and "share" in row:
        share = row["share"]
        return f"{milliseconds(value)} ({share['median']:.3f}x, {share['low']:.3f} to {share['high']:.3f})"
    if row["unit"] == "seconds":
        said = milliseconds(value)
    else:
        said = megabytes(value, dense) if row["unit"] == "bytes" else f"{value:,}"
    return said if key == "dense" or not dense else f"{said} ({value / dense:.4g}x)"
