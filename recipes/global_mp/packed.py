"""The packed form of a sparse model: a bit a weight that says whether it is zero, and the values of those that are not.

Every tensor that is smaller so becomes two, ``<name>.bits`` (uint8, as in `masks`) and ``<name>.values`` (in the
tensor's own type); the others stay as they are. A weight counts as zero where all its bits are, so that -0.0 and every
other pattern comes back as it was. At a density d a weight of b bits takes 1 + d b bits: at 90 % sparsity 0.13 of
float32, 0.16 of float16 and bfloat16.

It is a form to store and to send: nothing computes with it, and `unpack_folder` makes the model again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CompressError
from compress.recipes.global_mp.masks import one_entry, pack_bits, read_tensors, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "compress packed 1"
SUFFIX = ".packed.safetensors"
AGAIN = "pack the model again"


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Packs what is smaller packed: the tensors to store, and name -> shape of the packed ones."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().reshape(-1)
        kept = flat.view(whole[flat.element_size()]) != 0 if flat.element_size() in whole else None
        bits = -(-flat.numel() // 8)
        if kept is None or bits + int(kept.sum()) * flat.element_size() >= flat.numel() * flat.element_size():
            stored[name] = tensor.detach().contiguous()
            continue
        stored[f"{name}.bits"], stored[f"{name}.values"] = pack_bits(kept), flat[kept]
        shapes[name] = list(tensor.shape)
    return stored, shapes


def unpack(stored: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """What `pack` packed, bit for bit.

    Raises:
        ValueError: bits and values do not belong together.
    """
    tensors = dict(stored)
    for name, shape in shapes.items():
        if f"{name}.bits" not in tensors or f"{name}.values" not in tensors:
            raise ValueError(f"{name} has no bits or no values")
        kept, values = unpack_bits(tensors.pop(f"{name}.bits"), shape), tensors.pop(f"{name}.values")
        if values.shape != (int(kept.sum()),):
            raise ValueError(f"{name} has {values.numel():,} values for {int(kept.sum()):,} places")
        tensors[name] = values.new_zeros(shape)
        tensors[name][kept] = values
    return tensors


def pack_file(source: Path, target: Path) -> None:
    """Packs one safetensors file; its own metadata are kept."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(source, "pt") as file:
        own = file.metadata() or {}
    stored, shapes = pack(load_file(source))
    save_file(stored, target, metadata=one_entry({"format": FORMAT, "shapes": shapes, "metadata": own}))


def unpack_file(source: Path, target: Path) -> None:
    """Makes the safetensors file again that `pack_file` packed: the same tensors and metadata.

    Raises:
        CompressError: it is missing, is no packed file, or is damaged.
    """
    from safetensors.torch import save_file

    stored, facts = read_tensors(source, FORMAT, "packed file", AGAIN)
    try:
        tensors, own = unpack(stored, facts["shapes"]), facts["metadata"]
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise CompressError(f"the packed file is damaged: {e}", where=str(source), fix=AGAIN) from e
    save_file(tensors, target, metadata=own or None)


def pack_folder(model: Path, target: Path, weights: list[Path]) -> None:
    """Packs a saved model: its ``weights`` files one after the other; what lies beside them (config, tokenizer) is
    copied. ``target`` exists and is empty."""
    for path in sorted(model.iterdir()):
        if path in weights:
            pack_file(path, target / f"{path.name.removesuffix('.safetensors')}{SUFFIX}")
        elif path.is_file() and path.suffix != ".safetensors" and path.name != "seal.json":
            shutil.copyfile(path, target / path.name)


def unpack_folder(packed: Path, target: Path) -> None:
    """Makes the model folder again from the packed one.

    Raises:
        CompressError: there is no packed file, one is damaged, or ``target`` is not empty.
    """
    files = sorted(packed.glob(f"*{SUFFIX}"))
    if not files:
        raise CompressError("there is no packed model here", where=str(packed), fix=f"name a folder with *{SUFFIX}")
    if target.exists() and any(target.iterdir()):
        raise CompressError("the folder is not empty", where=str(target), fix="name another")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(packed.iterdir()):
        if path in files:
            unpack_file(path, target / f"{path.name.removesuffix(SUFFIX)}.safetensors")
        elif path.is_file() and path.name != "seal.json":
            shutil.copyfile(path, target / path.name)
