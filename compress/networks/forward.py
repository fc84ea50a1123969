"""What a network does when it is called: asked before anything is trained on the answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.inputs import Inputs, call, inputs_by_name, mapped
from compress.data.outputs import floating
from compress.errors import CompressError
from compress.exporters.refused import own_line


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


STEADY = 1e-3  # of the largest output: what the order of additions may change between two calls


def answer(model: nn.Module, x: Inputs, *, grad: bool = False) -> Any:
    """What a network gives for real samples; the first time that it is run.

    Args:
        grad: as in training, with what gradients need.

    Raises:
        CompressError: it does not take them, or its own code fails: the line of it is named.
    """
    try:
        with torch.set_grad_enabled(grad):
            return call(model, x)
    except CompressError:
        raise
    except Exception as e:  # the user's own code: any fault of it is told as theirs
        said = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)[:300]
        own = own_line(e)
        if isinstance(e, RuntimeError):
            raise CompressError(
                f"the network does not take the data: {said}",
                where=f"input {_shapes(x)}" + (f", {own[0]}" if own else ""),
                fix="set the network's arguments (channels) or the data's size",
            ) from e
        raise CompressError(
            f"the network cannot be run: {type(e).__name__}: {said}",
            where=own[0] if own else "the network's forward",
            fix="mend its forward",
        ) from e


def check_steady(model: nn.Module, x: Inputs) -> None:
    """Refuses a network that gives, in evaluation, another answer to the same samples the second time.

    Raises:
        CompressError: as `answer`, or it is not steady.
    """
    model = _copied(model).eval()
    pairs = zip(*(floating(answer(model, x)) for _ in range(2)), strict=False)
    for one, two in pairs:
        most = STEADY * float(one.nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0.0
        if one.shape != two.shape or not torch.allclose(one, two, rtol=0, atol=most, equal_nan=True):
            raise CompressError(
                "the network gives another answer to the same samples the second time",
                where="the network's forward",
                fix="let it keep nothing between two calls, and draw nothing at random outside of training",
            )


def check_trainable(model: nn.Module, x: Inputs) -> None:
    """Refuses a network that cannot be run in training, or of which no output leads back to a weight.

    Args:
        x: (b, ...) real samples, b of 2 or more.

    Raises:
        CompressError: as `answer`, or nothing could be trained.
    """
    given = answer(_copied(model).train(), x, grad=True)
    if not any(t.requires_grad for t in floating(given)):
        raise CompressError(
            "nothing of the network can be trained: no output depends on a weight that has a gradient",
            where="the network's forward",
            fix="take torch.no_grad and detach out of it, and requires_grad_(False) out of its function",
        )


def depends_on_values(model: nn.Module, x: Inputs) -> bool:
    """Whether its forward asks for a number in a tensor (`Tensor.item`, an ``if``): told by a run without numbers."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    model = _copied(model).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        without_numbers = mapped(x, mode.from_tensor)
        try:
            call(model, without_numbers)
        except DataDependentOutputException:
            return True
        except Exception:  # of what else it cannot do without numbers a trace may know a way round
            return False
    return False


def _shapes(x: Inputs) -> str:
    every = [str(tuple(t.shape)) for t in inputs_by_name(x).values()]
    return every[0] if len(every) == 1 else ", ".join(every)


def _copied(model: nn.Module) -> nn.Module:
    """A copy, which is run without a trace in the network.

    Raises:
        CompressError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as e:  # what a user's module holds may refuse it in any words
        said = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)[:300]
        raise CompressError(
            f"the network cannot be copied: {said}",
            where=type(model).__name__,
            fix="let its attributes be modules, parameters, buffers and plain values",
        ) from e


def check_branches(model: nn.Module, x: Inputs) -> None:
    """Refuses a network that calls other layers for other inputs: what is traced on one would not hold for the next.

    Args:
        x: (b, ...) real samples, b of 2 or more.

    Raises:
        CompressError: a layer that is called for some inputs alone is named.
    """
    model = _copied(model).eval()
    place = next(model.parameters()).device
    x = mapped(x, lambda t: t.to(place))
    answer(model, x)
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
    model = _copied(model)
    place = next(model.parameters()).device
    x = mapped(x, lambda t: t.to(place))
    evaluated = called(model.eval(), x)
    try:
        trained = called(model.train(), x)
    except Exception:  # the network's own code: that it is called otherwise in training is the user's to say
        if own:
            return
        answer(model, x)  # the same once more, told as a fault of theirs
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
