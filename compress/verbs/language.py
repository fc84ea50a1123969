"""`eval`, `export` and `bench` of a language model, see `compress.models.saved.Kind`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.schema.recipe import TEXT, BenchSection, ExportSection
from compress.words.escape import visible
from compress.words.wording import counted, small

if TYPE_CHECKING:
    from compress.data.text import Packed
    from compress.exporters.formats import BuildOptions


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
    from compress.data.text import opening, pack, pack_dialogues, read_files
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


def export(folder: Path, out: Path, *, builds: Sequence[BuildOptions] = ()) -> dict[str, Any]:
    """Prefill and decode into the empty folder ``out``, checked against torch output by output.

    Args:
        builds: formats to make of it, each in a folder of ``out``.
    """
    from compress.data.text import begun, opening
    from compress.exporters.check import write_checked
    from compress.exporters.command import make_all, text_source

    loaded, family, tokenizer = _load(folder)
    spec = ExportSection()
    facts = write_checked(loaded, tokenizer, out, spec, family.geometry(loaded.config).vocab)
    ids, begin = begun(tokenizer, spec.prompt), len(opening(tokenizer))
    sources = [(replace(text_source(out, loaded, ids, o, begin), tokenizer=tokenizer), o) for o in builds]
    return {**facts, "formats": make_all(sources, out)}


def export_lines(facts: dict[str, Any]) -> list[str]:
    from compress.exporters.command import lines

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
    """Time to first token, time per output token and memory; what is not given is as in a recipe."""
    from compress.exporters.bench.local import compare_llm
    from compress.exporters.onnx import PREFILL
    from compress.exporters.tensors import read

    given = {"prompt": prompt, "context": context, "processes": processes, "threads": threads}
    spec = BenchSection(**{k: v for k, v in given.items() if v is not None}).model_dump()
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
