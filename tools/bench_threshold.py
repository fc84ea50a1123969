"""Time and extra memory of the global threshold against torch's own pruning and a plain topk, on one thread.

    python tools/bench_threshold.py

Every figure is of a fresh process that holds nothing but the weights: random normal ones in the shapes of
SmolLM2-135M's blocks (106 million; its embeddings are not pruned). Memory is the peak of the resident set above what
the process held before, the masks that come out included. Time is the processor's, of one thread: on a quiet machine
the clock says the same. The ways take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

HIDDEN, KV, FFN, LAYERS = 576, 192, 1536, 30
SHAPES = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN)} | {
    "gate": (FFN, HIDDEN),
    "up": (FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
Model = dict[str, torch.nn.Linear]


def network(layers: int, seed: int = 0) -> Model:
    """Linear layers by name, each as large and as spread as it would be when it is first drawn."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i in range(layers):
        for name, (out, width) in SHAPES.items():
            linear = torch.nn.Linear(width, out, bias=False, device="meta")
            weight = torch.empty(out, width).normal_(0, width**-0.5, generator=generator)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            made[f"layers.{i}.{name}"] = linear
    return made


def ours(model: Model, prune: int, floor: float = 0.0) -> int:
    from compress.recipes.global_mp.floors import layer_floors
    from compress.recipes.global_mp.magnitude import global_masks

    weights = {name: linear.weight for name, linear in model.items()}
    floors = layer_floors({name: w.numel() for name, w in weights.items()}, floor)
    masks = global_masks(weights, prune, floors)
    return sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())


def torch_prune(model: Model, prune: int) -> int:
    from torch.nn.utils import prune as prune_

    prune_.global_unstructured(  # type: ignore[no-untyped-call]
        [(linear, "weight") for linear in model.values()], prune_.L1Unstructured, amount=prune
    )
    return sum(
        linear.weight_mask.numel() - int(linear.weight_mask.count_nonzero())  # type: ignore[operator, arg-type, union-attr]
        for linear in model.values()
    )


def _masks_above(model: Model, threshold: torch.Tensor) -> int:
    masks = [linear.weight.abs() > threshold for linear in model.values()]
    return sum(mask.numel() - int(mask.count_nonzero()) for mask in masks)


def topk(model: Model, prune: int) -> int:
    scores = torch.cat([linear.weight.abs().flatten() for linear in model.values()])
    return _masks_above(model, torch.topk(scores, prune, largest=False, sorted=False).values.max())


def kthvalue(model: Model, prune: int) -> int:
    scores = torch.cat([linear.weight.abs().flatten() for linear in model.values()])
    return _masks_above(model, torch.kthvalue(scores, prune).values)


WAYS: dict[str, Callable[[Model, int], int]] = {
    "ours": ours,
    "ours, floors": lambda model, prune: ours(model, prune, 0.0005),
    "global_unstructured": torch_prune,
    "topk": topk,
    "kthvalue": kthvalue,
}


def _kib(field: str) -> int:
    (line,) = (row for row in Path("/proc/self/status").read_text("utf-8").splitlines() if row.startswith(field))
    return int(line.split()[1])


def measure(way: str, sparsity: float) -> dict[str, Any]:
    """Seconds and extra bytes of one call in this process."""
    torch.set_num_threads(1)
    # Imports and first calls are not what is measured.
    few = network(1, 1)
    WAYS[way](few, 1000)
    del few
    model = network(LAYERS)
    total = sum(linear.weight.numel() for linear in model.values())
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is counted from here
    before, began = _kib("VmRSS"), time.process_time()
    pruned = WAYS[way](model, round(sparsity * total))
    seconds = time.process_time() - began
    return {
        "seconds": seconds,
        "bytes": 1024 * (_kib("VmHWM") - before),
        "missed": pruned - round(sparsity * total),
        "weights": total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--processes", type=int, default=3, help="fresh processes a way")
    parser.add_argument("--way", choices=WAYS, help="measure this one here and print it as JSON")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.sparsity)))
        return
    command = [sys.executable, __file__, "--sparsity", str(given.sparsity), "--way"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(given.processes):
        for way, rows in found.items():
            done = subprocess.run([*command, way], capture_output=True, text=True, check=True, env=environment)
            rows.append(json.loads(done.stdout))
    weights = found["ours"][0]["weights"]
    print(f"{weights:,} weights, {given.sparsity:.0%} pruned, median of {given.processes} processes")
    print(f"{'':20} {'seconds':>8} {'ratio':>7} {'extra MB':>9} {'ratio':>7} {'pruned too many':>16}")
    base = found["ours"]
    for way, rows in found.items():
        seconds, size = (median(row[key] for row in rows) for key in ("seconds", "bytes"))
        times = seconds / median(row["seconds"] for row in base)
        sizes = size / median(row["bytes"] for row in base)
        print(f"{way:20} {seconds:8.2f} {times:6.1f}x {size / 1e6:9.0f} {sizes:6.1f}x {rows[0]['missed']:16,}")


if __name__ == "__main__":
    main()
