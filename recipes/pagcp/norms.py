"""Batch norms after a cut: their statistics were those of a wider network, and are taken again on training samples.

Without it most of what a cut seems to cost is the norms' (Li et al. 2020, EagleEye), and the oracle would judge that.
"""

from __future__ import annotations

import torch
from torch import nn

from compress.data.images import Splits


class Settle:
    """Takes the statistics of a network's batch norms again, on ``samples`` of the training split, spread over it.

    Every process takes all samples, so all come to the same statistics.
    """

    def __init__(self, data: Splits, samples: int, batch: int = 128) -> None:
        self.samples = min(samples, len(data.train))
        at = torch.arange(self.samples) * len(data.train) // max(1, self.samples)
        self.inputs = [data.prepare(data.train.inputs[part]) for part in at.split(batch)] if self.samples else []

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        """The model itself, in evaluation mode; what its norms shared with another network they share no more."""
        model.eval()
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
        if not self.inputs or not norms:
            return model
        place = next(model.parameters()).device
        momenta = [m.momentum for m in norms]
        for norm in norms:
            for name, buffer in norm._buffers.items():
                norm._buffers[name] = buffer.clone() if buffer is not None else None
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for x in self.inputs:
            model(x.to(place))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return model.eval()
