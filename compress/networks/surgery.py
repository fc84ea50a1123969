"""Channels cut out of a module's layers: really (`cut`), or as zeros at full shape (`zeroed`); and what shape is left.

An axis of a layer is ``out`` or ``in``; a norm or any other layer with one number a channel has ``out`` alone, as has a
depthwise convolution, whose two sides are one. Nothing here knows why a channel goes.

Both make a copy that shares every tensor they do not change, so a trial of one group costs that group's memory alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import CompressError

Axis = Literal["out", "in"]
# (layer, axis) -> rising channel indices
Channels = Mapping[tuple[str, str], Sequence[int]]

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CHANNELWISE = (nn.modules.batchnorm._NormBase, nn.PReLU)
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
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    return int(module.num_features)  # type: ignore[arg-type]


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
    for name in {layer for layer, _ in removed}:
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


def _cut(module: Any, name: str, out: list[int], into: list[int]) -> None:
    if isinstance(module, CHANNELWISE):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.dim():
                _set(module, key, tensor[out])
        setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", len(out))
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
def zeroed(model: nn.Module, removed: Channels) -> nn.Module:
    """A copy of the model at full shape in which all that `cut` would take away is zero."""
    model = shared_copy(model)
    modules = dict(model.named_modules())
    for (name, axis), gone in removed.items():
        module: Any = modules[name]
        at = list(gone)
        if isinstance(module, CHANNELWISE):
            for key in ("weight", "bias"):
                held = module._parameters.get(key)
                if held is not None:
                    _set(module, key, held.index_fill(0, torch.tensor(at, device=held.device), 0))
            continue
        weight = module.weight.detach().clone()
        if isinstance(module, nn.Linear) or is_depthwise(module):
            if axis == "out":
                weight[at] = 0
            else:
                weight[:, at] = 0
        else:
            transposed = isinstance(module, TRANSPOSED)
            # The axis that the groups divide: columns of a plain convolution's input, of a transposed one's output.
            divided = (axis == "out") == transposed
            if divided:
                per, rows = weight.shape[1], weight.shape[0] // module.groups
                for i in at:
                    g, column = divmod(i, per)
                    weight[g * rows : (g + 1) * rows, column] = 0
            else:
                weight[at] = 0
        _set(module, "weight", weight)
        if axis == "out" and module.bias is not None:
            _set(module, "bias", module.bias.index_fill(0, torch.tensor(at, device=weight.device), 0))
    return model


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
    """The layers of ``model`` whose shape is not that of the ``dense`` network it was cut from."""
    before = widths(dense)
    return {name: found for name, found in widths(model).items() if before.get(name) != found}


@torch.no_grad()
def resize(model: nn.Module, shapes: Mapping[str, Mapping[str, int]]) -> nn.Module:
    """Gives layers the shapes that `changed_widths` told, in place; what weights then stand in them means nothing.

    Raises:
        CompressError: a layer is not there, or cannot have the shape.
    """
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        module: Any = modules.get(name)
        own = widths(model).get(name) if module is not None else None
        good = own is not None and shape.keys() == own.keys()
        good = good and all(isinstance(v, int) and 1 <= v <= own[k] for k, v in shape.items())  # type: ignore[index]
        if not good or ("groups" in shape and (shape["out"] % shape["groups"] or shape["in"] % shape["groups"])):
            raise CompressError(
                f"the layer {name!r} cannot have the shape {dict(shape)}",
                where="network.json",
                fix="copy the model's folder whole, or make it again",
            )
        out, into = shape["out"], shape.get("in", 0)
        if isinstance(module, CHANNELWISE):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.dim():
                    _set(module, key, tensor[:out])
            setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", out)
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
