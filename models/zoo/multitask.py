"""One trunk and a head for each task: a ResNet or MobileNet-V2 trunk, a decoder for pixels, the pooled end for labels.

The decoder is a feature pyramid (Lin et al. 2017): every stage comes to one width by a 1x1 convolution and is added to
the scaled-up coarser one. Or the stages are joined side by side, all scaled up at once, as SegFormer's decoder (Xie et
al. 2021) has it. A head's outputs have the size of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.models.zoo.mobilenet_v2 import Bottleneck
from compress.models.zoo.resnet32 import Block, initialise

Sizes = Mapping[str, int]


class Stem(nn.Sequential):
    """3x3 convolution with stride 2, norm, ReLU; with ``fine`` another at full size before it."""

    def __init__(self, channels: int, width: int, fine: bool) -> None:
        layers: list[nn.Module] = []
        for stride in (1, 2) if fine else (2,):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*layers)


class Trunk(nn.Module):
    """Images (b, channels, h, w) -> one tensor a stage, the i-th (b, widths[i], h / 2**(i+1), w / 2**(i+1))."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stem, self.stages = stem, nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


def resnet_trunk(widths: Sequence[int], blocks: Sequence[int], channels: int, fine: bool) -> Trunk:
    """Basic blocks; every stage but the first halves the size."""
    stages: list[nn.Module] = []
    inside = widths[0]
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        layers: list[nn.Module] = []
        for j in range(count):
            layers.append(Block(inside, width, 2 if i and not j else 1, "conv"))
            inside = width
        stages.append(nn.Sequential(*layers))
    return Trunk(Stem(channels, widths[0], fine), stages)


def mobilenet_trunk(widths: Sequence[int], blocks: Sequence[int], channels: int, fine: bool, expansion: int) -> Trunk:
    """Inverted residuals (Sandler et al. 2018); every stage but the first halves the size."""
    stages: list[nn.Module] = []
    inside = widths[0]
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        layers: list[nn.Module] = []
        for j in range(count):
            layers.append(Bottleneck(inside, width, expansion, 2 if i and not j else 1))
            inside = width
        stages.append(nn.Sequential(*layers))
    return Trunk(Stem(channels, widths[0], fine), stages)


class Pyramid(nn.Module):
    """The trunk's stages -> one tensor (b, width, h / 2, w / 2)."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.sides = nn.ModuleList([nn.Conv2d(w, width, 1) for w in widths])
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, stages: list[Tensor]) -> Tensor:
        x: Tensor = self.sides[-1](stages[-1])
        for side, stage in zip(reversed(self.sides[:-1]), reversed(stages[:-1]), strict=True):
            x = side(stage) + functional.interpolate(x, stage.shape[-2:], mode="nearest")
        y: Tensor = self.smooth(x)
        return y


class Joined(nn.Module):
    """The trunk's stages -> one tensor (b, width, h / 2, w / 2), made of all of them by one 1x1 convolution."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.sides = nn.ModuleList([nn.Conv2d(w, width, 1) for w in widths])
        self.fuse = nn.Sequential(
            nn.Conv2d(width * len(widths), width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, stages: list[Tensor]) -> Tensor:
        size = stages[0].shape[-2:]
        parts = [
            functional.interpolate(side(stage), size, mode="bilinear", align_corners=False)
            for side, stage in zip(self.sides, stages, strict=True)
        ]
        y: Tensor = self.fuse(torch.cat(parts, 1))
        return y


DECODERS = {"pyramid": Pyramid, "joined": Joined}


class PixelHead(nn.Module):
    """(b, inside, h / 2, w / 2) -> (b, outputs, h, w)."""

    def __init__(self, inside: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, inside, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(inside)
        self.out = nn.Conv2d(inside, outputs, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        y = self.out(functional.relu(self.bn(self.conv(x))))
        return functional.interpolate(y, size, mode="bilinear", align_corners=False)


class LabelHead(nn.Module):
    """(b, inside, h, w) -> (b, outputs), from the mean over pixels through one hidden layer."""

    def __init__(self, inside: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(inside, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(functional.relu(self.hidden(x.mean((2, 3)))))
        return y


class Multitask(nn.Module):
    """Images (b, channels, h, w) -> {task: (b, outputs, h, w)} of pixels, {task: (b, outputs)} of labels."""

    def __init__(
        self, trunk: Trunk, widths: Sequence[int], decoder: int, how: str, hidden: int, pixels: Sizes, labels: Sizes
    ) -> None:
        super().__init__()
        if how not in DECODERS:
            raise ValueError(f"how stages are put together: {' or '.join(DECODERS)}, not {how!r}")
        twice = sorted(set(pixels) & set(labels))
        if twice or (not pixels and not labels):
            raise ValueError(f"{twice[0]!r} is among pixels and labels" if twice else "it has no head")
        self.trunk = trunk
        self.pyramid = DECODERS[how](widths, decoder) if pixels else None
        self.pixels = nn.ModuleDict({name: PixelHead(decoder, count) for name, count in pixels.items()})
        self.labels = nn.ModuleDict({name: LabelHead(widths[-1], hidden, count) for name, count in labels.items()})
        initialise(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stages = self.trunk(x)
        found = {name: head(stages[-1]) for name, head in self.labels.items()}
        if self.pyramid is not None:
            y = self.pyramid(stages)
            size = (x.shape[-2], x.shape[-1])
            found |= {name: head(y, size) for name, head in self.pixels.items()}
        return found


def _checked(widths: Sequence[int], blocks: Sequence[int]) -> None:
    if len(widths) != len(blocks) or not widths:
        raise ValueError(f"{len(widths)} widths and {len(blocks)} numbers of blocks: give one of each a stage")


def multitask_resnet(
    widths: Sequence[int] = (32, 64, 128, 256),
    blocks: Sequence[int] = (2, 2, 2, 2),
    decoder: int = 64,
    how: str = "pyramid",
    hidden: int = 128,
    channels: int = 3,
    fine: bool = False,
    pixels: Sizes = {},  # noqa: B006 (never changed)
    labels: Sizes = {},  # noqa: B006
) -> Multitask:
    """A ResNet trunk with heads.

    Args:
        pixels, labels: heads by task, with their number of outputs.
        decoder: channels in which all stages come together for pixels.
        how: ``pyramid`` or ``joined``.
        fine: the stem looks at the full size first.
    """
    _checked(widths, blocks)
    return Multitask(resnet_trunk(widths, blocks, channels, fine), widths, decoder, how, hidden, pixels, labels)


def multitask_mobilenet(
    widths: Sequence[int] = (16, 32, 64, 128),
    blocks: Sequence[int] = (1, 2, 3, 2),
    expansion: int = 6,
    decoder: int = 64,
    how: str = "pyramid",
    hidden: int = 128,
    channels: int = 3,
    fine: bool = False,
    pixels: Sizes = {},  # noqa: B006 (never changed)
    labels: Sizes = {},  # noqa: B006
) -> Multitask:
    """A MobileNet-V2 trunk with heads, see `multitask_resnet`."""
    _checked(widths, blocks)
    return Multitask(
        mobilenet_trunk(widths, blocks, channels, fine, expansion), widths, decoder, how, hidden, pixels, labels
    )
