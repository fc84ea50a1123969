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
    """ShuffleNet's channel shuffle: channels viewed as a grid, and the grid turned."""

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

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.GroupNorm(groups, 16), nn.Conv2d(16, 2, 1)

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


class LayerScaled(nn.Module):
    """ConvNeXt's block: depthwise, a norm over channels, two linear layers, GRN between them, a factor a channel."""

    def __init__(self, response: bool = True) -> None:
        super().__init__()
        self.stem, self.depthwise, self.norm = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16), LastNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)
        self.response = Response(32) if response else nn.Identity()
        self.gamma = nn.Parameter(torch.full((16,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
        y = self.gamma * self.down(self.response(functional.gelu(self.up(y))))
        out: Tensor = self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))
        return out


class LastNorm(nn.LayerNorm):
    """Over the channels of (b, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Response(nn.Module):
    """Global response normalisation of (b, h, w, c): each channel's norm beside the mean of all channels' norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.weight * (x * (whole / (whole.mean(-1, keepdim=True) + 1e-6))) + self.bias + x


class Frozen(nn.Module):
    """Detection backbones' batch norm, whose four vectors are buffers, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 2, 1)
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((16,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()  # type: ignore[operator]
        shift = self.bias - self.running_mean * scale  # type: ignore[operator]
        out: Tensor = self.head(functional.relu(self.first(x) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)))
        return out


class Fused(nn.Module):
    """BiFPN: one learned number for each of the branches that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 3, 1, 1), nn.Parameter(torch.ones(2))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = functional.relu(self.w)
        w = w / (w.sum() + 1e-4)
        out: Tensor = self.head(functional.relu(w[0] * self.a(x) + w[1] * self.b(x)))
        return out


class Upscaled(nn.Module):
    """Sub-pixel upsampling: four channels become one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(functional.pixel_shuffle(functional.relu(self.first(x)), 2))
        return out


class SplitAttention(nn.Module):
    """ResNeSt: two splits of a grouped convolution, weighed channel by channel by a softmax over the splits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.split = conv(3, 16), conv(16, 32, groups=2)
        self.down, self.up, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.split(self.first(x))
        b, c, h, w = y.shape
        parts = y.reshape(b, 2, c // 2, h, w)
        gate = self.up(functional.relu(self.down(parts.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(b, 1, 2, -1).transpose(1, 2).softmax(1).reshape(b, 2, c // 2, 1, 1)
        out: Tensor = self.head((parts * gate).sum(1))
        return out


class Attention(nn.Module):
    """A transformer's block on the pixels of an image, with a table of one number a head and place.

    ``how``: "fused" as timm writes it, "apart" with a free number of heads as transformers does, "pixels" as YOLO11's,
    whose values go through a depthwise convolution too.
    """

    def __init__(self, how: str = "fused", heads: int = 4, width: int = 32) -> None:
        super().__init__()
        self.how, self.heads, self.each = how, heads, width // heads
        self.stem, self.norm, self.last = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width), nn.LayerNorm(width)
        self.table, self.place = nn.Parameter(torch.randn(49, heads)), nn.Parameter(torch.randn(1, 16, width))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + 3
        self.register_buffer("index", apart[0] * 7 + apart[1])
        if how == "apart":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        elif how == "pixels":
            self.keys = self.each // 2
            self.qkv = nn.Conv2d(width, width + 2 * self.keys * heads, 1)
            self.spread = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Conv2d(width, width, 1) if how == "pixels" else nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 64), nn.Linear(64, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        h, w = y.shape[2:]
        y = y.flatten(2).transpose(1, 2) + self.place
        y = y + self.mixed(self.norm(y), h, w)
        y = y + self.down(functional.gelu(self.up(self.last(y))))
        out: Tensor = self.head(y.mean(1))
        return out

    def mixed(self, y: Tensor, h: int, w: int) -> Tensor:
        b, n, _ = y.shape
        bias = self.table[self.index].permute(2, 0, 1)  # type: ignore[index]
        if self.how == "pixels":
            z = self.qkv(y.transpose(1, 2).reshape(b, -1, h, w))
            z = z.view(b, self.heads, 2 * self.keys + self.each, n)
            q, k, v = z.split([self.keys, self.keys, self.each], 2)
            a = (q.transpose(-2, -1) @ k * self.keys**-0.5 + bias).softmax(-1)
            z = (v @ a.transpose(-2, -1)).reshape(b, -1, h, w) + self.spread(v.reshape(b, -1, h, w))
            out: Tensor = self.project(z).flatten(2).transpose(1, 2)
            return out
        if self.how == "apart":
            q, k, v = (f(y).view(b, n, -1, self.each).transpose(1, 2) for f in (self.q, self.k, self.v))
        else:
            q, k, v = self.qkv(y).reshape(b, n, 3, self.heads, self.each).permute(2, 0, 3, 1, 4).unbind(0)
        z = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.each**-0.5)
        out = self.project(z.transpose(1, 2).reshape(b, n, -1))
        return out


class Activated(nn.Module):
    """Activations, in place where they can be, behind a convolution each."""

    def __init__(self) -> None:
        super().__init__()
        ways = [nn.Hardswish(True), nn.Mish(True), nn.ReLU6(True), nn.SiLU(True)]
        layers = [(nn.Conv2d(16, 16, 3, padding=1), way) for way in ways]
        self.first = nn.Conv2d(3, 16, 3, 2)
        self.body = nn.Sequential(*(module for pair in layers for module in pair))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.first(x)).mean((2, 3)))
        return out


class Registers(nn.Module):
    """Tokens beside those of the image: one of a class, and ``count`` more, of which there may be none."""

    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 4, 4)
        self.token, self.more = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.empty(1, count, 16))
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(y), -1, -1), self.more.expand(len(y), -1, -1), y], 1)
        y = y + functional.relu(self.mix(y))
        out: Tensor = self.head(y[:, 0] + y[:, 1:].mean(1))
        return out


class Unknown(nn.Module):
    """An operation that is not followed, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 16), nn.Linear(16, 2)
        self.register_buffer("places", torch.randn(16, 16).double())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).mean((2, 3))
        y = self.second(torch.cdist(y, self.places.to(y.dtype)))  # type: ignore[operator]
        out: Tensor = self.head(functional.relu(y))
        return out
