"""How much each block keeps: the budget's reach, the menus of every iteration, and the last step to the exact total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.language.budget import Option, target_removed
from compress.language.computing import Computing
from compress.models.blocks import BlockRunner
from compress.recipes.tyr import TyrOptions
from compress.recipes.tyr.local import head_states
from compress.recipes.tyr.supernet import Menu, neuron_counts

if TYPE_CHECKING:
    from compress.models.families.base import BlockCosts, BlockGeometry, Costs, Family, Geometry


@dataclass(frozen=True)
class Choice:
    """What one block keeps: ``groups`` KV groups with ``per_group`` query heads each, and ``neurons`` FFN neurons."""

    groups: int
    per_group: int
    neurons: int


@dataclass(frozen=True)
class Job:
    """All that a Týr run needs to know. ``inputs`` go into every stage's fingerprint."""

    model: nn.Module
    family: Family
    config: Any
    geometry: Geometry
    costs: Costs
    calibration: Tensor  # (windows, length) int64
    search: Tensor  # (windows, length) int64, none of them in ``calibration``
    sparsity: float
    seed: int
    options: TyrOptions
    inputs: Mapping[str, Any]
    offload: bool = False  # activations lie in files, not in memory
    dtype: torch.dtype = torch.float32  # of the refitted weights in a plan: the type the model is stored in
    judging: Tensor | None = None  # (windows, length) int64 for the run-off, in neither of the others
    parallel: int = 1  # GPUs that every block will be split over: kept KV groups divide by it
    begin: int = 0  # of a window's first tokens, those that stand in front of every text: read, and not scored
    computing: Computing = field(default_factory=Computing)  # the type of forwards, and how many tokens run together

    def runner(self, length: int) -> BlockRunner:
        """The dense model cut at its blocks, for windows of so many tokens."""
        return BlockRunner(self.model, self.family, length, self.computing.type, self.computing.batch_tokens)

    @property
    def skip(self) -> int:
        """Positions of a window whose next token is one that stands in front of every text: their KL is not counted."""
        return max(0, self.begin - 1)


def savings(costs: BlockCosts, choice: Choice) -> tuple[int, int]:
    """Parameters that ``choice`` removes from a block's attention, and from its FFN."""
    attention = costs.attention_dense - costs.attention(choice.groups, choice.per_group)
    return attention, costs.ffn_dense - costs.ffn(choice.neurons)


def removed(job: Job, choices: Sequence[Choice]) -> int:
    """Parameters that the blocks' choices remove together."""
    return sum(sum(savings(costs, c)) for costs, c in zip(job.costs.blocks, choices, strict=True))


def head_choices(geometry: BlockGeometry, trim: bool) -> tuple[tuple[int, int], ...]:
    """Every (groups, per_group) that can be kept, most first."""
    return tuple(head_states(geometry.kv_heads, geometry.group, trim))


def allowed_heads(job: Job, block: int) -> tuple[tuple[int, int], ...]:
    """The (groups, per_group) that block ``block`` may keep, most first."""
    choices = head_choices(job.geometry.blocks[block], job.options.query_heads)
    choices = tuple(choice for choice in choices if choice[0] % job.parallel == 0)
    if not job.options.attention or job.geometry.blocks[block].attention_whole:
        return choices[:1]
    return choices[:-1] if block in job.family.keeps_attention(job.config) else choices


def head_levels(job: Job, block: int) -> tuple[tuple[int, int], ...]:
    """The choices of `allowed_heads`, thinned to at most ``head_levels`` that spread evenly over the savings."""
    costs = job.costs.blocks[block]
    found = sorted(allowed_heads(job, block), key=lambda c: (-costs.attention(*c), -c[0]))
    most = job.options.head_levels
    if len(found) <= most:
        return tuple(found)
    low, high = costs.attention(*found[-1]), costs.attention(*found[0])
    kept = {found[0], found[-1]}
    for i in range(1, most - 1):
        wanted = high - (high - low) * i / (most - 1)
        left = [c for c in found if c not in kept]
        kept.add(min(left, key=lambda c: abs(costs.attention(*c) - wanted)))
    return tuple(c for c in found if c in kept)


def neighbours(job: Job, block: int, choice: Choice) -> tuple[tuple[int, int], ...]:
    """The attention choice of a block so far, with those of `head_levels` that stand next to it in savings."""
    costs = job.costs.blocks[block]
    found = sorted(head_levels(job, block), key=lambda c: (-costs.attention(*c), -c[0]))
    mine = (choice.groups, choice.per_group)
    if mine not in found:
        return tuple(found)
    at = found.index(mine)
    return tuple(dict.fromkeys((found[0], *found[max(0, at - 1) : at + 2])))


def _check_divides(job: Job) -> None:
    for i, block in enumerate(job.geometry.blocks):
        for what, count in (("KV heads", block.kv_heads), ("FFN neurons", block.ffn)):
            if count % job.parallel:
                raise CompressError(
                    f"the dense model has {count} {what} in block {i}, which {job.parallel} GPUs cannot share evenly",
                    where="serve.tensor_parallel",
                    fix=f"say a divisor of {count}",
                )


def check_budget(job: Job) -> int:
    """The number of parameters to remove.

    Raises:
        CompressError: even with every sublayer at its smallest the budget is out of reach, or the dense model itself
            cannot be split as `serve` asks for.
    """
    _check_divides(job)
    target = target_removed(job.sparsity, job.costs.backbone)
    most = 0
    for i, costs in enumerate(job.costs.blocks):
        if job.options.shape == "stock" and i:  # all of every block but one may go
            most += costs.dense
            continue
        least = min(costs.attention(groups, per_group) for groups, per_group in allowed_heads(job, i))
        most += costs.attention_dense - least + (0 if costs.geometry.ffn_whole else costs.ffn_dense)
    if target > most:
        raise CompressError(
            f"a sparsity of {job.sparsity:.1%} asks to remove {target:,} parameters, but what may be pruned holds only"
            f" {most:,} ({most / job.costs.backbone:.1%} of the backbone)",
            where="sparsity",
            fix=f"ask for at most {int(1000 * most / job.costs.backbone) / 1000}"
            + ("" if job.options.attention else ", or let attention be pruned (--set tyr.attention=true)"),
        )
    return target


def block_menus(job: Job, iteration: int, choices: list[Choice] | None) -> list[Menu]:
    """The levels every block offers: the whole range, whatever the sparsity, first; then around the choice so far, at
    half the distance with every iteration."""
    options = job.options
    if options.shape == "stock":
        from compress.recipes.tyr.stock import stock_menus

        return stock_menus(job, choices)
    found = []
    for i, block in enumerate(job.geometry.blocks):
        step = options.interval / 2 ** (iteration - 1) * block.ffn
        step = max(options.round_to, round(step / options.round_to) * options.round_to)
        if choices is None:
            counts = neuron_counts(block.ffn, block.ffn // 2, step, options.levels, options.round_to)
            found.append(Menu((block.ffn,) if block.ffn_whole else counts, head_levels(job, i)))
        else:
            centre, mine = choices[i].neurons, (choices[i].groups, choices[i].per_group)
            counts = neuron_counts(block.ffn, centre, step, options.refine_levels, options.round_to)
            counts = (block.ffn,) if block.ffn_whole else counts
            found.append(Menu(counts, neighbours(job, i, choices[i]), (mine, centre)))
    return found


def left_alone(layers: int) -> tuple[int, int]:
    """How many blocks at the front and at the back the simplest good rule leaves dense."""
    return min(4, layers // 4), min(2, layers // 8)


def even_widths(job: Job, front: int, back: int) -> list[int]:
    """FFN widths that meet the budget when every block but the first ``front`` and the last ``back`` gives up
    the same share of its neurons and attention nothing; never below 0."""
    widths = [block.ffn for block in job.geometry.blocks]
    inner = [i for i in range(front, len(widths) - back) if not job.geometry.blocks[i].ffn_whole]
    # A neuron costs the same in every block: what it is joined to is the residual stream.
    neurons = round(target_removed(job.sparsity, job.costs.backbone) / job.costs.neuron)
    whole = sum(widths[i] for i in inner)
    shares = {i: divmod(neurons * widths[i], whole) for i in inner}
    more = neurons - sum(share for share, _ in shares.values())
    # What whole neurons leave over goes where the most of one was cut off.
    first = set(sorted(inner, key=lambda i: (-shares[i][1], i))[:more])
    for i in inner:
        widths[i] = max(0, widths[i] - shares[i][0] - (i in first))
    return widths


Curves = list[list[dict[str, Any]]]  # every sublayer's options: what is saved, and the KL that costs alone


def settle(job: Job, choices: list[Choice], options: Curves) -> list[Choice]:
    """Moves FFN widths by single steps of ``round_to`` neurons until the budget is met as nearly as such steps can.

    The levels of the search are coarser than the units; what is left over goes where the measured KL rises least per
    parameter (or, where too much was removed, comes back where it falls most). Stock shapes stay as they are.
    """
    if job.options.shape == "stock":
        return choices
    target = target_removed(job.sparsity, job.costs.backbone)
    step = job.options.round_to
    cost = step * job.costs.neuron  # the same in every block
    steps = round((target - removed(job, choices)) / cost) if cost else 0
    found = list(choices)
    while steps:
        sign = 1 if steps > 0 else -1
        able = [
            i
            for i, (c, block) in enumerate(zip(found, job.geometry.blocks, strict=True))
            if not block.ffn_whole and 0 <= c.neurons - sign * step <= block.ffn and (sign < 0 or c.neurons >= step)
        ]
        if not able:
            break
        curves = {i: [Option(o["saving"], o["loss"]) for o in options[2 * i + 1]] for i in able}
        slopes = {i: _slope(curves[i], savings(job.costs.blocks[i], found[i])[1], sign) for i in able}
        at = min(able, key=lambda i: (sign * slopes[i], i))
        neurons = found[at].neurons - sign * step
        found[at] = Choice(found[at].groups, found[at].per_group, neurons)
        steps -= sign
    return found


def _slope(menu: list[Option], at: int, sign: int) -> float:
    """KL per parameter on the stretch of an FFN's measured curve that the next step would walk, where so many of its
    parameters are gone."""
    curve = sorted({o.saving: o.loss for o in menu}.items())
    for (s0, l0), (s1, l1) in pairwise(curve):
        inside = s0 <= at < s1 if sign > 0 else s0 < at <= s1
        if inside:
            return (l1 - l0) / (s1 - s0)
    # Beyond the last measured level: as steep as the last stretch.
    (s0, l0), (s1, l1) = curve[-2], curve[-1]
    return (l1 - l0) / (s1 - s0)
