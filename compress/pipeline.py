"""The stages in their order: load, prune, recover, assemble, verify, evaluate, export, bench, report, card."""

from __future__ import annotations

import importlib
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import CompressError
from compress.language.setup import Setup, Windows, fingerprint_of, read_windows
from compress.language.setup import prepare as prepare  # Týr's, by `module_of`
from compress.processes import distributed
from compress.recipes.global_mp import GlobalMPOptions
from compress.recipes.global_mp.options import NetworkOptions
from compress.recipes.pagcp.options import PAGCPOptions
from compress.recipes.tyr import TyrOptions
from compress.report.build import describe_plan
from compress.run.folder import RECIPE_LOCK, Run, fingerprint, link, seal_hash
from compress.run.seals import read_stamped, stamped
from compress.schema.recipe import TEXT, AnyRecipe, Recipe, Task, TextRecipe, load_recipe, lock_text
from compress.schema.sections import NetworkRecipe

if TYPE_CHECKING:
    from torch import Tensor

METHODS: dict[str, dict[str, Task]] = {
    "tyr": {"text": Task(TyrOptions, Recipe, "compress.pipeline")},
    "global-mp": {
        "text": Task(GlobalMPOptions, TextRecipe, "compress.recipes.global_mp.text_stages"),
        "network": Task(NetworkOptions, NetworkRecipe, "compress.recipes.global_mp.network_stages"),
    },
    "pagcp": {"network": Task(PAGCPOptions, NetworkRecipe, "compress.recipes.pagcp.stages")},
}
STAGES = ("plan", "recover", "model", "evaluation", "export", "bench", "release")


def module_of(recipe: AnyRecipe | Mapping[str, Any]) -> Any:
    """The module that runs a recipe (or one as `AnyRecipe.resolved` writes it). It has

    - ``prepare(model, recipe)``: a setup with ``recipe``, ``resolved`` and ``weights``, before any weight is read;
    - ``stages(run, setup, until, command)``: the stages of `STAGES` up to ``until``; returns the report;
    - ``card(report, folder)``: draws the plots and writes the card, returns its path;
    - where they are not this module's: ``lines(report)``, what the command line says of a finished run, and
      ``forecast(model, recipe)`` with ``forecast_lines(facts)``, what `compress plan` says.
    """
    facts = recipe if isinstance(recipe, Mapping) else {"method": recipe.method, "task": getattr(recipe, "task", TEXT)}
    return importlib.import_module(METHODS[facts["method"]][facts.get("task", TEXT)].pipeline)


def prune(
    model: str,
    recipe_name: str,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    until: str = STAGES[-1],
    command: str = "",
) -> dict[str, Any]:
    """Runs the whole pipeline into the run folder ``out``, or goes on where an earlier call stopped.

    Returns:
        The report (up to the stage that was asked for).

    Raises:
        CompressError: anything that keeps the promise from being kept.
    """

    def ready() -> tuple[Any, Any]:
        recipe = load_recipe(recipe_name, METHODS, overrides)
        if getattr(recipe, "bench", None) is not None and recipe.export is None:
            raise CompressError("bench needs the exported model", where="export", fix="set bench to null as well")
        if recipe.targets:
            from compress.exporters.stages import check

            if getattr(recipe, "export", None) is None:
                raise CompressError("targets need the exported model", where="export", fix="leave targets out as well")
            check(recipe.targets)
        module = module_of(recipe)
        return module, module.prepare(model, recipe)

    # The main process first: what is wrong is said once, and what is fetched is fetched once.
    checked: list[tuple[Any, Any]] = []
    distributed.main_says(lambda: checked.append(ready()))
    module, setup = checked[0] if checked else ready()
    with Run.open(out, fresh) as run:
        lock = run.folder / RECIPE_LOCK
        distributed.main_says(lambda: _read_or_write_lock(lock, setup, command))
        report: dict[str, Any] = module.stages(run, setup, until, command)
        # Only now: a recipe that was refused must not stand for the stages that another one made.
        if distributed.is_main():
            _write_lock(lock, setup, command)
        return report


def stages(run: Run, setup: Setup, until: str, command: str) -> dict[str, Any]:
    from compress.recipes.tyr.prune import REFERENCE_TOKENS

    recipe = setup.recipe
    last = STAGES.index(until)
    report: dict[str, Any] = {"schema_version": 1}
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
    if last >= STAGES.index("export") and recipe.export is not None:
        makers = {"dense": lambda: setup.model, "pruned": lambda: _sliced(setup, saved, plan_folder)}
        exported = export(run, setup, makers["pruned"], next(iter(saved.values())), report)
        if last >= STAGES.index("bench"):
            bench(run, setup, exported, makers, report)
    if last >= STAGES.index("release"):
        return release(run, setup, saved, report)
    return report


def _read_or_write_lock(path: Path, setup: Any, command: str) -> None:
    if os.path.lexists(path):
        read_stamped(path, path.name, "delete it: the same command writes it again")
    else:
        _write_lock(path, setup, command)


def _write_lock(path: Path, setup: Any, command: str) -> None:
    from compress.data.text import text_facts
    from compress.run.doctor import versions

    text = lock_text(
        setup.recipe,
        {
            "model": {"name": setup.resolved.name, "source": setup.resolved.source, "sha256": setup.weights},
            # What a language model's windows begin with, and what an ended text would end with.
            **({"text": text_facts(setup.tokenizer)} if isinstance(setup, Setup) else {}),
            "versions": versions(),
            "command": command,
        },
    )
    partial = path.with_name(".recipe.lock.tmp")
    partial.write_text(stamped(text))
    partial.replace(path)


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
        inputs={"version": __version__, "weights": setup.weights, "text": dict(data)},
        offload=setup.recipe.memory.offload,
        dtype=setup.stored_dtype,
        judging=windows.judging if windows is not None else None,
        begin=len(windows.begin) if windows is not None else 0,
    )


def fixed_tokens(setup: Setup[Any], count: int = 64) -> Tensor:
    """Fixed token ids (1, count) for fingerprints: any model's vocabulary will do. They begin as a text does."""
    import torch

    ids = torch.randint(
        0, setup.geometry.vocab, (1, count), generator=torch.Generator().manual_seed(setup.recipe.seed)
    )
    begin = torch.tensor(setup.begin[:count], dtype=torch.int64)
    ids[0, : len(begin)] = begin
    return ids


def _recover(run: Run, setup: Setup, windows: Windows, plan_folder: Path, report: dict[str, Any]) -> Path:
    from compress.language.recover import recover, training_windows

    folder = recover(run, setup, training_windows(run, setup, windows), plan_folder, len(windows.begin))
    facts = json.loads((folder / "recover.json").read_text())
    log = facts.pop("log")
    report["recover"] = {**facts, "first": log[0], "last": log[-1]}
    report["stages"] = run.stages()
    return folder


def _evaluate_unrecovered(
    run: Run, setup: Setup, windows: Windows, plan_folder: Path, report: dict[str, Any]
) -> None:
    """Perplexity of what was pruned and not yet trained, so that the report tells what training brought; with its
    weights as they would be, had it been saved."""
    from compress.language.evaluate import geometric_mean
    from compress.language.plan import Plan

    def build(folder: Path | None) -> None:
        texts = perplexities(setup.as_saved(Plan.load(plan_folder)), windows, "perplexity before recovery")
        if folder is not None:
            (folder / "evaluation.json").write_text(json.dumps({"texts": texts}, indent=1))

    inputs = {"version": __version__, "text": held_out(windows), "plan": seal_hash(plan_folder), **_rounding(setup)}
    stage = run.stage_together("evaluation-unrecovered", inputs, build)
    texts = json.loads((stage / "evaluation.json").read_text())["texts"]
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
            ragged = layout == "per-layer"
            save_model(
                sliced if ragged else masked,
                setup.family,
                counts if ragged else None,
                folder,
                tokenizer=setup.tokenizer,
                dtype=setup.stored_dtype,
                tokens=tokens,
            )
            found = {"layout": layout, "masked_difference": difference, **verify_clean(folder)}
            (folder / "verified.json").write_text(json.dumps(found, indent=1) + "\n")

        name = "model" if layout == "per-layer" else f"model-{layout}"
        inputs = {"version": __version__, "weights": setup.weights, "plan": seal_hash(plan_folder), "layout": layout}
        saved[layout] = run.stage(name, inputs, build)
        report["verify"]["layouts"].append(json.loads((saved[layout] / "verified.json").read_text()))
    return saved


def _sliced(setup: Setup, saved: Mapping[str, Path], plan_folder: Path) -> Any:
    """The sliced model, of the weights that were saved."""
    from compress.language.plan import Plan

    if "per-layer" in saved:
        return setup.load(saved["per-layer"])
    # At full shape there are zeros where the plan has nothing: what is left of the saved weights without them.
    model = setup.load(saved["padded"])
    Plan(Plan.load(plan_folder).blocks, {}).apply(model, setup.family)
    return model


def perplexities(model: Any, windows: Windows, label: str) -> dict[str, dict[str, float | int]]:
    """What `compress.language.evaluate.perplexity` finds on each held-out text."""
    from compress.language.evaluate import perplexity

    begin = len(windows.begin)
    return {n: perplexity(model, ids, f"{label}, {n}", begin) for n, ids in windows.evaluation.items()}


def evaluate(
    run: Run,
    setup: Setup[Any],
    windows: Windows,
    saved: Mapping[str, Path],
    report: dict[str, Any],
    curve: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
) -> None:
    """Measures the dense and the saved model; ``curve`` measures others, given what decides a measurement."""
    from compress.language.evaluate import geometric_mean, harness_tasks

    tasks = setup.recipe.evaluation.tasks

    def measure(folder: Path | None, load: Callable[[], Any], label: str, source: Path) -> None:
        model = load()
        found: dict[str, Any] = {"texts": perplexities(model, windows, f"perplexity, {label}")}
        if folder is not None:
            found["tasks"] = harness_tasks(source, tasks) if tasks else []
            (folder / "evaluation.json").write_text(json.dumps(found, indent=1))

    common = {"version": __version__, "text": held_out(windows), "tasks": tasks}
    layout, folder = next(iter(saved.items()))
    results = {}
    for label, load, source, inputs in (
        ("dense", lambda: setup.model, setup.resolved.folder, {"weights": setup.weights}),
        ("pruned", lambda: setup.load(folder), folder, {"model": seal_hash(folder)}),
    ):
        stage = run.stage_together(
            f"evaluation-{label}",
            {**common, **inputs},
            lambda f, load=load, label=label, source=source: measure(f, load, label, source),  # type: ignore[misc]
        )
        results[label] = json.loads((stage / "evaluation.json").read_text())
    dense, pruned = results["dense"]["texts"], results["pruned"]["texts"]
    report["quality"] = {
        "texts": [
            {
                "name": name,
                "windows": len(windows.evaluation[name]),
                "length": windows.evaluation[name].shape[1],
                "sha256": text_hash(windows.evaluation[name]),
                "dense_ppl": dense[name]["ppl"],
                "pruned_ppl": pruned[name]["ppl"],
            }
            for name in windows.evaluation
        ],
        "geometric_mean": {
            "dense": geometric_mean([v["ppl"] for v in dense.values()]),
            "pruned": geometric_mean([v["ppl"] for v in pruned.values()]),
        },
        "tasks": [
            {"task": d["task"], "metric": d["metric"], "dense": d["value"], "pruned": p["value"]}
            for d, p in zip(results["dense"]["tasks"], results["pruned"]["tasks"], strict=True)
        ],
        "layout": layout,
        "curve": curve(common),
    }
    report["stages"] = run.stages()


def held_out(windows: Windows) -> dict[str, str]:
    """A hash of every text that is evaluated on."""
    return {n: text_hash(w) for n, w in windows.evaluation.items()}


def text_hash(windows: Tensor) -> str:
    """The first 16 digits of the SHA-256 of token windows (n, length) int64."""
    import hashlib

    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]


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
            (folder / "curve.json").write_text(json.dumps(points, indent=1))

    inputs = {
        **{k: v for k, v in common.items() if k != "tasks"},
        "singles": seal_hash(run.folder / "singles-1"),
        "sparsities": setup.recipe.evaluation.curve,
        **_rounding(setup),
    }
    points: list[dict[str, Any]] = json.loads((run.stage_together("curve", inputs, build) / "curve.json").read_text())
    return points


def _rounding(setup: Setup) -> dict[str, str]:
    """What decides, beside the plan, the weights of `Setup.as_saved`."""
    stored = str(setup.stored_dtype).removeprefix("torch.")
    return {"stored": stored} if stored != "float32" else {}


def export(
    run: Run, setup: Setup[Any], pruned: Callable[[], Any], saved: Path, report: dict[str, Any]
) -> dict[str, Path]:
    """Exports the dense model and the one that ``pruned`` makes of the weights in the sealed folder ``saved``."""
    from compress.exporters.check import write_checked
    from compress.models.streaming import on_cpu

    assert setup.recipe.export is not None  # asked by the caller
    spec = setup.recipe.export
    vocab = setup.geometry.vocab
    common = {"version": __version__, "weights": setup.weights, "export": spec.model_dump(mode="json")}
    folders = {
        "dense": run.stage(
            "export-dense", common, lambda f: write_checked(on_cpu(setup.model), setup.tokenizer, f, spec, vocab)
        ),
        "pruned": run.stage(
            "export-pruned",
            {**common, "model": seal_hash(saved)},
            lambda f: write_checked(on_cpu(pruned()), setup.tokenizer, f, spec, vocab),
        ),
    }
    facts = {label: json.loads((folder / "export.json").read_text()) for label, folder in folders.items()}
    report["export"] = {"onnx": {label: fact for label, fact in facts.items()}}
    report["export"]["onnx"]["size_ratio"] = sum(facts["pruned"]["bytes"].values()) / sum(
        facts["dense"]["bytes"].values()
    )
    report["stages"] = run.stages()
    return folders


def bench(
    run: Run,
    setup: Setup[Any],
    exported: Mapping[str, Path],
    models: Mapping[str, Callable[[], Any]],
    report: dict[str, Any],
) -> None:
    """Latency here and on the recipe's targets; ``models`` make the torch modules of ``exported``."""
    from compress.exporters.stages import on_targets

    if setup.recipe.bench is not None:
        _bench(run, setup, exported, report)
    on_targets(run, setup.recipe.targets, exported, models, report)


def _bench(run: Run, setup: Setup[Any], exported: Mapping[str, Path], report: dict[str, Any]) -> None:
    from compress.exporters.bench.explain import why
    from compress.exporters.bench.local import LOCAL, compare_llm

    spec = setup.recipe.bench
    assert spec is not None  # asked by the caller
    inputs = {
        "version": __version__,
        "bench": spec.model_dump(mode="json"),
        **{label: seal_hash(folder) for label, folder in exported.items()},
    }

    def build(folder: Path) -> None:
        found = compare_llm(exported["dense"], exported["pruned"], spec.model_dump(), setup.geometry.vocab)
        if found["dense"]["bytes"] != found["pruned"]["bytes"]:  # zeros alone change no layer's work
            found["why"] = why(exported["dense"], exported["pruned"], spec.model_dump(), LOCAL)
        (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n")

    report["bench"] = json.loads((run.stage("bench", inputs, build) / "bench.json").read_text())
    report["stages"] = run.stages()


def release(run: Run, setup: Setup[Any], saved: Mapping[str, Path], report: dict[str, Any]) -> dict[str, Any]:
    """The folder to publish: the saved model, its ONNX files, the report, the plots and the card.

    Returns:
        The report as it was sealed, by this run or an earlier one.
    """
    from compress.report.build import finish, read_report, write_release

    report["commands"] = commands(setup, run.folder, report["command"])
    finish(report)

    def build(folder: Path) -> None:
        for path in next(iter(saved.values())).rglob("*"):
            if path.is_file() and path.name != "seal.json":
                link(path, folder / path.relative_to(next(iter(saved.values()))))
        if "export" in report:
            (folder / "onnx").mkdir()
            for name in report["export"]["onnx"]["pruned"]["bytes"]:
                link(run.folder / "export-pruned" / name, folder / "onnx" / name)
        write_release(report, folder, module_of(report["recipe"]).card)

    # Clock readings, and where the dense model lay, are part of the report, not of what decides whether it is the same
    # release.
    told = ("stages", "command", "commands", "environment", "sha256", "origin")
    facts = {k: v for k, v in report.items() if k not in told}
    return read_report(run.stage("release", {"version": __version__, "report": fingerprint(facts)}, build))


def card(report: dict[str, Any], folder: Path) -> Path:
    from compress.report.card import write_card
    from compress.report.plots import draw

    return write_card(report, folder, draw(report, folder / "plots"))


def commands(setup: Setup[Any], folder: Path, prune_command: str) -> dict[str, str]:
    """The commands that make each number of the report again."""
    there = shlex.quote(str(folder))
    return {
        "prune": prune_command,
        "eval": f"compress eval {there}/model --like {there}",
        "export": f"compress export {there}/model --out onnx",
        **(
            {"bench": f"compress bench {there}/export-dense {there}/export-pruned"}
            if setup.recipe.export is not None
            else {}
        ),
        "verify": f"compress verify {there}",
        "card": f"compress card {there}",
        **(
            {"unrecovered": f"{prune_command} --set recover=null --out {there}-unrecovered"}
            if getattr(setup.recipe, "recover", None) is not None
            else {}
        ),
    }
