"""Two exported models against each other on this machine: fresh processes, interleaved ABBA, raw samples kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from compress.cache import sha256_of
from compress.errors import CompressError
from compress.export.bench.stats import paired_ratio, summary
from compress.export.onnx import DECODE, PREFILL, WEIGHTS
from compress.progress import Progress

FIGURES = ("ttft", "tpot")


def compare_llm(dense: Path, pruned: Path, spec: dict[str, Any], vocab: int) -> dict[str, Any]:
    """Measures two export folders.

    Args:
        spec: prompt, context (tokens), processes, threads, min_seconds, min_runs.
        vocab: token ids are drawn below it.

    Returns:
        Per figure (``ttft``, ``tpot``: seconds; ``peak_rss``: bytes) and model: the median over processes, the spread
        between processes and within them, and the raw samples; the paired ratio dense / pruned with its 95 % interval.

    Raises:
        CompressError: a measuring process failed.
    """
    folders = {"dense": dense, "pruned": pruned}
    for folder in folders.values():
        for name in (PREFILL, DECODE):
            if not (folder / name).exists():
                raise CompressError(
                    f"there is no {name}", where=str(folder), fix="name a folder made by `compress export`"
                )
    runs: dict[str, list[dict[str, Any]]] = {"dense": [], "pruned": []}
    rounds = spec["processes"]
    before = machine_state()
    with Progress(2 * rounds, "measuring in fresh processes") as bar:
        for i in range(rounds):
            for label in ("dense", "pruned") if i % 2 == 0 else ("pruned", "dense"):
                runs[label].append(_agent(folders[label], spec, vocab, seed=i))
                bar.update(1)
    found: dict[str, Any] = {
        "spec": {**spec, "order": "ABBA", "runtime": runs["dense"][0]["runtime"], "target": "this-machine"},
        "machine": {"before": before, "after": machine_state()},
        "ratios": {},
    }
    for label, measured in runs.items():
        found[label] = {
            "bytes": sum((folders[label] / n).stat().st_size for n in (PREFILL, DECODE, WEIGHTS)),
            "sha256": sha256_of(folders[label] / WEIGHTS),
            "peak_rss": median(r["peak_rss"] for r in measured),
            "peak_rss_samples": [r["peak_rss"] for r in measured],
        }
        for figure in FIGURES:
            medians = [median(r[figure]["samples"]) for r in measured]
            every = [s for r in measured for s in r[figure]["samples"]]
            found[label][figure] = {
                "median": median(medians),
                "spread_between": (max(medians) - min(medians)) / median(medians),
                "load": median(r[figure]["load"] for r in measured),
                "first": median(r[figure]["first"] for r in measured),
                "process_medians": medians,
                "warm": all(r[figure]["warm"] for r in measured),
                "calls_per_sample": [r[figure]["calls_per_sample"] for r in measured],
                "all": summary(every),
                "raw": [r[figure]["samples"] for r in measured],
            }
    for figure in FIGURES:
        found["ratios"][figure] = paired_ratio(
            found["dense"][figure]["process_medians"], found["pruned"][figure]["process_medians"]
        )
    found["ratios"]["peak_rss"] = paired_ratio(found["dense"]["peak_rss_samples"], found["pruned"]["peak_rss_samples"])
    return found


def _agent(folder: Path, spec: dict[str, Any], vocab: int, seed: int) -> dict[str, Any]:
    request = {
        "prefill": str(folder / PREFILL),
        "decode": str(folder / DECODE),
        "vocab": vocab,
        "seed": seed,
        **{k: spec[k] for k in ("prompt", "context", "threads", "min_seconds", "min_runs")},
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "agent.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CompressError(
            f"the measuring process failed: {lines[-1]}",
            where=str(folder),
            fix="check the export with `compress verify`",
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def machine_state() -> dict[str, Any]:
    """Load and clocks: what can disturb a timing."""
    found: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        found["governor"] = governor.read_text().strip()
    return found
