"""Folders with a value for every pixel: NYUDv2 and PASCAL-Context."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.data.decode import SUFFIXES, opened, pixels, size_of, upright, white_of
from compress.data.images import LISTED, RELATIVE, Split, Splits, check_room, splits_of
from compress.data.tasks import IGNORE, KindName, Task
from compress.errors import CompressError
from compress.run.progress import Progress
from compress.schema.sections import DataSpec
from compress.system.arrays import read_array
from compress.system.files import read_text

FARTHEST = 1e5  # metres


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


def nyud(folder: Path, spec: DataSpec) -> Splits:
    """NYUDv2 as multitask work has it: images/, segmentation/ (0 unknown, 1 to 40), depth/ (npy metres, png mm),
    normals/ and edges/; names in gt_sets/train.txt and val.txt. Held in memory, all pixels of one size."""
    sources = [
        _Pixels("segmentation", "labels", ("segmentation",), tuple(map(str, range(1, NYUD_CLASSES + 1))), True),
        _Pixels("depth", "depth", ("depth",)),
        _Pixels("normals", "normals", ("normals",)),
        _Pixels("edges", "edges", ("edges", "edge")),
    ]
    return _pixel_folder(folder, "images", folder / "gt_sets", sources, spec)


def pascal(folder: Path, spec: DataSpec) -> Splits:
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
    strange = next((n for n in names if not RELATIVE.fullmatch(n) or ".." in n.split("/")), None)
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
