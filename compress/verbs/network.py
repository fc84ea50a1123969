"""`eval`, `export` and `bench` of a plain network, see `compress.models.saved.Kind`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.networks.reload import Reloaded, read_facts
from compress.networks.run_data import run_data
from compress.schema.sections import NetworkBench, NetworkExport
from compress.words.wording import counted, small

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Port
    from compress.exporters.runtimes import Runner

CALIBRATION = 128  # samples that set the scales of int8


def _load(folder: Path, network: str | None) -> Reloaded:
    """A saved network that gives the outputs that were noted when it was saved.

    Raises:
        UsageError: see `check_named`.
        CompressError: it cannot be loaded, or gives other outputs.
    """
    from compress.networks.reload import check_named, reload
    from compress.networks.setup import same_outputs

    check_named(folder, network)
    loaded = reload(folder, network)
    same_outputs(loaded.found, folder)
    return loaded


def evaluate(folder: Path, like: Path | None, *, network: str | None = None) -> dict[str, Any]:
    """Loss and accuracy (or IoU) of every task on the test split of the run ``like``.

    Inputs are normalised as the network was trained, whatever run the data is of.
    """
    import torch

    from compress.networks import train
    from compress.processes.distributed import device

    if "inputs" in read_facts(folder):
        return _of_job(folder, network)
    if like is None:
        raise UsageError("name the run whose test data is to be used", where="eval", fix="--like RUN")
    data = run_data(like)
    loaded = _load(folder, network)
    facts = loaded.facts
    tasks = [t.facts() for t in data.tasks]
    for what, own, other in (
        ("tasks or classes", facts["tasks"], tasks),
        ("shape of an input", facts["input"], list(data.input_shape)),
    ):
        if own != other:
            raise CompressError(
                f"the network and the run's data differ in the {what}",
                where=f"{folder}, {like}",
                fix="name a run on the data that the network was trained for",
            )
    data = replace(data, mean=torch.tensor(facts["mean"]), std=torch.tensor(facts["std"]))
    found = train.evaluate(loaded.model.to(device()), data, data.test)
    return {
        "model": str(folder),
        "like": str(like),
        "data": {"source": data.source, "sha256": data.sha256},
        "tasks": {name: {**figures, "samples": len(data.test)} for name, figures in found.items()},
    }


def _of_job(folder: Path, network: str | None) -> dict[str, Any]:
    """`evaluate` of a job's network, by the job that ``network`` names."""
    from compress.networks.jobs import asked, job_named
    from compress.processes.distributed import device

    held = job_named(network)
    found = asked(held, _load(folder, network).model.to(device()))
    return {
        "model": str(folder),
        "data": {"source": f"the job {held.title}", "sha256": held.sha256},
        "tasks": found,
    }


def evaluate_lines(facts: dict[str, Any]) -> list[str]:
    return [
        f"{metric} {task}: {value:.4f} ({figures['samples']:,} samples)"
        if "samples" in figures
        else f"{task}: {value:.4f}"
        for task, figures in facts["tasks"].items()
        for metric, value in figures.items()
        if metric != "samples"
    ]


def export(
    folder: Path,
    out: Path,
    *,
    network: str | None = None,
    like: Path | None = None,
    builds: Sequence[BuildOptions] = (),
) -> dict[str, Any]:
    """model.onnx in the empty folder ``out``, checked against torch on the held-out samples that lie with the model.

    Args:
        like: a run whose calibration split sets the scales of int8, and on whose test split every format is judged.
        builds: formats to make of it, each in a folder of ``out``.
    """
    return export_loaded(_load(folder, network), out, like=like, builds=builds)


def export_loaded(loaded: Reloaded, out: Path, *, like: Path | None, builds: Sequence[BuildOptions]) -> dict[str, Any]:
    """`export` of a network that is loaded, checked on the samples that came with it."""
    from compress.exporters.command import make_all, network_source
    from compress.exporters.onnx_module import write_checked_module

    names = [task["name"] for task in loaded.facts["tasks"]]
    facts = write_checked_module(loaded.model, loaded.inputs, names, out, NetworkExport().tolerance)
    more = _of_run(like, names) if like is not None else {}
    sources = [(network_source(out, loaded.model, loaded.inputs, o, more), o) for o in builds]
    return {**facts, "formats": make_all(sources, out)}


def _of_run(like: Path, names: list[str]) -> dict[str, Any]:
    """Calibration inputs and the judge of a run's data, for `compress.exporters.formats.Source`."""
    import torch
    from torch import nn

    from compress.exporters.names import INPUT
    from compress.networks import train

    data = run_data(like)
    x = data.prepare(data.calibration.inputs[torch.arange(min(CALIBRATION, len(data.calibration)))]).numpy()

    class Exported(nn.Module):
        """What runs in a runtime, as torch's evaluation wants it: one parameter, which tells the device."""

        def __init__(self, runner: Runner) -> None:
            super().__init__()
            self.runner, self.place = runner, nn.Parameter(torch.zeros(()))
            self.batch = runner.inputs[0].shape[0]

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            # A file of one batch size takes its samples so; the last ones are filled up.
            size = self.batch or len(x)
            parts = []
            for i in range(0, len(x), size):
                part = x[i : i + size]
                full = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
                found = self.runner.run({INPUT: full.numpy()})
                parts.append({n: torch.from_numpy(found[n])[: len(part)] for n in names})
            return {n: torch.cat([p[n] for p in parts]) for n in names}

    def evaluate(runners: Mapping[str, Runner]) -> dict[str, float]:
        found = train.evaluate(Exported(runners["model"]), data, data.test)
        return {
            f"{metric} {task}": value
            for task, figures in found.items()
            for metric, value in figures.items()
            if metric != "samples"
        }

    return {"calibration": {"model": [{INPUT: x[i : i + 16]} for i in range(0, len(x), 16)]}, "evaluate": evaluate}


def export_lines(facts: dict[str, Any]) -> list[str]:
    from compress.exporters.command import lines

    return [
        *(f"onnx     {name}: {size:,} bytes" for name, size in facts["bytes"].items()),
        f"parity   {counted(facts['samples'], 'held-out sample')}, largest relative difference"
        f" {small(facts['largest_difference'])}",
        *(f"agree    {name}: {100 * share:.0f} % of the classes" for name, share in facts["agree"].items()),
        *lines(facts),
    ]


def bench(
    dense: Path,
    pruned: Path,
    *,
    batch: int | None = None,
    processes: int | None = None,
    threads: int | None = None,
    inputs: Path | None = None,
) -> dict[str, Any]:
    """Latency of one call and memory; what is not given is as in a recipe.

    Args:
        inputs: an .npz file with an array for each input, which both are given.

    Raises:
        CompressError: the two take other inputs.
        UsageError: the arrays are not what they take.
    """
    from compress.exporters.bench.local import compare_modules
    from compress.exporters.formats import read_graph
    from compress.exporters.inputs import given as given_inputs
    from compress.exporters.names import FILE

    if inputs is not None and batch is not None:
        raise UsageError(
            "--batch and --inputs do not go together: the arrays have their own",
            where="the command line",
            fix="leave one out",
        )
    ports = [read_graph(folder / FILE, own_operators=False).inputs for folder in (dense, pruned)]
    if [_sample(p) for p in ports[0]] != [_sample(p) for p in ports[1]]:
        alone = all(len(taken) == 1 for taken in ports)
        shapes = [_sample(taken[0])[2] if alone else [_sample(p) for p in taken] for taken in ports]
        raise CompressError(
            f"the exports take other inputs: {shapes[0]} and {shapes[1]}",
            where=f"{dense}, {pruned}",
            fix="name two exports of one network",
        )
    given = {"batch": batch, "processes": processes, "threads": threads}
    spec = NetworkBench(**{k: v for k, v in given.items() if v is not None}).model_dump()
    if inputs is None:
        return compare_modules(dense, pruned, spec)
    with given_inputs(inputs, [dense / FILE, pruned / FILE]) as taken:
        return compare_modules(dense, pruned, spec, inputs=taken)


def _sample(port: Port) -> tuple[str, str, list[int]]:
    """(name, type, shape of one sample) of an input; 0 is an axis that may vary."""
    return port.name, port.dtype, [n if isinstance(n, int) else 0 for n in port.shape[1:]]


def bench_lines(facts: dict[str, Any]) -> list[str]:
    from compress.exporters.inputs import words
    from compress.report.stats import found_in

    lines = [f"inputs  {words(facts['spec']['inputs'])}"] if "inputs" in facts["spec"] else []
    for label in ("dense", "pruned"):
        m = facts[label]["latency"]
        phases = [
            *([f"load {m['load']:.2f} s"] if m["load"] is not None else []),
            *([f"first {1000 * m['first']:.1f} ms"] if m["first"] is not None else []),
        ]
        lines.append(
            f"latency {label:7} {1000 * m['median']:8.3f} ms  (between processes {100 * m['spread_between']:.1f} %,"
            f" within {100 * m['all']['spread_within']:.1f} %; {', '.join(phases) or 'load and first are not told'})"
        )
    lines.append(f"latency ratio   {found_in(facts, 'latency').words}")
    for label in ("dense", "pruned"):
        peak = facts[label]["peak_rss"]
        told = f"{peak / 1e6:8.0f} MB" if peak is not None else "not told   "
        lines.append(f"rss     {label:7} {told}   file {facts[label]['bytes']:,} bytes")
    return lines
