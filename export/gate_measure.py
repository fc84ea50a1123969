"""How the gate measures one model in one fresh process, and what shapes its inputs have then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import CompressError, UsageError
from compress.exporters import gate
from compress.exporters.bench.local import measure_once
from compress.exporters.gate_models import Artefact
from compress.exporters.inputs import Inputs

LABELS = ("baseline", "candidate")


@dataclass(frozen=True)
class Measuring:
    """How one process measures. ``shapes`` names the inputs' whole shapes where they cannot be told from the file;
    ``inputs`` are arrays that both networks are given, in place of made-up ones."""

    threads: int = 1
    samples: int = gate.SAMPLES
    batch: int = 1
    prompt: int = 128
    context: int = 128
    shapes: Mapping[str, Sequence[int]] | None = None
    inputs: Inputs | None = None
    first: int = gate.FIRST
    last: int = gate.LAST


FLOATS = ("float", "float16", "double")
WHOLE = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")


def whole_shapes(artefact: Artefact, spec: Measuring) -> dict[str, list[int]]:
    """The shapes of a network's inputs with the batch filled in; an axis that is said of one input is said of all that
    have an axis of that name.

    Raises:
        UsageError: another free dimension is left, or the network takes what cannot be made up for it.
    """
    if spec.inputs is not None:
        return spec.inputs.shapes
    said = spec.shapes or {}
    strange = [n for n in said if n not in artefact.inputs]
    if strange:
        have = ", ".join(map(repr, artefact.inputs))
        raise UsageError(f"there is no input {strange[0]!r}", where="shapes", fix=f"the inputs are {have}")
    axes: dict[str, int] = {}
    for name, given in said.items():
        shape = artefact.inputs[name][1]
        if len(given) != len(shape) or any(a != b for a, b in zip(given, shape, strict=True) if isinstance(b, int)):
            raise UsageError(
                f"the shape {'x'.join(map(str, given))} does not fit {'x'.join(map(str, shape))}",
                where=f"shapes, input {name!r}",
                fix="change it",
            )
        for axis, count in zip(shape, given, strict=True):
            if isinstance(axis, str) and axis != "?" and axes.setdefault(axis, count) != count:
                raise UsageError(
                    f"the axis {axis!r} is {axes[axis]} and {count}",
                    where=f"shapes, input {name!r}",
                    fix="say one size",
                )
    return {
        name: list(said[name]) if name in said else _filled(artefact, name, axes, spec.batch)
        for name in artefact.inputs
    }


def _filled(artefact: Artefact, name: str, axes: Mapping[str, int], batch: int) -> list[int]:
    kind, shape = artefact.inputs[name]
    if kind not in (*FLOATS, *WHOLE):
        raise UsageError(
            f"input {name!r} is {kind}; numbers are measured",
            where=artefact.name,
            fix="export it with inputs of numbers",
        )
    free = [i for i, d in enumerate(shape) if isinstance(d, str) and d not in axes]
    if any(i != 0 for i in free):
        raise UsageError(
            f"dimension {shape[free[-1]]!r} of input {name!r} is free",
            where=artefact.name,
            fix=f"say the whole shape: --shape {name}={'x'.join(str(d) if isinstance(d, int) else '8' for d in shape)}",
        )
    return [axes.get(d, batch) if isinstance(d, str) else d for d in shape]


Sample = dict[str, Any]
Measure = Callable[[Artefact, Measuring, int], Sample]


def measure(artefact: Artefact, spec: Measuring, seed: int) -> Sample:
    """One fresh process; ``{"runtime", "peak_rss", figure: {"samples", "calls_per_sample", "warm", "load", "first"}}``.

    Raises:
        CompressError: the process failed.
    """
    request: dict[str, Any] = {"threads": spec.threads, "min_seconds": 0.0, "min_runs": spec.samples}
    if artefact.kind == "text":
        request |= {"prompt": spec.prompt, "context": spec.context}
    else:
        request["shapes"] = whole_shapes(artefact, spec)
        if spec.inputs is not None:
            request["inputs"] = str(spec.inputs.file)
    form = artefact.format if artefact.format in ("gguf", "genai") else None
    found = measure_once(artefact.path, request, vocab=artefact.vocab or None, format=form, seed=seed)
    if found["emulated"]:
        raise CompressError(
            "this processor is emulated, and an emulated latency says nothing", where="gate", fix="gate on the device"
        )
    return {"runtime": found["runtime"], "peak_rss": found["peak_rss"], **found["figures"]}
