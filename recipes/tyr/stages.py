"""Týr's stages in their order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import CompressError
from compress.language.latency import Clock, check_times, key_of
from compress.language.limits import TIMES, held, limits, measured, parse
from compress.language.quantised import quantise
from compress.language.setup import Setup, Windows, fingerprint_of, read_windows
from compress.language.setup import prepare as prepare_text
from compress.language.stages import (
    bench,
    describe_model,
    evaluate,
    export,
    export_dense,
    fixed_tokens,
    held_out,
    perplexities,
    release,
)
from compress.language.whole import whole
from compress.recipes.tyr.lines import forecast_lines as forecast_lines
from compress.recipes.tyr.lines import lines as lines
from compress.recipes.tyr.outlook import forecast as forecast
from compress.report.rows import VERSION
from compress.run.folder import Run, seal_hash
from compress.run.progress import say
from compress.schema.stages import STAGES

if TYPE_CHECKING:
    from compress.language.plan import Plan
    from compress.recipes.tyr.choice import Job
    from compress.schema.recipe import Recipe


AMOUNT: str = "sparsity"
SHARED: frozenset[str] = frozenset(
    {
        "text",
        "text-recover",
        "metrics",
        "supernet-1",
        "singles-1",
        "latency-table",
        "evaluation-dense",
        "curve",
        "export-dense",
    }
)


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
        whole(run, setup, next(iter(saved.values())), report)
        _hold_budgets(setup, saved, report)
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
            _time_budgets(run, setup, exported, report)
    if last >= STAGES.index("quantise") and recipe.quantise is not None:
        quantise(run, setup, windows, next(iter(saved.values())), exported, makers, report)
    if last >= STAGES.index("release"):
        return release(run, setup, saved, report, card)
    return report


def _plan(run: Run, setup: Setup, windows: Windows) -> Path:
    from compress.recipes.tyr.prune import produce_plan

    return produce_plan(run, job_for(setup, windows, fingerprint_of(windows), lambda: export_dense(run, setup)))


def prepare(model: str, recipe: Recipe) -> Setup:
    """`compress.language.setup.prepare`, and what can be said of budgets before a weight is read."""
    from compress.recipes.tyr.choice import check_budget

    setup = prepare_text(model, recipe)
    if recipe.budget:
        job = job_for(setup, None, {})
        check_budget(job)
        say_kept(job)
    return setup


def say_kept(job: Job) -> None:
    """Says which budgets the dense model keeps."""
    from compress.recipes.tyr.choice import kept_by_dense

    for budget in kept_by_dense(job)[0]:
        say(f"budget {budget.text}: the dense model keeps it already, so it bounds nothing by itself")


def job_for(
    setup: Setup,
    windows: Windows | None,
    data: Mapping[str, str],
    dense: Callable[[], Path] | None = None,
) -> Job:
    """What a Týr run needs to know; ``dense`` makes the dense model's export, for budgets of times."""
    import torch

    from compress.recipes.tyr.choice import Job

    none = torch.zeros(0, setup.recipe.calibration.length, dtype=torch.int64)
    made = Job(
        model=setup.model if windows is not None else None,  # type: ignore[arg-type]
        family=setup.family,
        config=setup.config,
        geometry=setup.geometry,
        costs=setup.costs,
        calibration=windows.calibration if windows is not None else none,
        search=windows.search if windows is not None else none,
        sparsity=setup.recipe.sparsity if setup.recipe.sparsity is not None else 0.0,
        seed=setup.recipe.seed,
        options=setup.recipe.options,
        inputs={"version": __version__, "weights": setup.weights, "text": dict(data), **setup.computed()},
        offload=setup.recipe.memory.offload,
        dtype=setup.stored_dtype,
        judging=windows.judging if windows is not None else None,
        begin=len(windows.begin) if windows is not None else 0,
        parallel=setup.recipe.serve.tensor_parallel if setup.recipe.serve is not None else 1,
        limits=limits(setup),
        computing=setup.computing,
    )
    if not setup.recipe.budget:
        return made
    from compress.recipes.tyr.forecast import implied

    timed = tuple(b for b in parse(setup.recipe.budget, setup.recipe.bench) if b.figure in TIMES)
    made = replace(made, sparsity=implied(made, [b.limit for b in timed]))
    if not timed:
        return made
    check_times(setup)
    return replace(made, clock=Clock(setup, timed, dense if dense is not None else _no_export))


def _no_export() -> Path:
    raise AssertionError("what is only planned exports nothing")


def _hold_budgets(setup: Setup, saved: Mapping[str, Path], report: dict[str, Any]) -> None:
    """Measures what is counted of the saved model, against what was asked.

    Raises:
        CompressError: it takes more than its plan does.
    """
    if "budgets" not in report:
        return
    wanted = {row["budget"]: (row["figure"], row.get("length")) for row in report["budgets"]}
    found = measured(saved["per-layer"], setup.family, wanted)
    for row in report["budgets"]:
        if row["budget"] not in found:
            continue
        row["measured"], row["held"] = found[row["budget"]], found[row["budget"]] <= row["asked"]
        if not row["held"]:
            raise CompressError(
                f"the saved model takes {row['measured']:,} where the budget {row['budget']} allows {row['asked']:,}",
                where=str(saved["per-layer"]),
                fix="this is a fault of compress; report it with the model's name",
            )


def _time_budgets(run: Run, setup: Setup, exported: Mapping[str, Path], report: dict[str, Any]) -> None:
    """Times the two exports where there are budgets of times: whether each is held, is not, or lies within the interval
    of what was measured."""
    timed = tuple(b for b in parse(setup.recipe.budget or (), setup.recipe.bench) if b.figure in TIMES)
    if not timed:
        return
    clock = Clock(setup, timed, lambda: exported["dense"])
    inputs = {
        "version": __version__,
        **clock.facts(),
        "bench": clock.bench.model_dump(mode="json"),
        **{label: seal_hash(folder) for label, folder in exported.items()},
    }
    folder = run.stage("latency-held", inputs, lambda f: clock.shares(exported["dense"], exported["pruned"], f))
    found = json.loads((folder / "shares.json").read_text("utf-8"))
    limits = {b.text: (key_of(b), b.limit) for b in timed}
    for row in report["budgets"]:
        if row["budget"] not in limits:
            continue
        key, most = limits[row["budget"]]
        share = found[key]
        row["measured"] = share["pruned"]
        row["share"] = {name: share[name] for name in ("median", "low", "high")}
        row["held"] = held(share, most)
    report["stages"] = run.stages()


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
    if "budgets" in plan.meta:
        report["budgets"] = plan.meta["budgets"]
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
