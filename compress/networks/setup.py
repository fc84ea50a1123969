"""A plain network and its data: what every method does alike with one, from the dense training to the release.

A method adds what it removes and why (`compress.recipes.global_mp.network_stages`); everything here takes a module and
a stage's name.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.data.job import FUNCTIONS
from compress.errors import CompressError, UsageError
from compress.processes.children import python
from compress.processes.distributed import device
from compress.run.cache import sha256_of
from compress.run.folder import Run, fingerprint, link, read_seal, seal_hash
from compress.schema.sections import SOURCES, DataSpec, NetworkRecipe, TrainSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.data.images import Splits
    from compress.data.inputs import Inputs
    from compress.data.job import Figure, NamedJob
    from compress.data.tasks import Task
    from compress.models.sources import Resolved
    from compress.networks.published import PublishedNetwork
    from compress.networks.train import Masks, Remask, Trainer

WEIGHTS, FACTS, FINGERPRINT = "model.safetensors", "network.json", "fingerprint.safetensors"
MASKS = "masks.safetensors"
TOLERANCE = 1e-4  # largest difference allowed of reloaded outputs, relative to the largest


@dataclass
class NetworkSetup:
    """A network, a recipe and data, checked as far as it goes without reading any of it."""

    resolved: Resolved
    recipe: NetworkRecipe
    network: str
    given: dict[str, Any]
    spec: DataSpec
    weights: str  # hash of the weights file, or of what draws them
    weights_file: Path | None
    trainer: tuple[str, Trainer] | None = None  # a training in place of ours, and the hash of its code
    load: Callable[[NetworkSetup, nn.Module], None] | None = None  # puts the weights of a model by name into it
    job: NamedJob | None = None  # the user's own functions, in place of ``spec``, ``trainer`` and our measures

    @cached_property
    def data(self) -> Splits:
        """The samples; a job has none that anyone else may see."""
        from compress.data.images import load

        if self.job is not None:
            raise CompressError("a job's data are its own", where=self.network, fix="this is a fault of compress")
        return load(self.spec)

    @property
    def title(self) -> str:
        """What the data is called."""
        return self.spec.title if self.job is None else f"of the job {self.job.title}"

    @property
    def data_sha256(self) -> str:
        """The hash of all samples, or of the files that a job's functions stand in."""
        return self.data.sha256 if self.job is None else self.job.sha256

    @property
    def tasks(self) -> Sequence[Task | Figure]:
        """What the network is judged by."""
        return self.data.tasks if self.job is None else self.job.tasks

    @cached_property
    def example(self) -> Inputs:
        """A job's example, on the CPU."""
        from compress.data.inputs import checked

        assert self.job is not None  # asked by the caller
        return checked(self.job.job.example, f"{self.job.title}, example")

    def sample(self, count: int) -> Inputs:
        """What the network takes, to be traced and counted with: zeros of the data's shape, or a job's example."""
        import torch

        from compress.data.inputs import first

        if self.job is None:
            return torch.zeros(count, *self.data.input_shape)
        return first(self.example, count)

    @cached_property
    def output_names(self) -> list[str]:
        """The outputs by which exports and fingerprints are compared: one a task, or what a job's network gives."""
        import torch

        from compress.data.inputs import call
        from compress.data.outputs import output_names

        if self.job is None:
            return [task.name for task in self.data.tasks]
        with torch.no_grad():
            return output_names(call(self.build().cpu().eval(), self.example))

    def outputs(self, given: Any) -> dict[str, Tensor]:
        """What the network returned, by `output_names`.

        Raises:
            CompressError: it does not fit the tasks.
        """
        from compress.data.outputs import named
        from compress.data.tasks import by_task

        return by_task(given, self.data.tasks) if self.job is None else named(given, self.output_names)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The function's arguments; what the data decides is filled in where the function takes it."""
        from compress.models.zoo import accepts

        found = dict(self.given)
        if self.job is not None:
            return found
        decided = {"classes": self.data.tasks[0].outputs, "channels": self.data.input_shape[0]}
        return {k: v for k, v in decided.items() if accepts(self.network, k)} | found

    def build(self, **changes: Any) -> nn.Module:
        """The network with its first weights: those of the file or job, or drawn from the seed.

        Raises:
            UsageError: it holds weights of half precision.
        """
        model = self._built({**self.arguments, **changes})
        for name, weight in model.named_parameters():
            other = weight.dtype.itemsize < 4 or (self.job is not None and weight.dtype.itemsize > 4)
            if weight.is_floating_point() and other:
                raise UsageError(
                    f"the weight {name} is {str(weight.dtype).removeprefix('torch.')}; a network is trained, pruned and"
                    " checked in float32",
                    where=self.network,
                    fix="let the function make it in float32"
                    + (" (--set train.precision=bfloat16 multiplies in bfloat16)" if self.job is None else ""),
                )
        return model.to(device())

    def _built(self, arguments: Mapping[str, Any]) -> nn.Module:
        import copy

        from compress.models.zoo import build, network_of

        if self.job is None:
            return build(self.network, arguments, self.recipe.seed)
        if "network" not in self.job.kept:  # it may be long to load
            self.job.kept["network"] = network_of(self.job.job, self.job.name).cpu()
        model: nn.Module = copy.deepcopy(self.job.kept["network"])
        return model

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides every training: JSON-like, for seals."""
        return {
            "version": __version__,
            "network": self.network,
            "arguments": self.arguments,
            "weights": self.weights,
            "data": self.data_sha256,
            "seed": self.recipe.seed,
            **({"trainer": self.trainer[0]} if self.trainer is not None else {}),
        }

    def train(
        self, model: nn.Module, spec: TrainSpec, **given: Any
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Trains the network in place, as a `compress.networks.train.Trainer` does: every method trains by it alone."""
        from compress.networks.jobs import train_by_job
        from compress.networks.train import train

        if self.job is not None:
            return train_by_job(self.job, model, spec, **given)
        return (train if self.trainer is None else self.trainer[1])(model, self.data, spec, **given)

    def evaluate(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Every task's figures on the test data."""
        from compress.networks import train
        from compress.networks.jobs import figures

        if self.job is not None:
            found = figures(self.job, "evaluate", model.eval(), self.recipe.seed)
            return {name: {name: value} for name, value in found.items()}
        return train.evaluate(model, self.data, self.data.test)


def prepare(model: str, recipe: NetworkRecipe) -> NetworkSetup:
    """Finds the network, its data and its weights; runs no code but the user's own file, where they named one.

    Raises:
        UsageError: there is no such network, no data is named, or nothing would be trained.
    """
    from compress.language.setup import quiet
    from compress.models.sources import NetworkAlias, Resolved, alias_names, network_alias
    from compress.models.zoo import job_of
    from compress.networks.jobs import prepare_job
    from compress.networks.published import published

    quiet()
    if recipe.export is not None and "mnn" in recipe.export.formats:
        from compress.exporters.mnn import require_mnn

        require_mnn()
    for form in made_after(recipe):
        from compress.exporters.formats import BuildOptions, check_options

        check_options(BuildOptions(form))
    found: PublishedNetwork | None = None
    if ".py:" in model:
        path = Path(model.rpartition(":")[0])
        if not path.is_file():
            raise UsageError("there is no such file", where=str(path), fix="name it as path/file.py:function")
        job = job_of(model)
        if job is not None:
            return prepare_job(job, recipe)
        alias, source, code = NetworkAlias(network=model, data={}), f"file {path.name}", sha256_of(path)
        name = f"{path.stem}-{model.rpartition(':')[2]}"
    else:
        found = published(model) if model not in alias_names() else None
        alias = found.alias if found is not None else network_alias(model)
        source, code, name = (found.source, "", found.name) if found else ("weights drawn by seed", "", model)
    spec = _data_spec(alias.data, recipe, model)
    arguments = {**alias.arguments, **recipe.arguments}
    file = recipe.weights
    if file is None and alias.sources and not recipe.train.epochs:
        from compress.models.sources import from_hub

        folder, source = from_hub(str(alias.sources[0].hub), alias.sources[0].revision)
        file = folder / WEIGHTS
    load = found.load if found is not None and file is None else None
    if file is None and load is None and not recipe.train.epochs:
        raise UsageError(
            "the dense network would be neither trained nor loaded",
            where="train.epochs",
            fix="train it for some epochs, or name its weights (--set weights=FILE.safetensors)",
        )
    if file is not None:
        if not file.is_file():
            raise UsageError("there is no such file of weights", where=str(file), fix="check the path")
        source = source if recipe.weights is None else f"file {file.name}"
    drawn = fingerprint({"network": alias.network, "arguments": arguments, "seed": recipe.seed, "code": code})
    weights = sha256_of(file) if file is not None else found.weights if found is not None and load else drawn
    resolved = Resolved(name, Path(), source, alias.base_model, alias.license)
    # What the model's own file says of the data is said in the run's lock too: it is what `compress eval` reads.
    recipe = recipe.model_copy(update={"data": spec})
    return NetworkSetup(resolved, recipe, alias.network, arguments, spec, weights, file, load=load)


def check_data(setup: NetworkSetup) -> None:
    """What can be told of the data without opening it, for `plan`: a table's rows, and that their images are there.

    Raises:
        CompressError: as `compress.data.table.check_table`.
    """
    from compress.data.table import check_table

    if setup.job is None and setup.spec.table is not None:
        check_table(setup.spec.table, setup.spec)


def _data_spec(own: Mapping[str, Any], recipe: NetworkRecipe, model: str) -> DataSpec:
    """The recipe's data; where it names no source, the model's own with the recipe's values laid over it."""
    from pydantic import ValidationError

    given = recipe.data.model_dump(exclude_unset=True) if recipe.data is not None else {}
    if recipe.data is not None and recipe.data.named():
        own = {k: v for k, v in own.items() if k not in SOURCES}
    try:
        found = DataSpec.model_validate({**own, **given})
    except ValidationError as e:
        raise UsageError(f"the model's data is wrong: {e.errors()[0]['msg']}", where=model, fix="mend its file") from e
    if not found.named():
        raise UsageError(
            f"{model} has no data of its own",
            where="data",
            fix="name it: --set data.folder=PATH (or table, package, hub)",
        )
    return found


# --- stages ---------------------------------------------------------------------------------------------------------


def trained(
    run: Run,
    setup: NetworkSetup,
    name: str,
    spec: TrainSpec | None,
    start: Callable[[], nn.Module],
    *,
    inputs: Mapping[str, Any],
    masks: Masks | None = None,
    remask: Remask | None = None,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """A sealed stage with a network trained from ``start``: the saved network (`save_network`), masks where there are
    any, and a row an epoch. ``changes`` are the arguments in which the network differs from the setup's.

    A run that was stopped in it goes on from the last checkpoint to the same bytes.
    """
    from safetensors.torch import save_file

    from compress.networks.train import apply_masks, check_masks

    def build(folder: Path | None) -> None:
        model = start()
        held, rows = dict(masks or {}), list[dict[str, float]]()
        if spec is not None and spec.epochs:
            checkpoint = run.scratch(name) / "checkpoint.safetensors"
            held, rows = setup.train(
                model,
                spec,
                seed=setup.recipe.seed + seed,
                masks=masks,
                remask=remask,
                checkpoint=checkpoint,
                label=name,
                identity=facts,
            )
        else:
            check_masks(model, held)
            apply_masks(model, held)
        if folder is None:
            return
        save_network(setup, model, folder, **(changes or {}))
        if held:
            save_file({k: m.contiguous() for k, m in held.items()}, folder / MASKS)
        (folder / "training.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    facts = {
        **setup.inputs,
        **inputs,
        "train": spec.model_dump(mode="json", exclude={"checkpoint_steps"}) if spec else None,
    }
    folder = run.stage_together(name, facts, build)
    run.drop_scratch(name)
    return folder


def dense_network(run: Run, setup: NetworkSetup) -> Path:
    """The stage ``dense``: trained here, or the weights that were given, trained further where there are epochs."""
    from compress.models.zoo import load_weights

    def start() -> nn.Module:
        model = setup.build()
        if setup.weights_file is not None:
            load_weights(model, setup.weights_file)
        elif setup.load is not None:
            setup.load(setup, model)
        return model

    return trained(run, setup, "dense", setup.recipe.train, start, inputs={})


def save_weights(model: nn.Module, path: Path) -> None:
    """All parameters and buffers as safetensors; tied ones are written under each of their names."""
    from safetensors.torch import save_file

    save_file({k: v.detach().to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()}, path)


def loaded(setup: NetworkSetup, folder: Path, **changes: Any) -> nn.Module:
    """The network of a stage, in evaluation mode; where channels are gone, without them."""
    from compress.models.zoo import load_weights
    from compress.networks.reload import read_facts
    from compress.networks.surgery import resize

    model = resize(setup.build(**changes), read_facts(folder).get("widths", {}))
    load_weights(model, folder / WEIGHTS)
    return model.eval()


def real_inputs(setup: NetworkSetup, count: int) -> Inputs:
    """The first held-out samples, prepared: (count, ...) float32; of a job those of its example."""
    import torch

    if setup.job is not None:
        return setup.sample(count)
    split = setup.data.test
    return setup.data.prepare(split.inputs[torch.arange(min(count, len(split)))])


def save_network(setup: NetworkSetup, model: nn.Module, folder: Path, **changes: Any) -> None:
    """A folder that can be loaded by itself: weights, how to build the network, and outputs on held-out samples."""
    import torch
    from safetensors.torch import save_file

    from compress.data.inputs import call
    from compress.networks.reload import fingerprint_inputs
    from compress.networks.surgery import changed_widths

    model = model.cpu().eval()
    save_weights(model, folder / WEIGHTS)
    cut = changed_widths(setup.build(**changes), model)
    x = real_inputs(setup, 4)
    facts: dict[str, Any] = {
        "network": setup.network,
        "arguments": {**setup.arguments, **changes},
        **_facts(setup, x),
        # Layers that are narrower than the function makes them.
        **({"widths": cut} if cut else {}),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    with torch.no_grad():
        outputs = setup.outputs(call(model, x))
    tensors = {**fingerprint_inputs(x), **{f"output.{k}": v for k, v in outputs.items()}}
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, folder / FINGERPRINT)


def _facts(setup: NetworkSetup, x: Inputs) -> dict[str, Any]:
    """What a saved network says of its inputs and outputs."""
    from compress.data.inputs import form_of
    from compress.networks.reload import OUTPUT

    if setup.job is None:
        data = setup.data
        return {
            "input": list(data.input_shape),
            "mean": data.mean.tolist(),
            "std": data.std.tolist(),
            "tasks": [t.facts() for t in data.tasks],
        }
    return {
        "form": form_of(x),
        "inputs": _ports(x),
        "tasks": [{"name": name, "kind": OUTPUT, "classes": []} for name in setup.output_names],
    }


def _ports(x: Inputs) -> dict[str, Any]:
    """Every input's shape of one sample and type."""
    from compress.data.inputs import inputs_by_name

    return {
        name: {"shape": list(t.shape[1:]), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in inputs_by_name(x).items()
    }


def write_model(setup: NetworkSetup, model: nn.Module, folder: Path, **changes: Any) -> dict[str, Any]:
    """Saves a network and loads it in a clean process.

    Returns:
        What the clean process found, see `verify_network`.
    """
    save_network(setup, model, folder, **changes)
    found = verify_network(folder)
    (folder / "verified.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def verify_network(folder: Path, network: str | None = None) -> dict[str, Any]:
    """Loads a saved network in a clean process and compares its outputs with those that were noted.

    Args:
        network: FILE.py:FUNCTION that is built in place of what the folder names.

    Raises:
        CompressError: it cannot be loaded, or its outputs differ.
    """
    done = subprocess.run(
        python("-m", "compress.networks.reload", str(folder), *([network] if network else [])),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressError(f"the saved network does not load again: {last}", where=str(folder), fix="make it again")
    found: dict[str, Any] = json.loads(done.stdout)
    tolerance = same_outputs(found, folder)
    return {
        "class": found["class"],
        "parameters": found["parameters"],
        "max_logit_difference": found["max_abs_difference"],
        "tolerance": tolerance,
    }


def same_outputs(found: Mapping[str, Any], folder: Path) -> float:
    """How far outputs may lie apart, after what `compress.networks.reload` found in ``folder``.

    Raises:
        CompressError: they lie further apart.
    """
    tolerance: float = TOLERANCE * found["max_abs_output"]
    if not found["max_abs_difference"] <= tolerance:
        raise CompressError(
            f"the saved network gives other outputs: they differ by {found['max_abs_difference']:.3g}"
            f" (allowed {tolerance:.3g})",
            where=str(folder),
            fix="make it again with `compress prune --fresh`",
        )
    return tolerance


def evaluated(
    run: Run, setup: NetworkSetup, name: str, folder: Path, make: Callable[[], nn.Module]
) -> dict[str, dict[str, float]]:
    """The sealed figures of a network on the test split, by task; ``folder`` is the stage it was made from."""

    def build(out: Path | None) -> None:
        found = setup.evaluate(make())
        if out is not None:
            (out / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    inputs = {"version": __version__, "data": setup.data_sha256, "model": seal_hash(folder)}
    folder = run.stage_together(name, inputs, build)
    found: dict[str, dict[str, float]] = json.loads((folder / "evaluation.json").read_text("utf-8"))
    return found


def made_after(recipe: NetworkRecipe) -> list[str]:
    """The formats of a recipe that `compress.exporters.formats` makes of the checked ONNX file."""
    return [f for f in recipe.export.formats if f not in ("onnx", "mnn")] if recipe.export is not None else []


def exported(
    run: Run, setup: NetworkSetup, models: Mapping[str, tuple[Path, Callable[[], nn.Module]]], report: dict[str, Any]
) -> dict[str, Path]:
    """Exports ``dense`` and ``pruned``, each checked on held-out samples, and fills in ``report["export"]``."""
    from compress.exporters.onnx_module import write_checked_module

    spec = setup.recipe.export
    assert spec is not None  # asked by the caller
    names = setup.output_names
    folders = {}
    for label, (source, make) in models.items():

        def build(folder: Path, make: Callable[[], nn.Module] = make) -> None:
            x, model = real_inputs(setup, spec.samples), make().cpu()
            write_checked_module(model, x, names, folder, spec.tolerance)
            if "mnn" in spec.formats:
                from compress.exporters.mnn import write_checked_mnn

                write_checked_mnn(model, x, names, folder, spec.tolerance)
            for form in made_after(setup.recipe):
                from compress.exporters import formats
                from compress.exporters.command import network_source

                options = formats.BuildOptions(form)
                formats.make(network_source(folder, model, x, options, {}), folder / form, options)

        inputs = {
            "version": __version__,
            "model": seal_hash(source),
            "data": setup.data_sha256,
            "export": spec.model_dump(mode="json"),
        }
        folders[label] = run.stage(f"export-{label}", inputs, build)
    report["export"] = {}
    for form in spec.formats:
        facts: dict[str, Any] = {label: _export_facts(f, form) for label, f in folders.items()}
        ratio = sum(facts["pruned"]["bytes"].values()) / sum(facts["dense"]["bytes"].values())
        report["export"][form] = {**facts, "size_ratio": ratio}
    report["stages"] = run.stages()
    return folders


def _export_facts(folder: Path, form: str) -> dict[str, Any]:
    """What an export folder says of a format, in the words of export.json."""
    if form in ("onnx", "mnn"):
        facts: dict[str, Any] = json.loads(
            (folder / ("export.json" if form == "onnx" else "mnn.json")).read_text("utf-8")
        )
        return facts
    facts = json.loads((folder / form / f"{form}.json").read_text("utf-8"))
    parity = facts["parity"]
    if "skipped" in parity:
        return {**facts, "skipped": parity["skipped"]}
    return {
        **facts,
        "largest_difference": max(parity["outputs"].values()),
        "outputs_compared": len(parity["outputs"]),
        "samples": parity["samples"],
    }


def measured(
    run: Run,
    setup: NetworkSetup,
    folders: Mapping[str, Path],
    models: Mapping[str, tuple[Path, Callable[[], nn.Module]]],
    report: dict[str, Any],
) -> None:
    """Latency of both exports here and on the recipe's targets; ``models`` as for `exported`."""
    from compress.exporters.stages import on_targets

    if setup.recipe.bench is not None:
        _measured_here(run, setup, folders, report)
    makers = {label: lambda make=make: make().cpu() for label, (_, make) in models.items()}
    on_targets(run, setup.recipe.targets, folders, makers, report)


def _measured_here(run: Run, setup: NetworkSetup, folders: Mapping[str, Path], report: dict[str, Any]) -> None:
    """Into ``report["bench"]``; MNN's stands in it under ``mnn``."""
    from compress.exporters.bench.explain import why
    from compress.exporters.bench.local import LOCAL, compare_modules

    spec = setup.recipe.bench
    assert spec is not None  # asked by the caller

    def build(folder: Path) -> None:
        found = compare_modules(folders["dense"], folders["pruned"], spec.model_dump())
        if found["dense"]["bytes"] != found["pruned"]["bytes"]:  # zeros alone change no layer's work
            found["why"] = why(folders["dense"], folders["pruned"], spec.model_dump(), LOCAL)
        if "mnn" in report["export"]:
            from compress.exporters.mnn import FILE

            found["mnn"] = compare_modules(folders["dense"], folders["pruned"], spec.model_dump(), FILE)
        (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    inputs = {
        "version": __version__,
        "bench": spec.model_dump(mode="json"),
        **{label: seal_hash(folder) for label, folder in folders.items()},
    }
    report["bench"] = json.loads((run.stage("bench", inputs, build) / "bench.json").read_text("utf-8"))
    report["stages"] = run.stages()


def describe(report: dict[str, Any], setup: NetworkSetup, dense: Path, command: str) -> None:
    """Fills in where the network and its data came from, the dense one that was trained, the recipe, the command and
    the machine."""
    from compress.run.doctor import environment

    report["model"] = {
        "name": setup.resolved.name,
        "source": setup.resolved.source,
        "base_model": setup.resolved.base_model,
        "license": setup.resolved.license,
        "family": "network",
        "network": setup.network if ".py:" not in setup.network else Path(setup.network).name,
        "arguments": setup.arguments,
        "sha256": setup.weights,
        "dense_sha256": read_seal(dense)["files"][WEIGHTS]["sha256"],
    }
    report["data"] = _data_facts(setup)
    report["recipe"] = setup.recipe.resolved()
    report["command"] = command
    report["environment"] = environment()


def _data_facts(setup: NetworkSetup) -> dict[str, Any]:
    """The report's section ``data``."""
    from compress.data.tasks import KINDS

    if setup.job is not None:
        return {
            "source": f"the job {setup.job.title}",
            "sha256": setup.job.sha256,
            "inputs": _ports(setup.example),
            "job": {name: getattr(setup.job.job, name) is not None for name in FUNCTIONS},
            "tasks": [
                {
                    "name": t.name,
                    "kind": t.kind,
                    "metric": t.metric,
                    "higher_is_better": t.higher_is_better,
                    "type": "other",
                }
                for t in setup.job.tasks
            ],
        }
    data = setup.data
    return {
        "source": data.source if setup.spec.folder is None else f"folder {setup.spec.folder.name}",
        "sha256": data.sha256,
        "input": list(data.input_shape),
        "samples": {"train": len(data.train), "calibration": len(data.calibration), "test": len(data.test)},
        "tasks": [
            {
                "name": t.name,
                "kind": t.kind,
                "outputs": t.outputs,
                "metric": t.metric,
                "higher_is_better": t.higher_is_better,
                "type": KINDS[t.kind].hub if len(data.input_shape) == 3 else "time-series",
            }
            for t in data.tasks
        ],
    }


# Part of a report, and not of what decides whether it is the same release.
TOLD = ("stages", "command", "commands", "environment", "sha256", "rows")


def released(
    run: Run, model: Path, report: dict[str, Any], card: Callable[[dict[str, Any], Path], Path]
) -> dict[str, Any]:
    """The folder to publish; returns the report as it was sealed, by this run or an earlier one."""
    from compress.networks.reload import read_facts
    from compress.report.build import finish, read_report, write_release

    there = shlex.quote(str(run.folder))
    own = str(read_facts(model)["network"])
    named = f" --network {shlex.quote(own)}" if ".py:" in own else ""
    report["commands"] = {
        "prune": report["command"],
        "verify": f"compress verify {there}{named}",
        "card": f"compress card {there}",
    }
    finish(report)

    def build(folder: Path) -> None:
        for path in sorted(model.iterdir()):
            if path.name != "seal.json":
                link(path, folder / path.name)
        if "export" in report:
            for form, facts in report["export"].items():
                place = run.folder / "export-pruned"
                for name in facts["pruned"]["bytes"]:
                    link(place / form / name if (place / form).is_dir() else place / name, folder / form / name)
        write_release(report, folder, card)

    sealed = {k: v for k, v in report.items() if k not in TOLD}
    return read_report(run.stage("release", {"version": __version__, "report": fingerprint(sealed)}, build))
