"""The last pass over the blocks: a solution's counts, refitted to the streams that the pruned model has, become a plan.

Before it, where the recipe asks for one, the run-off between the best solutions, each behind a pass of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import CompressError
from compress.language.plan import BlockPlan, Plan
from compress.recipes.tyr.choice import Choice, Curves, Job, counts_of, removed, settle, smallest, within
from compress.recipes.tyr.rescale import COARSE, fit_scale, kl_at
from compress.recipes.tyr.supernet import Menu
from compress.recipes.tyr.walk import LOCAL_OPTIONS, Metrics, metrics_of, walk
from compress.run.folder import Run
from compress.run.progress import say


def refitted(
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
                weights={f"blocks.0.{k}": _stored(w, job, index) for k, w in weights.items() if w is not None},
                meta={"block": index},
            ).save(folder)

        return run.stage(f"{name}/block-{index:03d}", {**inputs, "block": index}, build, began)

    return walk(run, job, name, inputs, calibration, block_menu, options.accumulation, metrics, write), inputs


def _stored(weight: Tensor, job: Job, index: int) -> Tensor:
    """A refitted weight in the type the model is stored in.

    Raises:
        CompressError: it is too large for it.
    """
    kept = weight.to(job.dtype)
    if weight.isfinite().all() and not kept.isfinite().all():
        raise CompressError(
            f"a refitted weight goes up to {float(weight.abs().max()):.3g}, which {job.dtype} cannot hold",
            where=f"block {index}",
            fix="raise the damping (tyr.damping), or store the dense model in bfloat16 or float32",
        )
    return kept


def joined(folders: Sequence[Path]) -> Plan:
    """The plan of all blocks."""
    each = [Plan.load(f) for f in folders]
    return Plan(
        blocks=tuple(p.blocks[0] for p in each),
        weights={
            key.replace("blocks.0.", f"blocks.{i}."): w for i, p in enumerate(each) for key, w in p.weights.items()
        },
    )


def contenders_of(job: Job, results: Sequence[Mapping[str, Any]], options: Sequence[Curves]) -> dict[str, list[Choice]]:
    """What goes into the run-off: the first search's solution, the plain knapsack's, the rule that leaves the edges
    alone, the best other starting points, and what every further search has found; equal ones once.

    Args:
        results: every iteration's search.json.
        options: every iteration's curves of single losses.
    """
    assert job.options.run_off is not None  # asked by the caller
    first = results[0]
    starts = first["choices_starts"]
    known = [label for label in ("knapsack", "edges left alone") if label in starts]
    order = [*known, *sorted(set(starts) - set(known), key=lambda label: (first["starts"][label], label))]
    found: dict[str, list[Choice]] = {}
    for label, choices in [("search", first["choices"]), *((label, starts[label]) for label in order)]:
        counts = [Choice(**c) for c in choices]
        if not within(job, counts):  # of limits that were put right since
            continue
        settled = settle(job, counts, options[0])
        if settled not in found.values() and len(found) < job.options.run_off.solutions:
            found[label] = settled
    for number, (result, curves) in enumerate(zip(results[1:], options[1:], strict=True), 2):
        counts = [Choice(**c) for c in result["choices"]]
        settled = settle(job, counts, curves) if within(job, counts) else counts
        if within(job, settled) and settled not in found.values():
            found[f"search {number}"] = settled
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
    scales = COARSE if job.options.rescale else (1.0,)
    kls: dict[str, float] = {}
    names = {label: f"run-off-{k}" for k, label in enumerate(contenders)}
    for label, choices in contenders.items():
        folders, inputs = refitted(run, job, names[label], choices, few, metrics)

        def judge(folder: Path | None, label: str = label, folders: list[Path] = folders) -> None:
            plan = joined([run.check(f) for f in folders])
            kl = float(kl_at(job, plan, job.judging, scales, f"run-off, {label}").min())  # type: ignore[arg-type]
            if folder is not None:
                (folder / "kl.json").write_text(json.dumps({"solution": label, "kl": kl}), encoding="utf-8")

        parts = {**inputs, "parts": [run.seal_hash(f) for f in folders], "scales": scales}
        judged = run.stage_together(f"{names[label]}-judged", parts, judge)
        kls[label] = json.loads((judged / "kl.json").read_text("utf-8"))["kl"]
    best = min(kls, key=lambda label: (kls[label], label))
    say("run-off, KL: " + ", ".join(f"{label} {kl:.4f}" for label, kl in kls.items()) + f"; {best} wins")
    return contenders[best], names[best] if len(few) == len(job.calibration) else "final", kls


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
    metrics = metrics_of(run, job) if metrics is None else metrics
    folders, inputs = refitted(run, job, name, choices, job.calibration, metrics)

    def build(folder: Path | None) -> None:
        plan = joined([run.check(f) for f in folders])
        plan.meta.update(
            {
                "method": "tyr",
                **({"budgets": budget_rows(job, choices)} if job.limits else {"sparsity_asked": job.sparsity}),
                "removed": removed(job, choices),
                "backbone": job.costs.backbone,
                **dict(job.inputs),
            }
        )
        if judged is not None:
            plan.meta["run_off"] = dict(judged)
        if options.rescale:
            _rescale(job, plan)
        if folder is not None:
            plan.save(folder)
            (folder / "search.json").write_text(json.dumps(results, indent=1), encoding="utf-8")

    parts = {
        "parts": [run.seal_hash(f) for f in folders],
        "rescale": options.rescale,
        **({"budgets": budget_rows(job, choices)} if job.limits else {}),
    }
    return run.stage_together("plan", {**inputs, **parts}, build)


def budget_rows(job: Job, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Every budget: what was asked, the least there is, and what the table says of these choices."""
    least = counts_of(smallest(job))
    counts = counts_of(choices)
    return [{**limit.facts(counts, limit.prices.total(least)), **job.told.get(limit.text, {})} for limit in job.limits]


def _rescale(job: Job, plan: Plan) -> None:
    """Folds the best scale of the logits into the last norm's weight, where one weight can hold it."""
    if job.family.scaled_norm(job.model, 1.0) is None:
        say("the last norm has a bias, or no weight: the logits' scale stays as it is")
        return
    scale, before, after = fit_scale(job, plan)
    weight = job.family.scaled_norm(job.model, scale)
    assert weight is not None  # as at scale 1
    plan.weights["norm"] = weight
    plan.meta["logit_scale"] = {"scale": scale, "kl_before": before, "kl": after}
