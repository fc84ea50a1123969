"""Týr from calibration windows to a plan: supernet, search, again with finer levels, then one exact pass.

The search decides only *how much* every sublayer gives up. The last pass walks the model once more with exactly that
choice, so that every projection is refitted to the stream it will really see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.language.budget import Option, knapsack, nearest_feasible, target_removed
from compress.language.plan import BlockPlan, Plan
from compress.models.streaming import in_step
from compress.recipes.tyr import TyrOptions, bounded, stock, timed
from compress.recipes.tyr.choice import Choice, Curves, Job, block_menus, check_budget, removed, savings, settle
from compress.recipes.tyr.last_pass import contenders_of, final_pass, run_off
from compress.recipes.tyr.search import (
    Breed,
    Evaluator,
    Genome,
    compared,
    evolve,
    held_tokens,
    measure_singles,
    menus,
    starts,
    swaps_and_knapsacks,
)
from compress.recipes.tyr.supernet import Accumulation, Supernet, head_choice, write_block
from compress.recipes.tyr.walk import LOCAL_OPTIONS, Metrics, metrics_of, room_for, walk
from compress.run.folder import Run, fingerprint
from compress.run.progress import Progress

# Tokens x layers of the paper's search: 4 iterations of 50 generations, each 128 offspring on 2,048 tokens, 16 on
# 16,384, and 4 with the parent on 131,072 (arXiv 2503.09657, section 3.3 and appendix).
REFERENCE_TOKENS = 4 * 50 * (128 * 2048 + 16 * 16384 + 5 * 131072)


def produce_plan(run: Run, job: Job) -> Path:
    """Runs all stages of the method; each is sealed, and a run started again goes on where it stopped.

    Returns:
        The sealed folder holding plan.json, plan.safetensors and search.json.
    """
    check_budget(job)
    if job.clock is not None:
        job = timed.priced(run, job)
    metrics = metrics_of(run, job)
    choices: list[Choice] | None = None
    results: list[dict[str, Any]] = []
    options: list[Curves] = []
    for iteration in range(1, job.options.iterations + 1):
        before = choices
        files = _supernet(run, job, iteration, choices, metrics)
        singles = _singles(run, job, iteration, files, choices)
        folder = _search(run, job, iteration, files, singles, choices)
        results.append(json.loads((folder / "search.json").read_text("utf-8")))
        options.append(json.loads((singles / "singles.json").read_text("utf-8"))["options"])
        choices = [Choice(**c) for c in results[-1]["choices"]]
    assert choices is not None  # iterations >= 1
    settled = settle(job, choices, options[-1])
    held: timed.Held | None = None
    if job.clock is not None:

        def again(other: Job, number: int) -> dict[str, Any]:
            place = _search(run, other, iteration, files, singles, before, number)
            return dict(json.loads((place / "search.json").read_text("utf-8")))

        job, held, results[-1] = timed.hold(run, job, results[-1], options[-1], again)
        settled = held.choices
    name, kls = "final", None
    if job.options.run_off is not None:
        settled, name, kls = run_off(run, job, contenders_of(job, results, options), metrics)
    if held is not None:
        job = replace(job, told=timed.told(run, job, held if held.choices == settled else None))
    return final_pass(run, job, settled, results, metrics, name, kls)


def accumulation_of(options: TyrOptions, iteration: int) -> Accumulation:
    """The first candidates are measured one at a time in the dense model, so that is what they are fitted to. Weights
    that make up for pruning in front of them would be out of place there."""
    return "none" if iteration == 1 else options.accumulation


def _supernet(run: Run, job: Job, iteration: int, choices: list[Choice] | None, metrics: Metrics) -> list[Path]:
    """Builds the supernet block by block; every block is a sealed stage, the streams behind it are kept beside."""
    options = job.options
    block_menu = block_menus(job, iteration, choices)
    accumulation = accumulation_of(options, iteration)
    calibration = job.calibration[: options.supernet_windows]
    inputs = {
        **job.inputs,
        "method": {**options.model_dump(mode="json", include=LOCAL_OPTIONS), "accumulation": accumulation},
        "levels": [[menu.neurons, menu.heads] for menu in block_menu],
        **({} if choices is None else {"expected": [menu.solution for menu in block_menu]}),
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
        for folder in walk(run, job, name, inputs, calibration, block_menu, accumulation, metrics, write)
    ]


def _evaluator(
    run: Run, job: Job, files: list[Path], name: str, windows: Tensor, inputs: Mapping[str, Any]
) -> Evaluator:
    """An evaluator whose journal belongs to these inputs alone: another recipe's evaluations are not taken for ours."""
    options = job.options.search
    runner = job.runner(windows.shape[1])
    return Evaluator(
        runner,
        Supernet([run.check(path.parent) / path.name for path in files], job.geometry),
        windows,
        positions=compared(options, windows.shape[1], job.skip),
        top_k=options.teacher_top_k,
        seed=job.seed,
        log=run.journal(name, f"log-{fingerprint(inputs)[:16]}.jsonl"),
        tag=name,
        room=room_for(run, job, name, runner, held_tokens(windows.numel(), job.geometry.layers)),
        skip=job.skip,
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
        **({"shape": job.options.shape} if job.options.shape != "ragged" else {}),
    }

    @in_step(job.model)
    def build(folder: Path | None) -> None:
        # Evenly spread over the windows, so that every source of text is among them.
        n = min(options.singles_windows, len(job.search))
        windows = job.search[torch.linspace(0, len(job.search) - 1, n).long()]
        evaluator = _evaluator(run, job, files, name, windows, inputs)
        if job.options.shape == "stock":
            facts = _blocks_alone(evaluator, job, name, choices)
            if folder is not None:
                (folder / "singles.json").write_text(json.dumps(facts), encoding="utf-8")
            return
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
            (folder / "singles.json").write_text(json.dumps(facts), encoding="utf-8")

    folder = run.stage_together(name, inputs, build)
    run.drop_scratch(name)
    return folder


def _blocks_alone(evaluator: Evaluator, job: Job, name: str, choices: list[Choice] | None) -> dict[str, Any]:
    """What the loss of each block alone costs, where the shape is a stock one; ``options`` stay empty."""
    dense = job.geometry.blocks[0]
    base = choices or [Choice(dense.kv_heads, dense.group, dense.ffn)] * job.geometry.layers
    with Progress(len(base), f"{name}: single blocks") as bar:
        losses = stock.measure_blocks(evaluator, stock.Levels(evaluator.supernet, job), base, lambda n: bar.to(n))
    return {"options": [], "blocks": losses, "work": evaluator.work, "candidates": len(losses)}


@dataclass(frozen=True)
class _Field:
    """What a search starts from, and how it goes on. ``predicted``: the knapsack's sum of single losses, where there is
    a knapsack."""

    started: dict[str, Genome]
    breed: Callable[[Genome], Breed]
    predicted: float | None = None


def _field(job: Job, supernet: Supernet, facts: Mapping[str, Any], choices: list[Choice] | None) -> _Field:
    if job.options.shape == "stock":
        losses, levels = facts["blocks"], stock.Levels(supernet, job)
        offered = stock.shapes(job, None if choices is None else stock.shape_found(choices))
        started = stock.starts(offered, losses, levels)
        if choices is not None:
            started["incumbent"] = levels.genome(choices)
        breed = stock.breeder(offered, losses, levels, choices)
        return _Field(started, lambda _: breed)
    priced = _priced(facts)
    if job.limits:
        bounds = bounded.bounds_of(job.limits, [[o["choice"] for o in menu] for menu in facts["options"]])
        started = bounded.starts(priced, bounds, None if choices is None else tuple(facts["base"]))
        predicted = sum(priced[i][g].loss for i, g in enumerate(started["knapsack"]))
        return _Field(started, lambda _: bounded.breeder(priced, bounds), predicted)
    total = nearest_feasible(priced, target_removed(job.sparsity, job.costs.backbone))
    started = starts(priced, total, None if choices is None else tuple(facts["base"]))
    predicted = sum(priced[i][g].loss for i, g in enumerate(started["knapsack"]))
    return _Field(started, lambda start: swaps_and_knapsacks(priced, start), predicted)


def _search(
    run: Run,
    job: Job,
    iteration: int,
    files: list[Path],
    singles: Path,
    choices: list[Choice] | None,
    number: int = 1,
) -> Path:
    """Starts from knapsack solutions, keeps the best by joint KL, and lets it evolve; resumable from its journal.

    ``number``: which search of this iteration it is, where limits were put right behind the first.
    """
    options = job.options.search
    name = f"search-{iteration}" if number == 1 else f"search-{iteration}-again-{number}"
    inputs = {
        **job.inputs,
        "iteration": iteration,
        "search": options.model_dump(mode="json"),
        "singles": run.seal_hash(singles),
        "supernet": [run.seal_hash(path.parent) for path in files],
        **asked_of(job),
        "seed": job.seed,
    }

    @in_step(job.model)
    def build(folder: Path | None) -> None:
        evaluator = _evaluator(run, job, files, name, job.search, inputs)
        supernet = evaluator.supernet
        facts = json.loads((singles / "singles.json").read_text("utf-8"))
        field = _field(job, supernet, facts, choices)
        started = field.started
        with Progress(len(started), f"{name}: starting points") as bar:
            notes = [{"phase": f"start: {label}"} for label in started]
            rated = dict(zip(started, evaluator.kls(list(started.values()), notes=notes), strict=True))
            best = min(rated, key=lambda label: (rated[label], label))
            told = best if field.predicted is None else "knapsack"
            bar.to(len(started), note=f"{told} {rated[told]:.4f}")
        with Progress(options.generations, f"{name}: generations") as bar:
            found = evolve(
                evaluator,
                field.breed(started[best]),
                started[best],
                options,
                seed=job.seed + iteration,
                progress=lambda generation, kl: bar.to(generation, note=f"KL {kl:.4f}"),
            )
        chosen = _choices_of(supernet, job, found.genome)
        result = {
            "iteration": iteration,
            "genome": list(found.genome),
            "removed": removed(job, chosen),
            "starts": rated,
            **(
                {}
                if field.predicted is None
                else {"kl_knapsack": rated["knapsack"], "predicted_knapsack": field.predicted}
            ),
            "kl_start": found.kl_start,
            "kl": found.kl,
            "generations": found.generations,
            "stopped": found.stopped,
            "candidates": facts["candidates"],
            "work_token_layers": evaluator.work + facts["work"],
            "supernet_bytes": supernet.bytes,
            "full_shape_bytes": full_shape_bytes(supernet, job),
            "choices": [vars(c) for c in chosen],
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
            (folder / "search.json").write_text(json.dumps(result, indent=1), encoding="utf-8")

    folder = run.stage_together(name, inputs, build)
    run.drop_scratch(name)
    return folder


def asked_of(job: Job) -> dict[str, Any]:
    """How much is to go, for a fingerprint: the sparsity, or the budgets in whole units."""
    if not job.limits:
        return {"sparsity": job.sparsity}
    return {"budgets": {limit.text: [limit.most, *limit.source] for limit in job.limits}}


def curve(run: Run, job: Job, sparsities: Sequence[float]) -> Iterator[tuple[int, Plan]]:
    """(parameters removed, plan) at other sparsities, from what the first iteration left behind: its candidates as
    they are, chosen by the knapsack over their single losses. No search, no last pass: what those add shows beside it.

    Sparsities that the candidates cannot reach are left out.
    """
    if not sparsities:
        return
    folders = [run.check(run.folder / f"supernet-1/block-{i:03d}") for i in range(job.geometry.layers)]
    supernet = Supernet([folder / "levels.safetensors" for folder in folders], job.geometry)
    facts = json.loads((run.folder / "singles-1" / "singles.json").read_text("utf-8"))
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
    found = 0
    for block, facts in zip(job.geometry.blocks, supernet.facts, strict=True):
        for kind, columns in zip(("attention", "ffn"), block.widths, strict=True):
            found += sum(columns * block.hidden * size for level in facts[kind] if not level["dense"])
    return found


def _describe(supernet: Supernet, job: Job, sublayer: int, e: int) -> list[int]:
    """Attention level -> [groups, per_group]; FFN level -> [neurons]."""
    block, ffn = divmod(sublayer, 2)
    if ffn:
        return [supernet.facts[block]["ffn"][e]["kept"]]
    return list(head_choice(supernet.level(block, "attention", e).units, job.geometry.blocks[block]))


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
        for kind, wanted in zip(("attention", "ffn"), savings(job.costs.blocks[block], choice), strict=True):
            facts = supernet.facts[block][kind]
            genome.append(min(range(len(facts)), key=lambda e: (abs(facts[e]["saving"] - wanted), e)))
    return tuple(genome)
