"""The network of prune_multitask.py: one trunk, a head that says what a pixel is and one that says how far away it is.

It stands in a file of its own, so that a clean process can build it again from its class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


class SceneNet(nn.Module):
    """Images (b, 3, h, w) to ``segmentation`` (b, classes, h, w) and ``depth`` (b, 1, h, w)."""

    def __init__(self, classes: int = 40, width: int = 16) -> None:
        super().__init__()
        self.stem, self.down = conv(3, width), conv(width, 2 * width, 2)
        self.block = conv(2 * width, 2 * width)
        self.segmentation = nn.Sequential(conv(3 * width, width), nn.Conv2d(width, classes, 1))
        self.depth = nn.Sequential(conv(3 * width, width), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stem(x)
        coarse = self.down(fine)
        coarse = functional.interpolate(coarse + self.block(coarse), scale_factor=2.0)
        shared = torch.cat([fine, coarse], 1)
        return {"segmentation": self.segmentation(shared), "depth": self.depth(shared)}
