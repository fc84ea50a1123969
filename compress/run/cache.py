"""Where fetched and converted things are kept between runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.system.files import disk_errors

if TYPE_CHECKING:
    from torch import Tensor


def cache_place() -> Path:
    """``$COMPRESS_CACHE``, else ``$XDG_CACHE_HOME/compress``, else ``~/.cache/compress``."""
    named = os.environ.get("COMPRESS_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"


def cache_dir() -> Path:
    """`cache_place`; made if it is not there.

    Raises:
        CompressError: it cannot be made.
    """
    folder = cache_place()
    with disk_errors(folder, "the cache", fix="name another folder: COMPRESS_CACHE=FOLDER"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
