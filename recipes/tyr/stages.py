"""Týr's stages in their order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import CompressError
from compress.language.quantised import quantise
from compress.language.setup import Setup, Windows, fingerprint_of, read_windows
from compress.language.setup import prepare as prepare
from compress.language.stages import (
    bench,
    describe_model,
    evaluate,
    export,
    fixed_tokens,
    held_out,
    perplexities,
    release,
)
from compress.recipes.tyr.lines import forecast_lines as forecast_lines
from compress.recipes.tyr.lines import lines as lines
from compress.recipes.tyr.outlook import forecast as forecast
from compress.report.rows import VERSION
from compress.run.folder import Run, seal_hash
from compress.schema.stages import STAGES

if TYPE_CHECKING:
    from compress.language.plan import Plan


def stages(run: Run, setup: Setup, until: str, command: str) -> dict[str, Any]:
    from compress.recipes.tyr.prune import REFERENCE_TOKENS

    recipe = setup.recipe
    last = STAGES.index(until)
    report: dict[str, Any] = {"schema_version": VERSION}
    windows = read_windows(setup, run)
    plan_folder = _plan(run, setup, windows)
    describe_plan(report, setup, plan_folder, command, run.stages(), REFERENCE_TOKENS)
    pruned_folder = plan_folder
    if last >= STAGES.index("recover") and recipe.recover is not None:
        plan_folder = _recover(run, setup, windows, plan_folder, report)
    if last >= STAGES.index("model"):
        saved = _assemble(run, setup, plan_folder, report)
    if last >= STAGES.index("evaluation"):
        evaluate(run, setup, windows, saved, report, lambda common: _curve(run, setup, windows, common))
        if recipe.recover is not None:
            _evaluate_unrecovered(run, setup, windows, pruned_folder, report)
    exported: dict[str, Path] = {}
    makers = {"dense": lambda: setup.model, "pruned": lambda: _sliced(setup, saved, plan_folder)}
    if last >= STAGES.index("export") and recipe.export is not None:
        exported = export(run, setup, makers["pruned"], next(iter(saved.values())), report)
        if last >= STAGES.index("bench"):
            bench(run, setup, exported, makers, report)
    if last >= STAGES.index("quantise") and recipe.quantise is not None:
        quantise(run, setup, windows, next(iter(saved.values())), exported, makers, report)
    if last >= STAGES.index("release"):
        return release(run, setup, saved, report, card)
    return report


def _plan(run: Run, setup: Setup, windows: Windows) -> Path:
    from compress.recipes.tyr.prune import produce_plan

    return produce_plan(run, job_for(setup, windows, fingerprint_of(windows)))


def job_for(setup: Setup, windows: Windows | None, data: Mapping[str, str]) -> Any:
    import torch

    from compress.recipes.tyr.choice import Job

    none = torch.zeros(0, setup.recipe.calibration.length, dtype=torch.int64)
    return Job(
        model=setup.model if windows is not None else None,  # type: ignore[arg-type]
        family=setup.family,
        config=setup.config,
        geometry=setup.geometry,
        costs=setup.costs,
        calibration=windows.calibration if windows is not None else none,
        search=windows.search if windows is not None else none,
        sparsity=setup.recipe.sparsity,
        seed=setup.recipe.seed,
        options=setup.recipe.options,
        inputs={"version": __version__, "weights": setup.weights, "text": dict(data), **setup.computed()},
        offload=setup.recipe.memory.offload,
        dtype=setup.stored_dtype,
        judging=windows.judging if windows is not None else None,
        begin=len(windows.begin) if windows is not None else 0,
        parallel=setup.recipe.serve.tensor_parallel if setup.recipe.serve is not None else 1,
        computing=setup.computing,
    )


def _recover(run: Run, setup: Setup, windows: Windows, plan_folder: Path, report: dict[str, Any]) -> Path:
    from compress.language.recover import recover, training_windows

    folder = recover(run, setup, training_windows(run, setup, windows), plan_folder, len(windows.begin))
    facts = json.loads((folder / "recover.json").read_text("utf-8"))
    log = facts.pop("log")
    report["recover"] = {**facts, "first": log[0], "last": log[-1]}
    report["stages"] = run.stages()
    return folder


def _evaluate_unrecovered(run: Run, setup: Setup, windows: Windows, plan_folder: Path, report: dict[str, Any]) -> None:
    """Perplexity of what was pruned and not yet trained, so that the report tells what training brought; with its
    weights as they would be, had it been saved."""
    from compress.language.evaluate import geometric_mean
    from compress.language.plan import Plan

    def build(folder: Path | None) -> None:
        texts = perplexities(setup.as_saved(Plan.load(plan_folder)), windows, "perplexity before recovery")
        if folder is not None:
            (folder / "evaluation.json").write_text(json.dumps({"texts": texts}, indent=1), encoding="utf-8")

    inputs = {"version": __version__, "text": held_out(windows), "plan": seal_hash(plan_folder), **_rounding(setup)}
    stage = run.stage_together("evaluation-unrecovered", inputs, build)
    texts = json.loads((stage / "evaluation.json").read_text("utf-8"))["texts"]
    quality = report["quality"]
    report["recover"]["texts"] = [
        {"name": row["name"], "before_ppl": texts[row["name"]]["ppl"], "after_ppl": row["pruned_ppl"]}
        for row in quality["texts"]
    ]
    report["recover"]["geometric_mean"] = {
        "before": geometric_mean([v["ppl"] for v in texts.values()]),
        "after": quality["geometric_mean"]["pruned"],
    }
    report["stages"] = run.stages()


def _assemble(run: Run, setup: Setup, plan_folder: Path, report: dict[str, Any]) -> dict[str, Path]:
    """Slices, saves in every layout, and seals each only when a clean process has given the masked model's logits."""
    import torch

    from compress.language.checkpoint import save_model, verify_clean
    from compress.language.plan import Plan

    saved: dict[str, Path] = {}
    report["verify"] = {"layouts": []}
    for layout in setup.recipe.layouts:

        def build(folder: Path, layout: str = layout) -> None:
            plan = Plan.load(plan_folder)
            sliced, counts = setup.pruned(plan)
            tokens = fixed_tokens(setup)
            masked = setup.masked(plan)
            with torch.no_grad():
                want, got = (m(tokens.to(setup.family.embedding_device(m))).logits for m in (masked, sliced))
            difference, scale = float((want - got).abs().max()), float(want.abs().max())
            if not difference <= 1e-4 * scale:
                raise CompressError(
                    f"the sliced model differs from the masked one by {difference:.3g} (logits up to {scale:.3g})",
                    where="assembly",
                    fix="this is a fault of the family's adapter; report it with the model's name",
                )
            small = layout != "padded"
            save_model(
                sliced if small else masked,
                setup.family,
                counts if small else None,
                folder,
                tokenizer=setup.tokenizer,
                dtype=setup.stored_dtype,
                tokens=tokens,
                stock=layout == "stock",
            )
            if layout == "stock":
                _same_as_sliced(setup, plan, folder)
            found = {"layout": layout, "masked_difference": difference, **verify_clean(folder)}
            (folder / "verified.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

        name = "model-padded" if layout == "padded" else "model"
        inputs = {"version": __version__, "weights": setup.weights, "plan": seal_hash(plan_folder), "layout": layout}
        saved[layout] = run.stage(name, inputs, build)
        report["verify"]["layouts"].append(json.loads((saved[layout] / "verified.json").read_text("utf-8")))
    return saved


def _same_as_sliced(setup: Setup, plan: Plan, folder: Path) -> None:
    """Raises CompressError where what was saved without some blocks gives other logits than the model that has them."""
    import torch

    from compress.language.checkpoint import FINGERPRINT
    from compress.run.tensor_files import load_tensors

    saved = load_tensors(folder / FINGERPRINT, "the fingerprint", "start the same command again")
    model = setup.as_saved(plan)
    with torch.no_grad():
        want = model(saved["tokens"].to(setup.family.embedding_device(model))).logits.cpu()
    difference, scale = float((want - saved["logits"]).abs().max()), float(want.abs().max())
    if not difference <= 1e-4 * scale:
        raise CompressError(
            f"without the blocks that are gone the model differs by {difference:.3g} (logits up to {scale:.3g})",
            where=str(folder),
            fix="this is a fault of the family's adapter; report it with the model's name",
        )


def _sliced(setup: Setup, saved: Mapping[str, Path], plan_folder: Path) -> Any:
    """The sliced model, of the weights that were saved."""
    from compress.language.plan import Plan

    for layout in ("per-layer", "stock"):
        if layout in saved:
            return setup.load(saved[layout])
    # At full shape there are zeros where the plan has nothing: what is left of the saved weights without them.
    model = setup.load(saved["padded"])
    Plan(Plan.load(plan_folder).blocks, {}).apply(model, setup.family)
    return model


def _curve(run: Run, setup: Setup, windows: Windows, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Perplexity at other sparsities, with the weights as they would be saved: ``{"backbone_removed", "texts": {name:
    perplexity}}`` each."""
    from compress.recipes.tyr.prune import curve

    def build(folder: Path | None) -> None:
        points = []
        for removed, plan in curve(run, job_for(setup, windows, {}), setup.recipe.evaluation.curve):
            share = removed / setup.costs.backbone
            found = perplexities(setup.as_saved(plan), windows, f"perplexity at {100 * share:.1f} %")
            points.append({"backbone_removed": share, "texts": {n: p["ppl"] for n, p in found.items()}})
        if folder is not None:
            (folder / "curve.json").write_text(json.dumps(points, indent=1), encoding="utf-8")

    inputs = {
        **{k: v for k, v in common.items() if k != "tasks"},
        "singles": seal_hash(run.folder / "singles-1"),
        "sparsities": setup.recipe.evaluation.curve,
        **_rounding(setup),
    }
    points: list[dict[str, Any]] = json.loads(
        (run.stage_together("curve", inputs, build) / "curve.json").read_text("utf-8")
    )
    return points


def _rounding(setup: Setup) -> dict[str, str]:
    """What decides, beside the plan, the weights of `Setup.as_saved`."""
    stored = str(setup.stored_dtype).removeprefix("torch.")
    return {"stored": stored} if stored != "float32" else {}


def card(report: dict[str, Any], folder: Path) -> Path:
    from compress.recipes.tyr.card import write_card

    return write_card(report, folder)


def others_gone(setup: Setup, plan: Plan) -> int:
    """Parameters that go beside those of linear layers: of whole blocks that are left out, and of sublayers without
    heads or neurons (q and k norms), counted in the blocks as they will be saved."""
    bare = [i for i, block in enumerate(plan.blocks) if not block.heads or not block.neurons]
    if not bare:
        return 0
    import torch
    from transformers import AutoModelForCausalLM

    from compress.models.decoder import blocks

    with torch.device("meta"):
        dense = blocks(AutoModelForCausalLM.from_config(setup.config))

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    gone = 0
    for i in bare:
        costs, left, none = setup.costs.blocks[i], plan.blocks[i], torch.arange(0)
        linear = (0 if left.heads else costs.attention_dense) + (0 if left.neurons else costs.ffn_dense)
        if "stock" in setup.recipe.layouts and not left.heads and not left.neurons:
            stays = 0
        else:
            heads, neurons = (None if left.heads else none), (None if left.neurons else none)
            stays = count(setup.family.sliced(dense[i], heads=heads, neurons=neurons))
        gone += count(dense[i]) - stays - linear
    return gone


def describe_plan(
    report: dict[str, Any],
    setup: Setup,
    folder: Path,
    command: str,
    stages: list[dict[str, Any]],
    reference_tokens: int,
) -> None:
    """Fills in what a plan decides: model, recipe, sizes, layers, and the search behind it."""
    from compress.language.plan import Plan

    plan = Plan.load(folder)
    g, costs = setup.geometry, setup.costs
    removed = plan.removed(costs)
    others = others_gone(setup, plan)
    size = setup.stored_dtype.itemsize
    describe_model(report, setup, command)
    report["size"] = {
        "asked": setup.recipe.sparsity,
        "backbone_removed": removed / costs.backbone,
        "total_removed": (removed + others) / costs.total,
        "dense": {
            "backbone_parameters": costs.backbone,
            "total_parameters": costs.total,
            "bytes": costs.total * size,
        },
        "pruned": {
            "backbone_parameters": costs.backbone - removed,
            "total_parameters": costs.total - removed - others,
            "bytes": (costs.total - removed - others) * size,
        },
    }
    report["layers"] = [
        {
            "layer": i,
            "heads": heads,
            "kv_heads": groups,
            "neurons": neurons,
            "dense_heads": block.geometry.heads,
            "dense_kv_heads": block.geometry.kv_heads,
            "dense_neurons": block.geometry.ffn,
            "attention_sparsity": 1 - block.attention(groups, heads // groups if groups else 0) / block.attention_dense,
            "ffn_sparsity": 1 - block.ffn(neurons) / block.ffn_dense,
        }
        for i, ((heads, groups, neurons), block) in enumerate(zip(plan.counts(g), costs.blocks, strict=True))
    ]
    report["logit_scale"] = plan.meta.get("logit_scale")
    report["run_off"] = plan.meta.get("run_off")
    results = json.loads((folder / "search.json").read_text("utf-8"))
    report["search"] = {
        "iterations": [
            {k: v for k, v in r.items() if k not in ("log", "choices", "choices_starts", "genome")} for r in results
        ],
        "log": [{**row, "iteration": r["iteration"]} for r in results for row in r["log"]],
        "work_token_layers": sum(r["work_token_layers"] for r in results),
        "reference_token_layers": reference_tokens * g.layers,
    }
    report["stages"] = stages
