"""A sweep: one model at many budgets and precisions, which of them is best for what it takes, and where the knee is.

``sweep.json`` is the one source of the page, the plot and the lines. Of clocks it holds no more than the models' own
times, which are sealed, so that a sweep that was stopped ends with the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import CompressError
from compress.report.quantised import best, files, name_of
from compress.report.rows import Better, Row, Unit, here, judges, rows
from compress.run.seals import fingerprint
from compress.run.strict_json import read_json, typed

VERSION = 1  # of sweep.json
NAME = "sweep.json"
DENSE = "dense"  # the name of the model that the points are made of
AXES = ("parameters", "bytes", "FLOPs", "tpot", "ttft", "latency")  # in the order of tables and plots
TITLES = {"parameters": "parameters", "bytes": "bytes", "FLOPs": "FLOPs", "tpot": "TPOT", "ttft": "TTFT"}
MEND = "give the same `compress sweep` command again"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Quality(_Strict):
    """What the points are judged by: a perplexity or a score of the held-out data; of several tasks the mean share of
    the dense network's figures that is kept."""

    name: str
    unit: Unit
    better: Better
    conditions: str = ""

    def shown(self, value: float) -> str:
        return f"{value:.2f}" if self.unit == "perplexity" else f"{value:.4f}"

    def loss(self, value: float) -> float:
        """What falls as the quality gets better; of a perplexity its logarithm, nats a token."""
        if self.unit == "perplexity":
            return math.log(value)
        return -value if self.better == "higher" else value


class Entry(_Strict):
    """One model in one precision.

    Args:
        point: the point it belongs to, or `DENSE`.
        precision: ``FORMAT-PRECISION``; empty for the model as it was saved.
        costs: axis -> what it takes: parameters, bytes of its weights, FLOPs, seconds.
    """

    point: str
    precision: str = ""
    quality: float
    costs: dict[str, float | int]

    @property
    def name(self) -> str:
        return f"{self.point}, {self.precision.replace('-', ' ', 1)}" if self.precision else self.point


class Axis(_Strict):
    """One cost: which entries have it and are Pareto-optimal, as indices into the entries from the least cost up, and
    the knee among them."""

    key: str
    title: str
    unit: Unit
    front: list[int]
    knee: int | None = None


class Point(_Strict):
    """One budget.

    Args:
        name: as a person writes it: ``25%``, ``size<=0.8x``.
        overrides: what it lays over the recipe.
        folder: its run folder, in the sweep's.
        make: the command that makes it alone, and goes on in its folder.
        pick: the command that finishes it where it lies.
        rows: all figures that its run has.
        budgets: what was asked and measured of each budget, as its report has it.
    """

    name: str
    overrides: list[str]
    folder: str
    make: str
    pick: str
    rows: list[Row]
    budgets: list[dict[str, Any]] = []


class Sweep(_Strict):
    """``sweep.json``. ``recipe`` is what all points have in common, with every value;
    ``asked_model`` is the model as it was named, ``model`` what its report calls it."""

    schema_version: Literal[1] = 1
    model: str
    asked_model: str
    weights: str
    recipe_name: str
    settings: list[str]
    recipe: dict[str, Any]
    until: str
    quality: Quality
    points: list[Point] = Field(min_length=2)
    entries: list[Entry]
    axes: list[Axis]

    def text(self) -> str:
        facts = self.facts()
        return json.dumps({**facts, "sha256": fingerprint(facts)}, indent=1) + "\n"

    def facts(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=False)

    def point(self, asked: str) -> Point:
        """The point of that name, or the one at the knee of the first axis that has one.

        Raises:
            CompressError: there is none.
        """
        if asked == "knee":
            found = next((self.entries[a.knee].point for a in self.axes if a.knee is not None), None)
            if found is None:
                raise CompressError(
                    "no point stands out as the knee: it takes three models on the front",
                    where="--pick knee",
                    fix=f"one of: {', '.join(p.name for p in self.points)}",
                )
            asked = found
        same = [p for p in self.points if asked in (p.name, p.folder)]
        if not same:
            raise CompressError(
                "the dense model is no point to be picked" if asked == DENSE else f"there is no point {asked!r}",
                where="--pick",
                fix=f"one of: {', '.join(['knee', *(p.name for p in self.points)])}",
            )
        return same[0]


def read_sweep(folder: Path) -> Sweep:
    """The finished sweep in a folder.

    Raises:
        CompressError: there is none, it was changed since it was written, or is of another version.
    """
    path = folder / NAME
    if not path.is_file():
        raise CompressError(f"there is no {NAME}", where=str(folder), fix="name the folder of a finished sweep")
    facts = typed(read_json(path, NAME, constants=True), dict, "", NAME, str(path))
    stamp = facts.pop("sha256", None)
    if facts.get("schema_version") != VERSION:
        raise CompressError(
            f"the sweep's schema_version is {facts.get('schema_version')!r:.40}; this version reads {VERSION}",
            where=str(path),
            fix=MEND,
        )
    if stamp != fingerprint(facts):
        raise CompressError(f"{NAME} was changed since it was written", where=str(path), fix=MEND)
    try:
        return Sweep.model_validate(facts)
    except ValidationError as e:
        said = e.errors()[0]
        at = ".".join(map(str, said["loc"]))
        raise CompressError(f"{NAME} is not what it should be: {at}: {said['msg']}", where=str(path), fix=MEND) from e


def judged(report: Mapping[str, Any]) -> tuple[Quality, float, float]:
    """(what a report's models are judged by, the dense one's, the pruned one's).

    Raises:
        CompressError: nothing was measured that a model can be judged by.
    """
    main = [row for row in judges(report) if not row.where and row.dense is not None and row.pruned is not None]
    if not main:
        raise CompressError(
            "there is no figure that the points can be judged by", where="evaluation", fix="let the recipe measure one"
        )
    first = main[0]
    if len(main) == 1 or first.unit == "perplexity":
        mean = [r for r in here(rows(report)) if r.unit == "perplexity" and not r.task]
        row = mean[0] if len(main) > 1 and mean else first
        conditions = "; ".join(dict.fromkeys(f"{r.task}: {r.conditions}" for r in main if r.conditions))
        assert row.dense is not None and row.pruned is not None  # a mean of what is there
        return Quality(name=row.name, unit=row.unit, better=row.better, conditions=conditions), row.dense, row.pruned
    shares = [_kept(row) for row in main]
    quality = Quality(
        name="share kept of the dense network's figures, mean over tasks",
        unit="score",
        better="higher",
        conditions="; ".join(row.name for row in main),
    )
    return quality, 1.0, sum(shares) / len(shares)


def _kept(row: Row) -> float:
    """The share that is left of the dense network's figure, 1 where it is as good, more where it is better."""
    assert row.dense is not None and row.pruned is not None  # asked by the caller
    over, under = (row.pruned, row.dense) if row.better == "higher" else (row.dense, row.pruned)
    if under <= 0:
        raise CompressError(
            f"{row.name} is {under:g}: no share of it can be told, so several tasks have no mean",
            where="evaluation",
            fix="sweep a recipe with one task, or with measures above 0",
        )
    return over / under


def entries_of(reports: Mapping[str, Mapping[str, Any]]) -> tuple[Quality, list[Entry], dict[str, tuple[str, Unit]]]:
    """What the models are judged by, every model in every precision, the dense ones first, and the axes they have.

    Args:
        reports: of every point by its name; each measured the same dense model.
    """
    found: dict[tuple[str, str], Entry] = {}
    titles: dict[str, tuple[str, Unit]] = {}
    quality: Quality | None = None
    clocks: dict[tuple[str, str], float] = {}  # precision, axis: the dense model's seconds in the first point's bench
    for name, report in reports.items():
        quality, dense, pruned = judged(report)
        costs = {key: _by_pairs(row, clocks) for key, row in costs_of(report).items()}
        titles |= {key: (TITLES.get(key, row.name), row.unit) for key, row in costs.items()}
        for point, value, side in ((DENSE, dense, "dense"), (name, pruned, "pruned")):
            taken = {key: getattr(row, side) for key, row in costs.items()}
            entry = Entry(point=point, quality=value, costs={k: v for k, v in taken.items() if v is not None})
            found.setdefault((point, ""), entry)
        for row in files(report):
            point = DENSE if row["side"] == "dense" else name
            measured = _of_file(row, report, clocks)
            titles |= {k: (TITLES[k], "bytes" if k == "bytes" else "seconds") for k in measured if k not in titles}
            entry = Entry(point=point, precision=name_of(row), quality=row["perplexity"], costs=measured)
            found.setdefault((point, entry.precision), entry)
    assert quality is not None  # a sweep has points
    order = sorted(found.values(), key=lambda e: (e.point != DENSE, bool(e.precision)))
    return quality, order, {key: titles[key] for key in AXES if key in titles}


def _by_pairs(row: Row, clocks: dict[tuple[str, str], float]) -> Row:
    """A time as the dense model's in the first bench over the ratio of this point's own pairs: what a machine drifts by
    from bench to bench is no gain of a point."""
    if row.unit != "seconds" or row.ratio is None or row.dense is None:
        return row
    dense = clocks.setdefault(("", row.metric), float(row.dense))
    return row.model_copy(update={"dense": dense, "pruned": dense / row.ratio.median})


def _of_file(
    row: Mapping[str, Any], report: Mapping[str, Any], clocks: dict[tuple[str, str], float]
) -> dict[str, float | int]:
    """What a file at fewer bits takes; times as `_by_pairs` has them."""
    found: dict[str, float | int] = {"bytes": row["bytes"]}
    record = (report["quantised"].get("bench") or {}).get(name_of(row))
    for key in ("tpot", "ttft"):
        if record is None or key not in row:
            continue
        dense = clocks.setdefault((name_of(row), key), float(record["dense"][key]["median"]))
        found[key] = dense if row["side"] == "dense" else dense / float(record["ratios"][key]["median"])
    return found


def costs_of(report: Mapping[str, Any]) -> dict[str, Row]:
    """Axis -> the row that tells it, of both models as they were saved."""
    found: dict[str, Row] = {}
    every = here(rows(report))
    for row in every:
        if row.unit == "parameters" and not row.name.startswith(("backbone", "non-zeros, pruned")):
            found.setdefault("parameters", row)
        elif row.unit == "FLOPs" or (row.unit == "bytes" and row.command == "verify" and not row.metric):
            found.setdefault(row.unit, row)
        elif row.unit == "seconds" and row.metric in AXES:
            found.setdefault(row.metric, row)
    size = report["size"]
    if "bytes" not in found and "bytes" in size.get("dense", {}):
        found["bytes"] = Row(
            name="bytes", unit="bytes", better="lower", dense=size["dense"]["bytes"], pruned=size["pruned"]["bytes"]
        )
    return found


def front_of(entries: Sequence[Entry], quality: Quality, key: str) -> list[int]:
    """The entries that no other beats in quality and in cost, from the least cost up. Parameters and FLOPs are those of
    the model, whatever its precision: of them only models as they were saved are compared."""
    able = [key in e.costs for e in entries]
    told = [
        {"perplexity": quality.loss(e.quality), **({key: e.costs[key]} if has else {})}
        for e, has in zip(entries, able, strict=True)
    ]
    marks = best(told, key)
    return sorted((i for i, mark in enumerate(marks) if mark), key=lambda i: (entries[i].costs[key], i))


def knee_of(entries: Sequence[Entry], front: Sequence[int], quality: Quality, key: str) -> int | None:
    """The point of the front that lies farthest below the line between its ends, both axes taken from 0 to 1 along the
    front, a perplexity by its logarithm; None where none does, or the front has no inside. The dense model is none."""
    if len(front) < 3:
        return None
    costs = [float(entries[i].costs[key]) for i in front]
    losses = [quality.loss(entries[i].quality) for i in front]
    (low, high), (good, bad) = (costs[0], costs[-1]), (losses[-1], losses[0])
    if high <= low or bad <= good:
        return None
    below = {
        i: 1 - (c - low) / (high - low) - (v - good) / (bad - good)
        for i, c, v in zip(front, costs, losses, strict=True)
        if entries[i].point != DENSE
    }
    best_at = max(below, key=lambda i: (below[i], -i), default=None)
    return best_at if best_at is not None and below[best_at] > 1e-9 else None


def axes_of(entries: Sequence[Entry], quality: Quality, titles: Mapping[str, tuple[str, Unit]]) -> list[Axis]:
    made = []
    for key, (title, unit) in titles.items():
        front = front_of(entries, quality, key)
        made.append(Axis(key=key, title=title, unit=unit, front=front, knee=knee_of(entries, front, quality, key)))
    return made
