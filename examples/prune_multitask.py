"""Takes half of the FLOPs out of a network with two heads, within a tolerance for each (the recipe `pagcp`).

The network (scene_net.py) is one of your own, trained by your own loop, and given as the torch module that it is: whole
channels go, the rest is fine-tuned, and the result is a smaller dense network. The data are drawn here and written in
the layout that NYUDv2 has in multitask work: images, what each pixel is, and how far away it is.

    python examples/prune_multitask.py [OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scene_net import SceneNet
from torch.nn import functional

import compress

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/multitask")
data = out.with_name(f"{out.name}-data")


def scene(draw: np.random.Generator, size: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture (h, w, 3), its classes (1: wall, 2: disc, 3: box) and its distances in metres (h, w)."""
    y, x = np.mgrid[:size, :size]
    image = np.broadcast_to(draw.integers(60, 110, 3), (size, size, 3)).astype(np.float64)
    classes, depth = np.ones((size, size), np.uint8), 2 + 2 * y / size
    for kind in (2, 3):
        at, reach, near = draw.integers(5, size - 5, 2), draw.integers(3, 6), draw.uniform(0.5, 1.5)
        away = np.stack([abs(y - at[0]), abs(x - at[1])])
        inside = (away**2).sum(0) < reach**2 if kind == 2 else away.max(0) < reach
        classes[inside], depth[inside] = kind, near
        image[inside] = np.array([[230, 80, 60], [60, 110, 230]][kind - 2]) * (1.2 - 0.4 * near)
    noisy = image + draw.normal(0, 12, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), classes, depth.astype(np.float32)


def write(folder: Path, parts: dict[str, int]) -> None:
    draw = np.random.default_rng(0)
    for name in ("images", "segmentation", "depth", "gt_sets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for part, count in parts.items():
        names = [f"{part}-{i:04}" for i in range(count)]
        for name in names:
            image, classes, depth = scene(draw)
            Image.fromarray(image).save(folder / "images" / f"{name}.png")
            Image.fromarray(classes).save(folder / "segmentation" / f"{name}.png")
            np.save(folder / "depth" / f"{name}.npy", depth)
        (folder / "gt_sets" / f"{part}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def train(model: SceneNet, folder: Path, steps: int = 120) -> None:
    """A loop of your own: nothing of compress is in it."""
    names = (folder / "gt_sets" / "train.txt").read_text("utf-8").split()
    images = np.stack([np.asarray(Image.open(folder / "images" / f"{n}.png")) for n in names])
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.4) / 0.3
    classes = np.stack([np.asarray(Image.open(folder / "segmentation" / f"{n}.png")) for n in names])
    labels = torch.from_numpy(classes).long() - 1
    depth = torch.from_numpy(np.stack([np.load(folder / "depth" / f"{n}.npy") for n in names]))[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        at = torch.randint(len(x), (16,))
        found = model(x[at])
        loss = functional.cross_entropy(found["segmentation"], labels[at])
        loss = loss + functional.l1_loss(found["depth"], depth[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if not data.exists():
    write(data, {"train": 240, "val": 60})
torch.manual_seed(0)
model = SceneNet()
train(model, data)

few = {"batch": 32, "lr": 0.01, "warmup_epochs": 0, "shift": 0}
result = compress.prune(
    model,
    "pagcp",
    out,
    data={"folder": str(data), "tasks": ["segmentation", "depth"]},
    train={"epochs": 1, **few},  # a short one more, with the data's own mean and spread; 0 takes the network as it is
    finetune={"epochs": 6, **few},
    pagcp={"flops": 0.5, "round_to": 4, "batch": 32},
    bench=None,  # latency takes a minute to measure well
)

flops = result.report["size"]["flops"]
print(f"FLOPs {flops['dense']:,} -> {flops['pruned']:,}")
for row in result.report["quality"]["tasks"]:
    if row["main"]:
        print(f"{row['metric']} {row['task']}: {row['dense']:.3f} -> {row['pruned']:.3f}")
print(f"{type(result.model).__name__} with {sum(p.numel() for p in result.model.parameters()):,} parameters")
print(f"the model card: {result.release / 'README.md'}")
