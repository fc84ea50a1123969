"""The figures of a report as typed rows: the one place that says what a figure is, and which way of it is better.

Card, page, plots, lines, the head for the hub and `verify` read `Row`s; none decides anything about a metric. A report
of schema version 2 carries them; those of version 1 are read into the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import CompressError
from compress.report.quantised import files, name_of
from compress.report.stats import Found, finding, promised
from compress.run.seals import VERSION as VERSION
from compress.words.wording import counted, megabytes, milliseconds

Better = Literal["higher", "lower"]
Side = Literal["dense", "pruned", "before_training"]
Unit = Literal["score", "perplexity", "parameters", "FLOPs", "bytes", "seconds"]
# Words in the names of measures that are better when they are smaller; all others are better when they are larger.
LOWER = frozenset({"perplexity", "ppl", "error", "rmse", "mse", "mae", "degrees", "bits"})


class Ratio(BaseModel):
    """dense / pruned, measured in pairs: the median, its 95 % interval, and how many pairs there were.

    ``promised``: the most that the work which went can bring; see `stats.promised`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    low: float
    high: float
    pairs: int | None = None
    promised: float | None = None


class Row(BaseModel):
    """One figure of both models.

    Args:
        name: what was measured, as a table says it.
        dense: None where it was not measured; so ``pruned``.
        before_training: of a score, just after the cut, where a training followed.
        ratio: where it was measured in pairs of processes.
        task: of a score: the task or text, and its ``metric``; ``main`` is the one by which the task is judged.
        where: the target, or the format and precision of a quantised file; empty for this machine and full precision.
        runtime: of a latency, memory or file: what ran or holds it.
        conditions: how it was measured, as a sentence.
        command: the key of ``report["commands"]`` that makes it again; empty where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    unit: Unit
    better: Better
    dense: float | int | None = None
    pruned: float | int | None = None
    before_training: float | None = None
    ratio: Ratio | None = None
    task: str = ""
    metric: str = ""
    main: bool = False
    where: str = ""
    runtime: str = ""
    emulated: bool = False
    conditions: str = ""
    command: str = ""

    def value(self, side: Side) -> str:
        """A value with its unit, as a person writes it."""
        found = getattr(self, side)
        if found is None:
            return ""
        if self.unit == "seconds":
            return milliseconds(found)
        if self.unit == "bytes":
            return megabytes(found, max(self.dense or 0, self.pruned or 0))
        return f"{found:.{DIGITS[self.unit]}f}" if self.unit in DIGITS else f"{found:,}"

    def found(self) -> Found | None:
        """What may be said of a figure that was measured in pairs; None of any other."""
        if self.ratio is None:
            return None
        ratio, what = self.ratio, "fast" if self.unit == "seconds" else "small"
        return finding(ratio.model_dump(exclude={"pairs", "promised"}), ratio.promised, ratio.pairs, what)

    def change(self) -> str:
        """How the pruned model's figure lies to the dense one's; no more than its spread supports."""
        found = self.found()
        if found is not None:
            return found.words
        if not self.dense or self.pruned is None:
            return ""
        if self.unit == "score":
            return f"{self.pruned - self.dense:+.4f}"
        if self.unit == "perplexity":
            return f"{self.pruned / self.dense:.2f}x"
        return f"{100 * (self.pruned / self.dense - 1):+.1f} %" if self.pruned != self.dense else "as before"


DIGITS = {"score": 4, "perplexity": 2}
# Figures that are asked for by name, as a gate's budgets are, and what each is counted in.
FIGURES: dict[str, Unit] = {
    "latency": "seconds", "ttft": "seconds", "tpot": "seconds", "memory": "bytes", "size": "bytes", "accuracy": "score",
    "perplexity": "perplexity",
}  # fmt: skip
COSTS = frozenset({"seconds", "bytes", "parameters", "FLOPs"})  # less of these is better, whatever the figure is called
# First words in the names of scores that are shares of what was right: they change by percentage points.
SHARES = frozenset({"accuracy", "acc", "iou", "miou"})


def better_of(figure: str) -> Better:
    """Which way of one of `FIGURES` is better."""
    return "lower" if FIGURES[figure] in COSTS else better(figure)


def is_share(row: Row) -> bool:
    """Whether a row is a score whose change is told in percentage points, more being better."""
    return row.unit == "score" and row.better == "higher" and re.split(r"[,_ ]", row.metric.lower())[0] in SHARES


def better(metric: str, said: bool | None = None) -> Better:
    """Which way of a measure is better.

    Args:
        said: whether higher is better, as the task that is judged by it says; a loss is lower whatever it says.
    """
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    if any(word.endswith("loss") for word in words):
        return "lower"
    if said is not None:
        return "higher" if said else "lower"
    return "lower" if words & LOWER else "higher"


def rows(report: Mapping[str, Any]) -> list[Row]:
    """The rows of a report of either version.

    Raises:
        CompressError: they are not what this version reads.
    """
    version = report.get("schema_version", 1)
    if type(version) is not int or version < 1:
        raise CompressError(
            f"the report's schema_version is {version!r:.40}, not a number from 1",
            where="report.json",
            fix="make it again",
        )
    if version > VERSION:
        raise CompressError(
            f"the report is of schema version {version}; this version reads up to {VERSION}",
            where="report.json",
            fix="take a newer compress",
        )
    try:
        if "rows" in report:
            return [Row.model_validate(row) for row in report["rows"]]
        return made(report)
    except (ValidationError, KeyError, TypeError, AttributeError, ValueError) as e:
        said = e.errors()[0]["msg"] if isinstance(e, ValidationError) else f"{type(e).__name__} {e}"
        raise CompressError(
            f"a figure of the report cannot be read: {said}", where="report.json", fix="make it again"
        ) from e


def check(report: Mapping[str, Any]) -> None:
    """Raises CompressError where a report's rows are not those of its measurements: what is shown and what is verified
    would be two things."""
    if "rows" not in report:
        rows(report)
        return
    said, own = rows(report), rows({k: v for k, v in report.items() if k != "rows"})
    if list(map(repr, said)) != list(map(repr, own)):  # NaN is no other NaN
        wrong = next((a.name for a, b in zip(said, own, strict=False) if repr(a) != repr(b)), "their number")
        raise CompressError(
            f"the report's rows are not those of its measurements: {wrong}",
            where="report.json",
            fix="make it again with `compress prune`",
        )


def made(report: Mapping[str, Any]) -> list[Row]:
    """The rows of what a report has measured, in the order of its card's first table."""
    return [*_sizes(report), *_qualities(report), *_bench(report), *_targets(report), *_quantised(report)]


# --- from the sections ------------------------------------------------------------------------------------------------


def _qualities(report: Mapping[str, Any]) -> Iterator[Row]:
    quality = report.get("quality") or {}
    texts = quality.get("texts") or ()
    for text in texts:
        yield Row(
            name=f"perplexity, {text['name']}", unit="perplexity", better=better("perplexity"), dense=text["dense_ppl"],
            pruned=text["pruned_ppl"], task=text["name"], metric="perplexity", main=True, command="eval",
            conditions=_read(text),
        )  # fmt: skip
    mean = quality.get("geometric_mean")
    if len(texts) > 1 and mean:
        yield Row(
            name="perplexity, geometric mean", unit="perplexity", better=better("perplexity"), dense=mean["dense"],
            pruned=mean["pruned"], metric="perplexity", command="eval",
        )  # fmt: skip
    for row in quality.get("tasks") or ():
        metric, main = row["metric"], bool(row.get("main", row["metric"] != "loss"))
        way = better(metric, row.get("higher_is_better"))
        network = "data" in report
        yield Row(
            name=_named(metric, row["task"], network), unit="score", better=way,
            dense=row["dense"], pruned=row["pruned"], before_training=row.get("before_training"), task=row["task"],
            metric=metric, main=main, command="verify" if network else "eval",
            conditions=f"{row['samples']} held-out samples" if "samples" in row else "",
        )  # fmt: skip


def _named(metric: str, task: str, network: bool) -> str:
    """A score's name; of a job the task is its own measure."""
    if metric == task and network:
        return task
    return f"{metric}, {task}" if network else f"{task}, {metric}"


def _read(text: Mapping[str, Any]) -> str:
    """What a perplexity was measured on."""
    if "windows" not in text:
        return ""
    of = f", of which the assistant's {text['tokens']} are scored" if text.get("scored") == "assistant" else ""
    return f"{text['windows']} windows of {text['length']} tokens{of}"


def _sizes(report: Mapping[str, Any]) -> Iterator[Row]:
    size = report.get("size") or {}

    def row(name: str, unit: Unit, dense: int, pruned: int) -> Row:
        return Row(name=name, unit=unit, better="lower", dense=dense, pruned=pruned, command="verify")

    if "backbone_removed" in size:
        dense, pruned = size["dense"], size["pruned"]
        yield row("backbone parameters", "parameters", dense["backbone_parameters"], pruned["backbone_parameters"])
        yield row("all parameters", "parameters", dense["total_parameters"], pruned["total_parameters"])
    elif "flops_per_token" in size:
        flops = size["flops_per_token"]
        yield row("non-zeros, pruned layers", "parameters", size["dense_nonzero_weights"], size["nonzero_weights"])
        yield row(
            "non-zeros, all parameters", "parameters", size["dense_nonzero_parameters"], size["nonzero_parameters"]
        )
        yield row("FLOPs a token (pruned: without zeros)", "FLOPs", flops["dense"], flops["sparse"])
    elif "nonzero_parameters" in size:
        flops = size["flops"]
        yield row("non-zero parameters", "parameters", size["parameters"]["dense"], size["nonzero_parameters"])
        yield row("FLOPs a sample, zeros left out", "FLOPs", flops["dense"], flops["sparse"])
        yield row("FLOPs a sample, as a dense kernel runs it", "FLOPs", flops["dense"], flops["pruned"])
    elif "flops_removed" in size and "flops" in size:
        yield row("FLOPs a sample", "FLOPs", size["flops"]["dense"], size["flops"]["pruned"])
        yield row("parameters", "parameters", size["parameters"]["dense"], size["parameters"]["pruned"])
    held = size.get("bytes") or {}
    if "packed" in held:
        yield row("weights on disk, packed (a bit a weight, and the values)", "bytes", held["dense"], held["packed"])
    if "saved" in held:
        loads = ", as they load" if "packed" in held else ""
        yield row(f"weights on disk{loads}", "bytes", held["dense"], held["saved"])


def _bench(report: Mapping[str, Any]) -> Iterator[Row]:
    """What was measured here: in ONNX Runtime, and of a network in what else its bench holds (MNN)."""
    for title, record in benches(report).items():
        behind, command = (f", {title}", "verify") if "data" in report else ("", "bench")
        yield from _measured(record, FILES[title], behind, command=command)


FILES = {"ONNX Runtime": "ONNX files", "MNN": "MNN files"}


def benches(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The bench records of this machine, by runtime."""
    bench = report.get("bench") or {}
    return ({"ONNX Runtime": bench} if bench else {}) | ({"MNN": bench["mnn"]} if "mnn" in bench else {})


def _targets(report: Mapping[str, Any]) -> Iterator[Row]:
    for name, record in (report.get("targets") or {}).items():
        if figures(record):
            yield from _measured(record, "files", where=name)


def _quantised(report: Mapping[str, Any]) -> Iterator[Row]:
    """The dense and the pruned model in one format and precision; what the dense one alone is built in has no pair."""
    section = report.get("quantised") or {}
    for name, sides in pairs(report).items():
        dense, pruned = sides["dense"], sides["pruned"]
        yield Row(
            name="perplexity, geometric mean", unit="perplexity", better=better("perplexity"), where=name,
            dense=dense["perplexity"], pruned=pruned["perplexity"], metric="perplexity", runtime=pruned["runtime"],
            command=f"quantised {name}",
        )  # fmt: skip
        record = (section.get("bench") or {}).get(name)
        if record:
            yield from _measured(record, "file", where=name, command=f"quantised {name}")
        else:
            yield Row(
                name="file", unit="bytes", better="lower", dense=dense["bytes"], pruned=pruned["bytes"], where=name,
                metric="bytes",
            )  # fmt: skip


def pairs(report: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """``FORMAT-PRECISION`` -> side -> a row of ``report["quantised"]["files"]``, where both sides are there."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in files(report):
        found.setdefault(name_of(row), {})[row["side"]] = row
    return {name: sides for name, sides in found.items() if len(sides) == 2}


def _measured(
    record: Mapping[str, Any], files: str, behind: str = "", where: str = "", command: str = ""
) -> Iterator[Row]:
    """Latencies, memory and files of one bench record; ``behind`` a figure's name stands what ran it."""
    spec = record["spec"]
    shared: dict[str, Any] = {
        "where": where,
        "emulated": emulated(record),
        "runtime": str(spec.get("runtime", "")),
        "command": command,
        "conditions": ", ".join(how(record)),
    }
    for key in figures(record):
        yield Row(
            name=figure_name(key, spec) + behind, unit="seconds", better="lower", dense=record["dense"][key]["median"],
            pruned=record["pruned"][key]["median"], ratio=_ratio(record, key), metric=key, **shared,
        )  # fmt: skip
    for name, key in (("peak memory" + behind, "peak_rss"), (files, "bytes")):
        dense, pruned = (record[side].get(key) for side in ("dense", "pruned"))
        if dense and pruned:
            ratio = _ratio(record, key) if key in record["ratios"] else None
            yield Row(
                name=name, unit="bytes", better="lower", dense=dense, pruned=pruned, metric=key, ratio=ratio, **shared
            )


def figures(record: Any) -> list[str]:
    """The times that a bench record holds of both models with their ratio: ``ttft``, ``tpot``, ``latency`` ..."""
    if not isinstance(record, Mapping):
        return []
    both = (record.get("dense") or {}, record.get("pruned") or {})
    return [
        key
        for key in record.get("ratios") or {}
        if all(isinstance(m.get(key), Mapping) and "median" in m[key] for m in both)
    ]


def figure_name(key: str, spec: Mapping[str, Any]) -> str:
    """What a figure of a bench record is, with the shape it was measured at."""
    prompt, context = (spec.get(k) or next(iter(spec.get(f"{k}s") or ()), None) for k in ("prompt", "context"))
    if key == "ttft" and prompt:
        return f"TTFT, {prompt} tokens"
    if key == "tpot" and context:
        return f"TPOT at {context} tokens of context"
    return f"{key}, batch {spec['batch']}" if "batch" in spec else key


def how(record: Mapping[str, Any]) -> list[str]:
    """How a latency was measured; no more than the record says."""
    spec, cpu = record["spec"], (record.get("machine") or {}).get("cpu")
    said = [spec.get("runtime"), f"on {cpu}" if cpu else None, spec.get("precision")]
    if spec.get("threads"):
        said.append(counted(int(spec["threads"]), "thread"))
    if spec.get("processes"):
        said.append(f"{counted(int(spec['processes']), 'fresh process', 'fresh processes')} a model")
    if spec.get("order"):
        said.append(f"interleaved {spec['order']}")
    return [str(one) for one in said if one]


def emulated(record: Mapping[str, Any]) -> bool:
    places = (record, record.get("spec") or {}, record.get("machine") or {}, record.get("device") or {})
    return any(isinstance(place, Mapping) and place.get("emulated") is True for place in places)


def _ratio(record: Mapping[str, Any], key: str) -> Ratio:
    ratio = record["ratios"][key]
    processes = (record.get("spec") or {}).get("processes")
    return Ratio(
        median=ratio["median"],
        low=ratio["low"],
        high=ratio["high"],
        pairs=len(ratio["pairs"]) if ratio.get("pairs") else processes,
        promised=promised(record, key),
    )


def qualities(found: Sequence[Row]) -> list[Row]:
    """Those of quality; a mean over texts is of none of them."""
    return [row for row in found if row.unit in ("perplexity", "score")]


def judges(report: Mapping[str, Any]) -> list[Row]:
    """The rows that tasks and texts are judged by."""
    return [row for row in qualities(rows(report)) if row.main]


def here(found: Sequence[Row]) -> list[Row]:
    """Those of this machine."""
    return [row for row in found if not row.where]


def lines(found: Sequence[Row], cut: str = "just pruned") -> list[str]:
    """What the command line says of the quality and the latencies of this machine.

    Args:
        cut: what a score before the training is called.
    """
    said = []
    for row in here(found):
        dense, pruned = row.value("dense"), row.value("pruned")
        if row.unit == "perplexity" and row.task:
            said.append(f"ppl      {row.task}: {dense} -> {pruned}")
        elif row.unit == "score" and row.main:
            between = f" -> {row.value('before_training')} {cut}" if row.before_training is not None else ""
            name = row.metric if row.metric == row.task else f"{row.metric} {row.task}"
            said.append(f"{name}: {dense} dense{between} -> {pruned}")
        elif row.unit == "seconds":
            ran = f"; {row.runtime}" if row.metric == "latency" else ""
            said.append(f"{row.metric:8} {dense} -> {pruned} ({row.change()}{ran})")
    return said
