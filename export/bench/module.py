"""Two exported networks against each other on this machine: fresh processes, interleaved ABBA, raw samples kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from compress.cache import sha256_of
from compress.errors import CompressError
from compress.export.bench.local import machine_state
from compress.export.bench.stats import paired_ratio, summary
from compress.export.onnx_module import FILE, input_shape
from compress.progress import Progress


def compare_modules(dense: Path, pruned: Path, spec: dict[str, Any], file: str = FILE) -> dict[str, Any]:
    """Measures two export folders: the file of that name in each; its kind says the runtime.

    Args:
        spec: batch, processes, threads, min_seconds, min_runs.

    Returns:
        Per model latency (seconds a batch): the median over processes, the spread between and within them, the raw
        samples; and the paired ratio dense / pruned with its 95 % interval.

    Raises:
        CompressError: a file is missing, or a measuring process failed.
    """
    folders = {"dense": dense, "pruned": pruned}
    for folder in folders.values():
        if not (folder / file).exists():
            raise CompressError(f"there is no {file}", where=str(folder), fix="name a folder with an exported network")
    runs: dict[str, list[dict[str, Any]]] = {"dense": [], "pruned": []}
    before = machine_state()
    with Progress(2 * spec["processes"], "measuring in fresh processes") as bar:
        for i in range(spec["processes"]):
            for label in ("dense", "pruned") if i % 2 == 0 else ("pruned", "dense"):
                runs[label].append(_agent(folders[label], file, spec, seed=i))
                bar.update(1)
    found: dict[str, Any] = {
        "spec": {**spec, "order": "ABBA", "runtime": runs["dense"][0]["runtime"], "target": "this-machine"},
        "machine": {"before": before, "after": machine_state()},
    }
    for label, measured in runs.items():
        medians = [median(r["samples"]) for r in measured]
        found[label] = {
            "bytes": (folders[label] / file).stat().st_size,
            "sha256": sha256_of(folders[label] / file),
            "peak_rss": median(r["peak_rss"] for r in measured),
            "latency": {
                "median": median(medians),
                "spread_between": (max(medians) - min(medians)) / median(medians),
                "load": median(r["load"] for r in measured),
                "first": median(r["first"] for r in measured),
                "process_medians": medians,
                "warm": all(r["warm"] for r in measured),
                "calls_per_sample": [r["calls_per_sample"] for r in measured],
                "all": summary([s for r in measured for s in r["samples"]]),
                "raw": [r["samples"] for r in measured],
            },
        }
    found["ratios"] = {
        "latency": paired_ratio(
            found["dense"]["latency"]["process_medians"], found["pruned"]["latency"]["process_medians"]
        )
    }
    return found


def _agent(folder: Path, file: str, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    request = {
        "model": str(folder / file),
        "shape": [spec["batch"], *input_shape(folder)],
        "seed": seed,
        **{k: spec[k] for k in ("threads", "min_seconds", "min_runs")},
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "module_agent.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressError(f"the measuring process failed: {last}", where=str(folder), fix="export it again")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
