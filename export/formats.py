"""What a model can be exported to, and the one way to do it.

Every format is one file with the same functions::

    build(source: Source, folder: Path, options: BuildOptions) -> facts     writes into the existing folder
    check(source: Source, folder: Path, options: BuildOptions) -> facts     runs it and compares, output by output
    load(folder: Path, component: str, options: BuildOptions) -> Runner     in its runtime

and is called through ``make``, which builds beside the place, checks, writes ``<format>.json`` and renames when all is
whole; ``describe`` reads that again and holds the files against it. ``source.path`` is a folder or a file with ONNX;
ExecuTorch and LiteRT are made of the torch module beside it, and GGUF of a saved model's folder, which is the path
then.

A network has one component, ``model``; a language model two, ``prefill`` and ``decode``. Axes that may vary are said by
the name they have in the ONNX file: ``profiles={"model": [{"batch": (1, 1, 8)}]}`` gives least, benchmarked and largest
size; a format that knows no varying axes takes the benchmarked one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.distribution import install_line
from compress.errors import CompressError, UsageError
from compress.exporters import tensors
from compress.exporters.ort import Arrays
from compress.exporters.ranges import index_ranges
from compress.exporters.runtimes import Runner
from compress.processes.distributed import available_bytes
from compress.run.cache import sha256_of
from compress.run.seals import inside as is_inside
from compress.run.strict_json import member, read_json, typed
from compress.run.written import whole

NUMBERS = frozenset(
    ("float16", "float32", "float64", "bool", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)))
)  # of which arrays can be made and given
Axes = Mapping[str, tuple[int, int, int]]  # axis -> (least, benchmarked, largest)


@dataclass(frozen=True)
class Format:
    """A format: the file that makes it, and what that needs."""

    name: str
    title: str
    module: str  # in compress.exporters
    precisions: tuple[str, ...]
    package: str  # that must be importable to build
    extra: str  # of this package's own extras; empty where it is always there
    of_torch: bool = False  # made of the torch module, not of the ONNX file
    of_folder: bool = False  # made of a saved language model's folder; there needs to be no ONNX


# As llama.cpp names them; the first is built where none is named.
GGUF_PRECISIONS = (
    "f16", "bf16", "f32", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_l", "q3_k_m",
    "q3_k_s", "q2_k",
)  # fmt: skip
_FORMATS = (
    Format("onnx", "ONNX", "onnx_file", ("fp32", "fp16", "int8", "int8-weights"), "onnxruntime", ""),
    Format("ort", "ONNX Runtime mobile", "ort_mobile", ("fp32", "fp16", "int8", "int8-weights"), "onnxruntime", ""),
    Format("mnn", "MNN", "mnn", ("fp32",), "MNN", "mnn"),
    Format("openvino", "OpenVINO", "openvino", ("fp32", "fp16", "int8"), "openvino", "openvino"),
    Format("executorch", "ExecuTorch", "executorch", ("fp32", "fp16", "int8"), "executorch", "executorch", True),
    Format("litert", "LiteRT", "litert", ("fp32",), "litert_torch", "litert", True),
    Format("genai", "ONNX Runtime GenAI", "genai", ("fp32", "fp16", "int8", "int4"), "onnxruntime_genai", "genai"),
    Format("tensorrt", "TensorRT", "tensorrt", ("fp32", "fp16", "bf16"), "tensorrt", ""),
    Format("tensorrt_rtx", "TensorRT-RTX", "tensorrt", ("fp32", "fp16", "bf16"), "tensorrt_rtx", "tensorrt"),
    Format("gguf", "GGUF", "gguf", GGUF_PRECISIONS, "xllamacpp", "gguf", of_folder=True),
)
FORMATS: dict[str, Format] = {f.name: f for f in _FORMATS}


@dataclass(frozen=True)
class Source:
    """What is exported.

    Args:
        path: a folder with ONNX (``model.onnx``, or ``prefill.onnx`` and ``decode.onnx``), or one ONNX file; the folder
            of a saved language model for a format that is made of one.
        model: the torch module it was made of, where it is known.
        feeds: real inputs by component, for the comparison; random ones are drawn where there are none.
        calibration: inputs by component for static quantisation: of the calibration split, never of the test split.
        evaluate: from loaded components to measures, as accuracy; asked of the ONNX file and of what was built.
        tokenizer: of a language model, for formats that carry it.
        saved: `compress.exporters.gguf.Saved`, of the folder of a saved language model.
    """

    path: Path
    model: Any = None
    feeds: Mapping[str, Sequence[Arrays]] = field(default_factory=dict)
    calibration: Mapping[str, Sequence[Arrays]] = field(default_factory=dict)
    evaluate: Callable[[Mapping[str, Runner]], Mapping[str, float]] | None = None
    tokenizer: Any = None
    saved: Any = None


@dataclass(frozen=True)
class BuildOptions:
    """How it is built; what a format has no use for it leaves alone.

    Args:
        format: a key of ``FORMATS``.
        precision: one of the format's. Inputs and outputs stay float32 at each, so that any caller can run it.
        profiles: per component, one or more sets of axes; see above.
        capabilities: of CUDA devices, as ``sm86``; for tensorrt_rtx, which builds without one.
        fusions: ``all``, ``basic`` or ``none``: how far ONNX Runtime fuses the graph when the file is made.
        timing_cache: a file that ``tensorrt`` reads and writes, so that a later build takes the same kernels.
        tolerance: of the comparison, relative to the largest value; by default the precision's.
        threads: of the comparison.
    """

    format: str
    precision: str = "fp32"
    profiles: Mapping[str, Sequence[Axes]] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ("sm80", "sm86", "sm89", "sm120")
    fusions: str = "none"
    timing_cache: Path | None = None
    tolerance: float | None = None
    threads: int = 1


def check_options(options: BuildOptions) -> Format:
    """The format, if it can be built here.

    Raises:
        UsageError: there is no such format or precision, or what it needs is not installed.
    """
    found = FORMATS.get(options.format)
    if found is None:
        raise UsageError(
            f"there is no format {options.format!r}", where="--format", fix=f"one of: {', '.join(FORMATS)}"
        )
    if options.precision not in found.precisions:
        raise UsageError(
            f"{found.title} is not built in {options.precision}",
            where="--precision",
            fix=f"one of: {', '.join(found.precisions)}",
        )
    if importlib.util.find_spec(found.package) is None:
        how = install_line(found.extra) if found.extra else f"pip install {found.package}"
        raise UsageError(
            f"the format {found.name} needs {found.package}, which is not installed", where="--format", fix=how
        )
    return found


def module_of(form: Format) -> Any:
    return importlib.import_module(f"compress.exporters.{form.module}")


def components(path: Path) -> dict[str, Path]:
    """component -> ONNX file.

    Raises:
        CompressError: there is no ONNX here.
    """
    from compress.exporters.names import DECODE, FILE, PREFILL

    if path.is_file():
        return {"model": path}
    if (path / FILE).is_file():
        return {"model": path / FILE}
    if (path / PREFILL).is_file() and (path / DECODE).is_file():
        return {"prefill": path / PREFILL, "decode": path / DECODE}
    raise CompressError(
        "there is no ONNX file here", where=str(path), fix="name a file, or a folder made by `compress export`"
    )


@dataclass(frozen=True)
class Port:
    """An input or output of an ONNX file; an axis that may vary stands in ``shape`` by its name.

    ``rows``: how many places the smallest table has that a whole-number input is looked up in, where there is one.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    rows: int | None = None

    def at(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where the axes have these sizes.

        Raises:
            UsageError: an axis has no size.
        """
        absent = [a for a in self.shape if isinstance(a, str) and a not in axes]
        if absent:
            raise UsageError(
                f"the input {self.name} has the axis {absent[0]!r}, and no size is given for it",
                where="shapes",
                fix=f"--shape {absent[0]}=8, or --shape {absent[0]}=1:8:32 (least, benchmarked, largest);"
                " in a target: shapes",
            )
        return tuple(axes[a] if isinstance(a, str) else a for a in self.shape)


@dataclass(frozen=True)
class Graph:
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: int
    ops: Mapping[str, int]


def read_graph(path: Path, own_operators: bool = True) -> Graph:
    """Inputs, outputs and operators of an ONNX file, without its weights.

    Args:
        own_operators: the file holds ONNX's operators alone, so that it can be checked.

    Raises:
        CompressError: it is missing, or no valid ONNX; weights of it are missing, or lie outside its folder.
    """
    import onnx

    tensors.files(path)
    model = tensors.read(path)
    graph = model.graph
    if not graph.output:
        raise CompressError("this is no valid ONNX file: it has no output", where=str(path), fix="export it again")
    given = tensors.weights_of(graph)
    ops: dict[str, int] = {}
    for node in graph.node:
        ops[node.op_type] = ops.get(node.op_type, 0) + 1

    rows = index_ranges(graph)

    def port(value: Any) -> Port:
        if not value.type.HasField("tensor_type"):
            kind = str(value.type.WhichOneof("value")).removesuffix("_type")
            raise CompressError(
                f"{value.name!r} is a {kind.replace('_', ' ')}, not a tensor",
                where=str(path),
                fix="export the model so that it takes and gives tensors (skl2onnx: zipmap=False)",
            )
        tensor = value.type.tensor_type
        shape = tuple(
            d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else (d.dim_param or f"{value.name}.{n}")
            for n, d in enumerate(tensor.shape.dim)
        )
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        return Port(value.name, dtype, shape, rows.get(value.name))

    found = Graph(
        tuple(port(v) for v in graph.input if v.name not in given),
        tuple(port(v) for v in graph.output),
        len(graph.node),
        dict(sorted(ops.items(), key=lambda op: str(op[0]))),
    )
    if own_operators:
        tensors.forget_outside(model)  # ONNX's own rule for files beside a graph takes no link; ours was asked above
        try:
            onnx.checker.check_model(model)
        except (onnx.checker.ValidationError, ValueError) as e:
            said = next((line for line in str(e).splitlines() if line.strip()), "it cannot be read")
            raise CompressError(
                f"this is no valid ONNX file: {said[:200]}", where=str(path), fix="export it again"
            ) from e
    return found


def profiles_of(options: BuildOptions, component: str, graph: Graph) -> list[dict[str, tuple[int, int, int]]]:
    """The profiles of a component, with what follows from the rest filled in.

    A batch is 1 where nothing is said. ``total`` is ``past`` + ``sequence``. Where nothing at all is said of a language
    model, a prompt of 128 tokens (1 to 512) and a context of 128 (1 to 512) are taken.

    Raises:
        UsageError: an axis has no size, or least <= benchmarked <= largest does not hold.
    """
    known = {a for p in graph.inputs for a in p.shape if isinstance(a, str)}
    # A file from elsewhere calls its batch as it likes: the one axis that varies, in front.
    batch = next(iter(known)) if len(known) == 1 and all(p.shape[1:] == _fixed(p) for p in graph.inputs) else "batch"
    found = []
    for said in options.profiles.get(component) or ({},):
        given = {batch if a == "batch" and a not in known else a: s for a, s in said.items()}
        axes: dict[str, tuple[int, int, int]] = {batch: (1, 1, 1)} if batch in known else {}
        if component == "prefill":
            axes["sequence"] = (1, 128, 512)
        if component == "decode":
            axes |= {"sequence": (1, 1, 1), "past": (1, 128, 512)}
        axes |= {a: (int(s[0]), int(s[1]), int(s[2])) for a, s in given.items()}
        strange = sorted(set(axes) - known - {"past", "sequence"})
        if strange:
            raise UsageError(
                f"no input of the {component} graph has an axis {strange[0]!r}",
                where="shapes",
                fix=f"its axes are: {', '.join(sorted(known)) or 'all fixed'}",
            )
        for axis, (low, opt, high) in axes.items():
            if not 0 <= low <= opt <= high:
                raise UsageError(
                    f"the sizes of the axis {axis!r} are no range: {low}, {opt}, {high}",
                    where="shapes",
                    fix="least <= benchmarked <= largest",
                )
        if "total" in known and "total" not in axes and {"past", "sequence"} <= set(axes):
            (a, b, c), (d, e, f) = axes["past"], axes["sequence"]
            axes["total"] = (a + d, b + e, c + f)
        for port in graph.inputs:
            port.at({a: s[1] for a, s in axes.items()})  # names an axis without a size
        found.append({a: s for a, s in axes.items() if a in known})
    return found


def _fixed(port: Port) -> tuple[int, ...]:
    return tuple(a for a in port.shape[1:] if isinstance(a, int))


def network_profiles(batch: int = 1, most: int | None = None) -> dict[str, list[Axes]]:
    """Of a network that is measured at ``batch`` and takes up to ``most``."""
    return {"model": [{"batch": (1, batch, most or batch)}]}


def text_profiles(prompt: int, context: int, *, batch: int = 1, most: int | None = None) -> dict[str, list[Axes]]:
    """Of a language model that is measured at a prompt and a context (tokens); ``most`` tokens at most."""
    most = most or max(prompt, context)
    several = (1, batch, batch)
    return {
        "prefill": [{"batch": several, "sequence": (1, prompt, most)}],
        "decode": [{"batch": several, "sequence": (1, 1, 1), "past": (1, context, most)}],
    }


def random_feed(graph: Graph, axes: Mapping[str, int], seed: int = 0) -> Arrays:
    """Inputs of the right shapes, and in the ranges that the graph allows, for a file that comes without real ones.

    Raises:
        UsageError: an input is of a type without numbers here, has no values, or all of them more than there is room
            for.
    """
    draw = np.random.default_rng(seed)
    feed: Arrays = {}
    _check_room(graph, axes)
    for port in graph.inputs:
        shape = port.at(axes)
        if port.name == "attention_mask":
            feed[port.name] = np.ones(shape, port.dtype)
        elif port.name == "position_ids":
            first = axes.get("past", 0) if "past" in {a for p in graph.inputs for a in p.shape} else 0
            feed[port.name] = np.broadcast_to(np.arange(first, first + shape[1]), shape).astype(port.dtype)
        elif np.dtype(port.dtype).kind == "f":
            feed[port.name] = np.asarray(draw.standard_normal(shape), port.dtype)
        elif port.dtype == "bool":
            feed[port.name] = np.ones(shape, bool)
        else:
            # Places in a table, as many as it has; bytes are pictures; what else there is (segments, flags) is 0 or 1.
            most = port.rows or (256 if port.dtype == "uint8" else 2)
            drawn = draw.integers(0, min(most, int(np.iinfo(port.dtype).max) + 1), shape)
            feed[port.name] = np.asarray(drawn, port.dtype)
    return feed


def check_types(graph: Graph) -> None:
    """Raises CompressError where an input is neither of numbers that numpy has nor of truths."""
    for port in graph.inputs:
        if port.dtype not in NUMBERS:
            kind = "text" if port.dtype == "object" else port.dtype
            raise CompressError(
                f"the input {port.name!r} is {kind}, and no such array can be given",
                where="the model's inputs",
                fix="put what makes numbers of it in front of the model, and export it with float32 or integers",
            )


def _check_room(graph: Graph, axes: Mapping[str, int]) -> None:
    """Raises where the inputs cannot be made: of their types, of no values, or of too many."""
    check_types(graph)
    total = 0
    for port in graph.inputs:
        shape = port.at(axes)
        if 0 in port.shape:
            raise UsageError(
                f"the input {port.name!r} is {'x'.join(map(str, shape))}, which is no value at all",
                where="shapes",
                fix="export the model with that axis free, and give its size",
            )
        total += math.prod(shape) * np.dtype(port.dtype).itemsize
    if 4 * total > available_bytes():  # they are drawn in float64, and every runtime makes a copy
        raise UsageError(
            f"inputs of these shapes take {total:,} bytes, and {available_bytes():,} are free",
            where="shapes",
            fix="give smaller ones: --shape AXIS=SIZE",
        )


def feeds_of(source: Source, options: BuildOptions, component: str, graph: Graph) -> list[Arrays]:
    """What a component is compared on: the source's real inputs, or random ones at each profile."""
    given = list(source.feeds.get(component, ()))
    if given:
        return given
    return [
        random_feed(graph, {a: s[1] for a, s in axes.items()}, seed)
        for seed, axes in enumerate(profiles_of(options, component, graph))
    ]


def make(source: Source, folder: Path, options: BuildOptions, *, check: bool = True) -> dict[str, Any]:
    """Builds ``folder``, checks it and writes ``folder/<format>.json``; the folder appears when all is whole.

    Returns:
        ``{"format", "precision", "components": {component: ...}, "bytes": {file: size}, "sha256": {file: hash},
        "seconds", "versions", "parity"}`` and what the format adds. ``parity`` has ``skipped`` with the reason where
        the runtime or its driver is not here.

    Raises:
        UsageError: the format, its precision or the shapes are wrong, or a package is missing.
        CompressError: it cannot be built, or differs from the ONNX file; the operator, node or layer is named.
    """
    form = check_options(options)
    if form.of_folder and source.saved is None:
        raise UsageError(
            f"{form.title} is made of a saved language model, and this is none",
            where=str(source.path),
            fix="name a language model's folder or a run, or another format",
        )
    for path in () if form.of_folder else components(source.path).values():
        read_graph(path)
    if form.of_torch and source.model is None:
        raise UsageError(
            f"{form.title} is made of the torch model, and an ONNX file does not hold one",
            where=str(source.path),
            fix="name a model that `compress` saved, or another format",
        )
    module = module_of(form)
    with whole(folder) as partial:
        facts: dict[str, Any] = {"format": form.name, "precision": options.precision}
        with _for_converters(source, partial) as taken:
            facts |= module.build(taken, partial, options)
            written = sorted(p for p in partial.iterdir() if p.is_file())
            facts["bytes"] = {p.name: p.stat().st_size for p in written}
            facts["sha256"] = {name: sha256_of(partial / name) for name in facts["bytes"]}
            if check:
                facts["parity"] = module.check(taken, partial, options)
                if source.evaluate is not None and "skipped" not in facts["parity"]:
                    facts["measures"] = _measures(taken, partial, options, module)
        (partial / f"{form.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


@contextmanager
def _for_converters(source: Source, beside: Path) -> Iterator[Source]:
    """The source as every converter takes it: a copy with its weights in one file beside the graph, where they lie in
    folders, behind links, or in attributes of nodes. Errors name the source itself."""
    files = {} if source.saved is not None else components(source.path)
    if all(tensors.is_plain(path) for path in files.values()):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix=".source-", dir=beside) as place:
        copies = {name: Path(place) / f"{name}.onnx" for name in files}
        for name, copy in copies.items():
            tensors.gather(files[name], copy)
        try:
            yield replace(source, path=Path(place))
        except CompressError as e:
            for name, copy in copies.items():
                e.rename(copy, files[name])
            e.rename(Path(place), source.path)
            raise


def _measures(source: Source, folder: Path, options: BuildOptions, module: Any) -> dict[str, dict[str, float]]:
    """What the ONNX file and the built one are worth, by the source's own function."""
    from compress.exporters import runtimes

    assert source.evaluate is not None  # asked by the caller
    files = components(source.path)
    before = {name: runtimes.load("onnx", str(path), options.threads) for name, path in files.items()}
    after = {name: module.load(folder, name, options) for name in files}
    return {"before": dict(source.evaluate(before)), "after": dict(source.evaluate(after))}


def describe(folder: Path, form: str) -> dict[str, Any]:
    """The facts of a built folder, with its files' sizes and hashes as they are now.

    Raises:
        CompressError: it was not built as this format, or a file has changed since.
    """
    path, fix = folder / f"{form}.json", f"compress export --format {form}"
    if not path.exists():
        raise CompressError(f"this folder was not built as {form}", where=str(folder), fix=fix)
    what, where = f"the record of how this folder was built as {form}", str(path)
    facts: dict[str, Any] = typed(read_json(path, what, constants=True, fix=fix), dict, "", what, where, fix)
    if member(facts, "format", str, what, where, fix=fix) != form:
        raise CompressError(f"{what} speaks of another format: {facts['format']!r:.80}", where=where, fix=fix)
    member(facts, "precision", str, what, where, fix=fix)
    sizes, hashes = (member(facts, key, dict, what, where, fix=fix) for key in ("bytes", "sha256"))
    for name in sizes:
        size = member(sizes, name, int, what, where, "bytes", fix)
        said = member(hashes, name, str, what, where, "sha256", fix)
        if not is_inside(name):
            raise CompressError(f"{what} names a file outside it: {name!r:.200}", where=where, fix=fix)
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise CompressError(
                f"a file is missing or has another size than {path.name} says",
                where=str(folder / name),
                fix="export again",
            )
        if sha256_of(folder / name) != said:
            raise CompressError(
                f"a file has changed since it was built: {path.name} has another hash",
                where=str(folder / name),
                fix="export again",
            )
    return facts
