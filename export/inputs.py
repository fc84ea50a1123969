"""Inputs that a user gives: the arrays of an .npz file, checked against what a network takes.

`export` compares what it builds on them; `bench` and `gate` give both sides the same.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from compress.errors import CompressError, UsageError
from compress.exporters.formats import Graph, Port, check_types, read_graph
from compress.exporters.ort import Arrays
from compress.run.cache import sha256_of
from compress.system.arrays import read_arrays

OF_TEXT = "these are a language model's parts, which real text is made for"


@dataclass(frozen=True)
class Inputs:
    """Arrays by input. ``path`` is the user's file, ``file`` one with the arrays in the types that are taken."""

    path: Path
    file: Path
    feed: Arrays

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in self.feed.items()}

    def facts(self) -> dict[str, Any]:
        """What a record says: the file, its hash, and of every array its type, shape and hash."""
        return {
            "file": str(self.path),
            "sha256": sha256_of(self.path),
            "arrays": {
                name: {
                    "dtype": str(array.dtype),
                    "shape": list(array.shape),
                    "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
                }
                for name, array in self.feed.items()
            },
        }


def words(facts: Mapping[str, Any]) -> str:
    """`Inputs.facts` on a line."""
    arrays = (
        f"{name} {a['dtype']} {'x'.join(map(str, a['shape'])) or 'a scalar'}" for name, a in facts["arrays"].items()
    )
    return f"{facts['file']} (sha256 {facts['sha256'][:12]}): {', '.join(arrays)}"


@contextmanager
def given(path: Path, graphs: Sequence[Path]) -> Iterator[Inputs]:
    """The arrays of ``path``, which every network of the ONNX files ``graphs`` takes.

    Raises:
        UsageError: see `read_inputs`.
    """
    feed: Arrays = {}
    for graph in graphs:
        feed = read_inputs(path, read_graph(graph, own_operators=False))
    with tempfile.TemporaryDirectory(prefix="compress-inputs-") as folder:
        file = Path(folder) / "inputs.npz"
        held: dict[str, Any] = dict(feed)
        with file.open("wb") as out:
            np.savez(out, **held)
        yield Inputs(path, file, feed)


def read_inputs(path: Path, graph: Graph) -> Arrays:
    """The arrays of an .npz file, by input.

    Raises:
        UsageError: it cannot be read, holds no plain numbers, or is not what the graph takes; the input is named.
    """
    check_types(graph)
    found = _arrays(path)
    known = {p.name: p for p in graph.inputs}
    for name in (*known, *found):
        if name not in found or name not in known:
            what = "there is no array for" if name in known else "the file takes no"
            _refuse(path, f"{what} input {name!r} (it takes {', '.join(known)})")
    axes: dict[str, int] = {}
    for name, port in known.items():
        value = found[name]
        if value.ndim != len(port.shape) or any(
            (axes.setdefault(a, n) if isinstance(a, str) else a) != n
            for a, n in zip(port.shape, value.shape, strict=True)
        ):
            have, want = "x".join(map(str, value.shape)), "x".join(map(str, port.shape))
            _refuse(
                path, f"input {name!r} is {want or 'a scalar'}, the array {have or 'a scalar'}", "give it that shape"
            )
        found[name] = _taken(path, port, value)
    return found


def _arrays(path: Path) -> Arrays:
    try:
        return read_arrays(path, "the file of inputs", "")
    except CompressError as e:
        _refuse(path, e.what)


def _taken(path: Path, port: Port, value: Any) -> Any:
    """An array in the type of its input, with the values that it had."""
    if value.dtype != port.dtype and not np.can_cast(value.dtype, port.dtype, "same_kind"):
        _refuse(path, f"input {port.name!r} is {port.dtype}, the array {value.dtype}", f"save it as {port.dtype}")
    if value.size == 0:
        _refuse(path, f"the array for input {port.name!r} is empty", "give it values")
    with np.errstate(over="ignore"):
        kept = value.astype(port.dtype)
    if value.dtype.kind == "f" and not np.isfinite(kept).all():
        here = "" if not np.isfinite(value).all() else f", as {port.dtype},"
        _refuse(path, f"the array for input {port.name!r}{here} holds NaN or infinity", "give finite values")
    if value.dtype.kind in "iu" and kept.dtype.kind in "iu" and not np.array_equal(kept, value):
        _refuse(path, f"the array for input {port.name!r} holds values that {port.dtype} cannot", "give smaller ones")
    return kept


def _refuse(
    path: Path, what: str, fix: str = "numpy.savez(FILE, NAME=ARRAY, ...), one array by each input's name"
) -> NoReturn:
    raise UsageError(what, where=f"--inputs {path}", fix=fix)
