"""Menus counted by hand, the reach of the budget, and the last step to the exact total against brute force."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from compress.errors import CompressError
from compress.language.budget import target_removed
from compress.models.families.base import BlockGeometry
from compress.recipes.tyr.choice import (
    Choice,
    Job,
    allowed_heads,
    block_menus,
    check_budget,
    even_widths,
    head_choices,
    head_levels,
    left_alone,
    neighbours,
    removed,
    savings,
    settle,
)
from tests.recipes.tyr.small import small_job

NEURON = 3 * 40  # parameters of one neuron of the tiny models


def geometry(heads: int, kv_heads: int) -> BlockGeometry:
    return BlockGeometry(40, heads, kv_heads, 8, 48)


# --- what can be chosen ---------------------------------------------------------------------------------------


def test_head_choices_by_hand() -> None:
    assert head_choices(geometry(6, 3), trim=True) == ((3, 2), (3, 1), (2, 2), (2, 1), (1, 2), (1, 1), (0, 0))
    assert head_choices(geometry(6, 3), trim=False) == ((3, 2), (2, 2), (1, 2), (0, 0))
    assert head_choices(geometry(3, 3), trim=True) == ((3, 1), (2, 1), (1, 1), (0, 0))
    assert head_choices(geometry(2, 1), trim=True) == ((1, 2), (1, 1), (0, 0))


def test_attention_stays_where_the_cache_needs_it_and_everywhere_on_request() -> None:
    job = small_job("llama")
    assert (0, 0) not in allowed_heads(job, 0) and (0, 0) in allowed_heads(job, 1)
    # Gemma-2 has two kinds of layers in turn; the first of each keeps its attention.
    job = small_job("gemma2")
    assert [(0, 0) in allowed_heads(job, i) for i in range(4)] == [False, False, True, True]
    job = small_job("llama", {"attention": False})
    assert [allowed_heads(job, i) for i in range(4)] == [((2, 5),)] * 4


@pytest.mark.parametrize("shape", ["ragged", "stock"])
def test_what_is_kept_divides_by_the_gpus_of_a_server(shape: str) -> None:
    options = {"shape": shape, "round_to": 4}
    job = small_job("llama", options, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=6)
    split = replace(job, parallel=2)
    assert {groups for groups, _ in allowed_heads(split, 1)} == {4, 2, 0}
    assert {groups for groups, _ in allowed_heads(job, 1)} == {4, 3, 2, 1, 0}
    check_budget(split)
    for menu in block_menus(split, 1, None):
        assert all(groups % 2 == 0 for groups, _ in menu.heads) and all(n % 2 == 0 for n in menu.neurons)
        assert len(menu.heads) > 3 and len(menu.neurons) > 3
    for parallel, what in ((8, "4 KV heads"), (3, "4 KV heads")):
        with pytest.raises(CompressError, match=f"has {what} in block 0, which {parallel} GPUs"):
            check_budget(replace(job, parallel=parallel))
    with pytest.raises(CompressError, match="has 50 FFN neurons"):
        check_budget(
            replace(
                small_job("llama", options, num_attention_heads=8, num_key_value_heads=4, intermediate_size=50),
                parallel=4,
            )
        )


def test_few_head_levels_are_all_there_are_by_savings() -> None:
    job = small_job("llama", {"head_levels": 65})
    found = head_levels(job, 1)
    costs = [job.costs.blocks[1].attention(*c) for c in found]
    assert sorted(found) == sorted(head_choices(job.geometry.blocks[1], True)) and costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("most", [2, 3, 5, 8])
def test_head_levels_are_spread_over_the_savings(most: int) -> None:
    job = small_job("llama", {"head_levels": most})
    found = head_levels(job, 1)
    whole = job.costs.blocks[1].attention_dense
    assert len(found) == most and found[0] == (2, 5) and found[-1] == (0, 0)
    kept = [job.costs.blocks[1].attention(*c) / whole for c in found]
    assert kept == sorted(kept, reverse=True)
    # Every choice of the model lies at most 0.09 from the next, so each level is as near to its place as that.
    assert kept == pytest.approx([1 - i / (most - 1) for i in range(most)], abs=0.09)


def test_neighbours_are_the_dense_choice_and_those_next_in_savings() -> None:
    job = small_job("llama", {"head_levels": 65})
    every = head_levels(job, 1)
    for at in range(2, len(every) - 1):
        assert neighbours(job, 1, Choice(*every[at], 48)) == (every[0], *every[at - 1 : at + 2])
    assert neighbours(job, 1, Choice(2, 5, 48)) == every[:2]
    assert neighbours(job, 1, Choice(0, 0, 48)) == (every[0], *every[-2:])
    # A choice that thinning left out has no place among them: all are offered.
    thin = small_job("llama", {"head_levels": 3})
    missing = next(c for c in every if c not in head_levels(thin, 1))
    assert neighbours(thin, 1, Choice(*missing, 48)) == head_levels(thin, 1)


def test_menus_cover_everything_first_and_then_close_in_on_the_choice() -> None:
    job = small_job("llama", {"interval": 0.25, "levels": 5, "refine_levels": 3, "head_levels": 4})
    first = block_menus(job, 1, None)
    assert [m.neurons for m in first] == [(48, 36, 24, 12, 0)] * 4
    assert [m.heads for m in first] == [head_levels(job, i) for i in range(4)]
    heads = head_levels(job, 1)
    second = block_menus(job, 2, [Choice(2, 5, 24), Choice(*heads[1], 48), Choice(*heads[2], 0), Choice(0, 0, 20)])
    # 0.25 / 2 of 48 neurons is 6, in multiples of 4 (of two equally near the even one) 8.
    assert [m.neurons for m in second] == [(48, 32, 24, 16), (48, 40), (48, 8, 0), (48, 28, 20, 12)]
    assert second[1].heads == heads[:3] and second[2].heads == (heads[0], *heads[1:4])


def test_the_step_of_a_menu_halves_with_every_iteration() -> None:
    job = small_job("llama", {"interval": 0.5, "refine_levels": 3})
    whole = [Choice(2, 5, 24)] * 4
    assert [block_menus(job, i, whole)[0].neurons for i in (2, 3, 4)] == [
        (48, 36, 24, 12),
        (48, 32, 24, 16),  # 6 neurons, in multiples of 4: 8
        (48, 28, 24, 20),
    ]


def test_the_step_of_a_menu_never_falls_below_the_rounding() -> None:
    job = small_job("llama", {"interval": 0.125, "refine_levels": 3, "round_to": 8})
    assert block_menus(job, 6, [Choice(2, 5, 24)] * 4)[0].neurons == (48, 32, 24, 16)


# --- the budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"query_heads": False}, {"attention": False}])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_budget_out_of_reach_names_the_largest_that_is_not(model_type: str, changes: dict[str, Any]) -> None:
    def job(sparsity: float) -> Job:
        return small_job(model_type, changes, sparsity)

    with pytest.raises(CompressError) as error:
        check_budget(job(0.999))
    assert error.value.where == "sparsity"
    assert ("tyr.attention=true" in error.value.fix) == ("attention" in changes)
    named = float(re.findall(r"at most (0\.\d+)", error.value.fix)[0])
    assert check_budget(job(named)) == round(named * job(named).costs.backbone)
    with pytest.raises(CompressError):
        check_budget(job(named + 0.001))
    # By hand: the FFNs whole, and attention down to what must stay.
    plain = job(named)
    must = {"llama": 1, "gemma2": 2}[model_type]
    least = 40 * 8 * (5 if "query_heads" in changes else 1) * 2 + 2 * 40 * 8
    attention = 0 if "attention" in changes else 4 * plain.costs.blocks[0].attention_dense - must * least
    assert named == int(1000 * (4 * 48 * NEURON + attention) / plain.costs.backbone) / 1000


def test_saving_is_the_difference_of_the_costs() -> None:
    costs = small_job("llama").costs.blocks[0]
    assert savings(costs, Choice(2, 5, 48)) == (0, 0)
    assert savings(costs, Choice(2, 5, 44)) == (0, 4 * NEURON)
    assert savings(costs, Choice(0, 0, 0)) == (costs.attention_dense, 48 * NEURON)
    assert savings(costs, Choice(1, 5, 48)) == (costs.attention_dense // 2, 0)


# --- the last step --------------------------------------------------------------------------------------------


def curves(job: Job, losses: list[list[float]]) -> list[list[dict[str, Any]]]:
    """Measured options: attention's are beside the point; an FFN's stand at 48, 36, 24, 12 and 0 neurons."""
    found: list[list[dict[str, Any]]] = []
    for own in losses:
        found.append([{"saving": 0, "loss": 0.0}])
        found.append([{"saving": 12 * i * NEURON, "loss": loss} for i, loss in enumerate(own)])
    return found


def sized(job: Job, neurons: tuple[int, ...]) -> list[Choice]:
    return [Choice(2, 5, n) for n in neurons]


def interpolated(curve: list[float], neurons: int) -> float:
    at = (48 - neurons) / 12
    i = min(int(at), len(curve) - 2)
    return curve[i] + (at - i) * (curve[i + 1] - curve[i])


CONVEX = [[0, 1, 3, 6, 10], [0, 0.2, 1.5, 4, 9], [0, 2, 4.5, 7.5, 11], [0, 0.5, 1.1, 1.8, 20]]


@pytest.mark.parametrize("sparsity", [0.05, 0.11, 0.2, 0.267, 0.35])
@pytest.mark.parametrize("start", [(48, 48, 48, 48), (24, 24, 24, 24), (0, 0, 0, 0), (36, 48, 12, 24)])
def test_settle_reaches_the_nearest_total_that_ffn_steps_reach(sparsity: float, start: tuple[int, ...]) -> None:
    job = small_job("llama", sparsity=sparsity)
    target = target_removed(sparsity, job.costs.backbone)
    found = settle(job, sized(job, start), curves(job, CONVEX))
    reachable = [removed(job, sized(job, n)) for n in product(range(0, 49, 4), repeat=4)]
    assert abs(removed(job, found) - target) == min(abs(r - target) for r in reachable)
    assert all(c.neurons % 4 == 0 and 0 <= c.neurons <= 48 and (c.groups, c.per_group) == (2, 5) for c in found)


@pytest.mark.parametrize(("start", "sign"), [((48, 48, 48, 48), 1), ((0, 0, 0, 0), -1)])
def test_settle_goes_the_cheapest_way_on_convex_curves(start: tuple[int, ...], sign: int) -> None:
    for sparsity in (0.08, 0.19, 0.3):
        job = small_job("llama", sparsity=sparsity)
        found = settle(job, sized(job, start), curves(job, CONVEX))
        same = [n for n in product(range(0, 49, 4), repeat=4) if sum(n) == sum(c.neurons for c in found)]

        def loss(neurons: tuple[int, ...]) -> float:
            return sum(interpolated(c, n) for c, n in zip(CONVEX, neurons, strict=True))

        assert loss(tuple(c.neurons for c in found)) == pytest.approx(min(loss(n) for n in same))


def test_settle_looks_at_the_stretch_it_would_walk() -> None:
    flat_then_steep, steep_then_flat = [0, 0.1, 5, 9, 13], [0, 3, 3.05, 3.1, 3.15]
    losses = [flat_then_steep, steep_then_flat, [0, 50, 99, 150, 200], [0, 50, 99, 150, 200]]

    def one_step(first: int, second: int, sign: int) -> tuple[int, int]:
        """Where one step of four neurons less (1) or more (-1) goes."""
        dense = small_job("llama")
        start = sized(dense, (first, second, 48, 48))
        job = replace(dense, sparsity=(removed(dense, start) + sign * 4 * NEURON) / dense.costs.backbone)
        found = [c.neurons for c in settle(job, start, curves(job, losses))]
        assert found[2:] == [48, 48]
        return found[0], found[1]

    assert one_step(48, 48, 1) == (44, 48)
    assert one_step(40, 48, 1) == (36, 48)
    assert one_step(36, 48, 1) == (36, 44)  # from 36 on the first is the steeper one
    assert one_step(36, 36, 1) == (36, 32)
    assert one_step(4, 0, 1) == (0, 0)  # the second has nothing left
    assert one_step(36, 36, -1) == (36, 40)  # the way back from 36 is another stretch than the way on
    assert one_step(32, 36, -1) == (36, 36)
    assert one_step(24, 24, -1) == (28, 24)
    assert one_step(48, 0, -1) == (48, 4)


def test_settle_leaves_a_choice_that_meets_the_budget_alone() -> None:
    job = small_job("llama")
    job = small_job("llama", sparsity=16 * NEURON / job.costs.backbone)
    choices = sized(job, (48, 40, 40, 48))
    assert settle(job, choices, curves(job, CONVEX)) == choices


def test_settle_ends_where_no_ffn_has_anything_left() -> None:
    job = small_job("llama", sparsity=0.9)
    found = settle(job, sized(job, (8, 0, 4, 0)), curves(job, CONVEX))
    assert [c.neurons for c in found] == [0, 0, 0, 0]
    job = small_job("llama", sparsity=0.01)
    dense = [Choice(1, 1, n) for n in (48, 44, 48, 48)]
    assert [c.neurons for c in settle(job, dense, curves(job, CONVEX))] == [48] * 4


def test_even_widths_take_the_budget_evenly_from_the_blocks_between() -> None:
    job = small_job(sparsity=0.2)
    widths = even_widths(job, 1, 1)
    assert widths[0] == widths[-1] == 48
    assert 0 <= widths[2] - widths[1] <= 1
    assert abs(sum(48 - w for w in widths) * NEURON - 0.2 * job.costs.backbone) <= NEURON / 2
    assert left_alone(30) == (4, 2) and left_alone(4) == (1, 0)


def test_levels_stand_around_the_solution_which_is_one_of_them_and_the_dense_one_is_always_on_offer() -> None:
    job = small_job(options={"interval": 0.25, "refine_levels": 3, "head_levels": 65})
    far = head_levels(job, 1)[4]
    choices = [Choice(2, 5, 48), Choice(*far, 8), Choice(2, 5, 20), Choice(2, 5, 44)]
    for menu, choice in zip(block_menus(job, 2, choices), choices, strict=True):
        # Half of 0.25 x 48 neurons is a step of 6, rounded to 4 or 8.
        assert menu.solution == ((choice.groups, choice.per_group), choice.neurons)
        assert menu.solution[0] in menu.heads and choice.neurons in menu.neurons
        assert 48 in menu.neurons and menu.heads[0] == (2, 5)
    assert all(menu.solution is None for menu in block_menus(job, 1, None))
