"""What all levels of one nested pass cost against a single level, at the shape of SmolLM2's FFN.

    python tools/bench_local.py

Both are timed in turn, in one process; the ratio of the medians is what counts. Goal: at most 1.5.

    python tools/bench_local.py --memory --neurons 6144 --hidden 1536

prints instead the most memory that one pass takes, from the sums to a level, in float64 matrices of the size of H.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from compress.recipes.tyr.local import Moments, damp, neuron_levels, prune_neurons
from compress.system import host


def memory(n: int, hidden: int) -> None:
    x, w = torch.randn(256, n), torch.randn(n, hidden)
    start = host.peak_memory()
    moments = Moments(n, hidden)
    moments.add(x, x @ w)
    problem = damp(moments, w, 0.01)
    # Two removals after the first level: the matrices are shrunk once, and the rest of a pass holds less.
    for count, _, _ in neuron_levels(problem, (n, n - n // 5), n // 10, last=True):
        print(f"level of {count} neurons")
    most = host.peak_memory() - start
    print(f"peak {most / 1e9:.2f} GB, {most / (8 * n * n):.2f} matrices of {n} x {n} ({8e-9 * n * n:.2f} GB each)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=1536)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--levels", type=int, default=9)
    parser.add_argument("--step", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    if given.memory:
        memory(given.neurons, given.hidden)
        return
    n, step = given.neurons, given.step
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * n, n, generator=generator) @ (torch.eye(n) + 0.05 * torch.randn(n, n, generator=generator))
    w = torch.randn(n, given.hidden, generator=generator)
    moments = Moments(n, given.hidden)
    moments.add(x, x @ w)
    problem = damp(moments, w, 0.01)
    counts = sorted({n * i // (given.levels - 1) // step * step for i in range(given.levels)})
    single = counts[1]

    def seconds(wanted: list[int]) -> float:
        began = time.perf_counter()
        prune_neurons(problem, wanted, step)
        return time.perf_counter() - began

    seconds([single])  # warm-up
    pairs = [(seconds([single]), seconds(counts)) for _ in range(given.rounds)]
    one, every = (median(p[i] for p in pairs) for i in (0, 1))
    print(f"one level ({single} neurons kept): {one:.2f} s")
    print(f"{len(counts)} levels in one pass: {every:.2f} s, {every / one:.2f} times as long")


if __name__ == "__main__":
    main()
