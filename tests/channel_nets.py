"""Small networks whose channels are tied in every way that channel groups must understand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(inside: int, outside: int, kernel: int = 3, **more: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False, **more), nn.BatchNorm2d(outside), nn.SiLU()
    )


class C2f(nn.Module):
    """YOLOv8's block: one convolution's output is chunked, one half goes through bottlenecks, all is concatenated."""

    def __init__(self, inside: int = 3, width: int = 16, count: int = 2, sizes: bool = False) -> None:
        super().__init__()
        self.width, self.sizes = width, sizes
        self.first = conv(inside, 2 * width, 1)
        self.inner = nn.ModuleList([nn.Sequential(conv(width, width), conv(width, width)) for _ in range(count)])
        self.last = conv((2 + count) * width, 32, 1)
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        # `split` has the sizes written into it, and cannot follow when channels go.
        parts = list(y.split((self.width, self.width), 1) if self.sizes else y.chunk(2, 1))
        for block in self.inner:
            parts.append(parts[-1] + block(parts[-1]))
        out: Tensor = self.head(self.last(torch.cat(parts, 1)))
        return out


class Grouped(nn.Module):
    """A grouped convolution between two plain ones, and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.last = conv(3, 32), conv(32, 32, groups=4), conv(32, 16)
        self.down, self.up = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.first(x))
        y = y * torch.sigmoid(self.up(functional.relu(self.down(y.mean((2, 3), keepdim=True)))))
        out: Tensor = self.head(self.last(y).mean((2, 3)))
        return out


class Transposed(nn.Module):
    """An encoder and a decoder with transposed convolutions and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv(3, 16), conv(16, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.norm = nn.BatchNorm2d(16)
        self.out = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        out: Tensor = self.out(torch.cat([a, functional.relu(self.norm(self.up(b)))], 1))
        return out


class Flattened(nn.Module):
    """Convolutions, then a linear layer on the flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 16), conv(16, 16)
        self.hidden, self.head = nn.Linear(16 * 16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.adaptive_avg_pool2d(self.second(self.first(x)), 4)
        out: Tensor = self.head(functional.relu(self.hidden(y.flatten(1))))
        return out


@dataclass
class Outputs:
    shape: Tensor
    matte: Tensor
    nothing: Tensor | None = None


class Heads(nn.Module):
    """A shared trunk with residual sums and two heads; returns them as a dict, list, tuple or dataclass."""

    def __init__(self, form: str = "dict", width: int = 16) -> None:
        super().__init__()
        self.form = form
        self.stem, self.block, self.deep = conv(3, width), conv(width, width), conv(width, 2 * width)
        self.classes = nn.Linear(2 * width, 3)
        self.side, self.pixels = nn.Conv2d(width, width, 1), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> object:
        y = self.stem(x)
        y = y + self.block(y)
        shape = self.classes(self.deep(y).mean((2, 3)))
        matte = self.pixels(functional.relu(self.side(y)))
        if self.form == "dataclass":
            return Outputs(shape, matte)
        if self.form == "dict":
            return {"shape": shape, "matte": matte}
        return [shape, matte] if self.form == "list" else (shape, matte)


class Shuffled(nn.Module):
    """ShuffleNet's channel shuffle: a reshape that the tracer does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 16), conv(16, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        b, c, h, w = y.shape
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        out: Tensor = self.head(self.second(y))
        return out


class LayerNormed(nn.Module):
    """A norm over all channels: taking some away changes what the others become."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.GroupNorm(1, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.first(x)))
        return out


class Detached(nn.Module):
    """Nothing leads from its outputs back to its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).detach()
