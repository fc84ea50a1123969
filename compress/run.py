"""The run folder: stages that are whole or not there, and never made from other inputs than their seal says.

A stage is built in ``.<name>.partial``, every file is synced, ``seal.json`` (inputs, hashes, cost) is written, and one
rename makes it visible. A kill at any moment leaves the stages before it and nothing half-written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.cache import sha256_of
from compress.errors import CompressError

SEAL = "seal.json"
SCRATCH = ".scratch"


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hex SHA-256 of JSON-like inputs, independent of key order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


class Run:
    """One run folder, held by this process alone while it is open. Use `Run.open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def open(cls, folder: Path, fresh: bool = False) -> Iterator[Run]:
        """Opens (or makes) a run folder and locks it; the lock dies with the process.

        Args:
            fresh: forget what an earlier run left in the folder.

        Raises:
            CompressError: it cannot be written, another run holds it, or it holds something that is no run.
        """
        lock = _take_lock(folder)
        try:
            if fresh:
                for entry in folder.iterdir():
                    if entry.name != ".lock":
                        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            else:
                for partial in folder.rglob(".*.partial"):
                    shutil.rmtree(partial)
            with _disk_errors(folder):
                yield cls(folder)
        finally:
            os.close(lock)

    def stage(
        self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], object], began: float | None = None
    ) -> Path:
        """The folder of the sealed stage ``name``; builds it unless it is there.

        Args:
            name: a path below the run folder, such as ``plan`` or ``supernet-1/block-007``.
            inputs: JSON-like facts that decide the outcome (hashes of weights and data, the recipe's part).
            build: fills the empty folder it is given.
            began: `time.monotonic()` when the work for it began, where that was before this call.

        Raises:
            CompressError: it was sealed from other inputs (each is named), or the disk is full.
        """
        folder = self.folder / name
        inputs = json.loads(json.dumps(inputs))
        if folder.exists():
            self._same_inputs(name, inputs)
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        began = time.monotonic() if began is None else began
        with _disk_errors(self.folder):
            build(partial)
            files = sorted(p for p in partial.rglob("*") if p.is_file())
            seal = {
                "stage": name,
                "inputs": inputs,
                "seconds": round(time.monotonic() - began, 3),
                # ru_maxrss is in KiB on Linux: the most this process has held so far.
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "files": {
                    str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files
                },
            }
            (partial / SEAL).write_text(json.dumps(seal, indent=1) + "\n")
            for path in (*files, partial / SEAL, *(p for p in partial.rglob("*") if p.is_dir()), partial):
                _sync(path)
            partial.rename(folder)
            _sync(folder.parent)
        return folder

    def is_sealed(self, name: str) -> bool:
        return (self.folder / name / SEAL).exists()

    def _same_inputs(self, name: str, inputs: Mapping[str, Any]) -> None:
        before = read_seal(self.folder / name)["inputs"]
        changed = list(_differences(before, inputs))
        if changed:
            raise CompressError(
                f"the stage {name!r} was made from other inputs: {'; '.join(changed[:5])}"
                + (f"; and {len(changed) - 5} more" if len(changed) > 5 else ""),
                where=str(self.folder),
                fix="go back to the earlier input, name another --out folder, or start over with --fresh",
            )

    def scratch(self, name: str) -> Path:
        """A folder for what a long stage notes on its way; it outlives a kill. See `drop_scratch`."""
        folder = self.folder / SCRATCH / name.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def drop_scratch(self, name: str) -> None:
        folder = self.folder / SCRATCH / name.replace("/", "-")
        if folder.exists():
            shutil.rmtree(folder)

    def seal_hash(self, folder: Path) -> str:
        """Hex SHA-256 of what a sealed stage holds (file names and hashes, not the time it took)."""
        return seal_hash(folder)

    def stages(self) -> list[dict[str, Any]]:
        """The seals of all top-level stages (and of groups of blocks, summed), in the order they were sealed."""
        seals = [(path.stat().st_mtime, json.loads(path.read_text())) for path in self.folder.rglob(SEAL)]
        groups: dict[str, dict[str, Any]] = {}
        for _, seal in sorted(seals, key=lambda s: s[0]):
            name = seal["stage"].split("/")[0]
            group = groups.setdefault(name, {"name": name, "seconds": 0.0, "peak_rss_bytes": 0, "bytes": 0})
            group["seconds"] = round(group["seconds"] + seal["seconds"], 3)
            group["peak_rss_bytes"] = max(group["peak_rss_bytes"], seal["peak_rss_bytes"])
            group["bytes"] += sum(f["bytes"] for f in seal["files"].values())
        return list(groups.values())


def seal_hash(folder: Path) -> str:
    """Hex SHA-256 over the names and hashes of a sealed stage's files."""
    return fingerprint({name: facts["sha256"] for name, facts in read_seal(folder)["files"].items()})


def read_seal(folder: Path) -> dict[str, Any]:
    """A sealed stage's seal.

    Raises:
        CompressError: the folder has no readable seal.
    """
    try:
        seal: dict[str, Any] = json.loads((folder / SEAL).read_text())
        return seal
    except (FileNotFoundError, json.JSONDecodeError) as e:
        raise CompressError(
            "this folder has no whole seal.json", where=str(folder), fix="start over with --fresh"
        ) from e


def verify_seal(folder: Path) -> int:
    """Checks every file of a sealed stage against its recorded hash; returns how many were checked.

    Raises:
        CompressError: a file is missing or was changed.
    """
    files = read_seal(folder)["files"]
    for name, facts in files.items():
        path = folder / name
        if not path.exists():
            raise CompressError("a sealed file is missing", where=str(path), fix="make the stage again with --fresh")
        if path.stat().st_size != facts["bytes"] or sha256_of(path) != facts["sha256"]:
            raise CompressError(
                "a sealed file was changed since it was written",
                where=str(path),
                fix="make the stage again with --fresh",
            )
    return len(files)


class Journal:
    """An append-only file of JSON lines. A last line that a kill cut short is dropped when it is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                os.truncate(path, whole)
            self._rows = [json.loads(line) for line in data[:whole].splitlines()]
        self._file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self._rows.append(row)

    def rows(self) -> list[dict[str, Any]]:
        return self._rows


def _take_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = [e.name for e in folder.iterdir()]
        if strangers and ".lock" not in strangers:
            raise CompressError(
                "the folder is not empty and was not made by compress",
                where=str(folder),
                fix="name another --out folder",
            )
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise _full(folder) from e
        raise CompressError(
            f"the run folder cannot be written: {e.strerror}", where=str(folder), fix="name another folder with --out"
        ) from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode().strip()
        os.close(lock)
        raise CompressError(
            f"another run holds this folder ({holder or 'unknown process'})",
            where=str(folder),
            fix="wait for it, stop it, or name another folder with --out",
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return lock


def _differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield f"{at} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except CompressError:
        raise
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        raise _full(folder) from e
    except Exception as e:
        # safetensors and onnx wrap the system's error in their own.
        if "No space left on device" not in str(e) and "os error 28" not in str(e):
            raise
        raise _full(folder) from e


def _full(folder: Path) -> CompressError:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return CompressError(
        f"the disk is full ({shutil.disk_usage(there).free:,} bytes are free)",
        where=str(folder),
        fix="free space and give the same command again: it goes on behind the last whole stage",
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
