"""Images that stay on disk and are decoded when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.data.decode import VERSION, opened, pixels
from compress.run.progress import Progress
from compress.schema.sections import DataSpec
from compress.system.host import processors


@dataclass(frozen=True)
class Fit:
    """How images of any size become squares.

    Args:
        how: ``crop``: the short side is scaled to ``size / crop`` and the centre cut out, as ImageNet is evaluated;
            ``stretch``: the whole image is resized.
        workers: threads that decode at once; the result does not depend on it.
    """

    size: int
    how: Literal["crop", "stretch"] = "crop"
    crop: float = 0.875
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    white: float | None = None
    workers: int | None = None

    @classmethod
    def of(cls, spec: DataSpec, size: int) -> Fit:
        return cls(size, spec.fit, spec.crop, spec.resample, spec.white, spec.workers)

    @property
    def decides(self) -> list[Any]:
        """What a sample's pixels depend on, JSON-like; what was always so says nothing."""
        own = [self.how, self.crop, self.resample]
        return [VERSION, self.white, self.size, *([own] if own != ["crop", 0.875, "bilinear"] else [])]


class FolderImages:
    """Images on disk: (n, 3, size, size) uint8, indexed like a tensor."""

    def __init__(self, paths: Sequence[Path], fit: Fit) -> None:
        self.paths, self.fit = tuple(paths), fit

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: Tensor) -> Tensor:
        return self._stacked([int(i) for i in at], lambda i: self._squared(self.paths[i]))

    def drawn(self, at: Tensor, seed: int) -> Tensor:
        """The same, each from a random part (8 to 100 % of the area, sides 3:4 to 4:3): how ImageNet is trained on.

        A part is drawn from ``seed`` and the image's own number, so that it does not matter what else is asked for.
        """

        def read(i: int) -> Tensor:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
            return self._part(self.paths[i], torch.rand(4, generator=generator).tolist())

        return self._stacked([int(i) for i in at], read)

    def whole(self) -> Tensor:
        """All of them, decoded once; an image that has the size already is taken as it is."""
        side = self.fit.size
        images = torch.empty(len(self), 3, side, side, dtype=torch.uint8)
        with Progress(len(self), "decoding images") as bar:
            for at in torch.arange(len(self)).split(64):
                images[at] = self._stacked(at.tolist(), lambda i: self._squared(self.paths[i], as_it_is=True))
                bar.update(len(at))
        return images

    def only(self, at: Tensor) -> FolderImages:
        return FolderImages([self.paths[int(i)] for i in at], self.fit)

    def signature(self) -> bytes:
        return json.dumps([*self.fit.decides, *([str(p), p.stat().st_size] for p in self.paths)]).encode()

    def _stacked(self, numbers: Sequence[int], read: Callable[[int], Tensor]) -> Tensor:
        if not numbers:
            return torch.zeros(0, 3, self.fit.size, self.fit.size, dtype=torch.uint8)
        workers = min(self.fit.workers or processors(), len(numbers))
        if workers == 1:
            return torch.stack([read(i) for i in numbers])
        with ThreadPoolExecutor(workers) as pool:  # decoders and resizing do not hold Python's lock
            return torch.stack(list(pool.map(read, numbers)))

    def _squared(self, path: Path, as_it_is: bool = False) -> Tensor:
        fit, side = self.fit, self.fit.size
        with opened(path, fit.white) as image:
            if fit.how == "stretch" or (as_it_is and image.size == (side, side)):
                return pixels(image if image.size == (side, side) else image.resize((side, side), self._filter))
            scale = int(side / fit.crop + 1e-9) / min(image.size)
            image = image.resize([max(side, round(length * scale)) for length in image.size], self._filter)
            left, top = ((length - side) // 2 for length in image.size)
            return pixels(image.crop((left, top, left + side, top + side)))

    def _part(self, path: Path, u: list[float]) -> Tensor:
        with opened(path, self.fit.white) as image:
            area = image.width * image.height * (0.08 + 0.92 * u[0])
            ratio = (3 / 4) ** (1 - 2 * u[1])
            width = min(image.width, max(1, round((area * ratio) ** 0.5)))
            height = min(image.height, max(1, round((area / ratio) ** 0.5)))
            left, top = round(u[2] * (image.width - width)), round(u[3] * (image.height - height))
            box = (left, top, left + width, top + height)
            return pixels(image.resize((self.fit.size, self.fit.size), self._filter, box))

    @property
    def _filter(self) -> Any:
        from PIL import Image

        return Image.Resampling.BICUBIC if self.fit.resample == "bicubic" else Image.Resampling.BILINEAR


# Of images that are read into memory at once: bytes of their pixels.
IN_MEMORY = 2**30


def held(images: FolderImages) -> Tensor | FolderImages:
    """The pixels where they take little memory, else the images, which are then decoded as they are asked for."""
    small = len(images) * 3 * images.fit.size**2 <= IN_MEMORY
    return images.whole() if small else images
