"""Models whose blocks differ in heads, head size and FFN width: every figure on paper against counted parameters."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import CompressError
from compress.language.budget import Option, knapsack, nearest_feasible, target_removed
from compress.language.checkpoint import save_model
from compress.language.plan import BlockPlan, Plan
from compress.models.families.base import Biases, BlockGeometry, Costs, Family, Geometry
from compress.models.families.llama import Llama
from compress.models.reading import load_model
from compress.recipes.tyr import TyrOptions
from compress.recipes.tyr.choice import (
    Choice,
    Job,
    allowed_heads,
    block_menus,
    check_budget,
    even_widths,
    removed,
    savings,
    settle,
)
from compress.recipes.tyr.forecast import Shape, stages
from compress.recipes.tyr.prune import produce_plan
from compress.recipes.tyr.supernet import batch_tokens, predicted_bytes
from compress.run.folder import Run
from compress.run.forecast import Stage
from tests.models.families.test_families import linear_parameters
from tests.recipes.tyr.small import job_on
from tests.tiny import tokens, uneven, word_tokenizer

HIDDEN, VOCAB = 40, 300
#         heads, KV heads, head size, FFN width
SIZES = ((10, 2, 8, 48), (4, 4, 16, 96), (6, 3, 8, 32), (8, 2, 4, 112), (2, 1, 32, 64))


class Uneven(Family):
    """Made up: every block has sizes of its own."""

    def block_geometry(self, config: Any, index: int) -> BlockGeometry:
        return BlockGeometry(HIDDEN, *SIZES[index])


class Linears(nn.Module):
    """The linear layers of a block with biases on all of them, at any sizes; nothing where there is nothing left."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, ffn: int) -> None:
        super().__init__()
        q, kv = heads * head_dim, kv_heads * head_dim
        ends = [(HIDDEN, q), (HIDDEN, kv), (HIDDEN, kv), (q, HIDDEN)] if heads else []
        ends += [(HIDDEN, ffn), (HIDDEN, ffn), (ffn, HIDDEN)] if ffn else []
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in ends)

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters())


DENSE = [Linears(*sizes).count() for sizes in SIZES]
BACKBONE = sum(DENSE)
TOTAL = BACKBONE + VOCAB * HIDDEN + (2 * len(SIZES) + 1) * HIDDEN


def geometry() -> Geometry:
    config = SimpleNamespace(num_hidden_layers=len(SIZES), vocab_size=VOCAB, tie_word_embeddings=True)
    return Uneven().geometry(config)


def made_up(sparsity: float = 0.4, **options: Any) -> Job:
    costs = Costs(geometry(), Biases(True, True, True, True), TOTAL)
    none = torch.zeros(0, 32, dtype=torch.int64)
    config = SimpleNamespace(num_hidden_layers=len(SIZES))
    given = TyrOptions.model_validate({"round_to": 4, **options})
    return Job(None, Uneven(), config, costs.geometry, costs, none, none, sparsity, 0, given, {})  # type: ignore[arg-type]


def left(choices: list[Choice]) -> int:
    """Parameters of linear layers built at what the choices keep."""
    return sum(
        Linears(c.groups * c.per_group, c.groups, head_dim, c.neurons).count()
        for c, (_, _, head_dim, _) in zip(choices, SIZES, strict=True)
    )


def drawn(job: Job, seed: int) -> list[Choice]:
    draw = random.Random(seed)
    return [
        Choice(*draw.choice(allowed_heads(job, i)), draw.randint(0, block.ffn))
        for i, block in enumerate(job.geometry.blocks)
    ]


def test_costs_are_what_linear_layers_of_those_sizes_hold() -> None:
    costs = made_up().costs
    assert [block.dense for block in costs.blocks] == DENSE and costs.backbone == BACKBONE


@pytest.mark.parametrize("seed", range(20))
def test_what_choices_remove_is_what_smaller_layers_lack(seed: int) -> None:
    job = made_up()
    choices = drawn(job, seed)
    assert removed(job, choices) == BACKBONE - left(choices)
    blocks = []
    for c, dense in zip(choices, job.geometry.blocks, strict=True):
        heads = tuple(g * dense.group + k for g in range(c.groups) for k in range(c.per_group))
        blocks.append(BlockPlan(heads, tuple(range(c.neurons))))
    plan = Plan(tuple(blocks))
    plan.check(job.geometry)
    assert plan.counts(job.geometry) == [(c.groups * c.per_group, c.groups, c.neurons) for c in choices]
    assert plan.removed(job.costs) == BACKBONE - left(choices)


@pytest.mark.parametrize("block", range(len(SIZES)))
def test_a_plan_is_held_against_the_sizes_of_its_own_block(block: int) -> None:
    job = made_up()
    heads, _, head_dim, ffn = SIZES[block]
    for kept, weights in (
        (BlockPlan((heads,), ()), {}),
        (BlockPlan((), (ffn,)), {}),
        (BlockPlan(tuple(range(heads)), ()), {f"blocks.{block}.o": torch.zeros(HIDDEN, heads * head_dim + 1)}),
    ):
        blocks = [BlockPlan((), ())] * len(SIZES)
        blocks[block] = kept
        with pytest.raises(CompressError):
            Plan(tuple(blocks), weights).check(job.geometry)


def test_the_budgets_reach_is_all_that_may_go() -> None:
    # The first block's attention must stay, at least one query head of one group: the rest may all go.
    least = Linears(1, 1, SIZES[0][2], 0).count()
    able = (BACKBONE - least) / BACKBONE
    assert check_budget(made_up(able)) == round(able * BACKBONE) == BACKBONE - least
    with pytest.raises(CompressError, match=f"{BACKBONE - least:,}"):
        check_budget(made_up(able + 1 / BACKBONE))


def test_every_blocks_menu_spans_its_own_sizes() -> None:
    job = made_up(interval=0.25, levels=5, head_levels=65)
    for menu, (heads, kv_heads, _, ffn) in zip(block_menus(job, 1, None), SIZES, strict=True):
        assert menu.neurons == tuple(4 * round(ffn * share / 4) for share in (1, 0.75, 0.5, 0.25, 0))
        assert menu.heads[0] == (kv_heads, heads // kv_heads)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_a_knapsack_over_the_menus_meets_the_budget_and_settling_closes_in(sparsity: float) -> None:
    job = made_up(sparsity)
    menus = block_menus(job, 1, None)
    draw = random.Random(7)
    curves: list[list[dict[str, Any]]] = []
    for menu, costs in zip(menus, job.costs.blocks, strict=True):
        heads = [savings(costs, Choice(*c, costs.geometry.ffn))[0] for c in menu.heads]
        neurons = [savings(costs, Choice(0, 0, n))[1] for n in menu.neurons]
        for saved in (heads, neurons):
            curves.append([{"saving": s, "loss": s * (1 + draw.random())} for s in saved])
    options = [[Option(**o) for o in own] for own in curves]
    target = target_removed(sparsity, BACKBONE)
    total = nearest_feasible(options, target)
    genome = knapsack(options, total)
    choices = [
        Choice(*menu.heads[a], menu.neurons[f]) for menu, a, f in zip(menus, genome[::2], genome[1::2], strict=True)
    ]
    assert BACKBONE - left(choices) == total
    closer = settle(job, choices, curves)
    step = 4 * job.costs.blocks[0].neuron
    assert abs(BACKBONE - left(closer) - target) <= step / 2 + HIDDEN  # a whole FFN gone takes its last bias along


@pytest.mark.parametrize("edges", [(0, 0), (1, 1)])
def test_even_widths_take_the_same_share_of_every_width(edges: tuple[int, int]) -> None:
    job = made_up(0.2)
    widths = even_widths(job, *edges)
    inner = range(edges[0], len(SIZES) - edges[1])
    full = [sizes[3] for sizes in SIZES]
    assert all(widths[i] == full[i] for i in range(len(SIZES)) if i not in inner)
    share = sum(full[i] - widths[i] for i in inner) / sum(full[i] for i in inner)
    assert all(abs(full[i] - widths[i] - share * full[i]) < 1 for i in inner)
    whole = [Choice(kv, heads // kv, n) for (heads, kv, _, _), n in zip(SIZES, widths, strict=True)]
    assert abs(BACKBONE - left(whole) - 0.2 * BACKBONE) <= job.costs.blocks[0].neuron / 2


def test_blocks_that_do_not_add_to_one_stream_are_refused() -> None:
    with pytest.raises(CompressError, match=r"\[40, 48\]"):
        Geometry((BlockGeometry(40, *SIZES[0]), BlockGeometry(48, *SIZES[0])), VOCAB, True)


def test_facts_name_one_value_where_all_blocks_have_it() -> None:
    facts = geometry().facts()
    assert facts["hidden"] == HIDDEN and facts["layers"] == 5 and facts["ffn"] == [48, 96, 32, 112, 64]
    alike = Geometry.alike(2, BlockGeometry(40, 10, 2, 8, 48), VOCAB, True)
    assert alike.facts() == {
        "layers": 2, "hidden": 40, "heads": 10, "kv_heads": 2, "head_dim": 8, "ffn": 48, "vocab": VOCAB, "tied": True
    }  # fmt: skip


# --- the forecast -----------------------------------------------------------------------------------------------------

WINDOWS, LENGTH, BYTES = 16, 32, 2


def foreseen(job: Job, **changes: Any) -> dict[str, Stage]:
    sizes: dict[str, Any] = {"streamed": False, "cache_blocks": 1, "world": 1, **changes}
    shape = Shape(job.geometry, job.costs, job.options, job.sparsity, WINDOWS, LENGTH, BYTES, **sizes)
    return {stage.name: stage for stage in stages(shape, job)}


def forward(tokens: int) -> int:
    """FLOPs of the dense blocks: two a weight and token, and attention's two products."""
    weights = sum(m.weight.numel() for sizes in SIZES for m in Linears(*sizes).modules() if isinstance(m, nn.Linear))
    biases = BACKBONE - weights
    scores = sum(4 * LENGTH * heads * head_dim for heads, _, head_dim, _ in SIZES)
    return tokens * (2 * (weights + biases) + scores)


def test_the_forecast_holds_reads_and_writes_every_block_at_its_own_size() -> None:
    job = made_up(iterations=1)
    held, streamed = foreseen(job), foreseen(job, streamed=True)
    assert held["search-1"].device["model"] == 4 * TOTAL
    assert streamed["search-1"].device["model"] == 4 * (TOTAL - BACKBONE + max(DENSE))
    assert streamed["search-1"].ram["the block being read"] == BYTES * max(DENSE)
    # The metrics' two walks, beside the streams and the metrics themselves.
    stream = 4 * 8 * LENGTH * HIDDEN
    assert streamed["metrics"].work["read"] == 2 * BYTES * BACKBONE + 2 * len(SIZES) * stream
    assert held["model"].kept == BYTES * (TOTAL - round(0.4 * BACKBONE))
    menus = block_menus(job, 1, None)
    sizes = [predicted_bytes(m, b) for m, b in zip(menus, job.geometry.blocks, strict=True)]
    assert held["supernet-1"].kept == pytest.approx(sum(sizes) + 1500 * len(SIZES))  # and the seals
    # float64 H, G and their like of the widest down_proj, and the rows that are being added.
    n = 112
    assert held["supernet-1"].device["statistics and solver"] >= 16 * (n * n + n * HIDDEN)


def test_the_forecast_counts_every_blocks_own_products() -> None:
    job = made_up(iterations=1, search={"generations": 0, "windows": 4})
    found = foreseen(job)
    head = 2 * HIDDEN * VOCAB
    tokens = 8 * LENGTH
    metrics = 3 * forward(tokens) + len(SIZES) * 4 * tokens * HIDDEN**2 + 3 * tokens * head
    assert found["metrics"].work["gemm32"] == pytest.approx(metrics, rel=1e-12)
    tokens, positions = 4 * LENGTH, 31
    # The dense streams and the teacher; eight starting points at the sparsity asked for; their best one's streams.
    once = forward(tokens) + 4 * positions * head
    starts = 8 * (0.6 * forward(tokens) + 4 * positions * head)
    assert found["search-1"].work["gemm32"] == pytest.approx(once + starts + 0.88 * 0.6 * forward(tokens), rel=1e-12)
    # Of the singles, each runs the blocks from its own on.
    menus = block_menus(job, 1, None)
    singles = 0.0
    whole = [forward_of(i, tokens) for i in range(len(SIZES))]
    for i, menu in enumerate(menus):
        singles += (len(menu.neurons) + len(menu.heads) - 2) * (sum(whole[i:]) + 4 * positions * head)
    assert found["singles-1"].work["gemm32"] == pytest.approx(once + singles, rel=1e-12)


def forward_of(block: int, tokens: int) -> int:
    heads, _, head_dim, _ = SIZES[block]
    return tokens * (2 * DENSE[block] + 4 * LENGTH * heads * head_dim)


def test_a_wider_block_anywhere_costs_more_of_everything_it_touches() -> None:
    job = made_up(iterations=1)
    for i, block in enumerate(job.geometry.blocks):
        blocks = list(job.geometry.blocks)
        blocks[i] = replace(block, ffn=2 * block.ffn)
        wide = Geometry(tuple(blocks), VOCAB, True)
        costs = Costs(wide, job.costs.biases, TOTAL + block.ffn * job.costs.blocks[0].neuron)
        larger = replace(job, geometry=wide, costs=costs)
        before, after = foreseen(job), foreseen(larger)
        for name in ("metrics", "supernet-1", "search-1", "final"):
            assert after[name].work["gemm32"] > before[name].work["gemm32"], (i, name)
        assert after["supernet-1"].kept > before["supernet-1"].kept and after["model"].kept > before["model"].kept


def test_a_gpus_batch_is_bound_by_the_widest_block() -> None:
    narrow, wide = BlockGeometry(8192, 8, 8, 128, 8192), BlockGeometry(8192, 8, 8, 128, 65536)

    def most(*blocks: BlockGeometry) -> int:
        return batch_tokens(Geometry(blocks, VOCAB, True), gpu=True)

    assert most(narrow, wide) == most(wide, narrow) == most(wide, wide) < most(narrow, narrow)


# --- a real model -----------------------------------------------------------------------------------------------------


def real() -> tuple[Any, Costs]:
    model = uneven()
    family = Llama()
    total = sum(p.numel() for p in model.parameters())
    return model, Costs(family.geometry(model.config), family.biases(model.config), total)


def test_a_dense_model_with_entries_per_layer_is_counted_sliced_saved_and_loaded(tmp_path: Path) -> None:
    model, costs = real()
    family, ids = Llama(), tokens(2, 24)
    assert [b.ffn for b in costs.geometry.blocks] == [48, 80, 32, 48]
    assert [(b.heads, b.kv_heads) for b in costs.geometry.blocks] == [(10, 2), (10, 2), (6, 3), (10, 2)]
    assert costs.backbone == linear_parameters(model)
    plan = Plan(
        (
            BlockPlan(tuple(range(10)), tuple(range(48))),  # as it was
            BlockPlan((0, 2, 5, 7), tuple(range(3, 80, 3))),
            BlockPlan((2, 3), tuple(range(32))),
            BlockPlan((), tuple(range(8))),
        )
    )
    masked = uneven()
    plan.mask(masked, family)
    plan.apply(model, family)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, masked(ids).logits, atol=2e-5, rtol=1e-5)
    assert linear_parameters(model) == costs.backbone - plan.removed(costs)
    counts, tokenizer = plan.counts(costs.geometry), word_tokenizer(tmp_path)
    save_model(model, family, counts, tmp_path, tokenizer=tokenizer, dtype=torch.float32, tokens=ids[:1])
    loaded = load_model(tmp_path, family)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_run_on_it_meets_the_budget_to_the_parameter(tmp_path: Path) -> None:
    model, costs = real()
    search = {"generations": 1, "offspring": 4, "windows": 3, "singles_windows": 2, "positions": 8}
    options = {"iterations": 2, "search": search}
    job = job_on(model, costs, options, sparsity=0.4, windows=(8, 3, 24))
    with Run.open(tmp_path / "run") as run:
        plan = Plan.load(produce_plan(run, job))
    target = target_removed(0.4, costs.backbone)
    assert abs(plan.removed(costs) - target) <= 2 * costs.blocks[0].neuron
    plan.apply(model, Llama())
    assert linear_parameters(model) == costs.backbone - plan.removed(costs)
