"""A small one-stage detector after YOLOv8's plan: C2f blocks, a neck that looks up and down again, a head a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.data.boxes import cells_of, decode
from compress.models.zoo.resnet32 import initialise

PRIOR = -4.0  # logit of an object in a cell of an untrained head: few cells hold one


class Unit(nn.Sequential):
    """Convolution, norm, SiLU."""

    def __init__(self, inside: int, outside: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside), nn.SiLU()
        )


class Bottleneck(nn.Module):
    """Two 3x3 units, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Unit(width, width), Unit(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.two(self.one(x))
        return y


class C2f(nn.Module):
    """A 1x1 unit cut in two; the second half goes through bottlenecks, and all that came by is joined again."""

    def __init__(self, inside: int, outside: int, blocks: int) -> None:
        super().__init__()
        half = outside // 2
        self.enter, self.leave = Unit(inside, outside, 1), Unit(half * (2 + blocks), outside, 1)
        self.blocks = nn.ModuleList([Bottleneck(half) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        y: Tensor = self.leave(torch.cat(parts, 1))
        return y


class Head(nn.Module):
    """(b, inside, h, w) -> (b, 5 + classes, h w), boxes not decoded; where and what have a branch each."""

    def __init__(self, inside: int, width: int, classes: int) -> None:
        super().__init__()
        self.where, self.what = Unit(inside, width), Unit(inside, width)
        self.box, self.object = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 1, 1)
        self.label = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        where = self.where(x)
        return torch.cat([self.box(where), self.object(where), self.label(self.what(x))], 1).flatten(2)


class Detector(nn.Module):
    """Square images (b, channels, s, s) -> {"boxes": (b, 5 + classes, cells)} as `compress.data.boxes` has it.

    Grids have strides 8 and 16.
    """

    def __init__(self, widths: Sequence[int], blocks: int, classes: int, channels: int) -> None:
        super().__init__()
        if len(widths) != 4 or any(w % 2 for w in widths):
            raise ValueError(f"four even widths are needed (strides 2, 4, 8 and 16), not {list(widths)}")
        a, b, c, d = widths
        self.stem = Unit(channels, a, 3, 2)
        self.stage4 = nn.Sequential(Unit(a, b, 3, 2), C2f(b, b, blocks))
        self.stage8 = nn.Sequential(Unit(b, c, 3, 2), C2f(c, c, blocks))
        self.stage16 = nn.Sequential(Unit(c, d, 3, 2), C2f(d, d, blocks))
        self.up = C2f(c + d, c, blocks)
        self.down, self.join = Unit(c, c, 3, 2), C2f(c + d, d, blocks)
        self.fine, self.coarse = Head(c, c, classes), Head(d, c, classes)
        initialise(self)
        for head in (self.fine, self.coarse):
            nn.init.constant_(head.object.bias, PRIOR)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y8 = self.stage8(self.stage4(self.stem(x)))
        y16 = self.stage16(y8)
        fine = self.up(torch.cat([functional.interpolate(y16, scale_factor=2.0, mode="nearest"), y8], 1))
        coarse = self.join(torch.cat([self.down(fine), y16], 1))
        centres, widths = cells_of([fine.shape[-1], coarse.shape[-1]], x.device)
        raw = torch.cat([self.fine(fine), self.coarse(coarse)], 2)
        place = decode(raw[:, :4], centres.to(raw.dtype), widths.to(raw.dtype))
        return {"boxes": torch.cat([place, raw[:, 4:]], 1)}


def detector(
    widths: Sequence[int] = (16, 32, 64, 128), blocks: int = 1, classes: int = 9, channels: int = 3
) -> Detector:
    """A detector of ``classes``; the input's side is a multiple of 16."""
    return Detector(widths, blocks, classes, channels)
