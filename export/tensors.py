"""The tensors of an ONNX model, wherever they stand, and the files beside the graph that hold their bytes.

Weights stand in initialisers, in attributes of nodes (``Constant``), in the branches and bodies of ``If``, ``Loop`` and
``Scan``, in functions, in sparse tensors and in training information; each may be kept outside the graph's file. There
is one walk over all of them (`walk`), and one rule for the files they name (`beside`): they lie in the graph's folder
or below it. Whoever made the graph could otherwise have any file of this machine read, copied and published.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import CompressError
from compress.system.files import check_regular

SMALL = 1024  # bytes; a tensor below stays inside the graph
CHUNK = 1 << 24
KEYS = ("location", "offset", "length")
BITS = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8}  # of element types whose name holds no number
FIX = "keep it beside the ONNX file, or export that again"


class Held(NamedTuple):
    """One tensor of a model, and the message that it stands in."""

    name: str
    tensor: Any
    parent: Any

    @property
    def initialiser(self) -> bool:
        return bool(self.parent.DESCRIPTOR.name == "GraphProto")


@dataclass(frozen=True)
class Outside:
    """Where a tensor's bytes lie; ``length`` None: to the end of the file. ``used``: the tensor has no other bytes."""

    tensor: str
    location: str
    offset: int
    length: int | None
    used: bool


def walk(model: Any) -> Iterator[Held]:
    """Every tensor of an ONNX message (a model, a graph, a node), in its order there."""
    yield from _walk(model, type(model).__name__)


def _walk(message: Any, near: str) -> Iterator[Held]:
    kind = message.DESCRIPTOR.name
    if kind == "NodeProto":
        near = message.name or next(iter(message.output), "") or message.op_type
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.full_name not in _holding():
            continue
        for one in [value] if hasattr(value, "DESCRIPTOR") else value:
            if field.message_type.name == "TensorProto":
                yield Held(one.name or near, one, message)
            else:
                yield from _walk(one, near)


@cache
def _holding() -> frozenset[str]:
    """The kinds of ONNX message that a tensor can stand in, at any depth: as this version of ONNX has them."""
    import onnx

    kinds = list(onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.values())
    for kind in kinds:
        kinds += kind.nested_types
    found = {onnx.TensorProto.DESCRIPTOR.full_name}
    while True:
        more = {k.full_name for k in kinds for f in k.fields if f.message_type and f.message_type.full_name in found}
        if more <= found:
            return frozenset(found)
        found |= more


def read(path: Path, *, weights: bool = False) -> Any:
    """The model in an ONNX file.

    Args:
        weights: those outside the file are brought into it; else they stay where they are.

    Raises:
        CompressError: it is missing or no ONNX; it refers to files outside its folder; weights are missing.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise CompressError("there is no such ONNX file", where=str(path), fix="export it with `compress export`")
    check_regular(path, "the ONNX file", "export it again")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
        found = [(held, outside(held, path)) for held in walk(model)]
    except OSError as e:
        raise CompressError(f"it cannot be read: {e.strerror or e}", where=str(path), fix="mend its rights") from e
    except (DecodeError, ValueError) as e:
        said = next((line for line in str(e).splitlines() if line.strip()), "it cannot be parsed")
        raise CompressError(f"this is no valid ONNX file: {said[:200]}", where=str(path), fix="export it again") from e
    for held, there in found:
        if there is None:
            continue
        beside(path, there)
        if weights and there.used:
            _bring_in(held.tensor, b"".join(_bytes(path, there)))
    return model


def weights_of(graph: Any) -> set[str]:
    """The names of a graph's own initialisers."""
    return {i.name for i in graph.initializer} | {i.values.name for i in graph.sparse_initializer}


def outside(held: Held, graph: Path) -> Outside | None:
    """What a tensor says of its bytes outside the file; None where it holds them itself.

    Raises:
        CompressError: it names no file, two files, or no numbers.
    """
    import onnx

    tensor = held.tensor
    used = tensor.data_location == onnx.TensorProto.EXTERNAL
    if not used and not tensor.external_data:
        return None
    said = [e.key for e in tensor.external_data]
    entry = {e.key: e.value for e in tensor.external_data}
    twice = next((key for key in KEYS if said.count(key) > 1), None)
    if twice is not None:
        raise _wrong(held.name, graph, f"names its {twice} twice")
    if not entry.get("location"):
        if not used:
            return None
        raise _wrong(held.name, graph, "is said to lie outside the file, and names no file")
    numbers = {key: entry.get(key) for key in ("offset", "length")}
    for key, value in numbers.items():
        if value is not None and not re.fullmatch(r"[0-9]{1,19}", value):
            raise _wrong(held.name, graph, f"has the {key} {value[:40]!r}, which is no number of bytes")
    needed, length = _needed(tensor), numbers["length"]
    if length is not None and needed is not None and int(length) < needed:
        raise _wrong(held.name, graph, f"is said to take {int(length):,} bytes; its shape and type need {needed:,}")
    return Outside(
        held.name, entry["location"], int(numbers["offset"] or 0), int(length) if length is not None else needed, used
    )


def _wrong(tensor: str, graph: Path, what: str) -> CompressError:
    return CompressError(f"the tensor {tensor!r} {what}", where=str(graph), fix="export it again")


def _needed(tensor: Any) -> int | None:
    """Bytes that a tensor's shape and element type ask for; None where the type has no fixed size."""
    import onnx

    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    number = re.search(r"[0-9]+", name)
    bits = int(number[0]) if number else BITS.get(name)
    return None if bits is None else -(-max(math.prod(tensor.dims), 0) * bits // 8)


def beside(graph: Path, there: Outside) -> Path:
    """The file that holds a tensor's bytes; it need not be there.

    A link may lead anywhere below the graph's folder, and in a snapshot of the hub's cache, whose every file is one, to
    the blobs of that repository.

    Raises:
        CompressError: it is not in the graph's folder, nor below it.
    """
    said = there.location
    parts = said.split("/")
    plain = not re.search(r"[\x00-\x1f\x7f\\]", said) and not re.match(r"[A-Za-z]:", said)
    # ONNX Runtime takes a place under the folder `*` for an address in its own memory.
    if not plain or said.startswith("/") or ".." in parts or "*" in parts:
        raise _leaves(graph, there, "")
    file = graph.parent / said
    if not inside(graph.parent, file):
        raise _leaves(graph, there, f", a link to {os.path.realpath(file)}")
    return file


def inside(folder: Path, file: Path) -> bool:
    """Whether a file that is found below ``folder`` really lies there, whatever is linked on the way."""
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    if real.is_relative_to(home):
        return True
    snapshot = next((p for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
    repository = snapshot.parent.parent if snapshot is not None else None
    return repository is not None and repository.name.startswith("models--") and real.parent == repository / "blobs"


def _leaves(graph: Path, there: Outside, how: str) -> CompressError:
    return CompressError(
        f"the tensor {there.tensor!r} keeps its values outside the folder of {graph.name}:"
        f" {there.location[:200]!r}{how}",
        where=str(graph),
        fix="only files in the graph's folder or below it are read, and named with /: put them there, and export again",
    )


def files(path: Path) -> tuple[Path, ...]:
    """The graph's file and every file that holds weights of it, each once.

    Raises:
        CompressError: see `read`; one of them is missing, is no file, or is cut short.
    """
    about = path.stat() if path.is_file() else None
    if about is None:
        raise CompressError("there is no such ONNX file", where=str(path), fix="export it with `compress export`")
    found = {path: True}
    for there in _outside_of(path.absolute(), about.st_size, about.st_mtime_ns, about.st_ino):
        file = beside(path, there)
        if there.used:
            _whole(path, file, there)
            found[file] = True
    return tuple(found)


def size(paths: Iterable[Path]) -> int:
    """Bytes of files; one that has two names counts once."""
    found = {}
    for path in paths:
        about = path.stat()
        found[about.st_dev, about.st_ino] = about.st_size
    return sum(found.values())


@lru_cache(maxsize=64)
def _outside_of(path: Path, size: int, changed: int, inode: int) -> tuple[Outside, ...]:
    """What `files` needs of a graph, once while its file stays as it is: a gate asks before every process."""
    found = (outside(held, path) for held in walk(read(path)))
    return tuple(dict.fromkeys(there for there in found if there is not None))


def _whole(graph: Path, file: Path, there: Outside) -> os.stat_result:
    """Raises CompressError: the file is missing, is none, or ends before the tensor does."""
    try:
        about = os.stat(file)
    except OSError as e:
        what = f"the weights of {graph.name} are missing: {there.tensor!r} ({e.strerror})"
        raise CompressError(what, where=str(file), fix=FIX) from e
    if not stat.S_ISREG(about.st_mode):
        what = f"the weights of {graph.name} are no file: the tensor {there.tensor!r} names {there.location[:200]!r}"
        raise CompressError(what, where=str(file), fix=FIX)
    end = there.offset + (there.length or 0)
    if about.st_size < end:
        what = f"the weights of {graph.name} are cut short: {end:,} bytes are needed, {about.st_size:,} are there"
        raise CompressError(what, where=str(file), fix=FIX)
    return about


def _bytes(graph: Path, there: Outside) -> Iterator[bytes]:
    """A tensor's bytes, piece by piece."""
    file = beside(graph, there)
    size = _whole(graph, file, there).st_size
    left = there.length if there.length is not None else size - there.offset
    with file.open("rb") as held:
        held.seek(there.offset)
        while left > 0:
            piece = held.read(min(CHUNK, left))
            if not piece:
                raise CompressError(f"the weights of {graph.name} shrank while they were read", str(file), FIX)
            left -= len(piece)
            yield piece


def _bring_in(tensor: Any, data: bytes) -> None:
    tensor.raw_data = data
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")


def place(tensor: Any, location: str, offset: int, length: int) -> None:
    """Says that a tensor's bytes lie in a file beside the graph; those that it held are dropped."""
    import onnx

    kept = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
    kept.data_location = onnx.TensorProto.EXTERNAL
    for key, value in zip(KEYS, (location, offset, length), strict=True):
        kept.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(kept)


def forget_outside(model: Any) -> None:
    """Puts an empty tensor in the place of each whose bytes lie outside the file."""
    for held in walk(model):
        if not held.tensor.external_data:
            continue
        sparse = held.parent.DESCRIPTOR.name == "SparseTensorProto"
        for tensor in [held.parent.values] if sparse else [held.tensor]:
            for field in ("data_location", "external_data", "raw_data", "dims"):
                tensor.ClearField(field)
            tensor.dims.append(0)
        if sparse:
            held.parent.ClearField("indices")


def is_plain(path: Path) -> bool:
    """Whether a graph is as every converter takes it: what lies outside is initialisers, in files beside it."""
    for held in walk(read(path)):
        there = outside(held, path)
        if there is not None and (
            not held.initialiser or len(Path(there.location).parts) > 1 or beside(path, there).is_symlink()
        ):
            return False
    return True


def gather(path: Path, target: Path) -> None:
    """Copies a graph to ``target``, and what it uses of its weights' files into ``<its stem>.data`` beside it.

    Large initialisers lie there, each once, also where the graph names its bytes twice; all else comes into the graph.

    Raises:
        CompressError: see `files`; what must stand in the graph's own file does not fit there.
    """
    beside_it = files(path)
    model = read(path)
    found = [(held, outside(held, path)) for held in walk(model)]
    if len(beside_it) == 1 and all(there is None or not there.used for _, there in found):
        shutil.copyfile(path, target)
        return
    data = target.with_name(f"{target.stem}.data")
    places: dict[tuple[Path, int, int | None], tuple[int, int]] = {}
    with data.open("wb") as file:
        for held, there in found:
            if there is None or not there.used:
                continue
            if not held.initialiser or (there.length or 0) < SMALL:
                _bring_in(held.tensor, b"".join(_bytes(path, there)))
                continue
            key = Path(os.path.realpath(path.parent / there.location)), there.offset, there.length
            if key not in places:
                file.write(b"\0" * (-file.tell() % 64))
                begin = file.tell()
                for piece in _bytes(path, there):
                    file.write(piece)
                places[key] = begin, file.tell() - begin
            place(held.tensor, data.name, *places[key])
    if not places:
        data.unlink()
    write(model, target, named=path)


def write(model: Any, target: Path, *, named: Path | None = None) -> None:
    """The model as a file, its weights where it says they are.

    Raises:
        CompressError: the file would be over the 2 GiB that protobuf can hold. ``named`` is the file it was made of.
    """
    from google.protobuf.message import EncodeError

    try:
        data = model.SerializeToString()
    except (EncodeError, ValueError) as e:
        raise CompressError(
            "what stands in the graph itself is over 2 GiB, more than an ONNX file can hold",
            where=str(named or target),
            fix="keep large weights as initialisers outside the file, not in Constant nodes",
        ) from e
    target.write_bytes(data)
