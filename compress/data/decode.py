"""Image files as pixels: the one place that opens them. Upright as their EXIF says, and in 8 bits with white as white.

What says where something is in an image (masks, boxes) is of the upright one: that is what people and their tools look
at. A mask is turned by its own file's EXIF, as the image is by its own.

A file of more than 8 bits a channel is scaled by what its format calls white: 65,535 of 16 bits. Whole numbers of 32
bits and floats have no white that a format names: it is then the first of 1 (floats alone), 255 and 65,535 that no
value passes. Data of fewer bits in wider numbers (X-rays of 12 bits) has a white that only its owner knows, and a
recipe says: ``data.white``. What a transparent pixel hides is taken as it is stored.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CompressError
from compress.system.files import check_regular

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
VERSION = 2  # of how files become pixels: part of what data that is read as it goes is known by
DEEP = ("I", "F")  # and all that begin with I;16: one channel of more than 8 bits
BITS_PER_SAMPLE = 258  # a TIFF's tag
ORIENTATION = 0x0112  # EXIF's
SAY_IT = "write it with 8 or 16 bits, or say it: --set data.white=VALUE (what is below 0 is black)"


def opened(path: Path, white: float | None = None) -> Any:
    """A PIL image in RGB, upright.

    Args:
        white: the value that is white in an image of more than 8 bits; by default as said above.

    Raises:
        CompressError: the file is no image, or holds values that no white is known for.
    """
    return _read(path, str(path), lambda stored: rgb(stored, white, str(path)))


def upright(source: Path | io.BytesIO, where: str) -> Any:
    """A PIL image in its own mode, upright.

    Raises:
        CompressError: it is no image.
    """
    return _read(source, where, _turned)


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of an image, upright; the pixels are read where it has to be turned.

    Raises:
        CompressError: the file is no image.
    """

    def size(stored: Any) -> tuple[int, int]:
        # Pillow turns a TIFF itself when it is read, and once more where its EXIF was asked for before.
        plain = stored.format != "TIFF" and stored.getexif().get(ORIENTATION, 1) == 1
        found: tuple[int, int] = (stored if plain else _turned(stored)).size
        return found

    found: tuple[int, int] = _read(path, str(path), size)
    return found


def rgb(image: Any, white: float | None, where: str) -> Any:
    """A PIL image of any mode, as it was opened, in RGB and upright. ``white`` as in `opened`.

    Raises:
        CompressError: it holds values that no white is known for.
    """
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
    image = _turned(image)
    if image.mode.startswith("I;16"):
        return _scaled(np.array(image), white or 2.0**bits - 1, where).convert("RGB")
    if image.mode in DEEP:
        values = np.array(image)
        return _scaled(values, white or white_of(values, where, SAY_IT), where).convert("RGB")
    return image.convert("RGB")


def white_of(values: NDArray[Any], where: str, fix: str = "write it with 8 or 16 bits") -> float:
    """The first of 1 (of floats), 255 and 65,535 that no value passes.

    Raises:
        CompressError: a value is below 0, above 65,535, NaN or infinite.
    """
    whites = (1.0, 255.0, 65535.0) if np.issubdtype(values.dtype, np.floating) else (255.0, 65535.0)
    least, most = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    found = next((white for white in whites if 0 <= least <= most <= white), None)
    if found is None:
        raise CompressError(
            f"the values lie from {least:g} to {most:g}: what is white there is not known",
            where=where,
            fix=fix,
        )
    return found


def pixels(image: Any) -> Tensor:
    """A PIL image -> uint8 (c, h, w)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _scaled(values: NDArray[Any], white: float, where: str) -> Any:
    from PIL import Image

    if not np.isfinite(values).all():
        raise CompressError("the image holds NaN or infinity", where=where, fix="mend or remove the file")
    return Image.fromarray(np.rint(values.astype(np.float64) * (255 / white)).clip(0, 255).astype(np.uint8))


def _turned(stored: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(stored)


def _read(source: Path | io.BytesIO, where: str, take: Any) -> Any:
    """What ``take`` makes of an image file; whatever a decoder says of a damaged one is one error of ours."""
    from PIL import Image

    try:
        if isinstance(source, Path):
            check_regular(source, "the image", "mend or remove the file")
        # A file that Pillow opens by its name is mapped into memory, and a TIFF that is to be turned is then garbled.
        with source.open("rb") if isinstance(source, Path) else source as file, Image.open(file) as stored:
            return take(stored)
    except (CompressError, MemoryError):
        raise
    except Exception as e:  # each of Pillow's decoders has its own types for a broken file
        said = " ".join(str(e).split())[:300] or type(e).__name__
        raise CompressError(f"the image cannot be read: {said}", where=where, fix="mend or remove the file") from e
