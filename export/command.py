"""`compress export --format ...`: what the options mean, real inputs for the comparison, and every format asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError, UsageError
from compress.exporters import formats
from compress.exporters.formats import BuildOptions, Source
from compress.exporters.inputs import OF_TEXT, read_inputs
from compress.exporters.ort import Arrays
from compress.schema.section import whole_number
from compress.words.wording import counted

SAMPLES = 16  # inputs that a network is compared on


def builds(
    names: Sequence[str],
    precision: str | None = None,
    shapes: Sequence[str] = (),
    capabilities: Sequence[str] = (),
    fusions: str = "none",
) -> list[BuildOptions]:
    """The options of every format asked for.

    Args:
        precision: by default each format's first: fp32, and f16 of a GGUF.
        shapes: ``[COMPONENT.]AXIS=LEAST:BENCHMARKED:LARGEST`` or ``AXIS=SIZE``.

    Raises:
        UsageError: a format, precision or shape is wrong, or a package is missing.
    """
    profiles = _profiles(shapes)
    known = sorted({p for f in formats.FORMATS.values() for p in f.precisions})
    if precision is not None and precision not in known:
        raise UsageError(f"there is no precision {precision!r}", where="--precision", fix=f"one of: {', '.join(known)}")
    if precision not in (None, "fp32") and not names:
        raise UsageError(
            f"the ONNX file itself stays fp32; {precision} is for a format that is made of it",
            where="--precision",
            fix=f"name it: --format openvino --precision {precision}",
        )
    found = []
    for name in dict.fromkeys(names):
        first = formats.FORMATS[name].precisions[0] if name in formats.FORMATS else "fp32"
        options = BuildOptions(name, precision or first, profiles, fusions=fusions)
        if capabilities:
            options = replace(options, capabilities=tuple(capabilities))
        formats.check_options(options)
        found.append(options)
    if fusions not in ("none", "basic", "all"):
        raise UsageError(f"there are no fusions {fusions!r}", where="--fusions", fix="one of: none, basic, all")
    return found


def _profiles(shapes: Sequence[str]) -> dict[str, list[dict[str, tuple[int, int, int]]]]:
    axes: dict[str, dict[str, tuple[int, int, int]]] = {"model": {}, "prefill": {}, "decode": {}}
    for said in shapes:
        name, _, sizes = said.partition("=")
        component, _, axis = name.rpartition(".")
        if component not in axes:  # the axis' own name has a dot
            component, axis = "", name
        try:
            numbers = [whole_number(n) for n in sizes.split(":")]
            low, opt, high = numbers * 3 if len(numbers) == 1 else numbers
            if not axis:
                raise ValueError("no axis")
            targets = [component] if component else list(axes)
            for target in targets:
                # One step of decode is one token, whatever the prompt.
                if not component and target == "decode" and axis == "sequence":
                    continue
                if not component and target == "prefill" and axis == "past":
                    continue
                axes[target][axis] = (low, opt, high)
        except (ValueError, KeyError) as e:
            raise UsageError(
                f"{said!r} is no shape",
                where="--shape",
                fix="such as batch=8, or sequence=1:128:512 or prefill.sequence=64",
            ) from e
    return {component: [given] for component, given in axes.items() if given}


def network_source(path: Path, model: Any, inputs: Any, options: BuildOptions, more: Mapping[str, Any]) -> Source:
    """A network with its held-out samples ``inputs`` (n, ...) as feeds, in batches of the benchmarked size."""
    source = Source(path, model, **more)
    graph = formats.read_graph(formats.components(path)["model"])
    if len(graph.inputs) != 1:
        raise CompressError(
            f"{options.format} is built and compared for networks of one input, and this one takes {len(graph.inputs)}",
            where=str(path),
            fix="leave out --format: the ONNX file runs in ONNX Runtime as it is",
        )
    (port,) = graph.inputs
    axes = formats.profiles_of(options, "model", graph)[0]
    size = next(iter(axes.values()))[1] if axes else int(port.shape[0])
    values = inputs.numpy()[: max(SAMPLES, size)]
    whole = [values[i : i + size] for i in range(0, len(values) - size + 1, size)]
    # A batch larger than the samples there are is filled by repeating them.
    parts = whole[:SAMPLES] or [np.resize(values, (size, *values.shape[1:]))]
    return replace(source, feeds={"model": [{port.name: np.ascontiguousarray(part)} for part in parts]})


def text_source(path: Path, model: Any, ids: Sequence[int], options: BuildOptions, begin: int = 0) -> Source:
    """A language model with real text as feeds: a prompt, and a token behind the cache of a context.

    Args:
        ids: (n,), a text; repeated to the lengths that are benchmarked.
        begin: of its first ids, those that stand in front of every text, and are not repeated.
    """
    from compress.exporters.ort import OrtLLM

    runtime = OrtLLM(path, options.threads)
    feeds: dict[str, list[Arrays]] = {"prefill": [], "decode": []}
    files = formats.components(path)
    for component, file in files.items():
        graph = formats.read_graph(file)
        for axes in formats.profiles_of(options, component, graph):
            size = {a: s[1] for a, s in axes.items()}
            feed = formats.random_feed(graph, size)
            batch, length, past = size.get("batch", 1), size.get("sequence", 1), size.get("past", 0)
            opened = np.tile(np.asarray(ids[:begin], np.int64), (batch, 1))
            body = np.resize(ids[begin:], (batch, max(0, past + length - begin))).astype(np.int64)
            text = np.concatenate([opened, body], 1)[:, : past + length]
            feed["input_ids"] = text[:, past:]
            if component == "decode" and past:
                present = runtime.prefill(text[:, :past])
                feed |= {
                    f"past_key_values.{k.removeprefix('present.')}": v for k, v in present.items() if k != "logits"
                }
            feeds[component].append(feed)
    return Source(path, model, feeds=feeds)


def make_all(sources: Sequence[tuple[Source, BuildOptions]], out: Path) -> dict[str, Any]:
    """Each in a folder of ``out`` under its name: ``<format>``, or ``<format>-<precision>`` where it is not fp32."""
    found = {}
    for source, options in sources:
        plain = options.precision == "fp32" and options.fusions == "none"
        if options.format == "onnx" and plain and source.path == out:
            continue  # what the others are made of lies there already
        found[label(options)] = formats.make(source, out / label(options), options)
    return found


def label(options: BuildOptions) -> str:
    parts = [options.format]
    parts += [options.precision] if options.precision != "fp32" else []
    parts += ["fused"] if options.fusions != "none" else []
    return "-".join(parts)


def is_onnx(model: str) -> bool:
    """An ONNX file, or a folder with an export and no model of ours."""
    path = Path(model)
    if path.is_file():
        return path.suffix.lower() != ".gguf"  # a language model's weights
    if not path.is_dir() or any(
        (p / f).exists() for p in (path, path / "model") for f in ("config.json", "network.json")
    ):
        return False
    return any(path.glob("*.onnx"))


def export_file(path: Path, out: Path, options: Sequence[BuildOptions], inputs: Path | None = None) -> dict[str, Any]:
    """Formats of an ONNX file from anywhere, compared on the inputs of an .npz file, or on made-up ones.

    Raises:
        UsageError: no format is asked for, or the inputs are not those of the file.
        CompressError: the file is no valid ONNX, does not run on these inputs, or a format cannot take it.
    """
    from compress.exporters import runtimes
    from compress.exporters.parity import of_reference

    if not options:
        raise UsageError(
            "this is ONNX already", where=str(path), fix="name what it is to become: --format tensorrt_rtx"
        )
    source = Source(path)
    files = formats.components(path)
    graphs = {name: formats.read_graph(file) for name, file in files.items()}
    if inputs is not None:
        if list(files) != ["model"]:
            raise UsageError(OF_TEXT, "--inputs", "leave it out")
        feed = read_inputs(inputs, graphs["model"])
        source = replace(source, feeds={"model": [feed]})
        options = [_of_shapes(o, feed, graphs["model"]) for o in options]
    for name, file in files.items():  # before anything is built of it
        try:
            reference = runtimes.load("onnx", str(file), options[0].threads, optimisation="none")
        except runtimes.CannotRun as e:
            fix = "write it again for an operator set and types that ONNX Runtime has"
            raise CompressError(str(e), where=str(file), fix=fix) from e
        for feed in formats.feeds_of(source, options[0], name, graphs[name]):
            of_reference(reference, feed, file)
    return {"kind": "onnx", "formats": make_all([(source, o) for o in options], out)}


def _of_shapes(options: BuildOptions, feed: Arrays, graph: formats.Graph) -> BuildOptions:
    """The sizes of axes that are not said, as the inputs have them."""
    sizes = {a: n for p in graph.inputs for a, n in zip(p.shape, feed[p.name].shape, strict=True) if isinstance(a, str)}
    said = [dict(axes) for axes in options.profiles.get("model") or ({},)]
    return replace(options, profiles={"model": [{a: (n, n, n) for a, n in sizes.items()} | axes for axes in said]})


def lines(facts: dict[str, Any]) -> list[str]:
    """What the command line says of the formats that were built."""
    found = []
    for name, made in facts.get("formats", {}).items():
        sizes = ", ".join(f"{file}: {size:,} bytes" for file, size in made["bytes"].items())
        found.append(f"{name:8} {sizes}")
        parity = made["parity"]
        if "skipped" in parity:
            found.append(f"         not run here: {parity['skipped']}")
        elif "words" in parity:
            found.append(f"         {parity['words']}")
        elif made["format"] == "gguf":
            found += _gguf_lines(made)
        else:
            found.append(
                f"         {len(parity['outputs'])} outputs agree with ONNX, largest relative difference"
                f" {max(parity['outputs'].values()):.1e} ({parity['runtime']})"
            )
        for measure, before in made.get("measures", {}).get("before", {}).items():
            found.append(f"         {measure}: {before:.4f} -> {made['measures']['after'][measure]:.4f}")
    return found


def _gguf_lines(made: Mapping[str, Any]) -> list[str]:
    """What was changed, what it is worth beside torch, and what the tokens were compared on."""
    parity, model = made["parity"], made["components"]["model"]
    before, after = parity["perplexity"]["torch"], parity["perplexity"]["gguf"]
    worst = max(parity["outputs"].values())
    return [
        f"         architecture {model['arch']}, {counted(model['blocks'], 'block')}, {model['parameters']:,}"
        " parameters",
        *(f"         {note}" for note in made["notes"]),
        f"         logits at {counted(parity['positions'], 'position')} of {parity['text']}: divergence from torch"
        f" {parity['kl']:.2e} nats, perplexity {before:.3f} -> {after:.3f}, the same likeliest token at"
        f" {100 * parity['top']:.1f} % ({parity['runtime']})",
        f"         largest difference {worst:.1e} of the largest logit; {parity['greedy']['same']} of"
        f" {parity['greedy']['tokens']} greedy tokens equal torch's; {sum(parity['tokens'].values()):,} tokens equal"
        " the tokenizer's",
        *(
            [f"         tokens differ in {parity['differs']}: a space stands behind each"]
            if "differs" in parity
            else []
        ),
        *(
            f"         llama.cpp does not end a text at the token {token}, and the model does"
            for token in parity.get("not_ending", ())
        ),
    ]
