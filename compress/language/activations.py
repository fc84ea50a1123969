"""Activations on disk: kept so that a run can be resumed by any number of processes, or because memory is short.

A kept folder holds one file per range of windows, named by it and by its own hash: every process writes its own range,
and reads whatever files its range needs, so that three processes go on where two have stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CompressError
from compress.processes.distributed import rank
from compress.run.cache import sha256_of
from compress.system.files import settle

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Room:
    """Where a process's activations lie: in memory, on its GPU, or in files that the system writes back when memory is
    short.

    Args:
        folder: of the files; None for memory. They are of no use once the process has ended.
        place: the device whose memory it is, where it is not in files; the CPU by default.
    """

    def __init__(self, folder: Path | None, place: torch.device | None = None) -> None:
        import torch

        self._folder, self._count = folder, 0
        self.place = torch.device("cpu") if folder is not None or place is None else place

    def hold(self, tensor: Tensor) -> Tensor:
        """The same values in a tensor that lies here (float32)."""
        if self._folder is None:
            return tensor.to(self.place)
        import torch

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{rank()}-{self._count}.bin"
        self._count += 1
        path.unlink(missing_ok=True)
        made = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=torch.float32).view(tensor.shape)
        path.unlink()  # it lives as long as the tensor does, and no kill leaves it behind
        return made.copy_(tensor)


def save_part(folder: Path, windows: range, tensors: dict[str, Tensor]) -> None:
    """Writes the tensors (len(windows), ...) of the given windows; whole or not there, and on the disk."""
    from safetensors.torch import save_file

    if not windows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    range_ = f"{windows.start:08d}-{windows.stop:08d}"
    partial = folder / f"{range_}.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    settle(partial, folder / f"{range_}-{sha256_of(partial)[:16]}.safetensors")


def is_whole(folder: Path, total: int) -> bool:
    """Whether the files of a folder hold all of ``total`` windows."""
    reached = 0
    for first, last, _ in sorted(_parts(folder)):
        if first > reached:
            return False
        reached = max(reached, last)
    return reached >= total


def load_part(folder: Path, windows: range) -> dict[str, Tensor]:
    """The tensors of the given windows; the folder is whole.

    Raises:
        CompressError: a file is not as it was written.
    """
    import torch
    from safetensors import safe_open

    pieces: dict[str, list[Tensor]] = {}
    reached = windows.start
    for first, last, path in sorted(_parts(folder)):
        if last <= reached or first >= windows.stop:
            continue
        if sha256_of(path)[:16] != path.stem.split("-")[2]:
            raise CompressError(
                "what was kept on the way was changed since it was written",
                where=str(path),
                fix=f"delete {folder.parent}: what it holds is then computed again",
            )
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it has keys() alone)
                piece = file.get_slice(name)[reached - first : min(last, windows.stop) - first]
                pieces.setdefault(name, []).append(piece)
        reached = min(last, windows.stop)
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    found = []
    for path in folder.glob("*.safetensors"):
        first, last, _ = path.stem.split("-")
        found.append((int(first), int(last), path))
    return found
