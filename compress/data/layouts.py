"""Folders of images, pixels and boxes, in the layouts that data sets come in."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data.decode import SUFFIXES, opened, pixels, size_of, upright, white_of
from compress.data.images import FolderImages, Split, Splits, check_room, held_out, resized, splits_of
from compress.data.tasks import IGNORE, KindName, Task
from compress.errors import CompressError
from compress.run.progress import Progress
from compress.run.strict_json import member, read_json, typed
from compress.schema.sections import DataSpec
from compress.schema.strict_yaml import read_yaml
from compress.system.arrays import read_array
from compress.system.files import check_regular, read_text

LISTED = 64 << 20  # bytes of a list of names, or of the boxes of one image
ANNOTATIONS = 2 << 30  # bytes of a file of annotations; COCO's own has 0.45 GB
CLASSES = 100_000  # no data set has more
FARTHEST = 1e5  # metres
_PLAIN = re.compile(r"[^/\\\x00-\x1f\x7f][^\\\x00-\x1f\x7f]*")  # a relative path
HELD_OUT_NAMES = ("test", "val", "validation")


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
        return _nyud(folder, spec)
    if (folder / "JPEGImages").is_dir():
        return _pascal(folder, spec)
    if (folder / "annotations").is_dir():
        return _coco(folder, spec)
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        return _yolo(folder, spec)
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
    classes = tuple(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir()))
    if len(classes) < 2:
        raise CompressError(
            "there are fewer than two classes", where=str(folder / "train"), fix="one folder a class, images in it"
        )

    def read(part: Path) -> Split:
        strangers = sorted({p.name for p in part.iterdir() if p.is_dir()} - set(classes))
        if strangers:
            raise CompressError(
                f"class {strangers[0]!r} is not among the classes of train", where=str(part), fix="use the same folders"
            )
        paths, labels = [], []
        for i, name in enumerate(classes):
            # resolve() would hide that two names are one file; the layout decides, not the disk.
            found = sorted(p for p in (part / name).rglob("*") if p.suffix.lower() in SUFFIXES)
            paths += found
            labels += [i] * len(found)
        if not paths:
            raise CompressError("there is no image", where=str(part), fix=f"images are {', '.join(sorted(SUFFIXES))}")
        size = spec.size or min(size_of(paths[0]))
        lazy = FolderImages(paths, size, spec.white)
        small = len(paths) * 3 * size * size <= 2**30
        check_room(min(len(paths), 128), 2 * size, 2 * size)  # a batch, as bytes and as floats
        return Split(_whole(lazy) if small else lazy, {"class": torch.tensor(labels)})

    part = next((folder / name for name in HELD_OUT_NAMES if (folder / name).is_dir()), None)
    test = read(part) if part is not None else None
    own = folder / "calibration"
    calibration = read(own) if own.is_dir() else None
    return splits_of(
        read(folder / "train"), test, [Task("class", "classes", classes)], spec, f"folder {folder}", calibration
    )


def _whole(lazy: FolderImages) -> Tensor:
    size = lazy.size
    images = torch.empty(len(lazy), 3, size, size, dtype=torch.uint8)
    with Progress(len(lazy), "decoding images") as bar:
        for i, path in enumerate(lazy.paths):
            with opened(path, lazy.white) as image:
                # An image that has the size already is taken as it is.
                images[i] = pixels(image) if image.size == (size, size) else lazy._read(path, None)
            bar.update(1)
    return images


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


# --- pixels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pixels:
    """A task whose targets are files beside the images, in the first of ``folders`` that is there."""

    name: str
    kind: KindName
    folders: tuple[str, ...]
    classes: tuple[str, ...] = ()
    from_one: bool = False  # labels: 0 stands for unknown, the first class is 1


NYUD_CLASSES = 40
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog",
    "horse", "motorbike", "person", "plant", "sheep", "sofa", "train", "tv",
)  # fmt: skip
PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")


def _nyud(folder: Path, spec: DataSpec) -> Splits:
    """NYUDv2 as multitask work has it: images/, segmentation/ (0 unknown, 1 to 40), depth/ (npy metres, png mm),
    normals/ and edges/; names in gt_sets/train.txt and val.txt. Held in memory, all pixels of one size."""
    sources = [
        _Pixels("segmentation", "labels", ("segmentation",), tuple(map(str, range(1, NYUD_CLASSES + 1))), True),
        _Pixels("depth", "depth", ("depth",)),
        _Pixels("normals", "normals", ("normals",)),
        _Pixels("edges", "edges", ("edges", "edge")),
    ]
    return _pixel_folder(folder, "images", folder / "gt_sets", sources, spec)


def _pascal(folder: Path, spec: DataSpec) -> Splits:
    """PASCAL-Context as multitask work has it: JPEGImages/, label images (255 unknown), human_parts/, normals_distill/,
    sal_distill/ and edges/; names in ImageSets/Context or ImageSets/Segmentation."""
    sources = [
        _Pixels("segmentation", "labels", ("semseg", "SegmentationClassContext", "SegmentationClass"), VOC_CLASSES),
        _Pixels("parts", "labels", ("human_parts",), PARTS),
        _Pixels("normals", "normals", ("normals_distill", "normals")),
        _Pixels("edges", "edges", ("edges", "edge")),
        _Pixels("saliency", "mask", ("sal_distill", "saliency")),
    ]
    every = (folder / "ImageSets" / name for name in ("Context", "Segmentation"))
    sets = next((place for place in every if place.is_dir()), folder / "ImageSets")
    return _pixel_folder(folder, "JPEGImages", sets, sources, spec)


def _names(sets: Path, part: str) -> list[str] | None:
    path = sets / f"{part}.txt"
    if not os.path.lexists(path):
        return None
    names = read_text(path, "the list of images", LISTED, "one name a line, in UTF-8").split()
    strange = next((n for n in names if not _PLAIN.fullmatch(n) or ".." in n.split("/")), None)
    if strange is not None:
        raise CompressError(f"{strange!r:.80} is no name of an image", where=str(path), fix="one name a line")
    if not names:
        raise CompressError("the list of images is empty", where=str(path), fix="one name a line, or take the file out")
    return names


def _pixel_folder(folder: Path, images: str, sets: Path, sources: Sequence[_Pixels], spec: DataSpec) -> Splits:
    """Images and the targets that lie beside them under the same names."""
    there = [
        (s, found) for s in sources if (found := next((folder / f for f in s.folders if (folder / f).is_dir()), None))
    ]
    # What is not asked for is not read: the first by default, as in `compress.data.images.load`.
    there = [(s, p) for s, p in there if s.name in spec.tasks] or there[:1]
    train_names = _names(sets, "train")
    test_names = next((n for n in (_names(sets, part) for part in ("val", "test")) if n is not None), None)
    if not there or train_names is None:
        what = "lists no training images" if there else "holds no target of any task"
        fix = f"add {sets.name}/train.txt" if there else f"such as {', '.join(f for s in sources for f in s.folders)}"
        raise CompressError(f"the folder {what}", where=str(folder), fix=fix)
    every = _sized(folder / images, [*train_names, *(test_names or [])], spec)

    def read(names: Sequence[str]) -> Split:
        check_room(len(names), *every)
        whole = torch.empty(len(names), 3, *every, dtype=torch.uint8)
        targets: dict[str, list[NDArray[Any]]] = {s.name: [] for s, _ in there}
        with Progress(len(names), "reading images and their pixels") as bar:
            for i, name in enumerate(names):
                with opened(_named(folder / images, name, SUFFIXES), spec.white) as image:
                    size = image.size
                    whole[i] = pixels(_cropped(image, every))
                for source, place in there:
                    path = _named(place, name, {".png", ".npy"})
                    values = _array(path)
                    if values.shape[:2] != (size[1], size[0]):
                        raise CompressError(
                            f"the target has {values.shape[1]}x{values.shape[0]} pixels, the image {size[0]}x{size[1]}"
                            " when it is upright",
                            where=str(path),
                            fix="give both the same size; a target is of the image turned as its EXIF says",
                        )
                    targets[source.name].append(_target(source, values, every, path))
                bar.update(1)
        return Split(whole, {name: torch.from_numpy(np.stack(t)) for name, t in targets.items()})

    train, test = read(train_names), read(test_names) if test_names is not None else None
    own = _names(sets, "calibration")
    tasks = [Task(s.name, s.kind, s.classes) for s, _ in there]
    for task in tasks:
        if task.kind != "labels":
            continue
        labels = torch.cat([split.targets[task.name].flatten() for split in (train, test) if split is not None])
        most = int(torch.where(labels == IGNORE, 0, labels).max())
        if most >= len(task.classes):
            # PASCAL-Context's other sets of classes (60, 460) have no names in the folder.
            tasks = [Task(t.name, t.kind, tuple(map(str, range(most + 1)))) if t is task else t for t in tasks]
    return splits_of(train, test, tasks, spec, f"folder {folder}", read(own) if own is not None else None)


def _named(place: Path, name: str, suffixes: set[str]) -> Path:
    """The file ``name`` with one of the suffixes.

    Raises:
        CompressError: there is none.
    """
    found = [p for p in (place / f"{name}{suffix}" for suffix in sorted(suffixes)) if p.is_file()]
    if not found:
        other = next(iter(sorted(place.glob(f"{glob.escape(name)}.*"))), None)
        fix = "add it, or take the name off the list"
        if other is not None and other.suffix == ".mat":
            fix = "write the array of the MATLAB file as .npy or .png: .mat is not read"
        raise CompressError(f"the file of {name!r} is missing", where=str(place), fix=fix)
    return found[0]


def _sized(place: Path, names: Sequence[str], spec: DataSpec) -> tuple[int, int]:
    """(h, w) that all images get.

    Raises:
        CompressError: they differ, and no size is asked for.
    """
    if spec.size is not None:
        return spec.size, spec.size
    sizes = {size_of(_named(place, name, SUFFIXES)) for name in names}
    if len(sizes) != 1:
        raise CompressError(
            f"the images have {len(sizes)} sizes", where=str(place), fix="name one: --set data.size=256"
        )
    width, height = sizes.pop()
    return height, width


def _scaled(size: tuple[int, int], every: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of an image (h, w) whose shorter way covers ``every``."""
    factor = max(every[0] / size[0], every[1] / size[1])
    return max(every[0], round(size[0] * factor)), max(every[1], round(size[1] * factor))


def _cropped(image: Any, every: tuple[int, int]) -> Any:
    """A PIL image scaled to cover ``every`` (h, w), its centre cut out."""
    from PIL import Image

    height, width = _scaled((image.height, image.width), every)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = (height - every[0]) // 2, (width - every[1]) // 2
    return image.crop((left, top, left + every[1], top + every[0]))


def _nearest(values: NDArray[Any], every: tuple[int, int]) -> NDArray[Any]:
    """As `_cropped`, of (h, w, ...), each pixel taken as it is: labels and distances have no mean."""
    at = []
    for old, new, wanted in zip(values.shape[:2], _scaled(values.shape[:2], every), every, strict=True):
        first = (new - wanted) // 2
        at.append(((np.arange(first, first + wanted) + 0.5) * old / new).astype(np.int64))
    found: NDArray[Any] = values[at[0][:, None], at[1][None]]
    return found


def _array(path: Path) -> NDArray[Any]:
    """(h, w) or (h, w, c) of a PNG, upright, or a numpy file without objects."""
    if path.suffix != ".npy":
        found = np.array(upright(path, str(path)))
    else:
        found = read_array(path, "the target", "mend or remove the file")
    if found.ndim not in (2, 3) or not found.size or found.dtype.kind not in "biuf":
        shape = "x".join(map(str, found.shape))
        raise CompressError(
            f"the target cannot be read: it is {shape or 'one number'} of {found.dtype}, not the pixels of an image",
            where=str(path),
            fix="mend or remove the file",
        )
    return found


def _target(source: _Pixels, values: NDArray[Any], every: tuple[int, int], path: Path) -> NDArray[Any]:
    """A file's values as `compress.data.tasks.Task` wants them."""
    if source.kind in ("labels", "mask", "depth", "edges") and values.ndim == 3:
        values = values[..., 0]
    if source.kind == "labels":
        near = _nearest(values, every)
        if not np.isfinite(near).all() or not (abs(near.astype(np.float64)) <= 1e6).all():
            raise CompressError("a label is no number", where=str(path), fix="write 255 where none is known")
        labels: NDArray[Any] = near.astype(np.int64)
        if source.from_one:
            labels = np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        if labels.min() < 0 or labels.max() > IGNORE:
            raise CompressError("a label is not from 0 to 255", where=str(path), fix="write 255 where none is known")
        return labels.astype(np.uint8)
    if source.kind == "depth":
        metres = _nearest(values, every).astype(np.float32) / (1 if np.issubdtype(values.dtype, np.floating) else 1000)
        found = np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)
        if float(found.max()) > FARTHEST:
            far = f"a depth is {float(found.max()):g} m"
            raise CompressError(far, where=str(path), fix="metres in .npy, millimetres in .png; 0 where none is known")
        return found
    if source.kind == "normals":
        if values.ndim != 3 or values.shape[2] != 3:
            raise CompressError("normals need three channels", where=str(path), fix="write x, y and z")
        near = _nearest(values, every)
        unit = near.astype(np.float32)
        if not np.issubdtype(values.dtype, np.floating):
            unit = np.where(near.any(2, keepdims=True), unit / (white_of(values, str(path)) / 2) - 1, 0)
        length = np.sqrt((unit * unit).sum(2, keepdims=True))
        # Black, NaN or next to no length: nothing is known there.
        known: NDArray[Any] = np.where(length > 0.1, unit / np.maximum(length, 1e-6), 0)
        return known.astype(np.float32).transpose(2, 0, 1)
    if source.kind == "edges":
        # A line a pixel wide stays one, however much smaller the image gets.
        share = np.array(_cropped(_grey((values > 0).astype(np.float32)), every))
        thin = min(1.0, max(every[0] / values.shape[0], every[1] / values.shape[1]))
        return np.asarray((share >= 0.5 * thin) * 255, dtype=np.uint8)
    most = 1 if values.max() <= 1 else white_of(values, str(path))
    return (_nearest(values, every).astype(np.float32) * (255 / most)).astype(np.uint8)


def _grey(values: NDArray[np.float32]) -> Any:
    from PIL import Image

    return Image.fromarray(values)


# --- boxes ----------------------------------------------------------------------------------------------------------

GREY = 114


@dataclass(frozen=True)
class _Objects:
    """One image's file, and (label, centre x, centre y, width, height) of every object (n, 5), in pixels of the upright
    image, as the file ``said`` has them; ``size`` is (width, height) as the annotations say it."""

    path: Path
    rows: NDArray[np.float64]
    said: Path
    size: tuple[int, int] | None = None


def _yolo(folder: Path, spec: DataSpec) -> Splits:
    """images/train/*, labels/train/*.txt with lines `class x y w h` as shares; val or test likewise, or no parts."""

    def read(part: str) -> list[_Objects] | None:
        place = folder / "images" / part
        if not place.is_dir():
            return None
        found = []
        for path in sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES):
            words = folder / "labels" / path.relative_to(folder / "images").with_suffix(".txt")
            size = np.array([1.0, *2 * size_of(path)])
            found.append(_Objects(path, _yolo_rows(words) * size, words))
        return found

    own = (folder / "images" / "train").is_dir()
    train = read("train" if own else "") or []
    test = next((f for f in map(read, HELD_OUT_NAMES) if f is not None), None) if own else None
    names: tuple[str, ...] = ()
    for file in ("data.yaml", "dataset.yaml", "classes.txt"):
        path = folder / file
        if os.path.lexists(path) and not names:
            names = _class_names(path)
    return _box_splits(folder, train, test, read("calibration") if own else None, names, spec)


def _yolo_rows(path: Path) -> NDArray[np.float64]:
    """(n, 5): the lines of a file of boxes; none where there is no file.

    Raises:
        CompressError: it cannot be read, or a line is none.
    """
    if not os.path.lexists(path):
        return np.zeros((0, 5))
    text = read_text(path, "the file of boxes", LISTED, "mend the file")
    if not text.strip():
        return np.zeros((0, 5))
    try:
        rows = np.loadtxt(io.StringIO(text), ndmin=2)[:, :5]
    except ValueError as e:
        raise CompressError(f"the boxes cannot be read: {e}", where=str(path), fix="mend the file") from e
    # What is no number is not within anything.
    shares = rows.shape[1] == 5 and ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all()
    if not shares or not ((rows[:, 0] % 1 == 0) & (rows[:, 0] >= 0) & (rows[:, 0] < CLASSES)).all():
        raise CompressError(
            "a line is not `class x y width height` with shares from 0 to 1", where=str(path), fix="mend it"
        )
    return rows


def _class_names(path: Path) -> tuple[str, ...]:
    """Names out of a YOLO data file (``names``: a list, or a map of numbers) or a list of lines."""
    if path.suffix != ".yaml":
        lines = read_text(path, "the list of classes", LISTED, "one class a line, in UTF-8").split("\n")
        return tuple(line for line in lines if line.strip())
    held = read_yaml(path, "the data file").value
    if not isinstance(held, dict):
        raise CompressError("this is no YOLO data file", where=str(path), fix="names: [person, car]")
    listed = held.get("names") or []
    if isinstance(listed, dict):
        if set(listed) != set(range(len(listed))) or any(type(n) is not int for n in listed):
            numbers = ", ".join(f"{n!s:.20}" for n in list(listed)[:5])
            raise CompressError(
                f"`names` does not number the classes from 0 on: {numbers}",
                where=str(path),
                fix="names: {0: person, 1: car}",
            )
        listed = [listed[i] for i in range(len(listed))]
    named = isinstance(listed, list) and all(isinstance(n, str | int | float) and str(n).strip() for n in listed)
    if not named or len({str(n) for n in listed}) != len(listed):
        raise CompressError("`names` is no list of classes, each once", where=str(path), fix="names: [person, car]")
    return tuple(str(n) for n in listed)


def _coco(folder: Path, spec: DataSpec) -> Splits:
    """annotations/instances_train2017.json and the images in train2017/ (or images/train2017/); val2017 likewise."""
    files = {part: next(iter(sorted((folder / "annotations").glob(f"*{part}*.json"))), None)
             for part in ("train", *HELD_OUT_NAMES, "calibration")}  # fmt: skip
    held_out_part = next((part for part in HELD_OUT_NAMES if files[part] is not None), None)
    wanted = [part for part in ("train", held_out_part, "calibration") if part is not None]
    every = {part: _CocoFile.read(path) for part in wanted if (path := files[part]) is not None}
    # The parts share one numbering of the classes, whichever of them a file names.
    categories: dict[int, str] = {}
    first = next(iter(every.values())).path.name if every else ""
    for one in every.values():
        for number, name in one.categories.items():
            if categories.setdefault(number, name) != name:
                raise CompressError(
                    f"the category {number} is {name!r:.40} here and {categories[number]!r:.40} in {first}",
                    where=str(one.path),
                    fix="give both files the same categories",
                )
    order = {number: i for i, number in enumerate(sorted(categories))}
    found = {part: one.objects(folder, order) for part, one in every.items()}
    names = tuple(categories[i] for i in sorted(categories))
    test = found.get(held_out_part) if held_out_part is not None else None
    return _box_splits(folder, found.get("train", []), test, found.get("calibration"), names, spec)


@dataclass(frozen=True)
class _CocoFile:
    """One file of annotations, each value of the kind that COCO's have. A box is (category, x, y, width, height)."""

    path: Path
    categories: dict[int, str]
    images: dict[int, tuple[str, tuple[int, int] | None]]
    boxes: dict[int, list[tuple[float, ...]]]

    @staticmethod
    def read(path: Path) -> _CocoFile:
        """Raises CompressError where it is no such file; the field is named."""
        what, where, fix = "the file of annotations", str(path), "mend the file"

        def refuse(said: str) -> NoReturn:
            raise CompressError(f"{what} is not COCO's: {said}", where=where, fix=fix)

        def rows(key: str) -> Iterator[tuple[str, dict[str, Any]]]:
            for i, row in enumerate(member(held, key, list, what, where, fix=fix)):
                yield f"{key}.{i}", typed(row, dict, f"{key}.{i}", what, where, fix)

        held = typed(read_json(path, what, limit=ANNOTATIONS, fix=fix), dict, "", what, where, fix)
        categories: dict[int, str] = {}
        images: dict[int, tuple[str, tuple[int, int] | None]] = {}
        for at, row in rows("categories"):
            number = member(row, "id", int, what, where, at, fix)
            if number in categories:
                refuse(f"the category {number} stands twice")
            categories[number] = member(row, "name", str, what, where, at, fix)
        for at, row in rows("images"):
            number = member(row, "id", int, what, where, at, fix)
            name = member(row, "file_name", str, what, where, at, fix)
            if number in images:
                refuse(f"the image {number} stands twice")
            if not _PLAIN.fullmatch(name) or ".." in name.split("/"):
                refuse(f"'{at}.file_name' is {name!r:.80}, not the name of a file below the folder of images")
            size = [row.get(k) for k in ("width", "height")]
            if any(v is not None and (type(v) is not int or not 0 <= v <= 10**6) for v in size):
                refuse(f"'{at}' is {size[0]!r:.20} wide and {size[1]!r:.20} high")
            images[number] = name, (size[0], size[1]) if size[0] and size[1] else None
        boxes: dict[int, list[tuple[float, ...]]] = {number: [] for number in images}
        for at, row in rows("annotations"):
            image, category = (member(row, k, int, what, where, at, fix) for k in ("image_id", "category_id"))
            if image not in images or category not in categories:
                refuse(
                    f"'{at}' names the image {image!s:.20} and the category {category!s:.20}, which are not both there"
                )
            sides = [
                typed(v, float, f"{at}.bbox", what, where, fix) for v in member(row, "bbox", list, what, where, at, fix)
            ]
            if len(sides) != 4 or min(sides[2:]) < 0 or max(map(abs, sides)) > 10**6:
                refuse(f"'{at}.bbox' is {sides!r:.80}, not x, y, width and height")
            if not row.get("iscrowd"):
                boxes[image].append((category, *sides))
        return _CocoFile(path, categories, images, boxes)

    def objects(self, folder: Path, order: Mapping[int, int]) -> list[_Objects]:
        """The images that it names, which must be there, and their boxes with classes as ``order`` numbers them."""
        stem = self.path.stem.removeprefix("instances_")
        roots = [r for r in (folder / stem, folder / "images" / stem, folder / "images") if r.is_dir()]
        found = []
        for number, (name, size) in self.images.items():
            file = next((r / name for r in roots if (r / name).is_file()), None)
            if file is None:
                raise CompressError(
                    f"the image {name!r} is missing, which {self.path.name} names",
                    where=str(folder),
                    fix=f"put it into {stem}/",
                )
            rows = [[order[int(c)], x + w / 2, y + h / 2, w, h] for c, x, y, w, h in self.boxes[number]]
            found.append(_Objects(file, np.array(rows, dtype=np.float64).reshape(-1, 5), self.path, size))
        return found


def _box_splits(
    folder: Path,
    train: list[_Objects],
    test: list[_Objects] | None,
    calibration: list[_Objects] | None,
    names: tuple[str, ...],
    spec: DataSpec,
) -> Splits:
    """Images scaled into a square, grey beside them, and the boxes as shares of it."""
    if spec.size is None:
        raise CompressError("images for a detector need one size", where=f"data {folder}", fix="--set data.size=320")
    size, parts = spec.size, [p for p in (train, test, calibration) if p is not None]
    every = [one.rows for part in parts for one in part]
    most = max([1, *(len(rows) for rows in every)])
    largest = max([-1.0, *(rows[:, 0].max() for rows in every if len(rows))])
    if largest < 0:
        raise CompressError("there is no box", where=f"data {folder}", fix="check where the annotations lie")
    if names and largest >= len(names):
        raise CompressError(
            f"class {int(largest)} is not among the {len(names)} names", where=f"data {folder}", fix="name all classes"
        )

    def read(part: list[_Objects]) -> Split:
        from PIL import Image

        check_room(len(part), size, size)
        images = torch.full((len(part), 3, size, size), GREY, dtype=torch.uint8)
        boxes = torch.zeros(len(part), most, 5)
        boxes[..., 0] = -1
        with Progress(len(part), "reading images and boxes") as bar:
            for i, one in enumerate(part):
                with opened(one.path, spec.white) as image:
                    _check_size(one, image.size)
                    _check_inside(one, image.size)
                    factor = size / max(image.size)
                    width, height = (max(1, round(side * factor)) for side in image.size)
                    left, top = (size - width) // 2, (size - height) // 2
                    small = image.resize((width, height), Image.Resampling.BILINEAR)
                    images[i, :, top : top + height, left : left + width] = pixels(small)
                    scale = np.array([width / image.width, height / image.height])
                placed = one.rows.copy()
                placed[:, 1:3] = one.rows[:, 1:3] * scale + [left, top]
                placed[:, 3:5] = one.rows[:, 3:5] * scale
                placed[:, 1:] /= size
                boxes[i, : len(placed)] = torch.from_numpy(placed).float()
                bar.update(1)
        return Split(images, {"boxes": boxes})

    classes = names or tuple(map(str, range(int(largest) + 1)))
    return splits_of(
        read(train),
        read(test) if test is not None else None,
        [Task("boxes", "boxes", classes)],
        spec,
        f"folder {folder}",
        read(calibration) if calibration is not None else None,
    )


def _check_size(one: _Objects, size: tuple[int, int]) -> None:
    """Raises CompressError where the annotations were made for an image of another size, or for one not yet upright."""
    if one.size is not None and one.size != size:
        turned = one.size == size[::-1]
        raise CompressError(
            f"the annotations are of an image of {one.size[0]}x{one.size[1]} pixels, the file has {size[0]}x{size[1]}"
            + (" when it is turned upright as its EXIF says" if turned else ""),
            where=str(one.path),
            fix="annotate the upright image, or take the orientation out of the file's EXIF"
            if turned
            else "use the images that the annotations were made for",
        )


def _check_inside(one: _Objects, size: tuple[int, int]) -> None:
    """Raises CompressError where a box lies wholly beside its image."""
    least, most = one.rows[:, 1:3] - one.rows[:, 3:5] / 2, one.rows[:, 1:3] + one.rows[:, 3:5] / 2
    beside = (most < 0).any(1) | (least > size).any(1)
    if beside.any():
        raise CompressError(
            f"a box of {one.path.name} lies beside the image, which has {size[0]}x{size[1]} pixels",
            where=str(one.said),
            fix="boxes are of the upright image, in its pixels",
        )
