"""Decoders whose layers differ in size, for transformers: each is built as the dense model has it, then its parts are
made as small as the configuration says.

This file is copied into every model that is saved in the `per-layer` layout and that compress knows by its structure,
with one class behind it that binds it to the architecture; so it needs nothing but torch and transformers.
`compress_layers` of the configuration has an entry for every block that is not the dense one: ``linear`` the (rows,
columns) of its linear layers, ``numbers`` the sizes that a module keeps for itself, ``heads`` the (query heads, KV
heads) of its attention, and ``gone`` the sublayers that are not there at all, with how many values each gave.
"""

import copy

import torch
from torch import nn


class Nothing(nn.Module):
    """Stands where a sublayer was removed: adds nothing, keeps no cache. Gives a tensor, or so many values."""

    def __init__(self, values):  # type: ignore[no-untyped-def]
        super().__init__()
        self.values = values

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        zeros = torch.zeros_like(hidden_states)
        return (zeros, *[None] * (self.values - 1)) if self.values else zeros


def inner(module, path):  # type: ignore[no-untyped-def]
    """The module that holds what ``path`` names, and the last part of its name."""
    *way, last = path.split(".")
    for part in way:
        module = module._modules[part]
    return module, last


def resize(layer, entry):  # type: ignore[no-untyped-def]
    strange = set(entry) - {"linear", "numbers", "heads", "gone"}
    if strange:
        raise ValueError(f"compress_layers: an entry has no {sorted(strange)[0]}")
    for path, (rows, columns) in entry.get("linear", {}).items():
        holder, name = inner(layer, path)
        old = holder._modules[name]
        if not isinstance(old, nn.Linear) or not (0 < rows <= old.out_features and 0 < columns <= old.in_features):
            raise ValueError(f"compress_layers: {path} is no linear layer of {rows} x {columns} or more")
        holder._modules[name] = nn.Linear(columns, rows, bias=old.bias is not None)
    for path, number in entry.get("numbers", {}).items():
        holder, name = inner(layer, path)
        if type(getattr(holder, name)) is not int or type(number) is not int or number < 1:
            raise ValueError(f"compress_layers: {path} is no size")
        setattr(holder, name, number)
    for place, (heads, groups) in entry.get("heads", {}).items():
        attention = layer._modules[place]
        if type(heads) is not int or type(groups) is not int or not 0 < groups <= heads or heads % groups:
            raise ValueError(f"compress_layers: {heads} heads of {groups} KV heads are none")
        if hasattr(attention, "config"):
            if heads > attention.config.num_attention_heads:
                raise ValueError(f"compress_layers: {place} has no {heads} heads")
            attention.config = copy.copy(attention.config)
            attention.config.num_attention_heads, attention.config.num_key_value_heads = heads, groups
    for place, values in entry.get("gone", {}).items():
        if place not in layer._modules or type(values) is not int or not 0 <= values <= 8:
            raise ValueError(f"compress_layers: there is no {place}")
        layer._modules[place] = Nothing(values)


class Resized:
    """Mixin in front of a causal language model."""

    def __init__(self, config):  # type: ignore[no-untyped-def]
        super().__init__(config)  # type: ignore[call-arg]
        body = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        layers = next(getattr(body, name) for name in ("layers", "h", "blocks") if hasattr(body, name))
        for index, entry in config.compress_layers.items():
            if not index.isdecimal() or int(index) >= len(layers):
                raise ValueError(f"compress_layers: there is no block {index}")
            resize(layers[int(index)], entry)
        self.post_init()  # type: ignore[attr-defined]
