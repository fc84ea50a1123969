"""Loads a saved network and compares it with its fingerprint. Run as a module, it does so in a clean process.

It then prints one line of JSON: {"max_abs_difference", "max_abs_output", "parameters", "class"}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from compress.errors import CompressError, UsageError
from compress.run.strict_json import member, read_json, typed
from compress.run.tensor_files import load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.data.inputs import Inputs

FIX = "make the model again, or copy it whole"
FINGERPRINT = "fingerprint.safetensors"
OUTPUT = "output"  # the kind of an output that is no task's: a job's
LARGEST_ARGUMENT = 100_000  # of a network: no count of channels, blocks or classes is larger


@dataclass(frozen=True)
class Reloaded:
    """A network in evaluation mode, on the CPU; what its folder says of it; the held-out samples that lie there."""

    model: nn.Module
    facts: dict[str, Any]
    inputs: Inputs  # (n, ...), float32 and prepared where it is our data
    found: dict[str, Any]


def read_facts(folder: Path) -> dict[str, Any]:
    """What a folder says of its network: how it is built, its input, its tasks, and the widths of its layers where
    channels are gone.

    Raises:
        CompressError: it cannot be read, or is not what such a file is; the field is named.
    """
    path = folder / "network.json"
    what, where = "the facts of the network", str(path)

    def refuse(said: str) -> NoReturn:
        raise CompressError(f"{what} are not what they should be: {said}", where=where, fix=FIX)

    facts = typed(read_json(path, what, fix=FIX), dict, "", what, where, FIX)
    member(facts, "network", str, what, where, fix=FIX)
    arguments = member(facts, "arguments", dict, what, where, fix=FIX)
    large = next((k for k, v in arguments.items() if isinstance(v, int | float) and abs(v) > LARGEST_ARGUMENT), None)
    if large is not None:
        refuse(f"the argument {large!r} is beyond {LARGEST_ARGUMENT:,}")
    if "inputs" in facts:
        _check_inputs(facts, what, where)
    else:
        _check_sample(facts, what, where)
    for name, shape in typed(facts.get("widths", {}), dict, "widths", what, where, FIX).items():
        for axis in typed(shape, dict, f"widths.{name}", what, where, FIX):
            member(shape, axis, int, what, where, f"widths.{name}", FIX)
    tasks = member(facts, "tasks", list, what, where, fix=FIX)
    for i, task in enumerate(tasks):
        _check_task(typed(task, dict, f"tasks.{i}", what, where, FIX), f"tasks.{i}", what, where)
    if not tasks or len({task["name"] for task in tasks}) != len(tasks):
        refuse("'tasks' names none, or one twice")
    return dict(facts)


def _check_sizes(sizes: Any, least: int, most: int) -> bool:
    """Whether these are the sizes of one sample."""
    return (
        isinstance(sizes, list)
        and least <= len(sizes) <= most
        and all(type(n) is int and 1 <= n <= LARGEST_ARGUMENT for n in sizes)
    )


def _check_inputs(facts: dict[str, Any], what: str, where: str) -> None:
    """Of a job's network: the form in which it is called, and every input's shape and type."""
    form = member(facts, "form", str, what, where, fix=FIX)
    inputs = member(facts, "inputs", dict, what, where, fix=FIX)
    names = {"tensor": ["input"], "tuple": [f"input{i}" for i in range(len(inputs))], "dict": list(inputs)}
    if not inputs or list(inputs) != names.get(form):
        said = f"{what} are not what they should be: 'form' is {form!r:.40}, with the inputs {list(inputs)!r:.60}"
        raise CompressError(said, where=where, fix=FIX)
    for name, port in inputs.items():
        at = f"inputs.{name}"
        typed(port, dict, at, what, where, FIX)
        member(port, "dtype", str, what, where, at, FIX)
        sizes = member(port, "shape", list, what, where, at, FIX)
        if not _check_sizes(sizes, 0, 8):
            said = f"{what} are not what they should be: '{at}.shape' is {sizes!r:.60}, not the sizes of a sample"
            raise CompressError(said, where=where, fix=FIX)


def _check_sample(facts: dict[str, Any], what: str, where: str) -> None:
    """Of a network on our data: the shape of a sample, and how its channels are normalised."""

    def refuse(said: str) -> NoReturn:
        raise CompressError(f"{what} are not what they should be: {said}", where=where, fix=FIX)

    sizes = member(facts, "input", list, what, where, fix=FIX)
    if not _check_sizes(sizes, 2, 4):
        refuse(f"'input' is {sizes!r:.60}, not the sizes of a sample")
    for key in ("mean", "std"):
        values = member(facts, key, list, what, where, fix=FIX)
        if len(values) != sizes[0] or any(type(v) not in (int, float) or not abs(v) < 1e15 for v in values):
            refuse(f"{key!r} is {values!r:.60}, not a number for each of {sizes[0]} channels")
    if min(facts["std"]) <= 0:
        refuse("'std' is not above 0")


def _check_task(task: dict[str, Any], at: str, what: str, where: str) -> None:
    from compress.data.tasks import KINDS

    member(task, "name", str, what, where, at, FIX)
    if member(task, "kind", str, what, where, at, FIX) not in (*KINDS, OUTPUT):
        said = f"{what} are not what they should be: '{at}.kind' is {task['kind']!r:.60}"
        raise CompressError(said, where=where, fix=f"one of: {', '.join(KINDS)}")
    for name in member(task, "classes", list, what, where, at, FIX):
        typed(name, str, f"{at}.classes", what, where, FIX)
    for key, kind in (("log", bool), ("positive", float), ("centre", float), ("scale", float)):
        if key in task:
            member(task, key, kind, what, where, at, FIX)
    strange = sorted(set(task) - {"name", "kind", "classes", "log", "positive", "centre", "scale"})
    if strange:
        said = f"{what} are not what they should be: {at} has the key {strange[0]!r:.60}, which no task has"
        raise CompressError(said, where=where, fix=FIX)


def check_named(folder: Path, network: str | None) -> None:
    """Code is run only where a person has named its file: a folder that was fetched from somewhere must not choose it.

    Raises:
        UsageError: the network is a file's, and ``network`` does not name it; or it is none, and one is named.
    """
    own = str(read_facts(folder)["network"])
    if ".py:" in own and network is None:
        raise UsageError(
            f"the network is code of a file: {own}",
            where=str(folder),
            fix=f"if you trust that file, name it: --network {own}",
        )
    if ".py:" not in own and network is not None:
        raise UsageError(f"the network is {own}, not a file's", where=str(folder), fix="leave out --network")
    if network is not None and ".py:" not in network:
        raise UsageError(f"{network!r} is not FILE.py:FUNCTION", where="--network", fix=f"such as --network {own}")


def reload(folder: Path, network: str | None = None) -> Reloaded:
    """The network of a folder; ``network`` is built in place of the one that the folder names.

    Raises:
        CompressError: a file is missing or not whole, or the weights do not fit.
    """
    import torch

    from compress.data.inputs import call
    from compress.data.outputs import named
    from compress.models.zoo import build, load_weights
    from compress.networks.surgery import resize

    facts = read_facts(folder)
    names = [task["name"] for task in facts["tasks"]]
    x, kept = _fingerprint(folder, facts, names)
    model = _built(folder, facts) if network is None else build(network, facts["arguments"])
    model = resize(model.eval(), facts.get("widths", {}))
    load_weights(model, folder / "model.safetensors")
    with torch.no_grad():
        out = call(model, x)
    outputs = named(out, names)
    for name in names:
        if outputs[name].shape != kept[f"output.{name}"].shape:
            shapes = f"{tuple(kept[f'output.{name}'].shape)}, the network gives {tuple(outputs[name].shape)}"
            raise CompressError(
                f"the fingerprint's output of {name!r} is {shapes}",
                where=str(folder / FINGERPRINT),
                fix=FIX,
            )
    differences = [float((outputs[name] - kept[f"output.{name}"]).abs().max()) for name in names]
    found = {
        "max_abs_difference": max(differences),
        "max_abs_output": max(float(kept[f"output.{name}"].abs().max()) for name in names),
        "parameters": sum(p.numel() for p in model.parameters()),
        "class": type(model).__name__,
    }
    return Reloaded(model, facts, x, found)


def _built(folder: Path, facts: dict[str, Any]) -> nn.Module:
    """The network of the zoo that a folder names. Its size is asked before it is made: the file's author chose it.

    Raises:
        CompressError: there is none, or none of these arguments, or it is far larger than the weights that lie there.
    """
    import torch

    from compress.models.zoo import build

    path = folder / "network.json"
    there = (folder / "model.safetensors").stat().st_size if (folder / "model.safetensors").is_file() else 0
    try:
        if ".py:" in facts["network"] and "inputs" in facts:
            # A job's comes with its weights, which nothing on meta has; the file was named by a person.
            return build(facts["network"], facts["arguments"])
        with torch.device("meta"):
            size = sum(t.nbytes for t in build(facts["network"], facts["arguments"]).state_dict().values())
        # What was pruned may be a small part of what is made first.
        if size > 1000 * max(there, 1 << 20):
            said = f"the network it names takes {size:,} bytes, and its weights are {there:,}"
            raise CompressError(said, where=str(path), fix=FIX)
        return build(facts["network"], facts["arguments"])
    except UsageError as e:
        raise CompressError(e.what, where=f"{path}, {e.where}", fix=e.fix) from e
    except (TypeError, ArithmeticError, RuntimeError) as e:  # arguments of a kind or size that the network has not
        said = f"the network it names cannot be made: {' '.join(str(e).split())[:200]}"
        raise CompressError(said, where=f"{path}, arguments", fix=FIX) from e


def fingerprint_inputs(x: Inputs) -> dict[str, Tensor]:
    """The inputs as a fingerprint holds them: ``input``, or ``input.NAME`` of several."""
    from compress.data.inputs import form_of, inputs_by_name

    return {"input": x} if form_of(x) == "tensor" else {f"input.{k}": t for k, t in inputs_by_name(x).items()}


def _fingerprint(folder: Path, facts: dict[str, Any], names: list[str]) -> tuple[Inputs, dict[str, Tensor]]:
    """The held-out samples that lie with a network, and the tensors with what it gave for each task.

    Raises:
        CompressError: it cannot be read, or a tensor is missing, of another kind, or of another shape than the input.
    """
    from compress.data.inputs import formed

    path = folder / FINGERPRINT
    kept = load_tensors(path, "the fingerprint", FIX)
    ports = facts.get("inputs") or {"input": {"shape": facts["input"], "dtype": None}}
    form = facts.get("form", "tensor")
    keys = {name: name if form == "tensor" else f"input.{name}" for name in ports}
    whole = {keys[n] for n, port in ports.items() if port["dtype"] not in (None, "float32", "float64", "float16")}
    for name in (*keys.values(), *(f"output.{n}" for n in names)):
        if name not in kept:
            told = f"{path}, and {folder / 'network.json'}, which names it"
            raise CompressError(f"the fingerprint has no finite tensor {name!r}", where=told, fix=FIX)
        if not (name in whole or kept[name].is_floating_point()) or not bool(kept[name].isfinite().all()):
            raise CompressError(f"the fingerprint has no finite tensor {name!r}", where=str(path), fix=FIX)
    for name, port in ports.items():
        held = kept[keys[name]]
        shape = list(held.shape)
        if shape[1:] != port["shape"] or not shape or not shape[0] >= 1:
            said = f"the fingerprint's {keys[name]} is {shape}, and network.json says {port['shape']} of one sample"
            raise CompressError(said, where=str(path), fix=FIX)
        if port["dtype"] is not None and str(held.dtype) != f"torch.{port['dtype']}":
            said = f"the fingerprint's {keys[name]} is {held.dtype}, and network.json says {port['dtype']:.40}"
            raise CompressError(said, where=str(path), fix=FIX)
    return formed(form, {name: kept[key] for name, key in keys.items()}), kept


if __name__ == "__main__":
    try:
        print(json.dumps(reload(Path(sys.argv[1]), *sys.argv[2:3]).found))
    except CompressError as e:
        sys.exit(f"{e.what} ({e.where})")
