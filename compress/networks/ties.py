"""Parameters that are one: the same one in several places of a network, or several over the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn


class Held(NamedTuple):
    """A parameter or buffer at one place: its module's name, its own name there, and itself."""

    module: str
    key: str
    tensor: Tensor

    @property
    def name(self) -> str:
        return f"{self.module}.{self.key}" if self.module else self.key


def held(model: nn.Module) -> Iterator[Held]:
    """Every place that holds a parameter or a buffer; a module that stands in several places is one, under its first
    name."""
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel():
                yield Held(name, key, tensor)


def tied(model: nn.Module) -> dict[str, list[str]]:
    """The names of all places whose values are held elsewhere too -> the other places.

    Two parameters over the same memory count, as `a.weight.data = b.weight.data` makes them, also where one is a part
    or the transpose of the other.
    """
    every = list(held(model))
    by_memory: dict[object, list[tuple[Held, int, int]]] = {}
    for one in every:
        by_memory.setdefault(_memory(one.tensor), []).append((one, *_extent(one.tensor)))
    found: dict[str, list[str]] = {}
    for together in by_memory.values():
        for i, (a, start, end) in enumerate(together):
            for b, first, last in together[i + 1 :]:
                if a.tensor is b.tensor or (start < last and first < end):
                    found.setdefault(a.name, []).append(b.name)
                    found.setdefault(b.name, []).append(a.name)
    return found


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """As `tied`, of the places whose values are another parameter's: not the same one, but over the same memory."""
    tensors = {one.name: one.tensor for one in held(model)}
    return {
        name: others
        for name, every in tied(model).items()
        if (others := [o for o in every if tensors[o] is not tensors[name]])
    }


def _memory(tensor: Tensor) -> object:
    """What two tensors over the same memory have in common; those of no memory (meta) share it with none."""
    return id(tensor) if tensor.is_meta else (tensor.device, tensor.untyped_storage().data_ptr())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends in its memory, in bytes."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.element_size()
    return int(start), int(start + (last + 1) * tensor.element_size())
