"""Stock shapes: every block alike, some whole blocks gone, so that the stock classes of every runtime load the model.

A `Shape` says how many KV groups with how many query heads each, how many FFN neurons, and how many blocks are gone.
Given the heads and the blocks, the width follows from the budget, so that the shapes to choose from are few; *which*
blocks go is what the search finds. A genome is the same as that of a ragged solution (see `search`), of which only
these are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import CompressError
from compress.language.budget import target_removed
from compress.language.checkpoint import check_stock
from compress.recipes.tyr.choice import Choice, Job, head_choices, head_levels, savings
from compress.recipes.tyr.supernet import Menu, Supernet, head_choice

if TYPE_CHECKING:
    from compress.recipes.tyr.search import Evaluator, Genome

GONE = Choice(0, 0, 0)


@dataclass(frozen=True)
class Shape:
    """What every block keeps that stays, and how many blocks are ``gone``."""

    groups: int
    per_group: int
    neurons: int
    gone: int

    @property
    def block(self) -> Choice:
        return Choice(self.groups, self.per_group, self.neurons)

    def __str__(self) -> str:
        heads = f"{self.groups} KV groups of {self.per_group} query heads"
        return f"{self.gone} blocks gone, {heads} and {self.neurons} neurons in each other"


def check_alike(job: Job) -> None:
    """Raises CompressError where the dense blocks differ, or hold what is never cut: no stock shape holds what is left
    of them."""
    if any(block.attention_whole or block.ffn_whole for block in job.geometry.blocks):
        raise CompressError(
            "parts of this model's blocks are never cut, and a stock shape takes whole blocks out",
            where="tyr.shape",
            fix="prune it ragged: --set tyr.shape=ragged --set 'layouts=[per-layer]'; `compress plan` names the parts",
        )
    if len(set(job.geometry.blocks)) > 1:
        raise CompressError(
            "the blocks of this model differ in size, so none of its pruned forms is a stock shape",
            where="tyr.shape",
            fix="prune it ragged: --set tyr.shape=ragged --set 'layouts=[per-layer]'",
        )
    check_stock(job.config, job.family)


def shape_of(job: Job, heads: tuple[int, int], gone: int) -> Shape | None:
    """The shape with these (KV groups, query heads per group) and so many blocks gone that meets the budget to half a
    step of ``round_to`` neurons in every block; None where no width does."""
    costs, layers, step = job.costs.blocks[0], job.geometry.layers, job.options.round_to
    target = target_removed(job.sparsity, job.costs.backbone)
    each = (target - gone * costs.dense) / (layers - gone)  # to be removed from every block that stays
    over = each - savings(costs, Choice(*heads, costs.geometry.ffn))[0]
    width = costs.geometry.ffn - over / costs.neuron
    nearest = costs.geometry.ffn if abs(width - costs.geometry.ffn) <= step / 2 else round(width / step) * step
    shape = Shape(*heads, nearest, gone)
    return shape if 0 < nearest <= costs.geometry.ffn and (gone or sum(savings(costs, shape.block))) else None


def shapes(job: Job, near: Shape | None = None) -> list[Shape]:
    """The shapes to choose from: the more heads a block keeps, the more numbers of blocks, evenly spread; behind the
    first iteration those ``near`` the best so far: one or two blocks more or fewer, and the next choices of heads.

    Raises:
        CompressError: the blocks differ, or no shape meets the budget.
    """
    check_alike(job)
    costs = job.costs.blocks[0]
    heads = sorted((h for h in head_levels(job, job.geometry.layers - 1) if h[0]), key=lambda h: -costs.attention(*h))
    found: list[Shape] = []
    for rank, choice in enumerate(heads):
        able = [s for gone in range(job.geometry.layers) if (s := shape_of(job, choice, gone)) is not None]
        if near is not None:
            far = abs(rank - heads.index((near.groups, near.per_group)))
            able = [s for s in able if abs(s.gone - near.gone) <= 2 - far]
        else:
            able = _spread(able, max(1, job.options.levels >> rank))
        found += able
    if not found:
        raise CompressError(
            f"no stock shape removes {job.sparsity:.1%} of the backbone",
            where="sparsity",
            fix="ask for another sparsity, let attention be pruned (tyr.attention), or make tyr.round_to smaller",
        )
    return found


def _spread(able: Sequence[Shape], most: int) -> list[Shape]:
    """At most so many, evenly spread, both ends among them; the middle one where it is one."""
    if len(able) <= most:
        return list(able)
    places = np.linspace(0, len(able) - 1, most) if most > 1 else [(len(able) - 1) / 2]
    return [able[round(float(at))] for at in places]


def shape_found(choices: Sequence[Choice]) -> Shape:
    """The shape of a solution."""
    kept = [c for c in choices if c != GONE]
    return Shape(kept[0].groups, kept[0].per_group, kept[0].neurons, len(choices) - len(kept))


def typical(job: Job) -> list[Choice]:
    """A solution of the middle one of the shapes with the dense heads, its last blocks gone."""
    offered = shapes(job)
    alike = [s for s in offered if (s.groups, s.per_group) == (offered[0].groups, offered[0].per_group)]
    shape = alike[len(alike) // 2]
    return [shape.block] * (job.geometry.layers - shape.gone) + [GONE] * shape.gone


def stock_menus(job: Job, choices: Sequence[Choice] | None) -> list[Menu]:
    """The levels that the shapes to choose from are made of: the same in every block, with nothing and all of it."""
    near = None if choices is None else shape_found(choices)
    offered = shapes(job, near)
    dense = job.geometry.blocks[0]
    widths = {dense.ffn, 0, *(s.neurons for s in offered)}
    heads = {(0, 0), (dense.kv_heads, dense.group), *((s.groups, s.per_group) for s in offered)}
    states = [h for h in head_choices(dense, job.options.query_heads) if h in heads]
    counts = tuple(sorted(widths, reverse=True))
    if choices is None:
        return [Menu(counts, tuple(states))] * job.geometry.layers
    return [Menu(counts, tuple(states), ((c.groups, c.per_group), c.neurons)) for c in choices]


class Levels:
    """Which level of a supernet's block holds which choice."""

    def __init__(self, supernet: Supernet, job: Job) -> None:
        g, self.layers = job.geometry.blocks[0], job.geometry.layers
        self._heads = [
            {head_choice(supernet.level(i, "attention", e).units, g): e for e in range(len(facts["attention"]))}
            for i, facts in enumerate(supernet.facts)
        ]
        self._widths = [{level["kept"]: e for e, level in enumerate(facts["ffn"])} for facts in supernet.facts]

    def genome(self, choices: Sequence[Choice]) -> Genome:
        """The genome of these choices, each of which is a level."""
        pairs = [(self._heads[i][c.groups, c.per_group], self._widths[i][c.neurons]) for i, c in enumerate(choices)]
        return tuple(e for pair in pairs for e in pair)

    def of(self, shape: Shape, gone: Sequence[int]) -> Genome:
        """The genome of ``shape`` without the blocks ``gone``."""
        return self.genome([GONE if i in gone else shape.block for i in range(self.layers)])


def measure_blocks(
    evaluator: Evaluator, levels: Levels, base: Sequence[Choice], progress: Callable[[int], None] | None = None
) -> list[float]:
    """What the loss of each block alone costs: KL(base without it) - KL(base with it), in nats. A block that the base
    has not is put in for that as the others are."""
    blocks = range(len(base))
    inside = next(c for c in base if c != GONE)
    changed = [[(inside if c == GONE else GONE) if i == b else c for i, c in enumerate(base)] for b in blocks]
    genome = levels.genome(base)
    evaluator.set_parent(genome)
    zero = evaluator.kl(genome, phase="single")
    # From the last block to the first: the cheap ones first.
    order = list(reversed(blocks))
    notes = [{"phase": "single"}] * len(order)
    found = evaluator.kls([levels.genome(changed[b]) for b in order], notes=notes, progress=progress)
    kls = dict(zip(order, found, strict=True))
    return [zero - kls[b] if base[b] == GONE else kls[b] - zero for b in blocks]


def least(losses: Sequence[float], count: int) -> list[int]:
    """The blocks whose loss costs least, so many."""
    return sorted(sorted(range(len(losses)), key=lambda b: (losses[b], b))[:count])


def starts(offered: Sequence[Shape], losses: Sequence[float], levels: Levels) -> dict[str, Genome]:
    """Every shape without the blocks whose loss alone costs least, by its name."""
    return {str(shape): levels.of(shape, least(losses, shape.gone)) for shape in offered}


def breeder(
    offered: Sequence[Shape], losses: Sequence[float], levels: Levels, choices: Sequence[Choice] | None = None
) -> Callable[[Genome, int, np.random.Generator, set[Genome]], list[Genome]]:
    """Makes offspring of a genome: one or two blocks are exchanged for others, or the shape is another and so many
    blocks more go or come back, by their losses disturbed by noise.

    Args:
        choices: the best solution so far, where there is one.
    """
    known: dict[Genome, tuple[Shape, frozenset[int]]] = {}

    def note(shape: Shape, gone: frozenset[int]) -> Genome:
        genome = levels.of(shape, sorted(gone))
        known[genome] = (shape, gone)
        return genome

    for shape in offered:
        note(shape, frozenset(least(losses, shape.gone)))
    if choices is not None:
        note(shape_found(choices), frozenset(i for i, c in enumerate(choices) if c == GONE))

    def breed(parent: Genome, count: int, rng: np.random.Generator, seen: set[Genome]) -> list[Genome]:
        shape, gone = known[parent]
        found: list[Genome] = []
        for attempt in range(50 * count):
            if len(found) == count:
                break
            noisy = (
                np.asarray(losses) + np.std(losses) * rng.standard_normal(len(losses)) * (0.1, 0.5, 1.0)[attempt % 3]
            )
            if shape.gone and rng.random() < 0.6:
                child = note(shape, _exchanged(gone, noisy, int(rng.integers(1, 3))))
            else:
                other = offered[int(rng.integers(len(offered)))]
                child = note(other, _resized(gone, noisy, other.gone))
            if child not in seen:
                seen.add(child)
                found.append(child)
        return found

    return breed


def _exchanged(gone: frozenset[int], noisy: np.ndarray[Any, Any], count: int) -> frozenset[int]:
    """So many of the blocks gone come back, those whose loss costs most, and as many others go."""
    back = sorted(gone, key=lambda b: -noisy[b])[:count]
    left = sorted(set(range(len(noisy))) - gone, key=lambda b: noisy[b])[: len(back)]
    return (gone - set(back)) | set(left)


def _resized(gone: frozenset[int], noisy: np.ndarray[Any, Any], count: int) -> frozenset[int]:
    """The same blocks gone and some more, or some fewer: ``count`` in all."""
    inside = sorted(gone, key=lambda b: noisy[b])[:count]
    more = sorted(set(range(len(noisy))) - gone, key=lambda b: noisy[b])[: count - len(inside)]
    return frozenset(inside) | set(more)
