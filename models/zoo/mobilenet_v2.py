"""MobileNet-V2 (Sandler et al. 2018): inverted residuals with linear bottlenecks."""

from __future__ import annotations

from torch import Tensor, nn

from compress.models.zoo.mobilenet_v1 import Stem, convolution
from compress.models.zoo.resnet32 import initialise

# (expansion, output channels, blocks, stride of the first): table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class Bottleneck(nn.Module):
    """Expand (1x1), filter (3x3 depthwise), project (1x1, no activation); added to its input where shapes agree."""

    def __init__(self, inside: int, outside: int, expansion: int, stride: int) -> None:
        super().__init__()
        middle = inside * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*convolution(inside, middle, 1, 1), nn.ReLU6(inplace=True)]
        layers += [*convolution(middle, middle, 3, stride, groups=middle), nn.ReLU6(inplace=True)]
        layers += convolution(middle, outside, 1, 1)
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Images (b, channels, h, w) -> logits (b, classes)."""

    def __init__(self, classes: int, width: float, channels: int, stem: Stem, dropout: float) -> None:
        super().__init__()
        small = stem == "cifar"
        inside = _multiple_of_8(32 * width)
        layers = [*convolution(channels, inside, 3, 1 if small else 2), nn.ReLU6(inplace=True)]
        for stage, (expansion, count, blocks, stride) in enumerate(STAGES):
            outside = _multiple_of_8(count * width)
            # Images of 32x32: neither the stem nor the second stage halves them.
            first = 1 if small and stage == 1 else stride
            for i in range(blocks):
                layers.append(Bottleneck(inside, outside, expansion, first if i == 0 else 1))
                inside = outside
        last = _multiple_of_8(1280 * max(1.0, width))
        layers += [*convolution(inside, last, 1, 1), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(last, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(self.features(x).mean((2, 3))))
        return logits


def _multiple_of_8(count: float) -> int:
    """The nearest multiple of 8, never more than 10 % below ``count``."""
    nearest = max(8, int(count + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * count else nearest


def mobilenet_v2(
    classes: int = 1000, width: float = 1.0, channels: int = 3, stem: Stem = "imagenet", dropout: float = 0.2
) -> MobileNetV2:
    """MobileNet-V2; 3.5 M parameters on ImageNet. ``stem="cifar"`` is for images of 32x32."""
    return MobileNetV2(classes, width, channels, stem, dropout)
