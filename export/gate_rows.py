"""What the gate says of a budget: the row of its record, from samples or files, and why nothing is decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from compress.errors import CompressError, UsageError
from compress.exporters import gate
from compress.exporters.gate import Budget, Verdict
from compress.exporters.gate_measure import LABELS, Measuring, Sample
from compress.exporters.gate_models import Artefact


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


def verdict_of(
    budget: Budget, runs: Mapping[str, Sequence[Sample]], spec: Measuring
) -> tuple[Verdict | None, float | None]:
    """(the verdict so far, the smallest change that can be detected)."""
    values = values_of(budget, runs)
    if budget.kind == "absolute":
        return gate.decide(values, budget.limit, first=spec.first, last=spec.last), None
    return gate.judge(values, budget.limit, first=spec.first, last=spec.last)


def measured_row(
    budget: Budget, runs: Mapping[str, Sequence[Sample]], spec: Measuring, machine: Mapping[str, Any]
) -> dict[str, Any]:
    values = values_of(budget, runs)
    verdict, smallest = verdict_of(budget, runs, spec)
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
