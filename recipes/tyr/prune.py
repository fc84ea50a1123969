"""Týr from calibration windows to a plan: supernet, search, again with finer levels, then one exact pass.

The search decides only *how much* every sublayer gives up. The last pass walks the model once more with exactly that
choice, so that every projection is refitted to the stream it will really see.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.activations import Room, is_whole
from compress.budget import Option, knapsack, nearest_feasible, target_removed
from compress.distributed import device_bytes, is_main, main_says, meet
from compress.models.blocks import BlockRunner
from compress.models.streaming import in_step, is_streamed, only_blocks
from compress.plan import BlockPlan, Plan
from compress.progress import Progress, say
from compress.recipes.tyr.choice import Choice, Job, block_menus, check_budget, saving, settle
from compress.recipes.tyr.rescale import SCALES, fit_scale, kl_at
from compress.recipes.tyr.search import Evaluator, Genome, evolve, measure_singles, menus, starts
from compress.recipes.tyr.sensitivity import output_metrics
from compress.recipes.tyr.supernet import (
    Accumulation,
    Menu,
    Streams,
    Supernet,
    prune_block,
    runner_tokens,
    write_block,
)
from compress.run import Run, fingerprint, seal_hash

# Tokens x layers of the paper's search: 4 iterations of 50 generations, each 128 offspring on 2,048 tokens, 16 on
# 16,384, and 4 with the parent on 131,072 (arXiv 2503.09657, section 3.3 and appendix).
REFERENCE_TOKENS = 4 * 50 * (128 * 2048 + 16 * 16384 + 5 * 131072)


def produce_plan(run: Run, job: Job) -> Path:
    """Runs all stages of the method; each is sealed, and a run started again goes on where it stopped.

    Returns:
        The sealed folder holding plan.json, plan.safetensors and search.json.
    """
    check_budget(job)
    metrics = _metrics(run, job)
    choices: list[Choice] | None = None
    results: list[dict[str, Any]] = []
    for iteration in range(1, job.options.iterations + 1):
        files = _supernet(run, job, iteration, choices, metrics)
        singles = _singles(run, job, iteration, files, choices)
        folder = _search(run, job, iteration, files, singles, choices)
        result = json.loads((folder / "search.json").read_text())
        results.append(result)
        choices = [Choice(**c) for c in result["choices"]]
    assert choices is not None  # iterations >= 1
    options = json.loads((singles / "singles.json").read_text())["options"]
    if job.options.run_off is None:
        return final_pass(run, job, settle(job, choices, options), results, metrics)
    winner, name, kls = run_off(run, job, _contenders(job, results[-1], options), metrics)
    return final_pass(run, job, winner, results, metrics, name, kls)


@dataclass(frozen=True)
class Metrics:
    """The sealed output metrics of all sublayers; a block's are read when they are asked for. None: no metric."""

    folders: list[Path] | None

    def of(self, block: int) -> tuple[Tensor | None, Tensor | None]:
        """(attention's, FFN's), each (hidden, hidden) float32 or None."""
        if self.folders is None:
            return None, None
        with safe_open(self.folders[block] / "metrics.safetensors", "pt") as file:
            return file.get_tensor("attention"), file.get_tensor("ffn")

    def hash(self) -> str | None:
        return None if self.folders is None else fingerprint({str(i): seal_hash(f) for i, f in enumerate(self.folders)})


def _metrics(run: Run, job: Job) -> Metrics:
    options = job.options
    if options.metric == "none":
        return Metrics(None)
    windows = job.calibration[: options.metric_windows]
    inputs = {**job.inputs, "windows": len(windows), "seed": job.seed}
    layers = job.geometry.layers

    def write(block: int, found: dict[str, Tensor], began: float) -> None:
        run.stage(
            f"metrics/block-{block:03d}",
            {**inputs, "block": block},
            lambda folder: save_file(found, folder / "metrics.safetensors"),
            began,
        )

    # The backward pass goes from the last block to the first.
    left = layers
    while left and run.is_sealed(f"metrics/block-{left - 1:03d}"):
        run.stage(f"metrics/block-{left - 1:03d}", {**inputs, "block": left - 1}, _never)
        left -= 1
    if left:
        runner = BlockRunner(job.model, job.family, windows.shape[1])
        with in_step(job.model):
            output_metrics(runner, windows, job.seed, run.scratch("metrics"), left, write)
    run.drop_scratch("metrics")
    return Metrics([run.folder / f"metrics/block-{i:03d}" for i in range(layers)])


def _supernet(
    run: Run, job: Job, iteration: int, choices: list[Choice] | None, metrics: Metrics
) -> list[Path]:
    """Builds the supernet block by block; every block is a sealed stage, the streams behind it are kept beside."""
    options = job.options
    block_menu = block_menus(job, iteration, choices)
    # The first candidates are measured one at a time in the dense model, so that is what they are fitted to. Weights
    # that make up for pruning in front of them would be out of place there.
    accumulation: Accumulation = "none" if choices is None else options.accumulation
    calibration = job.calibration[: options.supernet_windows]
    inputs = {
        **job.inputs,
        "method": {**options.model_dump(mode="json", include=LOCAL_OPTIONS), "accumulation": accumulation},
        "levels": [[menu.neurons, menu.heads] for menu in block_menu],
        **({} if choices is None else {"dense_expected": [menu.dense_expected for menu in block_menu]}),
        "windows": len(calibration),
        "metrics": metrics.hash(),
    }
    name = f"supernet-{iteration}"

    def write(index: int, attention: Any, ffn: Any, began: float) -> Path:
        return run.stage(
            f"{name}/block-{index:03d}",
            {**inputs, "block": index},
            lambda folder: write_block(folder / "levels.safetensors", attention, ffn, torch.bfloat16),
            began,
        )

    return [
        folder / "levels.safetensors"
        for folder in _walk(run, job, name, inputs, calibration, block_menu, accumulation, metrics, write)
    ]


CHEAP = 0.05  # seconds: what takes no longer is kept behind every block; else a stop costs what keeping would have
# The options that decide what a candidate is, beside the levels themselves.
LOCAL_OPTIONS = {"score", "target", "damping", "accumulation", "round_to", "token_weight", "metric"}


def _walk(
    run: Run,
    job: Job,
    name: str,
    inputs: Mapping[str, Any],
    calibration: Tensor,
    block_menu: list[Menu],
    accumulation: Accumulation,
    metrics: Metrics,
    write: Any,
) -> list[Path]:
    """Walks the blocks with both streams, resuming behind the last block whose stage and streams are on disk."""
    layers = job.geometry.layers
    scratch = run.scratch(name)
    sealed = 0
    while sealed < layers and run.is_sealed(f"{name}/block-{sealed:03d}"):
        # Raises where the sealed block was made from other inputs.
        run.stage(f"{name}/block-{sealed:03d}", {**inputs, "block": sealed}, _never)
        sealed += 1
    folders = [run.folder / name / f"block-{i:03d}" for i in range(sealed)]
    if sealed == layers:
        run.drop_scratch(name)
        return folders
    runner = BlockRunner(job.model, job.family, calibration.shape[1])
    room = _room(run, job, name, runner, 2 * calibration.numel())

    def last_kept() -> int:
        every = [int(p.name.removeprefix("before-")) for p in scratch.glob("before-*") if is_whole(p, len(calibration))]
        return max((k for k in every if k <= sealed), default=0)

    start = main_says(last_kept)
    if start:
        streams = Streams.load(scratch / f"before-{start:03d}", calibration, room, runner_tokens(runner))
    else:
        streams = Streams.start(runner, calibration, accumulation, room)
    spent = cost = 0.0  # since the streams were last kept, and what keeping them took
    bar = Progress(layers, f"{name}: blocks", start=start)
    with only_blocks(job.model, runner.device), in_step(job.model), bar:
        for index in range(start, layers):
            began = time.monotonic()
            attention, ffn = prune_block(
                runner,
                index,
                streams,
                block_menu[index],
                geometry=job.geometry,
                costs=job.costs,
                damping=job.options.damping,
                target=job.options.target,
                accumulation=accumulation,
                score=job.options.score,
                step=job.options.round_to,
                trim=job.options.query_heads,
                token_weight=job.options.token_weight,
                metrics=metrics.of(index),
            )
            spent += time.monotonic() - began
            keeps = index + 1 < layers and main_says(lambda due=spent >= cost or cost < CHEAP: bool(due))  # type: ignore[misc]
            if keeps:
                began_keeping = time.monotonic()
                streams.save(scratch / f"before-{index + 1:03d}")
                spent, cost = 0.0, time.monotonic() - began_keeping
            meet(f"{name}, behind block {index}")
            if index >= sealed:
                folders.append(write(index, attention, ffn, began))
            if keeps and is_main():
                for older in scratch.glob("before-*"):
                    if older.name < f"before-{index + 1:03d}":
                        shutil.rmtree(older, ignore_errors=True)
            bar.update(1)
    run.drop_scratch(name)
    return folders


def _room(run: Run, job: Job, name: str, runner: BlockRunner, tokens: int) -> Room:
    """Where the activations of so many tokens lie: in files where the recipe says so; on the device where they take a
    quarter of what is free there at most, and no block must be read to be run; else in memory."""
    if job.offload:
        return Room(run.scratch(name) / "activations")
    near = not is_streamed(job.model) and 4 * tokens * job.geometry.hidden <= device_bytes() // 4
    return Room(None, runner.device if near else None)


def _never(_: Path) -> None:
    raise AssertionError("a sealed stage was built again")


def _evaluator(
    run: Run, job: Job, files: list[Path], name: str, windows: Tensor, inputs: Mapping[str, Any]
) -> Evaluator:
    """An evaluator whose journal belongs to these inputs alone: another recipe's evaluations are not taken for ours."""
    options = job.options.search
    runner = BlockRunner(job.model, job.family, windows.shape[1])
    return Evaluator(
        runner,
        Supernet(files, job.geometry),
        windows,
        positions=min(options.positions, windows.shape[1] - 1),
        top_k=options.teacher_top_k,
        seed=job.seed,
        log=run.journal(name, f"log-{fingerprint(inputs)[:16]}.jsonl"),
        tag=name,
        room=_room(run, job, name, runner, windows.numel() * (job.geometry.layers + 2)),
    )


def _singles(run: Run, job: Job, iteration: int, files: list[Path], choices: list[Choice] | None) -> Path:
    """What every candidate does alone: to the dense model first, to the best solution so far in later iterations."""
    options = job.options.search
    name = f"singles-{iteration}"
    inputs = {
        **job.inputs,
        "search": options.model_dump(mode="json", include={"positions", "teacher_top_k", "singles_windows", "length"}),
        "supernet": [run.seal_hash(path.parent) for path in files],
        "around": None if choices is None else [list(vars(c).values()) for c in choices],
        "seed": job.seed,
    }

    @in_step(job.model)
    def build(folder: Path | None) -> None:
        # Evenly spread over the windows, so that every source of text is among them.
        n = min(options.singles_windows, len(job.search))
        windows = job.search[torch.linspace(0, len(job.search) - 1, n).long()]
        evaluator = _evaluator(run, job, files, name, windows, inputs)
        supernet = evaluator.supernet
        base = evaluator.dense if choices is None else _genome_of(supernet, job, choices)
        with Progress(sum(len(m) - 1 for m in menus(supernet)), f"{name}: single candidates") as bar:
            priced = measure_singles(evaluator, base, lambda done: bar.to(done))
        described = [
            [{**vars(option), "choice": _describe(supernet, job, i, e)} for e, option in enumerate(menu)]
            for i, menu in enumerate(priced)
        ]
        facts = {"options": described, "base": list(base), "work": evaluator.work, "candidates": sum(map(len, priced))}
        if folder is not None:
            (folder / "singles.json").write_text(json.dumps(facts))

    folder = run.stage_together(name, inputs, build)
    run.drop_scratch(name)
    return folder


def _search(
    run: Run, job: Job, iteration: int, files: list[Path], singles: Path, choices: list[Choice] | None
) -> Path:
    """Starts from knapsack solutions, keeps the best by joint KL, and lets it evolve; resumable from its journal."""
    options = job.options.search
    name = f"search-{iteration}"
    inputs = {
        **job.inputs,
        "iteration": iteration,
        "search": options.model_dump(mode="json"),
        "singles": run.seal_hash(singles),
        "supernet": [run.seal_hash(path.parent) for path in files],
        "sparsity": job.sparsity,
        "seed": job.seed,
    }

    @in_step(job.model)
    def build(folder: Path | None) -> None:
        evaluator = _evaluator(run, job, files, name, job.search, inputs)
        supernet = evaluator.supernet
        facts = json.loads((singles / "singles.json").read_text())
        priced = _priced(facts)
        total = nearest_feasible(priced, target_removed(job.sparsity, job.costs.backbone))
        base = None if choices is None else tuple(facts["base"])
        started = starts(priced, total, base)
        with Progress(len(started), f"{name}: starting points") as bar:
            notes = [{"phase": f"start: {label}"} for label in started]
            rated = dict(zip(started, evaluator.kls(list(started.values()), notes=notes), strict=True))
            bar.to(len(started), note=f"knapsack {rated['knapsack']:.4f}")
        best = min(rated, key=lambda label: (rated[label], label))
        with Progress(options.generations, f"{name}: generations") as bar:
            found = evolve(
                evaluator,
                priced,
                started[best],
                options,
                seed=job.seed + iteration,
                progress=lambda generation, kl: bar.to(generation, note=f"KL {kl:.4f}"),
            )
        result = {
            "iteration": iteration,
            "genome": list(found.genome),
            "removed": total,
            "starts": rated,
            "kl_knapsack": rated["knapsack"],
            "predicted_knapsack": sum(priced[i][g].loss for i, g in enumerate(started["knapsack"])),
            "kl_start": found.kl_start,
            "kl": found.kl,
            "generations": found.generations,
            "stopped": found.stopped,
            "candidates": facts["candidates"],
            "work_token_layers": evaluator.work + facts["work"],
            "supernet_bytes": supernet.bytes,
            "full_shape_bytes": full_shape_bytes(supernet, job),
            "choices": [vars(c) for c in _choices_of(supernet, job, found.genome)],
            "choices_starts": {
                label: [vars(c) for c in _choices_of(supernet, job, genome)] for label, genome in started.items()
            },
            "log": [
                {k: r[k] for k in ("phase", "generation", "kl") if k in r} | {"work": r["work"] + facts["work"]}
                for r in evaluator.log.rows()
                if r["phase"] != "select"
            ],
        }
        if folder is not None:
            (folder / "search.json").write_text(json.dumps(result, indent=1))

    folder = run.stage_together(name, inputs, build)
    run.drop_scratch(name)
    return folder


def curve(run: Run, job: Job, sparsities: Sequence[float]) -> Iterator[tuple[int, Plan]]:
    """(parameters removed, plan) at other sparsities, from what the first iteration left behind: its candidates as
    they are, chosen by the knapsack over their single losses. No search, no last pass: what those add shows beside it.

    Sparsities that the candidates cannot reach are left out.
    """
    files = sorted((run.folder / "supernet-1").glob("block-*/levels.safetensors"))
    supernet = Supernet(files, job.geometry)
    facts = json.loads((run.folder / "singles-1" / "singles.json").read_text())
    priced = _priced(facts)
    most = sum(max(o.saving for o in menu) for menu in priced)
    for sparsity in sparsities:
        target = target_removed(sparsity, job.costs.backbone)
        if target > most:
            continue
        total = nearest_feasible(priced, target)
        blocks: list[BlockPlan] = []
        weights: dict[str, Tensor | None] = {}
        genome = knapsack(priced, total)
        for i in range(job.geometry.layers):
            attention = supernet.level(i, "attention", genome[2 * i])
            ffn = supernet.level(i, "ffn", genome[2 * i + 1])
            blocks.append(BlockPlan(attention.units, ffn.units))
            weights |= {f"blocks.{i}.o": attention.weight, f"blocks.{i}.down": ffn.weight}
        yield total, Plan(tuple(blocks), {k: w for k, w in weights.items() if w is not None})


def _priced(facts: Mapping[str, Any]) -> list[list[Option]]:
    return [[Option(o["saving"], o["loss"]) for o in menu] for menu in facts["options"]]


def full_shape_bytes(supernet: Supernet, job: Job) -> int:
    """What the same levels take when every candidate is stored at full shape in the model's own type."""
    size = next(job.model.parameters()).element_size()
    geometry = job.geometry
    per = {"attention": geometry.heads * geometry.head_dim * geometry.hidden, "ffn": geometry.ffn * geometry.hidden}
    return sum(
        per[kind] * size for facts in supernet.facts for kind in per for level in facts[kind] if not level["dense"]
    )


def _describe(supernet: Supernet, job: Job, sublayer: int, e: int) -> list[int]:
    """Attention level -> [groups, per_group]; FFN level -> [neurons]."""
    block, ffn = divmod(sublayer, 2)
    if ffn:
        return [supernet.facts[block]["ffn"][e]["kept"]]
    heads = supernet.level(block, "attention", e).units
    groups = len({h // job.geometry.group for h in heads})
    return [groups, len(heads) // groups if groups else 0]


def _choices_of(supernet: Supernet, job: Job, genome: Genome) -> list[Choice]:
    found = []
    for block in range(job.geometry.layers):
        groups, per_group = _describe(supernet, job, 2 * block, genome[2 * block])
        (neurons,) = _describe(supernet, job, 2 * block + 1, genome[2 * block + 1])
        found.append(Choice(groups, per_group, neurons))
    return found


def _genome_of(supernet: Supernet, job: Job, choices: list[Choice]) -> Genome:
    """The level of each sublayer that comes nearest to ``choices`` in parameters kept."""
    genome = []
    for block, choice in enumerate(choices):
        attention = job.costs.attention_dense - job.costs.attention(choice.groups, choice.per_group)
        ffn = job.costs.ffn(job.geometry.ffn) - job.costs.ffn(choice.neurons)
        for kind, wanted in (("attention", attention), ("ffn", ffn)):
            facts = supernet.facts[block][kind]
            genome.append(min(range(len(facts)), key=lambda e: (abs(facts[e]["saving"] - wanted), e)))
    return tuple(genome)


def _contenders(job: Job, result: Mapping[str, Any], options: list[list[dict[str, Any]]]) -> dict[str, list[Choice]]:
    """What goes into the run-off: the search's solution, the plain knapsack's, the rule that leaves the edges alone,
    and the best other starting points; equal ones once."""
    assert job.options.run_off is not None  # asked by the caller
    starts = result["choices_starts"]
    known = [label for label in ("knapsack", "edges left alone") if label in starts]
    order = [*known, *sorted(set(starts) - set(known), key=lambda label: (result["starts"][label], label))]
    found: dict[str, list[Choice]] = {}
    for label, choices in [("search", result["choices"]), *((label, starts[label]) for label in order)]:
        settled = settle(job, [Choice(**c) for c in choices], options)
        if settled not in found.values() and len(found) < job.options.run_off.solutions:
            found[label] = settled
    return found


def run_off(
    run: Run, job: Job, contenders: Mapping[str, list[Choice]], metrics: Metrics
) -> tuple[list[Choice], str, dict[str, float]]:
    """Takes every solution through a last pass and judges it on windows that nothing has seen.

    Returns:
        The choices with the least KL, at the best scale of the logits where the recipe scales them; the name of the
        stages of a pass over all calibration windows with them: the winner's own, if it had them all; and every
        solution's KL in nats.
    """
    spec = job.options.run_off
    assert spec is not None and job.judging is not None  # asked by the caller
    few = job.calibration[: spec.calibration]
    scales = SCALES[::5] if job.options.rescale else (1.0,)
    kls: dict[str, float] = {}
    names = {label: f"run-off-{k}" for k, label in enumerate(contenders)}
    for label, choices in contenders.items():
        folders, inputs = _refitted(run, job, names[label], choices, few, metrics)

        def judge(folder: Path | None, label: str = label, folders: list[Path] = folders) -> None:
            kl = float(kl_at(job, joined(folders), job.judging, scales, f"run-off, {label}").min())  # type: ignore[arg-type]
            if folder is not None:
                (folder / "kl.json").write_text(json.dumps({"solution": label, "kl": kl}))

        parts = {**inputs, "parts": [run.seal_hash(f) for f in folders], "scales": scales}
        judged = run.stage_together(f"{names[label]}-judged", parts, judge)
        kls[label] = json.loads((judged / "kl.json").read_text())["kl"]
    best = min(kls, key=lambda label: (kls[label], label))
    say("run-off, KL: " + ", ".join(f"{label} {kl:.4f}" for label, kl in kls.items()) + f"; {best} wins")
    return contenders[best], names[best] if len(few) == len(job.calibration) else "final", kls


def _refitted(
    run: Run, job: Job, name: str, choices: list[Choice], calibration: Tensor, metrics: Metrics
) -> tuple[list[Path], dict[str, Any]]:
    """One pass with exactly the chosen counts: units chosen and refitted on the streams the pruned model has. Returns
    the blocks' sealed folders and what they were made from."""
    options = job.options
    block_menu = [Menu((c.neurons,), ((c.groups, c.per_group),)) for c in choices]
    inputs = {
        **job.inputs,
        "method": options.model_dump(mode="json", include=LOCAL_OPTIONS),
        "choices": [list(vars(c).values()) for c in choices],
        "metrics": metrics.hash(),
        "windows": len(calibration),
    }

    def write(index: int, attention: Any, ffn: Any, began: float) -> Path:
        def build(folder: Path) -> None:
            block = BlockPlan(heads=attention[0].units, neurons=ffn[0].units)
            weights = {"o": attention[0].weight, "down": ffn[0].weight}
            Plan(
                blocks=(block,),
                weights={f"blocks.0.{k}": w.to(job.dtype) for k, w in weights.items() if w is not None},
                meta={"block": index},
            ).save(folder)

        return run.stage(f"{name}/block-{index:03d}", {**inputs, "block": index}, build, began)

    return _walk(run, job, name, inputs, calibration, block_menu, options.accumulation, metrics, write), inputs


def joined(folders: Sequence[Path]) -> Plan:
    """The plan of all blocks."""
    each = [Plan.load(f) for f in folders]
    return Plan(
        blocks=tuple(p.blocks[0] for p in each),
        weights={
            key.replace("blocks.0.", f"blocks.{i}."): w for i, p in enumerate(each) for key, w in p.weights.items()
        },
    )


def final_pass(
    run: Run,
    job: Job,
    choices: list[Choice],
    results: list[dict[str, Any]],
    metrics: Metrics | None = None,
    name: str = "final",
    judged: Mapping[str, float] | None = None,
) -> Path:
    """The plan of a last pass over all calibration windows, whose stages are called ``name``; ``judged`` is what the
    run-off before it found."""
    options = job.options
    metrics = _metrics(run, job) if metrics is None else metrics
    folders, inputs = _refitted(run, job, name, choices, job.calibration, metrics)

    def build(folder: Path | None) -> None:
        plan = joined(folders)
        plan.meta.update(
            {
                "method": "tyr",
                "sparsity_asked": job.sparsity,
                "removed": sum(saving(job, c) for c in choices),
                "backbone": job.costs.backbone,
                **dict(job.inputs),
            }
        )
        if judged is not None:
            plan.meta["run_off"] = dict(judged)
        if options.rescale:
            scale, before, after = fit_scale(job, plan)
            plan.weights["norm"] = job.family.scaled_norm(job.model, scale)
            plan.meta["logit_scale"] = {"scale": scale, "kl_before": before, "kl": after}
        if folder is not None:
            plan.save(folder)
            (folder / "search.json").write_text(json.dumps(results, indent=1))

    parts = [run.seal_hash(f) for f in folders]
    return run.stage_together("plan", {**inputs, "parts": parts, "rescale": options.rescale}, build)
