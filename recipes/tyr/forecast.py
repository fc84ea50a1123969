"""What the stages of a Týr run do, reckoned from shapes alone: work by kind, bytes held, bytes on disk.

What a run decides from sizes alone is asked of the functions that decide it: how many windows run together and how
many candidates, where streams lie, which states of the heads are gone through, what the knapsack's tables hold, how
many starting points there are. What a run does without ever reckoning it stands here alone, and must change when the
run does: the passes over matrices inside one call of LAPACK or torch (`_eliminate`, `_heads`, `_passing`, `SUMMED`,
`ADDING`: closed sums where the run has loops), what a search will meet (`RERUN`, `DIFFERENT`), the length of JSON
(`SEAL_BYTES`, `UNIT_BYTES`), and which stages there are, for a run's depend on what it has found.
`tools/fit_forecast.py --check` holds the figures against runs. How fast a machine does the work is
`compress.run.forecast`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from compress.language.budget import Option, knapsack_cells, nearest_feasible, target_removed
from compress.language.recover_forecast import recover_stage
from compress.language.setup import set_aside
from compress.models.shards import SHARE
from compress.recipes.tyr import TyrOptions
from compress.recipes.tyr.choice import Choice, Job, block_menus, head_choices, within
from compress.recipes.tyr.local import SHRINK, Moments, head_states
from compress.recipes.tyr.prune import REFERENCE_TOKENS, accumulation_of
from compress.recipes.tyr.rescale import COARSE, SCALES
from compress.recipes.tyr.search import compared, group_windows, held_tokens, most_starts, portion_windows, together
from compress.recipes.tyr.stock import shapes, typical
from compress.recipes.tyr.supernet import Menu, batch_tokens, batch_windows, keeps_inputs, predicted_bytes
from compress.recipes.tyr.walk import STREAMS, lies_near
from compress.run.forecast import Stage

if TYPE_CHECKING:
    from compress.models.families.base import BlockCosts, BlockGeometry, Costs, Geometry
    from compress.schema.recipe import RecoverSection

# Bytes moved for an element that `ExactSum.add` takes: to double, divided, its size, rounded, to int64, added.
SUMMED = 116
# Bytes held beside the sums for an element of the rows that are added at once.
ADDING = 36
# Of a candidate's blocks, those behind its first change: 0.76 for level swaps (one to four pairs of places drawn
# evenly), nearly all for disturbed knapsacks; the two take turns.
RERUN = 0.88
# Of two offspring's blocks, those that differ. Not derived: seen in journals of small runs.
DIFFERENT = 0.4
# Cells of a knapsack that take as long as an integer program does for each of its options. Not derived: seen at 420
# options under three bounds (0.3 s).
SOLVING = 700_000
SEAL_BYTES = 1500  # a seal.json
UNIT_BYTES = 6  # a kept unit's number in plan.json


@dataclass(frozen=True)
class Shape:
    """A run's sizes: what `stages` reckons with. ``dtype_bytes`` is the stored weights'; ``total`` parameters."""

    geometry: Geometry
    costs: Costs
    options: TyrOptions
    sparsity: float
    windows: int
    length: int
    dtype_bytes: int
    streamed: bool
    cache_blocks: int
    world: int
    layouts: int = 1
    gpu: float | None = None  # bytes of a process's GPU
    recover: RecoverSection | None = None
    shard: bool = False

    @property
    def batch(self) -> int:
        """Tokens per forward, at most."""
        return batch_tokens(self.geometry, self.gpu is not None)

    @property
    def spare(self) -> float:
        """Bytes of a GPU that activations, or blocks once made, may take: a quarter of what the model leaves; 0 where
        blocks must be read to be run."""
        return 0.0 if self.gpu is None or self.streamed else (self.gpu - 4 * self.costs.total) / 4

    @property
    def largest(self) -> int:
        """Parameters of the largest block."""
        return max(block.dense for block in self.costs.blocks)

    @property
    def rest(self) -> int:
        """Parameters outside the blocks' linear layers."""
        return self.costs.total - self.costs.backbone

    @property
    def sharded(self) -> bool:
        """Whether processes hold a part of every block while they walk over the model together."""
        return self.shard and self.streamed and self.world > 1

    def forward(self, tokens: float, length: int, kept: float = 1.0, runs: Sequence[float] | None = None) -> float:
        """FLOPs of all blocks on ``tokens``, with that share of them kept; each run so often, once by default."""
        each = [2 * block.dense + 4 * length * block.geometry.inputs for block in self.costs.blocks]
        return kept * tokens * (sum(each) if runs is None else sum(n * x for n, x in zip(runs, each, strict=True)))

    def head(self, tokens: float) -> float:
        return 2 * tokens * self.geometry.hidden * self.geometry.vocab


def even_choice(job: Job, costs: BlockCosts) -> Choice:
    """Both sublayers of a block at the sparsity asked for: what is taken for a solution that is not yet known. What is
    cut gives up what sublayers that stay whole do not."""
    g, share = costs.geometry, _even_share(job)
    neurons = g.ffn if g.ffn_whole else round(g.ffn * (1 - share) / job.options.round_to) * job.options.round_to
    if not job.options.attention or g.attention_whole:
        return Choice(g.kv_heads, g.group, neurons)
    wanted = (1 - share) * costs.attention_dense
    groups, per_group = min(
        (c for c in head_choices(g, job.options.query_heads) if c[0] % job.parallel == 0),
        key=lambda c: (abs(costs.attention(*c) - wanted), -c[0]),
    )
    return Choice(groups, per_group, neurons)


def _even_share(job: Job) -> float:
    """The sparsity, as a share of what is not whole."""
    if not any(g.attention_whole or g.ffn_whole for g in job.geometry.blocks):
        return job.sparsity
    cut = sum(
        (0 if c.geometry.attention_whole else c.attention_dense) + (0 if c.geometry.ffn_whole else c.ffn_dense)
        for c in job.costs.blocks
    )
    return min(1.0, job.sparsity * job.costs.backbone / cut)


def even_choices(job: Job) -> list[Choice]:
    """`even_choice` of every block; of stock shapes the one in the middle of those with the dense heads."""
    if job.options.shape == "stock":
        return typical(job)
    return [even_choice(job, costs) for costs in job.costs.blocks]


def implied(job: Job, timed: Sequence[float] = ()) -> float:
    """The least sparsity at which sublayers that are pruned alike keep every budget, in steps of 1/64: what a forecast
    takes for one that is not said. ``timed``: shares of a time that may stay, whose prices are not known yet."""
    least = max([0.0, *(1 - share for share in timed)])
    for share in (k / 64 for k in range(1, 64)):
        if share >= least and within(job, even_choices(replace(job, sparsity=share))):
            return share
    return 63 / 64


def menus_of(job: Job) -> list[list[Menu]]:
    """The menus of every iteration; those behind the first are drawn around `even_choices`."""
    even = even_choices(job)
    return [block_menus(job, i, None if i == 1 else even) for i in range(1, job.options.iterations + 1)]


def stages(shape: Shape, job: Job, found: Sequence[Choice] | None = None) -> list[Stage]:
    """All stages up to the plan, recovery where it is asked for, and the saved model, in their order.

    Work is that of the process which has the most of it, the main one.

    Args:
        found: what the search has chosen, of a run that is over. What the last stages write depends on it; without it
            every sublayer is taken to be pruned alike, which is nearly the most: what is left dense takes nothing.
    """
    options, menus = shape.options, menus_of(job)
    made = [_text(shape)]
    if options.metric != "none":
        made.append(_metrics(shape))
    few = min(shape.windows, options.supernet_windows or shape.windows)
    final_alone = options.accumulation == "none"
    for number, menu in enumerate(menus, 1):
        alone = accumulation_of(options, number) == "none"
        made.append(_walk(shape, f"supernet-{number}", menu, few, alone=alone, final=False))
        made.append(_singles(shape, number, menu))
        made.append(_search(shape, job, number, menu))
    chosen = even_choices(job) if found is None else found
    single = [Menu((c.neurons,), ((c.groups, c.per_group),)) for c in chosen]
    run_off, last = options.run_off, "final"
    if run_off is not None:
        passes = min(shape.windows, run_off.calibration or shape.windows)
        for k in range(run_off.solutions + job.options.iterations - 1):
            made.append(_walk(shape, f"run-off-{k}", single, passes, alone=final_alone, final=True))
            made.append(_plan(shape, chosen, f"run-off-{k}-judged", run_off.windows, shape.length))
        last = "" if passes == shape.windows else "final"  # the winner's is the last
    if last:
        made.append(_walk(shape, last, single, shape.windows, alone=final_alone, final=True))
    made.append(_plan(shape, chosen, "plan", options.search.windows, options.search.length or shape.length))
    if shape.recover is not None:
        made.append(
            recover_stage(
                shape.recover,
                shape.costs,
                length=shape.length,
                kept=1 - shape.sparsity,
                dtype_bytes=shape.dtype_bytes,
                world=shape.world,
                streamed=shape.streamed,
            )
        )
    made.append(_model(shape, chosen))
    return made


# --- what is held ---------------------------------------------------------------------------------------------------


def _held(shape: Shape, in_step: bool = True) -> tuple[dict[str, float], dict[str, float]]:
    """(device, RAM) bytes of the model and, where it is streamed, of the block that is being read; of a part of all
    blocks, where every process that goes over them ``in_step`` holds one."""
    if not shape.streamed:
        return {"model": 4 * shape.costs.total}, {}
    device = {"model": 4.0 * (shape.rest + shape.cache_blocks * shape.largest)}
    one = float(shape.dtype_bytes * shape.largest)
    if not (in_step and shape.sharded):
        return device, {"the block being read": one}
    part = float(shape.dtype_bytes * shape.costs.backbone) / shape.world
    near = part if shape.gpu is None else min(part, SHARE * shape.gpu)
    return {**device, "its part of the blocks": near, "a block put together": one}, {"parts in memory": part - near}


def _passing(shape: Shape, tokens: float, length: int) -> float:
    """Bytes that one batch needs on its way through a block."""
    return 4 * tokens * (max(max(4 * g.ffn, 3 * g.inputs) for g in shape.geometry.blocks) + 4 * shape.geometry.hidden)


def _own(windows: int, length: int, world: int, most: int) -> tuple[int, int, int]:
    """(windows, batches, tokens a batch) of the process that has the most, as `supernet.own_batches` divides them."""
    size = batch_windows(windows, length, most)
    batches = math.ceil(math.ceil(windows / size) / world)
    return min(windows, batches * size), batches, size * length


def _reads(shape: Shape, times: float = 1.0) -> float:
    """Bytes read when all blocks are asked for one after another, so many times."""
    return times * shape.costs.backbone * shape.dtype_bytes if shape.streamed else 0.0


def _fetched(shape: Shape, times: float = 1.0) -> dict[str, float]:
    """Work of having all blocks one after another in step, so many times: read, or put together from all processes'
    parts, which takes no longer than adding as many bytes up."""
    moved = _reads(shape, times)
    return {"sums": moved} if shape.sharded else {"read": moved}


def _opened(shape: Shape) -> dict[str, float]:
    """Work of a stage that goes over the blocks in step, before its first one: each process reads its part of all."""
    return {"read": _reads(shape, 1 / shape.world) if shape.sharded else 0.0}


# --- stages ---------------------------------------------------------------------------------------------------------


def _text(shape: Shape) -> Stage:
    """The text is packed and every weight checked; loading the model belongs to it."""
    device, ram = _held(shape, in_step=False)
    stored = shape.costs.total * shape.dtype_bytes
    # The file (a shard at most) that is mapped while it is read; of weights in float32 the mapping is the model.
    mapped = 0.0 if shape.dtype_bytes == 4 and not shape.streamed else min(stored, 5e9)
    tokens = (shape.windows + set_aside(shape.options)[0]) * shape.length
    return Stage(
        "text",
        work={"read": 2.0 * stored},
        device=device,
        ram={**ram, "weight file, mapped": mapped},
        kept=8 * tokens + SEAL_BYTES,
        scratch=0.0,
        reads=2.0 * stored,
    )


def _metrics(shape: Shape) -> Stage:
    g, length = shape.geometry, shape.length
    total = min(shape.windows, shape.options.metric_windows)
    mine = -(-total // shape.world)
    tokens, h = mine * length, g.hidden
    stream = 4.0 * tokens * h
    device, ram = _held(shape)
    graph = 4.0 * length * max(6 * block.ffn + 4 * block.inputs + 10 * h for block in g.blocks)
    device |= {
        "one window's graph": max(graph, 4.0 * length * g.vocab * 4),
        "output metrics": 2 * h * h * 8 + h * h * 28,
    }
    ram |= {"streams and gradients": 3 * stream, "label chances": 4.0 * length * g.vocab}
    blocks = g.layers
    whole = 4.0 * total * length * h
    kept = blocks * (2 * h * h * 4 + SEAL_BYTES)
    work = _added(
        _opened(shape),
        _fetched(shape, 2),
        {
            "gemm32": 3 * shape.forward(tokens, length) + blocks * 4 * tokens * h * h + 3 * shape.head(tokens),
            "touch": blocks * mine * 2 * h * h * (SUMMED + 40),
            "logits": 6.0 * tokens * g.vocab,
            "calls": 3.0 * blocks * mine,
            "seals": float(blocks),
            "read": 2 * blocks * stream,
            "write": kept,
            "save": 2 * blocks * stream,
            "sums": 2.0 * blocks * h * h * 8 if shape.world > 1 else 0.0,
        },
    )
    return Stage(
        "metrics",
        work,
        device=device,
        ram=ram,
        kept=kept,
        # The streams in front of and behind all blocks, and the gradients at two of them.
        scratch=(blocks + 3) * whole,
        reads=work["read"],
    )


def _eliminate(n: int, h: int, step: int, least: int) -> tuple[float, float]:
    """(FLOPs, bytes moved) of removing ``step`` rows at a time of n until ``least`` are left."""
    loose = (1 + 1 / SHRINK) / 2  # the matrices are larger than what is alive, until they are shrunk
    squares = (n**3 - least**3) / 3 * loose**2
    rows = (n**2 - least**2) / 2 * h * loose
    return 2 * squares + 2 * rows, (16 * squares + 24 * rows) / step


def _heads(g: BlockGeometry, menu: Menu, trim: bool) -> tuple[float, float]:
    """(large products' FLOPs, thin updates' bytes) of `local.prune_heads` and its refits."""
    h = g.hidden
    large, moved = 0.0, 0.0
    width = g.group * g.head_dim
    for kept, per_group in head_states(g.kv_heads, g.group, trim):
        if per_group == g.group:  # one of so many whole groups goes next
            m = kept * width
            large += 2 * m * m * width + 2 * m * width * h + kept * 2 * width * width * h
            moved += 16 * m * m + 16 * m * h
        elif kept:  # of each group one more query head has gone
            m = kept * (per_group + 1) * g.head_dim
            alive = kept * (per_group + 1)
            large += kept * (2 * m * m * g.head_dim + 2 * m * g.head_dim * h + alive * 2 * g.head_dim**2 * h)
            moved += kept * (16 * m * m + 16 * m * h + alive * 16 * g.head_dim * h)
    for groups, per_group in menu.heads:
        m = groups * per_group * g.head_dim
        large += m**3 / 3 + 2 * m * m * h
        moved += 32 * m * m + 40 * m * h
    return large, moved


@dataclass
class _Solver:
    """What choosing and refitting the levels of blocks takes: FLOPs of large products, bytes and FLOPs of thin updates;
    bytes of the largest block's levels in memory, and of all blocks' on disk."""

    large: float = 0.0
    thin: float = 0.0
    thin_flops: float = 0.0
    levels: float = 0.0
    kept: float = 0.0


def _solved(shape: Shape, menus: Sequence[Menu], final: bool) -> _Solver:
    """What `supernet._in_main` does for every block, and what the stage writes."""
    made, h, metric = _Solver(), shape.geometry.hidden, shape.options.metric != "none"
    for menu, block in zip(menus, shape.geometry.blocks, strict=True):
        n, q = block.ffn, block.inputs
        if menu.neurons != (n,):
            made.large += n**3 + 2 * n * n * h + (h**3 / 3 + 4 * n * h * h if metric else 0)
            flops, moved = _eliminate(n, h, shape.options.round_to, min(menu.neurons))
            made.thin, made.thin_flops = made.thin + moved, made.thin_flops + flops
            made.large += sum(m * h * h for m in menu.neurons) if metric else 0
            made.thin += sum(40 * m * h for m in menu.neurons)
        if menu.heads != ((block.kv_heads, block.group),):
            large, moved = _heads(block, menu, shape.options.query_heads)
            made.large += q**3 + 2 * q * q * h + (h**3 / 3 + 4 * q * h * h if metric else 0) + large
            made.thin += moved
        channels = sum(m for m in menu.neurons if m < n)
        heads = sum(a * b * block.head_dim for a, b in menu.heads if a * b < block.heads)
        made.levels = max(made.levels, 4.0 * (channels + heads) * h)
        plan = float(shape.dtype_bytes) * (channels + heads) * h + UNIT_BYTES * (sum(menu.neurons) + block.heads)
        made.kept += SEAL_BYTES + (plan if final else predicted_bytes(menu, block))
    return made


def _solver_bytes(shape: Shape) -> tuple[float, dict[str, float]]:
    """(bytes on the device, bytes in memory by what holds them) of the widest block's statistics and solver."""
    n, h = max(block.ffn for block in shape.geometry.blocks), shape.geometry.hidden
    # int64 sums, float64 in their place, the factor in H's and the inverse in the factor's. Solving takes a copy of the
    # factor beside G and W*; later, with the matrix shrunk, a level is copied.
    sums = (n * n + n * h) * 8 + Moments.ROWS * n * ADDING
    solver = 8.0 * (2 * n * n + 2 * n * h)
    # Matrices shrink step by step; what is freed below this size the C library keeps.
    freed = min(8.0 * n * n, 2.0**25) * SHRINK**2 / (1 - SHRINK**2)
    return max(sums, solver), {"G and a level": 2 * 8.0 * n * h, "freed, not given back": freed}


def _streamed(shape: Shape, tokens: int, batches: int, *, alone: bool) -> tuple[dict[str, float], float]:
    """(work of taking the streams through all blocks, with the statistics; bytes of a sublayer's kept inputs)."""
    h, length, streams = shape.geometry.hidden, shape.length, 1 if alone else 2
    flops = streams * shape.forward(tokens, length)  # each stream runs the blocks once
    touched = summed = hold = 0.0
    for costs in shape.costs.blocks:
        widths = costs.geometry.widths
        moments = sum(width * (width + h) for width in widths)
        # The refit's own target takes the projection again.
        flops += sum(2 * tokens * h * width for width in widths) + 2 * tokens * moments
        touched += batches * moments * SUMMED + streams * tokens * (3 * widths[0] + 4 * widths[1] + 12 * h) * 8
        summed += 8.0 * moments
        for width in () if alone else widths:
            if keeps_inputs(tokens, width):
                hold = max(hold, 4.0 * tokens * width)  # for the pruned stream, on the device
            else:
                flops += tokens * (2 * costs.dense + 4 * length * widths[0]) / 2  # made again
    layers = shape.geometry.layers
    work = {
        "gemm32": flops,
        "touch": touched,
        "calls": layers * batches * 4.0 * streams,
        "sums": summed if shape.world > 1 else 0.0,
    }
    return work, hold


def _walk(shape: Shape, name: str, menus: Sequence[Menu], total: int, *, alone: bool, final: bool) -> Stage:
    """A pass over all blocks that makes candidates: a supernet, or the final weights."""
    h, layers, length = shape.geometry.hidden, shape.geometry.layers, shape.length
    windows, batches, batch = _own(total, length, shape.world, shape.batch)
    tokens, streams = windows * length, 1 if alone else 2
    work, hold = _streamed(shape, tokens, batches, alone=alone)
    solved = _solved(shape, menus, final)
    on_device, in_memory = _solver_bytes(shape)
    stream = 4.0 * tokens * h * streams
    device, ram = _held(shape)
    device |= {
        "a batch": _passing(shape, batch, length) * (1 if alone else 1.3),
        "kept inputs": hold,
        "statistics and solver": on_device,
    }
    if shape.streamed:  # embeddings and head lie in memory meanwhile
        device["model"] -= 4.0 * shape.rest
        ram["embeddings and head"] = 4.0 * shape.rest
    (device if lies_near(STREAMS * total * length, h, shape.spare) else ram)["streams"] = stream
    ram |= {"levels": solved.levels, **in_memory}
    own = {
        "gemm64": solved.large,
        "thin64": solved.thin,
        "thin64_flops": solved.thin_flops,
        "seals": float(layers),
        "read": layers * 4.0 * 2 * h * h * (shape.options.metric != "none"),
        "write": solved.kept,
        "save": (layers - 1) * stream,
    }
    work = _added(_opened(shape), _fetched(shape), work, own)
    return Stage(
        name,
        work,
        device=device,
        ram=ram,
        kept=solved.kept,
        # What stands before a block goes when what stands behind it is on the disk.
        scratch=2 * 4.0 * total * length * h * streams,
        reads=work["read"],
    )


def _evaluator(shape: Shape, windows: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """(work, device, RAM) of an evaluator's start: the dense model's streams and the teacher."""
    g, length = shape.geometry, shape.options.search.length or shape.length
    positions = compared(shape.options.search, length)
    mine = -(-windows // shape.world)
    tokens = mine * length
    states = 4.0 * (g.layers + 1) * windows * length * g.hidden
    device, ram = _held(shape)
    group = group_windows(shape.batch, windows, length) * length
    device |= {"a batch": _passing(shape, group, length), "logits": 4.0 * positions * g.vocab * 4}
    near = lies_near(held_tokens(windows * length, g.layers), g.hidden, shape.spare)
    (device if near else ram)["the parent's streams"] = states
    work = {
        "gemm32": shape.forward(tokens, length) + shape.head(windows * positions),
        "touch": 8 * states,
        "logits": 4.0 * windows * positions * g.vocab,
        "calls": float(g.layers * mine),
        "gather": states if shape.world > 1 else 0.0,
    }
    return _added(work, _opened(shape), _fetched(shape)), device, ram


def _evaluate(
    shape: Shape, count: float, windows: int, runs: Sequence[float], kept: float, made: float, fresh: float
) -> dict[str, float]:
    """Work of one process for ``count`` candidates of the whole run.

    Args:
        runs: how often a candidate runs each block, on average.
        kept: share of a block that it still has.
        made: parameters, before pruning, of the blocks made for a candidate's own changes.
        fresh: those of the blocks made for every chunk of candidates beside them.
    """
    blocks, weighted = sum(runs), sum(n * c.dense for n, c in zip(runs, shape.costs.blocks, strict=True))
    g, length = shape.geometry, shape.options.search.length or shape.length
    positions = compared(shape.options.search, length)
    tokens = windows * length
    mine = math.ceil(count / shape.world)
    chunks = math.ceil(mine / together(shape.streamed, tokens, g.hidden))
    group = group_windows(shape.batch, windows, length)
    return {
        "gemm32": mine * (shape.forward(tokens, length, kept, runs) + shape.head(windows * positions)),
        "touch": mine * blocks * tokens * g.hidden * 40,
        "logits": 3.0 * mine * windows * positions * g.vocab,
        "calls": mine * blocks * math.ceil(windows / group) + 3.0 * mine * windows,
        "make": (mine * made + chunks * fresh) * kept * 6.0,
        **_fetched(shape, chunks * weighted / shape.costs.backbone),
    }


def _under_way(shape: Shape, count: float, tokens: float) -> float:
    """Bytes of the streams of the candidates that one process runs together."""
    each = 4.0 * tokens * shape.geometry.hidden
    several = together(shape.streamed, tokens, shape.geometry.hidden)
    return each * min(several, math.ceil(count / shape.world))


def _added(*parts: Mapping[str, float]) -> dict[str, float]:
    return {kind: sum(part.get(kind, 0.0) for part in parts) for kind in {k for part in parts for k in part}}


def _singles(shape: Shape, number: int, menus: Sequence[Menu]) -> Stage:
    g, search = shape.geometry, shape.options.search
    windows = min(search.singles_windows, search.windows)
    start, device, ram = _evaluator(shape, windows)
    # The change in block b is followed by the blocks behind it.
    stock = shape.options.shape == "stock"
    each = [1 if stock else len(m.neurons) + len(m.heads) - 2 for m in menus]
    count = sum(each)
    run = sum(n * (g.layers - b) for b, n in enumerate(each))
    runs = [reached / max(1, count) for reached in accumulate(each)]
    kept = 1.0 if number == 1 else 1 - shape.sparsity
    length = search.length or shape.length
    own = sum(n * costs.dense for n, costs in zip(each, shape.costs.blocks, strict=True)) / max(1, count)
    behind = sum(n * costs.dense for n, costs in zip(runs, shape.costs.blocks, strict=True))
    parts = [start, _evaluate(shape, count, windows, runs, kept, 0.5 * own, 0.0 if number == 1 else behind)]
    layers = g.layers
    tokens = windows * length
    if number > 1:
        # The parent is the solution so far: its streams are made once.
        again = shape.forward(tokens / shape.world, length, kept)
        parts.append({"gemm32": again, "make": 6.0 * shape.costs.backbone * kept})
    device = {**device, "a variant of a block": 4.0 * shape.largest * (0.5 if number == 1 else 1.5 * kept)}
    made = 0.0
    for menu, block in zip(menus, g.blocks, strict=True):
        sizes = (len(menu.neurons) - 1) * 3 * block.ffn + (len(menu.heads) - 1) * 2 * block.inputs
        made += 4.0 * g.hidden * sizes / 2
    device["made blocks"] = min(shape.spare, made)
    rows = count * (160 + 4 * layers)
    return Stage(
        f"singles-{number}",
        work=_added(*parts),
        device=device,
        ram={**ram, "candidates under way": _under_way(shape, count, tokens)},
        kept=count * 110.0 + SEAL_BYTES,
        scratch=float(rows),
        reads=_added(*parts).get("read", 0.0),
        token_layers=tokens * (run + layers * (1 if number == 1 else 2)),
        candidates=count,
    )


def _search(shape: Shape, job: Job, number: int, menus: Sequence[Menu]) -> Stage:
    g, search = shape.geometry, shape.options.search
    length = search.length or shape.length
    start, device, ram = _evaluator(shape, search.windows)
    layers, kept = g.layers, 1 - shape.sparsity
    parts = [start]
    starting = len(shapes(job)) if shape.options.shape == "stock" else most_starts(first=number == 1)
    backbone = shape.costs.backbone
    parts.append(_evaluate(shape, starting, search.windows, [1.0] * layers, kept, backbone, 0.0))
    shares = list(zip(search.steps, [search.offspring, *search.survivors], strict=True))
    spent = float(layers * search.windows * length * (2 + starting))
    evaluated = float(starting)
    for share, count in shares:
        windows = portion_windows(share, search.windows)
        tokens = windows * length
        many = min(together(shape.streamed, tokens, g.hidden), -(-count // shape.world))
        variants = backbone * (1 / many + DIFFERENT * (1 - 1 / many))
        step = _evaluate(shape, count, windows, [RERUN] * layers, kept, variants, 0.0)
        parts.append({kind: search.generations * amount for kind, amount in step.items()})
        spent += search.generations * count * tokens * RERUN * layers
        evaluated += search.generations * count
    # The parent's streams are made again when a generation finds a better one: taken to be every second.
    again = 1 + search.generations / 2
    mine = -(-search.windows // shape.world) * length
    parts.append(
        {
            "gemm32": again * shape.forward(mine, length, kept) * RERUN,
            "make": 6.0 * again * backbone * kept,
            **_fetched(shape, again * RERUN),
            "touch": again * 8.0 * 4 * layers * search.windows * length * g.hidden,
        }
    )
    spent += (again - 1) * layers * search.windows * length * RERUN
    cells, capacity = (0.0, 0) if shape.options.shape == "stock" else _knapsack(job, menus)
    parts.append({"choose": cells * (starting + search.generations * search.offspring / 2)})
    work = _added(*parts)
    device = {**device, "a variant of a block": 4.0 * shape.largest * kept}
    most = search.generations * search.offspring
    pairs = [
        min(len(m.neurons) * len(m.heads), most) * costs.dense
        for m, costs in zip(menus, shape.costs.blocks, strict=True)
    ]
    device["made blocks"] = min(shape.spare, DIFFERENT * sum(pairs) * 4.0 * kept)
    tokens = search.windows * length
    ram = {
        **ram,
        "candidates under way": max(
            _under_way(shape, starting, tokens), *(_under_way(shape, n, s * tokens) for s, n in shares)
        ),
        "the knapsack": 4.0 * 2 * layers * capacity,
    }
    rows = evaluated * (160 + 6 * layers)
    return Stage(
        f"search-{number}",
        work=work,
        device=device,
        ram=ram,
        kept=rows * 0.3 + SEAL_BYTES,
        scratch=rows,
        reads=work.get("read", 0.0),
        token_layers=spent,
        candidates=round(evaluated),
    )


def _knapsack(job: Job, menus: Sequence[Menu]) -> tuple[int, int]:
    """(cells of one knapsack, its capacity in units)."""
    options: list[list[Option]] = []
    for menu, costs in zip(menus, job.costs.blocks, strict=True):
        options.append([Option(costs.attention_dense - costs.attention(*c), 0.0) for c in menu.heads])
        options.append([Option(costs.ffn_dense - costs.ffn(n), 0.0) for n in menu.neurons])
    if job.limits:
        return SOLVING * sum(map(len, options)), 0
    total = nearest_feasible(options, target_removed(job.sparsity, job.costs.backbone))
    return knapsack_cells(options, total)


def _weights_kept(shape: Shape, chosen: Sequence[Choice]) -> float:
    """Elements of the refitted projections in a plan."""
    columns = 0
    for choice, block in zip(chosen, shape.geometry.blocks, strict=True):
        heads = choice.groups * choice.per_group
        columns += choice.neurons if choice.neurons < block.ffn else 0
        columns += heads * block.head_dim if heads < block.heads else 0
    return float(columns * shape.geometry.hidden)


def _plan(shape: Shape, chosen: Sequence[Choice], name: str, windows: int, length: int) -> Stage:
    """The blocks as one plan, compared with the dense model on ``windows`` at every scale of the logits: the plan
    itself, or a solution of the run-off, of which only the KL is kept."""
    g = shape.geometry
    kept_bytes = shape.dtype_bytes * _weights_kept(shape, chosen)
    mine = -(-windows // shape.world)
    tokens = mine * length
    device, ram = _held(shape)
    kept = 1 - shape.sparsity
    final = name == "plan"
    work: dict[str, float] = {"read": kept_bytes, "write": kept_bytes if final else 0.0}
    ram |= {"the plan": kept_bytes}
    if shape.options.rescale or not final:
        scales = len(SCALES if final else COARSE) if shape.options.rescale else 1
        device |= {
            "both streams": 2 * 4.0 * tokens * g.hidden,
            "logits": 6 * 4.0 * length * g.vocab,
            "the sliced block": 4.0 * shape.largest * kept,
            "a batch": _passing(shape, length, length),
        }
        work = _added(
            work,
            _opened(shape),
            _fetched(shape),
            {
                "gemm32": shape.forward(tokens, length, 1 + kept) + 2 * shape.head(tokens),
                "logits": tokens * g.vocab * (2 + 4.0 * scales),
                "calls": 2.0 * g.layers * mine,
                "make": shape.costs.backbone * kept * 6.0,
            },
        )
    units = sum(c.neurons + c.groups * c.per_group for c in chosen)
    stored = kept_bytes + UNIT_BYTES * units + SEAL_BYTES
    return Stage(name, work, device, ram, kept=stored if final else SEAL_BYTES, scratch=0.0, reads=work["read"])


def _model(shape: Shape, chosen: Sequence[Choice]) -> Stage:
    """The saved model, in every layout; read twice more to be checked."""
    left = shape.costs.total - round(shape.sparsity * shape.costs.backbone)
    written = float(left * shape.dtype_bytes * shape.layouts)
    device, ram = _held(shape, in_step=False)
    ram |= {"the plan": shape.dtype_bytes * _weights_kept(shape, chosen)}
    work = {"read": 2 * written + _reads(shape, 2), "write": written}
    return Stage("model", work, device, ram, kept=written, scratch=0.0, reads=work["read"])


def reference_token_layers(layers: int) -> float:
    """Tokens x layers of the paper's search on a model of so many blocks."""
    return float(REFERENCE_TOKENS * layers)


def shape_of(setup: Any, world: int, streamed: bool, gpu: float | None, sparsity: float | None = None) -> Shape:
    """The sizes of a checked model and recipe (`compress.language.setup.Setup`); ``sparsity`` where the recipe says
    none."""
    recipe = setup.recipe
    return Shape(
        setup.geometry,
        setup.costs,
        recipe.options,
        recipe.sparsity if sparsity is None else sparsity,
        recipe.calibration.windows,
        recipe.calibration.length,
        setup.stored_dtype.itemsize,
        streamed,
        recipe.memory.cache_blocks,
        world,
        len(recipe.layouts),
        gpu,
        recipe.recover,
        recipe.memory.shard,
    )
