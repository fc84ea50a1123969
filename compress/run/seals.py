"""Seals: what a sealed stage or release holds, and whether it still does.

``seal.json`` names every file beside it with its size and SHA-256, and carries a hash of its own content (since version
2). It tells damage; whoever can write the folder can also write a seal that fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from compress.errors import CompressError
from compress.run.cache import sha256_of
from compress.run.strict_json import LIMIT, member, parse_json, typed
from compress.system.files import read_bytes

SEAL = "seal.json"
VERSION = 2  # of a seal, and of the report that a release was made with: they go together
MEND = "fetch or copy it again; of a run, delete the stage's folder: the same command makes it again"
FACTS: dict[str, type] = {
    "stage": str,
    "inputs": dict,
    "seconds": float,
    "peak_rss_bytes": int,
    "cpu_seconds_so_far": float,
    "files": dict,
    "sha256": str,
}
LONGEST = 1000  # characters of a file's name with its folders
HEX = re.compile(r"[0-9a-f]{64}")


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hex SHA-256 of JSON-like inputs, independent of key order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def seal_text(facts: Mapping[str, Any]) -> str:
    """The text of a seal with these facts and the hash of them."""
    return json.dumps({**facts, "sha256": fingerprint(facts)}, indent=1) + "\n"


def read_seal(folder: Path, version: int = VERSION) -> dict[str, Any]:
    """A sealed folder's seal, as it was written.

    Args:
        version: of the report that the folder was made with. Seals of version 1 have no hash of their own: a change of
            one is not seen, and who reads it so must say so.

    Raises:
        CompressError: it is missing, cannot be read, is not what a seal is (the field is named), was changed, or is of
            another version.
    """
    path = folder / SEAL
    what, where = "the seal", str(path)
    raw = read_bytes(path, what, LIMIT, MEND)
    seal = typed(parse_json(raw, what, where, constants=True, fix=MEND), dict, "", what, where, MEND)
    for key in (key for key in FACTS if key != "sha256"):
        member(seal, key, FACTS[key], what, where, fix=MEND)
    if "sha256" not in seal and version > 1:
        said = "'sha256' is missing (version 1 wrote none, but this is of version 2)"
        raise CompressError(f"{what} is not what it should be: {said}", where=where, fix=MEND)
    if "sha256" in seal and version == 1:
        raise CompressError(f"{what} is of version 2, and the report of version 1", where=where, fix=MEND)
    if version > 1:
        member(seal, "sha256", str, what, where, fix=MEND)
    for name, facts in seal["files"].items():
        within = f"files.{name}"
        member(typed(facts, dict, within, what, where, MEND), "bytes", int, what, where, within, MEND)
        if not HEX.fullmatch(member(facts, "sha256", str, what, where, within, MEND)):
            raise CompressError(f"{what} is not what it should be: {within!r} has no SHA-256", where=where, fix=MEND)
        if not inside(name) or name == SEAL:
            raise CompressError(f"{what} names a file outside its folder: {name!r}", where=where, fix=MEND)
    facts = {k: v for k, v in seal.items() if k != "sha256"}
    if version > 1 and seal_text(facts).encode() != raw:
        raise CompressError("the seal was changed since it was written", where=where, fix=MEND)
    return seal


STAMP = "# SHA-256 of what stands above: "


def stamped(text: str) -> str:
    """A YAML text (it ends with a newline) with its own hash behind it, as a comment."""
    return f"{text}{STAMP}{hashlib.sha256(text.encode()).hexdigest()}\n"


def read_stamped(path: Path, what: str, fix: str) -> str:
    """The text that `stamped` was given.

    Raises:
        CompressError: the file cannot be read, has no hash of its own, or was changed since it was written.
    """
    raw = read_bytes(path, what, LIMIT, fix)
    text, found, _ = raw.rpartition(STAMP.encode())
    if not found:
        raise CompressError(f"{what} is not whole: it has no hash of its own", where=str(path), fix=fix)
    try:
        same = stamped(text.decode()).encode() == raw
    except UnicodeDecodeError:
        same = False
    if not same:
        raise CompressError(f"{what} was changed since it was written", where=str(path), fix=fix)
    return text.decode()


def seal_hash(folder: Path) -> str:
    """Hex SHA-256 over the names and hashes of a sealed stage's files."""
    return fingerprint({name: facts["sha256"] for name, facts in read_seal(folder)["files"].items()})


def inside(name: str) -> bool:
    """Whether a file that a report or a seal names lies in its folder, in the one way it is written, by a name that a
    file can have."""
    path = PurePosixPath(name)
    plain = path.as_posix() == name and "\\" not in name and "\0" not in name
    short = len(name) <= LONGEST and all(len(part.encode()) <= 255 for part in path.parts)
    return bool(name) and plain and short and not path.is_absolute() and ".." not in path.parts


class Hashes:
    """SHA-256 of files, each read once: two names of one file are known by its place on the disk."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], str] = {}

    def of(self, path: Path) -> str:
        key = _place(path)
        if key not in self._known:
            self._known[key] = sha256_of(path)
        return self._known[key]

    def learn(self, path: Path, sha256: str) -> None:
        self._known[_place(path)] = sha256


def _place(path: Path) -> tuple[int, ...]:
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def check_sealed(
    folder: Path, seal: Mapping[str, Any], hash_of: Callable[[Path], str] | None, strangers: bool = True
) -> None:
    """Raises CompressError where a sealed folder does not hold what its seal says.

    Args:
        seal: of `read_seal`.
        hash_of: gives a file's SHA-256; None compares only which files there are, and their sizes.
        strangers: a file more is refused too: what is read by a pattern, or published, would take it along.
    """
    for name, facts in seal["files"].items():
        _check_file(folder / name, facts, hash_of)
    if strangers:
        named = {SEAL, *seal["files"]}
        for path in entries(folder):
            if path.relative_to(folder).as_posix() not in named:
                raise CompressError(
                    "there is a file that was not sealed with the stage", where=str(path), fix="move it out of the run"
                )


def _check_file(path: Path, facts: Mapping[str, Any], hash_of: Callable[[Path], str] | None) -> None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CompressError("a sealed file is no file any more", where=str(path), fix=MEND)
        same = found.st_size == facts["bytes"] and (hash_of is None or hash_of(path) == facts["sha256"])
    except (FileNotFoundError, NotADirectoryError) as e:
        raise CompressError("a sealed file is missing", where=str(path), fix=MEND) from e
    except OSError as e:
        raise CompressError(f"a sealed file cannot be read: {e.strerror}", where=str(path), fix=MEND) from e
    if not same:
        raise CompressError("a sealed file was changed since it was written", where=str(path), fix=MEND)


def entries(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is not itself a folder, links among them: no link is followed."""
    for at, folders, files in os.walk(folder):
        yield from (Path(at, name) for name in sorted(files))
        yield from (path for path in (Path(at, name) for name in sorted(folders)) if path.is_symlink())
        folders.sort()


def verify_seal(folder: Path, strangers: bool = True, version: int = VERSION) -> int:
    """Checks every file of a sealed folder against its recorded hash; returns how many were checked.

    Raises:
        CompressError: the seal is none, or a file is missing, was changed, or (``strangers``) is one more.
    """
    seal = read_seal(folder, version)
    check_sealed(folder, seal, sha256_of, strangers)
    return len(seal["files"])
