"""Budgets: how they are written, and prices that are those of the modules and files themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.exporters.onnx import cached_layers
from compress.language.checkpoint import save_model
from compress.language.limits import counted, dense_counts, limit, measured, parse, shown
from compress.language.plan import BlockPlan, Plan
from compress.models.families import family_for
from compress.schema.recipe import BenchSection
from tests.models.families.test_families import linear_parameters
from tests.tiny import ARCHITECTURES, tiny, uneven, word_tokenizer


def one(text: str) -> Any:
    (budget,) = parse([text], BenchSection(prompt=64, context=96))
    return budget


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("kv_cache<=0.5x", 96),
        ("kv_cache@4096<=64MB", 4096),
        ("tpot<=0.7x", 96),
        ("ttft<=0.7x", 64),
        ("ttft@7<=0.7x", 7),
        ("size<=90MB", None),
        ("parameters<=100M", None),
    ],
)
def test_a_figure_has_the_length_that_is_said_or_that_of_the_bench(text: str, length: int | None) -> None:
    assert one(text).length == length and one(text).text == text


@pytest.mark.parametrize(
    ("texts", "what", "fix"),
    [
        (["tpot<=20"], "the unit is missing", "x (times the dense model's), us, ms, s"),
        (["size<=20parsec"], "size has no unit 'parsec'", "MiB"),
        (["parameters<=100MB"], "parameters has no unit 'MB'", "k, M, B"),
        (["sise<=2x"], "no figure 'sise'", "did you mean 'size'"),
        (["latency<=2x"], "no figure 'latency'", "tpot"),
        (["size>=0.8x"], "bounded from above", "size<=0.8x"),
        (["size<=0x"], "above 0", "size<=0.8x"),
        (["size@4<=0.8x"], "not taken at a length", "kv_cache"),
        (["kv_cache@0<=0.8x"], "at least 1 token", "kv_cache"),
        (["tpot.p90<=0.8x"], "no statistic 'p90'", "leave it out"),
        (["tpot<=20ms"], "named, pinned device", "tpot<=0.7x"),
        (["as small as can be"], "no budget", "size<=0.8x"),
        (["size<=" + "9" * 300 + "GB"], "no limit is beyond", "size<=0.8x"),
        (["size<=" + "9" * 400 + "x"], "no number that can be reached", "size<=0.8x"),
        (["size<=0.8x", "size<=90MB"], "two budgets are of size", "tighter"),
        (["kv_cache@8<=0.8x", "kv_cache@16<=0.7x"], "two budgets are of kv_cache", "tighter"),
        (["tpot<=0.8x", "tpot@96<=0.7x"], "two budgets are of tpot", "tighter"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused_with_a_way_out(texts: list[str], what: str, fix: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(texts, BenchSection(prompt=64, context=96))
    assert what in error.value.what and fix in (error.value.fix or "")
    assert "budget" in str(error.value.where)


def test_times_at_two_lengths_are_two_budgets() -> None:
    assert len(parse(["tpot@32<=0.8x", "tpot@512<=0.7x", "ttft<=0.7x"], None)) == 3


def test_a_limit_is_the_largest_whole_number_that_is_not_over_what_was_written() -> None:
    prices: Any = None
    assert limit(one("size<=0.8x"), prices, 10).most == 8  # 0.8 of a float is a little more than 4/5
    assert limit(one("size<=0.7x"), prices, 10).most == 7  # and 0.7 a little less than 7/10
    assert limit(one("parameters<=0.29x"), prices, 100).most == 29
    assert limit(one("size<=1.5kB"), prices, 10).most == 1500
    assert limit(one("size<=0.33x"), prices, 10).most == 3


def setup_of(model: Any, dtype: torch.dtype) -> Any:
    family = family_for(model.config)
    return SimpleNamespace(
        config=model.config, family=family, geometry=family.geometry(model.config), costs=family.costs(model.config),
        stored_dtype=dtype,
    )  # fmt: skip


def cut(model: Any, setup: Any, seed: int) -> tuple[Any, list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(a sliced copy, its counts for prices, its counts for a checkpoint) with random units gone."""
    rng = torch.Generator().manual_seed(seed)
    blocks = []
    for i, g in enumerate(setup.geometry.blocks):
        groups = int(torch.randint(0 if i != setup.geometry.layers - 1 else 1, g.kv_heads + 1, (), generator=rng))
        per = int(torch.randint(1, g.group + 1, (), generator=rng))
        n = int(torch.randint(0, g.ffn // 4 + 1, (), generator=rng)) * 4
        heads = tuple(k * g.group + h for k in range(groups) for h in range(per))
        blocks.append(BlockPlan(heads, tuple(range(n))))
    plan = Plan(tuple(blocks))
    plan.apply(model, setup.family)
    saved = plan.counts(setup.geometry)
    return model, [(g, h // g if g else 0, n) for h, g, n in saved], saved


MODELS = [*((name, 0, torch.float32) for name in sorted(ARCHITECTURES)), ("uneven", 1, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "seed", "dtype"), MODELS)
def test_prices_are_what_the_saved_model_takes(kind: str, seed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = uneven() if kind == "uneven" else tiny(kind)
    setup = setup_of(model, dtype)
    dense_parameters = sum(p.numel() for p in model.parameters())
    dense_linear, dense_cache = linear_parameters(model), sum(2 * h * w for _, h, w in cached_layers(model))
    budgets = parse(["parameters<=0.5x", "size<=0.5x", "kv_cache@10<=0.5x"], None)
    prices = {b.figure: counted(b, setup) for b in budgets}
    parameters, size, cache = (prices[b.figure] for b in budgets)
    assert parameters[1] == parameters[0].total(dense_counts(setup.costs)) == dense_parameters > dense_linear
    assert cache[1] == 10 * dense_cache * dtype.itemsize

    sliced, counts, saved = cut(model, setup, seed)
    tokens = torch.randint(3, 300, (1, 8))
    save_model(sliced, setup.family, saved, tmp_path, tokenizer=word_tokenizer(tmp_path), dtype=dtype, tokens=tokens)
    found = measured(tmp_path, setup.family, {b.figure: (b.figure, b.length) for b in budgets})
    assert parameters[0].total(counts) == found["parameters"] == sum(p.numel() for p in sliced.parameters())
    assert (
        cache[0].total(counts)
        == found["kv_cache"]
        == 10 * dtype.itemsize * sum(2 * h * w for _, h, w in cached_layers(sliced))
    )
    assert found["size"] == (tmp_path / "model.safetensors").stat().st_size
    # The header is taken to be that of the dense model, whose numbers have as many digits or more.
    assert 0 <= size[0].total(counts) - found["size"] < 0.1 * found["size"]


def test_a_row_is_shown_in_its_unit_with_its_share() -> None:
    budget = one("tpot<=0.5x")
    prices: Any = SimpleNamespace(total=lambda counts: 3 * 10**9)
    row = replace(limit(budget, prices, 8 * 10**9)).facts([], 10**9)
    assert (row["asked"], row["dense"], row["floor"], row["table"]) == (0.004, 0.008, 0.001, 0.003)
    assert shown(row, "asked") == "4.00 ms (0.5x)" and shown(row, "dense") == "8.00 ms"


def test_a_cache_that_is_not_told_by_heads_is_refused() -> None:
    setup = setup_of(tiny("llama"), torch.float32)
    blocks = tuple(
        replace(b, geometry=replace(b.geometry, attention_whole=i == 1)) for i, b in enumerate(setup.costs.blocks)
    )
    setup.costs = replace(setup.costs, counted=blocks)
    (budget,) = parse(["kv_cache<=0.5x"], None)
    with pytest.raises(CompressError, match="attention that is never cut"):
        counted(budget, setup)
