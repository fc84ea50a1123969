"""FLOPs and parameters of a network with channels gone, reckoned from the dense one: what counting would give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.data.inputs import Inputs, first
from compress.networks.flops import count_flops
from compress.networks.surgery import CHANNELWISE, CONV, LAYERS, TRANSPOSED, is_depthwise, parameter_axis, width


@dataclass(frozen=True)
class Layer:
    """``per`` weights a pair of one input and one output channel (one of each group), used ``uses`` times a sample."""

    out: int
    into: int
    per: int
    groups: int
    uses: int
    vectors: int  # numbers it holds for every output channel beside the weight (biases, norms)
    depthwise: bool


class Costs:
    """What every layer costs for any number of channels."""

    def __init__(self, model: nn.Module, sample: Inputs) -> None:
        flops = {f.name: f for f in count_flops(model, first(sample, 1))}
        self.layers: dict[str, Layer] = {}
        own: set[int] = set()
        for name, module in model.named_modules():
            if not isinstance(module, LAYERS):
                continue
            m: Any = module
            own |= {id(p) for p in m.parameters(recurse=False)}
            if isinstance(module, CHANNELWISE):
                vectors = sum(p is not None and p.dim() > 0 for p in m._parameters.values())
                self.layers[name] = Layer(width(m, "out"), 1, 0, 1, 0, vectors, False)
                continue
            per = m.weight[0, 0].numel() if isinstance(module, CONV + TRANSPOSED) else 1
            groups = int(getattr(m, "groups", 1))
            uses = flops[name].uses if name in flops else 0
            self.layers[name] = Layer(
                width(m, "out"), width(m, "in"), per, groups, uses, int(m.bias is not None), is_depthwise(m)
            )
        # Parameters of no such layer, by name.
        self.others = {n: tuple(p.shape) for n, p in model.named_parameters() if id(p) not in own}

    def weights(self, removed: Mapping[tuple[str, str], Sequence[int]]) -> dict[str, int]:
        """Weights (biases left out) of every layer."""
        found = {}
        for name, layer in self.layers.items():
            out = layer.out - len(removed.get((name, "out"), ()))
            into = layer.into - len(removed.get((name, "in"), ()))
            found[name] = out * layer.per * (1 if layer.depthwise else into // layer.groups)
        return found

    def flops(self, removed: Mapping[tuple[str, str], Sequence[int]]) -> dict[str, int]:
        """FLOPs a sample of every layer, as `compress.networks.flops` counts them."""
        return {name: 2 * count * self.layers[name].uses for name, count in self.weights(removed).items()}

    def parameters(self, removed: Mapping[tuple[str, str], Sequence[int]]) -> int:
        """All parameters of the network."""
        vectors = sum(
            layer.vectors * (layer.out - len(removed.get((name, "out"), ()))) for name, layer in self.layers.items()
        )
        others = sum(
            math.prod(n - len(removed.get((name, parameter_axis(d)), ())) for d, n in enumerate(shape))
            for name, shape in self.others.items()
        )
        return sum(self.weights(removed).values()) + vectors + others
