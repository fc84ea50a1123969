"""Wide residual networks (Zagoruyko & Komodakis 2016): pre-activation blocks, WRN-28-8 and WRN-22-8."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from compress.models.zoo.resnet32 import initialise


class Block(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice; a 1x1 shortcut from the activated input where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.project: nn.Module | None = None
        if stride != 1 or inside != outside:
            self.project = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(x))
        shortcut = x if self.project is None else self.project(y)
        out: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(y)))) + shortcut
        return out


class WideResNet(nn.Module):
    """Images (b, channels, h, w) -> logits (b, classes)."""

    def __init__(self, depth: int, widen: int, classes: int, channels: int) -> None:
        super().__init__()
        if depth % 6 != 4 or depth < 10:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28 ...), not {depth}")
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        inside = 16
        for stage in range(3):
            for i in range((depth - 4) // 6):
                outside = (16 * widen) << stage
                blocks.append(Block(inside, outside, 2 if stage and not i else 1))
                inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inside)
        self.classifier = nn.Linear(inside, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.blocks(self.stem(x))))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def wrn(depth: int = 28, widen: int = 8, classes: int = 10, channels: int = 3) -> WideResNet:
    """WRN-``depth``-``widen``; WRN-28-8 has 23.4 M parameters, WRN-22-8 17.2 M."""
    return WideResNet(depth, widen, classes, channels)
