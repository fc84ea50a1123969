"""What runs before the group being tried is run once: the outputs of those modules are kept, batch by batch.

Any torch module can be treated so, because nothing but its submodules' outputs is kept: what lies between them runs
again. A network for which that is not the same (one that writes into what a kept module gave) is found out by comparing
the first batch, and is then run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from compress.data.inputs import Inputs, call
from compress.data.outputs import tensors


@torch.no_grad()
def calls(model: nn.Module, x: Inputs) -> list[tuple[str, int, int]]:
    """(module, start, end) of every call of a submodule, in the order of their ends."""
    clock, open_, found, handles = [0], list[tuple[str, int]](), list[tuple[str, int, int]](), []

    def begin(name: str, *_: Any) -> None:
        open_.append((name, clock[0]))
        clock[0] += 1

    def end(name: str, *_: Any) -> None:
        own, start = open_.pop()
        assert own == name  # calls are nested
        found.append((name, start, clock[0]))
        clock[0] += 1

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(begin, name)))
            handles.append(module.register_forward_hook(partial(end, name)))
    try:
        call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def before(seen: Sequence[tuple[str, int, int]], changed: set[str]) -> list[str]:
    """The outermost modules of which every call has ended when the first of the ``changed`` layers begins."""
    begun: dict[str, int] = {}
    for name, start, _ in seen:
        begun[name] = min(start, begun.get(name, start))
    first = min((_begins(begun, name) for name in changed), default=0)
    late = {name for name, _, end in seen if end > first}
    done = {name for name, _, _ in seen} - late
    return [name for name in sorted(done) if not any(name.startswith(f"{outer}.") for outer in done)]


def _begins(begun: Mapping[str, int], name: str) -> int:
    """When the innermost module that is called and holds a layer, parameter or number first begins; 0: the network."""
    while name and name not in begun:
        name = name.rpartition(".")[0]
    return begun.get(name, 0)


class Replay:
    """Runs copies of one network that differ from it in the ``changed`` layers and behind.

    What changed is a layer, a bare parameter, or a module of which a number changed.

    Args:
        limit: bytes of kept outputs; batches beyond it are run whole.
    """

    def __init__(self, seen: Sequence[tuple[str, int, int]], changed: set[str], limit: int) -> None:
        self.kept = before(seen, changed)
        self.limit, self.bytes, self.checked = limit, 0, False
        self._stores: dict[int, dict[str, list[Any]]] = {}

    def covers(self, layer: str) -> bool:
        """Whether a layer's output is kept, alone or within a larger module."""
        return any(layer == name or layer.startswith(f"{name}.") for name in self.kept)

    @torch.no_grad()
    def run(self, model: nn.Module, number: int, x: Tensor) -> tuple[Any, bool]:
        """The outputs for batch ``number``, and whether what was kept of it was used."""
        store = self._stores.get(number)
        if store is not None:
            return self._played(model, store, x), True
        if not self.kept or self.bytes >= self.limit:
            return model(x), False
        outputs, store = self._recorded(model, x)
        if not self.checked:
            self.checked = True
            again = self._played(model, store, x)
            same = all(torch.equal(a, b) for a, b in zip(tensors(outputs), tensors(again), strict=True))
            if not same:
                self.kept = []
                return outputs, False
        self.bytes += sum(t.numel() * t.element_size() for t in tree_flatten(store)[0] if isinstance(t, Tensor))
        self._stores[number] = store
        return outputs, False

    def _recorded(self, model: nn.Module, x: Tensor) -> tuple[Any, dict[str, list[Any]]]:
        store: dict[str, list[Any]] = {name: [] for name in self.kept}
        modules = dict(model.named_modules())

        def keep(name: str, _module: nn.Module, _inputs: Any, out: Any) -> None:
            # Cloned: what comes next may work in place.
            store[name].append(tree_map(_cloned, out))

        handles = [modules[name].register_forward_hook(partial(keep, name)) for name in self.kept]
        try:
            return model(x), store
        finally:
            for handle in handles:
                handle.remove()

    def _played(self, model: nn.Module, store: dict[str, list[Any]], x: Tensor) -> Any:
        modules = dict(model.named_modules())
        for name, outputs in store.items():
            modules[name].forward = _player(outputs)  # type: ignore[method-assign]
        try:
            return model(x)
        finally:
            for name in store:
                del modules[name].forward


def _player(outputs: list[Any]) -> Callable[..., Any]:
    left = iter(outputs)
    return lambda *_args, **_kwargs: tree_map(_cloned, next(left))


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
