"""Baseline and candidate measured in turn until every budget is decided; raw samples kept.

Each round starts both in a fresh process, the first round baseline first, the next candidate first, and so on (ABBA).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from compress.errors import CompressError, UsageError
from compress.exporters import gate
from compress.exporters.bench.local import machine_state, measure_once
from compress.exporters.gate import Budget, Verdict
from compress.exporters.gate_models import Artefact, check_inputs
from compress.exporters.inputs import Inputs
from compress.run.cache import sha256_of
from compress.run.progress import Progress, say

LABELS = ("baseline", "candidate")


@dataclass(frozen=True)
class Measuring:
    """How one process measures. ``shapes`` names the inputs' whole shapes where they cannot be told from the file;
    ``inputs`` are arrays that both networks are given, in place of made-up ones."""

    threads: int = 1
    samples: int = gate.SAMPLES
    batch: int = 1
    prompt: int = 128
    context: int = 128
    shapes: Mapping[str, Sequence[int]] | None = None
    inputs: Inputs | None = None
    first: int = gate.FIRST
    last: int = gate.LAST


FLOATS = ("float", "float16", "double")
WHOLE = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")


def whole_shapes(artefact: Artefact, spec: Measuring) -> dict[str, list[int]]:
    """The shapes of a network's inputs with the batch filled in; an axis that is said of one input is said of all that
    have an axis of that name.

    Raises:
        UsageError: another free dimension is left, or the network takes what cannot be made up for it.
    """
    if spec.inputs is not None:
        return spec.inputs.shapes
    said = spec.shapes or {}
    strange = [n for n in said if n not in artefact.inputs]
    if strange:
        have = ", ".join(map(repr, artefact.inputs))
        raise UsageError(f"there is no input {strange[0]!r}", where="shapes", fix=f"the inputs are {have}")
    axes: dict[str, int] = {}
    for name, given in said.items():
        shape = artefact.inputs[name][1]
        if len(given) != len(shape) or any(a != b for a, b in zip(given, shape, strict=True) if isinstance(b, int)):
            raise UsageError(
                f"the shape {'x'.join(map(str, given))} does not fit {'x'.join(map(str, shape))}",
                where=f"shapes, input {name!r}",
                fix="change it",
            )
        for axis, count in zip(shape, given, strict=True):
            if isinstance(axis, str) and axis != "?" and axes.setdefault(axis, count) != count:
                raise UsageError(
                    f"the axis {axis!r} is {axes[axis]} and {count}",
                    where=f"shapes, input {name!r}",
                    fix="say one size",
                )
    return {
        name: list(said[name]) if name in said else _filled(artefact, name, axes, spec.batch)
        for name in artefact.inputs
    }


def _filled(artefact: Artefact, name: str, axes: Mapping[str, int], batch: int) -> list[int]:
    kind, shape = artefact.inputs[name]
    if kind not in (*FLOATS, *WHOLE):
        raise UsageError(
            f"input {name!r} is {kind}; numbers are measured",
            where=artefact.name,
            fix="export it with inputs of numbers",
        )
    free = [i for i, d in enumerate(shape) if isinstance(d, str) and d not in axes]
    if any(i != 0 for i in free):
        raise UsageError(
            f"dimension {shape[free[-1]]!r} of input {name!r} is free",
            where=artefact.name,
            fix=f"say the whole shape: --shape {name}={'x'.join(str(d) if isinstance(d, int) else '8' for d in shape)}",
        )
    return [axes.get(d, batch) if isinstance(d, str) else d for d in shape]


Sample = dict[str, Any]
Measure = Callable[[Artefact, Measuring, int], Sample]


def measure(artefact: Artefact, spec: Measuring, seed: int) -> Sample:
    """One fresh process; ``{"runtime", "peak_rss", figure: {"samples", "calls_per_sample", "warm", "load", "first"}}``.

    Raises:
        CompressError: the process failed.
    """
    request: dict[str, Any] = {"threads": spec.threads, "min_seconds": 0.0, "min_runs": spec.samples}
    if artefact.kind == "text":
        request |= {"prompt": spec.prompt, "context": spec.context}
    else:
        request["shapes"] = whole_shapes(artefact, spec)
        if spec.inputs is not None:
            request["inputs"] = str(spec.inputs.file)
    form = artefact.format if artefact.format in ("gguf", "genai") else None
    found = measure_once(artefact.path, request, vocab=artefact.vocab or None, format=form, seed=seed)
    if found["emulated"]:
        raise CompressError(
            "this processor is emulated, and an emulated latency says nothing", where="gate", fix="gate on the device"
        )
    return {"runtime": found["runtime"], "peak_rss": found["peak_rss"], **found["figures"]}


def figures_of(kind: str) -> tuple[str, ...]:
    return ("ttft", "tpot") if kind == "text" else ("latency",)


def budgets_for(budgets: Sequence[Budget], kind: str, pinned: str | None) -> list[Budget]:
    """The budgets with ``latency`` of a language model as its two times, each gated apart.

    Raises:
        UsageError: none at all, one twice, a figure that this kind of model does not have, or an absolute time where no
            pinned device is named.
    """
    if not budgets:
        raise UsageError("there is no budget", where="gate", fix=f"--budget, for example: {gate.EXAMPLES}")
    found: list[Budget] = []
    for budget in budgets:
        if budget.figure in gate.TIMES and budget.kind == "absolute" and pinned is None:
            raise UsageError(
                "a time in seconds holds on one named, pinned device only",
                where=f"budget {budget.text!r}",
                fix=f"name the device (--pinned NAME), or compare with the baseline: {budget.figure}<=1.05x",
            )
        if budget.figure == "latency" and kind == "text":
            for figure in figures_of(kind):
                text = budget.text.replace("latency", figure, 1)
                found.append(Budget(text, figure, budget.statistic, budget.kind, budget.limit))
            continue
        if budget.figure in gate.TIMES and budget.figure not in figures_of(kind):
            raise UsageError(
                f"a plain network has no {budget.figure}", where=f"budget {budget.text!r}", fix="its time is latency"
            )
        found.append(budget)
    keys = [(b.figure, b.statistic, b.kind) for b in found]
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise UsageError("this figure has two budgets", where=f"budget {found[i].text!r}", fix="keep one of them")
    return found


def unmeasured(budget: Budget, baseline: Artefact, candidate: Artefact) -> list[dict[str, Any]]:
    """Size and quality: compared as they stand; the rows of the record.

    Raises:
        UsageError: no report says what is asked for, or the reports were made on different texts or tasks.
    """
    if budget.figure == "size":
        sizes = baseline.bytes, candidate.bytes
        value = sizes[1] / sizes[0] if budget.kind == "relative" else sizes[1]
        return [_row(budget, value, value <= budget.limit, baseline=sizes[0], candidate=sizes[1])]
    known = []
    for artefact in (baseline, candidate):
        quality = (artefact.quality or {}).get(budget.figure)
        if not quality:
            raise UsageError(
                f"nothing says what {budget.figure} this model has",
                where=f"budget {budget.text!r}, {artefact.name}",
                fix="name two folders of finished runs (RUN or RUN:dense): their reports say it",
            )
        known.append(quality)
    # What was measured, without the values.
    means = budget.figure == "perplexity"
    same = [{k: v[1] if means else v[0] for k, v in quality.items()} for quality in known]
    if same[0] != same[1]:
        raise UsageError(
            f"the two reports do not measure {budget.figure} on the same",
            where=f"{baseline.name}, {candidate.name}",
            fix="name two runs with the same evaluation",
        )
    if means:
        middle = [float(np.exp(np.mean([np.log(v) for v, _ in quality.values()]))) for quality in known]
        value = middle[1] / middle[0]
        return [_row(budget, value, value <= budget.limit, baseline=middle[0], candidate=middle[1])]
    rows = []
    for task in known[0]:
        was, now = (quality[task][1] for quality in known)
        # A change that is the limit but for the last digit of a float is within it.
        within = now - was >= budget.limit - 1e-12
        rows.append(_row(budget, now - was, within, part=task, baseline=was, candidate=now))
    return rows


def _row(budget: Budget, value: float, within: bool, **more: Any) -> dict[str, Any]:
    return {
        "budget": budget.text,
        "figure": budget.figure,
        "statistic": budget.statistic,
        "kind": budget.kind,
        "limit": budget.limit,
        "value": value,
        "verdict": "pass" if within else "fail",
        "reason": "",
        **more,
    }


def series(budget: Budget, samples: Sequence[Sample]) -> list[float]:
    """A figure of every process: its fastest call, or the median or tail of its samples (s); or its memory (bytes)."""
    if budget.figure == "memory":
        if any(s["peak_rss"] is None for s in samples):
            raise CompressError(
                "this system does not tell how much memory a process has held at most",
                where=f"budget {budget.text!r}",
                fix="leave it out, or gate on Linux, macOS or Windows",
            )
        return [float(s["peak_rss"]) for s in samples]
    if budget.statistic == "fastest":
        return [float(min(s[budget.figure]["fastest"])) for s in samples]
    q = {"median": 50, "p90": 90, "p99": 99}[budget.statistic]
    return [float(np.percentile(s[budget.figure]["samples"], q)) for s in samples]


def values_of(budget: Budget, runs: Mapping[str, Sequence[Sample]]) -> list[float]:
    """What is held against the limit, one a round: candidate / baseline, or the candidate's own figure."""
    after = series(budget, runs["candidate"])
    if budget.kind == "absolute":
        return after
    return [b / a for a, b in zip(series(budget, runs["baseline"]), after, strict=True)]


def compare(
    baseline: Artefact,
    candidate: Artefact,
    budgets: Sequence[Budget],
    spec: Measuring,
    *,
    strict: bool = False,
    pinned: str | None = None,
    measure: Measure = measure,
) -> dict[str, Any]:
    """Gates ``candidate``: the record, with a row for every budget and every raw sample.

    Raises:
        UsageError: see `check_inputs`, `budgets_for`, `unmeasured`.
        CompressError: a measuring process failed.
    """
    check_inputs(baseline, candidate)
    budgets = budgets_for(budgets, baseline.kind, pinned)
    if baseline.kind == "network" and any(b.figure in gate.MEASURED for b in budgets):
        whole_shapes(candidate, spec)
    rows = [row for b in budgets if b.figure not in gate.MEASURED for row in unmeasured(b, baseline, candidate)]
    timed = [b for b in budgets if b.figure in gate.MEASURED]
    runs: dict[str, list[Sample]] = {label: [] for label in LABELS}
    pilot: dict[str, list[Sample]] = {}
    before = machine_state()
    if timed:
        spec = Measuring(**{**vars(spec), "samples": max(spec.samples, gate.samples_needed(timed, spec.first))})
        pilot = _rounds(
            {"baseline": baseline, "candidate": candidate},
            runs,
            timed,
            spec,
            measure,
            lambda: all(_verdict(b, runs, spec)[0] for b in timed),
        )
    machine = {"before": before, "after": machine_state(), "cores": os.cpu_count(), "pinned": pinned}
    rows = [*(_measured_row(b, runs, spec, machine) for b in timed), *rows]
    verdict = gate.overall([row["verdict"] for row in rows])
    return {
        **_about(runs, {"baseline": baseline, "candidate": candidate}, spec, machine),
        "verdict": verdict,
        "strict": strict,
        "exit_code": gate.exit_code(verdict, strict),
        "budgets": rows,
        "raw": runs,
        "set_aside": pilot,
    }


def _rounds(
    artefacts: Mapping[str, Artefact],
    runs: dict[str, list[Sample]],
    budgets: Sequence[Budget],
    spec: Measuring,
    measure: Measure,
    decided: Callable[[], bool],
) -> dict[str, list[Sample]]:
    """Rounds until all is ``decided``, into ``runs``: one sample a round and model. Returns the first rounds where they
    were set aside because the machine is noisy: a sample is then the best of several processes."""
    watched = [b for b in budgets if b.figure in gate.TIMES]
    # What a figure is in itself, the best of several processes would flatter.
    may_repeat = bool(watched) and all(b.kind == "relative" for b in budgets)
    pilot: dict[str, list[Sample]] = {}
    repeats = 1
    while True:
        with Progress(2 * repeats * spec.last, "measuring in fresh processes") as bar:
            for i in range(spec.last):
                found: dict[str, list[Sample]] = {label: [] for label in LABELS}
                for which in gate.order(i, repeats):
                    label = LABELS[which]
                    found[label].append(measure(artefacts[label], spec, i))
                    bar.update(1)
                for label in LABELS:
                    runs[label].append(_best(found[label]))
                asks = gate.PILOT <= i + 1 <= spec.first and repeats == 1 and may_repeat
                if asks and gate.noisy([series(b, runs[label]) for b in watched for label in LABELS]):
                    break
                if i + 1 >= spec.first and decided():
                    return pilot
            else:
                return pilot
        pilot, repeats = {label: list(runs[label]) for label in LABELS}, gate.REPEATS
        for label in LABELS:
            runs[label].clear()
        say(f"the machine is noisy: a round is the fastest of {repeats} processes of each model from here on")


def _best(samples: Sequence[Sample]) -> Sample:
    """Several processes' samples as one: of every time, the fastest call of all of them and the samples of the process
    with the least median; the least memory. All stand in it as they were."""
    if len(samples) == 1:
        return samples[0]
    peaks = [s["peak_rss"] for s in samples]
    peak = None if None in peaks else min(peaks)  # where the system does not tell
    found: Sample = {**samples[0], "peak_rss": peak, "processes": list(samples)}
    for figure in gate.TIMES:
        own = [s[figure] for s in samples if figure in s]
        if own:
            least = min(own, key=lambda s: float(np.median(s["samples"])))
            every = [t for s in own for t in s["fastest"]]
            found[figure] = {**least, "fastest": every, "warm": all(s["warm"] for s in own)}
    return found


def _verdict(
    budget: Budget, runs: Mapping[str, Sequence[Sample]], spec: Measuring
) -> tuple[Verdict | None, float | None]:
    """(the verdict so far, the smallest change that can be detected)."""
    values = values_of(budget, runs)
    if budget.kind == "absolute":
        return gate.decide(values, budget.limit, first=spec.first, last=spec.last), None
    return gate.judge(values, budget.limit, first=spec.first, last=spec.last)


def _measured_row(
    budget: Budget, runs: Mapping[str, Sequence[Sample]], spec: Measuring, machine: Mapping[str, Any]
) -> dict[str, Any]:
    values = values_of(budget, runs)
    verdict, smallest = _verdict(budget, runs, spec)
    verdict = verdict or "inconclusive"
    low, high = gate.bounds(values, gate.LEVEL_TAIL)
    tail = gate.fail_tail(spec.first, spec.last)
    low_fail, _ = gate.bounds(values, tail)
    reason = _why(budget, values, runs, spec, machine, smallest) if verdict == "inconclusive" else ""
    figures = {label: median(series(budget, runs[label])) for label in LABELS}
    return {
        **_row(budget, median(values), True, **figures),
        "verdict": verdict,
        "reason": reason,
        "low": low,
        "high": high,
        # With the tail of a fail there may be no bound yet; JSON has no infinity.
        "low_fail": low_fail if np.isfinite(low_fail) else None,
        "smallest_change": math.expm1(smallest) if smallest is not None else None,
        "rounds": len(values),
        "values": values,
    }


def _why(
    budget: Budget,
    values: Sequence[float],
    runs: Mapping[str, Sequence[Sample]],
    spec: Measuring,
    machine: Mapping[str, Any],
    smallest: float | None,
) -> str:
    """Why nothing could be decided, and what would help."""
    parts = []
    if smallest is not None and gate.too_tight(budget.limit, smallest):
        parts.append(
            f"the budget is nearer to 1 than the smallest change that this noise lets see"
            f" ({100 * math.expm1(smallest):.1f} %)"
        )
    base = series(budget, runs["baseline"])
    parts.append(
        f"too noisy to decide after {len(values)} rounds: spread between processes {100 * gate.spread(base):.1f} %,"
        f" of the {'ratios' if budget.kind == 'relative' else 'figures'} {100 * gate.spread(values):.1f} %"
    )
    loads = [machine[when]["load_average"] for when in ("before", "after") if "load_average" in machine[when]]
    if loads:
        busy = f"load {max(loads):.1f} on {machine['cores']} cores"
        parts.append(busy + (": other work runs here" if max(loads) > spec.threads + 0.5 else ""))
    if budget.figure in gate.TIMES:
        slower = gate.throttled(base)
        if slower is not None:
            parts.append(f"throttled: the baseline ended {100 * slower:.0f} % slower than it began")
        cold = sum(not s[budget.figure]["warm"] for label in LABELS for s in runs[label])
        if cold:
            parts.append(f"{cold} processes were still getting faster when their warm-up was cut off")
    return "; ".join(parts)


def _about(
    runs: Mapping[str, Sequence[Sample]],
    artefacts: Mapping[str, Artefact],
    spec: Measuring,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "kind": artefacts["baseline"].kind,
        **{
            label: {
                "name": artefact.name,
                "bytes": artefact.bytes,
                "sha256": {str(f.relative_to(artefact.home)): sha256_of(f) for f in artefact.files},
            }
            for label, artefact in artefacts.items()
        },
        "spec": {
            **{k: v for k, v in vars(spec).items() if k not in ("shapes", "inputs")},
            **({"inputs": spec.inputs.facts()} if spec.inputs is not None else {}),
            "shapes": {k: list(v) for k, v in (spec.shapes or {}).items()},
            "order": "ABBA",
            # Of each model in a round; more than one where the machine is noisy.
            "processes": len(runs["baseline"][0].get("processes", [0])) if runs["baseline"] else 0,
            "runtime": runs["baseline"][0]["runtime"] if runs["baseline"] else None,
            "level": 1 - 2 * gate.LEVEL_TAIL,
            "false_fail": gate.error_over_looks(gate.fail_tail(spec.first, spec.last), spec.first, spec.last),
        },
        "machine": dict(machine),
    }


def self_test(
    baseline: Artefact, budgets: Sequence[Budget], spec: Measuring, *, measure: Measure = measure
) -> dict[str, Any]:
    """The baseline against itself, all rounds: the smallest change that this machine can detect, figure by figure.

    Raises:
        UsageError: a relative budget is nearer to 1 than that.
    """
    figures = [*figures_of(baseline.kind), "memory"]
    if baseline.kind == "network":
        whole_shapes(baseline, spec)
    runs: dict[str, list[Sample]] = {label: [] for label in LABELS}
    before = machine_state()
    alike = [gate.parse_budget(f"{figure}<=1x") for figure in figures]
    pilot = _rounds(dict.fromkeys(LABELS, baseline), runs, alike, spec, measure, lambda: False)
    machine = {"before": before, "after": machine_state(), "cores": os.cpu_count(), "pinned": None}
    rows: list[dict[str, Any]] = []
    for figure in figures:
        budget = gate.parse_budget(f"{figure}<=1x")
        values = values_of(budget, runs)
        low, high = gate.bounds(values, gate.LEVEL_TAIL)
        smallest = gate.smallest_change(values, first=spec.first, last=spec.last)
        base = series(budget, runs["baseline"])
        rows.append(
            {
                "figure": figure,
                "value": median(values),
                "low": low,
                "high": high,
                "smallest_change": math.expm1(smallest),
                "spread_between": gate.spread(base),
                "throttled": gate.throttled(base),
                "median": median(base),
                "values": values,
            }
        )
    for budget in budgets_for(budgets, baseline.kind, "self-test") if budgets else []:
        found = next((r for r in rows if r["figure"] == budget.figure), None)
        if found is None or budget.kind != "relative":
            continue
        smallest = math.log1p(found["smallest_change"])
        if gate.too_tight(budget.limit, smallest):
            raise UsageError(
                f"the budget is tighter than the smallest change of {budget.figure} that this machine can detect now"
                f" ({100 * found['smallest_change']:.1f} %)",
                where=f"budget {budget.text!r}",
                fix=f"{budget.figure}<={math.ceil(100 * math.exp(smallest)) / 100:g}x, or a quieter machine",
            )
    return {
        **_about(runs, {"baseline": baseline, "candidate": baseline}, spec, machine),
        "self_test": rows,
        "exit_code": 0,
        "raw": runs,
        "set_aside": pilot,
    }
