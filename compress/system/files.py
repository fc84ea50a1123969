"""Whole files: a name stands for all of what was to be written, and it is on the disk, or it does not stand there.

Every file and folder that a kill might leave half written is made beside its place and settled by one rename. What the
system says of a full or closed disk becomes one error here.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compress.errors import CompressError
from compress.system import host

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
CLOSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# safetensors, protobuf's writers and the runtimes wrap the system's words in an error of their own.
# The last two are numpy's, which keeps no number of an error.
SAID = (
    "No space left on device", "os error 28", "Disk quota exceeded", "os error 122", "problem writing element",
    " requested and ",
)  # fmt: skip
LEFT_SECONDS = 24 * 3600.0  # what a kill has left half written and nobody has touched for so long is removed


class DiskFull(CompressError):
    """The disk, or this user's share of it, is full."""


POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    if host.WINDOWS and path.is_dir():
        return  # its names are written with the files; a folder has no handle there
    handle = os.open(path, os.O_RDWR if host.WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(made: Path, place: Path) -> None:
    """Gives a file, or a folder with all that is in it, its name by one rename, once every byte is on the disk.

    Raises:
        OSError: it cannot; ``place`` may be a file, or an empty folder where ``made`` is a folder.
    """
    for path in (*(made.rglob("*") if made.is_dir() else ()), made):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync(path)
    if host.WINDOWS and made.is_dir() and place.is_dir():
        place.rmdir()  # no rename takes an empty folder's place there
    made.replace(place)
    sync(place.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to; it becomes ``path`` when the block ends well, and is removed otherwise.

    Two processes that write one file do not meet: the last one's stands. The folder is made if need be.

    Raises:
        CompressError: it cannot be written, or the disk is full.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with disk_errors(path, every=False):
            yield partial
        with disk_errors(path):
            settle(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """`whole_file` of a text in UTF-8."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _sweep(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.partial"):
        with contextlib.suppress(FileNotFoundError):  # another process swept it
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink()


@contextlib.contextmanager
def _unreadable(path: Path, what: str, fix: str) -> Iterator[None]:
    """What the system says of a file that is missing or closed, as one error."""
    try:
        yield
    except FileNotFoundError as e:
        raise CompressError(f"{what} is missing", where=str(path), fix=fix) from e
    except (OSError, ValueError) as e:  # a ValueError: the name holds a NUL
        raise CompressError(
            f"{what} cannot be read: {getattr(e, 'strerror', None) or e}", where=str(path), fix=fix
        ) from e


def check_regular(path: Path, what: str, fix: str) -> None:
    """Raises CompressError where there is no regular file: of a pipe, a library would wait for bytes for ever."""
    with _unreadable(path, what, fix):
        about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise CompressError(f"{what} is no file", where=str(path), fix=fix)
    if about.st_size < POINTER_BYTES:
        with _unreadable(path, what, fix):
            _refuse_pointer(path, path.read_bytes(), what)


def _refuse_pointer(path: Path, data: bytes, what: str) -> None:
    """Raises CompressError where a clone without Git LFS has left a note of a file in the file's place."""
    if data.startswith(POINTER):
        raise CompressError(
            f"{what} was not fetched: a pointer of Git LFS is in its place",
            where=str(path),
            fix="in the clone: git lfs install && git lfs pull; or download the file itself",
        )


def read_text(path: Path, what: str, limit: int, fix: str) -> str:
    """`read_bytes` of a text in UTF-8, lines ended as in Python."""
    data = read_bytes(path, what, limit, fix)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise CompressError(f"{what} is not UTF-8 (byte {e.start})", where=str(path), fix=fix) from e


def read_bytes(path: Path, what: str, limit: int, fix: str) -> bytes:
    """A regular file's bytes, ``limit`` at most; `CompressError` otherwise. A pipe or a device is never waited for."""
    with _unreadable(path, what, fix):
        handle = host.open_to_read(str(path))
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise CompressError(f"{what} is no file", where=str(path), fix=fix)
            with os.fdopen(handle, "rb", closefd=False) as file:
                pieces, left = [], limit + 1
                # Piece by piece: room for the limit is not made for a file of a few bytes.
                while left > 0 and (piece := file.read(min(left, 1 << 20))):
                    pieces.append(piece)
                    left -= len(piece)
                data = b"".join(pieces)
        finally:
            os.close(handle)
    _refuse_pointer(path, data, what)
    if len(data) > limit:
        raise CompressError(f"{what} is longer than {limit:,} bytes", where=str(path), fix=fix)
    return data


def matching(patterns: Sequence[str], what: str) -> list[str]:
    """The files that paths or glob patterns mean, those of a pattern in the order of their names.

    Args:
        what: they are, for the error: ``the text files``.

    Raises:
        CompressError: a pattern matches nothing.
    """
    found = []
    for pattern in patterns:
        # A file's own name may hold what is special in a pattern.
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise CompressError(
                "no file matches",
                where=pattern if pattern.strip() else repr(pattern),
                fix=f"check the path or pattern of {what}",
            )
        found += paths
    return found


def disk_error(
    error: Exception, place: Path, what: str = "it", full: str | None = None, fix: str | None = None
) -> CompressError | None:
    """What a full disk, a read-only one or missing rights make of a write to ``place``, as one of ours; None where
    ``error`` says something else. Whatever else it names as the file it failed at is named."""
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL or any(said in str(error) for said in SAID):
        there = next(p for p in (place, *place.absolute().parents) if p.exists())
        return DiskFull(
            f"the disk is full ({shutil.disk_usage(there).free:,} bytes are free)",
            where=str(place),
            fix=full or "free space, or name another place",
        )
    if number not in CLOSED:
        return None
    named = getattr(error, "filename", None)
    elsewhere = isinstance(named, str) and not Path(named).absolute().is_relative_to(place.absolute())
    elsewhere = elsewhere and Path(str(named)).parent.absolute() != place.parent.absolute()
    if elsewhere:
        return CompressError(
            f"it cannot be opened: {os.strerror(number or 0)}", where=str(named), fix="mend its rights"
        )
    return _closed(error, place, what, fix)


def _closed(error: Exception, place: Path, what: str, fix: str | None) -> CompressError:
    return CompressError(
        f"{what} cannot be written: {getattr(error, 'strerror', None) or error}",
        where=str(place),
        fix=fix or "name another place, or mend its rights",
    )


@contextmanager
def disk_errors(
    place: Path, what: str = "it", *, full: str | None = None, fix: str | None = None, every: bool = True
) -> Iterator[None]:
    """The disk's errors in a block that writes to ``place``, as one of ours.

    Args:
        what: is said to be what cannot be written.
        full: what helps where the disk is full.
        fix: what helps where it cannot be written.
        every: whatever the system says is of writing; false in a block of other work, where only what `disk_error`
            knows is.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as e:
        found = disk_error(e, place, what, full, fix)
        if found is None and every and isinstance(e, OSError):
            found = _closed(e, place, what, fix)
        if found is None:
            raise
        raise found from e
