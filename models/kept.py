"""Models that were made of others once, and are kept in the cache under the hash of what they were made of."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.models.folder import INDEX
from compress.run.cache import sha256_of
from compress.run.progress import say
from compress.system.files import disk_errors, settle

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "dequantised.json"  # beside what was made: what of, and the hashes of its weights


def kept(folder: Path, words: str, make: Callable[[Path], None]) -> Path:
    """``folder`` of the cache, made by ``make(made)`` where it is not there or was changed.

    Args:
        words: what it was made of, for whoever looks into it.
        make: writes a model into ``made``, which it makes itself; what else it writes beside it is thrown away.
    """
    marker = folder / MARKER
    if marker.exists():
        recorded = json.loads(marker.read_text("utf-8"))
        hashes = {name: sha for name, sha in recorded.items() if name != "source"}
        if all((folder / n).is_file() and sha256_of(folder / n) == sha for n, sha in hashes.items()):
            return folder
        say(f"the cached copy of {folder.name} was changed; making it again")
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder, every=False), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        make(made)
        hashes = {p.name: sha256_of(p) for p in sorted(made.glob("*.safetensors"))}
        (made / MARKER).write_text(json.dumps({"source": words, **hashes}, indent=1), encoding="utf-8")
        try:
            settle(made, folder)
        except OSError as e:
            # Another process made the same in the meantime; the marker is in what it renamed.
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not marker.exists():
                raise
    return folder


class Files:
    """Weight files that are written one after the other into ``folder``, and the index that names them at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, str] = {}
        self._total = 0

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """A file of that name; none where there are no tensors."""
        from safetensors.torch import save_file

        if not tensors:
            return
        save_file(dict(tensors), self.folder / name, metadata={"format": "pt"})
        self._places |= dict.fromkeys(tensors, name)
        self._total += sum(t.nbytes for t in tensors.values())

    def index(self) -> None:
        facts = {"metadata": {"total_size": self._total}, "weight_map": self._places}
        (self.folder / INDEX).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
