"""A search under budgets keeps every one of them, and starts from the best there is; checked by trying all."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import CompressError
from compress.language.budget import Option
from compress.language.constrained import Bounds
from compress.language.limits import counted, limit, parse
from compress.language.plan import Plan
from compress.recipes.tyr.bounded import bounds_of, breeder, starts
from compress.recipes.tyr.choice import (
    Choice,
    Curves,
    Job,
    allowed_heads,
    check_budget,
    counts_of,
    savings,
    settle,
    smallest,
    within,
)
from compress.recipes.tyr.forecast import even_choices, implied
from compress.recipes.tyr.prune import produce_plan
from compress.recipes.tyr.stages import say_kept
from compress.run.folder import Run
from tests.recipes.tyr.small import OPTIONS, small_job


def bounded(texts: list[str], **options: Any) -> Job:
    """A job on a tiny model of three blocks under these budgets."""
    job = small_job("llama", {**OPTIONS, **options}, num_hidden_layers=3, windows=(8, 3, 24))
    setup: Any = SimpleNamespace(config=job.config, family=job.family, costs=job.costs, stored_dtype=torch.float32)
    limits = tuple(limit(b, *counted(b, setup)) for b in parse(texts, None))
    return replace(job, limits=limits)


def described(job: Job) -> tuple[list[list[tuple[int, ...]]], list[list[Option]]]:
    """Menus of three levels a sublayer with losses that rise: (what they keep, options)."""
    rng = np.random.default_rng(5)
    levels: list[list[tuple[int, ...]]] = []
    options = []
    for costs in job.costs.blocks:
        heads = [(2, 5), (2, 2), (1, 3)]
        widths = [(48,), (24,), (0,)]
        losses = [np.concatenate([[0], np.sort(rng.gamma(1, 1, 2))]) for _ in range(2)]
        levels += [heads, widths]  # type: ignore[list-item]
        options.append(
            [Option(savings(costs, Choice(*h, 0))[0], float(v)) for h, v in zip(heads, losses[0], strict=True)]
        )
        options.append(
            [Option(costs.ffn_dense - costs.ffn(*w), float(v)) for w, v in zip(widths, losses[1], strict=True)]
        )
    return levels, options


@pytest.fixture(scope="module")
def job() -> Job:
    return bounded(["parameters<=0.8x", "kv_cache<=0.7x"])


@pytest.fixture(scope="module")
def field(job: Job) -> tuple[list[list[tuple[int, ...]]], list[list[Option]], Bounds]:
    levels, options = described(job)
    return levels, options, bounds_of(job.limits, levels)


def choices(levels: list[list[tuple[int, ...]]], genome: tuple[int, ...]) -> list[Choice]:
    return [
        Choice(*levels[2 * i][genome[2 * i]], *levels[2 * i + 1][genome[2 * i + 1]])  # type: ignore[call-arg]
        for i in range(len(genome) // 2)
    ]


def test_bounds_hold_where_the_choices_keep_every_budget_and_nowhere_else(job: Job, field: Any) -> None:
    levels, _, bounds = field
    held = 0
    for genome in itertools.product(range(3), repeat=6):
        kept = within(job, choices(levels, genome))
        assert bounds.hold(genome) == kept
        held += kept
    assert 50 < held < 600


def test_the_first_start_is_the_best_of_all_that_keep_the_budgets_and_every_other_keeps_them(field: Any) -> None:
    _, options, bounds = field
    able = [g for g in itertools.product(range(3), repeat=6) if bounds.hold(g)]

    def loss(genome: tuple[int, ...]) -> float:
        return sum(options[i][e].loss for i, e in enumerate(genome))

    found = starts(options, bounds, None)
    assert loss(found["knapsack"]) == pytest.approx(min(map(loss, able)))
    assert all(g in able for g in found.values())
    assert {"uniform", "edges left alone", "penalty 10"} <= set(found)
    # Every block alike, and attention as whole as the cache lets it be.
    assert len(set(found["uniform"][::2])) == len(set(found["uniform"][1::2])) == 1
    lighter = [g for g in able if len(set(g[::2])) == len(set(g[1::2])) == 1 and g[0] < found["uniform"][0]]
    assert not lighter
    assert starts(options, bounds, found["penalty 10"])["incumbent"] == found["penalty 10"]
    assert "incumbent" not in starts(options, bounds, (0,) * 6)  # the dense model keeps no budget


def test_offspring_keep_every_bound_are_new_and_the_same_for_one_seed(field: Any) -> None:
    _, options, bounds = field
    parent = starts(options, bounds, None)["knapsack"]

    def bred() -> list[tuple[int, ...]]:
        seen = {parent}
        rng = np.random.default_rng(3)
        breed = breeder(options, bounds)
        return [*breed(parent, 8, rng, seen), *breed(parent, 8, rng, seen)]

    found = bred()
    assert len(set(found)) == len(found) >= 3 and parent not in found
    assert all(bounds.hold(g) for g in found)
    assert found == bred()


def curves(job: Job, slopes: tuple[float, ...]) -> Curves:
    """Straight curves of every FFN, ``slopes`` KL a parameter; of attention none is asked for."""
    found: Curves = []
    for costs, slope in zip(job.costs.blocks, slopes, strict=True):
        whole = costs.ffn_dense
        found += [[], [{"saving": s, "loss": slope * s} for s in (0, whole // 2, whole)]]
    return found


def test_what_the_budgets_leave_comes_back_where_it_is_worth_most(job: Job) -> None:
    # The cache allows four of six KV groups; what the parameters then leave goes to the block with the steepest FFN.
    start = [Choice(1, 5, 24), Choice(1, 5, 24), Choice(2, 5, 24)]
    assert within(job, start)
    found = settle(job, start, curves(job, (1.0, 5.0, 2.0)))
    assert [(c.groups, c.per_group) for c in found] == [(1, 5), (1, 5), (2, 5)]
    assert [c.neurons for c in found][1] == 48 and found[0].neurons == 24
    assert within(job, found)
    for i, c in enumerate(found):
        more = [*found[:i], Choice(c.groups, c.per_group, c.neurons + 4), *found[i + 1 :]]
        assert c.neurons == 48 or not within(job, more)
    with pytest.raises(CompressError, match="does not keep the budgets"):
        settle(job, [Choice(2, 5, 48)] * 3, curves(job, (1.0, 1.0, 1.0)))


def test_a_budget_below_the_floor_is_refused_with_a_budget_that_can_be_asked_for() -> None:
    for text in ("parameters<=0.1x", "kv_cache<=0.1x", "size<=20kB"):
        with pytest.raises(CompressError, match=r"but where all is gone that may be pruned") as error:
            check_budget(bounded([text]))
        nearest = str(error.value.fix).removeprefix("ask for ").removesuffix(" at least")
        check_budget(bounded([nearest]))  # it is what can be reached
        figure, share = nearest.removesuffix("x").split("<=")
        with pytest.raises(CompressError, match="stay"):
            check_budget(bounded([f"{figure}<={float(share) - 0.0002:.4f}x"]))


def test_the_floor_is_that_of_all_choices_there_are() -> None:
    job = bounded(["size<=0.9x"])
    every = itertools.product(*(itertools.product(allowed_heads(job, i), (0, 4, 48)) for i in range(3)))
    prices = job.limits[0].prices
    found = min(prices.total([(*heads, n) for heads, n in choice]) for choice in every)
    assert found == prices.total(counts_of(smallest(job)))


def test_attention_that_stays_raises_the_floor_of_the_cache() -> None:
    with pytest.raises(CompressError, match=r"or let attention be pruned") as error:
        check_budget(bounded(["kv_cache<=0.9x"], attention=False))
    assert "kv_cache<=1.0000x" in str(error.value.fix)


def test_budgets_that_the_dense_model_keeps_are_said_and_refused_where_there_is_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = bounded(["size<=1.1x", "kv_cache<=0.7x"])
    check_budget(job)
    say_kept(job)
    assert "size<=1.1x: the dense model keeps it already" in capsys.readouterr().err
    with pytest.raises(CompressError, match=r"keeps size<=1\.1x and kv_cache<=2GB already: there is nothing to prune"):
        check_budget(bounded(["size<=1.1x", "kv_cache<=2GB"]))


def test_the_sparsity_that_a_forecast_takes_is_the_least_that_keeps_the_budgets(job: Job) -> None:
    share = implied(job)
    assert within(job, even_choices(replace(job, sparsity=share)))
    assert not within(job, even_choices(replace(job, sparsity=share - 1 / 64)))
    assert implied(job, [0.3]) >= 0.7


@pytest.fixture(scope="module")
def planned(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounded") / "run"
    with Run.open(folder) as run:
        produce_plan(run, job)
    return folder


def test_a_plan_and_every_genome_that_was_measured_keep_the_budgets(job: Job, planned: Path) -> None:
    plan = Plan.load(planned / "plan")
    counts = [(g, h // g if g else 0, n) for h, g, n in plan.counts(job.geometry)]
    assert within(job, [Choice(*c) for c in counts])
    for row, own in zip(plan.meta["budgets"], job.limits, strict=True):
        assert row["table"] == own.prices.total(counts) <= row["asked"] == own.most < row["dense"]
    results = json.loads((planned / "plan" / "search.json").read_text())
    for result in results:
        assert result["kl"] <= result["kl_start"]
        for label, found in result["choices_starts"].items():
            assert within(job, [Choice(**c) for c in found]), label
        assert within(job, [Choice(**c) for c in result["choices"]])


def test_another_budget_is_other_inputs_of_the_search_and_of_nothing_before_it(job: Job, planned: Path) -> None:
    tighter = replace(bounded(["parameters<=0.79x", "kv_cache<=0.7x"]), inputs=job.inputs)
    with Run.open(planned) as run, pytest.raises(CompressError, match=r"search-1.*other inputs.*budgets"):
        produce_plan(run, tighter)


def test_the_same_run_again_goes_through_without_a_search(
    job: Job, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.recipes.tyr import prune

    monkeypatch.setattr(prune, "evolve", None)
    before = (planned / "plan" / "plan.json").read_bytes()
    with Run.open(planned) as run:
        produce_plan(run, job)
    assert (planned / "plan" / "plan.json").read_bytes() == before


def test_a_run_that_lost_its_second_search_goes_on_to_the_same_plan(job: Job, planned: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(planned, again)
    for name in ("search-2", "final", "plan"):
        shutil.rmtree(again / name)
    with Run.open(again) as run:
        produce_plan(run, job)
    for name in ("plan.json", "plan.safetensors"):
        assert (again / "plan" / name).read_bytes() == (planned / "plan" / name).read_bytes()
