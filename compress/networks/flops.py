"""Multiplications and additions of a network, layer by layer: dense, and with its zeros left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.inputs import Inputs, call, size

RECURRENT = (nn.RNNBase, nn.modules.rnn.RNNCellBase)
LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@dataclass(frozen=True)
class LayerFlops:
    """One layer and one sample: ``dense`` FLOPs (two a multiply-add), and ``sparse``, those of weights that are not 0.

    ``uses`` is how often each weight is used: once a position of the output (zero padding counts like pixels), times
    the calls of the layer.
    """

    name: str
    weights: int
    nonzero: int
    uses: int

    @property
    def dense(self) -> int:
        return 2 * self.weights * self.uses

    @property
    def sparse(self) -> int:
        return 2 * self.nonzero * self.uses


@torch.no_grad()
def count_flops(model: nn.Module, sample: Inputs, masks: Mapping[str, Tensor] | None = None) -> list[LayerFlops]:
    """FLOPs of every linear and convolutional layer for one ``sample`` (1, c, ...), biases left out.

    Args:
        masks: by parameter name, True = kept; a weight without a mask counts its own zeros.

    Every weight of a convolution is used once a position of its output, also in groups; a transposed one's once a
    position of its input.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, COUNTED)}
    uses = _uses(model, sample)
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for name, module in layers.items():
        weight = module.weight
        mask = (masks or {}).get(names.get(id(weight), f"{name}.weight"))
        nonzero = int(mask.sum()) if mask is not None else int(torch.count_nonzero(weight))
        found.append(LayerFlops(name, weight.numel(), nonzero, uses.get(name, 0)))
    return found


@torch.no_grad()
def flops_elsewhere(model: nn.Module, sample: Inputs) -> dict[str, int]:
    """FLOPs of the weights that `count_flops` does not know, by parameter name, for one ``sample``.

    Those of recurrent layers and cells, of multi-head attention's projections, of `Bilinear` and (none) of embeddings.
    A parameter that is missing here is one of a layer that nothing is known about.
    """
    uses = _uses(model, sample)
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            own = f"{name}.{key}" if name else key
            if parameter is None or parameter.dim() < 2 or isinstance(module, COUNTED):
                continue
            if isinstance(module, (*RECURRENT, nn.Bilinear)):
                found[own] = 2 * parameter.numel() * uses.get(name, 0)
            elif isinstance(module, nn.MultiheadAttention):
                found[own] = _attention(key, parameter, *(uses.get(f"{name} {part}", 0) for part in ("query", "key")))
            elif isinstance(module, LOOKED_UP):
                found[own] = 0
    return found


def _attention(key: str, parameter: Tensor, queries: int, keys: int) -> int:
    """Of one of attention's parameters: the query's part works once a query, the other two once a key."""
    if key == "in_proj_weight":
        return 2 * (parameter.numel() // 3) * (queries + 2 * keys)
    return 2 * parameter.numel() * {"q_proj_weight": queries, "k_proj_weight": keys, "v_proj_weight": keys}.get(key, 0)


def _uses(model: nn.Module, sample: Inputs) -> dict[str, int]:
    """How often the layers' weights are used for one sample, by module name; of attention ``name query``, ``name key``
    and, as its output projection is no call of its own, that of ``name.out_proj``."""
    uses: dict[str, int] = {}
    samples = size(sample)

    def add(name: str, seen: Tensor, channels: int) -> None:
        uses[name] = uses.get(name, 0) + seen.numel() // channels // samples

    def count(name: str, module: nn.Module, inputs: Any, more: dict[str, Any], output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            query, key = (more[word] if word in more else inputs[i] for i, word in enumerate(("query", "key")))
            add(f"{name} query", query, query.shape[-1])
            add(f"{name} key", key, key.shape[-1])
            add(f"{name}.out_proj", query, query.shape[-1])
        elif isinstance(module, RECURRENT):
            given = inputs[0] if inputs else more["input"]
            steps = given.data if isinstance(given, nn.utils.rnn.PackedSequence) else given
            add(name, steps, steps.shape[-1])
        elif isinstance(module, nn.Linear | nn.Bilinear):
            add(name, output, output.shape[-1])  # (..., features)
        else:
            # (b, c, positions...) of a convolution: every weight works once a position of its output, of a transposed
            # one's input.
            seen = output if not isinstance(module, TRANSPOSED) else inputs[0] if inputs else more["input"]
            add(name, seen, seen.shape[1])

    known = (*COUNTED, *RECURRENT, nn.Bilinear, nn.MultiheadAttention)
    handles = [
        module.register_forward_hook(partial(count, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, known)
    ]
    was = model.training
    model.eval()
    try:
        call(model, sample)
    finally:
        model.train(was)
        for handle in handles:
            handle.remove()
    return uses
