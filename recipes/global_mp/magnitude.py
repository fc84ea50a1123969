"""One threshold for all weights of a model, exact to one weight, found by counting.

Global MP (arXiv 2209.14624): the ``prune`` smallest |w| of all prunable weights together become zero. The order of two
weights is that of

    1. |w|, as a number (float32, float16 and bfloat16 may be mixed; -0.0 is 0.0),
    2. the layer's name, as Python orders strings,
    3. the index in the flattened layer,

so that exactly ``prune`` weights go whatever ties there are, and the same ones whoever counts. Floors
(`compress.recipes.global_mp.floors`) hold a layer's largest weights back in the same order.

The bits of a finite |w| in float32 are an integer that grows with |w|, and float16 and bfloat16 are float32 numbers.
The threshold is therefore found digit by digit: a histogram of the upper 16 bits over all weights, one of the lower
16 bits inside the bin that holds the threshold, and a last pass in which every layer says how many of its weights lie
below and at it. What is kept in memory is a chunk of 2^18 weights, one histogram, and three integers a layer.

Over several ranks every rank reads its own layers (each layer lies on one rank whole) and the counts are summed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.recipes.global_mp.floors import allot, check_feasible

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Keys = np.ndarray[Any, np.dtype[np.int32]]

# Reads the layers: yields (name, weight) in any order, anew at every call, each time the same.
Source = Callable[[], Iterable[tuple[str, "Tensor"]]]
# Sums an int64 tensor over all ranks and returns the sum.
AllReduce = Callable[["Tensor"], "Tensor"]

CHUNK = 2**18
BINS = 2**16
SIGN = 0x7FFFFFFF  # clears the sign bit
INFINITY = 0x7F800000  # the first key that is no finite number
WRONG_TYPE, TWICE = -1, -2  # faults of a layer; a positive one counts its NaN and infinite values


@dataclass(frozen=True)
class Cut:
    """What one layer loses: every |w| whose bits are below ``bits``, and the first ``ties`` of those that equal it."""

    size: int
    bits: int
    ties: int
    pruned: int

    @property
    def threshold(self) -> float:
        """The |w| whose bits are ``bits``."""
        return float(struct.unpack("<f", struct.pack("<i", self.bits))[0])

    def mask(self, weight: Tensor) -> Tensor:
        """Bool, of the weight's shape and on its device: True where the weight stays."""
        import numpy as np
        import torch

        kept = np.empty(weight.numel(), dtype=np.bool_)
        ties, at = self.ties, 0
        for keys in _keys(weight):
            part = kept[at : at + len(keys)]
            np.greater_equal(keys, np.int32(self.bits), out=part)
            if ties:
                equal = np.flatnonzero(keys == self.bits)[:ties]
                part[equal] = False
                ties -= len(equal)
            at += len(keys)
        return torch.from_numpy(kept).view(weight.shape).to(weight.device)


def global_masks(
    weights: Mapping[str, Tensor],
    prune: int,
    floors: Mapping[str, int] | None = None,
    all_reduce: AllReduce | None = None,
    order: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Masks (bool, True where the weight stays) that prune exactly ``prune`` weights, see `find_cuts`.

    Names that hold the same tensor (tied weights) count once, under the first of them in the order of names, and
    share one mask; the largest of their floors holds.
    """
    floors = floors or {}
    owners, shared = _owners(weights)
    held = {owner: max(floors.get(name, 0) for name in names) for owner, names in shared.items()}
    # A floor of a layer that another rank holds.
    elsewhere = {name: floor for name, floor in floors.items() if name not in weights}
    cuts = find_cuts(
        lambda: ((name, weights[name]) for name in shared), prune, {**elsewhere, **held}, all_reduce, order
    )
    masks = {owner: cuts[owner].mask(weights[owner]) for owner in shared}
    return {name: masks[owners[name]] for name in weights}


def find_cuts(
    source: Source,
    prune: int,
    floors: Mapping[str, int] | None = None,
    all_reduce: AllReduce | None = None,
    order: Sequence[str] | None = None,
) -> dict[str, Cut]:
    """The cut of every layer that ``source`` yields, such that all cuts together prune exactly ``prune`` weights.

    Args:
        source: read three times; a tensor is let go before the next is asked for.
        floors: the number of weights that a layer keeps at least, by name; none where it is not named.
        all_reduce: for several ranks. Each rank gives the layers it holds, and the same ``prune``, ``floors`` (of all
            layers) and ``order``; each gets the cuts of its own layers. What fails on one rank is raised on all.
        order: with ``all_reduce``, the names of all layers on all ranks (of tied ones the first in order alone).

    Raises:
        CompressError: a weight is NaN or infinite (the layer is named), or of another type than float32, float16 and
            bfloat16; there is no weight; fewer than ``prune`` may be pruned; a layer is there twice, or is held by no
            rank or by two; another rank's layers could not be read (its own error tells why).
        ValueError: ``prune`` is negative, or ``all_reduce`` is given without ``order``.
    """

    if prune < 0:
        raise ValueError(f"prune is {prune}")
    if all_reduce is not None and order is None:
        raise ValueError("ranks need the order of all layers")
    floors = floors or {}
    sizes, coarse = _upper_bits(source, floors, all_reduce, order)
    if not sum(sizes.values()):
        raise CompressError("the model has no prunable weight", where="model", fix="name layers that can be pruned")
    check_feasible(sizes, floors, prune)
    # The minimum threshold: a layer keeps min(sigma, m_l) of its m_l weights.
    caps = {name: size - min(floors.get(name, 0), size) for name, size in sizes.items()}
    bits = _threshold(source, caps, prune, coarse, all_reduce)
    return _cuts_at(source, sizes, caps, prune, bits, all_reduce)


def _over_ranks(all_reduce: AllReduce | None, size: int, count: Callable[[], Tensor]) -> Tensor:
    """The sum over all ranks of what each counts, int64 of any shape of ``size``; a failure of one ends all."""
    import torch

    if all_reduce is None:
        return count()
    failure: Exception | None = None
    try:
        mine = count().flatten()
    except Exception as e:  # whatever it is: the others wait for this rank's counts
        failure, mine = e, torch.zeros(size, dtype=torch.int64)
    total = all_reduce(torch.cat([mine, torch.tensor([int(failure is not None)])]))
    if failure is not None:
        raise failure
    if int(total[-1]):
        raise CompressError(
            f"layers could not be read on {int(total[-1])} of the other ranks",
            where="another rank",
            fix="mend what is said there; nothing was pruned",
        )
    return total[:-1]


def _upper_bits(
    source: Source, floors: Mapping[str, int], all_reduce: AllReduce | None, order: Sequence[str] | None
) -> tuple[dict[str, int], Tensor]:
    """First pass: every layer's size, by name in order, and how many weights go at most where the threshold ends each
    bin of the upper bits, (BINS / 2,) int64. Faults of all ranks are raised here."""
    import torch

    sizes, faults = dict[str, int](), dict[str, int]()

    def count() -> Tensor:
        coarse = torch.zeros(BINS // 2, dtype=torch.int64)
        for name, weight in source():
            size = weight.numel()
            if name in sizes:
                faults[name] = TWICE
                continue
            sizes[name] = size
            faults[name] = 0 if str(weight.dtype) in DTYPES else WRONG_TYPE
            if faults[name] == 0:
                counts = _coarse(weight)
                faults[name] = int(counts[INFINITY >> 16 :].sum())
                coarse += counts.cumsum(0).clamp_(max=size - min(floors.get(name, 0), size))
        every = sorted(sizes) if order is None else sorted(order)
        table = torch.tensor([[name in sizes, sizes.get(name, 0), faults.get(name, 0)] for name in every])
        return torch.cat([coarse, table.long().flatten(), torch.tensor([len(set(sizes) - set(every))])])

    counts = _over_ranks(all_reduce, BINS // 2 + 3 * len(order or ()) + 1, count)
    names = sorted(sizes) if order is None else sorted(order)
    coarse, table = counts[: BINS // 2], counts[BINS // 2 : -1].view(-1, 3)
    _refuse_faults(names, table, int(counts[-1]), [name for name in sizes if name not in set(names)])
    return {name: int(size) for name, size in zip(names, table[:, 1], strict=True)}, coarse


def _threshold(
    source: Source, caps: Mapping[str, int], prune: int, coarse: Tensor, all_reduce: AllReduce | None
) -> int:
    """Second pass: the bits of the threshold t, the kappa-quantile of |w| over all prunable weights together. The bin
    of the upper bits in which the sum reaches ``prune`` is counted in the lower ones."""
    import torch

    high = int(torch.searchsorted(coarse, prune))

    def count() -> Tensor:
        fine = torch.zeros(BINS, dtype=torch.int64)
        for name, weight in source():
            below, inside = _fine(weight, high)
            fine += inside.cumsum(0).add_(below).clamp_(max=caps[name])
        return fine

    return (high << 16) + int(torch.searchsorted(_over_ranks(all_reduce, BINS, count), prune))


def _cuts_at(
    source: Source,
    sizes: Mapping[str, int],
    caps: Mapping[str, int],
    prune: int,
    bits: int,
    all_reduce: AllReduce | None,
) -> dict[str, Cut]:
    """Third pass: what each of this rank's layers has below and at the threshold, and so loses; a layer that its cap
    stops earlier has a cut of its own."""
    import numpy as np
    import torch

    found, cuts = dict[str, tuple[int, int]](), dict[str, Cut]()

    def count() -> Tensor:
        for name, weight in source():
            below = equal = 0
            for keys in _keys(weight):
                below += int(np.count_nonzero(keys < bits))
                equal += int(np.count_nonzero(keys == bits))
            found[name] = (below, below + equal)
            if below > caps[name]:
                cuts[name] = _cut_alone(weight, caps[name])
        return torch.tensor([found.get(name, (0, 0)) for name in sizes], dtype=torch.int64)

    reached = _over_ranks(all_reduce, 2 * len(sizes), count).view(-1, 2)
    losses = allot(reached[:, 0].tolist(), reached[:, 1].tolist(), [caps[name] for name in sizes], prune)
    for name, loss in zip(sizes, losses, strict=True):
        if name in found and name not in cuts:
            cuts[name] = Cut(sizes[name], bits, loss - found[name][0], loss)
    return cuts


def safetensors_source(paths: Iterable[Path], prunable: Callable[[str], bool] | Collection[str]) -> Source:
    """Reads the named tensors of safetensors files, one tensor at a time.

    Args:
        paths: the shards of a model.
        prunable: says by name which tensors are read.

    Raises:
        CompressError: (when it is read) a file is no safetensors file, or is cut short.
    """
    wanted = prunable if callable(prunable) else set(prunable).__contains__
    files = list(paths)

    def read() -> Iterator[tuple[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        for path in files:
            if path.suffix != ".safetensors":
                raise CompressError(
                    "only safetensors files are read: a pickle can hold code",
                    where=str(path),
                    fix="save the model with save_pretrained or safetensors.torch.save_file",
                )
            try:
                with safe_open(path, "pt") as file:
                    for name in sorted(file.keys()):
                        if wanted(name):
                            yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as e:
                raise CompressError(
                    f"the weight file cannot be read: {e}", where=str(path), fix="fetch or copy it again"
                ) from e

    return read


def _owners(weights: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The name under which each tensor counts, and all names of each; the first name in order owns."""
    owners: dict[str, str] = {}
    shared: dict[str, list[str]] = {}
    seen: dict[object, str] = {}
    for name in sorted(weights):
        w = weights[name]
        place: object = (w.device, w.data_ptr(), w.shape, w.stride(), w.dtype) if w.numel() else name
        owner = seen.setdefault(place, name)
        owners[name] = owner
        shared.setdefault(owner, []).append(name)
    return owners, shared


DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")


def _keys(weight: Tensor) -> Iterator[Keys]:
    """The bits of |w| as float32, in chunks of at most `CHUNK`; a chunk is overwritten when the next is asked for."""
    import numpy as np
    import torch

    flat = weight.detach().reshape(-1)
    buffer = np.empty(min(CHUNK, len(flat)), dtype=np.int32)
    for at in range(0, len(flat), CHUNK):
        chunk = flat[at : at + CHUNK].to("cpu")
        out = buffer[: len(chunk)]
        if chunk.dtype == torch.bfloat16:
            # A bfloat16 is the upper half of a float32.
            np.left_shift(chunk.view(torch.int16).numpy(), 16, out=out, dtype=np.int32)
            np.bitwise_and(out, SIGN, out=out)
        else:
            np.bitwise_and(chunk.float().view(torch.int32).numpy(), SIGN, out=out)
        yield out


def _coarse(weight: Tensor) -> Tensor:
    """How many weights have each value of the upper 16 bits (the sign is cleared): (2^15,) int64."""
    import numpy as np
    import torch

    counts = torch.zeros(BINS // 2, dtype=torch.int64)
    for keys in _keys(weight):
        np.right_shift(keys, 16, out=keys)
        counts += torch.bincount(torch.from_numpy(keys), minlength=BINS // 2)
    return counts


def _fine(weight: Tensor, high: int) -> tuple[int, Tensor]:
    """How many weights lie below the bin ``high``, and how many inside have each value of the lower 16 bits."""
    import numpy as np
    import torch

    below, counts = 0, torch.zeros(BINS, dtype=torch.int64)
    for keys in _keys(weight):
        np.subtract(keys, np.int32(high << 16), out=keys)
        below += int(np.count_nonzero(keys < 0))
        # Unsigned, what lies below the bin is far above it: one comparison instead of two.
        inside = keys[keys.view(np.uint32) < BINS]
        if len(inside):
            counts += torch.bincount(torch.from_numpy(inside), minlength=BINS)
    return below, counts


def _cut_alone(weight: Tensor, loss: int) -> Cut:
    """The cut that takes the ``loss`` smallest weights of one layer."""
    import torch

    coarse = _coarse(weight).cumsum(0)
    high = int(torch.searchsorted(coarse, loss))
    below, inside = _fine(weight, high)
    fine = inside.cumsum(0).add_(below)
    low = int(torch.searchsorted(fine, loss))
    before = int(fine[low - 1]) if low else below
    return Cut(weight.numel(), (high << 16) + low, loss - before, loss)


def _refuse_faults(names: Sequence[str], table: Tensor, strangers: int, mine: Sequence[str]) -> None:
    """``table`` (layers, 3): by how many ranks a layer is held, its size, its fault (how many weights, or its kind)."""
    if strangers:
        raise CompressError(
            f"layers that are not in the order of all layers: {strangers}",
            where=", ".join(mine) or "another rank",
            fix="give every rank the names of all layers",
        )
    for name, (held, _, fault) in zip(names, table.tolist(), strict=True):
        if held != 1:
            raise CompressError(
                f"the layer {name} is held by {held} ranks", where="ranks", fix="give each layer to one rank, whole"
            )
        if fault == TWICE:
            raise CompressError(
                f"the layer {name} is there twice", where=name, fix="give every layer a name of its own"
            )
        if fault == WRONG_TYPE:
            raise CompressError(
                f"the weight {name} is not of a type that can be compared",
                where=name,
                fix="convert it to float32, float16 or bfloat16",
            )
        if fault:
            raise CompressError(
                f"the weight {name} holds {fault:,} NaN or infinite values",
                where=name,
                fix="repair or fetch the model again; nothing was pruned",
            )
