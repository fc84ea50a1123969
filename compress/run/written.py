"""What a verb writes beside a run: all of it, or nothing, and one error that says why.

`compress.system.files` is how one file or folder gets its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import CompressError, UsageError
from compress.run.lock import MARK as LOCKED
from compress.run.lock import Lock
from compress.system.files import disk_errors, settle

MARK = ".compress-writes-here"  # in a folder that is being made: the lock of the process that makes it
# What stands in every file of a kind that we write, whatever the model: gate.json, bench.json; junit.xml; a card,
# summary.md; report.html.
OURS = {
    ".json": ((b'"budgets"', b'"exit_code"'), (b'"ratios"', b'"process_medians"')),
    ".xml": ((b'<testsuites name="compress gate"',),),
    ".md": ((b"## compress gate: ",), (b"`compress verify", b"`report.json`")),
    ".html": ((b'id="charts"', b"<footer>report.json "),),
}


def is_ours(path: Path) -> bool:
    """Whether a file was written by a verb of ours, by what stands in it; a picture, by what stands beside it."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.suffix == ".png":
        folders = (path.parent, path.parent.parent) if path.parent.name == "plots" else (path.parent,)
        return any(is_ours(p) for folder in folders for p in sorted(folder.iterdir()) if p.suffix in OURS)
    held = path.read_bytes() if path.suffix in OURS else b""
    return any(all(mark in held for mark in marks) for marks in OURS.get(path.suffix, ()))


def refuse_replacing(places: Iterable[Path]) -> None:
    """Raises:
    UsageError: one of the files is there, and was not written by a verb of ours.
    """
    for place in places:
        if (place.exists() or place.is_symlink()) and not is_ours(place):
            raise UsageError(
                f"there is a {place.name} already, and compress did not write it",
                where=str(place),
                fix="move it away, or name another place",
            )


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes ``folder`` when the block ends well, by one rename; otherwise nothing is left.

    It is made in ``.<name>.partial`` beside it, under a lock. What a kill has left there is removed the next time, for
    it holds our lock file; anything else of that name is left alone.

    Raises:
        UsageError: ``folder`` is a file, holds something, or cannot be replaced.
        CompressError: another process writes it, it cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(folder))
    _refuse_taken(folder, target)
    partial = target.with_name(f".{target.name}.partial")
    parents: list[Path] = []
    lock = None
    try:
        with disk_errors(folder):
            parents = [p for p in target.parents if not p.exists()]
            lock = _claim(folder, partial)
            made = partial / target.name
            made.mkdir()
        _refuse_taken(folder, target)
        with _named(made, folder), disk_errors(folder, every=False):
            yield made
        with disk_errors(folder):
            settle(made, target)  # onto nothing, or an empty folder
    finally:
        if lock is not None:
            shutil.rmtree(partial)
            lock.release()
        for path in parents:
            with contextlib.suppress(OSError):  # it holds something now, or was never made
                path.rmdir()


def _refuse_taken(folder: Path, target: Path) -> None:
    fix = "name another --out folder"
    with disk_errors(folder, fix=fix):
        if os.path.lexists(target) and not target.is_dir():
            raise UsageError("this is no folder", where=str(folder), fix=fix)
        if target.is_dir() and any(target.iterdir()):
            raise UsageError("the folder is not empty", where=str(folder), fix=fix)
        if target.is_dir() and (target == Path(os.path.realpath(".")) or os.path.ismount(target)):
            raise UsageError("this folder cannot be replaced", where=str(folder), fix="name a folder in it")


def _claim(folder: Path, partial: Path) -> Lock:
    """Makes ``partial`` with its lock file in it, or takes over what a killed process has left; it holds nothing else.

    Raises:
        CompressError: another process holds it, or it is not ours.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not partial.exists() and not partial.is_symlink():
        beside = Path(tempfile.mkdtemp(prefix=f"{partial.name}.", dir=partial.parent))
        lock = Lock.take(beside / MARK)
        try:
            beside.rename(partial)  # never seen without its lock file
            return lock
        except OSError as e:
            shutil.rmtree(beside)
            lock.release()
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
    if not _left_by_us(partial):
        raise CompressError(
            f"{partial.name} is in the way, and was not made by compress",
            where=str(partial),
            fix="move it away, or name another --out folder",
        )
    try:
        lock = Lock.take(partial / MARK)
    except CompressError as e:
        if "another run holds" not in e.what:
            raise
        who = re.search(r"\((.*)\)", e.what)
        raise CompressError(
            f"another process is writing this folder ({who[1] if who else 'unknown'})",
            where=str(folder),
            fix="wait for it, or name another --out folder",
        ) from e
    for entry in partial.iterdir():
        if entry.name != MARK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return lock


def _left_by_us(partial: Path) -> bool:
    """Whether a folder holds our lock file, as `Lock` writes it, and at most the one folder that is made beside it."""
    mark = partial / MARK
    if partial.is_symlink() or not partial.is_dir() or mark.is_symlink() or not mark.is_file():
        return False
    becomes = partial.name.removeprefix(".").removesuffix(".partial")
    if {p.name for p in partial.iterdir() if not p.name.startswith(MARK)} - {becomes}:
        return False
    return mark.read_bytes().startswith(LOCKED)


@contextmanager
def _named(made: Path, folder: Path) -> Iterator[None]:
    """An error in the block names the folder as it was asked for, not where it is being made."""
    try:
        yield
    except CompressError as e:
        e.rename(made, folder)
        raise


@contextmanager
def written(
    folder: Path, names: Iterable[str] = (), refuse: Callable[[Iterable[Path]], None] | None = None
) -> Iterator[Path]:
    """An empty folder in ``folder``, which is made if need be. What is in it when the block ends stands in ``folder``
    then; when an error ends the block, nothing that was made here stays. What the block itself writes belongs into
    `disk_errors`.

    Args:
        names: files that the block will write, for which ``refuse`` is asked before the work as well.
        refuse: raises where one of the places is taken by what must stay, as `refuse_replacing` does.

    Raises:
        CompressError: it cannot be written, or the disk is full.
    """
    if refuse is not None and folder.is_dir():
        refuse(folder / name for name in names)
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    beside = None
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=".compress-", suffix=".partial", dir=folder))
        yield beside
        found = sorted(p for p in beside.rglob("*") if p.is_file())
        if refuse is not None:
            refuse(folder / path.relative_to(beside) for path in found)
        with disk_errors(folder):
            for path in found:
                place = folder / path.relative_to(beside)
                place.parent.mkdir(parents=True, exist_ok=True)
                settle(path, place)
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
