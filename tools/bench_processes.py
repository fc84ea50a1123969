"""Time against processes: the same short run on 1, 2, ... processes of one thread each, and the bytes they end with.

    python tools/bench_processes.py --out /tmp/processes --processes 1 2

Prints each stage's seconds, the speed-up over the first number, and whether the plans are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

SHORT = (
    "calibration.windows=8", "tyr.supernet_windows=8", "tyr.metric=none", "tyr.levels=3", "tyr.head_levels=2",
    "tyr.search.windows=8", "tyr.search.singles_windows=4", "tyr.search.generations=2", "evaluation.windows=1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="tyr-demo")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    found: dict[int, dict[str, float]] = {}
    plans = {}
    for count in given.processes:
        out = given.out / f"{count}-processes"
        words = [word for value in SHORT for word in ("--set", value)]
        subprocess.run(
            [sys.executable, "-m", "compress", "prune", given.model, "--recipe", given.recipe, "--out", str(out),
             "--until", "plan", "--fresh", "--processes", str(count), *words],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds: dict[str, float] = {}
        for path in out.rglob("seal.json"):
            seal = json.loads(path.read_text("utf-8"))
            stage = seal["stage"].split("/")[0]
            seconds[stage] = seconds.get(stage, 0.0) + seal["seconds"]
        found[count] = seconds
        plans[count] = hashlib.sha256((out / "plan" / "plan.safetensors").read_bytes()).hexdigest()[:16]
    first = found[given.processes[0]]
    stages = ["supernet-1", "singles-1", "search-1", "final", "plan"]
    print("| stage | " + " | ".join(f"{n} process{'es' * (n > 1)}" for n in found) + " |")
    print("|---|" + "---|" * len(found))
    groups = {**{s: [s] for s in stages}, "singles + search": ["singles-1", "search-1"], "all": stages}
    for label, parts in groups.items():
        total = {n: sum(s[p] for p in parts) for n, s in found.items()}
        base = sum(first[p] for p in parts)
        print(f"| {label} | " + " | ".join(f"{t:.1f} s ({base / t:.2f}x)" for t in total.values()) + " |")
    print("plans: " + ", ".join(f"{n}: {h}" for n, h in plans.items()))
    if len(set(plans.values())) != 1:
        sys.exit("the plans differ")


if __name__ == "__main__":
    main()
