"""How much each block keeps: the budget's reach, the menus of every iteration, and the last step to the exact total."""

from __future__ import annotations

import math
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
    from compress.exporters.gate import Budget
    from compress.language.latency import Clock
    from compress.language.limits import Limit
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
    limits: tuple[Limit, ...] = ()  # budgets; where there are any, ``sparsity`` is no more than a forecast's guess
    clock: Clock | None = None  # where there are budgets of times, whose limits a run adds when it has measured
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of a budget, what else a plan says
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
            cannot be split as `serve` asks for; with `Job.limits`, also what `check_limits` says.
    """
    _check_divides(job)
    if job.limits or job.clock is not None:
        check_limits(job)
        return target_removed(job.sparsity, job.costs.backbone)
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


def smallest(job: Job) -> list[Choice]:
    """What stays of every block where all goes that may."""
    found = []
    for i, costs in enumerate(job.costs.blocks):
        groups, per_group = min(allowed_heads(job, i), key=lambda heads: costs.attention(*heads))
        found.append(Choice(groups, per_group, costs.geometry.ffn if costs.geometry.ffn_whole else 0))
    return found


def check_limits(job: Job) -> None:
    """Raises CompressError where a budget is below what stays where all goes that may, or the dense model keeps all."""
    from compress.language.limits import shown

    least = counts_of(smallest(job))
    for limit in job.limits:
        floor = limit.prices.total(least)
        if floor > limit.most:
            row = limit.facts(least, floor)
            raise CompressError(
                f"the budget {limit.text} allows {shown(row, 'asked')} of {shown(row, 'dense')}, but where all is gone"
                f" that may be pruned, {shown(row, 'floor')} stay",
                where=f"budget {limit.text!r}",
                fix=f"ask for {_reachable(limit, floor)} at least"
                + ("" if job.options.attention else ", or let attention be pruned (--set tyr.attention=true)"),
            )
    held, every = kept_by_dense(job)
    if len(held) == len(every):
        raise CompressError(
            f"the dense model keeps {' and '.join(budget.text for budget in held)} already: there is nothing to prune",
            where="budget",
            fix="ask for less: " + ", ".join(f"{budget.figure}<=0.8x" for budget in every),
        )


def kept_by_dense(job: Job) -> tuple[list[Budget], list[Budget]]:
    """(the budgets that the dense model keeps, which bound nothing by themselves; all). Times are relative."""
    from compress.language.limits import TIMES

    timed = job.clock.budgets if job.clock is not None else ()
    counted = [limit for limit in job.limits if limit.budget.figure not in TIMES]
    held = [limit.budget for limit in counted if limit.dense <= limit.most]
    return [*held, *(b for b in timed if b.limit >= 1)], [*(limit.budget for limit in counted), *timed]


def _reachable(limit: Limit, floor: int) -> str:
    """The budget's figure at its floor, rounded up, as a budget is written."""
    share = math.ceil(10_000 * floor / limit.dense) / 10_000
    return f"{limit.budget.figure}<={share:.4f}x"


def counts_of(choices: Sequence[Choice]) -> list[tuple[int, int, int]]:
    """(KV groups, query heads in each, neurons) of every block."""
    return [(c.groups, c.per_group, c.neurons) for c in choices]


def within(job: Job, choices: Sequence[Choice]) -> bool:
    """Whether the choices keep every budget."""
    counts = counts_of(choices)
    return all(limit.prices.total(counts) <= limit.most for limit in job.limits)


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
    parameter (or, where too much was removed, comes back where it falls most). Stock shapes stay as they are. Under
    budgets nothing more is removed: what they leave comes back.
    """
    if job.options.shape == "stock":
        return choices
    if job.limits:
        return _give_back(job, choices, options)
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


def _give_back(job: Job, choices: Sequence[Choice], options: Curves) -> list[Choice]:
    """Gives steps of ``round_to`` neurons back, each where the measured KL falls most, as long as all budgets are kept.

    Raises:
        CompressError: the choices themselves do not keep them.
    """
    if not within(job, choices):
        raise CompressError(
            "the search's solution does not keep the budgets",
            where="budget",
            fix="this is a fault of compress; report it with the recipe",
        )
    step = job.options.round_to
    found = list(choices)
    curves = [[Option(o["saving"], o["loss"]) for o in menu] for menu in options[1::2]]
    blocks = job.geometry.blocks
    able = {i for i, c in enumerate(found) if not blocks[i].ffn_whole and c.neurons < blocks[i].ffn}
    while able:
        at = max(able, key=lambda i: (_slope(curves[i], savings(job.costs.blocks[i], found[i])[1], -1), -i))
        more = Choice(found[at].groups, found[at].per_group, min(blocks[at].ffn, found[at].neurons + step))
        tried = [*found[:at], more, *found[at + 1 :]]
        if within(job, tried):
            found = tried
        if found[at] != more or more.neurons == blocks[at].ffn:
            able.discard(at)
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
