"""Folders with boxes: YOLO's and COCO's."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from compress.data.decode import SUFFIXES, opened, pixels, size_of
from compress.data.images import HELD_OUT_NAMES, LISTED, RELATIVE, Split, Splits, check_room, splits_of
from compress.data.tasks import Task
from compress.errors import CompressError
from compress.run.progress import Progress
from compress.run.strict_json import member, read_json, typed
from compress.schema.sections import DataSpec
from compress.schema.strict_yaml import read_yaml
from compress.system.files import read_text

ANNOTATIONS = 2 << 30  # bytes of a file of annotations; COCO's own has 0.45 GB
CLASSES = 100_000  # no data set has more
GREY = 114


@dataclass(frozen=True)
class _Objects:
    """One image's file, and (label, centre x, centre y, width, height) of every object (n, 5), in pixels of the upright
    image, as the file ``said`` has them; ``size`` is (width, height) as the annotations say it."""

    path: Path
    rows: NDArray[np.float64]
    said: Path
    size: tuple[int, int] | None = None


def yolo(folder: Path, spec: DataSpec) -> Splits:
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


def coco(folder: Path, spec: DataSpec) -> Splits:
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
            if not RELATIVE.fullmatch(name) or ".." in name.split("/"):
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
