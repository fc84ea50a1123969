"""A table of images: the path of an image a row, and columns of what is to be said of it.

    path,breed,age,collar,split
    photos/0001.jpg,beagle,3.5,1,train

Columns of classes and of numbers are a task each; columns of attributes (0 or 1) are one task, ``attributes``. What is
wrong in it is told by its file, row and column, before an image is decoded.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from compress.data.decode import SUFFIXES, size_of
from compress.data.folder_images import Fit, FolderImages, held
from compress.data.images import LISTED, Split, Splits, check_room, splits_of
from compress.data.tasks import IGNORE, Task
from compress.errors import CompressError
from compress.schema.sections import DataSpec
from compress.system.files import read_text

PARTS = {"train": "train", "training": "train", "calibration": "calibration", "test": "test"}
HELD_OUT = ("val", "valid", "validation")  # calibration where there is a test part, else the test part
ATTRIBUTES = "attributes"
MOST_CLASSES = 100_000
LARGEST = 1e15  # of a number


@dataclass(frozen=True)
class _Table:
    """Cells by column, and the line of the file that each row ends on."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    unknown: str | None

    def cells(self, column: str) -> list[str]:
        at = self.columns.index(column)
        return [row[at] for row in self.rows]

    def is_unknown(self, cell: str) -> bool:
        return self.unknown is not None and cell == self.unknown

    def refuse(self, row: int, column: str, what: str, fix: str) -> NoReturn:
        raise CompressError(what, where=f"{self.path}, row {self.lines[row]}, column {column!r:.60}", fix=fix)


@dataclass(frozen=True)
class _Checked:
    """What the rows of a table say: the part and the image of each, and the tasks with all rows' targets."""

    parts: list[str]
    images: list[Path]
    tasks: list[Task]
    targets: dict[str, Tensor]


def check_table(path: Path, spec: DataSpec) -> None:
    """Reads a table as `from_table` does, and sees whether its images are there; opens none of them.

    Raises:
        CompressError: as `from_table`, but for what is in the images.
    """
    _checked(path, spec)


def _checked(path: Path, spec: DataSpec) -> _Checked:
    table = _read(path, spec)
    first = spec.path_column or table.columns[0]
    for column in (first, *spec.columns, *([spec.split_column] if spec.split_column else [])):
        if column not in table.columns:
            raise CompressError(
                f"the table has no column {column!r:.60}", where=str(path), fix=f"it has: {', '.join(table.columns)}"
            )
    parts = _parts(table, spec.split_column)
    kinds = _kinds(table, spec, first)
    images = _images(table, first, spec.images or path.parent)
    train = [i for i, part in enumerate(parts) if part == "train"]
    if not train:
        raise CompressError("no row is of the training part", where=str(path), fix="say train in some rows")
    return _Checked(parts, images, *_targets(table, kinds, train))


def from_table(path: Path, spec: DataSpec) -> Splits:
    """Splits of a table; what it does not say is cut off its training part.

    Raises:
        CompressError: the table cannot be read, a cell is empty or is not what its column holds, an image is missing, a
            part has a class that training has not.
    """
    rows = _checked(path, spec)
    parts, images, tasks, targets = rows.parts, rows.images, rows.tasks, rows.targets
    train = [i for i, part in enumerate(parts) if part == "train"]
    size = spec.size or min(size_of(images[train[0]]))
    check_room(min(len(images), 128), 2 * size, 2 * size)  # a batch, as bytes and as floats
    fit = Fit.of(spec, size)

    def split(part: str) -> Split | None:
        at = [i for i, own in enumerate(parts) if own == part]
        if not at:
            return None
        chosen = torch.tensor(at)
        inputs = held(FolderImages([images[i] for i in at], fit))
        return Split(inputs, {name: target[chosen] for name, target in targets.items()})

    whole = split("train")
    assert whole is not None  # asked above
    return splits_of(whole, split("test"), tasks, spec, f"table {path.name}", split("calibration"))


def _read(path: Path, spec: DataSpec) -> _Table:
    fix = "a CSV file with a line of names first, in UTF-8"
    if not path.is_file():
        raise CompressError("there is no such table", where=str(path), fix="check data.table")
    text = read_text(path, "the table", LISTED, fix).removeprefix("\ufeff")
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            if row:  # an empty line is none
                rows.append(tuple(cell.strip() for cell in row))
                lines.append(reader.line_num)
    except csv.Error as e:
        raise CompressError(f"the table cannot be read: {e}", where=f"{path}, line {reader.line_num}", fix=fix) from e
    if len(rows) < 2:
        raise CompressError("the table has no rows", where=str(path), fix=fix)
    columns = rows[0]
    if len(set(columns)) != len(columns) or not all(columns):
        raise CompressError("two columns have one name, or one has none", where=f"{path}, row 1", fix=fix)
    wrong = next((i for i, row in enumerate(rows) if len(row) != len(columns)), None)
    if wrong is not None:
        raise CompressError(
            f"the row has {len(rows[wrong])} cells, and there are {len(columns)} columns",
            where=f"{path}, row {lines[wrong]}",
            fix="mend the row; a cell that holds the delimiter stands in quotes",
        )
    return _Table(path, columns, tuple(rows[1:]), tuple(lines[1:]), spec.unknown)


def _parts(table: _Table, column: str | None) -> list[str]:
    """The part of every row."""
    if column is None:
        return ["train"] * len(table.rows)
    cells = table.cells(column)
    known = {**PARTS, **dict.fromkeys(HELD_OUT, "calibration" if "test" in cells else "test")}
    for i, cell in enumerate(cells):
        if cell not in known:
            said = f"{cell!r:.60} is no part" if cell else "the cell is empty"
            table.refuse(i, column, said, "say train, calibration or test")
    return [known[cell] for cell in cells]


def _kinds(table: _Table, spec: DataSpec, first: str) -> dict[str, str]:
    """The kind of every column that is a task."""
    if spec.columns:
        return dict(spec.columns)
    found = {}
    for column in table.columns:
        if column in (first, spec.split_column):
            continue
        cells = [c for c in table.cells(column) if c and not table.is_unknown(c)]
        if cells and all(_number(c) is not None for c in cells):
            raise CompressError(
                f"the column {column!r:.60} holds numbers, which may be classes, attributes or numbers",
                where=str(table.path),
                fix=f"say what the tasks are: --set 'data.columns={{{column}: number}}'",
            )
        found[column] = "classes"
    if not found:
        raise CompressError(
            "the table has no column but the paths", where=str(table.path), fix="add what is to be said"
        )
    return found


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= LARGEST else None


def _images(table: _Table, column: str, root: Path) -> list[Path]:
    """The image of every row; each lies in ``root``."""
    if not root.is_dir():
        raise CompressError("there is no such folder", where=str(root), fix="check data.images")
    folder = os.path.abspath(root)
    found: list[Path] = []
    for i, cell in enumerate(table.cells(column)):
        if not cell:
            table.refuse(i, column, "the cell is empty", "name the image, or take the row out")
        path = os.path.normpath(os.path.join(folder, cell)) if "\0" not in cell else ""
        if not path.startswith(folder + os.sep):
            table.refuse(i, column, f"{cell!r:.80} leaves {root}", "name the folder of all images: data.images")
        if not os.path.isfile(path):
            table.refuse(i, column, f"there is no image {cell!r:.80} in {root}", "mend the path, or take the row out")
        if Path(path).suffix.lower() not in SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            table.refuse(i, column, f"{cell!r:.80} is no image", f"images are {known}")
        found.append(Path(path))
    return found


def _targets(table: _Table, kinds: Mapping[str, str], train: Sequence[int]) -> tuple[list[Task], dict[str, Tensor]]:
    """The tasks and the targets of all rows; classes, centre and scale are those of the training rows."""
    tasks: list[Task] = []
    targets: dict[str, Tensor] = {}
    for column, kind in kinds.items():
        cells = table.cells(column)
        for i, cell in enumerate(cells):
            if not cell:
                table.refuse(i, column, "the cell is empty", "fill it, take the row out, or say data.unknown")
        if kind == "classes":
            task, target = _classes(table, column, cells, train)
        elif kind == "number":
            task, target = _numbers(table, column, cells, train)
        else:
            continue
        tasks.append(task)
        targets[column] = target
    names = tuple(column for column, kind in kinds.items() if kind == "attribute")
    if names:
        if ATTRIBUTES in targets:
            raise CompressError(
                f"a column is called {ATTRIBUTES}, as the task of all attributes is",
                where=str(table.path),
                fix="give the column another name",
            )
        tasks.append(Task(ATTRIBUTES, "attributes", names))
        targets[ATTRIBUTES] = torch.stack([_attribute(table, name) for name in names], 1)
    order = [ATTRIBUTES if kind == "attribute" else column for column, kind in kinds.items()]
    tasks.sort(key=lambda task: order.index(task.name))
    return tasks, targets


def _classes(table: _Table, column: str, cells: Sequence[str], train: Sequence[int]) -> tuple[Task, Tensor]:
    names = sorted({cells[i] for i in train if not table.is_unknown(cells[i])})
    if len(names) > MOST_CLASSES:
        said = f"the column has {len(names):,} classes"
        raise CompressError(said, where=f"{table.path}, column {column!r:.60}", fix="say data.columns")
    number = {name: i for i, name in enumerate(names)}
    for i, cell in enumerate(cells):
        if cell not in number and not table.is_unknown(cell):
            table.refuse(i, column, f"the label {cell!r:.60} is in no training row", "mend it, or train on such rows")
    return Task(column, "classes", tuple(names)), torch.tensor([number.get(cell, -1) for cell in cells])


def _numbers(table: _Table, column: str, cells: Sequence[str], train: Sequence[int]) -> tuple[Task, Tensor]:
    values = []
    for i, cell in enumerate(cells):
        value = math.nan if table.is_unknown(cell) else _number(cell)
        if value is None:
            table.refuse(i, column, f"{cell!r:.60} is no number", "mend it, or say data.unknown")
        values.append(value)
    target = torch.tensor(values, dtype=torch.float64)
    known = target[torch.tensor(train)]
    known = known[~known.isnan()]
    scale = float(known.std(correction=0)) if len(known) else 0.0
    if not scale > 0:
        raise CompressError(
            "all training rows have the same number" if len(known) else "no training row has a number",
            where=f"{table.path}, column {column!r:.60}",
            fix="leave the column out: data.columns",
        )
    return Task(column, "number", centre=float(known.mean()), scale=scale), target.float()


def _attribute(table: _Table, column: str) -> Tensor:
    """(n,) uint8 of 0, 1 and 255 where it is not known."""
    values = []
    for i, cell in enumerate(table.cells(column)):
        number = _number(cell)
        if table.is_unknown(cell):
            values.append(IGNORE)
        elif number in (0.0, 1.0):
            values.append(int(number))
        else:
            table.refuse(i, column, f"{cell!r:.60} is neither 0 nor 1", "write 1 where it holds, 0 elsewhere")
    return torch.tensor(values, dtype=torch.uint8)
