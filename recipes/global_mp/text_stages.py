"""A language model with zeros in place: the stages of Global MP, from the masks to the card.

The shapes stay as they were, so every program that loads the dense model loads this one. What the zeros are good for is
said as it is measured: fewer non-zeros and a smaller packed form, and the latency that was found, not one hoped for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import CompressError
from compress.language.quantised import quantise
from compress.language.setup import Setup, Windows, prepare
from compress.language.stages import bench, evaluate, export, fixed_tokens, perplexities, release
from compress.language.whole import whole
from compress.report.rows import VERSION, rows
from compress.report.rows import lines as figure_lines
from compress.run.folder import Run, read_seal, seal_hash
from compress.schema.recipe import TextRecipe
from compress.schema.stages import STAGES
from compress.words.wording import small

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AMOUNT", "SHARED", "card", "forecast", "forecast_lines", "lines", "prepare", "stages"]

LAYOUT = "masked"


AMOUNT: str = "sparsity"
SHARED: frozenset[str] = frozenset({"text", "evaluation-dense", "export-dense"})


def stages(run: Run, setup: Setup[TextRecipe], until: str, command: str) -> dict[str, Any]:
    """The stages up to ``until``; returns the report."""
    from compress.language.stages import describe_model
    from compress.models.reading import load_model

    recipe, last = setup.recipe, STAGES.index(until)
    shapes = _shapes(setup)
    report: dict[str, Any] = {"schema_version": VERSION}
    windows = _read_texts(run, setup)
    plan = _plan(run, setup, shapes)
    describe_model(report, setup, command)
    _describe(report, setup, shapes, plan)
    report["stages"] = run.stages()
    if last >= STAGES.index("model"):
        saved = {LAYOUT: _assemble(run, setup, shapes, plan, report)}
        whole(run, setup, saved[LAYOUT], report)
    if last >= STAGES.index("evaluation"):
        evaluate(run, setup, windows, saved, report, lambda common: _curve(run, setup, shapes, windows, common))
    exported: dict[str, Path] = {}
    makers = {"dense": lambda: setup.model, "pruned": lambda: load_model(saved[LAYOUT], setup.family)}
    if last >= STAGES.index("export") and recipe.export is not None:
        exported = export(run, setup, makers["pruned"], saved[LAYOUT], report)
        if last >= STAGES.index("bench"):
            bench(run, setup, exported, makers, report)
    if last >= STAGES.index("quantise") and recipe.quantise is not None:
        quantise(run, setup, windows, saved[LAYOUT], exported, makers, report)
    if last >= STAGES.index("release"):
        return release(run, setup, saved, report, card)
    return report


def _shapes(setup: Setup[TextRecipe]) -> dict[str, list[int]]:
    """The prunable layers, and whether what is asked of them can be done, before any weight is read."""
    from compress.models.reading import weight_files
    from compress.recipes.global_mp.prune import budget, language_layers

    shapes = language_layers(setup.config, weight_files(setup.resolved.folder), setup.recipe.options)
    for sparsity in (setup.recipe.sparsity, *_others(setup.recipe)):
        budget(shapes, sparsity, setup.recipe.options)
    return shapes


def _others(recipe: TextRecipe) -> list[float]:
    """The sparsities of the curve, rising; a pattern has but one."""
    return sorted(recipe.evaluation.curve) if recipe.options.pattern == "unstructured" else []


def _read_texts(run: Run, setup: Setup[TextRecipe]) -> Windows:
    """The held-out windows, sealed in the run, so that a resumed run and `compress eval --like` see the same."""
    import torch

    from compress.data.text import held_out_of, held_out_tensors, keep_windows, kept_windows, packing_inputs
    from compress.models.reading import check_weights

    spec = setup.recipe.evaluation

    def build(folder: Path) -> None:
        check_weights(setup.resolved.folder)  # a fault in the weights is to be found before anything is sealed for them
        texts = held_out_tensors(spec.texts, setup.tokenizer, spec.windows, spec.length)
        keep_windows(texts, setup.begin, folder / "windows.safetensors")

    inputs = {
        "version": __version__,
        "weights": setup.weights,
        "evaluation": spec.model_dump(mode="json", exclude_none=True, exclude={"tasks", "curve"}),
        **packing_inputs(setup.tokenizer, setup.recipe.dialogues()),
    }
    tensors, begin = kept_windows(run.stage("text", inputs, build) / "windows.safetensors")
    none = torch.zeros(0, spec.length, dtype=torch.int64)
    held_out = held_out_of(tensors, [text.name for text in spec.texts])
    return Windows(
        none,
        none,
        {name: packed.ids for name, packed in held_out.items()},
        begin=begin,
        own={name: packed.scored for name, packed in held_out.items() if packed.scored is not None},
    )


def _plan(run: Run, setup: Setup[TextRecipe], shapes: Mapping[str, list[int]]) -> Path:
    from compress.models.reading import weight_files
    from compress.recipes.global_mp.prune import write_plan

    options, sparsity = setup.recipe.options, setup.recipe.sparsity
    inputs = {
        "version": __version__,
        "weights": setup.weights,
        "sparsity": sparsity,
        "options": options.model_dump(mode="json"),
    }
    files = weight_files(setup.resolved.folder)
    return run.stage("plan", inputs, lambda f: write_plan(f, files, shapes, sparsity, options, setup.weights))


def _assemble(
    run: Run, setup: Setup[TextRecipe], shapes: Mapping[str, list[int]], plan: Path, report: dict[str, Any]
) -> Path:
    """Saves the model with zeros in place; sealed only when a clean process has given the masked model's logits."""
    from compress.language.checkpoint import verify_clean
    from compress.models.reading import weight_files
    from compress.recipes.global_mp.packed import pack_folder
    from compress.recipes.global_mp.prune import MASKS, read_masks, write_masked

    source = setup.resolved.folder
    files = weight_files(source)

    def build(folder: Path) -> None:
        masks = read_masks(plan, setup.weights, shapes)
        nonzero = write_masked(files, masks, folder, setup.recipe.options.pattern)
        _copy_beside(source, folder)
        shutil.copyfile(plan / MASKS, folder / MASKS)
        _write_fingerprint(setup, masks, folder)
        found = {"layout": LAYOUT, **verify_clean(folder)}
        (folder / "verified.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (folder / "nonzero.json").write_text(json.dumps(nonzero, indent=1) + "\n", encoding="utf-8")

    inputs = {"version": __version__, "weights": setup.weights, "plan": seal_hash(plan), "layout": LAYOUT}
    model = run.stage("model", inputs, build)

    def pack(folder: Path) -> None:
        pack_folder(model, folder, weight_files(model))
        _check_packed(folder, weight_files(model))

    packed = run.stage("packed", {"version": __version__, "model": seal_hash(model)}, pack)
    report["verify"] = {"layouts": [json.loads((model / "verified.json").read_text("utf-8"))]}
    _describe_saved(report, setup, model, packed)
    report["stages"] = run.stages()
    return model


def _copy_beside(source: Path, folder: Path) -> None:
    """Everything a model folder needs beside its weights: config, tokenizer, index of the shards."""
    from compress.models.sources import FILES

    for pattern in FILES:
        for path in source.glob(pattern):
            if path.suffix != ".safetensors" and path.name != "dequantised.json":
                shutil.copyfile(path, folder / path.name)


def _write_fingerprint(setup: Setup[TextRecipe], masks: Mapping[str, Tensor], folder: Path) -> None:
    """The logits that the saved model must give: those of the dense one, masked in memory."""
    import torch
    from safetensors.torch import save_file

    from compress.language.checkpoint import FINGERPRINT
    from compress.models.reading import load_model
    from compress.recipes.global_mp.prune import apply_in_place

    model = load_model(setup.resolved.folder, setup.family)
    apply_in_place(model, masks)
    tokens = fixed_tokens(setup)
    with torch.no_grad():
        logits = model(tokens).logits.float()
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / FINGERPRINT)


def _check_packed(folder: Path, files: list[Path]) -> None:
    """Raises CompressError where the packed form does not give back the saved tensors bit for bit."""
    import tempfile

    from compress.recipes.global_mp.magnitude import safetensors_source
    from compress.recipes.global_mp.masks import weights_sha
    from compress.recipes.global_mp.packed import SUFFIX, unpack_file

    for path in files:
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            back = Path(beside) / path.name
            unpack_file(folder / f"{path.stem}{SUFFIX}", back)
            want, got = (weights_sha(safetensors_source([p], lambda _: True)) for p in (path, back))
        if want != got:
            raise CompressError(
                "the packed form does not give the model back", where=path.name, fix="this is a fault of compress"
            )


def _curve(
    run: Run,
    setup: Setup[TextRecipe],
    shapes: Mapping[str, list[int]],
    windows: Windows,
    common: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Perplexity at other sparsities: ``{"pruned_share", "texts": {name: perplexity}}`` each, from the smallest on."""
    from compress.models.reading import load_model, weight_files
    from compress.recipes.global_mp.floors import target_count
    from compress.recipes.global_mp.magnitude import safetensors_source
    from compress.recipes.global_mp.prune import apply_in_place, budget, cuts_of

    options = setup.recipe.options
    sparsities = _others(setup.recipe)
    if not sparsities:
        return []
    files, total = weight_files(setup.resolved.folder), sum(prod(shape) for shape in shapes.values())

    def build(folder: Path | None) -> None:
        points = []
        # The masks of a larger sparsity hold those of a smaller one: one model is pruned further and further.
        model = load_model(setup.resolved.folder, setup.family)
        for sparsity in sparsities:
            prune, floors = budget(shapes, sparsity, options)
            cuts = cuts_of(files, floors, prune, f"threshold at {100 * sparsity:g} %, layers")
            for name, weight in safetensors_source(files, shapes)():
                apply_in_place(model, {name: cuts[name].mask(weight)})
            label = f"perplexity at {100 * sparsity:g} %"
            texts = {n: p["ppl"] for n, p in perplexities(model, windows, label).items()}
            points.append({"pruned_share": target_count(sparsity, total) / total, "texts": texts})
        if folder is not None:
            (folder / "curve.json").write_text(json.dumps(points, indent=1), encoding="utf-8")

    inputs = {
        **{k: v for k, v in common.items() if k != "tasks"},
        "weights": setup.weights,
        "options": options.model_dump(mode="json"),
        "sparsities": sparsities,
    }
    points: list[dict[str, Any]] = json.loads(
        (run.stage_together("curve", inputs, build) / "curve.json").read_text("utf-8")
    )
    return points


def _describe(report: dict[str, Any], setup: Setup[TextRecipe], shapes: Mapping[str, list[int]], plan: Path) -> None:
    """What the plan decides: sizes and layers."""
    facts = json.loads((plan / "plan.json").read_text("utf-8"))
    prunable, pruned, total = sum(prod(s) for s in shapes.values()), facts["pruned"], setup.costs.total
    report["size"] = {
        "asked": setup.recipe.sparsity,
        "pruned_share": pruned / prunable,
        "total_share": pruned / total,
        "pattern": facts["pattern"],
        "threshold": facts["threshold"],
        "prunable_weights": prunable,
        "pruned_weights": pruned,
        "total_parameters": total,
    }
    report["layers"] = [
        {
            "name": row["name"],
            "weights": prod(row["shape"]),
            "pruned": row["pruned"],
            "floor": row["floor"],
            "held_by_floor": 0 < row["floor"] == prod(row["shape"]) - row["pruned"],
        }
        for row in facts["layers"]
    ]


def _describe_saved(report: dict[str, Any], setup: Setup[TextRecipe], model: Path, packed: Path) -> None:
    """What the saved files hold: non-zeros (counted in them), bytes, and FLOPs a token."""
    from compress.models.reading import weight_files
    from compress.recipes.global_mp.packed import SUFFIX
    from compress.recipes.global_mp.prune import shapes_of

    counts: dict[str, tuple[int, int]] = json.loads((model / "nonzero.json").read_text("utf-8"))
    dense, nonzero = ({name: pair[i] for name, pair in counts.items()} for i in (0, 1))
    for row in report["layers"]:
        row["nonzero"] = nonzero[row["name"]]
    # A token uses every weight of a matrix once. Embeddings are looked up, unless the output layer is the same matrix;
    # what attention does with the cache has no weights.
    matrices = {
        name: prod(shape)
        for name, shape in shapes_of(weight_files(model)).items()
        if len(shape) == 2 and ("embed" not in name or setup.geometry.tied)
    }
    report["size"] |= {
        "nonzero_weights": sum(row["nonzero"] for row in report["layers"]),
        "nonzero_parameters": sum(nonzero.values()),
        "dense_nonzero_weights": sum(dense[row["name"]] for row in report["layers"]),
        "dense_nonzero_parameters": sum(dense.values()),
        "flops_per_token": {
            "dense": 2 * sum(matrices.values()),
            "sparse": 2 * sum(nonzero[name] for name in matrices),
        },
        "bytes": {
            "dense": sum(path.stat().st_size for path in weight_files(setup.resolved.folder)),
            "saved": sum(path.stat().st_size for path in weight_files(model)),
            "packed": sum(f["bytes"] for name, f in read_seal(packed)["files"].items() if name.endswith(SUFFIX)),
        },
    }


def card(report: dict[str, Any], folder: Path) -> Path:
    """Draws the plots and writes the card."""
    from compress.recipes.global_mp.card import write_card

    return write_card(report, folder)


def lines(report: dict[str, Any]) -> list[str]:
    """What the command line says of a run."""
    from compress.report.build import run_line
    from compress.report.multimodal import lines as whole_lines
    from compress.report.quantised import lines as quantised_lines

    size = report["size"]
    said = [
        f"pruned   {size['pruned_weights']:,} of {size['prunable_weights']:,} weights of {len(report['layers'])} layers"
        f" ({100 * size['pruned_share']:.2f} %), {100 * size['total_share']:.2f} % of all parameters"
    ]
    held = [row["name"] for row in report["layers"] if row["held_by_floor"]]
    if held:
        said.append(f"floors   {len(held)} layers are held at theirs, such as {held[0]}")
    if "bytes" in size:
        flops = size["flops_per_token"]
        said.append(
            f"size     {size['bytes']['dense'] / 1e6:.1f} MB dense, {size['bytes']['packed'] / 1e6:.1f} MB packed"
            f" ({size['bytes']['packed'] / size['bytes']['dense']:.3f})"
        )
        said.append(f"flops    {flops['dense'] / 1e6:.1f} M a token dense, {flops['sparse'] / 1e6:.1f} M without zeros")
    for layout in report.get("verify", {}).get("layouts", ()):
        said.append(
            f"reloaded in a clean process as {layout['class']}: logits differ by"
            f" {small(layout['max_logit_difference'])} (allowed {small(layout['tolerance'])})"
        )
    said += whole_lines(report)
    if "export" in report:
        pruned = report["export"]["onnx"]["pruned"]
        said.append(f"onnx     outputs agree with torch to {small(pruned['largest_difference'])}")
    said += figure_lines(rows(report))
    said += [*quantised_lines(report), run_line(report)]
    return said


def forecast(model: str, recipe: TextRecipe, on: str = "this-machine") -> dict[str, Any]:
    """What `prune` would do, without reading a weight: layers, budget, floors, disk, memory, time."""
    import torch

    from compress.recipes.global_mp.prune import budget
    from compress.run.forecast import load_fit
    from compress.run.machines import speed as measured_speed

    setup = prepare(model, recipe)
    shapes = _shapes(setup)
    prune, floors = budget(shapes, recipe.sparsity, recipe.options)
    prunable, spec = sum(prod(shape) for shape in shapes.values()), recipe.evaluation
    tokens = len(spec.texts) * spec.windows * spec.length
    models = 2 + len(_others(recipe))
    speed = measured_speed(torch.device("cpu"), torch.float32)
    once = 2 * (setup.costs.backbone + setup.geometry.vocab * setup.geometry.hidden)
    size = setup.stored_dtype.itemsize
    return {
        "method": recipe.method,
        "model": setup.resolved.name,
        "source": setup.resolved.source,
        "family": setup.family.name,
        "layers": len(shapes),
        "prunable_weights": prunable,
        "total_parameters": setup.costs.total,
        "remove": prune,
        "floors": sum(floors.values()),
        "disk_bytes": {
            "masks": -(-prunable // 8),
            "model": setup.costs.total * size,
            "packed": (setup.costs.total - prune) * size + -(-prunable // 8),
        },
        # Two models in float32, one of them masked, and a batch of logits in two types.
        "memory_bytes": load_fit().base + 8 * setup.costs.total + 2 * 4 * 4 * spec.length * setup.geometry.vocab,
        "seconds_estimated": {
            "speed_gflops": round(speed / 1e9, 1),
            "evaluation": round(models * tokens * once / speed),
        },
        "loads_with": "everything that loads the dense model",
    }


def forecast_lines(facts: dict[str, Any]) -> list[str]:
    """What `compress plan` says."""
    disk, time = facts["disk_bytes"], facts["seconds_estimated"]
    return [
        f"model    {facts['model']} ({facts['family']}): {facts['total_parameters']:,} parameters",
        f"source   {facts['source']}",
        f"budget   prune {facts['remove']:,} of {facts['prunable_weights']:,} weights of {facts['layers']} layers;"
        f" the floors keep at least {facts['floors']:,}",
        f"disk     masks {disk['masks'] / 1e6:.1f} MB, model {disk['model'] / 1e6:.1f} MB,"
        f" packed at most {disk['packed'] / 1e6:.1f} MB",
        f"memory   about {facts['memory_bytes'] / 1e9:.1f} GB",
        f"time     about {time['evaluation']} s of evaluation, at {time['speed_gflops']} GFLOP/s",
        f"loads    {facts['loads_with']}",
    ]
