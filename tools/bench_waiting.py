"""Seconds of passes through a stack of feed-forward layers by how its threads wait, alone and beside busy processes.

    PYTHONPATH=. python tools/bench_waiting.py --beside 0 2

Each way is measured in a process of its own, interleaved in rounds; what is printed is the median and its ratio to
threads that spin.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

WORK = """
import time, torch
with torch.no_grad():
    layers = [(torch.randn(1536, 576) * 0.02, torch.randn(576, 1536) * 0.02) for _ in range(12)]
    hidden = torch.randn(256, 576)
    def run():
        x = hidden
        for up, down in layers:
            x = x + torch.nn.functional.silu(x @ up.T) @ down.T
        return x
    run()
    began = time.monotonic()
    for _ in range({passes}):
        run()
print(time.monotonic() - began)
"""
WAYS = {
    "threads that spin": {},
    "threads that sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def seconds(way: dict[str, str], passes: int) -> float:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    words = [sys.executable, "-c", WORK.format(passes=passes)]
    done = subprocess.run(words, env={**clean, **way}, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 2], help="busy processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=40)
    given = parser.parse_args()
    for beside in given.beside:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            found: dict[str, list[float]] = {name: [] for name in WAYS}
            for _ in range(given.rounds):
                for name, way in WAYS.items():
                    found[name].append(seconds(way, given.passes))
        finally:
            for process in busy:
                process.kill()
                process.wait()
        first = statistics.median(found["threads that spin"])
        for name, times in found.items():
            middle = statistics.median(times)
            row = {"beside": beside, "way": name, "seconds": round(middle, 2), "ratio": round(middle / first, 3)}
            print(json.dumps({**row, "raw": [round(t, 2) for t in times]}), flush=True)


if __name__ == "__main__":
    main()
