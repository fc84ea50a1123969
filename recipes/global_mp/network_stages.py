"""A plain network under Global MP: the stages from the dense training to the card.

One-shot: train (or load), prune once, fine-tune under the mask. Gradual: prune a new network while it is trained; the
dense one is trained beside it, for comparison. FastGRNN may lose whole columns of its factors instead of single
weights. What zeros are good for is said as it is measured.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import CompressError, UsageError
from compress.networks.setup import (
    MASKS,
    WEIGHTS,
    NetworkSetup,
    check_data,
    dense_network,
    describe,
    evaluated,
    exported,
    loaded,
    measured,
    released,
    trained,
    write_model,
)
from compress.networks.setup import prepare as _prepare
from compress.report.rows import VERSION, better, qualities, rows
from compress.report.rows import lines as figure_lines
from compress.run.cache import tensors_sha
from compress.run.folder import Run, seal_hash
from compress.schema.sections import NetworkRecipe
from compress.schema.stages import STAGES
from compress.words.wording import small

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["AMOUNT", "SHARED", "card", "forecast", "forecast_lines", "lines", "prepare", "stages"]
AMOUNT: str = "sparsity"
SHARED: frozenset[str] = frozenset({"dense", "evaluation-dense", "export-dense"})


def prepare(model: str, recipe: NetworkRecipe) -> NetworkSetup:
    """Checks all that can be checked before data or weights are read."""
    options = recipe.options
    if (recipe.sparsity is None) == (options.ranks is None):
        raise UsageError(
            "say how much is to go" if recipe.sparsity is None else "both a sparsity and ranks are given",
            where="sparsity",
            fix="give either sparsity (a share of the weights) or, for FastGRNN, global-mp.ranks",
        )
    if options.ranks is not None and recipe.sweep:
        raise UsageError("a sweep is over sparsities, and ranks are given", where="sweep", fix="leave one of them out")
    if options.masks is not None and recipe.sweep:
        raise UsageError("a sweep makes masks, and masks are given", where="sweep", fix="leave one of them out")
    if options.schedule == "gradual" and recipe.train.epochs < 2:
        raise UsageError(
            "a gradual schedule needs at least two epochs of training", where="train.epochs", fix="train for longer"
        )
    return _prepare(model, recipe)


@dataclass(frozen=True)
class Sparse:
    """A pruned network: its sealed stage, its masks, every layer's floor, and the arguments that changed."""

    folder: Path
    masks: dict[str, Tensor]
    floors: dict[str, int]
    untrained: Path | None  # the stage with the weights as they were just after pruning (one-shot)
    changes: dict[str, int]


def stages(run: Run, setup: NetworkSetup, until: str, command: str) -> dict[str, Any]:
    """The stages up to ``until``; returns the report."""
    recipe, last = setup.recipe, STAGES.index(until)
    report: dict[str, Any] = {"schema_version": VERSION}
    _check(setup)
    dense = dense_network(run, setup)
    if recipe.options.ranks is not None:
        pruned = _columns(run, setup, dense)
    else:
        assert recipe.sparsity is not None  # asked by prepare
        pruned = _weights(run, setup, dense, recipe.sparsity, "")
    describe(report, setup, dense, command)
    _describe(report, setup, dense, pruned)
    report["stages"] = run.stages()

    def dense_model() -> nn.Module:
        return loaded(setup, dense)

    def pruned_model() -> nn.Module:
        return loaded(setup, pruned.folder, **pruned.changes)

    if last >= STAGES.index("model"):
        saved = _assemble(run, setup, dense, pruned, pruned_model, report)
    if last >= STAGES.index("evaluation"):
        _evaluate(run, setup, dense, pruned, report)
    if last >= STAGES.index("export") and recipe.export is not None:
        makers = {"dense": (dense, dense_model), "pruned": (pruned.folder, pruned_model)}
        folders = exported(run, setup, makers, report)
        if last >= STAGES.index("bench"):
            measured(run, setup, folders, makers, report)
    if last >= STAGES.index("release"):
        return released(run, saved, report, card)
    return report


def _check(setup: NetworkSetup) -> None:
    """What is asked of the network can be done, and its heads fit the data: found out before anything is trained."""
    from compress.data.inputs import first, mapped
    from compress.data.tasks import by_task
    from compress.exporters.onnx_module import refuse_untraceable
    from compress.networks.flops import count_flops
    from compress.networks.forward import (
        answer,
        check_branches,
        check_steady,
        check_trainable,
        depends_on_values,
    )
    from compress.networks.jobs import check_job
    from compress.networks.setup import real_inputs
    from compress.recipes.global_mp.fastgrnn import kept_columns
    from compress.recipes.global_mp.network import budget, prunable

    model, options = setup.build(), setup.recipe.options
    if options.ranks is not None:
        kept_columns(model, options.ranks)
    else:
        weights = prunable(model, options.skip)
        assert setup.recipe.sparsity is not None  # asked by prepare
        for sparsity in (setup.recipe.sparsity, *setup.recipe.sweep):
            budget(weights, sparsity, options)
    model.eval()
    if setup.job is not None:
        check_job(setup)
    place = next(model.parameters()).device
    x = mapped(real_inputs(setup, 2), lambda t: t.to(place))
    if setup.job is None:
        by_task(answer(model, x), setup.data.tasks)
        check_steady(model, x)
        if any(spec is not None and spec.epochs for spec in (setup.recipe.train, setup.recipe.finetune)):
            check_trainable(model, x)
    count_flops(model, first(x, 1))
    if setup.recipe.export is not None:  # a graph knows one branch
        check_branches(model, x)
        if depends_on_values(model, x):
            refuse_untraceable(model.cpu(), mapped(x, lambda t: t.cpu()), setup.output_names)


def _weights(run: Run, setup: NetworkSetup, dense: Path, sparsity: float, prefix: str) -> Sparse:
    """Prunes single weights, one-shot or gradual; the stages' names begin with ``prefix``."""
    from safetensors.torch import load_file

    from compress.recipes.global_mp.network import budget, gradual, increments, prunable

    recipe, options = setup.recipe, setup.recipe.options
    prune, floors = budget(prunable(setup.build(), options.skip), sparsity, options)
    asked = {"sparsity": sparsity, "options": options.model_dump(mode="json"), "dense": seal_hash(dense)}
    untrained = None
    if options.schedule == "gradual":
        spec = recipe.train
        per_epoch = math.ceil(len(setup.data.train) / spec.batch)
        steps = increments(prune, spec.epochs, per_epoch, options.until, options.shape)
        folder = trained(
            run, setup, f"{prefix}gradual", spec, setup.build, inputs=asked, remask=gradual(steps, floors, options.skip)
        )
        start, masks = folder, load_file(folder / MASKS)
        _plan(run, setup, f"{prefix}plan", asked, masks, floors, setup.build())
    else:
        model = loaded(setup, dense)
        plan = _plan(run, setup, f"{prefix}plan", asked, None, floors, model, prune)
        masks = _read_plan(plan)
        untrained = trained(run, setup, f"{prefix}cut", None, lambda: loaded(setup, dense), inputs=asked, masks=masks)
        start = folder = untrained
    if recipe.finetune is not None and recipe.finetune.epochs:
        folder = trained(
            run,
            setup,
            f"{prefix}finetuned",
            recipe.finetune,
            lambda: loaded(setup, start),
            inputs=asked,
            masks=masks,
            seed=1,
        )
    return Sparse(folder, masks, floors, untrained, {})


def _plan(
    run: Run,
    setup: NetworkSetup,
    name: str,
    asked: dict[str, Any],
    masks: dict[str, Tensor] | None,
    floors: dict[str, int],
    model: nn.Module,
    prune: int = 0,
) -> Path:
    """The masks, a bit a weight, and plan.json for people. Without ``masks`` they are made, or read from a file."""
    import torch

    from compress.recipes.global_mp.masks import load_masks, save_masks
    from compress.recipes.global_mp.network import masks_of, prunable

    options = setup.recipe.options

    def build(folder: Path) -> None:
        weights = {n: w.cpu() for n, w in prunable(model, options.skip).items()}
        owner = tensors_sha(weights)
        found = masks
        if found is None and options.masks is not None:
            found = load_masks(options.masks, owner, {n: tuple(w.shape) for n, w in weights.items()})
            pruned = sum(int(torch.count_nonzero(~m)) for m in found.values())
            if pruned != prune:
                raise CompressError(
                    f"the masks prune {pruned:,} weights, the sparsity asks for {prune:,}",
                    where=str(options.masks),
                    fix="give the sparsity that the masks were made for",
                )
        if found is None:
            found = masks_of(model, prune, floors, options.skip)
        save_masks(folder / MASKS, {n: m.cpu() for n, m in found.items()}, owner)
        rows: list[dict[str, Any]] = [
            {"name": n, "shape": list(m.shape), "pruned": int((~m).sum()), "floor": floors[n]} for n, m in found.items()
        ]
        facts = {"pruned": sum(r["pruned"] for r in rows), "weights": owner, "layers": rows}
        (folder / "plan.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    inputs = {**setup.inputs, **asked}
    if options.masks is not None:
        from compress.run.cache import sha256_of

        if not options.masks.is_file():
            raise CompressError("there is no mask file here", where=str(options.masks), fix="check the path")
        inputs["masks"] = sha256_of(options.masks)
    return run.stage(name, inputs, build)


def _read_plan(folder: Path) -> dict[str, Tensor]:
    from compress.recipes.global_mp.masks import load_masks

    return load_masks(folder / MASKS)


def _columns(run: Run, setup: NetworkSetup, dense: Path) -> Sparse:
    """Cuts columns out of FastGRNN's factors and trains the smaller cell."""
    from safetensors.torch import load_file, save_file

    from compress.recipes.global_mp.fastgrnn import cut, kept_columns

    ranks = dict(setup.recipe.options.ranks)
    model: Any = loaded(setup, dense)
    ranks = dict(zip(("r_W", "r_U"), model.ranks, strict=True)) | ranks
    asked = {"ranks": ranks, "dense": seal_hash(dense)}

    def build(folder: Path) -> None:
        kept = kept_columns(model, ranks)
        save_file(kept, folder / "columns.safetensors")
        (folder / "plan.json").write_text(
            json.dumps({k: v.tolist() for k, v in kept.items()}, indent=1) + "\n", encoding="utf-8"
        )

    plan = run.stage("plan", {**setup.inputs, **asked}, build)
    kept = load_file(plan / "columns.safetensors")

    def start() -> nn.Module:
        return cut(loaded(setup, dense), setup.build(**ranks), kept)

    untrained = trained(run, setup, "cut", None, start, inputs=asked, changes=ranks)
    folder = untrained
    if setup.recipe.finetune is not None and setup.recipe.finetune.epochs:
        folder = trained(
            run,
            setup,
            "finetuned",
            setup.recipe.finetune,
            lambda: loaded(setup, untrained, **ranks),
            inputs=asked,
            seed=1,
            changes=ranks,
        )
    return Sparse(folder, {}, {}, untrained, ranks)


def _describe(report: dict[str, Any], setup: NetworkSetup, dense: Path, pruned: Sparse) -> None:
    """Sizes and FLOPs, counted in the weights as they are saved."""
    import torch

    from compress.networks.flops import count_flops
    from compress.recipes.global_mp.network import left_facts, prunable

    sample = setup.sample(1)
    before, after = loaded(setup, dense).cpu(), loaded(setup, pruned.folder, **pruned.changes).cpu()
    was = {layer.name: layer for layer in count_flops(before, sample)}
    now = {layer.name: layer for layer in count_flops(after, sample)}
    own = {name: f"{name}.weight" if name else "weight" for name in was}
    named = _weight_names(before, own)
    total, left = (sum(w.numel() for w in prunable(m).values()) for m in (before, after))
    alive = sum(int(torch.count_nonzero(w)) for w in prunable(after).values())
    candidates = prunable(before, setup.recipe.options.skip)
    report["size"] = {
        "asked": setup.recipe.sparsity,
        "ranks": pruned.changes or None,
        "prunable_weights": sum(w.numel() for w in candidates.values()) if not pruned.changes else total,
        "pruned_weights": sum(int((~m).sum()) for m in pruned.masks.values()) if pruned.masks else total - left,
        "weights": {"dense": total, "pruned": left},
        "nonzero_weights": alive,
        "parameters": {
            "dense": sum(p.numel() for p in before.parameters()),
            "pruned": sum(p.numel() for p in after.parameters()),
        },
        "nonzero_parameters": sum(int(torch.count_nonzero(p)) for p in after.parameters()),
        "flops": {
            "dense": sum(layer.dense for layer in was.values()),
            "pruned": sum(layer.dense for layer in now.values()),
            "sparse": sum(layer.sparse for layer in now.values()),
        },
    }
    size = report["size"]
    size["pruned_share"] = size["pruned_weights"] / size["prunable_weights"]
    report["layers"] = [
        {
            "name": own[name],
            **({"tied_to": named[name]} if named[name] != own[name] else {}),
            "weights": was[name].weights,
            "nonzero": now[name].nonzero,
            "pruned": was[name].weights - now[name].nonzero,
            "floor": pruned.floors.get(named[name], 0),
            "flops": {"dense": was[name].dense, "sparse": now[name].sparse},
        }
        for name in was
    ]
    skip = setup.recipe.options.skip
    report["left_out"] = left_facts(before, skip, sample)
    total = report["left_out"]["weights"] + size["prunable_weights"]
    size["pruned_share_of_all"] = size["pruned_weights"] / total
    report["empty_layers"] = [row["name"] for row in report["layers"] if not row["nonzero"]]


def _weight_names(model: nn.Module, own: Mapping[str, str]) -> dict[str, str]:
    """Layer -> the name of its weight: the first one that the model has for it, where layers share one."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {layer: names.get(id(model.get_submodule(layer).weight), name) for layer, name in own.items()}


def _assemble(
    run: Run,
    setup: NetworkSetup,
    dense: Path,
    pruned: Sparse,
    make: Callable[[], nn.Module],
    report: dict[str, Any],
) -> Path:
    """The model folder, sealed only when a clean process has given the same outputs; and its packed form."""
    import torch

    from compress.recipes.global_mp.packed import SUFFIX, pack_file, unpack_file

    def build(folder: Path) -> None:
        model = make()
        parameters = dict(model.named_parameters())
        for name, mask in pruned.masks.items():
            if torch.count_nonzero(parameters[name].detach().cpu()[~mask.cpu()]):
                raise CompressError(
                    f"masked weights of {name} are not zero", where="training", fix="this is a fault of compress"
                )
        write_model(setup, model, folder, **pruned.changes)
        if pruned.masks:
            plan = run.folder / "plan"
            shutil.copyfile(plan / MASKS, folder / MASKS)

    inputs = {"version": __version__, "pruned": seal_hash(pruned.folder), "data": setup.data_sha256}
    folder = run.stage("model", inputs, build)

    def pack(out: Path) -> None:
        from compress.run.cache import sha256_of

        name = WEIGHTS.removesuffix(".safetensors") + SUFFIX
        pack_file(folder / WEIGHTS, out / name)
        back = out / "back"
        unpack_file(out / name, back)
        if sha256_of(back) != sha256_of(folder / WEIGHTS):
            raise CompressError(
                "the packed form does not give the weights back", where=name, fix="this is a fault of compress"
            )
        back.unlink()

    packed = run.stage("packed", {"version": __version__, "model": seal_hash(folder)}, pack)
    verified = json.loads((folder / "verified.json").read_text("utf-8"))
    report["verify"] = {"layouts": [{"layout": "network", **verified}]}
    report["size"]["bytes"] = {
        "dense": (dense / WEIGHTS).stat().st_size,
        "saved": (folder / WEIGHTS).stat().st_size,
        "packed": next(packed.glob(f"*{SUFFIX}")).stat().st_size,
    }
    report["stages"] = run.stages()
    return folder


def _evaluate(run: Run, setup: NetworkSetup, dense: Path, pruned: Sparse, report: dict[str, Any]) -> None:
    """Dense, just pruned, and trained under the mask, on the test split; the same at every sparsity of the sweep."""
    before = evaluated(run, setup, "evaluation-dense", dense, lambda: loaded(setup, dense))
    after = evaluated(
        run, setup, "evaluation-pruned", pruned.folder, lambda: loaded(setup, pruned.folder, **pruned.changes)
    )
    cut = None
    if pruned.untrained is not None and pruned.untrained != pruned.folder:
        there = pruned.untrained
        cut = evaluated(run, setup, "evaluation-cut", there, lambda: loaded(setup, there, **pruned.changes))
    tasks = {t.name: t for t in setup.tasks}
    report["quality"] = {
        "tasks": [
            {
                "task": task,
                "metric": metric,
                "main": metric == tasks[task].metric,
                "higher_is_better": better(metric, tasks[task].higher_is_better) == "higher",
                **({"samples": int(figures["samples"])} if setup.job is None else {}),
                "dense": figures[metric],
                "pruned": after[task][metric],
                "before_training": cut[task][metric] if cut is not None else None,
            }
            for task, figures in before.items()
            for metric in figures
            if metric != "samples"
        ],
        "curve": [],
    }
    for sparsity in sorted(set(setup.recipe.sweep)):
        prefix = f"sweep/{100 * sparsity:g}-"
        point = _weights(run, setup, dense, sparsity, prefix)
        figures = evaluated(
            run,
            setup,
            f"{prefix}evaluation",
            point.folder,
            lambda p=point: loaded(setup, p.folder),  # type: ignore[misc]
        )
        count = sum(m.numel() for m in point.masks.values())
        report["quality"]["curve"].append(
            {
                "sparsity": sum(int((~m).sum()) for m in point.masks.values()) / count,
                "empty_layers": [n for n, m in point.masks.items() if not bool(m.any())],
                "tasks": figures,
            }
        )
    report["training"] = {
        "dense": json.loads((dense / "training.json").read_text("utf-8")),
        "pruned": json.loads((pruned.folder / "training.json").read_text("utf-8")),
    }
    report["stages"] = run.stages()


def card(report: dict[str, Any], folder: Path) -> Path:
    """Draws the plots and writes the card."""
    from compress.recipes.global_mp.network_card import write_network_card

    return write_network_card(report, folder)


def lines(report: dict[str, Any]) -> list[str]:
    """What the command line says of a finished run."""
    from compress.recipes.global_mp.network import left_line
    from compress.report.build import export_lines, run_line

    size = report["size"]
    flops, left = size["flops"], report.get("left_out") or {"weights": 0, "flops": 0}
    found = [
        f"pruned   {size['pruned_weights']:,} of {size['prunable_weights']:,} weights"
        f" ({100 * size['pruned_share']:.2f} %)"
        + (f"; ranks {size['ranks']['r_W']} / {size['ranks']['r_U']}" if size["ranks"] else ""),
        *(
            [f"left out {left_line(left)}; of all weights {100 * size['pruned_share_of_all']:.2f} % are pruned"]
            if left["weights"]
            else []
        ),
        f"flops    {flops['dense']:,} -> {flops['sparse']:,} a sample, zeros left out"
        f" ({100 * (1 - flops['sparse'] / flops['dense']):.1f} % fewer)"
        + (f"; {left['flops']:,} more of what is left out" if left["flops"] else ""),
    ]
    if report["empty_layers"]:
        found.append(f"warning  {len(report['empty_layers'])} layers are empty, such as {report['empty_layers'][0]}")
    if "bytes" in size:
        b = size["bytes"]
        found.append(
            f"disk     {b['dense']:,} -> {b['packed']:,} bytes packed ({b['packed'] / b['dense']:.2f} of dense)"
        )
    for layout in report.get("verify", {}).get("layouts", ()):
        found.append(
            f"reloaded in a clean process: outputs differ by {small(layout['max_logit_difference'])}"
            f" (allowed {small(layout['tolerance'])})"
        )
    measured = rows(report)
    for point in report.get("quality", {}).get("curve", ()):
        for row in qualities(measured):
            if row.main:
                value = point["tasks"][row.task][row.metric]
                found.append(f"sweep    {100 * point['sparsity']:.2f} %: {row.metric} {row.task} {value:.4f}")
    return [*found, *export_lines(report), *figure_lines(measured), run_line(report)]


def forecast(model: str, recipe: NetworkRecipe, on: str = "this-machine") -> dict[str, Any]:
    """What `prune` would do, without data or weights: layers, budget, floors, epochs."""
    import torch

    from compress.models.zoo import build
    from compress.networks.jobs import check_job, timed
    from compress.recipes.global_mp.fastgrnn import kept_columns
    from compress.recipes.global_mp.network import budget, left_facts, prunable

    setup = prepare(model, recipe)
    check_data(setup)
    recipe = setup.recipe
    if setup.job is not None:
        check_job(setup)
        network = setup.build()
    elif ".py:" in setup.network:
        network = build(setup.network, setup.given, recipe.seed)
    else:
        with torch.device("meta"):
            network = build(setup.network, setup.given)
    facts: dict[str, Any] = {
        "method": recipe.method,
        "task": recipe.task,
        "model": setup.resolved.name,
        "source": setup.resolved.source,
        "data": setup.title,
        "parameters": sum(p.numel() for p in network.parameters()),
        "epochs": {
            "dense": recipe.train.epochs,
            "gradual": recipe.train.epochs if recipe.options.schedule == "gradual" else 0,
            "finetune": recipe.finetune.epochs if recipe.finetune is not None else 0,
            "networks": 1 + len(set(recipe.sweep)),
        },
    }
    if setup.job is not None:
        networks, epochs = facts["epochs"]["networks"], facts["epochs"]["finetune"]
        counts = {"calibrate": 2, "evaluate": 1 + networks + (epochs > 0), "train": epochs * networks}
        facts["job"] = {"seconds": timed(setup), "calls": {role: [n, n] for role, n in counts.items()}}
    if recipe.options.ranks is not None:
        if ".py:" not in setup.network:
            network = build(setup.network, setup.given)
        kept_columns(network, recipe.options.ranks)
        return {**facts, "ranks": dict(recipe.options.ranks)}
    weights = prunable(network, recipe.options.skip)
    prune, floors = budget(weights, float(recipe.sparsity or 0), recipe.options)
    return {
        **facts,
        "prunable_weights": sum(w.numel() for w in weights.values()),
        "prune": prune,
        "layers": [{"name": n, "shape": list(w.shape), "floor": floors[n]} for n, w in weights.items()],
        "left_out": left_facts(network, recipe.options.skip),
    }


def forecast_lines(facts: dict[str, Any]) -> list[str]:
    from compress.networks.jobs import timed_lines
    from compress.recipes.global_mp.network import left_line

    epochs = facts["epochs"]
    found = [f"model    {facts['model']}: {facts['parameters']:,} parameters; {facts['source']}"]
    if "ranks" in facts:
        found.append(
            "budget   columns of the factors until " + ", ".join(f"{k} is {v}" for k, v in facts["ranks"].items())
        )
    else:
        held = sum(layer["floor"] for layer in facts["layers"])
        found += [
            f"budget   prune {facts['prune']:,} of {facts['prunable_weights']:,} weights"
            f" in {len(facts['layers'])} layers",
            *([f"left out {left_line(facts['left_out'])}"] if facts["left_out"]["weights"] else []),
            f"floors   hold {held:,} weights" if held else "floors   none: a layer may be emptied",
        ]
    return [
        *found,
        f"data     {facts['data']}",
        *(timed_lines(facts["job"]) if "job" in facts else []),
        f"train    {epochs['dense']} epochs dense, {epochs['gradual']} gradual, {epochs['finetune']} after pruning;"
        f" {epochs['networks']} sparsities",
        "loads    torch, by compress.models.zoo; ONNX Runtime. Zeros make no dense kernel faster: latency is measured",
    ]
