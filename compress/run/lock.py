"""One run at a time in a folder, on one machine or over a network file system; no crash leaves a lock.

On one machine the kernel's lock (flock) decides; it goes with the process. Between machines, where a file system may
not pass it on, the holder touches the file every few seconds; one that nobody has touched for a minute is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.system import host
from compress.system.files import disk_errors

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
MARK = b"This file keeps two processes of compress out of one another's way, and marks the folder as made by it.\n"


class Lock:
    """A held lock. Use `Lock.take`."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, path: Path) -> Lock:
        """Makes the folder if need be, and holds it.

        Raises:
            CompressError: another run holds it, it cannot be written, or it holds something that is no run.
            OSError: the disk became full while its holder was written.
        """
        folder = path.parent
        handle = _opened(path)
        try:
            alone = host.lock(handle)
            if not os.path.samestat(os.fstat(handle), os.lstat(path)):
                raise FileNotFoundError  # the run that held it has removed it meanwhile
            holder = _holder(handle)
            if alone is False or (holder and _lives(holder, handle, path, alone)):
                raise CompressError(
                    f"another run holds this folder ({_words(holder)})",
                    where=str(folder),
                    fix="wait for it, stop it, or name another folder with --out",
                )
            _write(handle, {"process": os.getpid(), "host": socket.gethostname(), "started": host.started(os.getpid())})
        except FileNotFoundError as e:
            os.close(handle)
            raise CompressError(
                "another run has just removed this folder", where=str(folder), fix="give the same command again"
            ) from e
        except BaseException:
            os.close(handle)
            raise
        return cls(path, handle)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            # The disk may be full or the server away for a moment: the next beat tries again.
            with contextlib.suppress(OSError):
                host.touch(self._handle, str(self._path))

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, len(MARK))
        os.close(self._handle)


def _opened(path: Path) -> int:
    """A handle of the lock file, which is made in an empty folder, and is known by its mark anywhere else."""
    folder = path.parent
    with disk_errors(folder, "the run folder", fix="name another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        there = {e.name for e in folder.iterdir()}
        if there and path.name not in there:
            raise _foreign(folder)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise _foreign(folder)
        handle = host.open_shared(str(path))
    head = host.read_at(handle, len(MARK), 0)
    # A crash can cut the mark short before there is anything else.
    if head != MARK and (there - {path.name} or not MARK.startswith(head)):
        os.close(handle)
        raise _foreign(folder)
    return handle


def _foreign(folder: Path) -> CompressError:
    return CompressError(
        "the folder is not empty and was not made by compress (nor by this version of it)",
        where=str(folder),
        fix="name another --out folder",
    )


def _holder(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(host.read_at(handle, 1000, len(MARK)) or b"{}")
    except ValueError:
        return {}  # a crash cut it short
    kinds = {"process": int, "host": str, "started": str}
    whole = isinstance(found, dict) and all(type(found.get(key)) is kind for key, kind in kinds.items())
    return found if whole else {}


def _lives(holder: dict[str, Any], handle: int, path: Path, alone: bool | None) -> bool:
    """Whether the process that wrote ``holder`` still runs, as far as can be told from here."""
    if holder.get("host") == socket.gethostname():
        # The kernel has said it, or else the process table does: a number used again has another start.
        return alone is None and host.started(holder["process"]) == holder["started"]
    # By the file system's own clock, since two machines' differ.
    mine = path.with_name(f"{path.name}.{os.getpid()}.clock")
    mine.touch()
    now = mine.stat().st_mtime
    mine.unlink()
    return now - os.fstat(handle).st_mtime < STALE_SECONDS


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']}" if holder else "unknown process"


def _write(handle: int, holder: dict[str, Any]) -> None:
    # In this order the mark is never away.
    text = MARK + json.dumps(holder).encode()
    host.write_at(handle, text, 0)
    os.ftruncate(handle, len(text))
    os.fsync(handle)
