"""PAGCP against three other ways to choose channels, on real images with three tasks, all trained alike.

    python tools/compare_pagcp.py --out runs/compare-pagcp --seeds 0 1 2

Every row is one pruned and fine-tuned network; it is noted in OUT/results.jsonl, and the same command goes on behind
the last whole row. Per seed one dense network is trained (kept in OUT), and every row cuts a copy of it at the same
channel groups, in the same steps of 8 channels, until at least the target's share of FLOPs is gone, and then trains it
for the same epochs at the same rate. Decisions see the calibration split alone; what is told was measured on the test
split. The seed decides weights, order, backgrounds, and which emoji are held out.

    uniform L1               every group keeps the same share of its channels, those with the largest mean |W|
    global L1                the smallest of all channels of all groups go, whatever the tasks say
    torch-pruning            its MagnitudePruner with GroupMagnitudeImportance, global, round_to 8
    PAGCP, l1                the oracle of `compress`, the paper's saliency
    PAGCP                    the same with the default saliency
    PAGCP, 2 rounds          cut and trained in two halves of the same epochs
    PAGCP, tight mask        the mask's loss may double where the classes' may grow six times: chosen on seed 7, where
                             training brought the classes back after any cut, and the mask not
    PAGCP, trials            contenders beside the greedy plan, and the one taken that a short training favours; the
                             epochs of the trials come on top of the 10
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from compress.data.images import DataSpec, Splits, load
from compress.models.zoo import build
from compress.networks.flops import count_flops
from compress.networks.train import TrainSpec as Spec
from compress.networks.train import evaluate, train
from compress.recipes.pagcp.greedy import Pruner, State
from compress.recipes.pagcp.groups import Group, find_groups
from compress.recipes.pagcp.norms import Settle
from compress.recipes.pagcp.options import PAGCPOptions, TrialOptions
from compress.recipes.pagcp.oracle import Oracle, calibration, tolerances
from compress.recipes.pagcp.saliency import rankings, weight_scores
from compress.recipes.pagcp.trials import Trials, choose
from compress.run.folder import Journal
from compress.run.progress import say
from compress.system.files import whole_file

NETWORK = "multitask-resnet"
ARGUMENTS: dict[str, Any] = {
    "widths": [24, 32, 64, 128],
    "blocks": [1, 1, 1, 1],
    "decoder": 32,
    "hidden": 64,
    "pixels": {"matte": 1},
    "labels": {"category": 9, "vendor": 2},
}
TASKS = ["category", "vendor", "matte"]
SIZE, STEP = 32, 8
TARGETS = (0.5, 0.6)
DENSE, AFTER = 24, 10  # epochs
COMMON: dict[str, Any] = {"batch": 64, "nesterov": True, "weight_decay": 5e-4, "shift": 3}
DEFAULT = "PAGCP"
METHODS = (
    "uniform L1", "global L1", "torch-pruning", "PAGCP, l1", DEFAULT, "PAGCP, 2 rounds", "PAGCP, tight mask",
    "PAGCP, tight mask, 2 rounds", "PAGCP, trials",
)  # fmt: skip
TIGHT: dict[str, Any] = {"tolerance": {"relative": 5.0}, "tolerances": {"matte": {"relative": 1.0}}}


def spec(epochs: int, lr: float) -> Spec:
    return Spec(epochs=epochs, lr=lr, warmup_epochs=min(1.0, epochs / 4), **COMMON)


def total_flops(model: nn.Module, data: Splits) -> int:
    return sum(layer.dense for layer in count_flops(model, torch.zeros(1, *data.input_shape)))


# --- the rivals -------------------------------------------------------------------------------------------------------


def first_enough(states: Iterator[State], pruner: Pruner, target: float) -> State:
    """The first of ever narrower states that removes the target."""
    for state in states:
        if pruner.removal(state) >= target:
            return state
    raise SystemExit(f"{target:g} of the FLOPs cannot go in steps of {STEP}")


def uniform(pruner: Pruner) -> Iterator[State]:
    """Every group at one share of its channels: the widest by share loses a step, the dearest of equals first."""
    state = dict(pruner.full)
    saves = {name: pruner.flops(state) - pruner.flops(state | {name: pruner.levels(name)[-1]}) for name in state}
    while True:
        yield dict(state)
        left = [n for n in state if state[n] > pruner.levels(n)[-1]]
        if not left:
            return
        name = max(left, key=lambda n: (state[n] / pruner.full[n], saves[n]))
        levels = pruner.levels(name)
        state[name] = levels[levels.index(state[name]) + 1]


def global_l1(pruner: Pruner) -> Iterator[State]:
    """A threshold over all channels' scores rises; a group keeps the multiple of 8 above what is over it."""
    scores = {name: weight_scores(pruner.model, g, 1) for name, g in pruner.groups.items()}
    for threshold in sorted(torch.cat(list(scores.values())).tolist()):
        state = {}
        for name in pruner.groups:
            over = int((scores[name] > threshold).sum())
            state[name] = min(n for n in pruner.levels(name) if n >= over or n == pruner.levels(name)[0])
        yield state


def torch_pruning(model: nn.Module, data: Splits, target: float) -> nn.Module:
    """torch-pruning's own pruner, step by step until the target is reached."""
    import torch_pruning as tp

    model = copy.deepcopy(model).eval()
    heads = [m for n, m in model.named_modules() if n.endswith(".out")]
    pruner = tp.pruner.MagnitudePruner(
        model,
        torch.zeros(2, *data.input_shape),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.9,
        iterative_steps=400,
        round_to=STEP,
        ignored_layers=heads,
        output_transform=lambda out: list(out.values()),
    )
    dense = total_flops(model, data)
    for _ in range(400):
        pruner.step()
        if 1 - total_flops(model, data) / dense >= target:
            return model
    raise SystemExit(f"torch-pruning does not remove {target:g} of the FLOPs")


# --- rows -------------------------------------------------------------------------------------------------------------


def prepared(
    model: nn.Module, data: Splits, saliency: str, dense: nn.Module, journal: Journal, options: PAGCPOptions
) -> Pruner:
    x = data.prepare(data.calibration.inputs[:2])
    groups: Sequence[Group] = find_groups(model, x, STEP).groups
    split = calibration(data, options.samples)
    order = rankings(model, groups, data, split, saliency)
    oracle = Oracle(data, split, tolerances(options, TASKS), options.batch, journal, "compare")
    oracle.base = oracle.measure("dense", dense, 1.0).values
    settle = Settle(data, options.settle)
    return Pruner(model, groups, order, oracle, options, x, total_flops(dense, data), "the oracle", settle)


def ours(
    dense: nn.Module,
    data: Splits,
    target: float,
    seed: int,
    saliency: str,
    rounds: int,
    place: Path,
    more: Mapping[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """Cut and trained in ``rounds`` parts of the epochs; every decision is noted in ``place``."""
    model, passes, reference = copy.deepcopy(dense), 0.0, 0
    held: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"round-{number}.jsonl"
        path.unlink(missing_ok=True)
        options = PAGCPOptions(flops=target, round_to=STEP, **more)
        pruner = prepared(model, data, saliency, dense, Journal(path), options)
        share = 1 - (1 - target) ** (number / rounds)
        decision = pruner.decide(share)
        after = spec(AFTER // rounds, 0.02)
        if options.trials is not None:
            own = place / f"trials-{number}.jsonl"
            own.unlink(missing_ok=True)
            base, split = pruner.oracle.base or {}, pruner.oracle.split
            of = Trials(
                pruner, data, split, options.batch, after, seed + 100 * number, base, Journal(own), "compare", place
            )
            decision, facts = choose(of, decision, share)
            passes += facts["passes"]
            held.append(facts | {"kept": decision.state})
        passes += pruner.oracle.passes
        reference += 19 * len(pruner.groups)
        model = pruner.cut(decision.state)
        if number == rounds:
            before = evaluate(model, data, data.test)
        train(model, data, after, seed=seed + 100 * number, label=f"fine-tuning {number}")
    return model, {"passes": passes, "reference": reference, "cut": before, **({"trials": held} if held else {})}


def row(method: str, dense: nn.Module, data: Splits, target: float, seed: int, out: Path) -> dict[str, Any]:
    began = time.monotonic()
    place = out / f"{seed}-{method.replace(', ', '-').replace(' ', '-')}-{target:g}"
    extra: dict[str, Any] = {}
    if method.startswith("PAGCP"):
        saliency = "l1" if method.endswith("l1") else PAGCPOptions().saliency
        rounds, more = 2 if "rounds" in method else 1, TIGHT if "tight" in method else {}
        more = more | ({"trials": TrialOptions()} if method.endswith("trials") else {})
        model, extra = ours(dense, data, target, seed, saliency, rounds, place, more)
    else:
        place.mkdir(parents=True, exist_ok=True)
        if method == "torch-pruning":
            model = torch_pruning(dense, data, target)
        else:
            options = PAGCPOptions(flops=target, round_to=STEP)
            x = data.prepare(data.calibration.inputs[:2])
            groups = find_groups(dense, x, STEP).groups
            order = rankings(dense, groups, data, data.calibration, "l1")
            oracle = Oracle(data, data.calibration, tolerances(options, TASKS), 128, Journal(place / "none.jsonl"), "")
            pruner = Pruner(dense, groups, order, oracle, options, x, total_flops(dense, data))
            states = uniform(pruner) if method == "uniform L1" else global_l1(pruner)
            # A copy: what a state leaves whole is the dense network's own.
            model = copy.deepcopy(pruner.cut(first_enough(states, pruner, target)))
        extra["cut"] = evaluate(model, data, data.test)
        train(model, data, spec(AFTER, 0.02), seed=seed + 100, label="fine-tuning")
    from safetensors.torch import save_file

    with whole_file(place / "model.safetensors") as partial:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial)
    return {
        "removed": 1 - total_flops(model, data) / total_flops(dense, data),
        "parameters": sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters()),
        "after": evaluate(model, data, data.test),
        "calibration": evaluate(model, data, data.calibration),
        **extra,
        "seconds": round(time.monotonic() - began, 1),
        **({"speed": speed(dense, model, data, place)} if method == DEFAULT and target == max(TARGETS) else {}),
    }


def speed(dense: nn.Module, model: nn.Module, data: Splits, place: Path) -> dict[str, Any]:
    """Latency of both in ONNX Runtime, one sample and sixteen, in fresh processes that take turns."""
    from compress.exporters.bench.local import compare_modules
    from compress.exporters.onnx_module import write_checked_module

    x = data.prepare(data.test.inputs[:4])
    for label, network in (("onnx-dense", dense), ("onnx-pruned", model)):
        (place / label).mkdir(exist_ok=True)
        write_checked_module(network.eval(), x, TASKS, place / label, 1e-3)
    found = {}
    for batch in (1, 16):
        spec = {"batch": batch, "processes": 5, "threads": 1, "min_seconds": 1.0, "min_runs": 5}
        facts = compare_modules(place / "onnx-dense", place / "onnx-pruned", spec)
        found[str(batch)] = facts["ratios"]["latency"] | {k: facts[k]["latency"]["median"] for k in ("dense", "pruned")}
    return found


def dense_network(data: Splits, seed: int, out: Path) -> nn.Module:
    """The dense network that all rows of a seed share."""
    from safetensors.torch import load_file, save_file

    model = build(NETWORK, ARGUMENTS, seed)
    path = out / f"dense-{seed}.safetensors"
    if not path.exists():
        train(model, data, spec(DENSE, 0.1), seed=seed, label=f"dense, seed {seed}")
        with whole_file(path) as partial:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial)
    model.load_state_dict(load_file(path))
    return model.eval()


# --- the table --------------------------------------------------------------------------------------------------------


def drops(found: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, float]:
    """Points that every task lost, of its own metric."""
    names = {"category": "accuracy", "vendor": "accuracy", "matte": "iou"}
    return {t: 100 * (dense["after"][t][m] - found["after"][t][m]) for t, m in names.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of every method; drops in points, fewer is better."""
    dense = {r["seed"]: r for r in rows if r["method"] == "dense"}
    lines = []
    for target in TARGETS:
        lines += [
            f"At least {100 * target:g} % of the FLOPs removed:",
            "",
            "| method | FLOPs gone | " + " | ".join(TASKS) + " | mean of tasks | worst task | seeds |",
            "|---|---|" + "---|" * (len(TASKS) + 3),
        ]
        for method in METHODS:
            own = [r for r in rows if r["method"] == method and r["target"] == target]
            if not own:
                continue
            lost = [drops(r, dense[r["seed"]]) for r in own]
            cells = [[d[t] for d in lost] for t in TASKS] + [[f(d.values()) for d in lost] for f in (mean, max)]
            gone = 100 * mean(r["removed"] for r in own)
            lines.append(f"| {method} | {gone:.1f} % | " + " | ".join(map(_cell, cells)) + f" | {len(own)} |")
        lines.append("")
    speeds = [r["speed"] for r in rows if "speed" in r]
    for batch in ("1", "16"):
        if speeds:
            of = [s[batch] for s in speeds]
            said = ", ".join(f"{s['median']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in of)
            lines.append(f"ONNX Runtime, batch {batch}, {100 * max(TARGETS):g} %: {said} times as fast")
    counted = [r for r in rows if r["method"] == DEFAULT]
    if counted:
        lines.append(
            f"oracle: {mean(r['passes'] for r in counted):.0f} passes over the calibration split; 19 ratios of every"
            f" group take {mean(r['reference'] for r in counted):.0f}"
        )
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS))
    parser.add_argument("--table", action="store_true", help="only prints the rows that are there")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(chosen.out / "results.jsonl")

    def once(make: Callable[[], dict[str, Any]], **key: Any) -> None:
        if not any(all(r.get(k) == v for k, v in key.items()) for r in journal.rows()):
            found = make()
            journal.append({**key, **found})
            said = {t: round(100 * f.get("accuracy", f.get("iou", 0)), 1) for t, f in found["after"].items()}
            say(f"{json.dumps(key)}: {said}")

    if not chosen.table:
        for seed in chosen.seeds:
            data = load(DataSpec(package="emoji", size=SIZE, seed=seed, tasks=TASKS))
            dense = dense_network(data, seed, chosen.out)
            once(lambda: {"after": evaluate(dense, data, data.test)}, seed=seed, method="dense")  # noqa: B023
            for target in chosen.targets:
                for method in chosen.methods:
                    once(
                        lambda: row(method, dense, data, target, seed, chosen.out),  # noqa: B023 (called at once)
                        seed=seed,
                        method=method,
                        target=target,
                    )
    print(markdown(journal.rows()))


if __name__ == "__main__":
    main()
