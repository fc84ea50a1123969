"""One run at a time in a folder, on one machine or over a network file system; no crash leaves a lock.

On one machine the kernel's lock (flock) decides; it goes with the process. Between machines, where a file system may
not pass it on, the holder touches the file every few seconds; one that nobody has touched for a minute is free.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from compress.errors import CompressError

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
NO_FLOCK = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


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
            OSError: the disk is full.
        """
        folder = path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            strangers = [e.name for e in folder.iterdir()]
            if strangers and path.name not in strangers:
                raise CompressError(
                    "the folder is not empty and was not made by compress",
                    where=str(folder),
                    fix="name another --out folder",
                )
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise
            raise CompressError(
                f"the run folder cannot be written: {e.strerror}",
                where=str(folder),
                fix="name another folder with --out",
            ) from e
        try:
            alone = _flock(handle)
            holder = _holder(handle)
            if alone is False or (holder and _lives(holder, handle, path, alone)):
                raise CompressError(
                    f"another run holds this folder ({_words(holder)})",
                    where=str(folder),
                    fix="wait for it, stop it, or name another folder with --out",
                )
            _write(handle, {"process": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
        except BaseException:
            os.close(handle)
            raise
        return cls(path, handle)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            # The disk may be full or the server away for a moment: the next beat tries again.
            with contextlib.suppress(OSError):
                os.utime(self._handle)

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
        os.close(self._handle)


def _flock(handle: int) -> bool | None:
    """True: the kernel's lock is ours; False: another's; None: the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in NO_FLOCK:
            return None
        raise
    return True


def _holder(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 1000, 0) or b"{}")
    except json.JSONDecodeError:
        return {}  # a crash cut it short
    return found if isinstance(found, dict) else {}


def _lives(holder: dict[str, Any], handle: int, path: Path, alone: bool | None) -> bool:
    """Whether the process that wrote ``holder`` still runs, as far as can be told from here."""
    if holder.get("host") == socket.gethostname():
        # The kernel has said it, or else the process table does: a number used again has another start.
        return alone is None and _started(int(holder.get("process", 0))) == holder.get("started", "")
    # By the file system's own clock, since two machines' differ.
    mine = path.with_name(f"{path.name}.{os.getpid()}.clock")
    mine.touch()
    now = mine.stat().st_mtime
    mine.unlink()
    return now - os.fstat(handle).st_mtime < STALE_SECONDS


def _started(process: int) -> str:
    """When a process of this machine started, in the kernel's ticks; empty where it does not run."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']}" if holder else "unknown process"


def _write(handle: int, holder: dict[str, Any]) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(holder).encode(), 0)
    os.fsync(handle)
