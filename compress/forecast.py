"""What a run will cost, reckoned from shapes alone: seconds on this machine, bytes of disk and of memory.

Counts are multiply-adds doubled (FLOPs). They are estimates: what a machine does beside its matrix products is not in
them, and a busy machine is slower.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.setup import Setup

# What Python, torch and transformers hold before there is a model (measured: 0.4 GB).
BASE_BYTES = 400_000_000
# The elimination's thin updates run at about a tenth of the speed of large products (tools/bench_local.py).
THIN = 10


def flops_per_second() -> float:
    """Float32 matrix products on this machine, measured for a quarter of a second."""
    import torch

    x, w = torch.randn(2048, 1024), torch.randn(1024, 1024)
    x @ w
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.25:
        x @ w
        count += 1
    return 2 * 2048 * 1024 * 1024 * count / (time.perf_counter() - began)


def flops(setup: Setup, singles: int) -> dict[str, int]:
    """FLOPs of the method's stages: ``singles`` candidates in the first iteration; `later` is every one behind it."""
    g, costs, options = setup.geometry, setup.costs, setup.recipe.options
    search, spec = options.search, setup.recipe.calibration
    body, head = 2 * costs.backbone, 2 * g.hidden * g.vocab  # a token
    inputs = g.heads * g.head_dim
    statistics = 2 * g.layers * (inputs**2 + g.ffn**2 + g.hidden * (inputs + g.ffn))
    eliminate = THIN * g.layers * sum(2 * n**3 + n**2 * g.hidden for n in (inputs, g.ffn))
    tokens = spec.windows * spec.length
    few = min(spec.windows, options.supernet_windows or spec.windows) * spec.length
    window = search.length or spec.length
    scored = head * min(search.positions, window - 1) // window

    def candidates(count: int, windows: int) -> int:
        # A candidate runs, on average, half the blocks: those behind its first change.
        return int(count * windows * window * (body // 2 + scored))

    # Later iterations look at the neighbours of the solution so far: two attention levels and the FFN's own.
    later = g.layers * (options.refine_levels + 2)
    shares = zip(search.steps, [search.offspring, *search.survivors], strict=True)
    evolution = search.generations * sum(candidates(n, int(s * search.windows)) for s, n in shares)
    starting = candidates(16, search.windows)
    return {
        "metrics": options.metric_windows * spec.length * 3 * (body + head) if options.metric != "none" else 0,
        "first_supernet": few * (body + statistics) + eliminate,
        "first_singles": candidates(singles, search.singles_windows),
        "later_supernet": few * (2 * body + statistics) + eliminate,
        "later_singles": candidates(later, search.singles_windows),
        "search": starting + evolution,
        "last_pass": tokens * (2 * body + statistics) + eliminate,
    }


def total_flops(stages: dict[str, int], iterations: int) -> int:
    """All stages of a run with that many iterations."""
    later = (iterations - 1) * (stages["later_supernet"] + stages["later_singles"])
    first = stages["metrics"] + stages["first_supernet"] + stages["first_singles"]
    return first + later + iterations * stages["search"] + stages["last_pass"]


def disk_bytes(setup: Setup, supernet: int) -> dict[str, int]:
    """What is written: the first supernet (to 5 %), activations kept for resuming, metrics, and the model."""
    g, spec = setup.geometry, setup.recipe.calibration
    metrics = 2 * g.layers * g.hidden**2 * 4 if setup.recipe.options.metric != "none" else 0
    kept = setup.costs.total - round(setup.recipe.sparsity * setup.costs.backbone)
    return {
        "first_supernet": supernet,
        "streams": 2 * spec.windows * spec.length * g.hidden * 4,
        "metrics": metrics,
        "model": kept * setup.stored_dtype.itemsize,
    }


def memory_bytes(setup: Setup, disk: dict[str, Any]) -> int:
    """The most the pruning stages hold at once: the model twice (its file is mapped while it is copied), the streams,
    one batch of logits with its gradient, and one sublayer's inputs over all windows."""
    g, spec = setup.geometry, setup.recipe.calibration
    inputs = spec.windows * spec.length * max(g.ffn, g.heads * g.head_dim) * 4
    logits = 3 * spec.length * g.vocab * 4
    solver = 6 * g.ffn**2 * 8
    return int(BASE_BYTES + 2 * setup.costs.total * 4 + 2 * disk["streams"] + inputs + logits + solver)
