"""What a verb writes beside a run: all of it, or nothing, and one error that says why."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import CompressError


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """An empty folder in ``folder``, which is made if need be. What is in it when the block ends stands in ``folder``
    then; when an error ends the block, nothing that was made here stays. What the block itself writes belongs into
    `disk_errors`.

    Raises:
        CompressError: it cannot be written, or the disk is full.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    beside = None
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=".compress-", suffix=".partial", dir=folder))
        yield beside
        with disk_errors(folder):
            for path in sorted(p for p in beside.rglob("*") if p.is_file()):
                place = folder / path.relative_to(beside)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
    finally:
        if beside is not None:
            shutil.rmtree(beside)
        for path in made:
            with contextlib.suppress(OSError):  # it holds something now, or was never made
                path.rmdir()


def append(path: Path, text: str) -> None:
    """Adds to the end of a file, whole or not at all; without text it only finds out whether that can be done.

    Raises:
        CompressError: it cannot be written, or the disk is full.
    """
    before = path.stat().st_size if path.is_file() else None
    after = before
    try:
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(text)
        after = path.stat().st_size if text else before
    finally:
        if path.is_file() and after is None:
            path.unlink()
        elif path.is_file() and path.stat().st_size != after:
            os.truncate(path, after or 0)


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """The system's errors in a block that writes to ``place``, as one of ours."""
    try:
        yield
    except OSError as e:
        if e.errno == errno.ENOSPC:
            there = next(p for p in (place, *place.parents) if p.exists())
            free = shutil.disk_usage(there).free
            raise CompressError(
                f"the disk is full ({free:,} bytes are free)", where=str(place), fix="free space, or name another place"
            ) from e
        raise CompressError(
            f"it cannot be written: {e.strerror or e}", where=str(place), fix="name another place, or mend its rights"
        ) from e
