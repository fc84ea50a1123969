"""Takes half of the FLOPs out of a network that stays yours: its data, loop and measures are functions of this file.

A job (`compress.Job`) says how the network is measured while it is decided what goes (`calibrate`), how it is measured
at the end (`evaluate`), and how it is trained again (`train`). Everything else is done around them: which channels
belong together, how many of them go, the stages of the run, ONNX with its check, the card. The data are scikit-learn's
digits (`pip install scikit-learn`); there are two tasks, one of which is better where it is lower.

    python examples/digits_job.py [OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import compress

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
LABELS = torch.tensor(DIGITS.target)
INK = IMAGES.mean((1, 2, 3))  # the second task: how much of the square is black
ORDER = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0))
TRAIN, HELD_OUT, TEST = ORDER.split((1000, 300, 497))


class Digits(nn.Module):
    """A small trunk with two heads; any module will do, and any outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.digit, self.ink = nn.Linear(64, 10), nn.Linear(64, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.trunk(images).mean((2, 3))
        return self.digit(seen), self.ink(seen)[:, 0]


def measure(network: nn.Module, at: Tensor) -> dict[str, float]:
    with torch.no_grad():
        digit, ink = network(IMAGES[at])
    return {
        "accuracy": float((digit.argmax(1) == LABELS[at]).float().mean()),
        "ink error": float((ink - INK[at]).abs().mean()),
    }


def calibrate(network: nn.Module) -> dict[str, float]:
    return measure(network, HELD_OUT)


def evaluate(network: nn.Module) -> dict[str, float]:
    return measure(network, TEST)


def loss(network: nn.Module, at: Tensor) -> dict[str, Tensor]:
    digit, ink = network(IMAGES[at])
    return {"accuracy": functional.cross_entropy(digit, LABELS[at]), "ink error": (ink - INK[at]).abs().mean()}


def batches() -> tuple[Tensor, ...]:
    return TRAIN[:256].split(64)


def train(network: nn.Module, epochs: int, seed: int = 0) -> None:
    """A loop of your own: nothing of compress is in it."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(epochs):
        for at in TRAIN[torch.randperm(len(TRAIN))].split(64):
            found = loss(network, at)
            optimizer.zero_grad()
            (found["accuracy"] + 10 * found["ink error"]).backward()
            optimizer.step()


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/digits")
    torch.manual_seed(0)
    network = Digits()
    train(network, epochs=8)
    job = compress.Job(
        network=network.eval(),
        example=IMAGES[HELD_OUT[:8]],
        calibrate=calibrate,
        evaluate=evaluate,
        better={"accuracy": "higher", "ink error": "lower"},
        train=train,
        loss=loss,
        batches=batches,
    )
    result = compress.prune(
        job,
        "pagcp",
        out,
        network=f"{__file__}:Digits",  # builds the network again in a clean process
        finetune={"epochs": 6, "warmup_epochs": 0},
        pagcp={"flops": 0.5, "rounds": 1, "between": 0},
        bench=None,  # latency takes a minute to measure well
    )
    flops = result.report["size"]["flops"]
    print(f"FLOPs {flops['dense']:,} -> {flops['pruned']:,}")
    for row in result.report["quality"]["tasks"]:
        print(f"{row['task']}: {row['dense']:.4f} -> {row['pruned']:.4f}")
    print(f"{type(result.model).__name__} with {sum(p.numel() for p in result.model.parameters()):,} parameters")
