"""What the gate is given: an exported model, found by its name, and whether two can be held against each other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.exporters.bench import transport
from compress.exporters.formats import describe
from compress.exporters.inputs import OF_TEXT
from compress.exporters.names import DECODE, FILE, PREFILL
from compress.exporters.tensors import read, size, weights_of
from compress.run.strict_json import member, read_json

MODELS = (".onnx", ".mnn", ".gguf")
RUNTIMES = {"onnx": "ONNX Runtime", "gguf": "llama.cpp", "genai": "ONNX Runtime GenAI"}  # of language models


@dataclass(frozen=True)
class Artefact:
    """One exported model.

    ``inputs`` is name -> (element type, dimensions; a free one by its name or ``?``), of the decode graph for a
    language model. ``quality`` is what the run's report says: ``{"perplexity": {text: (value, conditions)},
    "accuracy": {task: (metric, value)}}``.
    """

    name: str
    kind: str
    path: Path
    files: tuple[Path, ...]
    inputs: dict[str, tuple[str, tuple[int | str, ...]]]
    quality: dict[str, dict[str, Any]] | None = None
    vocab: int = 0
    format: str = "onnx"

    @property
    def home(self) -> Path:
        return self.path.parent if self.path.is_file() or self.kind == "network" else self.path

    @property
    def bytes(self) -> int:
        return size(self.files)

    @property
    def graph(self) -> Path:
        """The ONNX file that says what a network takes.

        Raises:
            UsageError: it is a language model.
        """
        if self.kind != "network":
            raise UsageError(OF_TEXT, where="--inputs", fix="leave it out")
        return _described(self.path)


def find(name: str, path: Path | None = None) -> Artefact:
    """What ``name`` says: an ONNX, MNN or GGUF file, a folder with an export (one for ONNX Runtime GenAI too), or a run
    folder (``RUN`` or ``RUN:dense``).

    Args:
        path: where it lies, if not where its name says.

    Raises:
        UsageError: there is nothing of that name, or no model in it.
    """
    form = "pruned"
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise UsageError("the name holds control characters", where=repr(name), fix="rename it")
    place = path or Path(name)
    if path is None and not place.exists() and name.rpartition(":")[2] in ("dense", "pruned"):
        head, _, form = name.rpartition(":")
        place = Path(head)
    if not place.exists():
        raise UsageError("there is no such file or folder", where=name, fix="name an ONNX file, an export, or a run")
    if place.is_file():
        if place.suffix == ".json":
            raise UsageError(
                "a stored figure is no baseline: it may come from another machine or another day",
                where=name,
                fix="name the model itself; baseline and candidate are measured here, in turn",
            )
        if place.suffix not in MODELS:
            raise UsageError("this is no exported model", where=name, fix=f"name a file that ends in {MODELS[0]}")
        if place.suffix == ".gguf":
            return _gguf(name, place)
        if place.name in (PREFILL, DECODE):
            return _text(name, place.parent, None)
        return _network(name, place, None)
    if not place.is_dir():
        raise UsageError("this is no file and no folder", where=name, fix="name an ONNX file, an export, or a run")
    run = place
    if (run / f"export-{form}").is_dir():
        place, quality = run / f"export-{form}", _quality(run, form)
    elif form == "dense":
        raise UsageError("this run has exported no dense model", where=name, fix="finish it, or name an export folder")
    else:
        quality = None
    if (place / transport.GENAI).is_file():
        return _genai(name, place)
    there = [kind for kind in (PREFILL, FILE) if (place / kind).is_file()]
    if len(there) > 1:
        raise UsageError(f"there are both {PREFILL} and {FILE}", where=name, fix="name the file that is meant")
    if there:
        return _text(name, place, quality) if there == [PREFILL] else _network(name, place / FILE, quality)
    files = [p for p in sorted(place.iterdir()) if p.suffix in MODELS]
    if len(files) == 1:
        return _gguf(name, files[0]) if files[0].suffix == ".gguf" else _network(name, files[0], quality)
    what = "there is no exported model here" if not files else f"there are {len(files)} models here"
    raise UsageError(what, where=name, fix=f"name a folder made by `compress export`, or one {MODELS[0]} file")


def _graph(path: Path) -> Any:
    graph = read(path).graph
    if not graph.node or not graph.output:  # a file that was cut off at the right place is read without complaint
        raise CompressError("this ONNX file holds no network", where=str(path), fix="export or copy it again")
    return graph


def _inputs(graph: Any) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    import onnx

    weights = weights_of(graph)
    found: dict[str, tuple[str, tuple[int | str, ...]]] = {}
    for value in graph.input:
        if value.name not in weights:
            tensor = value.type.tensor_type
            shape = tuple(int(d.dim_value) if d.dim_value > 0 else d.dim_param or "?" for d in tensor.shape.dim)
            found[value.name] = (onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), shape)
    return found


def _described(path: Path) -> Path:
    return path if path.suffix == ".onnx" else path.with_name(FILE)


def _network(name: str, path: Path, quality: dict[str, dict[str, Any]] | None) -> Artefact:
    described = _described(path)
    if not described.exists():
        raise UsageError(f"nothing says what {path.name} takes", where=name, fix=f"keep {FILE} beside it")
    graph = _graph(described)
    return Artefact(name, "network", path, transport.artefact(path).files, _inputs(graph), quality)


def _text(name: str, folder: Path, quality: dict[str, dict[str, Any]] | None) -> Artefact:
    for part in (PREFILL, DECODE):
        if not (folder / part).is_file():
            raise UsageError(f"there is no {part}", where=name, fix="name a folder made by `compress export`")
    graphs = {part: _graph(folder / part) for part in (PREFILL, DECODE)}
    logits = graphs[PREFILL].output[0].type.tensor_type.shape.dim[2].dim_value
    return Artefact(
        name, "text", folder, transport.artefact(folder, "onnx").files, _inputs(graphs[DECODE]), quality, int(logits)
    )


def _gguf(name: str, path: Path) -> Artefact:
    from compress.models.quantised import shapes

    if not find_spec("gguf"):
        fix = "pip install 'compress-toolchain[gguf]'"
        raise UsageError("a GGUF file is read by the package gguf", where=name, fix=fix)
    rows = shapes(path).get("token_embd.weight")
    if rows is None:
        raise CompressError("this GGUF file holds no language model", where=str(path), fix="export or copy it again")
    files = transport.artefact(path, "gguf").files
    parity = _built(path.parent, "gguf")
    values = parity.get("perplexity") or {}
    said = {str(parity.get("text")): (values["gguf"], {"positions": parity.get("positions")})} if values else {}
    return Artefact(name, "text", path, files, {}, {"perplexity": said}, rows[0], "gguf")


def _genai(name: str, folder: Path) -> Artefact:
    from compress.exporters.genai import check_folder

    of = _built(folder, "genai").get("divergence") or {}
    said = {"the export's text": (of["perplexity"][1], {"tokens": of.get("tokens")})} if of else {}
    check_folder(folder)
    what, where = f"the file {transport.GENAI}", str(folder / transport.GENAI)
    model = member(read_json(folder / transport.GENAI, what), "model", dict, what, where)
    vocab = member(model, "vocab_size", int, what, where, "model")
    files = transport.artefact(folder, "genai").files
    return Artefact(name, "text", folder, files, {}, {"perplexity": said}, vocab, "genai")


def _built(folder: Path, form: str) -> dict[str, Any]:
    """What the export found when it compared its file with the model; nothing where no record lies beside it.

    Raises:
        CompressError: the record is not what is written, or a file has changed since.
    """
    path = folder / f"{form}.json"
    if not path.exists():
        return {}
    fix = f"compress export --format {form}"
    what = f"the record of how this folder was built as {form}"
    facts = describe(folder, form)
    return dict(member(facts, "parity", dict, what, str(path), fix=fix)) if "parity" in facts else {}


def _quality(run: Path, form: str) -> dict[str, dict[str, Any]] | None:
    """What the run's report says of the dense or the pruned model; None where the run has not got so far."""
    from compress.report.build import read_report
    from compress.report.rows import is_share, rows

    if not (run / "release" / "report.json").is_file():
        return None
    found = rows(read_report(run))
    texts = [row for row in found if row.unit == "perplexity" and row.task]
    return {
        "perplexity": {row.task: (getattr(row, form), row.conditions) for row in texts},
        "accuracy": {row.task: (row.metric, getattr(row, form)) for row in found if is_share(row)},
    }


def check_inputs(baseline: Artefact, candidate: Artefact) -> None:
    """Refuses two models that take different inputs.

    Raises:
        UsageError: which input it is, and how they differ.
    """
    where = f"{baseline.name}, {candidate.name}"
    if baseline.kind != candidate.kind:
        kinds = {"text": "a language model", "network": "a plain network"}
        raise UsageError(
            f"the baseline is {kinds[baseline.kind]}, the candidate is {kinds[candidate.kind]}",
            where=where,
            fix="name two models of one kind",
        )
    if baseline.format != candidate.format:
        raise UsageError(
            f"the baseline runs in {RUNTIMES[baseline.format]}, the candidate in {RUNTIMES[candidate.format]}",
            where=where,
            fix="name two models for one runtime",
        )
    if baseline.kind == "text" and baseline.vocab != candidate.vocab:
        raise UsageError(
            f"the baseline has {baseline.vocab:,} token ids, the candidate {candidate.vocab:,}",
            where=where,
            fix="only models that take the same inputs are compared",
        )
    fix = "only models that take the same inputs are compared"
    for name in (*baseline.inputs, *(n for n in candidate.inputs if n not in baseline.inputs)):
        if name.startswith("past_key_values."):  # heads and layers are what pruning removes
            continue
        before, after = baseline.inputs.get(name), candidate.inputs.get(name)
        for missing, other in ((before, "candidate"), (after, "baseline")):
            if missing is None:
                raise UsageError(f"only the {other} takes an input {name!r}", where=where, fix=fix)
        assert before is not None and after is not None
        if before[0] != after[0]:
            raise UsageError(f"input {name!r} is {before[0]} and {after[0]}", where=where, fix=fix)
        fixed = [[d if isinstance(d, int) else None for d in shape] for shape in (before[1], after[1])]
        if len(fixed[0]) != len(fixed[1]) or any(
            a != b for a, b in zip(*fixed, strict=True) if a is not None and b is not None
        ):
            shown = " and ".join("x".join(map(str, shape)) or "a scalar" for shape in (before[1], after[1]))
            raise UsageError(f"the shapes of input {name!r} differ: {shown}", where=where, fix=fix)
