"""FastGRNN (Kusupati et al. 2018): a gated cell whose two matrices serve gate and candidate alike, each of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Factors(nn.Module):
    """A matrix of rank r as two factors: x -> left(right(x)), ``left`` (out, r), ``right`` (r, in)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.right = nn.Linear(inputs, rank, bias=False)
        self.left = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(self.right(x))
        return y


class FastGRNN(nn.Module):
    """Signals (b, channels, steps) -> logits (b, classes), from the state after the last step.

    With s = W x + U h: z = sigmoid(s + b_z), c = tanh(s + b_h), h = (zeta (1 - z) + nu) c + z h.
    """

    def __init__(self, channels: int, hidden: int, classes: int, r_W: int, r_U: int) -> None:
        super().__init__()
        self.channels, self.hidden = channels, hidden
        self.W = Factors(channels, hidden, r_W)
        self.U = Factors(hidden, hidden, r_U)
        self.b_z = nn.Parameter(torch.ones(hidden))
        self.b_h = nn.Parameter(torch.ones(hidden))
        # zeta and nu are sigmoids of these, so they stay between 0 and 1.
        self.zeta = nn.Parameter(torch.ones(1))
        self.nu = nn.Parameter(torch.full((1,), -4.0))
        self.classifier = nn.Linear(hidden, classes)

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_W, r_U)."""
        return self.W.left.in_features, self.U.left.in_features

    def forward(self, x: Tensor) -> Tensor:
        driven = self.W(x.transpose(1, 2))  # (b, steps, hidden)
        zeta, nu = torch.sigmoid(self.zeta), torch.sigmoid(self.nu)
        h = x.new_zeros(x.shape[0], self.hidden)
        for step in range(x.shape[2]):
            s = driven[:, step] + self.U(h)
            z = torch.sigmoid(s + self.b_z)
            h = (zeta * (1 - z) + nu) * torch.tanh(s + self.b_h) + z * h
        logits: Tensor = self.classifier(h)
        return logits


def fastgrnn(channels: int = 9, hidden: int = 80, classes: int = 2, r_W: int = 9, r_U: int = 80) -> FastGRNN:
    """FastGRNN with the ranks the paper gives as r_W / r_U; 9 channels and 80 units are HAR-2's."""
    return FastGRNN(channels, hidden, classes, r_W, r_U)
