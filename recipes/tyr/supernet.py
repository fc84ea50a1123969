"""The supernet: for every sublayer its levels, each a set of kept units with refitted weights, on disk.

Two streams of calibration activations walk the blocks together: the dense model's, and the pruned one's, which in a
block with several candidates is their expectation (paper: expectation error accumulation). `down_proj` sees its own
block's pruned attention, because the attention candidates are made before its statistics are taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import CompressError
from compress.language.activations import Room, load_part, save_part
from compress.language.computing import BATCH_TOKENS as BATCH_TOKENS
from compress.language.computing import batch_tokens as batch_tokens
from compress.models.blocks import BlockRunner
from compress.processes.distributed import from_main, is_main, main_says, share, world
from compress.recipes.tyr.local import Moments, Problem, Score, channels, damp, neuron_levels, prune_heads

if TYPE_CHECKING:
    from compress.models.families.base import BlockCosts, BlockGeometry, Geometry

Target = Literal["own", "output", "residual"]
Accumulation = Literal["expectation", "uniform", "none"]
TokenWeight = Literal["norm", "none"]

BATCHES = 16  # a set of windows makes at least so many batches, where it has so many windows: work for 16 processes
KEEP_BYTES = 2**31  # a sublayer's inputs are kept while they take no more than this


def batch_windows(count: int, length: int, most: int | None = None) -> int:
    """How many of ``count`` windows run together: of at most ``most`` tokens, `BATCH_TOKENS` by default."""
    return max(1, min((most or BATCH_TOKENS) // length, count // BATCHES))


def batches(windows: Tensor, most: int | None = None) -> list[slice]:
    """Slices of ``windows`` (n, length, ...), `batch_windows` each."""
    size = batch_windows(len(windows), windows.shape[1], most)
    return [slice(i, i + size) for i in range(0, len(windows), size)]


@dataclass(frozen=True)
class Level:
    """One candidate of a sublayer: ``units`` are kept query heads or neurons (original indices, sorted);
    ``weight`` (hidden, kept channels) is the refitted projection, None for the untouched dense one."""

    units: tuple[int, ...]
    saving: int
    sparsity: float
    loss: float
    weight: Tensor | None


@dataclass(frozen=True)
class Menu:
    """The levels of one block: neuron counts, and head choices as (KV groups, query heads per group), most first.

    ``solution``: of the levels, the (KV groups, query heads per group) and the neurons that the solution so far keeps;
    None before there is one.
    """

    neurons: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    solution: tuple[tuple[int, int], int] | None = None


def neuron_counts(ffn: int, centre: int, step: int, levels: int, round_to: int) -> tuple[int, ...]:
    """Neuron counts around ``centre``, ``step`` apart and clipped to [0, ffn], most first; the dense one always.

    All but the dense count are multiples of ``round_to`` (a dense width that is none stays as it is).
    """
    half = levels // 2
    counts = {ffn}
    for i in range(-half, levels - half):
        counts.add(min(ffn, max(0, (centre + i * step) // round_to * round_to)))
    return tuple(sorted(counts, reverse=True))


class Streams:
    """The dense and the pruned residual stream in front of one block: (windows, length, hidden) each, or twice as wide
    (`BlockRunner.stream`). Without error accumulation they are one and the same tensor.

    Of several processes each holds the streams of its own ``windows``, and runs them in ``batches``: slices of what it
    holds.
    """

    def __init__(
        self,
        dense: Tensor,
        pruned: Tensor | None = None,
        windows: range | None = None,
        batches: list[slice] | None = None,
    ) -> None:
        self.dense, self.pruned = dense, dense if pruned is None else pruned
        self.windows = range(len(dense)) if windows is None else windows
        self.batches = [slice(0, len(dense))] if batches is None else batches

    @property
    def alone(self) -> bool:
        """Whether there is only the dense stream."""
        return self.pruned is self.dense

    @classmethod
    def start(cls, runner: BlockRunner, ids: Tensor, accumulation: Accumulation, room: Room | None = None) -> Streams:
        """The embedded windows of this process, of all of ``ids`` (n, length)."""
        windows, slices = own_batches(ids, runner_tokens(runner))
        mine = ids[windows.start : windows.stop]
        room = Room(None) if room is None else room
        dense = torch.cat([runner.stream(mine[s]).to(room.place) for s in slices])
        return cls(room.hold(dense), None if accumulation == "none" else room.hold(dense.clone()), windows, slices)

    def save(self, folder: Path) -> None:
        tensors = {"dense": self.dense} if self.alone else {"dense": self.dense, "pruned": self.pruned}
        save_part(folder, self.windows, tensors)

    @classmethod
    def load(cls, folder: Path, ids: Tensor, room: Room | None = None, most: int | None = None) -> Streams:
        windows, slices = own_batches(ids, most)
        room = Room(None) if room is None else room
        found = {name: room.hold(part) for name, part in load_part(folder, windows).items()}
        return cls(found["dense"], found.get("pruned"), windows, slices)


def runner_tokens(runner: BlockRunner) -> int:
    """Tokens per forward, at most: as the run has settled, or `batch_tokens` of a model where it lies."""
    return runner.batch or batch_tokens(runner.family.geometry(runner.model.config), runner.device.type != "cpu")


def own_batches(ids: Tensor, most: int | None = None) -> tuple[range, list[slice]]:
    """The windows of ``ids`` (n, length) that are this process's, and the batches among them, counted from its first.

    Whole batches, so that each is computed alike however many processes there are.

    Raises:
        CompressError: there are fewer batches than processes.
    """
    slices = batches(ids, most)
    if len(slices) < world():
        raise CompressError(
            f"{len(ids)} windows of {ids.shape[1]} tokens make {len(slices)} batches, too few for {world()} processes",
            where="calibration.windows",
            fix="ask for more windows, or for fewer processes",
        )
    mine = [slices[i] for i in share(len(slices))]
    first, last = mine[0].start, min(len(ids), mine[-1].stop)
    return range(first, last), [slice(s.start - first, min(s.stop, last) - first) for s in mine]


def _expected(
    levels: Sequence[Level],
    columns: Sequence[Tensor],
    layer: nn.Linear,
    how: Accumulation,
    kept: int | None,
) -> tuple[Tensor, Tensor]:
    """The weight (out, in) and bias (out,) whose output is the candidates' mean, sum w_e W_e / sum w_e.

    A candidate with nothing left has no bias either. The main process alone has the levels; all get the result.

    Args:
        kept: which level the solution so far has. It is what is expected then: a search changes few sublayers, and the
            mean of levels that are cut off at the dense one would be pruned more than it. None: there is no solution.
    """
    if not is_main():
        weight, bias = torch.empty_like(layer.weight), torch.empty_like(_bias(layer))
        from_main(weight)
        from_main(bias)
        return weight, bias
    total = torch.zeros_like(layer.weight, dtype=torch.float64)
    mass = with_bias = 0.0
    chosen = list(zip(levels, columns, strict=True))
    if how == "expectation" and kept is not None:
        chosen = [chosen[kept]]
    for level, at in chosen:
        part = 1.0 if how == "uniform" or len(chosen) == 1 else 1.0 - level.sparsity
        mass += part
        if not level.units:
            continue
        with_bias += part
        if level.weight is None:
            total += part * layer.weight.double()
        else:
            total[:, at] += part * level.weight.to(total)
    weight, bias = (total / mass).to(layer.weight.dtype), _bias(layer) * (with_bias / mass)
    from_main(weight)
    from_main(bias)
    return weight, bias


def keeps_inputs(tokens: int, width: int) -> bool:
    """Whether a sublayer's inputs (tokens, width) in float32 are kept."""
    return tokens * width * 4 <= KEEP_BYTES


class _Kept:
    """One sublayer's inputs in the pruned stream, kept from when statistics were taken to when the stream moves on, or,
    where they are more than `KEEP_BYTES`, made again."""

    def __init__(self, stream: Tensor, width: int) -> None:
        self._keeps = keeps_inputs(stream.shape[0] * stream.shape[1], width)
        self._parts: dict[int, Tensor] = {}

    def keep(self, s: slice, part: Tensor) -> None:
        if self._keeps:
            self._parts[s.start] = part

    def get(self, s: slice, again: Callable[[], Tensor]) -> Tensor:
        return self._parts.pop(s.start) if self._keeps else again()


def head_choice(heads: Sequence[int], geometry: BlockGeometry) -> tuple[int, int]:
    """(KV groups, query heads per group) of the heads kept, equally many in every group."""
    groups = len({head // geometry.group for head in heads})
    return (groups, len(heads) // groups) if groups else (0, 0)


def _place(solution: object, levels: Sequence[object]) -> int | None:
    """Which level is the solution's; the levels are in the main process alone."""
    return levels.index(solution) if solution is not None and levels else None


def _bias(layer: nn.Linear) -> Tensor:
    return torch.zeros(()) if layer.bias is None else layer.bias


@dataclass(frozen=True)
class Local:
    """How a block's candidates are made: the recipe's options, of which ``step`` is `round_to` and ``trim`` is
    `query_heads`."""

    damping: float
    target: Target
    accumulation: Accumulation
    score: Score
    step: int
    trim: bool
    token_weight: TokenWeight = "none"


@dataclass(frozen=True)
class _Sublayer:
    """One half of a block, around the projection whose inputs are pruned: `o_proj` or `down_proj`.

    ``reads``: the residual stream in front -> X, what the projection reads (b, length, in).
    ``add``: the stream in front and the projection's output -> the stream behind, (b, length, hidden) all.
    ``solve``: all levels of the menu. ``columns``: which inputs a level keeps. ``kept``: the solution's among levels.
    ``units``: how many there are; ``stays``: the untouched projection is the only level. ``layer`` is None where the
    sublayer is never cut: what it "reads" is then what it gives.
    """

    where: str
    layer: nn.Linear | None
    reads: Callable[[Tensor], Tensor]
    add: Callable[[Tensor, Tensor], Tensor]
    solve: Callable[[Problem], list[Level]]
    columns: Callable[[Level], Tensor]
    kept: Callable[[Sequence[Level]], int | None]
    units: int
    stays: bool
    post_norm: bool  # the projection's output is not simply added to the residual stream
    scale: float  # what it is multiplied by before it is added

    def through(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., hidden), by the dense projection."""
        return x if self.layer is None else x @ self.layer.weight.T + _bias(self.layer)


def prune_block(
    runner: BlockRunner,
    index: int,
    streams: Streams,
    menu: Menu,
    costs: BlockCosts,
    how: Local,
    metrics: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[list[Level], list[Level]]:
    """Makes the candidates of block ``index`` and moves both streams behind it (in place).

    `down_proj` comes second: its statistics are those of the block with its attention pruned.

    Args:
        metrics: (hidden, hidden) output metrics of attention and FFN that the choice of units is made in, or None.

    Returns:
        (attention levels, FFN levels), most kept first; the first of each is the dense one where the menu has it.
    """
    block = runner.blocks[index]  # asked for once: a streamed one is read when it is
    attention = _attention(runner, index, block, menu, costs, how, metrics[0])
    ffn = _ffn(runner, index, block, menu, costs, how, metrics[1])
    return _prune_sublayer(attention, streams, how), _prune_sublayer(ffn, streams, how)


def _attention(
    runner: BlockRunner, index: int, block: Any, menu: Menu, costs: BlockCosts, how: Local, metric: Tensor | None
) -> _Sublayer:
    g, solution = costs.geometry, menu.solution
    return _Sublayer(
        where=f"block {index}, o_proj",
        layer=runner.family.pruned_layers(block).get("attention"),
        reads=lambda stream: runner.context(index, stream),
        add=lambda stream, out: runner.middle(index, stream, out),
        solve=lambda problem: _attention_levels(problem, menu, costs, how, metric),
        columns=lambda level: channels(level.units, g.head_dim),
        kept=lambda levels: _place(solution and solution[0], [head_choice(v.units, g) for v in levels]),
        units=g.heads,
        stays=menu.heads == ((g.kv_heads, g.group),),
        post_norm=runner.family.post_norm,
        scale=runner.family.residual_scale,
    )


def _ffn(
    runner: BlockRunner, index: int, block: Any, menu: Menu, costs: BlockCosts, how: Local, metric: Tensor | None
) -> _Sublayer:
    g, solution = costs.geometry, menu.solution
    return _Sublayer(
        where=f"block {index}, down_proj",
        layer=runner.family.pruned_layers(block).get("ffn"),
        reads=lambda stream: runner.activation(index, stream),
        add=lambda stream, out: runner.output(index, stream, out),
        solve=lambda problem: _ffn_levels(problem, menu, costs, how, metric),
        columns=lambda level: torch.tensor(level.units, dtype=torch.int64),
        kept=lambda levels: _place(solution and solution[1], [len(v.units) for v in levels]),
        units=g.ffn,
        stays=menu.neurons == (g.ffn,),
        post_norm=runner.family.post_norm,
        scale=runner.family.residual_scale,
    )


def _prune_sublayer(sublayer: _Sublayer, streams: Streams, how: Local) -> list[Level]:
    """Statistics of the projection's inputs, the levels they lead to, and the pruned stream behind their mean."""
    moments, inputs = _statistics(sublayer, streams, how)
    if moments is None or sublayer.layer is None:
        levels = [Level(tuple(range(sublayer.units)), 0, 0.0, 0.0, None)]
    else:
        levels = _in_main(moments, sublayer.layer.weight.T, how.damping, sublayer.solve)
    del moments  # as large as the layer; not needed while the stream moves on
    if not streams.alone:
        _move_pruned(sublayer, streams, inputs, levels, how.accumulation)
    return levels


def _statistics(sublayer: _Sublayer, streams: Streams, how: Local) -> tuple[Moments | None, _Kept]:
    """Sums H = X^T X and G = X^T T over the pruned stream's inputs X, and moves the dense stream behind the sublayer.

    Returns:
        The sums (None where the sublayer stays as it is), and X, kept for when the pruned stream moves on.
    """
    layer = sublayer.layer
    n_in = streams.dense.shape[-1] if layer is None else layer.weight.shape[1]
    moments = None
    if layer is not None and not sublayer.stays:
        moments = Moments(n_in, layer.weight.shape[0], sublayer.where, layer.weight.device)
    inputs = _Kept(streams.dense, n_in)
    for s in streams.batches:
        x_dense = sublayer.reads(streams.dense[s])
        out = sublayer.through(x_dense)
        behind = sublayer.add(streams.dense[s], out)
        x = x_dense if streams.alone else sublayer.reads(streams.pruned[s])
        if moments is not None:
            aim = _aim(sublayer, how.target, x, out, behind - streams.pruned[s].to(behind.device))
            moments.add(*_weighted(x, aim, out if sublayer.post_norm else behind, how.token_weight))
        if not streams.alone:
            inputs.keep(s, x)
        streams.dense[s] = behind
    return moments, inputs


def _aim(sublayer: _Sublayer, target: Target, x: Tensor, out: Tensor, gap: Tensor) -> Tensor:
    """What the refitted projection is fitted to, T: the dense weights on its own inputs ``x`` (the paper's XW), the
    dense model's output ``out``, or the ``gap`` to the dense stream behind, so that the sum with the pruned stream
    equals it.

    A bias stays as it is, so what the weights are fitted to is what remains without it.
    """
    assert sublayer.layer is not None  # nothing is fitted in a sublayer that stays whole
    if target == "own":
        return x @ sublayer.layer.weight.T
    # Where a norm stands between the projection and the sum, the sum cannot be aimed at directly.
    if target == "output" or sublayer.post_norm:
        return out - _bias(sublayer.layer)
    return (gap if sublayer.scale == 1.0 else gap / sublayer.scale) - _bias(sublayer.layer)


def _move_pruned(
    sublayer: _Sublayer, streams: Streams, inputs: _Kept, levels: list[Level], accumulation: Accumulation
) -> None:
    """Moves the pruned stream behind the sublayer: expectation error accumulation, X' = sum_e (1 - S_e) X'_e over
    sum_e (1 - S_e), which for a linear layer is the mean of the candidates' weights."""
    if sublayer.layer is None:
        for s in streams.batches:
            x = inputs.get(s, lambda s=s: sublayer.reads(streams.pruned[s]))  # type: ignore[misc]
            streams.pruned[s] = sublayer.add(streams.pruned[s], x)
        return
    columns = [sublayer.columns(level) for level in levels]
    mean, bias = _expected(levels, columns, sublayer.layer, accumulation, sublayer.kept(levels))
    for s in streams.batches:
        x = inputs.get(s, lambda s=s: sublayer.reads(streams.pruned[s]))  # type: ignore[misc]
        streams.pruned[s] = sublayer.add(streams.pruned[s], x @ mean.T + bias)


def _in_main(moments: Moments, W: Tensor, damping: float, levels: Callable[[Problem], list[Level]]) -> list[Level]:
    """The levels in the main process, from all processes' sums; none in the others."""
    moments.sums()
    if not is_main():
        moments.taken()
    found: list[Level] = []
    main_says(lambda: found.extend(levels(damp(moments, W, damping))))
    return found


def _weighted(x: Tensor, aim: Tensor, normed: Tensor, how: TokenWeight) -> tuple[Tensor, Tensor]:
    """Scales every token's row so that its error counts relative to the size of what the next norm will divide by."""
    if how == "none":
        return x, aim
    scale = normed.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
    return x * scale, aim * scale


def _attention_levels(
    problem: Problem, menu: Menu, costs: BlockCosts, how: Local, metric: Tensor | None
) -> list[Level]:
    geometry = costs.geometry
    found = prune_heads(
        problem, geometry.heads, geometry.kv_heads, geometry.head_dim, trim=how.trim, score=how.score, metric=metric
    )
    levels = []
    for heads in found:
        if (heads.groups, heads.per_group) not in menu.heads:
            continue
        keep = channels(heads.heads, geometry.head_dim)
        saving = costs.attention_dense - costs.attention(heads.groups, heads.per_group)
        dense = len(heads.heads) == geometry.heads
        levels.append(_level(heads.heads, keep, saving, costs.attention_dense, problem, problem.refit(keep), dense))
    return levels


def _ffn_levels(problem: Problem, menu: Menu, costs: BlockCosts, how: Local, metric: Tensor | None) -> list[Level]:
    whole = costs.ffn_dense
    # Taken to the CPU as they come, and let go: together they may be larger than the matrices they come from.
    levels = []
    for count, keep, refitted in neuron_levels(problem, menu.neurons, how.step, how.score, metric, last=True):
        units, dense = tuple(keep.tolist()), count == costs.geometry.ffn
        levels.append(_level(units, keep, whole - costs.ffn(count), whole, problem, refitted, dense))
        del refitted
    return levels


def _level(
    units: tuple[int, ...], keep: Tensor, saving: int, whole: int, problem: Problem, refitted: Tensor, dense: bool
) -> Level:
    weight = None if dense else refitted.T.float().contiguous().cpu()
    return Level(units, saving, saving / whole, problem.loss(keep, refitted), weight)


def predicted_bytes(menu: Menu, geometry: BlockGeometry) -> int:
    """Size of a block's file in a supernet, before it is made: int32 indices, bfloat16 weights, and the header."""
    size = 0
    tensors = 0
    for n in menu.neurons:
        if n < geometry.ffn:
            size += n * 4 + n * geometry.hidden * 2
            tensors += 2
    for groups, per_group in menu.heads:
        heads = groups * per_group
        if heads < geometry.heads:
            size += heads * 4 + heads * geometry.head_dim * geometry.hidden * 2
            tensors += 2
    return size + 8 + 90 * tensors + 110 * (len(menu.neurons) + len(menu.heads))


def write_block(path: Path, attention: Sequence[Level], ffn: Sequence[Level], dtype: torch.dtype) -> None:
    """Writes one block's levels: kept indices (int32) and compact weights in ``dtype``; facts in the metadata."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, list[dict[str, object]]] = {}
    for kind, levels in (("attention", attention), ("ffn", ffn)):
        facts[kind] = []
        for e, level in enumerate(levels):
            facts[kind].append(
                {
                    "kept": len(level.units),
                    "saving": level.saving,
                    "sparsity": level.sparsity,
                    "loss": level.loss,
                    "dense": level.weight is None,
                }
            )
            if level.weight is not None:
                tensors[f"{kind}.{e}.units"] = torch.tensor(level.units, dtype=torch.int32)
                tensors[f"{kind}.{e}.weight"] = level.weight.to(dtype).contiguous()
    save_file(tensors, path, metadata={"levels": json.dumps(facts)})


class Supernet:
    """A written supernet, memory-mapped: nothing is read until a level is asked for."""

    def __init__(self, files: Sequence[Path], geometry: Geometry) -> None:
        self.geometry = geometry
        self._files = [safe_open(path, "pt") for path in files]
        self.bytes = sum(path.stat().st_size for path in files)
        self.facts = []
        for path, file in zip(files, self._files, strict=True):
            metadata = file.metadata()
            if not metadata or "levels" not in metadata:
                raise CompressError(
                    "this is not a supernet file", where=str(path), fix="run the same command with --fresh"
                )
            self.facts.append(json.loads(metadata["levels"]))

    def level(self, block: int, kind: Literal["attention", "ffn"], e: int) -> Level:
        fact = self.facts[block][kind][e]
        file = self._files[block]
        if fact["dense"]:
            dense = self.geometry.blocks[block]
            n = dense.heads if kind == "attention" else dense.ffn
            return Level(tuple(range(n)), 0, 0.0, fact["loss"], None)
        units = tuple(file.get_tensor(f"{kind}.{e}.units").tolist())
        weight = file.get_tensor(f"{kind}.{e}.weight").float()
        return Level(units, fact["saving"], fact["sparsity"], fact["loss"], weight)
