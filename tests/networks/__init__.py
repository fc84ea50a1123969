"""Small real data and networks for tests: coloured shapes, written in the layouts that data sets come in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.data.images import Split, Splits
from compress.data.tasks import Task


def shapes(count: int, size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, size, size) uint8 of a square, a bar or a cross in any colour and place; class, and mask uint8."""
    draw = np.random.default_rng(seed)
    images = np.empty((count, 3, size, size), np.uint8)
    masks = np.zeros((count, size, size), np.uint8)
    labels = draw.integers(0, 3, count)
    for i, label in enumerate(labels):
        y, x = draw.integers(2, size - 2, 2)
        if label == 0:
            masks[i, y - 2 : y + 2, x - 2 : x + 2] = 255
        elif label == 1:
            masks[i, y] = 255
        else:
            masks[i, y], masks[i, :, x] = 255, 255
        front, back = draw.integers(128, 256, 3), draw.integers(0, 128, 3)
        images[i] = np.where(masks[i] > 0, front[:, None, None], back[:, None, None])
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(masks)


def shape_data(train: int = 203, held: int = 61, size: int = 12, multitask: bool = False, seed: int = 0) -> Splits:
    """Three splits of shapes; 203 and 61 divide by nothing that a batch or a number of processes could be."""
    images, labels, masks = shapes(train + 2 * held, size, seed)
    tasks = (Task("shape", "classes", ("square", "bar", "cross")), Task("matte", "mask"))[: 2 if multitask else 1]
    targets = {"shape": labels, **({"matte": masks} if multitask else {})}
    whole = Split(images, targets)
    at = torch.arange(len(images))
    parts = [whole.take(p) for p in (at[:train], at[train : train + held], at[train + held :])]
    return Splits(*parts, tasks, torch.full((3,), 0.4), torch.full((3,), 0.3), "shapes")


def write_class_folders(folder: Path, train: int = 60, test: int = 30, size: int = 12) -> Path:
    """train/CLASS/*.png and test/CLASS/*.png."""
    from PIL import Image

    for seed, (part, count) in enumerate((("train", train), ("test", test))):
        images, labels, _ = shapes(count, size, seed)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / part / ("square", "bar", "cross")[int(label)]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:04}.png")
    return folder


def write_cifar10(folder: Path, per_file: int = 7) -> tuple[Path, Tensor, Tensor]:
    """CIFAR-10's binary files; (folder, all training images, their labels)."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    every = []
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        rows = draw.integers(0, 256, (per_file, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / name)
        every.append(rows)
    rows = np.concatenate(every[:-1])
    return folder, torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(rows[:, 0]).long()


def write_har(folder: Path, people: int = 4, windows: int = 5) -> Path:
    """UCI-HAR's text files."""
    from compress.data.layouts import HAR_SIGNALS

    draw = np.random.default_rng(0)
    for part, first in (("train", 1), ("test", 1 + people)):
        signals = folder / part / "Inertial Signals"
        signals.mkdir(parents=True)
        count = people * windows
        for name in HAR_SIGNALS:
            np.savetxt(signals / f"{name}_{part}.txt", draw.normal(size=(count, 128)), fmt="%.6e")
        np.savetxt(folder / part / f"y_{part}.txt", draw.integers(1, 7, count), fmt="%d")
        np.savetxt(folder / part / f"subject_{part}.txt", np.repeat(np.arange(people) + first, windows), fmt="%d")
    return folder
