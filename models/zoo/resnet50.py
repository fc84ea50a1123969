"""ResNet-50 as transformers builds it (`microsoft/resnet-50` on the hub), giving logits as every network here does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ResNet50(nn.Module):
    """Images (b, 3, h, w) -> logits (b, classes). Its weights have the names they have in the hub's file."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        config: Any = ResNetConfig  # its keywords are made at run time
        whole: Any = ResNetForImageClassification(config(num_labels=classes))
        self.resnet, self.classifier = whole.resnet, whole.classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.resnet(x).pooler_output)
        return logits


def resnet50(classes: int = 1000) -> ResNet50:
    """ResNet-50 with random weights; 25.6 M parameters on ImageNet."""
    return ResNet50(classes)
