"""Artefacts measured: fresh processes, interleaved ABBA, raw samples kept; here, or on a device (see transport.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from compress.errors import CompressError
from compress.exporters.bench.packed import agent_file
from compress.exporters.bench.transport import Artefact, Transport, answered, artefact
from compress.exporters.inputs import Inputs
from compress.exporters.names import FILE, PREFILL
from compress.exporters.ranges import index_ranges
from compress.exporters.tensors import read
from compress.processes.children import python
from compress.report.stats import paired_ratio, summary
from compress.run.cache import sha256_of
from compress.run.progress import Progress
from compress.system import host, threads
from compress.system.files import whole_file

LLAMA_CPP = "compress.exporters.llama_cpp.worker"
MEASURE = {"threads": 1, "min_seconds": 2.0, "min_runs": 5}  # where a spec does not say


@dataclass(frozen=True)
class Local:
    """This machine: nothing is copied."""

    title: str = "this-machine"

    def available(self) -> dict[str, Any]:
        return {}

    def push(self, files: Sequence[Path]) -> dict[str, str]:
        # Not resolved: a runtime looks for weights beside the name it is given, which may be a link in the hub's cache.
        return {path.name: str(path.absolute()) for path in files}

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        # libllama is no runtime of devices: its own worker measures it, and answers as the agent does.
        agent = ("-m", LLAMA_CPP) if request.get("format") == "gguf" else (str(agent_file()),)
        done = subprocess.run(
            python(*agent),
            env=threads.to_measure(),
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise CompressError(
                f"the measuring process failed: {last}",
                where=", ".join(request.get("files", {}).values()) or self.title,
                fix="check the export with `compress verify`, or export it again",
            )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def pull(self, there: str, here: Path) -> None:
        with whole_file(here) as partial:
            shutil.move(there, partial)

    def room(self) -> str:
        return tempfile.gettempdir()


LOCAL = Local()


def measure_once(
    where: Path,
    spec: Mapping[str, Any],
    *,
    vocab: int | None = None,
    format: str | None = None,
    file: str | None = None,
    seed: int = 0,
    transport: Transport = LOCAL,
) -> dict[str, Any]:
    """Measures one artefact in ONE fresh process.

    Args:
        where: an export folder (a language model's prefill and decode, or a network's one file), or the file itself.
        spec: ``threads``, ``min_seconds``, ``min_runs``, ``sample_seconds``, ``options`` of the runtime; of a language
            model ``prompt`` and ``context``, or ``prompts`` and ``contexts`` for a grid; of a network ``batch`` and
            ``shapes``, or ``inputs``: an .npz file with an array for each. Other keys are not read; those left out are
            as in `MEASURE`.
        vocab: token ids are drawn below it (language models; read from the ONNX file where it is left out).
        format, file: which of several artefacts of a folder.
        seed: of the input's values; two artefacts measured with one seed read the same.

    Returns:
        ``figures``: ``latency``, or ``ttft`` and ``tpot`` -> ``load``, ``first``, raw ``samples`` (seconds),
        ``calls_per_sample``, ``warm_up``, ``warm``, ``throttled``; ``grid`` of a language model; ``peak_rss`` and
        ``bytes`` (of the files); ``runtime``; ``environment``; ``emulated`` (such a latency is never gated);
        ``sha256`` by file.

    Raises:
        CompressError: there is no such artefact, or measuring failed; with the process's own words.
    """
    made = artefact(where, format, file)
    there = transport.push(made.files)
    found = _measure(made, there, spec, vocab, seed, transport, where)
    return {**found, "bytes": made.bytes, "sha256": made.hashes()}


def _measure(
    made: Artefact,
    there: Mapping[str, str],
    spec: Mapping[str, Any],
    vocab: int | None,
    seed: int,
    transport: Transport,
    where: Path,
) -> dict[str, Any]:
    request: dict[str, Any] = {
        "do": "measure",
        "format": made.format,
        "files": {part: there[path.name] for part, path in made.parts.items()},
        "seed": seed,
        **MEASURE,
        **{k: v for k, v in spec.items() if k in ("sample_seconds", "options", "batch", "shapes", *MEASURE)},
    }
    if made.format == "gguf":
        request |= {"prompts": [spec["prompt"]], "contexts": [spec["context"]]}
    elif "prefill" in made.parts:
        request["prompts"] = list(spec.get("prompts") or [spec["prompt"]])
        request["contexts"] = list(spec.get("contexts") or [spec["context"]])
        request["vocab"] = vocab if vocab is not None else vocab_of(made.parts["prefill"])
    elif "genai" in made.parts:
        request["prompts"] = list(spec.get("prompts") or [spec["prompt"]])
        request["contexts"] = list(spec.get("contexts") or [spec["context"]])
    else:
        request["rows"] = rows_of(made.parts["model"])
        if spec.get("inputs"):
            request["inputs"] = brought(Path(spec["inputs"]), transport)
    try:
        return answered(transport.run(request), transport.title)
    except CompressError as e:
        raise CompressError(e.what, where=f"{where} on {transport.title}", fix=e.fix) from e


def brought(inputs: Path, transport: Transport) -> str:
    """The place of a file of inputs on the device."""
    return transport.push((inputs,))[inputs.name]


def rows_of(model: Path) -> dict[str, int]:
    """The rows of the tables that whole-number inputs are looked up in (`compress.exporters.ranges.index_ranges`), from
    the ONNX file itself, or the one beside or above what was built of it; none where there is no such file."""
    places = (model, model.with_name(FILE), model.parent.parent / FILE)
    graph = next((p for p in places if p.suffix == ".onnx" and p.is_file()), None)
    if graph is None:
        return {}
    facts = graph.stat()
    return _rows(graph, facts.st_size, facts.st_mtime_ns)


@cache
def _rows(graph: Path, size: int, changed: int) -> dict[str, int]:
    """Once while a file stays as it is."""
    return index_ranges(read(graph).graph)


def vocab_of(prefill: Path) -> int:
    """The number of token ids, from the shape of an ONNX graph's logits: the file's own, or that it was made of.

    Raises:
        CompressError: there is no ONNX file, here or in the folder above.
    """
    places = (prefill, prefill.with_name(PREFILL), prefill.parent.parent / PREFILL)
    graph = next((p for p in places if p.suffix == ".onnx" and p.is_file()), None)
    if graph is None:
        raise CompressError(
            "the vocabulary's size is not known",
            where=str(prefill),
            fix=f"keep {PREFILL} where `compress export` put it, in the folder above",
        )
    logits = read(graph).graph.output[0]
    return int(logits.type.tensor_type.shape.dim[2].dim_value)


def compare(
    dense: Path,
    pruned: Path,
    spec: Mapping[str, Any],
    *,
    vocab: int | None = None,
    format: str | None = None,
    file: str | None = None,
    transport: Transport = LOCAL,
    cool_down: float = 0.0,
    inputs: Inputs | None = None,
) -> dict[str, Any]:
    """Measures two artefacts of one format, interleaved ABBA.

    Args:
        spec: as of `measure_once`, and ``processes``: fresh ones for each.
        inputs: networks: what both are given; the record's ``spec`` says what that was.
        cool_down: seconds of rest before every process.

    Returns:
        Per model and figure (seconds; ``peak_rss``: bytes): the median over processes, the spread between processes and
        within them, and the raw samples; the paired ratio dense / pruned with its 95 % interval; and what the machine
        was and did meanwhile.

    Raises:
        CompressError: an artefact is missing, the device cannot be reached, or a measuring process failed.
    """
    places = {"dense": dense, "pruned": pruned}
    made = {label: artefact(folder, format, file) for label, folder in places.items()}
    if (made["dense"].format == "genai") != (made["pruned"].format == "genai"):
        raise CompressError(
            "one is a folder for ONNX Runtime GenAI, the other is not",
            where=f"{dense}, {pruned}",
            fix="name two exports of one format",
        )
    if set(made["dense"].parts) != set(made["pruned"].parts):
        raise CompressError(
            "one is a language model, the other is not", where=f"{dense}, {pruned}", fix="name two exports of one kind"
        )
    if inputs is not None:
        spec = {k: v for k, v in spec.items() if k not in ("batch", "shapes")} | {"inputs": str(inputs.file)}
    there = {label: transport.push(a.files) for label, a in made.items()}
    runs: dict[str, list[dict[str, Any]]] = {"dense": [], "pruned": []}
    before = machine_state()
    with Progress(2 * spec["processes"], "measuring in fresh processes") as bar:
        for i in range(spec["processes"]):
            for label in ("dense", "pruned") if i % 2 == 0 else ("pruned", "dense"):
                time.sleep(cool_down)
                runs[label].append(_measure(made[label], there[label], spec, vocab, i, transport, places[label]))
                bar.update(1)
    figures = list(runs["dense"][0]["figures"])
    environment = [r["environment"] for label in runs for r in runs[label]]
    found: dict[str, Any] = {
        "spec": {
            **spec,
            **({"inputs": inputs.facts()} if inputs is not None else {}),
            "order": "ABBA",
            "runtime": runs["dense"][0]["runtime"],
            "target": transport.title,
            "cool_down": cool_down,
        },
        "machine": {
            "before": before,
            "after": machine_state(),
            **{k: v for k, v in environment[0].items() if k not in ("start", "end")},
            "processes": [{"start": e["start"], "end": e["end"]} for e in environment],
        },
        "emulated": any(e["emulated"] for e in environment),
        "ratios": {},
    }
    for label, measured in runs.items():
        main = next(iter(made[label].parts.values()))
        weights = [p for p in made[label].files if p not in made[label].parts.values()]
        found[label] = {
            "bytes": made[label].bytes,
            "sha256": sha256_of(weights[0] if weights else main),
            "files": made[label].hashes(),
            "peak_rss": _middle([r["peak_rss"] for r in measured]),
            "peak_rss_samples": [r["peak_rss"] for r in measured],
            **{figure: _figure([r["figures"][figure] for r in measured]) for figure in figures},
        }
        if "grid" in measured[0]:
            found[label]["grid"] = {
                name: [
                    {**_length(rows[0]), **_figure(rows)}
                    for rows in zip(*(r["grid"][name] for r in measured), strict=True)
                ]
                for name in figures
            }
    for figure in figures:
        found["ratios"][figure] = paired_ratio(
            found["dense"][figure]["process_medians"], found["pruned"][figure]["process_medians"]
        )
    peaks = [found[label]["peak_rss_samples"] for label in ("dense", "pruned")]
    if None not in (*peaks[0], *peaks[1]):
        found["ratios"]["peak_rss"] = paired_ratio(*peaks)
    found["throttled"] = any(found[label][f]["throttled"] for label in runs for f in figures)
    return found


def _middle(values: Sequence[float | None]) -> float | None:
    """The median; None where a benchmark program does not tell the value."""
    told = [v for v in values if v is not None]
    return median(told) if told else None


def _length(row: Mapping[str, Any]) -> dict[str, int]:
    return {k: row[k] for k in ("prompt", "context") if k in row}


def _figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One figure over its processes."""
    medians = [median(r["samples"]) for r in rows]
    single = all(r["calls_per_sample"] == 1 for r in rows)
    found = {
        "median": median(medians),
        "spread_between": (max(medians) - min(medians)) / median(medians),
        "load": _middle([r["load"] for r in rows]),
        "first": _middle([r["first"] for r in rows]),
        "process_medians": medians,
        "warm": all(r["warm"] for r in rows),
        "throttled": any(r["throttled"] for r in rows),
        "calls_per_sample": [r["calls_per_sample"] for r in rows],
        "all": summary([s for r in rows for s in r["samples"]], single),
        "raw": [r["samples"] for r in rows],
        "loads": [r["load"] for r in rows],
        "firsts": [r["first"] for r in rows],
    }
    if all("device_samples" in r for r in rows):
        found["device"] = summary([s for r in rows for s in r["device_samples"]], single)
    if all("watts" in r for r in rows):
        found["watts"] = {name: median(r["watts"][name] for r in rows) for name in rows[0]["watts"]}
    return found


def compare_llm(dense: Path, pruned: Path, spec: dict[str, Any], vocab: int | None) -> dict[str, Any]:
    """Two export folders of language models on this machine; see `compare`."""
    return compare(dense, pruned, spec, vocab=vocab)


def compare_gguf(dense: Path, pruned: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Two folders of GGUF in a stock llama.cpp on this machine; see `compare`."""
    return compare(dense, pruned, spec, format="gguf")


def compare_modules(
    dense: Path, pruned: Path, spec: dict[str, Any], file: str = "model.onnx", inputs: Inputs | None = None
) -> dict[str, Any]:
    """Two export folders of networks on this machine: the file of that name in each; its kind says the runtime."""
    return compare(dense, pruned, spec, file=file, inputs=inputs)


def machine_state() -> dict[str, Any]:
    """Load and clocks, as far as the system tells: what can disturb a timing."""
    found = {"load_average": host.load_average(), "governor": host.governor()}
    return {name: value for name, value in found.items() if value is not None}
