"""Where fetched and converted things are kept between runs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from compress.errors import CompressError


def cache_dir() -> Path:
    """``$COMPRESS_CACHE``, else ``$XDG_CACHE_HOME/compress``, else ``~/.cache/compress``; made if it is not there.

    Raises:
        CompressError: it cannot be made.
    """
    named = os.environ.get("COMPRESS_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CompressError(
            f"the cache cannot be written: {e.strerror or e}",
            where=str(folder),
            fix="name another folder: COMPRESS_CACHE=FOLDER",
        ) from e
    return folder


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
