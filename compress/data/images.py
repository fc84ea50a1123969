"""Images and signals to train on: one call, three disjoint splits, whatever the source.

Sources are folders (`compress.data.layouts`), tables (`compress.data.table`), the hub, and data that packages carry
(`compress.data.packaged`). A split that the source does not have is cut off the training part once, by a seed; that no
sample is in two splits is checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.data.decode import pixels, rgb
from compress.data.folder_images import FolderImages
from compress.data.tasks import Task
from compress.distribution import install_line
from compress.errors import CompressError
from compress.run.cache import sha256_of
from compress.schema.sections import DataSpec

NAME_FOLDER = "name a folder of your own: --set data.folder=PATH"
LISTED = 64 << 20  # bytes of a list of names, or of the boxes of one image
RELATIVE = re.compile(r"[^/\\\x00-\x1f\x7f][^\\\x00-\x1f\x7f]*")  # a relative path
HELD_OUT_NAMES = ("test", "val", "validation")
HELD_OUT = 0.1  # share of the training part that becomes a split the source does not have


@dataclass(frozen=True)
class Split:
    """``inputs`` (n, c, h, w) uint8 or (n, c, steps) float32; targets by task, as `compress.data.tasks.Task` says."""

    inputs: Tensor | FolderImages
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, at: Tensor) -> Split:
        """The samples at ``at`` (k,) int64, in that order."""
        inputs = self.inputs.only(at) if isinstance(self.inputs, FolderImages) else self.inputs[at]
        return Split(inputs, {name: target[at] for name, target in self.targets.items()})


@dataclass(frozen=True)
class Splits:
    """Three splits that share no sample (emoji: no emoji; watch: no person), and how inputs become floats."""

    train: Split
    calibration: Split
    test: Split
    tasks: tuple[Task, ...]
    mean: Tensor  # (c,)
    std: Tensor  # (c,)
    source: str
    notes: tuple[str, ...] = field(default=())

    def prepare(self, inputs: Tensor) -> Tensor:
        """uint8 or float32 (b, c, ...) -> normalised float32 of the same shape."""
        shape = (1, -1, *(1,) * (inputs.dim() - 2))
        x = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs
        return (x - self.mean.to(x.device).view(shape)) / self.std.to(x.device).view(shape)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        first = self.train.inputs[torch.zeros(1, dtype=torch.int64)]
        return tuple(first.shape[1:])

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 over all samples and targets; of a folder that is read as it goes, over names and sizes."""
        digest = hashlib.sha256()
        for split in (self.train, self.calibration, self.test):
            digest.update(
                split.inputs.signature()
                if isinstance(split.inputs, FolderImages)
                else split.inputs.contiguous().numpy().tobytes()
            )
            for name in sorted(split.targets):
                digest.update(name.encode() + split.targets[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


def load(spec: DataSpec) -> Splits:
    """Reads (and fetches, if need be) a data set.

    Raises:
        CompressError: it cannot be reached, its layout is none that is known, or a calibration sample is a test sample.
    """
    from compress.data.layouts import from_folder
    from compress.data.packaged import PACKAGES
    from compress.data.table import from_table

    if spec.package is not None:
        splits = PACKAGES[spec.package](spec)
    elif spec.folder is not None:
        splits = from_folder(spec.folder, spec)
    elif spec.table is not None:
        splits = from_table(spec.table, spec)
    else:
        splits = _from_hub(spec)
    splits = _as_said(splits, spec)
    names = [task.name for task in splits.tasks]
    wanted = spec.tasks or names[:1]
    for name in wanted:
        if name not in names:
            raise CompressError(
                f"the data has no task {name!r}", where=f"data {spec.title}", fix=f"one of: {', '.join(names)}"
            )

    _check_targets(splits, [task for task in splits.tasks if task.name in wanted], f"data {spec.title}")

    def kept(split: Split) -> Split:
        return replace(split, targets={name: split.targets[name] for name in wanted})

    return replace(
        splits,
        train=kept(splits.train),
        calibration=kept(splits.calibration),
        test=kept(splits.test),
        tasks=tuple(task for name in wanted for task in splits.tasks if task.name == name),
    )


def _as_said(splits: Splits, spec: DataSpec) -> Splits:
    """Normalised as the recipe or the model says, and with its classes in their order where the data's are among them.

    Raises:
        CompressError: mean and std are of another number of channels.
    """
    if spec.mean is not None and spec.std is not None:
        channels = splits.input_shape[0]
        if not len(spec.mean) == len(spec.std) == channels:
            raise CompressError(
                f"mean has {len(spec.mean)} and std {len(spec.std)} values, and the data {channels} channels",
                where="data.mean",
                fix="give one of each for every channel",
            )
        splits = replace(splits, mean=torch.tensor(spec.mean), std=torch.tensor(spec.std))
    task = splits.tasks[0]
    if not spec.labels or task.kind != "classes":
        return splits
    strange = [name for name in task.classes if name not in spec.labels]
    if strange:
        note = f"the class {strange[0]!r} is none of the {len(spec.labels)} that data.labels or the model names"
        return replace(splits, notes=(*splits.notes, f"{note}: the network has the data's own {len(task.classes)}"))
    at = torch.tensor([spec.labels.index(name) for name in task.classes])

    def renamed(split: Split) -> Split:
        old = split.targets[task.name]
        new = torch.where(old >= 0, at[old.clamp_min(0)], old)
        return replace(split, targets={**split.targets, task.name: new})

    return replace(
        splits,
        train=renamed(splits.train),
        calibration=renamed(splits.calibration),
        test=renamed(splits.test),
        tasks=(replace(task, classes=tuple(spec.labels)), *splits.tasks[1:]),
    )


def _check_targets(splits: Splits, tasks: Sequence[Task], where: str) -> None:
    """Raises CompressError where a class is none of the task's, or where there is nothing to tell apart."""
    for task in tasks:
        if task.kind != "classes":
            continue
        for name in ("train", "calibration", "test"):
            most = int(getattr(splits, name).targets[task.name].max())
            if most >= len(task.classes):
                raise CompressError(
                    f"a label of {task.name!r} is {most}, and there are {len(task.classes)} classes, from 0 on",
                    where=where,
                    fix="mend the labels",
                )
        known = splits.train.targets[task.name]
        found = known[known >= 0].unique()
        if len(found) < 2:
            only = f"all training samples are of the class {task.classes[int(found[0])]!r}" if len(found) else ""
            raise CompressError(
                f"there is nothing to tell apart for {task.name!r}: {only or 'no training sample is labelled'}",
                where=where,
                fix="name data of several classes",
            )
    inputs = splits.train.inputs
    if not isinstance(inputs, FolderImages) and bool((inputs == inputs[:1]).all()):
        raise CompressError("all training inputs are alike", where=where, fix="name data whose samples differ")


def check_room(count: int, height: int, width: int) -> None:
    """Raises CompressError where so many images of a size do not fit into the memory that is free."""
    from compress.processes.distributed import available_bytes

    needed, free = 3 * count * height * width, available_bytes()
    if needed > free:
        raise CompressError(
            f"{count:,} images of {width:,}x{height:,} pixels take {needed / 1e9:,.1f} GB,"
            f" {free / 1e9:,.1f} GB are free",
            where="data.size",
            fix="ask for smaller images (--set data.size=), or fewer",
        )


# --- splitting ------------------------------------------------------------------------------------------------------


def held_out(count: int, seed: int, share: float = HELD_OUT) -> tuple[Tensor, Tensor]:
    """(kept, held out) indices of ``count`` samples, both rising; at least one is held out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(share * count))
    return order[cut:].sort().values, order[:cut].sort().values


def _moments(inputs: Tensor | FolderImages) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (c,) of the training inputs as floats; of images on disk, ImageNet's own."""
    if isinstance(inputs, FolderImages):
        return torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    total = torch.zeros(inputs.shape[1], dtype=torch.float64)
    square, count = total.clone(), 0
    for chunk in inputs.split(1024):
        x = chunk.double() / 255 if chunk.dtype == torch.uint8 else chunk.double()
        x = x.transpose(0, 1).flatten(1)
        total += x.sum(1)
        square += (x * x).sum(1)
        count += x.shape[1]
    mean = total / count
    std = (square / count - mean**2).clamp_min(0).sqrt()
    # A channel in which all is alike says nothing; what differs there elsewhere is not to be blown up.
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return mean.float(), std.float()


def splits_of(
    train: Split,
    test: Split | None,
    tasks: Sequence[Task],
    spec: DataSpec,
    source: str,
    calibration: Split | None = None,
) -> Splits:
    """Cuts what is missing off the training part, and measures its mean and spread.

    No sample's content is in two splits. A calibration split that the source has itself must not overlap the test
    split; of what is cut or trained on here, samples that are held out elsewhere too are left out.

    Raises:
        CompressError: a split is too small, or the source's calibration split overlaps its test split.
    """
    for split in (train, test):
        if split is not None and len(split) < 3:
            raise CompressError(
                f"a split holds {len(split)} samples", where=f"data {spec.title}", fix="name a data set with more"
            )
    if test is None:
        kept, out = held_out(len(train), spec.seed)
        train, test = train.take(kept), train.take(out)
    notes = []
    if calibration is None:
        kept, out = held_out(len(train), spec.seed + 1)
        train, calibration = train.take(kept), train.take(out)
        calibration, gone = _without(calibration, test)
        if gone:
            notes.append(f"{gone} calibration samples are test samples too: left out")
    else:
        same = _shared(calibration, test)
        if len(same):
            raise CompressError(
                f"{len(same)} of {len(calibration)} calibration samples are test samples too (the first: number"
                f" {int(same[0])}): what is decided on them would be judged on them",
                where=f"data {spec.title}",
                fix="hold out other samples for calibration, or leave that split out: it is then cut off training",
            )
    train, gone = _without(train, calibration, test)
    if gone:
        notes.append(f"{gone} training samples are calibration or test samples too: left out")
    for name, split in (("training", train), ("calibration", calibration)):
        if not len(split):
            raise CompressError(
                f"every {name} sample is in another split too: none is left",
                where=f"data {spec.title}",
                fix="name a data set whose splits differ",
            )
    mean, std = _moments(train.inputs)
    return Splits(train, calibration, test, tuple(tasks), mean, std, source, tuple(notes))


def _shared(split: Split, *others: Split) -> Tensor:
    """Indices of the samples of ``split`` whose content is in one of the others, rising."""
    sizes = [_sizes(s.inputs) for s in (split, *others)]
    both = set(sizes[0]) & {size for of in sizes[1:] for size in of}
    known: dict[bytes, list[Path]] = {}
    for other, of in zip(others, sizes[1:], strict=True):
        for i, size in enumerate(of):
            if size in both:
                known.setdefault(_content(other.inputs, i), []).extend(_file(other.inputs, i))
    found = []
    for i, size in enumerate(sizes[0]):
        alike = known.get(_content(split.inputs, i)) if size in both else None
        if alike is not None:
            own = _file(split.inputs, i)
            if not own or any(sha256_of(own[0]) == sha256_of(path) for path in alike):
                found.append(i)
    return torch.tensor(found, dtype=torch.int64)


def _file(inputs: Tensor | FolderImages, i: int) -> list[Path]:
    return [inputs.paths[i]] if isinstance(inputs, FolderImages) else []


def _without(split: Split, *others: Split) -> tuple[Split, int]:
    """The samples that are in none of the others, and how many were."""
    same = _shared(split, *others)
    if not len(same):
        return split, 0
    kept = torch.ones(len(split), dtype=torch.bool)
    kept[same] = False
    return split.take(kept.nonzero()[:, 0]), len(same)


def _sizes(inputs: Tensor | FolderImages) -> list[int]:
    """Bytes of every sample: files of other sizes need not be read to be told apart."""
    if isinstance(inputs, FolderImages):
        return [path.stat().st_size for path in inputs.paths]
    return [inputs[0].numel() * inputs.element_size() if len(inputs) else 0] * len(inputs)


def _content(inputs: Tensor | FolderImages, i: int) -> bytes:
    """A hash of one sample; of a file, of its ends: nearly all images differ there where they differ at all."""
    if not isinstance(inputs, FolderImages):
        return hashlib.blake2b(inputs[i].contiguous().numpy().tobytes(), digest_size=16).digest()
    with inputs.paths[i].open("rb") as file:
        head = file.read(8192)
        file.seek(max(0, file.seek(0, 2) - 8192))
        return hashlib.blake2b(head + file.read(8192), digest_size=16).digest()


def resized(images: Tensor, size: int | None) -> Tensor:
    """uint8 (n, c, h, w) -> uint8 (n, c, size, size), averaged over area."""
    if size is None or images.shape[-1] == images.shape[-2] == size:
        return images
    chunks = [
        torch.nn.functional.interpolate(
            chunk.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        for chunk in images.split(512)
    ]
    return torch.cat([c.round().clamp(0, 255).to(torch.uint8) for c in chunks])


# --- the hub --------------------------------------------------------------------------------------------------------


def _from_hub(spec: DataSpec) -> Splits:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CompressError(
            "data from the hub needs the package 'datasets'",
            where=f"data {spec.hub}",
            fix=f"{install_line('hub')}, or name a folder",
        ) from None
    try:
        found = load_dataset(spec.hub)
    except (OSError, ValueError, RuntimeError) as e:
        raise CompressError(
            f"the data set cannot be read from the hub: {(str(e).splitlines() or [type(e).__name__])[0]}",
            where=f"data {spec.hub}",
            fix="check the network and the name, or name a folder",
        ) from e
    part = next((name for name in ("test", "validation", "val") if name in found), None)
    for column in (spec.image_column, spec.label_column):
        if column not in found["train"].column_names:
            raise CompressError(
                f"the data set has no column {column!r}",
                where=f"data {spec.hub}",
                fix=f"set image_column and label_column; it has: {', '.join(found['train'].column_names)}",
            )

    def read(rows: Any) -> Split:
        images = [pixels(rgb(row, spec.white, f"data {spec.hub}")) for row in rows[spec.image_column]]
        size = spec.size or images[0].shape[-1]
        whole = torch.cat([resized(image[None], size) for image in images])
        return Split(whole, {"class": torch.tensor(rows[spec.label_column])})

    train = found["train"]
    feature = train.features[spec.label_column]
    names = tuple(getattr(feature, "names", None) or map(str, range(max(train[spec.label_column]) + 1)))
    test = read(found[part]) if part else None
    return splits_of(read(train), test, [Task("class", "classes", names)], spec, f"hub {spec.hub}")


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Index batches 0 ... count - 1 in order."""
    yield from torch.arange(count).split(size)
