"""Masks on disk, a bit a weight: which weights of a model stay, and of which model.

The file is a safetensors file. Each layer is one uint8 tensor, ceil(n / 8) bytes: bit i % 8 (the lowest first) of byte
i // 8 is 1 where weight i of the flattened layer stays. The metadata hold, as JSON, the format, the shape of every
layer, and the hash of the weights that the masks were made for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.run.strict_json import parse_json
from compress.run.tensor_files import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from compress.recipes.global_mp.magnitude import Source

FORMAT = "compress masks 1"
KEY = "compress"


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as (ceil(n / 8),) uint8, the lowest bit first."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little"))


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """What `pack_bits` packed: a bool tensor of ``shape``.

    Raises:
        ValueError: it is not as long as the shape asks for, or has bits behind the last weight.
    """
    import numpy as np
    import torch

    count = math.prod(shape)
    if str(bits.dtype) != "torch.uint8" or tuple(bits.shape) != (-(-count // 8),):
        raise ValueError(f"{tuple(bits.shape)} {bits.dtype} for {count:,} weights")
    flat = np.unpackbits(bits.numpy(), bitorder="little")
    if flat[count:].any():
        raise ValueError(f"bits behind the last of {count:,} weights")
    return torch.from_numpy(flat[:count].astype(np.bool_)).reshape(tuple(shape))


def weights_sha(source: Source) -> str:
    """Hex SHA-256 over names, types, shapes and bytes of the layers that ``source`` yields, in the order of names."""
    import torch

    parts = []
    for name, weight in source():
        digest = hashlib.sha256(f"{name}:{weight.dtype}:{tuple(weight.shape)}:".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        parts.append((name, digest.hexdigest()))
    return hashlib.sha256("\n".join(f"{name}:{each}" for name, each in sorted(parts)).encode()).hexdigest()


def save_masks(path: Path, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], weights: str) -> None:
    """Writes the masks of the model whose weights have the hash ``weights``; they may come one at a time."""
    from safetensors.torch import save_file

    bits, shapes = {}, {}
    for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
        bits[name], shapes[name] = pack_bits(mask), list(mask.shape)
    save_file(bits, path, metadata=one_entry({"format": FORMAT, "weights": weights, "shapes": shapes}))


def load_masks(
    path: Path, weights: str | None = None, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """Reads masks (bool, True where the weight stays), checked against the model that they are for.

    Args:
        weights: the hash of the model's weights; not checked where it is None.
        shapes: the shape of every layer of the model that can be pruned; not checked where it is None.

    Raises:
        CompressError: the file is missing, is no mask file or is cut short; it belongs to other weights; a layer is
            missing, is unknown to the model, or has another shape.
    """
    again = "make it again with `compress prune`"
    bits, facts = read_tensors(path, FORMAT, "mask file", again)

    def refuse(what: str, fix: str) -> CompressError:
        return CompressError(what, where=str(path), fix=fix)

    belongs = "use the masks with the model that they were made for"
    try:
        made_for = str(facts["weights"])
        said = {str(name): [int(n) for n in shape] for name, shape in facts["shapes"].items()}
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise refuse("the shapes in the mask file cannot be read", again) from e
    if weights is not None and made_for != weights:
        raise refuse(f"the masks belong to other weights ({made_for[:16]}..., not {weights[:16]}...)", belongs)
    if said.keys() != bits.keys():
        raise refuse(f"the mask file is damaged: {_first(said.keys() ^ bits.keys())} has no shape or no bits", again)
    if shapes is not None:
        if missing := shapes.keys() - said.keys():
            raise refuse(f"the masks of {len(missing)} layers are missing, such as {_first(missing)}", belongs)
        if unknown := said.keys() - shapes.keys():
            raise refuse(f"there are masks of {len(unknown)} unknown layers, such as {_first(unknown)}", belongs)
        for name, shape in shapes.items():
            if list(shape) != said[name]:
                raise refuse(f"the mask of {name} is {said[name]}, the weight {list(shape)}", belongs)
    masks = {}
    for name, packed in bits.items():
        try:
            masks[name] = unpack_bits(packed, said[name])
        except ValueError as e:
            raise refuse(f"the mask of {name} is damaged: {e}", again) from e
    return masks


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with 0.0 (never -0.0, which a product would give) where the mask is False."""
    return weight.masked_fill(~mask, 0.0)


def one_entry(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as safetensors metadata. In one entry: safetensors writes several in an order that changes from one call to
    the next, and a file made again is to have the same bytes."""
    return {KEY: json.dumps(facts, sort_keys=True)}


def read_tensors(path: Path, format_: str, what: str, fix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a safetensors file, and the facts in its metadata, which must name this format.

    Raises:
        CompressError: there is none, it cannot be read, or it has another format.
    """
    if not path.exists():
        raise CompressError(f"there is no {what} here", where=str(path), fix=fix)
    with open_tensors(path, f"the {what}", f"{fix} (a pickle is never read)") as file:
        text = (file.metadata() or {}).get(KEY, "{}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    facts = parse_json(text, f"the metadata of the {what}", str(path), fix=fix)
    if not isinstance(facts, dict) or facts.get("format") != format_:
        raise CompressError(f"this is no {what}", where=str(path), fix=fix)
    return tensors, facts


def _first(names: Iterable[str]) -> str:
    return min(names)
