"""How much each block keeps: the budget's reach, the menus of every iteration, and the last step to the exact total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.language.budget import Option, target_removed
from compress.recipes.tyr import TyrOptions
from compress.recipes.tyr.supernet import Menu, neuron_counts

if TYPE_CHECKING:
    from compress.models.families.base import Costs, Family, Geometry


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
    begin: int = 0  # of a window's first tokens, those that stand in front of every text: read, and not scored

    @property
    def skip(self) -> int:
        """Positions of a window whose next token is one that stands in front of every text: their KL is not counted."""
        return max(0, self.begin - 1)


def saving(job: Job, choice: Choice) -> int:
    """Parameters that ``choice`` removes from one block."""
    costs, geometry = job.costs, job.geometry
    attention = costs.attention_dense - costs.attention(choice.groups, choice.per_group)
    return attention + costs.ffn(geometry.ffn) - costs.ffn(choice.neurons)


def head_choices(geometry: Geometry, trim: bool) -> tuple[tuple[int, int], ...]:
    """Every (groups, per_group) that can be kept, most first."""
    found = [(geometry.kv_heads, geometry.group)]
    for groups in range(geometry.kv_heads, 0, -1):
        for per_group in range(geometry.group, 0, -1) if trim else (geometry.group,):
            if (groups, per_group) != found[0]:
                found.append((groups, per_group))
    return (*found, (0, 0))


def allowed_heads(job: Job, block: int) -> tuple[tuple[int, int], ...]:
    """The (groups, per_group) that block ``block`` may keep, most first."""
    choices = head_choices(job.geometry, job.options.query_heads)
    if not job.options.attention:
        return choices[:1]
    return choices[:-1] if block in job.family.keeps_attention(job.config) else choices


def head_levels(job: Job, block: int) -> tuple[tuple[int, int], ...]:
    """The choices of `allowed_heads`, thinned to at most ``head_levels`` that spread evenly over the savings."""
    found = sorted(allowed_heads(job, block), key=lambda c: (-job.costs.attention(*c), -c[0]))
    most = job.options.head_levels
    if len(found) <= most:
        return tuple(found)
    low, high = job.costs.attention(*found[-1]), job.costs.attention(*found[0])
    kept = {found[0], found[-1]}
    for i in range(1, most - 1):
        wanted = high - (high - low) * i / (most - 1)
        left = [c for c in found if c not in kept]
        kept.add(min(left, key=lambda c: abs(job.costs.attention(*c) - wanted)))
    return tuple(c for c in found if c in kept)


def neighbours(job: Job, block: int, choice: Choice) -> tuple[tuple[int, int], ...]:
    """The attention choice of a block so far, with those of `head_levels` that stand next to it in savings."""
    found = sorted(head_levels(job, block), key=lambda c: (-job.costs.attention(*c), -c[0]))
    mine = (choice.groups, choice.per_group)
    if mine not in found:
        return tuple(found)
    at = found.index(mine)
    return tuple(dict.fromkeys((found[0], *found[max(0, at - 1) : at + 2])))


def check_budget(job: Job) -> int:
    """The number of parameters to remove.

    Raises:
        CompressError: even with every sublayer at its smallest the budget is out of reach.
    """
    target = target_removed(job.sparsity, job.costs.backbone)
    most = 0
    for i in range(job.geometry.layers):
        least = min(job.costs.attention(groups, per_group) for groups, per_group in allowed_heads(job, i))
        most += job.costs.attention_dense - least + job.costs.ffn(job.geometry.ffn)
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
    options, geometry = job.options, job.geometry
    step = options.interval / 2 ** (iteration - 1) * geometry.ffn
    step = max(options.round_to, round(step / options.round_to) * options.round_to)
    found = []
    for i in range(geometry.layers):
        if choices is None:
            counts = neuron_counts(geometry.ffn, geometry.ffn // 2, step, options.levels, options.round_to)
            found.append(Menu(counts, head_levels(job, i)))
        else:
            centre, mine = choices[i].neurons, (choices[i].groups, choices[i].per_group)
            counts = neuron_counts(geometry.ffn, centre, step, options.refine_levels, options.round_to)
            found.append(Menu(counts, neighbours(job, i, choices[i]), (mine, centre)))
    return found


def left_alone(layers: int) -> tuple[int, int]:
    """How many blocks at the front and at the back the simplest good rule leaves dense."""
    return min(4, layers // 4), min(2, layers // 8)


def even_widths(job: Job, front: int, back: int) -> list[int]:
    """FFN widths that meet the budget when every block but the first ``front`` and the last ``back`` gives up
    equally many neurons and attention nothing; never below 0."""
    g, costs = job.geometry, job.costs
    neurons = round(target_removed(job.sparsity, costs.backbone) / (costs.ffn(g.ffn) - costs.ffn(g.ffn - 1)))
    inner = g.layers - front - back
    base, more = divmod(neurons, inner)
    widths = [g.ffn] * g.layers
    for i in range(inner):
        widths[front + i] = max(0, g.ffn - base - (i < more))
    return widths


Curves = list[list[dict[str, Any]]]  # every sublayer's options: what is saved, and the KL that costs alone


def settle(job: Job, choices: list[Choice], options: Curves) -> list[Choice]:
    """Moves FFN widths by single steps of ``round_to`` neurons until the budget is met as nearly as such steps can.

    The levels of the search are coarser than the units; what is left over goes where the measured KL rises least per
    parameter (or, where too much was removed, comes back where it falls most).
    """
    target = target_removed(job.sparsity, job.costs.backbone)
    step = job.options.round_to
    cost = job.costs.ffn(job.geometry.ffn) - job.costs.ffn(job.geometry.ffn - step)
    steps = round((target - sum(saving(job, c) for c in choices)) / cost)
    found = list(choices)
    while steps:
        sign = 1 if steps > 0 else -1
        able = [
            i
            for i, c in enumerate(found)
            if 0 <= c.neurons - sign * step <= job.geometry.ffn and (sign < 0 or c.neurons >= step)
        ]
        if not able:
            break
        curves = {i: [Option(o["saving"], o["loss"]) for o in options[2 * i + 1]] for i in able}
        slopes = {i: _slope(curves[i], job, found[i], sign) for i in able}
        at = min(able, key=lambda i: (sign * slopes[i], i))
        neurons = found[at].neurons - sign * step
        found[at] = Choice(found[at].groups, found[at].per_group, neurons)
        steps -= sign
    return found


def _slope(menu: list[Option], job: Job, choice: Choice, sign: int) -> float:
    """KL per parameter on the stretch of the FFN's measured curve that the next step would walk."""
    at = job.costs.ffn(job.geometry.ffn) - job.costs.ffn(choice.neurons)
    curve = sorted({o.saving: o.loss for o in menu}.items())
    for (s0, l0), (s1, l1) in pairwise(curve):
        inside = s0 <= at < s1 if sign > 0 else s0 < at <= s1
        if inside:
            return (l1 - l0) / (s1 - s0)
    # Beyond the last measured level: as steep as the last stretch.
    (s0, l0), (s1, l1) = curve[-2], curve[-1]
    return (l1 - l0) / (s1 - s0)
