"""`eval`, `export` and `bench` of a language model, see `compress.models.saved.Kind`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.run.folder import RECIPE_LOCK
from compress.schema.recipe import TEXT, BenchSection, ExportSection
from compress.words.escape import visible
from compress.words.wording import counted, small

if TYPE_CHECKING:
    from compress.data.text import Packed
    from compress.exporters.formats import BuildOptions
    from compress.exporters.gguf import Saved


def _load(folder: Path) -> tuple[Any, Any, Any]:
    """(model, family, tokenizer) of a saved model, of either layout."""
    from compress.language.setup import quiet
    from compress.models.families import family_for
    from compress.models.reading import check_weights, load_config, load_model, load_tokenizer

    quiet()
    family = family_for(load_config(folder))
    check_weights(folder)
    return load_model(folder, family), family, load_tokenizer(folder)


def evaluate(
    folder: Path,
    like: Path | None,
    *,
    text: Sequence[str] = (),
    dialogues: Sequence[str] = (),
    windows: int = 16,
    length: int = 512,
    task: Sequence[str] = (),
) -> dict[str, Any]:
    """Perplexity on a run's held-out windows (``like``), on text files or dialogues, and lm-evaluation-harness tasks.

    A text file is one text, whatever it holds; several that a pattern matches are documents, and joined as such.
    """
    from compress.data.dialogues import read_dialogues
    from compress.data.documents import read_files
    from compress.data.special import opening
    from compress.data.text import pack, pack_dialogues
    from compress.language.evaluate import geometric_mean, harness_tasks, perplexity

    if bool(like) == bool(text or dialogues):
        raise UsageError(
            "name the text to evaluate on",
            where="eval",
            fix="either --like RUN, or --text FILE ... or --dialogues FILE ...",
        )
    if both := sorted(set(text) & set(dialogues)):
        raise UsageError(
            "a file is named as text and as dialogues", where=both[0], fix="measure it as one, then as the other"
        )
    kept = _held_out(like) if like is not None else None
    loaded, _, tokenizer = _load(folder)
    if kept is not None:
        texts, begin, spoken = kept
    else:
        begin, spoken = opening(tokenizer), set(dialogues)
        texts = {name: pack(read_files([name]), tokenizer, length, windows, name) for name in text}
        for name in dialogues:
            texts[name] = pack_dialogues(read_dialogues([name]), tokenizer, length, windows, name)
    found: dict[str, dict[str, Any]] = {
        name: perplexity(loaded, packed.ids, f"perplexity, {name}", len(begin), packed.scored)
        for name, packed in texts.items()
    }
    for name in spoken:
        found[name]["scored"] = "assistant"
    return {
        "model": str(folder),
        "texts": found,
        "begins_with": [str(tokenizer.convert_ids_to_tokens(i)) for i in begin],
        "geometric_mean": geometric_mean([float(f["ppl"]) for f in found.values()]),
        "tasks": harness_tasks(folder, list(task)) if task else [],
    }


def _held_out(run: Path) -> tuple[dict[str, Packed], tuple[int, ...], set[str]]:
    """A run's held-out windows by the texts' names, the token ids that they begin with, and the names of dialogues."""
    from compress.data.text import held_out_of, kept_windows
    from compress.models.saved import locked_recipe
    from compress.run.seals import verify_seal

    texts = locked_recipe(run, TEXT)["evaluation"]["texts"]
    source = run / "text" / "windows.safetensors"
    if not source.exists():
        raise CompressError("this is not a run folder with text in it", where=str(run), fix="name a run folder")
    verify_seal(source.parent)
    tensors, begin = kept_windows(source)
    spoken = {text["name"] for text in texts if "dialogues" in text["source"]}
    return held_out_of(tensors, [text["name"] for text in texts]), begin, spoken


def evaluate_lines(facts: dict[str, Any]) -> list[str]:
    return [
        *(
            f"ppl  {name}: {v['ppl']:.3f} ({v['tokens']:,} tokens{' of the assistant' if 'scored' in v else ''})"
            for name, v in facts["texts"].items()
        ),
        f"ppl  geometric mean: {facts['geometric_mean']:.3f}",
        *([f"text every window begins with {visible(' '.join(facts['begins_with']))}"] if facts["begins_with"] else []),
        *(f"{t['task']}  {t['metric']}: {t['value']:.4f}" for t in facts["tasks"]),
    ]


def export(
    folder: Path,
    out: Path,
    *,
    builds: Sequence[BuildOptions] = (),
    like: Path | None = None,
    named: str = "",
) -> dict[str, Any]:
    """Prefill and decode into the empty folder ``out``, checked against torch output by output; where every format that
    is asked for is made of the saved folder (GGUF), there is no ONNX.

    Args:
        builds: formats to make of it, each in a folder of ``out``.
        like: a run whose held-out text a GGUF is compared on; by default the run that the folder lies in.
        named: how the user named the model, which may tell its base.
    """
    from compress.data.special import begun, opening
    from compress.exporters.check import write_checked
    from compress.exporters.command import make_all, text_source
    from compress.exporters.formats import FORMATS, Source

    of_folder = [o for o in builds if FORMATS[o.format].of_folder]
    others = [o for o in builds if o not in of_folder]
    if like is not None and not of_folder:
        raise UsageError(
            "a language model is compared with torch on its own", where="--like", fix="leave it out, or --format gguf"
        )
    facts: dict[str, Any] = {}
    sources: list[tuple[Source, BuildOptions]] = []
    if of_folder:
        source = Source(folder, saved=_saved(folder, like, named))
        sources = [(source, o) for o in of_folder]
    if others or not of_folder:
        loaded, family, tokenizer = _load(folder)
        spec = ExportSection()
        facts = write_checked(loaded, tokenizer, out, spec, family.geometry(loaded.config).vocab)
        ids, begin = begun(tokenizer, spec.prompt), len(opening(tokenizer))
        sources += [(replace(text_source(out, loaded, ids, o, begin), tokenizer=tokenizer), o) for o in others]
    return {**facts, "formats": make_all(sources, out)}


def _saved(folder: Path, like: Path | None, named: str) -> Saved:
    """What a GGUF of a model is named after and compared on: held-out windows of its run, or a text of many kinds."""
    from compress.data.special import begun, opening
    from compress.exporters.gguf import Saved
    from compress.exporters.llama_cpp.vocabulary import PROBE
    from compress.language.setup import quiet
    from compress.models.families import family_for
    from compress.models.reading import is_ragged, load_config, load_tokenizer
    from compress.models.sources import about
    from compress.report.build import read_report

    quiet()
    family_for(load_config(folder))
    tokenizer = load_tokenizer(folder)
    run = folder.parent if folder.name.startswith("model") and (folder.parent / RECIPE_LOCK).is_file() else None
    if like is not None or run is not None:
        held, begin, _ = _held_out(like or run or folder)
        title, packed = next(iter(held.items()))
        windows, begins = packed.ids[:4, :256].tolist(), len(begin)
        text = f"held-out text ({title})"
    else:
        windows, begins, text = [begun(tokenizer, PROBE)[:512]], len(opening(tokenizer)), "a text of many kinds"
    base, licence = about(named, folder)
    if run is not None and (run / "release").is_dir():
        model = read_report(run)["model"]
        base, licence = base or model["base_model"], licence or model["license"]
    name = base.rsplit("/", 1)[-1] if base else (run or folder).resolve().name
    pruned = "-pruned" if base and (run is not None or is_ragged(folder)) else ""
    return Saved(tokenizer, tuple(map(tuple, windows)), begins, text, name + pruned, licence, base)


def export_lines(facts: dict[str, Any]) -> list[str]:
    from compress.exporters.command import lines

    if "bytes" not in facts:  # there is no ONNX
        return lines(facts)
    return [
        *(f"onnx     {name}: {size / 1e6:.1f} MB" for name, size in facts["bytes"].items()),
        f"parity   {counted(facts['outputs_compared'], 'output')}, largest relative difference"
        f" {small(facts['largest_difference'])}",
        f"greedy   {facts['greedy']['tokens']} tokens equal torch's",
        *lines(facts),
    ]


def bench(
    dense: Path,
    pruned: Path,
    *,
    prompt: int | None = None,
    context: int | None = None,
    processes: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Time to first token, time per output token and memory, in ONNX Runtime or, of two folders with a GGUF, in
    llama.cpp; what is not given is as in a recipe.

    Raises:
        CompressError: one has a GGUF, the other none.
    """
    from compress.exporters.bench.local import compare_gguf, compare_llm
    from compress.exporters.names import PREFILL
    from compress.exporters.tensors import read

    given = {"prompt": prompt, "context": context, "processes": processes, "threads": threads}
    spec = BenchSection(**{k: v for k, v in given.items() if v is not None}).model_dump()
    gguf = [(folder / "gguf.json").is_file() for folder in (dense, pruned)]
    if all(gguf):
        return compare_gguf(dense, pruned, spec)
    if any(gguf):
        raise CompressError(
            "one is a GGUF, the other is none",
            where=f"{dense}, {pruned}",
            fix="name two folders that `compress export --format gguf` made, or two with ONNX",
        )
    if not (dense / PREFILL).is_file():  # a folder for ONNX Runtime GenAI, which says it itself
        return compare_llm(dense, pruned, spec, None)
    logits = read(dense / PREFILL).graph.output[0]
    return compare_llm(dense, pruned, spec, logits.type.tensor_type.shape.dim[2].dim_value)


def bench_lines(facts: dict[str, Any]) -> list[str]:
    from compress.report.stats import found_in

    lines = []
    for key in ("ttft", "tpot"):
        for label in ("dense", "pruned"):
            m = facts[label][key]
            lines.append(
                f"{key} {label:7} {1000 * m['median']:8.2f} ms  (between processes {100 * m['spread_between']:.1f} %,"
                f" within {100 * m['all']['spread_within']:.1f} %;"
                f" load {m['load']:.2f} s, first {1000 * m['first']:.1f} ms)"
            )
        lines.append(f"{key} ratio   {found_in(facts, key).words}")
    for label in ("dense", "pruned"):
        lines.append(
            f"rss  {label:7} {facts[label]['peak_rss'] / 1e6:8.0f} MB   files {facts[label]['bytes'] / 1e6:.0f} MB"
        )
    return lines
