"""YOLO11n as a job: ultralytics' own trainer trains it, its own validator judges it, and channels go for
as long as that allows.

ultralytics needs torchvision, so it stands in an environment of its own (`pip install ultralytics`), with compress
beside it. Its `.pt` files are pickles, which compress does not open: what loads one is code of yours, here in
`network`, which builds an untrained YOLO11n where no weights are there. The data are drawn: discs, boxes and
triangles on noise; set YOLO_DATA to a data.yaml of your own (with train, val and test) to take that instead, and
YOLO_SIZE, YOLO_EPOCHS and YOLO_BATCH to what it needs.

    python examples/yolo_job.py [OUT]
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn.tasks import DetectionModel

import compress

OUT = Path(os.environ.get("YOLO_OUT") or (sys.argv[1] if len(sys.argv) > 1 else "runs/examples/yolo")).resolve()
DATA = Path(os.environ.get("YOLO_DATA", OUT / "shapes" / "data.yaml"))
SIZE = int(os.environ.get("YOLO_SIZE", "64"))
BATCH = int(os.environ.get("YOLO_BATCH", "16"))
EPOCHS = int(os.environ.get("YOLO_EPOCHS", "25"))
NAMES = ("disc", "box", "triangle")
WEIGHTS = OUT / "dense.safetensors"


def draw(folder: Path, counts: dict[str, int]) -> None:
    """Images and labels as YOLO has them, and the data.yaml that names them."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(generator.integers(60, 120, (SIZE, SIZE, 3), dtype=np.uint8))
            label, side = int(generator.integers(3)), int(generator.integers(SIZE // 4, SIZE // 2))
            x, y = (int(v) for v in generator.integers(0, SIZE - side, 2))
            pen, colour = ImageDraw.Draw(image), tuple(int(v) for v in generator.integers(150, 256, 3))
            if label == 0:
                pen.ellipse((x, y, x + side, y + side), colour)
            elif label == 1:
                pen.rectangle((x, y, x + side, y + side), colour)
            else:
                pen.polygon([(x, y + side), (x + side // 2, y), (x + side, y + side)], colour)
            image.save(folder / "images" / split / f"{i}.png")
            box = ((x + side / 2) / SIZE, (y + side / 2) / SIZE, side / SIZE, side / SIZE)
            text = f"{label} {' '.join(f'{v:.5f}' for v in box)}\n"
            (folder / "labels" / split / f"{i}.txt").write_text(text, encoding="utf-8")
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    text = f"path: {folder}\ntrain: images/train\nval: images/val\ntest: images/test\nnames:\n{names}"
    (folder / "data.yaml").write_text(text, encoding="utf-8")


if not DATA.is_file():
    draw(DATA.parent, {"train": 192, "val": 48, "test": 96})
CLASSES = check_det_dataset(str(DATA), autodownload=False)["names"]


class Detector(nn.Module):
    """ultralytics' network; what it gives is its predictions alone, without the maps that its loss is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DetectionModel("yolo11n.yaml", nc=len(CLASSES), verbose=False)
        self.net.args = get_cfg()  # what its loss weighs boxes and classes by
        self.net.model[-1].dynamic = True  # its grid is made at every call: an ONNX file takes any batch

    def forward(self, images: Tensor) -> Tensor:
        predicted: Tensor = self.net(images)[0]
        return predicted


def network() -> nn.Module:
    torch.manual_seed(0)
    found = Detector()
    if WEIGHTS.is_file():
        found.load_state_dict(load_file(WEIGHTS))
    return found.eval()


def words(**more: Any) -> dict[str, Any]:
    return {
        **{"data": str(DATA), "imgsz": SIZE, "batch": BATCH, "device": "cpu", "workers": 0, "amp": False},
        **{"optimizer": "AdamW", "lr0": 2e-3, "warmup_epochs": 1, "mosaic": 0.0, "fliplr": 0.5},
        **{"plots": False, "verbose": False, "project": str(OUT / "ultralytics"), "exist_ok": True},
        **more,
    }


def train(network: nn.Module, epochs: int, seed: int = 0) -> None:
    """ultralytics' trainer, given the module: it trains it in place, and its averaged weights are what is kept."""
    trainer = DetectionTrainer(
        overrides=words(model="yolo11n.yaml", epochs=epochs, seed=seed, val=False, save=False, name="train")
    )
    trainer.model = network.net
    trainer.train()
    network.net.load_state_dict(trainer.ema.ema.state_dict())


def measure(network: nn.Module, split: str) -> dict[str, float]:
    """ultralytics' validator, on a copy: it fuses batch norms into convolutions."""
    validator = DetectionValidator(args=words(split=split, rect=False, name=split))
    found = validator(model=copy.deepcopy(network.net))
    return {"mAP50": float(found["metrics/mAP50(B)"])}


def calibrate(network: nn.Module) -> dict[str, float]:
    return measure(network, "val")


def evaluate(network: nn.Module) -> dict[str, float]:
    return measure(network, "test")


def read(split: str, count: int) -> list[dict[str, Any]]:
    """Batches as the trainer has them, without what it draws."""
    validator = DetectionValidator(args=words(split=split, rect=False, name="read"))
    validator.data, validator.stride = check_det_dataset(str(DATA), autodownload=False), 32
    validator.device = torch.device("cpu")
    found = []
    for batch in validator.get_dataloader(validator.data[split], BATCH):
        found.append({**batch, "img": batch["img"].float() / 255})
        if len(found) * BATCH >= count:
            break
    return found


def batches() -> list[dict[str, Any]]:
    return read("train", 128)


def loss(network: nn.Module, batch: dict[str, Any]) -> Tensor:
    found: Tensor = network.net.loss(batch)[0].sum()
    return found


job = compress.Job(
    network=network,
    example=read("val", 1)[0]["img"][:8],
    calibrate=calibrate,
    evaluate=evaluate,
    better={"mAP50": "higher"},
    train=train,
    loss=loss,
    batches=batches,
)


if __name__ == "__main__":
    if not WEIGHTS.is_file():
        dense = network()
        train(dense, EPOCHS)
        save_file(dense.state_dict(), WEIGHTS)
    os.environ["YOLO_OUT"] = str(OUT)  # for the clean process that builds the network again
    result = compress.prune(
        job,
        "pagcp",
        OUT / "pruned",
        network=f"{__file__}:network",
        finetune={"epochs": 8},
        # As much as 0.05 allows; with `flops`, a share, the oracle is asked about four times as often.
        pagcp={"flops": None, "rounds": 1, "round_to": 16, "tolerances": {"mAP50": {"absolute": 0.05}}},
        bench=None,
    )
    flops, (row,) = result.report["size"]["flops"], result.report["quality"]["tasks"]
    print(f"FLOPs {flops['dense']:,} -> {flops['pruned']:,}")
    print(f"mAP50 {row['dense']:.3f} -> {row['pruned']:.3f}")
