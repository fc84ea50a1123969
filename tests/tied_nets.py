"""Small networks with one weight in several places, and with weights in layers that no method here prunes.

Imports torch alone: its text is also written out as the file of a user's own network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Twins(nn.Module):
    """Two of four convolutions are tied: ``how`` says in which way."""

    def __init__(self, classes: int = 3, how: str = "parameter") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.a, self.b = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.c, self.head = nn.Conv2d(16, 24, 3, 1, 1), nn.Linear(24, classes)
        if how == "parameter":
            self.b.weight = self.a.weight
        elif how == "memory":
            self.b.weight.data = self.a.weight.data
        elif how == "transpose":
            self.b.weight.data = self.a.weight.data.transpose(0, 1)
        elif how == "bias":
            self.b.bias = self.a.bias
        elif how == "module":
            self.b = self.a
        elif how == "bare":
            self.own = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.a(functional.relu(self.stem(x))))
        y = functional.relu(self.c(functional.relu(self.b(y))))
        out: Tensor = self.head(y.mean((2, 3)))
        return out


class Words(nn.Module):
    """An embedding whose weight is the last layer's, as language models tie them; images are its words."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(16, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.out, self.head = nn.Linear(8, 16, bias=False), nn.Linear(16, classes)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        at = ((x.mean(1).flatten(1) + 2) * 4).clamp(0, 15).long()
        out: Tensor = self.head(self.out(functional.relu(self.mix(self.words(at).transpose(1, 2))).mean(2)))
        return out


class Mixed(nn.Module):
    """Of everything that is no convolution and no linear layer one: what is left out is to be named."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, 1, 1)
        self.place = nn.Parameter(torch.zeros(12, 8))
        self.gru, self.cell = nn.GRU(8, 8, 2, batch_first=True, bidirectional=True), nn.LSTMCell(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=16, vdim=16)
        self.pair, self.head = nn.Bilinear(8, 8, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.c(x)).mean(2).transpose(1, 2) + self.place
        z, _ = self.gru(y)
        h, _ = self.cell(z[:, -1])
        y, _ = self.attention(y, z, value=z)
        out: Tensor = self.head(self.pair(h, y.mean(1)))
        return out


def twins(classes: int = 3, how: str = "parameter") -> nn.Module:
    return Twins(classes, how)


def words(classes: int = 3) -> nn.Module:
    return Words(classes)


def mixed(classes: int = 3) -> nn.Module:
    return Mixed(classes)
