"""What every way to a device has in common, and what an artefact is made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from compress.errors import CompressError
from compress.exporters import tensors
from compress.run.cache import sha256_of

# The kind of a file says its format where nobody else does.
SUFFIXES = {
    ".onnx": "onnx", ".ort": "ort", ".mnn": "mnn", ".xml": "openvino", ".pte": "executorch", ".tflite": "litert",
    ".engine": "tensorrt", ".plan": "tensorrt",
}  # fmt: skip
GENAI = "genai_config.json"
# What a runtime reads beside a file without being asked: weights under the file's own name.
BESIDE = {"openvino": lambda path: path.with_suffix(".bin"), "mnn": lambda path: path.with_name(f"{path.name}.weight")}


class Absent(CompressError):
    """There is no artefact, or none of the format."""


class Transport(Protocol):
    """A way to a device. ``title`` names it in messages."""

    @property
    def title(self) -> str: ...

    def available(self) -> dict[str, Any]:
        """What the device is. Raises CompressError: it cannot be reached, or has no Python."""

    def push(self, files: Sequence[Path]) -> dict[str, str]:
        """Brings files into one folder there, named by what they hold: once; returns name -> path there."""

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the agent there in a fresh process and returns what it answers."""

    def pull(self, there: str, here: Path) -> None:
        """Fetches one file."""

    def room(self) -> str:
        """A folder there that files may be written to."""


@dataclass(frozen=True)
class Artefact:
    """``parts``: ``model``, or ``prefill`` and ``decode`` -> file; ``files``: all that must be on the device.

    ``home`` is the folder that all of them lie in, or below.
    """

    format: str
    parts: dict[str, Path]
    files: tuple[Path, ...]
    home: Path

    @property
    def bytes(self) -> int:
        return tensors.size(self.files)

    def hashes(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.home)): _hash(path, path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.files
        }


@cache
def _hash(path: Path, size: int, changed: int) -> str:
    """Once while a file stays as it is: a gate asks for it before every process."""
    return sha256_of(path)


def artefact(where: Path, format: str | None = None, file: str | None = None) -> Artefact:
    """What lies in an export folder, or is one file.

    Args:
        format: where a folder holds several; ONNX is taken where it is not said.
        file: the name of the file in the folder.

    Raises:
        Absent: there is none, or none of that format.
        CompressError: it is of no format that is known; it would have files read that lie outside its folder, or
            weights of it are missing.
    """
    if where.is_file():
        kind = format or SUFFIXES.get(where.suffix)
        if kind is None:
            raise CompressError(
                f"a file {where.suffix} is of no format that is known",
                where=str(where),
                fix=f"one of: {', '.join(SUFFIXES)}",
            )
        return _artefact(kind, {"model": where}, where.parent)
    if format in (None, "genai") and (where / GENAI).is_file():
        return _genai(where)
    if format == "gguf":
        from compress.exporters.gguf import the_file

        return _artefact("gguf", {"model": the_file(where)}, where)
    suffixes = [
        s for s, kind in SUFFIXES.items() if format is None or kind == format.replace("tensorrt_rtx", "tensorrt")
    ]
    for names in (("prefill", "decode"), ("model",)):
        for suffix in suffixes:
            if file is not None and names == ("model",):
                found = {"model": where / file}
                suffix = Path(file).suffix
            else:
                found = {name: where / f"{name}{suffix}" for name in names}
            if all(path.is_file() for path in found.values()):
                kind = format or SUFFIXES[suffix]
                if kind == "executorch" and "prefill" in _facts(where, kind).get("components", {}):
                    found = dict.fromkeys(("prefill", "decode"), where / f"model{suffix}")
                return _artefact(kind, found, where)
    wanted = file or f"model{suffixes[0]}, and no prefill{suffixes[0]} with decode{suffixes[0]}"
    raise Absent(f"there is no {wanted}", where=str(where), fix="name a folder made by `compress export`")


def _genai(folder: Path) -> Artefact:
    """A folder for ONNX Runtime GenAI, without the tokenizer's files: nothing is made of text."""
    from compress.exporters.genai import check_folder

    check_folder(folder)
    settings = folder / GENAI
    graph = folder / json.loads(settings.read_text("utf-8"))["model"]["decoder"]["filename"]
    return Artefact("genai", {"genai": settings}, (settings, *tensors.files(graph)), folder)


def _facts(folder: Path, format: str) -> dict[str, Any]:
    """What `compress export` noted of the format it built here."""
    path = folder / f"{format}.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _artefact(kind: str, parts: dict[str, Path], home: Path) -> Artefact:
    found = [file for path in dict.fromkeys(parts.values()) for file in stored(kind, path)]
    return Artefact(kind, parts, tuple(dict.fromkeys(found)), home)


def stored(format: str, path: Path) -> tuple[Path, ...]:
    """A file in ``format`` and all that its runtime reads with it.

    Raises:
        CompressError: one of these is missing, or lies outside the file's folder.
    """
    if format == "onnx":
        return tensors.files(path)
    weights = BESIDE[format](path) if format in BESIDE else None
    if weights is None or not (weights.exists() or weights.is_symlink()):
        return (path,)
    if not tensors.inside(path.parent, weights):
        raise CompressError(
            f"the weights of {path.name} lie outside its folder:"
            f" {weights.name} is a link to {os.path.realpath(weights)}",
            where=str(path),
            fix="only files in its folder are read: put them there, or export it again",
        )
    if not weights.is_file():
        raise CompressError(f"the weights of {path.name} are no file", where=str(weights), fix=tensors.FIX)
    return path, weights


def folder_name(files: Sequence[Path]) -> str:
    """Named by contents and names: the same files are never brought twice.

    Raises:
        CompressError: they lie in several folders; a device is given one.
    """
    lower = next((path for path in files if path.parent != files[0].parent), None)
    if lower is not None:
        raise CompressError(
            "weights in a folder below the graph are not brought to a device",
            where=str(lower),
            fix="compress export GRAPH --format onnx puts them beside it",
        )
    held = json.dumps(sorted((path.name, sha256_of(path)) for path in files))
    return hashlib.sha256(held.encode()).hexdigest()[:16]


def answered(found: dict[str, Any], title: str) -> dict[str, Any]:
    """What the agent answered; what it reports as an error is raised.

    Raises:
        CompressError: with the device's own words.
    """
    if "error" in found:
        raise CompressError(found["error"]["what"], where=title, fix=found["error"]["fix"])
    return found
