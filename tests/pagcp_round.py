"""A network of six groups and two tasks, and a round of PAGCP on it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from compress.data.images import Splits
from compress.networks.flops import count_flops
from compress.networks.train import train
from compress.recipes.pagcp.greedy import Pruner
from compress.recipes.pagcp.groups import find_groups
from compress.recipes.pagcp.norms import Settle
from compress.recipes.pagcp.options import PAGCPOptions
from compress.recipes.pagcp.oracle import Oracle, calibration, tolerances
from compress.recipes.pagcp.saliency import rankings
from compress.run.folder import Journal
from compress.schema.sections import TrainSpec
from tests import channel_nets as nets

LOSS = PAGCPOptions(round_to=2, batch=16, keep=0.0, saliency="l1", total=60.0, settle=0)
SETTLED = LOSS.model_copy(update={"settle": 100})


class Small(nn.Module):
    """Six groups, two tasks, a skip from early to late."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.deep = nets.conv(3, 12), nets.conv(12, 12), nets.conv(12, 16)
        self.last, self.classes = nets.conv(16, 16), nn.Linear(16, 3)
        self.side, self.mix, self.pixels = nn.Conv2d(12, 8, 1), nets.conv(24, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.stem(x)
        y = y + self.block(y)
        z = self.last(self.deep(y))
        matte = self.pixels(self.mix(torch.cat([self.side(y), z], 1)))
        return {"shape": self.classes(z.mean((2, 3))), "matte": matte}


def pruner(model: nn.Module, data: Splits, path: Path, options: PAGCPOptions = LOSS) -> Pruner:
    x = data.prepare(data.calibration.inputs[:2])
    groups = find_groups(model, x, options.round_to).groups
    split = calibration(data, options.samples)
    limits = tolerances(options, [t.name for t in data.tasks])
    oracle = Oracle(data, split, limits, options.batch, Journal(path), "test")
    oracle.base = oracle.measure("dense", model, 1.0).values
    order = rankings(model, groups, data, split, options.saliency)
    dense = sum(f.dense for f in count_flops(model, x[:1]))
    settle = Settle(data, options.settle)
    return Pruner(model, groups, order, oracle, options, x, dense, settle=settle)


def trained_small(data: Splits, epochs: int) -> nn.Module:
    """`Small`, the same whenever it is trained so long."""
    torch.manual_seed(0)
    model = Small()
    train(model, data, TrainSpec(epochs=epochs, lr=0.1, batch=32, warmup_epochs=1))
    return model.eval()
