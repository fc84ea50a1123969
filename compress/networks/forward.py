"""What a network does when it is called: asked before anything is trained on the answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.inputs import Inputs, call, mapped
from compress.errors import CompressError


def _moved(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Floats changed; an index that is moved may lie outside of its table."""
    return lambda t: change(t) if t.is_floating_point() else t


# Other inputs of the same shapes, made of real ones.
CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t[:1].expand_as(t),
    lambda t: t[-1:].expand_as(t),
    _moved(torch.zeros_like),
    _moved(torch.ones_like),
    _moved(lambda t: t + 1),
    _moved(lambda t: t - 1),
    _moved(lambda t: 10 * t),
    _moved(torch.neg),
)


def check_branches(model: nn.Module, x: Inputs) -> None:
    """Refuses a network that calls other layers for other inputs: what is traced on one would not hold for the next.

    Args:
        x: (b, ...) real samples, b of 2 or more.

    Raises:
        CompressError: a layer that is called for some inputs alone is named.
    """
    model = copy.deepcopy(model).eval()
    place = next(model.parameters()).device
    x = mapped(x, lambda t: t.to(place))
    first = called(model, x)
    for change in CHANGES:
        other = mapped(x, change)
        try:
            layer = _apart(first, called(model, other))
        except Exception:  # made up: what a network does not take says nothing of its branches
            continue
        if layer is not None:
            raise CompressError(
                f"the layer {layer} is run for some inputs and not for others: what is traced on one fails others",
                where="the network's forward",
                fix="compute both branches and choose between their outputs (torch.where), or take the branch out",
            )


def check_training_alone(model: nn.Module, x: Inputs, own: bool = False) -> None:
    """Refuses layers that are run in training alone (heads beside): groups are traced in evaluation, so cutting what
    such a layer reads would leave it with inputs that are not there.

    Args:
        own: the network is trained by code of the user's, which may call it otherwise in training (with targets): what
            it does not take of ``x`` is then left to that code.

    Raises:
        CompressError: the first such layer is named.
    """
    model = copy.deepcopy(model)
    place = next(model.parameters()).device
    x = mapped(x, lambda t: t.to(place))
    evaluated = called(model.eval(), x)
    try:
        trained = called(model.train(), x)
    except Exception:  # the network's own code: that it is called otherwise in training is the user's to say
        if own:
            return
        raise
    layer = next((name for name in trained if name not in evaluated), None)
    if layer is not None:
        raise CompressError(
            f"the layer {layer} is run in training alone, and which channels belong together is found in evaluation",
            where="the network's forward",
            fix="take a head that is for training alone out before pruning (an argument of the function), or prune with"
            " global-mp, which leaves shapes as they are",
        )


def called(model: nn.Module, x: Inputs) -> list[str]:
    """The layers with weights in the order in which they are called."""
    found: list[str] = []
    with _noted(model, found), torch.no_grad():
        call(model, x)
    return found


@contextmanager
def _noted(model: nn.Module, found: list[str]) -> Iterator[None]:
    def note(name: str) -> Any:
        return lambda module, inputs: found.append(name)

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _apart(one: list[str], two: list[str]) -> str | None:
    """A layer that only one of the two has, or that is called another number of times; None where they are alike."""
    return next((n for n in (*one, *two) if one.count(n) != two.count(n)), None)
