"""What a network is called with: one tensor, a tuple of several in their order, or a dict of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from compress.errors import CompressError

# A tensor, a tuple of tensors or a dict of them, the batch (b, ...) in front of each.
Inputs = Any
FIRST = "input"


def call(model: nn.Module, x: Inputs) -> Any:
    """The network's outputs: a tuple is its arguments, a dict those with names."""
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, Mapping) else model(x)


def mapped(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same form with every tensor changed."""
    if isinstance(x, tuple):
        return tuple(change(t) for t in x)
    return {k: change(t) for k, t in x.items()} if isinstance(x, Mapping) else change(x)


def inputs_by_name(x: Inputs) -> dict[str, Tensor]:
    """Every tensor by the name that an export gives it: ``input``, ``input0``, ``input1`` ..., or a dict's own."""
    if isinstance(x, tuple):
        return {f"{FIRST}{i}": t for i, t in enumerate(x)}
    return dict(x) if isinstance(x, Mapping) else {FIRST: x}


def form_of(x: Inputs) -> str:
    """``tensor``, ``tuple`` or ``dict``."""
    return "tuple" if isinstance(x, tuple) else "dict" if isinstance(x, Mapping) else "tensor"


def formed(form: str, tensors: Mapping[str, Tensor]) -> Inputs:
    """The inputs of a form from their tensors by name, as `inputs_by_name` gives them."""
    if form == "dict":
        return dict(tensors)
    return tuple(tensors.values()) if form == "tuple" else tensors[FIRST]


def first(x: Inputs, count: int) -> Inputs:
    """The first ``count`` samples."""
    return mapped(x, lambda t: t[:count])


def size(x: Inputs) -> int:
    """How many samples there are."""
    return len(next(iter(inputs_by_name(x).values())))


def floats(x: Inputs) -> Inputs:
    """float64 in place of other floats; integers as they are."""
    return mapped(x, lambda t: t.double() if t.is_floating_point() else t)


def checked(example: Any, where: str) -> Inputs:
    """An example as a user gives it: a list becomes a tuple, and everything is on the CPU.

    Raises:
        CompressError: it is no tensor, tuple or dict of tensors, they differ in their batch, or it is one sample.
    """

    def refuse(what: str, fix: str) -> CompressError:
        return CompressError(what, where=where, fix=fix)

    form = tuple(example) if isinstance(example, list) else example
    if isinstance(form, Mapping):
        form = dict(form)
    held = inputs_by_name(form)
    if not held or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in held.items()):
        kinds = sorted({type(t).__name__ for t in held.values() if not isinstance(t, Tensor)}) or ["nothing"]
        raise refuse(
            f"the example holds {', '.join(kinds)}: the network is called with tensors alone",
            "give a tensor, a tuple of tensors (its arguments), or a dict of them by the arguments' names",
        )
    for name, tensor in held.items():
        if not tensor.dim() or len(tensor) < 2:
            raise refuse(
                f"the example's {name} is {tuple(tensor.shape)}: of a batch of one nothing tells it from a channel",
                "give two samples or more, the batch in front (torch.cat of two of them)",
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise refuse(f"the example's {name} holds NaN or infinity", "give real samples")
    batches = {name: len(tensor) for name, tensor in held.items()}
    if len(set(batches.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in batches.items())
        raise refuse(f"the example's tensors differ in their batch ({told})", "give each as many samples as the others")
    return mapped(form, lambda t: t.detach().cpu())
