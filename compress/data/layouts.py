"""Folders of images, pixels and boxes, in the layouts that data sets come in; those of classes and of HAR are here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data.box_layouts import coco, yolo
from compress.data.decode import SUFFIXES, size_of
from compress.data.folder_images import Fit, FolderImages, held
from compress.data.images import HELD_OUT_NAMES, Split, Splits, check_room, held_out, resized, splits_of
from compress.data.pixel_layouts import nyud, pascal
from compress.data.tasks import Task
from compress.errors import CompressError
from compress.schema.sections import DataSpec
from compress.system.files import check_regular, read_text


def from_folder(folder: Path, spec: DataSpec) -> Splits:
    if not folder.is_dir():
        raise CompressError("there is no such folder", where=f"data {folder}", fix="check the path of the data")
    if (folder / "data_batch_1.bin").exists():
        return _cifar10_binary(folder, spec)
    if (folder / "data_batch_1").exists():
        raise CompressError(
            "these are CIFAR-10's pickled files, which are not read: a pickle can run code",
            where=str(folder),
            fix="take the binary version (cifar-10-binary), or a folder train/CLASS/*.png",
        )
    if (folder / "train" / "Inertial Signals").is_dir():
        return _har(folder, spec)
    if (folder / "gt_sets").is_dir():
        return nyud(folder, spec)
    if (folder / "JPEGImages").is_dir():
        return pascal(folder, spec)
    if (folder / "annotations").is_dir():
        return coco(folder, spec)
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        return yolo(folder, spec)
    if (folder / "train").is_dir():
        return _class_folders(folder, spec)
    raise CompressError(
        "the layout of the data is not known",
        where=str(folder),
        fix="train/CLASS/*.png, data_batch_1.bin ... test_batch.bin, train/Inertial Signals/*.txt, gt_sets/ (NYUDv2),"
        " JPEGImages/ (PASCAL-Context), images/ and labels/ (YOLO), or annotations/*.json (COCO)",
    )


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar10_binary(folder: Path, spec: DataSpec) -> Splits:
    """CIFAR-10's binary version: records of one label and 3 x 32 x 32 bytes."""

    def read(names: Sequence[str]) -> Split:
        parts = []
        for name in names:
            path = folder / name
            if not path.exists():
                raise CompressError("a file of CIFAR-10 is missing", where=str(path), fix="unpack the archive again")
            check_regular(path, "a file of CIFAR-10", "unpack the archive again")
            data = np.fromfile(path, dtype=np.uint8)
            if not len(data) or len(data) % 3073:
                raise CompressError(
                    f"the file holds {len(data):,} bytes, no multiple of 3,073", where=str(path), fix="fetch it again"
                )
            parts.append(data.reshape(-1, 3073))
            if int(parts[-1][:, 0].max()) > 9:
                raise CompressError("a label is above 9", where=str(path), fix="is this CIFAR-100? fetch CIFAR-10")
        rows = torch.from_numpy(np.concatenate(parts))
        labels = rows[:, 0].long()
        return Split(resized(rows[:, 1:].reshape(-1, 3, 32, 32), spec.size), {"class": labels})

    names = sorted(p.name for p in folder.glob("data_batch_*.bin"))
    tasks = [Task("class", "classes", CIFAR10)]
    return splits_of(read(names), read(["test_batch.bin"]), tasks, spec, f"folder {folder}")


def _class_folders(folder: Path, spec: DataSpec) -> Splits:
    """train/CLASS/image, and test/ or val/ likewise; read into memory where it is small, else as it goes."""

    def named(part: Path) -> set[str]:  # hidden folders are a program's: .ipynb_checkpoints
        return {p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")}

    classes = tuple(sorted(named(folder / "train")))
    if len(classes) < 2:
        raise CompressError(
            "there are fewer than two classes", where=str(folder / "train"), fix="one folder a class, images in it"
        )

    def read(part: Path) -> Split:
        strangers = sorted(named(part) - set(classes))
        if strangers:
            raise CompressError(
                f"class {strangers[0]!r} is not among the classes of train", where=str(part), fix="use the same folders"
            )
        paths, labels = [], []
        for i, name in enumerate(classes):
            # resolve() would hide that two names are one file; the layout decides, not the disk.
            found = sorted(p for p in (part / name).rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found and part == folder / "train":
                raise CompressError(
                    f"there is no image of the class {name!r}",
                    where=str(part / name),
                    fix=f"take the folder out, or put some there; images are {', '.join(sorted(SUFFIXES))}",
                )
            paths += found
            labels += [i] * len(found)
        if not paths:
            raise CompressError("there is no image", where=str(part), fix=f"images are {', '.join(sorted(SUFFIXES))}")
        size = spec.size or min(size_of(paths[0]))
        check_room(min(len(paths), 128), 2 * size, 2 * size)  # a batch, as bytes and as floats
        return Split(held(FolderImages(paths, Fit.of(spec, size))), {"class": torch.tensor(labels)})

    part = next((folder / name for name in HELD_OUT_NAMES if (folder / name).is_dir()), None)
    test = read(part) if part is not None else None
    own = folder / "calibration"
    calibration = read(own) if own.is_dir() else None
    return splits_of(
        read(folder / "train"), test, [Task("class", "classes", classes)], spec, f"folder {folder}", calibration
    )


HAR_SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
HAR_BYTES = 1 << 30  # of a table
HAR_CLASSES = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "laying")


def _har(folder: Path, spec: DataSpec) -> Splits:
    """UCI-HAR: 9 signals of 128 steps; ``binary`` (HAR-2) tells moving from resting. Calibration by person."""

    def read(part: str) -> tuple[Split, Tensor]:
        def table(name: str) -> NDArray[np.float64]:
            path, fix = folder / part / name, "unpack it again"
            text = read_text(path, "a file of HAR", HAR_BYTES, fix)
            try:
                found = np.loadtxt(io.StringIO(text), ndmin=2) if text.strip() else np.zeros((0, 0))
            except ValueError as e:
                raise CompressError(f"a file of HAR cannot be read: {e}", where=str(path), fix=fix) from e
            if not found.size or not (abs(found) <= 1e6).all():
                raise CompressError("a file of HAR is empty, or holds what is no number", where=str(path), fix=fix)
            return found

        def whole(name: str, most: int) -> NDArray[np.float64]:
            found = table(name)
            if found.shape[1] != 1 or not ((found % 1 == 0) & (found >= 1) & (found <= most)).all():
                raise CompressError(
                    f"a line is no whole number from 1 to {most}",
                    where=str(folder / part / name),
                    fix="unpack it again",
                )
            return found[:, 0]

        names = [f"Inertial Signals/{name}_{part}.txt" for name in HAR_SIGNALS]
        tables = [table(name) for name in names]
        other = next((i for i, one in enumerate(tables) if one.shape != (len(tables[-1]), 128)), None)
        if other is not None:
            shape = "x".join(map(str, tables[other].shape))
            raise CompressError(
                f"the signal is {shape}, not {len(tables[-1])} windows of 128 steps",
                where=str(folder / part / names[other]),
                fix="unpack it again",
            )
        signals = np.stack(tables, axis=1)
        labels = torch.from_numpy(whole(f"y_{part}.txt", len(HAR_CLASSES))).long() - 1
        people = torch.from_numpy(whole(f"subject_{part}.txt", 10**6)).long()
        if not len(signals) == len(labels) == len(people):
            raise CompressError("signals and labels differ in number", where=str(folder / part), fix="unpack it again")
        # (n, 9, steps)
        return Split(torch.from_numpy(signals).float(), {"class": labels, "binary": (labels < 3).long()}), people

    (train, people), (test, _) = read("train"), read("test")
    tasks = [Task("class", "classes", HAR_CLASSES), Task("binary", "classes", ("resting", "moving"))]
    names = people.unique()
    if len(names) < 2:
        return splits_of(train, test, tasks, spec, f"folder {folder}")
    _, out = held_out(len(names), spec.seed)
    held = torch.isin(people, names[out])
    return splits_of(
        train.take((~held).nonzero()[:, 0]),
        test,
        tasks,
        spec,
        f"folder {folder}",
        calibration=train.take(held.nonzero()[:, 0]),
    )
