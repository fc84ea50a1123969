"""A network of timm as a job: trained on emoji by a plain loop, pruned, measured. In an environment with timm.

    PYTHONPATH=. python tools/timm_job.py train --network mobilenetv4_conv_small --out runs/timm
    TIMM_JOB=runs/timm PYTHONPATH=. python -m compress prune tools/timm_job.py:job -r pagcp --out runs/timm-50

The second command is an ordinary run, of any recipe and settings; `docs/measured/jobs.md` has what came out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import compress
from compress.data.images import Split, load
from compress.schema.sections import DataSpec

PLACE = Path(os.environ.get("TIMM_JOB", "runs/timm"))
DATA = load(DataSpec(package="emoji"))
CLASSES = len(DATA.tasks[0].classes)
SIDE = 64  # pixels: the emoji of 32 twice as large, as networks of timm have a stride of 32


def prepared(split: Split) -> tuple[Tensor, Tensor]:
    x = DATA.prepare(split.inputs[torch.arange(len(split))])
    return functional.interpolate(x, (SIDE, SIDE), mode="bilinear"), split.targets["category"]


SPLITS = {"train": prepared(DATA.train), "calibration": prepared(DATA.calibration), "test": prepared(DATA.test)}
BATCH, LOOKED_AT = 64, 192


def made(name: str) -> nn.Module:
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return network


def network() -> nn.Module:
    found = made(json.loads((PLACE / "network.json").read_text("utf-8")))
    found.load_state_dict(load_file(PLACE / "model.safetensors"))
    return found


def measured(model: nn.Module, split: str) -> dict[str, float]:
    x, labels = (part[:LOOKED_AT] if split == "calibration" else part for part in SPLITS[split])
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(256)])
    return {"accuracy": float((logits.argmax(1) == labels).float().mean())} | {
        "cross-entropy": float(functional.cross_entropy(logits, labels))
    }


def calibrate(model: nn.Module) -> dict[str, float]:
    return measured(model, "calibration")


def evaluate(model: nn.Module) -> dict[str, float]:
    return measured(model, "test")


def loss(model: nn.Module, at: Tensor) -> Tensor:
    x, labels = SPLITS["train"]
    return functional.cross_entropy(model(x[at]), labels[at])


def batches() -> tuple[Tensor, ...]:
    return torch.arange(128).split(BATCH)


def train(model: nn.Module, epochs: int, seed: int = 0, rate: float = 1e-3) -> None:
    torch.manual_seed(seed)
    x, labels = SPLITS["train"]
    steps = epochs * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for at in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            images = x[at]
            images = torch.roll(images, (int(torch.randint(-3, 4, ())), int(torch.randint(-3, 4, ()))), (2, 3))
            value = functional.cross_entropy(model(images), labels[at], label_smoothing=0.1)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()


job = compress.Job(
    network=network,
    example=SPLITS["calibration"][0][:16],
    calibrate=calibrate,
    evaluate=evaluate,
    better={"accuracy": "higher", "cross-entropy": "lower"},
    train=train,
    loss=loss,
    batches=batches,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("--network", default="mobilenetv4_conv_small")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=PLACE)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = made(asked.network)
    train(model, asked.epochs)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "network.json").write_text(json.dumps(asked.network), encoding="utf-8")
    save_file(model.state_dict(), asked.out / "model.safetensors")
    print(measured(model.eval(), "test"))


if __name__ == "__main__":
    main()
