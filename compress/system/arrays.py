"""numpy's files that may come from a stranger: no pickle, no more memory than the file has bytes, one clear error."""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.system.files import check_regular

LARGEST = 8 << 30  # bytes of the arrays in one file
# What numpy says of a damaged header; a SyntaxError where it is no Python, an EOFError where it ends.
WRONG = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    tokenize.TokenError,
)


def read_array(path: Path, what: str, fix: str) -> NDArray[Any]:
    """The array of an .npy file: numbers or truths, of as many bytes as the file has.

    Raises:
        CompressError: it is missing, no regular file, or no such array.
    """
    check_regular(path, what, fix)
    try:
        with path.open("rb") as file:
            return _array(file, path.stat().st_size)
    except WRONG as e:
        raise CompressError(f"{what} cannot be read: {said(e)}", where=str(path), fix=fix) from e


def read_arrays(path: Path, what: str, fix: str) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, by name.

    Raises:
        CompressError: it is missing, no regular file, or holds something else than such arrays, or more than `LARGEST`.
    """
    check_regular(path, what, fix)
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as held:
            total = sum(one.file_size for one in held.infolist())
            if total > LARGEST:
                raise ValueError(f"its arrays take {total:,} bytes, more than {LARGEST:,}")
            for one in held.infolist():
                name = one.filename.removesuffix(".npy")
                if name in found:
                    raise ValueError(f"it holds {name!r:.60} twice")
                with held.open(one) as file:
                    found[name] = _array(file, one.file_size)
    except (*WRONG, zipfile.BadZipFile, zlib.error, RuntimeError) as e:  # RuntimeError: a password is asked for
        raise CompressError(f"{what} cannot be read: {said(e)}", where=str(path), fix=fix) from e
    return found


def said(error: Exception) -> str:
    """The first line of an error, and its name where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _array(file: IO[bytes], size: int) -> NDArray[Any]:
    data = file.read(size)
    head = io.BytesIO(data)
    version = np.lib.format.read_magic(head)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"it is of version {version}")
    shape, fortran, dtype = read[version](head)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds {dtype}, not plain numbers")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"it has the shape {shape!r:.60}")
    count = 1
    for n in shape:
        count *= n
    if count * dtype.itemsize != size - head.tell():
        raise ValueError(
            f"its shape {shape!r:.60} asks for {count * dtype.itemsize:,} bytes, {size - head.tell():,} are there"
        )
    return np.frombuffer(data, dtype, offset=head.tell()).reshape(shape, order="F" if fortran else "C").copy()
