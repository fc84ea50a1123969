"""A model that is never held: its blocks are read from safetensors when they are asked for, and let go again.

The modules are the family's own, so that everything that runs a model runs this one, block by block. Where the recipe
says so, several processes that walk over the blocks together hold a part of each instead (`in_step`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models.decoder import blocks, prefix, put_blocks, without_blocks
from compress.models.folder import CONFIG, weights_of
from compress.models.reading import from_config, is_ragged, load_config, read_generation, rejected
from compress.models.shards import Shards
from compress.processes.distributed import empty_weights, world

if TYPE_CHECKING:
    from compress.models.families.base import Family


class StreamedBlocks(nn.ModuleList):
    """The blocks of a model on disk. An index or an iteration gives a block with its weights, in float32.

    Args:
        skeletons: the blocks without weights.
        weights: where each tensor of the model lies.
        prefix: what the names of the blocks' tensors begin with.
        cache: blocks that stay in memory, the latest used.
        shard: processes that go over the blocks `in_step` hold a part of each.
    """

    def __init__(
        self,
        skeletons: Sequence[nn.Module],
        weights: Weights,
        prefix: str,
        cache: int,
        device: torch.device,
        shard: bool = False,
    ) -> None:
        super().__init__(skeletons)
        self._prefix = prefix
        self._weights, self._cache, self._device = weights, max(1, cache), device
        self._held: OrderedDict[int, nn.Module] = OrderedDict()
        self._change: Callable[[int, nn.Module], nn.Module] | None = None
        self._shard = shard
        self._shards: Shards | None = None
        self.bytes_read = 0

    @property
    def is_sharded(self) -> bool:
        """Whether blocks come from the parts that all processes hold."""
        return self._shards is not None

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """While it is open, blocks come from the parts that all processes hold. See `in_step`."""
        if not self._shard or world() == 1 or self._shards is not None:
            yield
            return

        def part(index: int, name: str, rows: slice) -> Tensor:
            found = self._weights.rows(f"{self._prefix}{index}.{name}", rows)
            self.bytes_read += found.nbytes
            return found

        # What is held from before differs from process to process, and what is asked for next must not.
        self._held.clear()
        self._shards = Shards([self.skeleton(i) for i in range(len(self))], part)
        try:
            yield
        finally:
            self._shards = None
            self._held.clear()

    def changed(self, change: Callable[[int, nn.Module], nn.Module]) -> StreamedBlocks:
        """The same blocks, each given to ``change`` with its number when it has been read (and changed so far)."""
        made, first = self.moved(self._device), self._change
        made._change = change if first is None else lambda i, block: change(i, first(i, block))
        return made

    def moved(self, device: torch.device) -> StreamedBlocks:
        """The same blocks, read to another device."""
        skeletons = [self.skeleton(i) for i in range(len(self))]
        made = StreamedBlocks(skeletons, self._weights, self._prefix, self._cache, device, self._shard)
        made._change = self._change
        return made

    def skeleton(self, index: int) -> nn.Module:
        """The block without its weights."""
        found: nn.Module = self._modules[str(index)]  # type: ignore[assignment]
        return found

    def __getitem__(self, index: int | slice) -> Any:  # type: ignore[override]
        if isinstance(index, slice):
            return _View(self, range(len(self))[index])
        index = range(len(self))[index]
        if index not in self._held:
            while len(self._held) >= self._cache:
                self._held.popitem(last=False)
            self._held[index] = self._read(index)
        self._held.move_to_end(index)
        return self._held[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(_View(self, range(len(self))))

    def _read(self, index: int) -> nn.Module:
        block = copy.deepcopy(self.skeleton(index))
        if self._shards is None:
            tensors = self._weights.below(f"{self._prefix}{index}.", self._device)
            self.bytes_read += sum(t.nbytes for t in tensors.values())
        else:
            tensors = self._shards.tensors(index)
        try:
            # On a GPU made float32 there: half goes over the bus, and no CPU core converts it.
            block.load_state_dict({k: t.float() for k, t in tensors.items()}, assign=True)
        except RuntimeError as e:
            raise CompressError(
                f"block {index}'s weights do not fit the configuration: {str(e).splitlines()[-1].strip()}",
                where=str(self._weights.folder),
                fix="weights and config.json must belong together",
            ) from e
        lacking = [n for n, b in block.named_buffers() if b.device.type == "meta"]
        if lacking:
            raise CompressError(
                f"block {index} computes {lacking[0]} when it is built and saves it nowhere, so it cannot be streamed",
                where=str(self._weights.folder),
                fix="hold the model in memory (--set memory.stream=false)",
            )
        block.requires_grad_(False).eval()
        return block if self._change is None else self._change(index, block)


class _View:
    """Some blocks, each read when the iteration comes to it."""

    def __init__(self, blocks: StreamedBlocks, indices: range) -> None:
        self._blocks, self._indices = blocks, indices

    def __iter__(self) -> Iterator[nn.Module]:
        for index in self._indices:
            yield self._blocks[index]

    def __len__(self) -> int:
        return len(self._indices)


class Weights:
    """The tensors of a model folder. Files are opened for one reading and closed, so that no mapped page stays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = weights_of(folder).places

    def below(self, prefix: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest of their names, of the type they are stored in."""
        return self._read([n for n in self._files if n.startswith(prefix)], len(prefix), device)

    def beside(self, prefix: str) -> dict[str, Tensor]:
        """All the others."""
        return self._read([n for n in self._files if not n.startswith(prefix)], 0)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of one tensor; no others are read.

        Raises:
            CompressError: there is no such tensor.
        """
        from safetensors import safe_open

        if name not in self._files:
            raise CompressError(
                f"the weight {name} is missing",
                where=str(self.folder),
                fix="weights and config.json must belong together",
            )
        with safe_open(self._files[name], "pt") as file:
            found: Tensor = file.get_slice(name)[rows].clone()
        return found

    def _read(self, names: Sequence[str], cut: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        from safetensors import safe_open

        found = {}
        for path in sorted({self._files[n] for n in names}):
            with safe_open(path, "pt") as file:
                # Copies: a tensor must not hold on to the mapped file.
                found.update(
                    {n[cut:]: file.get_tensor(n).to(device, copy=True) for n in names if self._files[n] == path}
                )
        return found


def is_streamed(model: Any) -> bool:
    """Whether a model's blocks are read from disk when they are run."""
    return isinstance(blocks(model), StreamedBlocks)


def is_in_step(model: Any) -> bool:
    """Whether a block must be asked for by all processes when one asks for it."""
    found = blocks(model)
    return isinstance(found, StreamedBlocks) and found.is_sharded


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """While it is open, all processes go over the blocks in the same order, each block asked for by all.

    Where the model is streamed and the recipe says `memory.shard`, every process then reads its part of the blocks once
    (FSDP2), and a block is put together from all parts when it is asked for: all of them together read the disk once.
    """
    found = blocks(model)
    with found.sharded() if isinstance(found, StreamedBlocks) else nullcontext():
        yield


@contextmanager
def only_blocks(model: Any, device: torch.device) -> Iterator[None]:
    """While it is open, all that a streamed model holds beside its blocks lies in memory, not on ``device``: a walk
    over the blocks needs neither embeddings nor head, and at 70B they take 8 GB."""
    parked = is_streamed(model) and device.type != "cpu"
    try:
        if parked:
            with without_blocks(model):
                model.to("cpu")
        yield
    finally:
        if parked:
            # Where an error has left no room on the device, that error is what is to be heard of.
            with without_blocks(model), suppress(torch.OutOfMemoryError):
                model.to(device)


def as_stored(model: Any, dtype: torch.dtype) -> Any:
    """A float32 ``model`` with every weight rounded as saving it in ``dtype`` does, held or streamed as it is; weights
    that rounding leaves as they are stay shared with it."""
    if dtype == torch.float32:
        return model
    streamed = blocks(model)
    if not isinstance(streamed, StreamedBlocks):
        return _rounded(model, dtype)
    with without_blocks(model):
        made = _rounded(model, dtype)
    put_blocks(made, streamed.changed(lambda _, block: _rounded(block, dtype)))
    return made


def _rounded(module: Any, dtype: torch.dtype) -> Any:
    """A copy whose saved tensors hold only what ``dtype`` can, in the type they had."""
    instead: dict[int, Any] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        kept = tensor.detach().to(dtype).to(tensor)
        if torch.equal(kept, tensor):
            instead[id(tensor)] = tensor
        else:
            instead[id(tensor)] = nn.Parameter(kept, requires_grad=False) if isinstance(tensor, nn.Parameter) else kept
    return copy.deepcopy(module, instead)


def on_cpu(model: Any) -> Any:
    """The model where exporters trace and runtimes are compared with it: itself where it lies on the CPU, else a copy;
    what is streamed stays so."""
    cpu = torch.device("cpu")
    if model.get_input_embeddings().weight.device == cpu:
        return model
    streamed = blocks(model)
    if not isinstance(streamed, StreamedBlocks):
        return copy.deepcopy(model).to(cpu)
    with without_blocks(model):
        made = copy.deepcopy(model).to(cpu)
    put_blocks(made, streamed.moved(cpu))
    return made


def stream_model(folder: Path, family: Family, cache: int, device: torch.device, shard: bool = False) -> Any:
    """A transformers causal LM whose blocks are streamed; embeddings, last norm and head are held, in float32.

    Args:
        folder: a model of one shape or in the `per-layer` layout; code in it is never run.
        cache: blocks that stay in memory.
        shard: processes hold a part of every block while they are `in_step`.

    Raises:
        CompressError: weights are missing or do not fit the configuration.
    """
    config = load_config(folder)
    with rejected(folder, CONFIG, "no model can be made of the configuration"), empty_weights():
        model = from_config(config, family.ragged_class() if is_ragged(folder) else None)
    read_generation(model, folder)
    weights = Weights(folder)
    place = prefix(model)
    rest = weights.beside(place)
    skeletons = list(blocks(model))
    put_blocks(model, nn.ModuleList())
    _, unexpected = model.load_state_dict({k: t.float() for k, t in rest.items()}, strict=False, assign=True)
    model.tie_weights()
    lacking = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    if lacking or unexpected:
        raise CompressError(
            f"the weight {(lacking or unexpected)[0]} is {'missing' if lacking else 'not one of this architecture'}",
            where=str(folder),
            fix="weights and config.json must belong together",
        )
    model.to(device)
    put_blocks(model, StreamedBlocks(skeletons, weights, place, cache, device, shard))
    return model.requires_grad_(False).eval()
