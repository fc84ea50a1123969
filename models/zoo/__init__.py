"""The papers' networks as plain modules, and any other torch module by `file.py:function`."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.data.job import Job, NamedJob, aside, named_job
from compress.errors import CompressError, UsageError
from compress.models.plain import refuse_odd
from compress.models.reading import LARGEST_WEIGHT
from compress.run.cache import sha256_of
from compress.run.tensor_files import load_tensors

# name -> file of this folder and function in it
NETWORKS = {
    "resnet": "resnet32:resnet",
    "wrn": "wrn:wrn",
    "mobilenet-v1": "mobilenet_v1:mobilenet_v1",
    "mobilenet-v2": "mobilenet_v2:mobilenet_v2",
    "fastgrnn": "fastgrnn:fastgrnn",
    "resnet50": "resnet50:resnet50",
    "multitask-resnet": "multitask:multitask_resnet",
    "multitask-mobilenet": "multitask:multitask_mobilenet",
    "detector": "detector:detector",
    "transformers-image": "published:transformers_image",
    "timm": "published:timm_model",
}

_JOBS: dict[tuple[Path, str, str], Job] = {}  # of files that this process has run, by their hash
_GIVEN: dict[str, Job] = {}  # in memory, by what builds their networks


def build(name: str, arguments: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A network of the zoo, or what ``path/file.py:function`` returns, with weights drawn from ``seed``.

    The file's code is run. Only a person may name one, on the command line: no recipe and no model file can.

    Raises:
        UsageError: there is no such network, file, function or argument, or it returns no module, or one that is not
            plain (`compress.models.plain.refuse_odd`).
    """
    make = function(name)
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as e:
        raise UsageError(
            f"{name} cannot be called so: {e}", where="network arguments", fix=f"{name}{inspect.signature(make)}"
        ) from None
    torch.manual_seed(seed)
    try:
        with aside():
            model = make(**arguments)
    except CompressError:
        raise
    except ValueError as e:
        raise UsageError(f"{name}: {e}", where="network arguments", fix="give another value") from e
    except (Exception, SystemExit) as e:
        if ".py:" not in name:
            raise
        raise UsageError(f"the function cannot be run: {_told(e)}", where=name, fix="mend it") from e
    if isinstance(model, Job):
        raise UsageError(
            f"{name} returned a job, and does not say so",
            where="MODEL",
            fix="write `-> compress.Job` behind its arguments",
        )
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{name} returned {type(model).__name__}, not a torch module", where="MODEL", fix="return the module"
        )
    if ".py:" in name:
        refuse_odd(model, name)
    return model


def accepts(name: str, argument: str) -> bool:
    """Whether a network's function takes an argument of that name."""
    return argument in inspect.signature(function(name)).parameters


def function(name: str) -> Any:
    """What makes a network; a file's code is run, see `build`.

    Raises:
        UsageError: there is no such network, file or function.
    """
    found = _from_file(name) if ".py:" in name else _from_zoo(name)
    return partial(network_of, found, name) if isinstance(found, Job) else found


def job_of(name: str) -> NamedJob | None:
    """The job that ``path/file.py:name`` is, or one in memory that goes by this name; None where it is a function. A
    file with a job is run once in a process: it may read its data as it is imported.

    Raises:
        UsageError: there is no such file, or nothing of that name in it.
    """
    found = _GIVEN.get(name) or _from_file(name)
    return named_job(found, name) if isinstance(found, Job) else None


@contextmanager
def given(name: str, job: Job) -> Iterator[None]:
    """Within it a job in memory goes by the name of what builds its network."""
    _GIVEN[name] = job
    try:
        yield
    finally:
        del _GIVEN[name]


def network_of(job: Job, name: str) -> nn.Module:
    """A copy of a job's network with its weights.

    Raises:
        CompressError: the function that gives it fails, or gives no module.
    """
    held = NamedJob(job, name, "")
    module = job.network if isinstance(job.network, nn.Module) else held.called("network")
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"the job's network is {type(module).__name__}, not a torch module",
            where=held.where("network"),
            fix="give the module, or a function without arguments that returns it",
        )
    refuse_odd(module, name)
    return copy.deepcopy(module)


def _from_zoo(name: str) -> Any:
    if name not in NETWORKS:
        raise UsageError(f"unknown network {name!r}", where="network", fix=f"one of: {', '.join(NETWORKS)}")
    module, function = NETWORKS[name].split(":")
    return getattr(importlib.import_module(f"compress.models.zoo.{module}"), function)


def _from_file(name: str) -> Any:
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UsageError("there is no such file", where=path, fix="name it as path/file.py:function")
    spec = importlib.util.spec_from_file_location(f"_compress_network_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    key = (Path(path).resolve(), function, sha256_of(Path(path)))
    if key in _JOBS:
        return _JOBS[key]
    module = importlib.util.module_from_spec(spec)
    beside = str(Path(path).resolve().parent)
    if beside not in sys.path:  # what lies beside it can be imported, as where the file is run by itself
        sys.path.append(beside)
    sys.modules[spec.name] = module  # dataclasses and pickles of the file look for it there
    try:
        with aside():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # the user's own code: any fault of it is told as theirs
        del sys.modules[spec.name]
        raise UsageError(f"the file cannot be run: {_told(e)}", where=_place(e, path), fix="mend it") from e
    found = getattr(module, function, None)
    if callable(found) and _gives_job(found):
        found = _job_from(found, name)
    if isinstance(found, Job):
        return _JOBS.setdefault(key, found)
    if not callable(found):
        said = f"the file has no function {function!r}"
        if found is not None:
            said += f": it is {type(found).__name__}, and no compress.Job"
        raise UsageError(said, where=path, fix="name it as path/file.py:function")
    return found


def _gives_job(function: Any) -> bool:
    """Whether a function says that it returns a job: ``-> compress.Job``."""
    said = getattr(function, "__annotations__", {}).get("return")
    return said is Job or (isinstance(said, str) and said.rpartition(".")[2] == "Job")


def _job_from(function: Any, name: str) -> Job:
    """The job that a function without arguments returns.

    Raises:
        UsageError: it fails, or returns something else.
    """
    try:
        with aside():
            found = function()
    except (Exception, SystemExit) as e:  # the user's own code
        raise UsageError(f"the function cannot be run: {_told(e)}", where=name, fix="mend it") from e
    if not isinstance(found, Job):
        raise UsageError(
            f"the function says that it returns a job, and returned {type(found).__name__}", where=name, fix="mend it"
        )
    return found


def _place(error: BaseException, path: str) -> str:
    """The file, and the line of it that a fault came up through last."""
    whole = Path(path).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if Path(frame.filename).resolve() == whole]
    return f"{path}, line {own[-1]}" if own else path


def _told(error: BaseException) -> str:
    """A fault of a user's own code; a program that exits says nothing by itself."""
    if isinstance(error, SystemExit):
        return f"it exits ({error.code})"
    if isinstance(error, CompressError):
        return f"{error.what}; {error.fix}"
    return f"{type(error).__name__}: {error}"


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file into ``model``; names and shapes must be the model's own.

    Raises:
        CompressError: it is no safetensors file (a pickle is never opened), or does not fit, or holds NaN.
    """
    if not path.is_file():
        raise CompressError("there is no such file of weights", where=str(path), fix="check the path")
    with path.open("rb") as file:
        head = file.read(9)
    # A zip archive (torch.save), a bare pickle. A safetensors file may begin with that byte too, its header's length.
    if head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{"):
        raise CompressError(
            "the weights are a pickle, which can run code when it is opened; it was not",
            where=str(path),
            fix="convert them to safetensors where you trust their source",
        )
    tensors = load_tensors(path, "the file of weights", "give a whole safetensors file")
    own = model.state_dict()
    missing, strange = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or strange:
        raise CompressError(
            f"the weights do not fit the network: {(missing or strange)[0]!r} is {'missing' if missing else 'unknown'}"
            f" ({len(missing)} missing, {len(strange)} unknown)",
            where=str(path),
            fix="name the network that these weights belong to, with its arguments",
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise CompressError(
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the network",
                where=str(path),
                fix="set the network's arguments (classes, width ...)",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CompressError(f"{name} holds NaN or infinity", where=str(path), fix="use weights that are whole")
        if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > LARGEST_WEIGHT:
            most = f"{name} goes up to {float(tensor.abs().max()):.3g}: what is computed with it overflows"
            raise CompressError(most, where=str(path), fix="use weights that are whole")
        own[name].copy_(tensor)
    # What is tied is one: where the file says two things of it, the last one written is what all of them are now.
    for name, tensor in tensors.items():
        if not torch.equal(own[name], tensor.to(own[name])):
            raise CompressError(
                f"the network ties {name} to another parameter, and the file holds other values for the two",
                where=str(path),
                fix="save it from the network as it is built, tied",
            )
