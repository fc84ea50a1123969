"""Residual networks for small images (He et al. 2015, section 4.2): ResNet-20, -32, -56 and any 6n + 2."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

Shortcut = Literal["pad", "conv"]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Where the shape changes the shortcut is the paper's option A (every second pixel, new channels zero: no parameter)
    or option B (a 1x1 convolution).
    """

    def __init__(self, inside: int, outside: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.extra = stride, outside - inside
        changes = stride != 1 or inside != outside
        self.project: nn.Module | None = None
        if changes and shortcut == "conv":
            self.project = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.project is not None:
            x = self.project(x)
        elif self.stride != 1 or self.extra:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """Images (b, channels, h, w) -> logits (b, classes)."""

    def __init__(self, depth: int, classes: int, width: int, channels: int, shortcut: Shortcut) -> None:
        super().__init__()
        if depth % 6 != 2 or depth < 8:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32 ...), not {depth}")
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        inside = width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                outside = width << stage
                blocks.append(Block(inside, outside, 2 if stage and not i else 1, shortcut))
                inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inside, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.bn(self.stem(x))))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def initialise(model: nn.Module) -> None:
    """He initialisation (fan out) of every convolution; norms and the classifier as torch makes them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def resnet(
    depth: int = 32, classes: int = 10, width: int = 16, channels: int = 3, shortcut: Shortcut = "pad"
) -> ResNet:
    """ResNet-``depth``; 464,154 parameters at depth 32 with 10 classes."""
    return ResNet(depth, classes, width, channels, shortcut)
