"""Baseline and candidate measured in turn until every budget is decided; raw samples kept.

Each round starts both in a fresh process, the first round baseline first, the next candidate first, and so on (ABBA).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from compress.errors import UsageError
from compress.exporters import gate
from compress.exporters.bench.local import machine_state
from compress.exporters.gate import Budget
from compress.exporters.gate_measure import LABELS, Measure, Measuring, Sample, measure, whole_shapes
from compress.exporters.gate_models import Artefact, check_inputs
from compress.exporters.gate_rows import (
    budgets_for,
    figures_of,
    measured_row,
    series,
    unmeasured,
    values_of,
    verdict_of,
)
from compress.run.cache import sha256_of
from compress.run.progress import Progress, say


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
            lambda: all(verdict_of(b, runs, spec)[0] for b in timed),
        )
    machine = {"before": before, "after": machine_state(), "cores": os.cpu_count(), "pinned": pinned}
    rows = [*(measured_row(b, runs, spec, machine) for b in timed), *rows]
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
