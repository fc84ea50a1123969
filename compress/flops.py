"""Multiplications and additions of a network, layer by layer: dense, and with its zeros left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
def count_flops(model: nn.Module, sample: Tensor, masks: Mapping[str, Tensor] | None = None) -> list[LayerFlops]:
    """FLOPs of every linear and convolutional layer for one ``sample`` (1, c, ...), biases left out.

    Args:
        masks: by parameter name, True = kept; a weight without a mask counts its own zeros.

    Every weight of a convolution is used once a position of its output, also in groups; a transposed one's once a
    position of its input.
    """
    uses: dict[str, int] = {}
    handles = []

    def hook(name: str) -> Any:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # (b, c, positions...) of a convolution; (..., features) of a linear layer.
            seen = inputs[0] if isinstance(module, TRANSPOSED) else output
            channels = seen.shape[-1] if isinstance(module, nn.Linear) else seen.shape[1]
            uses[name] = uses.get(name, 0) + seen.numel() // channels // len(sample)

        return count

    layers = {name: m for name, m in model.named_modules() if isinstance(m, COUNTED)}
    for name, module in layers.items():
        handles.append(module.register_forward_hook(hook(name)))
    was = model.training
    model.eval()
    try:
        model(sample)
    finally:
        model.train(was)
        for handle in handles:
            handle.remove()
    found = []
    for name, module in layers.items():
        weight = module.weight
        mask = (masks or {}).get(f"{name}.weight")
        nonzero = int(mask.sum()) if mask is not None else int(torch.count_nonzero(weight))
        found.append(LayerFlops(name, weight.numel(), nonzero, uses.get(name, 0)))
    return found
