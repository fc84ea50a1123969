"""What is done for a named target: is it there, what it gets, and how fast that is on it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.exporters.bench.transport import Absent, Transport, answered, artefact
from compress.exporters.command import label
from compress.exporters.formats import (
    FORMATS,
    BuildOptions,
    Source,
    check_options,
    describe,
    make,
    network_profiles,
    text_profiles,
)
from compress.exporters.inputs import Inputs
from compress.exporters.inputs import given as given_inputs
from compress.exporters.names import FILE
from compress.exporters.target import Target, load_target, transport_of

COOL = 60.0  # degrees Celsius: below it, no processor of a target slows itself down
BUSY = 0.5  # load a core above which timings are of something else, too
RECORD = "bench.json"
ROOM = 1e9  # bytes an artefact and its results easily need


def doctor(name: str) -> list[dict[str, str]]:
    """One row a part of the target: ``part``, ``state`` (``ok``, ``warn``, ``missing``), ``detail``, ``for``.

    Raises:
        UsageError: the target's file is wrong.
    """
    target = load_target(name)
    transport = transport_of(target)
    try:
        transport.available()
        found = answered(
            transport.run({"do": "look", "format": target.format, "folder": transport.room()}), transport.title
        )
    except UsageError:
        raise
    except CompressError as e:
        return [_row(transport.title, "missing", f"{e.what}; {e.fix}", "the device")]
    device, state = found["device"], found["state"]
    cores = device.get("cores_allowed") or device.get("cores") or 1
    what = f"{device['cpu']}, {device['machine']}, {cores} cores, {device['system']}"
    rows = [
        _row(transport.title, "ok", what + (f", Python {device['python']}" if "python" in device else ""), "the device")
    ]
    if "runtime" in found:
        rows.append(_row(target.format, "ok", found["runtime"], f"running {target.format}"))
    else:
        missing = found["missing"]
        rows.append(_row(target.format, "missing", f"{missing['what']}; {missing['fix']}", f"running {target.format}"))
    free = found["free_disk"]
    rows.append(_row("disk", "ok" if free > ROOM else "warn", f"{free / 1e9:.1f} GB free", "artefacts"))
    if device.get("emulated") or target.emulated:
        rows.append(_row("processor", "warn", "emulated: its times are not the device's, and never gated", "latency"))
    if "load_average" in state:
        busy = state["load_average"] > BUSY * cores
        rows.append(
            _row("load", "warn" if busy else "ok", f"{state['load_average']:.2f} on {cores} cores", "steady times")
        )
    if "governor" in device:
        fast = device["governor"] == "performance"
        how = "" if fast else "; performance keeps the clock still"
        rows.append(_row("governor", "ok" if fast else "warn", device["governor"] + how, "steady times"))
    heat = state.get("temperature")
    if heat is not None:
        rows.append(_row("heat", "ok" if heat < COOL else "warn", f"{heat:.0f} degrees", "not being throttled"))
    if "thermal_status" in state:
        calm = state["thermal_status"] == 0
        rows.append(
            _row("throttling", "ok" if calm else "warn", f"Android's status {state['thermal_status']}", "full clocks")
        )
    if "battery" in state:
        level = state["battery"].get("level")
        rows.append(_row("battery", "ok" if (level or 0) >= 30 else "warn", f"{level} %", "full clocks"))
    if state.get("gpu"):
        gpu = state["gpu"]
        rows.append(_row("gpu", "ok", f"{gpu.get('name')}, driver {gpu.get('driver')}", "TensorRT"))
    rows.append(_row("power", "ok", ", ".join(found["meters"]) or "the platform does not tell it", "joules a call"))
    return rows


def _row(part: str, state: str, detail: str, use: str) -> dict[str, str]:
    return {"part": part, "state": state, "detail": detail, "for": use}


def build_options(name: str) -> BuildOptions:
    """How the target's artefact is built: format, precision, shapes and GPUs of its file.

    Raises:
        UsageError: the target's file is wrong, or what builds its format is not installed.
    """
    target = load_target(name)
    shapes = target.shapes
    most = max(*shapes.prompts, *shapes.contexts, shapes.max_context or 1)
    options = BuildOptions(
        target.format,
        target.precision,
        {
            **network_profiles(shapes.batch),
            **text_profiles(shapes.prompts[0], shapes.contexts[0], most=most),
        },
        threads=target.threads,
    )
    if target.compute_capability:
        named = tuple(f"sm{c.replace('.', '')}" for c in target.compute_capability)
        options = replace(options, capabilities=named)
    check_options(options)
    return options


def built(source: Path, model: Callable[[], Any], folder: Path, options: BuildOptions) -> Path:
    """The target's artefact of the ONNX export ``source``: that itself where it is what the target takes, else built
    into ``folder``.

    Args:
        model: makes the torch module, for formats that are not made of ONNX.
    """
    if options.format == "onnx" and options.precision == "fp32":
        return source
    made = Source(source, model() if FORMATS[options.format].of_torch else None)
    where = folder / label(options)
    make(made, where, options)
    return where


def place(folder: Path, target: Target) -> Path:
    """Where the target's artefact lies in what `compress export --target` made; the folder itself where it holds it.

    Raises:
        CompressError: there is none, or it has changed since it was built.
    """
    built = folder / label(BuildOptions(target.format, target.precision))
    where = built if built.is_dir() else folder
    if (where / f"{target.format}.json").exists():
        describe(where, target.format)  # what was cut off or changed since is not measured
    try:
        artefact(where, target.format)
    except Absent as e:
        raise CompressError(
            e.what, where=str(folder), fix=f"build it: compress export MODEL --target {target.name} --out FOLDER"
        ) from e
    return where


def bench(dense: Path, pruned: Path, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Two artefacts in the target's format, measured on it.

    Args:
        given: what the command line says in place of the target: ``prompt``, ``context``, ``batch``, ``processes``,
            ``threads``; None where it does not. ``inputs``: an .npz file with what both networks are given.

    Returns:
        As `local.compare`; and ``kind``, ``target`` and ``budget``: the milliseconds it allows, and by figure whether
        the pruned model keeps to them in every process (None where some do, or the processor is emulated).
    """
    target = load_target(name)
    dense, pruned = place(dense, target), place(pruned, target)
    kind = "text" if "prefill" in artefact(dense, target.format).parts else "network"
    strange = {"text": ("batch", "inputs"), "network": ("prompt", "context")}[kind]
    for option in strange:
        if given.get(option) is not None:
            raise UsageError(f"--{option} is not for this kind of model", where="the command line", fix="leave it out")
    lengths = {f"{k}s": [given[k]] for k in ("prompt", "context") if given.get(k) is not None}
    spec = target.spec(**lengths, **{k: given.get(k) for k in ("batch", "processes", "threads")})
    transport = transport_of(target)
    transport.available()
    with _inputs(given.get("inputs"), (dense, pruned)) as inputs:
        found = _measured(dense, pruned, target, spec, transport, inputs)
    found["kind"], found["target"] = kind, target.model_dump(mode="json", exclude_none=True)
    if target.budget is not None:
        kept = {
            figure: None if found["emulated"] else _kept(found["pruned"][figure]["process_medians"], target.budget)
            for figure in found["ratios"]
            if figure != "peak_rss"
        }
        found["budget"] = {"milliseconds": target.budget, "kept": kept}
    return found


def _measured(
    dense: Path, pruned: Path, target: Target, spec: dict[str, Any], transport: Transport, inputs: Inputs | None
) -> dict[str, Any]:
    """The two compared and, in ONNX on a real processor, the speed-up explained."""
    from compress.exporters.bench.explain import why
    from compress.exporters.bench.local import compare

    found = compare(
        dense,
        pruned,
        spec,
        format=target.format,
        transport=transport,
        cool_down=target.cool_down,
        inputs=inputs,
    )
    found["emulated"] = found["emulated"] or target.emulated
    if target.format == "onnx" and not found["emulated"]:
        own = spec if inputs is None else {**spec, "inputs": str(inputs.file)}
        found["why"] = why(dense, pruned, own, transport, block=target.round_to)
    return found


@contextmanager
def _inputs(path: Path | None, folders: Sequence[Path]) -> Iterator[Inputs | None]:
    """The arrays of ``path`` for the networks in two folders that `compress export` made."""
    if path is None:
        yield None
        return
    graphs = [next((p for p in (f / FILE, f.parent / FILE) if p.is_file()), f / FILE) for f in folders]
    with given_inputs(path, graphs) as found:
        yield found


def _kept(medians: Sequence[float], milliseconds: float) -> bool | None:
    """Whether every process keeps to the budget; None where some do and some do not."""
    kept = {1000 * one <= milliseconds for one in medians}
    return kept.pop() if len(kept) == 1 else None


def bench_lines(found: dict[str, Any]) -> list[str]:
    from compress.models.saved import KINDS
    from compress.report.explained import lines as explained_lines
    from compress.report.stats import UNRESOLVED

    lines: list[str] = importlib.import_module(KINDS[found["kind"]].verbs).bench_lines(found)
    for side in ("dense", "pruned"):
        for figure, rows in found[side].get("grid", {}).items():
            for row in rows if len(rows) > 1 else ():
                length = row.get("prompt") or row.get("context")
                lines.append(f"{figure} {side:7} {1000 * row['median']:8.2f} ms  at {length} tokens")
    machine = found["machine"]
    lines.append(f"target  {found['spec']['target']}: {machine['cpu']}, {found['spec']['runtime']}")
    if found["emulated"]:
        lines.append("mark    emulated: these times are not the device's, and are never gated")
    if found["throttled"]:
        lines.append("mark    throttled: the last quarter of a run is over 5 % slower than its first")
    for part, explained in found.get("why", {}).items():
        head, *rest = explained_lines(explained)
        lines.append(f"ideal   {part}: {head}")
        lines += [f"why     {line}" for line in rest]
    for figure, kept in found.get("budget", {}).get("kept", {}).items():
        says = {True: "kept", False: "NOT kept", None: "not judged" if found["emulated"] else UNRESOLVED}[kept]
        lines.append(f"budget  {figure}: {found['budget']['milliseconds']:g} ms are {says}")
    return lines


def write(found: dict[str, Any], folder: Path) -> None:
    """bench.json, with every raw sample, and the plots, into a folder that is there."""
    from compress.exporters.bench.plots import draw

    (folder / RECORD).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, folder)


def listing() -> dict[str, str]:
    from compress.exporters.target import target_names

    return {name: load_target(name).description for name in target_names()}
