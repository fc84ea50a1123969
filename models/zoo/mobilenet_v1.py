"""MobileNet (Howard et al. 2017): a 3x3 convolution, then 13 pairs of depthwise and pointwise convolutions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from compress.models.zoo.resnet32 import initialise

Stem = Literal["imagenet", "cifar"]
# (output channels, stride) of the 13 pairs.
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def convolution(inside: int, outside: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]


class MobileNetV1(nn.Module):
    """Images (b, channels, h, w) -> logits (b, classes)."""

    def __init__(self, classes: int, width: float, channels: int, stem: Stem) -> None:
        super().__init__()

        def scaled(count: int) -> int:
            return max(8, int(count * width))

        inside = scaled(32)
        layers = [*convolution(channels, inside, 3, 2 if stem == "imagenet" else 1), nn.ReLU(inplace=True)]
        for i, (count, stride) in enumerate(PAIRS):
            outside = scaled(count)
            # Images of 32x32 keep their size for as long as ImageNet's do after the stem: two strides fewer.
            step = 1 if stem == "cifar" and i < 2 else stride
            layers += [*convolution(inside, inside, 3, step, groups=inside), nn.ReLU(inplace=True)]
            layers += [*convolution(inside, outside, 1, 1), nn.ReLU(inplace=True)]
            inside = outside
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inside, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def mobilenet_v1(classes: int = 1000, width: float = 1.0, channels: int = 3, stem: Stem = "imagenet") -> MobileNetV1:
    """MobileNet-V1; 4.2 M parameters on ImageNet. ``stem="cifar"`` is for images of 32x32."""
    return MobileNetV1(classes, width, channels, stem)
