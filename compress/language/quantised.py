"""The dense and the pruned model at fewer bits: files of both, each measured in its own runtime.

A precision is a sealed stage with both models' files and their perplexity on the windows of the evaluation; another
holds their latency, interleaved. The dense model alone is built in the rivals' precisions, and its latency is measured
beside the pruned file whose size is nearest: what a person would take in its place.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress import __version__
from compress.errors import CompressError, UsageError
from compress.language.setup import Setup, Windows
from compress.report.quantised import files, name_of
from compress.run.folder import Run, seal_hash
from compress.run.progress import say
from compress.system.host import last_cache

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.schema.recipe import QuantiseSection, TextRecipe

FACTS = "quantised.json"
Makers = Mapping[str, Callable[[], Any]]


def wanted(spec: QuantiseSection) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(format, precision, the models that are built in it), in the recipe's order."""
    both = ("dense", "pruned")
    yield from (("gguf", p, both) for p in spec.gguf)
    yield from (("genai", p, both) for p in spec.genai)
    yield from (("gguf", p, ("dense",)) for p in spec.rivals)


def check(recipe: TextRecipe, family: Any, config: Any) -> None:
    """Says, before any weight is read, what cannot be built and where widths do not fit the blocks of a precision.

    Raises:
        UsageError: a package is not installed.
        CompressError: llama.cpp has no architecture for the model, or none for blocks that differ.
    """
    from compress.exporters.formats import BuildOptions, check_options

    assert recipe.quantise is not None  # asked by the caller
    for form, precision, _ in wanted(recipe.quantise):
        try:
            check_options(BuildOptions(form, precision))
        except UsageError as e:
            raise UsageError(e.what, where=f"quantise.{form}", fix=e.fix) from None
    if not recipe.quantise.gguf:
        return
    from compress.exporters.llama_cpp import architectures

    architectures.plan(config, family, "quantise.gguf")
    uneven = getattr(recipe, "layouts", ["masked"])[0] == "per-layer"
    if uneven:
        architectures.takes_uneven(config, family, "quantise.gguf")
        _say_widths(recipe)


def _say_widths(recipe: TextRecipe) -> None:
    from compress.exporters.llama_cpp.quantise import block_of

    assert recipe.quantise is not None  # asked by the caller
    step = getattr(recipe.options, "round_to", 1)
    for precision in recipe.quantise.gguf:
        block = block_of(precision)
        if step % block:
            say(
                f"gguf {precision}: FFN widths in steps of {step} are not all in blocks of {block}; rows that are not"
                f" take a type of 32 numbers with about as many bits, or float16 where 32 does not divide them either:"
                f" round_to: {block} avoids it"
            )


def quantise(
    run: Run,
    setup: Setup[Any],
    windows: Windows,
    saved: Path,
    exported: Mapping[str, Path],
    makers: Makers,
    report: dict[str, Any],
) -> None:
    """Builds and measures what the recipe's ``quantise`` names, into ``report["quantised"]``.

    Args:
        saved: the sealed folder of the pruned model.
        exported: side -> its ONNX export, for formats that are made of it.
        makers: side -> makes the torch module.
    """
    spec = setup.recipe.quantise
    assert spec is not None  # asked by the caller
    folders = {"dense": setup.resolved.folder, "pruned": saved}
    places: dict[tuple[str, str], Path] = {}
    made: list[dict[str, Any]] = []
    for form, precision, sides in wanted(spec):

        def build(folder: Path, form: str = form, precision: str = precision, sides: Sequence[str] = sides) -> None:
            options = _options(setup, form, precision)
            facts = {}
            for side in sides:
                source = _source(setup, windows, folders[side], exported.get(side), makers[side], side, options)
                facts[side] = _built(source, folder / side, options, windows)
            (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

        stage = run.stage(f"quantised-{form}-{precision}", _inputs(setup, windows, saved, exported, form, sides), build)
        facts = json.loads((stage / FACTS).read_text("utf-8"))
        for side in sides:
            places[side, f"{form}-{precision}"] = stage / side
            made.append({"format": form, "precision": precision, "side": side, **facts[side]})
    section: dict[str, Any] = {"files": made}
    if setup.recipe.bench is not None:
        section["bench"] = _benched(run, setup, made, places)
        section["cache"] = last_cache()
    report["quantised"] = section
    report["stages"] = run.stages()


def _inputs(
    setup: Setup[Any], windows: Windows, saved: Path, exported: Mapping[str, Path], form: str, sides: Sequence[str]
) -> dict[str, Any]:
    """What decides a precision's files and their perplexity."""
    from compress.language.stages import held_out

    found: dict[str, Any] = {"version": __version__, "weights": setup.weights, "text": held_out(windows)}
    if "pruned" in sides:
        found["model"] = seal_hash(saved)
    if form == "genai":
        found |= {f"export-{side}": seal_hash(exported[side]) for side in sides}
    return found


def _options(setup: Setup[Any], form: str, precision: str) -> BuildOptions:
    from compress.exporters.formats import BuildOptions

    spec = setup.recipe.bench
    return BuildOptions(form, precision, threads=spec.threads if spec is not None else 1)


def _source(
    setup: Setup[Any],
    windows: Windows,
    folder: Path,
    onnx: Path | None,
    make: Callable[[], Any],
    side: str,
    options: BuildOptions,
) -> Source:
    """What a side's file is made of: the saved folder, or the ONNX export beside the torch module."""
    from compress.data.special import begun
    from compress.exporters.command import text_source
    from compress.exporters.formats import Source
    from compress.exporters.gguf import Saved
    from compress.models.streaming import on_cpu

    if options.format == "genai":
        assert onnx is not None and setup.recipe.export is not None  # the schema asks for it
        ids = begun(setup.tokenizer, setup.recipe.export.prompt)
        source = text_source(onnx, on_cpu(make()), ids, options, len(windows.begin))
        return replace(source, tokenizer=setup.tokenizer)
    title, held = next(iter(windows.evaluation.items()))
    base = setup.resolved.base_model
    name = (base or setup.resolved.name).rstrip("/").rsplit("/", 1)[-1] + ("-pruned" if side == "pruned" else "")
    shown = tuple(tuple(row) for row in held[:4, :256].tolist())
    text = f"held-out text ({title})"
    return Source(
        folder,
        saved=Saved(setup.tokenizer, shown, len(windows.begin), text, name, setup.resolved.license, base),
    )


def _built(source: Source, folder: Path, options: BuildOptions, windows: Windows) -> dict[str, Any]:
    from compress.exporters.bench.transport import artefact
    from compress.exporters.formats import make
    from compress.language.evaluate import geometric_mean

    made = make(source, folder, options)
    texts = perplexities(folder, options.format, windows, options.threads)
    held = artefact(folder, options.format)
    return {
        "bytes": held.bytes,
        "files": {path.name: path.stat().st_size for path in held.files},
        "runtime": made["parity"]["runtime"],
        "texts": texts,
        "perplexity": geometric_mean([row["ppl"] for row in texts.values()]),
        "notes": list(made.get("notes", ())),
    }


def perplexities(folder: Path, form: str, windows: Windows, threads: int) -> dict[str, dict[str, float | int]]:
    """By text, as `compress.language.evaluate.perplexity` defines it: of a built folder, in its own runtime."""
    return {
        name: perplexity(folder, form, ids, len(windows.begin), windows.own.get(name), threads)
        for name, ids in windows.evaluation.items()
    }


def perplexity(folder: Path, form: str, ids: Any, begin: int, own: Any, threads: int) -> dict[str, float | int]:
    """``ppl``, ``nll`` (nats a token) and ``tokens`` of the windows ``ids`` (n, length), those that ``begin`` each and
    those that are not ``own`` left out.

    Raises:
        CompressError: the runtime refuses the file, or a logit is no number.
    """
    scored = max(1, begin)
    rows = ids.tolist()
    found = []
    for row, losses in zip(range(len(rows)), _losses(folder, form, rows, threads), strict=True):
        counted = losses[scored - 1 :]
        found.append(counted if own is None else counted[own[row, scored:].numpy()])
    every = np.concatenate(found)
    nll = math.fsum(every) / len(every)
    if not math.isfinite(nll):
        raise CompressError(
            "the file's logits are not finite", where=str(folder), fix="name a precision of more bits, or bf16 for f16"
        )
    return {"ppl": math.exp(min(nll, 700.0)), "nll": nll, "tokens": len(every)}


def _losses(folder: Path, form: str, windows: list[list[int]], threads: int) -> list[Any]:
    """(length - 1,) nats of each window's tokens."""
    if form == "gguf":
        from compress.exporters.gguf import the_file
        from compress.exporters.llama_cpp.ask import losses

        return list(losses(the_file(folder), windows, threads))
    from compress.exporters.genai import Genai
    from compress.exporters.llama_cpp.nats import nats

    model = Genai(folder, threads)
    return [nats(model.logits(window), window) for window in windows]


def _benched(
    run: Run, setup: Setup[Any], made: list[dict[str, Any]], places: Mapping[tuple[str, str], Path]
) -> dict[str, Any]:
    """A bench record for each precision, and the figures of each file beside its perplexity."""
    from compress.exporters.bench.local import compare

    spec = setup.recipe.bench
    assert spec is not None  # asked by the caller
    found = {}
    for row in made:
        name = name_of(row)
        if row["side"] != "dense":
            continue
        other = name if ("pruned", name) in places else _nearest(row, made)
        pair = {"dense": places["dense", name], "pruned": places["pruned", other]}

        def build(folder: Path, pair: Mapping[str, Path] = pair, form: str = row["format"]) -> None:
            record = compare(pair["dense"], pair["pruned"], spec.model_dump(), format=form)
            (folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

        inputs = {
            "version": __version__,
            "bench": spec.model_dump(mode="json"),
            **{side: seal_hash(place.parent) for side, place in pair.items()},
        }
        stage = run.stage(f"quantised-bench-{name}", inputs, build)
        found[name] = {**json.loads((stage / "bench.json").read_text("utf-8")), "pruned_is": other}
    for row in made:
        record = found[name_of(row)][row["side"]]
        row |= {key: record[key]["median"] for key in ("ttft", "tpot")} | {"peak_rss": record["peak_rss"]}
    return found


def _nearest(rival: Mapping[str, Any], made: Sequence[Mapping[str, Any]]) -> str:
    """The pruned GGUF whose size is nearest."""
    own = [row for row in made if row["side"] == "pruned" and row["format"] == rival["format"]]
    row = min(own, key=lambda r: abs(r["bytes"] - rival["bytes"]))
    return name_of(row)


def published(run: Path, report: Mapping[str, Any]) -> dict[str, Path]:
    """The pruned model's files by their names in the release: a GGUF beside the weights, as the hub's repositories have
    theirs, and a folder for each other format."""
    found = {}
    for row in files(report):
        if row["side"] != "pruned":
            continue
        name = name_of(row)
        folder = run / f"quantised-{name}" / "pruned"
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if row["format"] != "gguf":
                found[f"{name}/{path.relative_to(folder).as_posix()}"] = path
            elif path.suffix == ".gguf":
                found[path.name] = path
    return found


def commands(run: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """The commands that measure each pair again."""
    there = shlex.quote(str(run))
    return {
        f"quantised {name}": f"compress bench {there}/quantised-{name}/dense"
        f" {there}/quantised-{record['pruned_is']}/pruned"
        for name, record in ((report.get("quantised") or {}).get("bench") or {}).items()
    }
