"""Decoders whose layers differ in size, for transformers.

This file is copied into every model that is saved in the `per-layer` layout, with one class behind it that binds it
to a family; so it needs nothing but torch and transformers. Each layer is built from its own entry of
`per_layer_config`; what an entry's `skip` names (attention, mlp) is not there at all.
"""

import torch
from torch import nn


class NoAttention(nn.Module):
    """Stands where all heads of a block were removed: adds nothing, keeps no cache."""

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        return torch.zeros_like(hidden_states), None


class NoFFN(nn.Module):
    """Stands where all neurons of a block were removed."""

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        return torch.zeros_like(hidden_states)


class Ragged:
    """Mixin in front of a causal language model; `layer_class` is the family's decoder layer."""

    layer_class: type

    def __init__(self, config):  # type: ignore[no-untyped-def]
        super().__init__(config)  # type: ignore[call-arg]
        for index in range(len(self.model.layers)):  # type: ignore[attr-defined]
            own = config.per_layer_config[index]
            layer = self.layer_class(own, index)
            skip = getattr(own, "skip", None) or ()
            if "attention" in skip:
                layer.self_attn = NoAttention()
            if "mlp" in skip:
                layer.mlp = NoFFN()
            self.model.layers[index] = layer  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]
