"""The run folder: stages that are whole or not there, and never made from other inputs than their seal says.

A stage is built in ``.building``, every file is synced, ``seal.json`` (inputs, hashes, cost) is written, and one rename
makes it visible. A kill at any moment leaves the stages before it and nothing half-written. A stage that is there
already is checked against its seal before anything is built on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.processes import distributed
from compress.run.cache import sha256_of
from compress.run.journal import Journal as Journal
from compress.run.journal import Notes as Notes
from compress.run.lock import Lock
from compress.run.progress import busy
from compress.run.seals import SEAL as SEAL
from compress.run.seals import Hashes, check_sealed, entries, seal_text
from compress.run.seals import fingerprint as fingerprint
from compress.run.seals import read_seal as read_seal
from compress.run.seals import seal_hash as seal_hash
from compress.run.seals import verify_seal as verify_seal
from compress.system import host
from compress.system.files import DiskFull, disk_errors, settle

SCRATCH = ".scratch"
BUILDING = ".building"
LOCK = ".lock"
RECIPE_LOCK = "recipe.lock.yaml"
UNFINISHED = r"\.recipe\.lock\.(tmp|yaml\.[0-9a-f]{8}\.partial)"  # what a kill leaves of the recipe's lock file
OWN_FILES = re.compile(rf"\.lock|\.lock\.\d+\.clock|recipe\.lock\.yaml|{UNFINISHED}")  # beside the stages
AGAIN = "free space and give the same command again: it goes on behind the last whole stage"
# The first part of every stage's name.
STAGE_NAMES = re.compile(
    r"text|text-recover|latency-(table|whole-\d+|held)|metrics|supernet-\d+|singles-\d+|search-\d+(-again-\d+)?"
    r"|run-off-\d+(-judged)?|final|plan|recover|packed"
    r"|model|model-padded|multimodal|evaluation-\w+|curve|export-(dense|pruned)|bench|target-.+|quantised(-bench)?-.+|release"
    r"|dense|gradual|cut|finetuned"
    r"|round-\d+|sweep"
)
SHARED_SECONDS = 60.0  # how long a shared file system may take to show one node what another wrote


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

    def __init__(self, folder: Path, beside: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._beside = tuple(beside)
        self._hashes = Hashes()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, fresh: bool = False, beside: Sequence[Path] = ()) -> Iterator[Run]:
        """Opens (or makes) a run folder and locks it; the lock dies with the process.

        What ends in an error before anything was sealed or noted leaves no folder that was not there.

        Args:
            fresh: forget what an earlier run left in the folder.
            beside: other run folders. A stage that one of them has sealed from the same inputs is not made again: its
                files are linked.

        Raises:
            CompressError: it cannot be written, another run holds it, or it holds something that is no run's.
        """
        held: list[Lock] = []
        made: list[Path] = []

        def hold() -> None:
            made.extend(p for p in (folder / LOCK, folder, *folder.parents) if not os.path.lexists(p))
            with _disk_errors(folder):
                held.append(Lock.take(folder / LOCK))
            _forget(folder) if fresh else _tidy(folder)

        try:
            distributed.main_says(hold)
            with _disk_errors(folder):
                yield cls(folder, beside)
        except BaseException:
            if distributed.is_main():
                _leave_nothing(folder, made, bool(held))
            raise
        finally:
            for lock in held:
                lock.release()

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], object],
        began: float | None = None,
        *,
        read: bool = True,
    ) -> Path:
        """The folder of the sealed stage ``name``; builds it unless it is there, and checks it where it is.

        Of several processes the main one builds, and the others wait for it. See `stage_together`.

        Args:
            name: a path below the run folder, such as ``plan`` or ``supernet-1/block-007``.
            inputs: JSON-like facts that decide the outcome (hashes of weights and data, the recipe's part).
            build: fills the empty folder it is given.
            began: `time.monotonic()` when the work for it began, where that was before this call.
            read: false where its files may never be read, and are large: their hashes are then left to `check`.

        Raises:
            CompressError: it was sealed from other inputs (each is named), is not what was sealed, or the disk is full.
        """
        folder = self.folder / name

        def work() -> None:
            with _disk_errors(self.folder), busy(name):
                if not self._there(name, inputs, read):
                    started = time.monotonic() if began is None else began
                    build(self._empty(name))
                    self._seal(name, inputs, started)

        distributed.main_says(work)
        _await(folder)
        return folder

    def stage_together(self, name: str, inputs: Mapping[str, Any], build: Callable[[Path | None], object]) -> Path:
        """Like `stage`, but all processes call ``build``: the main one with the folder to fill, others with None."""
        folder = self.folder / name
        if not distributed.main_says(lambda: self._there(name, inputs, True)):
            began = time.monotonic()
            with _disk_errors(self.folder), busy(name):
                build(self._empty(name) if distributed.is_main() else None)
            distributed.main_says(lambda: self._seal(name, inputs, began))
        _await(folder)
        return folder

    def check(self, folder: Path) -> Path:
        """``folder``, a stage that is about to be read: what was not hashed yet in this process is compared with its
        seal. All processes come here together.

        Raises:
            CompressError: it is not what was sealed.
        """
        distributed.main_says(lambda: check_sealed(folder, read_seal(folder), self._hashes.of))
        return folder

    def _there(self, name: str, inputs: Mapping[str, Any], read: bool) -> bool:
        folder = self.folder / name
        for place in (folder, *(p for p in folder.parents if self.folder in p.parents)):
            if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
                raise CompressError(
                    "this is no folder of a run, but a link or a file", where=str(place), fix="move it out of the run"
                )
        if not folder.exists():
            return self._adopt(name, inputs, read)
        seal = read_seal(folder)
        if seal["stage"] != name:
            raise CompressError(
                f"this is another stage, {seal['stage']!r}", where=str(folder), fix="put it back in its own place"
            )
        self._same_inputs(name, seal["inputs"], json.loads(json.dumps(inputs)))
        check_sealed(folder, seal, self._hashes.of if read else None)
        return True

    def _adopt(self, name: str, inputs: Mapping[str, Any], read: bool) -> bool:
        """Takes a stage over from a run beside this one that has sealed it from the same inputs; whether there is one.

        Raises:
            CompressError: it is not what was sealed.
        """
        wanted = json.loads(json.dumps(inputs))
        for source in (run / name for run in self._beside):
            if source.is_symlink() or not (source / SEAL).is_file():
                continue
            seal = read_seal(source)
            if seal["stage"] != name or seal["inputs"] != wanted:
                continue
            check_sealed(source, seal, self._hashes.of if read else None)
            with _disk_errors(self.folder):
                partial = self._empty(name)
                for file in (*seal["files"], SEAL):
                    link(source / file, partial / file)
                self._settle(name)
            return True
        return False

    def _settle(self, name: str) -> None:
        """What was being built becomes the stage's folder."""
        folder, partial = self.folder / name, self._building(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        settle(partial, folder)
        with contextlib.suppress(OSError):  # another stage is being built
            partial.parent.rmdir()

    def _building(self, name: str) -> Path:
        return self.folder / BUILDING / f"{name.replace('/', '-')}.partial"

    def _empty(self, name: str) -> Path:
        partial = self._building(name)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        return partial

    def _seal(self, name: str, inputs: Mapping[str, Any], began: float) -> None:
        folder, partial = self.folder / name, self._building(name)
        with _disk_errors(self.folder):
            files = {p.relative_to(partial).as_posix(): p for p in sorted(partial.rglob("*")) if p.is_file()}
            hashes = {key: sha256_of(path) for key, path in files.items()}
            facts = {
                "stage": name,
                "inputs": json.loads(json.dumps(inputs)),
                "seconds": round(time.monotonic() - began, 3),
                "peak_rss_bytes": host.peak_memory() or 0,  # 0: the system does not tell
                **_peak_gpu(),
                # Of this process from its start; the difference of two seals does not mind other work on the machine.
                "cpu_seconds_so_far": round(time.process_time(), 3),
                "files": {key: {"bytes": p.stat().st_size, "sha256": hashes[key]} for key, p in files.items()},
            }
            (partial / SEAL).write_text(seal_text(facts), encoding="utf-8")
            self._settle(name)
        for key, sha256 in hashes.items():
            self._hashes.learn(folder / key, sha256)

    def is_sealed(self, name: str, inputs: Mapping[str, Any] | None = None) -> bool:
        """Whether the stage is there, or can be taken from a run beside this one that has made it from ``inputs``;
        `stage` says whether it is whole."""
        return distributed.main_says(
            lambda: os.path.lexists(self.folder / name) or (inputs is not None and self._adopt(name, inputs, False))
        )

    def _same_inputs(self, name: str, before: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        changed = list(differences(before, inputs))
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
        seals = []
        for folder in sealed_folders(self.folder):
            seal = read_seal(folder)
            if seal["stage"] == folder.relative_to(self.folder).as_posix():
                seals.append(((folder / SEAL).stat().st_mtime, seal))
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


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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


def sealed_folders(folder: Path) -> Iterator[Path]:
    """The folders with a seal in a run folder, at any depth; neither links nor what is yet to be sealed."""
    for at, folders, files in os.walk(folder):
        if SEAL in files:
            folders.clear()
            yield Path(at)
        elif Path(at) == folder:
            folders[:] = [name for name in folders if name not in (SCRATCH, BUILDING)]
        folders.sort()


def _tidy(folder: Path) -> None:
    """Clears away what a run that was killed was building; only in the place where nothing else is built."""
    for entry in folder.iterdir():
        if re.fullmatch(UNFINISHED, entry.name) and stat.S_ISREG(entry.lstat().st_mode):
            entry.unlink()
    building = folder / BUILDING
    if building.is_symlink() or (building.exists() and not building.is_dir()):
        raise CompressError("this is no folder of a run", where=str(building), fix="move it out of the run")
    if building.exists():
        for partial in building.glob("*.partial"):
            if partial.is_dir() and not partial.is_symlink():
                shutil.rmtree(partial)
        with contextlib.suppress(OSError):  # something of somebody else's lies in it
            building.rmdir()


def _forget(folder: Path) -> None:
    """Removes what runs have made in the folder: the files that seals name, what is noted and half built, the lock file
    of the recipe. The lock stays.

    Raises:
        CompressError: there is something else; nothing was removed.
    """
    ours: list[Path] = []
    strangers: list[str] = []
    whole: list[Path] = []  # to be removed with all that is in them
    for entry in sorted(folder.iterdir()):
        kind = entry.lstat().st_mode
        if stat.S_ISREG(kind) and OWN_FILES.fullmatch(entry.name):
            ours += [entry] if entry.name != LOCK else []
        elif stat.S_ISDIR(kind) and entry.name in (SCRATCH, BUILDING):
            for inner in sorted(entry.iterdir()):
                whole.append(inner) if stat.S_ISDIR(inner.lstat().st_mode) else strangers.append(str(inner))
        elif stat.S_ISDIR(kind):
            _survey(folder, entry, ours, strangers)
        else:
            strangers.append(str(entry))
    if strangers:
        named = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        raise CompressError(
            f"--fresh would remove what no run has made: {named}",
            where=str(folder),
            fix="move or delete it yourself, or name another --out folder",
        )
    for path in whole:
        shutil.rmtree(path)
    for path in ours:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
    for at, _, _ in os.walk(folder, topdown=False):
        if Path(at) != folder:
            Path(at).rmdir()


def _survey(run: Path, folder: Path, ours: list[Path], strangers: list[str]) -> None:
    """Tells the files of sealed stages in ``folder`` from all others. A seal comes last: who is killed while it is
    forgotten can be told by it still."""
    named: list[Path] = []
    for stage in sealed_folders(folder):
        try:
            seal = read_seal(stage)
        except CompressError:
            continue
        if seal["stage"] == stage.relative_to(run).as_posix():
            named += [*(stage / name for name in seal["files"]), stage / SEAL]
    known = set(named)
    ours += named
    strangers += [str(path) for path in entries(folder) if path not in known]


def _leave_nothing(folder: Path, made: list[Path], held: bool) -> None:
    """Removes what was half built; and the folder that an error leaves without a stage or a note, where it is new."""
    with contextlib.suppress(OSError):  # what ended the run is what is to be heard of
        if held:
            _tidy(folder)
        if held and folder / LOCK in made and not _worth_keeping(folder):
            for name in (SCRATCH, BUILDING):
                if (folder / name).is_dir() and not (folder / name).is_symlink():
                    shutil.rmtree(folder / name)
            for entry in list(folder.iterdir()):
                if OWN_FILES.fullmatch(entry.name):
                    entry.unlink()
    for path in made:
        with contextlib.suppress(OSError):  # it holds something, was never made, or is gone
            path.rmdir()


def _worth_keeping(folder: Path) -> bool:
    """Whether a folder holds anything but the lock files and what was half built."""
    for path in entries(folder):
        inner = path.relative_to(folder).parts
        own = len(inner) == 1 and OWN_FILES.fullmatch(inner[0])
        if not own and inner[0] != BUILDING and path.lstat().st_size:
            return True
    return False


def differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    """What differs in two JSON-like values, key by key, as a person reads it."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield f"{at} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """The disk's errors in the work of a run; whatever was full, what was sealed is not lost."""
    try:
        with disk_errors(folder, full=AGAIN, every=False):
            yield
    except DiskFull as e:
        e.fix = AGAIN
        raise
