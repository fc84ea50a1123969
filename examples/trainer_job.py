"""A transformers model and transformers' own Trainer as a job: half of a ResNet's FLOPs go.

The network is called with words (`pixel_values=...`), so the example is a dict; what it gives is transformers' output,
of which the logits are exported. `train` hands the module that it is given to a `Trainer`, with whatever
`TrainingArguments` you have; `calibrate` and `evaluate` are `Trainer.evaluate` with a metric of yours. The data are
scikit-learn's digits (`pip install scikit-learn`), and the network is drawn: with weights, say
`ResNetForImageClassification.from_pretrained(...)` in `network`.

    python examples/trainer_job.py [OUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import compress

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/trainer")
WEIGHTS = OUT.resolve() / "dense.safetensors"
DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 8 - 1
IMAGES = functional.interpolate(IMAGES, (32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
LABELS = torch.tensor(DIGITS.target)
ORDER = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0)).tolist()
ROWS: list[dict[str, Any]] = [{"pixel_values": IMAGES[i], "labels": LABELS[i]} for i in ORDER]
TRAIN, HELD_OUT, TEST = ROWS[:1000], ROWS[1000:1300], ROWS[1300:]


def network() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10
    )
    found: nn.Module = ResNetForImageClassification(config)
    if WEIGHTS.is_file():
        found.load_state_dict(load_file(WEIGHTS))
    return found.eval()


def accuracy(said: Any) -> dict[str, float]:
    return {"accuracy": float((said.predictions.argmax(1) == said.label_ids).mean())}


def trainer(model: nn.Module, folder: str, epochs: int = 1, seed: int = 0) -> Trainer:
    words = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        learning_rate=2e-3,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=words, train_dataset=TRAIN, compute_metrics=accuracy)


def measure(model: nn.Module, rows: list[dict[str, Any]]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        found = trainer(model, folder).evaluate(rows)
    return {"accuracy": found["eval_accuracy"], "loss": found["eval_loss"]}


def calibrate(model: nn.Module) -> dict[str, float]:
    return measure(model, HELD_OUT)


def evaluate(model: nn.Module) -> dict[str, float]:
    return measure(model, TEST)


def train(model: nn.Module, epochs: int, seed: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer(model, folder, epochs, seed).train()


def batches() -> list[dict[str, Tensor]]:
    parts = [TRAIN[i : i + 64] for i in range(0, 256, 64)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).loss
    return found


job = compress.Job(
    network=network,
    example={"pixel_values": batches()[0]["pixel_values"][:8]},
    calibrate=calibrate,
    evaluate=evaluate,
    better={"accuracy": "higher", "loss": "lower"},
    train=train,
    loss=loss,
    batches=batches,
)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    if not WEIGHTS.is_file():
        dense = network()
        train(dense, epochs=3)
        save_file(dense.state_dict(), WEIGHTS)
    result = compress.prune(
        job,
        "pagcp",
        OUT / "half",
        network=f"{__file__}:network",
        finetune={"epochs": 2},
        pagcp={"flops": 0.5, "rounds": 1},
        bench=None,  # latency takes a minute to measure well
    )
    flops = result.report["size"]["flops"]
    print(f"FLOPs {flops['dense']:,} -> {flops['pruned']:,}")
    for row in result.report["quality"]["tasks"]:
        print(f"{row['task']}: {row['dense']:.4f} -> {row['pruned']:.4f}")
