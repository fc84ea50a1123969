"""A network in memory: the code that builds it again in a clean process, and the proof that this builds the same."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from compress.networks.setup import NetworkSetup

WRITE_A_FUNCTION = "write a file with a function that makes it, and name that: network='FILE.py:FUNCTION'"


def code_of(module: nn.Module) -> str:
    """FILE.py:CLASS of a module whose class stands at the top of a file that can be run by itself.

    What the class was called with cannot be read from a module: it is the recipe's ``arguments``.

    Raises:
        UsageError: the class is a library's, a notebook's, the running script's or a function's, or its file does not
            run by itself.
    """
    from compress.models.zoo import function

    kind = type(module)

    def refuse(why: str) -> UsageError:
        return UsageError(
            f"the network in memory cannot be built again in a clean process: its class {kind.__qualname__} {why}",
            where="network",
            fix=WRITE_A_FUNCTION,
        )

    library = kind.__module__.partition(".")[0]
    if library in ("torch", "compress"):
        raise refuse(f"is one of {library}, which does not say what it was made of")
    if kind.__module__ in ("__main__", "__mp_main__"):
        raise refuse("is of the running script or notebook, which would run a second time")
    if kind.__qualname__ != kind.__name__:
        raise refuse("stands in a function or another class")
    try:
        file = Path(inspect.getsourcefile(kind) or "").resolve()
    except (TypeError, OSError):
        raise refuse("is of no module that has been imported") from None
    if file.suffix != ".py":
        raise refuse("lies in no Python file")
    name = f"{_short(file)}:{kind.__name__}"
    try:
        function(name)
    except UsageError as e:
        raise refuse(f"lies in {file.name}, which does not give it when it is run by itself: {e.what}") from e
    return name


def function_code(made: Any) -> str:
    """FILE.py:FUNCTION of a function at the top of a file that can be run by itself.

    Raises:
        UsageError: it is a lambda, a notebook's, the running script's, or stands in another function.
    """
    name, module = getattr(made, "__qualname__", type(made).__name__), getattr(made, "__module__", "")

    def refuse(why: str) -> UsageError:
        return UsageError(
            f"the job's network cannot be built again in a clean process: {name} {why}",
            where="network",
            fix=WRITE_A_FUNCTION,
        )

    if module in ("__main__", "__mp_main__"):
        raise refuse("is of the running script or notebook, which would run a second time")
    if not name.isidentifier():
        raise refuse("is no function at the top of a file")
    try:
        file = Path(inspect.getsourcefile(made) or "").resolve()
    except (TypeError, OSError):
        raise refuse("is of no file") from None
    if file.suffix != ".py":
        raise refuse("lies in no Python file")
    return f"{_short(file)}:{name}"


def check_alike(module: nn.Module, built: nn.Module, where: str) -> None:
    """Raises UsageError where what a file builds has other tensors or layers than the network in memory."""
    if difference := _tensors(tensors_of(module), built.state_dict()) or _layers(module, built):
        raise UsageError(
            f"what is built is another network than the job's: {difference}", where=where, fix="name what made it"
        )


def _short(file: Path) -> str:
    """A path from the current folder where it lies in it: what is published should not hold the whole of it."""
    here = Path.cwd().resolve()
    return os.path.relpath(file, here) if file.is_relative_to(here) else str(file)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a module by name, as they are.

    Raises:
        UsageError: it holds something else beside them, or has no weights yet.
    """
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} is no tensor", where="model", fix="leave extra state out of the network")
        if nn.parameter.is_lazy(value):
            raise UsageError(f"{name} has no values yet", where="model", fix="call the network once")
    return state


@contextmanager
def judged(module: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, on the device where the module is; it is left as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield next(module.parameters(), torch.empty(0)).device
    finally:
        for part, mode in modes:
            part.training = mode


def check_same(setup: NetworkSetup, module: nn.Module) -> None:
    """Raises UsageError where what a run would build is another network than ``module``: other tensors, other layers,
    or other outputs on held-out samples.

    Raises:
        CompressError: the module does not take the run's data.
    """
    from compress.data.tasks import by_task
    from compress.networks.setup import TOLERANCE, real_inputs

    def refuse(how: str) -> UsageError:
        return UsageError(
            f"what is built is another network than the one in memory: {how}",
            where=setup.network,
            fix="name what made it (network=), with the arguments that it was made with (arguments={...})",
        )

    built, own = setup.build(), tensors_of(module)
    if difference := _tensors(own, built.state_dict()) or _layers(module, built):
        raise refuse(difference)
    with judged(module) as place:
        built.load_state_dict(own)
        built = built.to(place).eval()
        x = real_inputs(setup, 4).to(place)
        try:
            want, got = by_task(module(x), setup.data.tasks), by_task(built(x), setup.data.tasks)
        except RuntimeError as e:
            raise CompressError(
                f"the network does not take the data: {str(e).splitlines()[0]}",
                where=f"input {tuple(x.shape)}",
                fix="give data of the shape that it was made for (data.size)",
            ) from e
    off = max(float((want[name] - got[name]).abs().max()) for name in want)
    largest = max(float(output.abs().max()) for output in want.values())
    if not off <= TOLERANCE * largest:
        raise refuse(f"with the same weights its outputs differ by {off:.3g} (they go up to {largest:.3g})")


def _tensors(own: dict[str, Tensor], built: dict[str, Tensor]) -> str:
    """The first parameter or buffer that differs in name, shape or type, in words; empty where none does."""
    for name in built:
        if name not in own:
            return f"{name} is not in memory"
    for name, tensor in own.items():
        if name not in built:
            return f"{name} is in memory alone"
        if tensor.shape != built[name].shape:
            return f"{name} is {tuple(tensor.shape)} in memory, {tuple(built[name].shape)} as built"
        if tensor.dtype != built[name].dtype:
            kinds = [str(t.dtype).removeprefix("torch.") for t in (tensor, built[name])]
            return f"{name} is {kinds[0]} in memory, {kinds[1]} as built"
    return ""


def _layers(module: nn.Module, built: nn.Module) -> str:
    """The first layer that is another one, or has other settings, in words; empty where none is."""
    own, other = dict(module.named_modules()), dict(built.named_modules())
    for name in (*own, *other):
        if name not in own or name not in other:
            return f"the layer {name} is {'in memory alone' if name in own else 'not in memory'}"
    for name, layer in own.items():
        # The file is run anew, so its classes are other objects of the same names.
        kinds = [f"{type(p).__qualname__}({p.extra_repr()})" for p in (layer, other[name])]
        if kinds[0] != kinds[1]:
            return f"{name or 'the network'} is {kinds[0]} in memory, {kinds[1]} as built"
    return ""
