"""What the verbs beside `prune` do: each takes paths, returns JSON-like facts, and raises CompressError."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import UsageError
from compress.schema.recipe import TEXT, load_recipe, recipe_names


def plan(model: str, recipe_name: str, overrides: Sequence[str], on: str = "this-machine") -> dict[str, Any]:
    """What `prune` would do, without reading a weight: shapes, budget, disk, memory, time, and what will load it.

    Args:
        on: the machine that is asked about; see `compress.run.machines`.
    """
    from compress.pipeline import METHODS, check, method_of

    recipe = load_recipe(recipe_name, METHODS, overrides)
    check(recipe)
    return method_of(recipe).forecast(model, recipe, on)


def evaluate(model: str, like: Path | None, **options: Any) -> dict[str, Any]:
    """What a saved model is worth: perplexity of a language model, accuracy of a network on a run's test split."""
    from compress.models.saved import find
    from compress.verbs.by_kind import call

    kind, folder = find(model)
    return call(kind, "evaluate", folder, like, **options)


def export(
    model: str, out: Path, builds: Sequence[Any] = (), inputs: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Exports a saved model to ONNX and checks it against torch; the folder appears only when every check passed.

    Args:
        out: see `compress.run.written.whole`; a place that cannot be written is said before anything is loaded.
        model: or an ONNX file, or a folder with an export.
        builds: `compress.exporters.formats.BuildOptions` of the formats to make beside it.
        inputs: of an ONNX file, an .npz file that what is built is compared on.
    """
    from compress.exporters.command import export_file, is_onnx
    from compress.models.saved import find
    from compress.run.written import whole
    from compress.verbs.by_kind import call

    for place in (Path(model), out):
        try:
            str(place.absolute()).encode()
        except UnicodeEncodeError as e:
            raise UsageError(
                "the name is not UTF-8, and no runtime opens another", where=str(place), fix="rename it"
            ) from e
    with whole(out) as made:
        kind, folder = ("onnx", Path(model)) if is_onnx(model) else find(model)
        if kind == "onnx":
            facts = export_file(folder, made, builds, inputs)
        elif inputs is not None:
            raise UsageError(
                "only an ONNX file is compared on given inputs; this model has its own held-out data",
                where="--inputs",
                fix="leave it out",
            )
        else:
            told = {"named": model} if kind == TEXT else {}
            facts = call(kind, "export", folder, made, builds=list(builds), **told, **options)
    return {"model": str(folder), "out": str(out), **facts}


def bench(dense: Path, pruned: Path, target: str | None = None, **options: Any) -> dict[str, Any]:
    """Latency of two export folders of one kind, interleaved; on a target, of what it runs."""
    from compress.models.saved import exported_kind
    from compress.verbs.by_kind import call

    if target is not None:
        from compress.exporters.on_target import bench as on_target

        return on_target(dense, pruned, target, options)

    return call(exported_kind((dense, pruned)), "bench", dense, pruned, **options)


def card(run: Path, out: Path | None) -> dict[str, Any]:
    """Writes the card and the plots of a finished run again, from its report.json."""
    from compress.pipeline import method_of
    from compress.report.build import of_report, read_report
    from compress.report.html import NAME, write_html
    from compress.run.written import refuse_replacing, written
    from compress.system.files import disk_errors

    report = read_report(run)
    folder = out if out is not None else Path(f"{run}-card")
    with written(folder, ("README.md", NAME), refuse_replacing) as beside, disk_errors(folder), of_report(run):
        write_html(report, method_of(report["recipe"]).card(report, beside), beside / NAME)
    return {"card": str(folder / "README.md"), "html": str(folder / NAME), "report": report["sha256"]}


def push(run: Path, repo: str, *, public: bool, replace: bool, network: str | None) -> dict[str, Any]:
    """Uploads a release with its card and report to the hub."""
    from compress.claims.hub import push as upload

    return dict(upload(run, repo, public=public, replace=replace, network=network))


def report_page(run: Path, out: Path) -> dict[str, Any]:
    """Writes the HTML report of a finished run to the file ``out``."""
    import tempfile

    from compress.pipeline import method_of
    from compress.report.build import of_report, read_report
    from compress.report.html import write_html
    from compress.run.written import refuse_replacing, written
    from compress.system.files import disk_errors

    report = read_report(run)
    if out.is_dir():
        raise UsageError("this is a folder", where=str(out), fix="name a file, such as report.html")
    with (
        written(out.parent, (out.name,), refuse_replacing) as beside,
        disk_errors(out),
        of_report(run),
        tempfile.TemporaryDirectory() as pictures,
    ):
        card = method_of(report["recipe"]).card(report, Path(pictures))
        write_html(report, card, beside / out.name)
    return {"html": str(out), "report": report["sha256"]}


def listing(what: str | None) -> dict[str, Any]:
    """Recipes, models and targets there are."""
    from compress.exporters.on_target import listing as targets
    from compress.models.sources import alias_names, describe_alias
    from compress.schema.strict_yaml import read_yaml

    found: dict[str, Any] = {}
    if what in (None, "recipes"):
        found["recipes"] = {
            name: read_yaml(path, "the recipe").value.get("description", "") for name, path in recipe_names().items()
        }
    if what in (None, "models"):
        found["models"] = {name: describe_alias(name) for name in alias_names()}
    if what in (None, "targets"):
        found["targets"] = targets()
    if not found:
        raise UsageError(f"cannot list {what!r}", where="list", fix="one of: recipes, models, targets")
    return found
