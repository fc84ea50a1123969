"""The run folder: stages that are whole or not there, and never made from other inputs than their seal says.

A stage is built in ``.<name>.partial``, every file is synced, ``seal.json`` (inputs, hashes, cost) is written, and one
rename makes it visible. A kill at any moment leaves the stages before it and nothing half-written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress import distributed
from compress.cache import sha256_of
from compress.errors import CompressError
from compress.lock import Lock

SEAL = "seal.json"
SCRATCH = ".scratch"
LOCK = ".lock"
SHARED_SECONDS = 60.0  # how long a shared file system may take to show one node what another wrote


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hex SHA-256 of JSON-like inputs, independent of key order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def peak_rss() -> int:
    """Bytes that this process has held at most. Linux's ru_maxrss survives exec: a child of a large process would be
    told its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM:" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_gpu() -> dict[str, int]:
    """The most that this process's tensors have held on its GPU since it was last asked; nothing without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return {"peak_gpu_bytes": peak}


class Run:
    """One run folder, held by this run alone while it is open. Use `Run.open`.

    With several processes all open it and go through the same stages; the main one holds the lock and alone writes.
    """

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
        held: list[Lock] = []

        def hold() -> None:
            with _disk_errors(folder):
                held.append(Lock.take(folder / LOCK))
            _tidy(folder, fresh)

        try:
            distributed.main_says(hold)
            with _disk_errors(folder):
                yield cls(folder)
        finally:
            for lock in held:
                lock.release()

    def stage(
        self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], object], began: float | None = None
    ) -> Path:
        """The folder of the sealed stage ``name``; builds it unless it is there.

        Of several processes the main one builds, and the others wait for it. See `stage_together`.

        Args:
            name: a path below the run folder, such as ``plan`` or ``supernet-1/block-007``.
            inputs: JSON-like facts that decide the outcome (hashes of weights and data, the recipe's part).
            build: fills the empty folder it is given.
            began: `time.monotonic()` when the work for it began, where that was before this call.

        Raises:
            CompressError: it was sealed from other inputs (each is named), or the disk is full.
        """
        folder = self.folder / name

        def work() -> None:
            with _disk_errors(self.folder):
                if not self._there(name, inputs):
                    started = time.monotonic() if began is None else began
                    build(self._empty(name))
                    self._seal(name, inputs, started)

        distributed.main_says(work)
        _await(folder)
        return folder

    def stage_together(
        self, name: str, inputs: Mapping[str, Any], build: Callable[[Path | None], object]
    ) -> Path:
        """Like `stage`, but all processes call ``build``: the main one with the folder to fill, others with None."""
        folder = self.folder / name
        if not distributed.main_says(lambda: self._there(name, inputs)):
            began = time.monotonic()
            with _disk_errors(self.folder):
                build(self._empty(name) if distributed.is_main() else None)
            distributed.main_says(lambda: self._seal(name, inputs, began))
        _await(folder)
        return folder

    def _there(self, name: str, inputs: Mapping[str, Any]) -> bool:
        if not (self.folder / name).exists():
            return False
        self._same_inputs(name, json.loads(json.dumps(inputs)))
        return True

    def _empty(self, name: str) -> Path:
        partial = _partial(self.folder / name)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        return partial

    def _seal(self, name: str, inputs: Mapping[str, Any], began: float) -> None:
        folder = self.folder / name
        partial = _partial(folder)
        with _disk_errors(self.folder):
            files = sorted(p for p in partial.rglob("*") if p.is_file())
            seal = {
                "stage": name,
                "inputs": json.loads(json.dumps(inputs)),
                "seconds": round(time.monotonic() - began, 3),
                "peak_rss_bytes": peak_rss(),
                **_peak_gpu(),
                # Of this process from its start; the difference of two seals does not mind other work on the machine.
                "cpu_seconds_so_far": round(time.process_time(), 3),
                "files": {
                    str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files
                },
            }
            (partial / SEAL).write_text(json.dumps(seal, indent=1) + "\n")
            for path in (*files, partial / SEAL, *(p for p in partial.rglob("*") if p.is_dir()), partial):
                sync(path)
            partial.rename(folder)
            sync(folder.parent)

    def is_sealed(self, name: str) -> bool:
        return distributed.main_says(lambda: (self.folder / name / SEAL).exists())

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
        if distributed.is_main() and folder.exists():
            shutil.rmtree(folder)

    def journal(self, name: str, file: str) -> Journal | Notes:
        """An append-only journal in the scratch folder ``name``. All processes see its rows; the main one writes."""
        folder = self.scratch(name)
        if distributed.world() == 1:
            return Journal(folder / file)
        journal = Journal(folder / file) if distributed.is_main() else None
        rows = distributed.main_says(lambda: list(journal.rows()) if journal else [])
        return journal if journal is not None else Notes(rows)

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
            if "peak_gpu_bytes" in seal:
                group["peak_gpu_bytes"] = max(group.get("peak_gpu_bytes", 0), seal["peak_gpu_bytes"])
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


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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


class Notes:
    """The rows of another process's `Journal`, and what was added since; nothing is written."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def rows(self) -> list[dict[str, Any]]:
        return self._rows


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _await(folder: Path) -> None:
    """Until the stage that the main process has sealed is seen here too (a network file system may lag behind)."""
    late = time.monotonic() + SHARED_SECONDS
    while not (folder / SEAL).exists():
        if time.monotonic() > late:
            raise CompressError(
                f"a stage that the main process has sealed is not seen on {socket.gethostname()}",
                where=str(folder),
                fix="put the run folder (--out) on a file system that all nodes share",
            )
        time.sleep(0.05)


def _tidy(folder: Path, fresh: bool) -> None:
    if fresh:
        for entry in folder.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    else:
        for partial in folder.rglob(".*.partial"):
            shutil.rmtree(partial)


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


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
