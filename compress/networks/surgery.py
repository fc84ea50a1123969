"""Channels cut out of a module's layers: really (`cut`), or as zeros at full shape (`zeroed`); and what shape is left.

An axis of a layer is ``out`` or ``in``; a norm or any other layer with one number a channel has ``out`` alone, as has a
depthwise convolution, whose two sides are one. A parameter or buffer of another module has an axis for each dimension
(``dim:0``, under its own name), and a number in a module's code one with as many places (``int:num_heads``, of which
only how many go matters). Nothing here knows why a channel goes.

A layer norm, a group norm, and the mean that a module with such a parameter takes over it are of the channels that are
left: that is what the smaller network computes, and what zeros at full shape are to be compared with.

Both make a copy that shares every tensor they do not change, so a trial of one group costs that group's memory alone.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import register_parametrization
from torch.overrides import TorchFunctionMode

from compress.errors import CompressError

# (layer, axis) -> rising channel indices
Channels = Mapping[tuple[str, str], Sequence[int]]

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CHANNELWISE = (nn.modules.batchnorm._NormBase, nn.PReLU, nn.LayerNorm, nn.GroupNorm)
LAYERS = (*CONV, *TRANSPOSED, nn.Linear, *CHANNELWISE)


def is_depthwise(module: nn.Module) -> bool:
    """A convolution that filters every channel by itself."""
    return isinstance(module, CONV) and module.groups == module.in_channels == module.out_channels > 1


def width(module: nn.Module, axis: str) -> int:
    """How many channels a layer has on an axis."""
    if isinstance(module, nn.Linear):
        return module.in_features if axis == "in" else module.out_features
    if isinstance(module, CONV + TRANSPOSED):
        return int(module.in_channels if axis == "in" else module.out_channels)
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    return int(getattr(module, _counted(module)))


def _counted(module: nn.Module) -> str:
    """Where a layer with one number a channel says how many it has."""
    if isinstance(module, nn.LayerNorm):
        return "normalized_shape"
    return {nn.PReLU: "num_parameters", nn.GroupNorm: "num_channels"}.get(
        next((k for k in (nn.PReLU, nn.GroupNorm) if isinstance(module, k)), nn.Module), "num_features"
    )


def _count(module: nn.Module, channels: int) -> None:
    """Tells a layer with one number a channel how many it has."""
    value = (*module.normalized_shape[:-1], channels) if isinstance(module, nn.LayerNorm) else channels
    setattr(module, _counted(module), value)


def parameter_axis(dim: int) -> str:
    """The axis of a dimension of a parameter or buffer that is of no layer that is cut by ``out`` and ``in``."""
    return f"dim:{dim}"


def number_axis(attribute: str) -> str:
    """The axis of a number in a module's code."""
    return f"int:{attribute}"


def size(model: nn.Module, name: str, axis: str) -> int | None:
    """How many places a layer, parameter or number has on an axis; None where there is no such thing."""
    kind, _, which = axis.partition(":")
    modules = dict(model.named_modules())
    if kind == "dim":
        owner, _, key = name.rpartition(".")
        tensor = modules[owner]._parameters.get(key, modules[owner]._buffers.get(key)) if owner in modules else None
        if tensor is None or not which.isdigit() or int(which) >= tensor.dim():
            return None
        return int(tensor.shape[int(which)])
    module = modules.get(name)
    if kind == "int":
        known = module is not None and not isinstance(module, LAYERS)
        value = vars(module).get(which) if known else None
        return value if type(value) is int and value > 0 else None
    own = widths(module).get("") if isinstance(module, LAYERS) else None
    return own.get(axis) if own is not None else None


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules; parameters and buffers are the model's own."""
    own = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, own)  # type: ignore[arg-type]


@torch.no_grad()
def cut(model: nn.Module, removed: Channels) -> nn.Module:
    """A copy of the model without the channels ``removed``.

    Raises:
        CompressError: a layer cannot lose them: all would go, or a grouped convolution would have groups of different
            size.
    """
    model = shared_copy(model)
    modules = dict(model.named_modules())
    _cut_others(model, modules, removed)
    for name in sorted({layer for layer, axis in removed if axis in ("out", "in")}):
        module = modules[name]
        kept = {}
        for axis in ("out", "in"):
            count = width(module, axis) if axis == "out" or not isinstance(module, CHANNELWISE) else 0
            gone = set(removed.get((name, axis), ()))
            kept[axis] = [i for i in range(count) if i not in gone]
            if count and not kept[axis]:
                raise CompressError("no channel would be left", where=name, fix="keep one channel of every layer")
        _cut(module, name, kept["out"], kept["in"])
    return model


def _cut_others(model: nn.Module, modules: Mapping[str, nn.Module], removed: Channels) -> None:
    """Takes the places of bare parameters and of numbers in the code away, in place."""
    for (name, axis), gone in removed.items():
        kind, _, which = axis.partition(":")
        if not which or not gone:
            continue
        if len(gone) >= (size(model, name, axis) or 0):
            raise CompressError("no channel would be left", where=name, fix="keep one channel of every layer")
        if kind == "int":
            setattr(modules[name], which, getattr(modules[name], which) - len(gone))
            continue
        owner, _, key = name.rpartition(".")
        module = modules[owner]
        tensor = getattr(module, key)
        left = [i for i in range(tensor.shape[int(which)]) if i not in set(gone)]
        _set(module, key, tensor.index_select(int(which), torch.tensor(left, device=tensor.device)))


def _cut(module: Any, name: str, out: list[int], into: list[int]) -> None:
    if isinstance(module, CHANNELWISE):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.dim():
                _set(module, key, tensor[out])
        _count(module, len(out))
    elif isinstance(module, nn.Linear):
        _set(module, "weight", module.weight[out][:, into])
        module.out_features, module.in_features = len(out), len(into)
    elif is_depthwise(module):
        _set(module, "weight", module.weight[out])
        module.groups = module.in_channels = module.out_channels = len(out)
    else:
        transposed = isinstance(module, TRANSPOSED)
        outs = _by_group(out, module.out_channels, module.groups, name)
        ins = _by_group(into, module.in_channels, module.groups, name)
        # A plain convolution's weight is (out, in / groups, ...), a transposed one's (in, out / groups, ...).
        rows, columns = (ins, outs) if transposed else (outs, ins)
        per = module.weight.shape[0] // module.groups
        blocks = [
            module.weight[[g * per + i for i in r]][:, c] for g, (r, c) in enumerate(zip(rows, columns, strict=True))
        ]
        _set(module, "weight", torch.cat(blocks))
        module.out_channels, module.in_channels = len(out), len(into)
    if not isinstance(module, CHANNELWISE) and module.bias is not None:
        _set(module, "bias", module.bias[out])


def _by_group(kept: list[int], count: int, groups: int, name: str) -> list[list[int]]:
    """Indices within each of a convolution's groups."""
    per = count // groups
    found = [[i - g * per for i in kept if g * per <= i < (g + 1) * per] for g in range(groups)]
    if len({len(part) for part in found}) > 1 or not found[0]:
        raise CompressError(
            "the groups of a convolution would differ in size", where=name, fix="take as many channels from each"
        )
    return found


@torch.no_grad()
def zeroed(model: nn.Module, removed: Channels, *, held: bool = True) -> nn.Module:
    """A copy of the model at full shape in which all that `cut` would take away is zero.

    Args:
        held: whether the copy has tensors with these zeros. Otherwise each is made anew whenever it is asked for, so
            that a large network is not in memory twice; the copy is then good for running alone.
    """
    model = shared_copy(model)
    modules = dict(model.named_modules())
    rests: set[tuple[int, int]] = set()
    put = _set_changed if held else _change_when_asked
    for (name, axis), gone in removed.items():
        at = list(gone)
        if ":" in axis:
            _zero_others(modules, name, axis, at, rests, put)
            continue
        module: Any = modules[name]
        if isinstance(module, CHANNELWISE):
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                _over_rest(module, width(module, "out"), at, rests)
            for key in ("weight", "bias"):
                if module._parameters.get(key) is not None:
                    put(module, key, partial(_without, dim=0, at=at))
            continue
        if axis == "in" and _has_own_forward(module):
            _over_rest(module, width(module, "in"), at, rests)
        put(module, "weight", _weight_without(module, axis, at))
        if axis == "out" and module.bias is not None:
            put(module, "bias", partial(_without, dim=0, at=at))
    return model


Change = Callable[[Tensor], Tensor]


def _without(tensor: Tensor, dim: int, at: list[int]) -> Tensor:
    return tensor.detach().index_fill(dim, torch.tensor(at, device=tensor.device), 0)


def _weight_without(module: Any, axis: str, at: list[int]) -> Change:
    """What makes channels of a linear layer or convolution zero in its weight."""
    if isinstance(module, nn.Linear) or is_depthwise(module):
        return partial(_without, dim=0 if axis == "out" else 1, at=at)
    # The axis that the groups divide: columns of a plain convolution's input, of a transposed one's output.
    divided = (axis == "out") == isinstance(module, TRANSPOSED)
    if not divided:
        return partial(_without, dim=0, at=at)
    groups = int(module.groups)

    def columns(tensor: Tensor) -> Tensor:
        weight = tensor.detach().clone()
        per, rows = weight.shape[1], weight.shape[0] // groups
        for i in at:
            g, column = divmod(i, per)
            weight[g * rows : (g + 1) * rows, column] = 0
        return weight

    return columns


def _set_changed(module: nn.Module, key: str, change: Change) -> None:
    _set(module, key, change(getattr(module, key)))


class _Changed(nn.Module):
    """A parametrisation: a tensor as a function of the one that is held."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, tensor: Tensor) -> Tensor:
        return self.change(tensor)


def _change_when_asked(module: nn.Module, key: str, change: Change) -> None:
    register_parametrization(module, key, _Changed(change), unsafe=True)  # it changes neither shape nor type


def _zero_others(
    modules: Mapping[str, nn.Module],
    name: str,
    axis: str,
    gone: list[int],
    rests: set[tuple[int, int]],
    put: Callable[[nn.Module, str, Change], None],
) -> None:
    """Zeros in a bare parameter; a number in the code stays as it is."""
    kind, _, dim = axis.partition(":")
    if kind == "int":
        return
    owner, _, key = name.rpartition(".")
    module = modules[owner]
    _over_rest(module, getattr(module, key).shape[int(dim)], gone, rests)
    put(module, key, partial(_without, dim=int(dim), at=gone))


def _has_own_forward(module: nn.Module) -> bool:
    """A plain convolution of another class than torch's, which may make its weights anew at every call."""
    return isinstance(module, CONV) and module.groups == 1 and type(module).forward not in {k.forward for k in CONV}


class _Rest(TorchFunctionMode):
    """Norms and means over all of a module's channels are taken over those that are left; so are those of its weights,
    where a convolution standardises them."""

    MEANS = (torch.mean, torch.Tensor.mean)

    def __init__(self, channels: int, gone: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.kept = [i for i in range(channels) if i not in set(gone)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.layer_norm, functional.group_norm) and isinstance(args[0], Tensor):
            return self._normed(func, *args, **kwargs)
        if func is functional.batch_norm and self._is_of_weights(*args):
            return self._standardised(*args, **kwargs)
        out = func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if func in self.MEANS and isinstance(dim, int) and args[0].shape[dim] == self.channels:
            return out * (self.channels / len(self.kept))
        return out

    def _is_of_weights(self, x: Tensor, mean: Any = None, *_: Any) -> bool:
        """Whether what is normalised is a convolution's weight (1, out, in * places), by no statistics but its own."""
        return mean is None and x.dim() == 3 and len(x) == 1 and x.shape[2] % self.channels == 0

    def _standardised(self, weight: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Of weights (1, out, in * places)."""
        at = torch.tensor(self.kept, device=weight.device)
        apart = weight.unflatten(2, (self.channels, -1))
        rest = apart.index_select(2, at).flatten(2)
        found = functional.batch_norm(rest, *args, **kwargs).unflatten(2, (len(self.kept), -1))
        return torch.zeros_like(apart).index_copy(2, at, found).flatten(2)

    def _normed(
        self, func: Any, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        dim = x.dim() - 1 if func is functional.layer_norm else 1
        if x.shape[dim] != self.channels:
            out: Tensor = func(x, shape, weight, bias, eps)
            return out
        at = torch.tensor(self.kept, device=x.device)
        rest = x.index_select(dim, at)
        of = [None if t is None else t[at] for t in (weight, bias)]
        shape = (len(self.kept),) if func is functional.layer_norm else shape
        return torch.zeros_like(x).index_copy(dim, at, func(rest, shape, *of, eps))


def _over_rest(module: nn.Module, channels: int, gone: Sequence[int], rests: set[tuple[int, int]]) -> None:
    """Has a module run with its norms and means over the channels that are left; once for each number of channels."""
    if (id(module), channels) in rests:
        return
    rests.add((id(module), channels))
    # The module is not held by its own attribute: a copy that is no longer needed goes at once.
    own, inner = weakref.ref(module), module.__dict__.get("forward")

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Rest(channels, gone):
            if inner is not None:
                return inner(*args, **kwargs)
            held: Any = own()
            return type(held).forward(held, *args, **kwargs)

    module.forward = run


def _set(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Gives a module another tensor; the old one is left as it was, for others may share it."""
    tensor = tensor.detach().clone()
    if key in module._parameters:
        old = module._parameters[key]
        module._parameters[key] = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
    else:
        module._buffers[key] = tensor


# --- shapes -----------------------------------------------------------------------------------------------------------


def widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """Channels in and out (and groups) of every layer that can be cut."""
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, CHANNELWISE):
            found[name] = {"out": width(module, "out")}
        elif isinstance(module, LAYERS):
            found[name] = {"out": width(module, "out"), "in": width(module, "in")}
            if not isinstance(module, nn.Linear):
                found[name]["groups"] = int(module.groups)  # type: ignore[arg-type]
    return found


def changed_widths(dense: nn.Module, model: nn.Module) -> dict[str, dict[str, int]]:
    """The layers of ``model`` whose shape is not that of the ``dense`` network it was cut from, and the bare parameters
    and numbers in its code that are not."""
    before, other = widths(dense), _others(dense)
    found = {name: shape for name, shape in widths(model).items() if before.get(name) != shape}
    for (name, axis), count in _others(model).items():
        if other.get((name, axis)) != count:
            found.setdefault(name, {})[axis] = count
    return found


def _others(model: nn.Module) -> dict[tuple[str, str], int]:
    """Sizes of bare parameters and buffers, and whole numbers in the code of modules that are no layers here."""
    found: dict[tuple[str, str], int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            continue
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            own = f"{name}.{key}" if name else key
            if tensor is not None:
                found |= {(own, parameter_axis(d)): n for d, n in enumerate(tensor.shape)}
        found |= {(name, number_axis(k)): v for k, v in vars(module).items() if type(v) is int}
    return found


@torch.no_grad()
def resize(model: nn.Module, shapes: Mapping[str, Mapping[str, int]]) -> nn.Module:
    """Gives layers the shapes that `changed_widths` told, in place; what weights then stand in them means nothing.

    Raises:
        CompressError: a layer is not there, or cannot have the shape.
    """
    modules = dict(model.named_modules())
    every = widths(model)
    for name, given in shapes.items():
        shape = {axis: count for axis, count in given.items() if ":" not in axis}
        _resize_others(model, name, {axis: count for axis, count in given.items() if ":" in axis})
        if not shape and given:
            continue
        module: Any = modules.get(name)
        own = every.get(name)
        good = own is not None and shape.keys() == own.keys()
        good = good and all(isinstance(v, int) and 1 <= v <= own[k] for k, v in shape.items())  # type: ignore[index]
        if not good or ("groups" in shape and (shape["out"] % shape["groups"] or shape["in"] % shape["groups"])):
            raise _unfit(name, given)
        out, into = shape["out"], shape.get("in", 0)
        if isinstance(module, CHANNELWISE):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.dim():
                    _set(module, key, tensor[:out])
            _count(module, out)
            continue
        if isinstance(module, nn.Linear):
            _set(module, "weight", module.weight[:out, :into])
            module.out_features, module.in_features = out, into
        else:
            first, second = (into, out) if isinstance(module, TRANSPOSED) else (out, into)
            _set(module, "weight", module.weight[:first, : second // shape["groups"]])
            module.out_channels, module.in_channels, module.groups = out, into, shape["groups"]
        if module.bias is not None:
            _set(module, "bias", module.bias[:out])
    return model


def _resize_others(model: nn.Module, name: str, shape: Mapping[str, int]) -> None:
    """Gives a bare parameter or numbers in the code of a module their sizes, in place."""
    for axis, count in shape.items():
        own = size(model, name, axis)
        if own is None or type(count) is not int or not 1 <= count <= own:
            raise _unfit(name, shape)
        kind, _, which = axis.partition(":")
        if kind == "int":
            setattr(model.get_submodule(name), which, count)
        else:
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            _set(module, key, getattr(module, key).narrow(int(which), 0, count))


def _unfit(name: str, shape: Mapping[str, int]) -> CompressError:
    return CompressError(
        f"the layer {name!r} cannot have the shape {dict(shape)}",
        where="network.json",
        fix="copy the model's folder whole, or make it again",
    )
