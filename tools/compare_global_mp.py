"""Global MP on real images trained here: one-shot against gradual, against other allocations and scores, and floors.

    python tools/compare_global_mp.py --out runs/compare-global-mp

Every row is one training; it is noted in OUT/results.jsonl, and the same command goes on behind the last whole row.
Per seed one dense network is trained, and every one-shot row prunes and fine-tunes a copy of it: all rows of a sparsity
have the same number of epochs in all (gradual spends them from an untrained network), the same data, the same number of
weights pruned, and nothing was tuned for one of them. The seed decides weights, order, and which emoji are held out.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.images import DataSpec, Split, Splits, load
from compress.data.tasks import loss_sum
from compress.models.zoo import build
from compress.networks.train import TrainSpec as Spec
from compress.networks.train import apply_masks, evaluate, train
from compress.recipes.global_mp.floors import layer_floors, target_count
from compress.recipes.global_mp.magnitude import global_masks
from compress.recipes.global_mp.network import gradual, masks_of, prunable
from compress.run.folder import Journal
from compress.run.progress import say

SIZE = 24  # pixels
DENSE, AFTER = 16, 8  # epochs
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
OTHERS = (0.9, 0.95, 0.98)
RAMP = 0.6  # gradual: share of all steps by which the sparsity is reached
NETWORK: dict[str, Any] = {"depth": 8, "width": 12, "classes": 9}
SMALL: dict[str, Any] = {"width": 0.25, "stem": "cifar", "classes": 9, "dropout": 0.0}
# (sparsity, MT as a share of all prunable weights). The paper has 98 % and 0.02 %, of a network nine times as large.
COLLAPSE = ((0.9, 0.0005), (0.95, 0.0005), (0.98, 0.0002))

COMMON: dict[str, Any] = {"batch": 128, "nesterov": True, "weight_decay": 5e-4, "flip": True, "shift": 2}


def spec(epochs: int, lr: float) -> Spec:
    return Spec(epochs=epochs, lr=lr, warmup_epochs=1, **COMMON)


# --- other ways to spread the same number of weights ----------------------------------------------------------------


def rounded(wanted: Mapping[str, float], total: int) -> dict[str, int]:
    """Integers near ``wanted`` that sum to ``total``: the largest remainders are rounded up."""
    found = {name: int(value) for name, value in wanted.items()}
    by_rest = sorted(wanted, key=lambda name: (found[name] - wanted[name], name))
    for name in by_rest[: total - sum(found.values())]:
        found[name] += 1
    return found


def uniform(weights: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    """Every layer keeps the same share."""
    total = sum(w.numel() for w in weights.values())
    return rounded({name: keep * w.numel() / total for name, w in weights.items()}, keep)


def erk(weights: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    """Erdos-Renyi-Kernel (RigL, Evci et al. 2020): density goes with the sum over the product of the dimensions."""
    dense: set[str] = set()
    while True:
        left = keep - sum(weights[name].numel() for name in dense)
        # density * size = epsilon * sum of the dimensions
        sums = {name: sum(w.shape) for name, w in weights.items() if name not in dense}
        epsilon = left / sum(sums.values())
        full = {name for name, s in sums.items() if epsilon * s > weights[name].numel()}
        if not full:
            return {name: weights[name].numel() for name in dense} | rounded(
                {name: epsilon * s for name, s in sums.items()}, left
            )
        dense |= full


def layerwise(weights: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """The largest weights of every layer, so many of each."""
    return {name: global_masks({name: w}, w.numel() - kept[name])[name] for name, w in weights.items()}


def snip(model: nn.Module, data: Splits, prune: int, samples: int = 1024) -> dict[str, Tensor]:
    """The scores of SNIP (Lee et al. 2019), |w dL/dw| on training samples, under one threshold for the network."""
    model.zero_grad()
    model.train()
    for at in torch.arange(min(samples, len(data.train))).split(128):
        targets = {name: t[at] for name, t in data.train.targets.items()}
        loss_sum(model, data.prepare(data.train.inputs[at]), targets, data.tasks).backward()
    parameters = dict(model.named_parameters())
    scores = {}
    for name, weight in prunable(model).items():
        gradient = parameters[name].grad
        assert gradient is not None  # every weight takes part
        scores[name] = weight * gradient / samples
    model.zero_grad()
    model.eval()
    return global_masks(scores, prune)


# --- rows -----------------------------------------------------------------------------------------------------------


def ramp(total: int, sparsity: float, per_epoch: int) -> dict[int, int]:
    """The cubic schedule (Zhu & Gupta 2017), once an epoch: step -> weights gone."""
    steps = {}
    for epoch in range(1, DENSE + AFTER):
        done = min(1.0, epoch / (RAMP * (DENSE + AFTER)))
        cubic = int(sparsity * (1 - (1 - done) ** 3) * total)
        steps[epoch * per_epoch] = target_count(sparsity, total) if done == 1 else cubic
        if done == 1:
            break
    return steps


def held_out(data: Splits) -> Split:
    """Both parts that nothing was trained on: no method here looks at the calibration part."""
    parts = (data.calibration, data.test)
    inputs = torch.cat([p.inputs for p in parts])  # type: ignore[misc]
    return Split(inputs, {n: torch.cat([p.targets[n] for p in parts]) for n in data.test.targets})


def facts(model: nn.Module, data: Splits, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    from compress.networks.flops import count_flops

    layers = count_flops(model, torch.zeros(1, *data.input_shape), masks)
    found = evaluate(model, data, held_out(data))["category"]
    weights = prunable(model)
    kept = {name: int(torch.count_nonzero(w)) for name, w in weights.items()}
    assert all(not torch.count_nonzero(weights[n][~m]) for n, m in masks.items())
    return {
        "accuracy": found["accuracy"],
        "loss": found["loss"],
        "images": found["samples"],
        "weights": sum(w.numel() for w in weights.values()),
        "nonzero": sum(int(m.sum()) for m in masks.values()) if masks else sum(kept.values()),
        "flops": sum(layer.sparse for layer in layers) / sum(layer.dense for layer in layers),
        "smallest": min(kept.values()),
        "dead": [name for name, count in kept.items() if not count],
    }


class Table:
    """The rows there are, and the trainings that make the others."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.journal = out, Journal(out / "results.jsonl")

    def row(self, make: Callable[[], dict[str, Any]], **key: Any) -> None:
        if any(all(row.get(k) == v for k, v in key.items()) for row in self.journal.rows()):
            return
        began = time.monotonic()
        made = make()
        self.journal.append({**key, **made, "seconds": round(time.monotonic() - began, 1)})
        say(f"{key} -> accuracy {made['accuracy']:.4f}")

    def dense(
        self, name: str, network: str, arguments: dict[str, Any], data: Splits, epochs: int, seed: int
    ) -> nn.Module:
        """The dense network that all one-shot rows of a seed share; kept beside the results."""
        from safetensors.torch import load_model, save_model

        model = build(network, arguments, seed)
        path = self.out / f"{name}-{seed}.safetensors"
        if not path.exists():
            train(model, data, spec(epochs, 0.1), seed=seed, label=f"dense, seed {seed}")
            save_model(model, str(path))
        load_model(model, path)
        return model.eval()


def one_shot(
    dense: nn.Module, data: Splits, masks: Mapping[str, Tensor], seed: int, epochs: int = AFTER
) -> dict[str, Any]:
    model = copy.deepcopy(dense)
    before = copy.deepcopy(dense)
    apply_masks(before, masks)
    untrained = evaluate(before, data, held_out(data))["category"]["accuracy"]
    held, _ = train(model, data, spec(epochs, 0.04), seed=seed + 100, masks=masks, label="fine-tuning")
    return {**facts(model, data, held), "before_training": untrained}


def run(table: Table, seeds: range) -> None:
    """All rows on the small residual network."""
    for seed in seeds:
        data = load(DataSpec(package="emoji", size=SIZE, seed=seed))
        dense = table.dense("dense", "resnet", NETWORK, data, DENSE, seed)
        weights = prunable(dense)
        total = sum(w.numel() for w in weights.values())

        def whole(data: Splits = data, seed: int = seed) -> dict[str, Any]:
            model = build("resnet", NETWORK, seed)
            train(model, data, spec(DENSE + AFTER, 0.1), seed=seed, label="dense")
            return facts(model, data, {})

        def grown(sparsity: float, data: Splits = data, seed: int = seed, total: int = total) -> dict[str, Any]:
            model = build("resnet", NETWORK, seed)
            growing = gradual(ramp(total, sparsity, -(-len(data.train) // COMMON["batch"])), {})
            masks, _ = train(model, data, spec(DENSE + AFTER, 0.1), seed=seed, remask=growing, label="gradual")
            return facts(model, data, masks)

        table.row(lambda dense=dense, data=data: facts(dense, data, {}), seed=seed, method="dense, not fine-tuned")  # type: ignore[misc]
        table.row(whole, seed=seed, method="dense")
        for sparsity in SPARSITIES:
            prune = target_count(sparsity, total)
            table.row(
                lambda: one_shot(dense, data, masks_of(dense, prune, {}), seed),  # noqa: B023 (called at once)
                seed=seed,
                method="Global MP one-shot",
                sparsity=sparsity,
            )
            table.row(lambda: grown(sparsity), seed=seed, method="Global MP gradual", sparsity=sparsity)  # noqa: B023
        for sparsity in OTHERS:
            keep = total - target_count(sparsity, total)
            rivals: dict[str, Callable[[], dict[str, Tensor]]] = {
                "uniform": lambda: layerwise(weights, uniform(weights, keep)),  # noqa: B023
                "ERK": lambda: layerwise(weights, erk(weights, keep)),  # noqa: B023
                "SNIP scores": lambda: snip(dense, data, total - keep),  # noqa: B023
            }
            for method, masks in rivals.items():
                table.row(
                    lambda: one_shot(dense, data, masks(), seed),  # noqa: B023
                    seed=seed,
                    method=method,
                    sparsity=sparsity,
                )


def collapse(table: Table, seeds: range) -> None:
    """MobileNet-V2 where one threshold leaves layers empty, with and without the floor."""
    for seed in seeds:
        _collapse(table, load(DataSpec(package="emoji", size=SIZE, seed=seed)), seed)


def _collapse(table: Table, data: Splits, seed: int) -> None:
    dense = table.dense("mobilenet", "mobilenet-v2", SMALL, data, 12, seed)
    weights = prunable(dense)
    sizes = {name: w.numel() for name, w in weights.items()}
    table.row(lambda: facts(dense, data, {}), seed=seed, method="MobileNet-V2 dense, not fine-tuned")
    for sparsity, floor in COLLAPSE:
        prune = target_count(sparsity, sum(sizes.values()))
        for method, share in (("MobileNet-V2", 0.0), (f"MobileNet-V2, floor {100 * floor:g} %", floor)):
            floors = layer_floors(sizes, share)
            table.row(
                lambda: one_shot(dense, data, masks_of(dense, prune, floors), seed, 6),  # noqa: B023
                seed=seed,
                method=method,
                sparsity=sparsity,
            )


def markdown(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of every row; in brackets the FLOPs that are left."""
    columns = sorted({r["sparsity"] for r in rows if "sparsity" in r})
    lines = [
        "| method | dense | " + " | ".join(f"{100 * c:g} %" for c in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]

    def cell(found: list[dict[str, Any]]) -> str:
        if not found:
            return ""
        values = [100 * r["accuracy"] for r in found]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        dead = mean(len(r["dead"]) for r in found)
        notes = [f"FLOPs {100 * mean(r['flops'] for r in found):.1f} %"] if "sparsity" in found[0] else []
        notes += [f"{dead:.1f} layers empty"] if dead else []
        seeds = f", {len(values)} seed{'s' if len(values) > 1 else ''}"
        return f"{mean(values):.1f}{spread} ({', '.join(notes)}{seeds})" if notes else f"{mean(values):.1f}{spread}"

    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        cells = [cell([r for r in own if r.get("sparsity") == c]) for c in (None, *columns)]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=("resnet", "mobilenet"), help="one of the two networks")
    parser.add_argument("--table", action="store_true", help="only prints the rows that are there")
    chosen = parser.parse_args()
    table = Table(chosen.out)
    if not chosen.table:
        seeds = range(chosen.first_seed, chosen.seeds)
        if chosen.only != "mobilenet":
            run(table, seeds)
        if chosen.only != "resnet":
            collapse(table, seeds)
    print(markdown(table.journal.rows()))


if __name__ == "__main__":
    main()
