"""safetensors files that may come from a stranger or a disk that lies: one way to open them, and one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.system.files import check_regular

if TYPE_CHECKING:
    from torch import Tensor

FIX = "fetch or copy it again"


@contextmanager
def open_tensors(path: Path, what: str, fix: str = FIX) -> Iterator[Any]:
    """A file of tensors, open: ``keys()``, ``get_tensor(name)``, ``metadata()``.

    Args:
        what: what the file is, for the error: ``the weight file``.

    Raises:
        CompressError: it is missing, no regular file, or no whole safetensors file; ``where`` is the path.
    """
    from safetensors import SafetensorError, safe_open

    check_regular(path, what, fix)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as e:
        raise CompressError(
            f"{what} cannot be read: its name is not UTF-8, and safetensors opens no other",
            where=str(path),
            fix="rename it",
        ) from e
    try:
        file: Any = safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise _damaged(path, what, fix, e) from e
    try:
        with file:
            yield file
    except SafetensorError as e:
        raise _damaged(path, what, fix, e) from e


def _damaged(path: Path, what: str, fix: str, error: Exception) -> CompressError:
    said = " ".join(str(error).split())[:300]
    return CompressError(f"{what} cannot be read, it is damaged or cut short: {said}", where=str(path), fix=fix)


def load_tensors(path: Path, what: str, fix: str = FIX) -> dict[str, Tensor]:
    """All tensors of a file, by name; errors as of `open_tensors`."""
    with open_tensors(path, what, fix) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
