"""Batch norms after a cut: their statistics were those of a wider network, and are taken again on training samples.

Without it most of what a cut seems to cost is the norms' (Li et al. 2020, EagleEye), and the oracle would judge that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.images import Splits

NORMS = nn.modules.batchnorm._BatchNorm
Feed = Callable[[nn.Module], Any]  # runs a network on some training samples


def _run(x: Tensor, model: nn.Module) -> None:
    model(x.to(next(model.parameters()).device))


class Settle:
    """Takes the statistics of a network's batch norms again, on ``samples`` of the training split, spread over it.

    Every process takes all samples, so all come to the same statistics.
    """

    def __init__(self, data: Splits, samples: int, batch: int = 128) -> None:
        self.samples = min(samples, len(data.train))
        at = torch.arange(self.samples) * len(data.train) // max(1, self.samples)
        inputs = [data.prepare(data.train.inputs[part]) for part in at.split(batch)] if self.samples else []
        self.feeds: Sequence[Feed] = [partial(_run, x) for x in inputs]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        """The model itself, in evaluation mode; what its norms shared with another network they share no more."""
        model.eval()
        norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
        if not self.feeds or not norms:
            return model
        momenta = [m.momentum for m in norms]
        for norm in norms:
            for name, buffer in norm._buffers.items():
                norm._buffers[name] = buffer.clone() if buffer is not None else None
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for feed in self.feeds:
            feed(model)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return model.eval()
