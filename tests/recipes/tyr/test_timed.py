"""Budgets of times with a made-up machine, whose times are known: what a table says, when a search is made again, and
which solution is taken."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.language import latency, tables
from compress.language.latency import Clock, Levels, check_times, errors_of, prices_of, shaped
from compress.language.limits import parse
from compress.language.plan import Plan
from compress.models.families import family_for
from compress.recipes.tyr import timed
from compress.recipes.tyr.choice import Choice, Job, counts_of, within
from compress.recipes.tyr.prune import produce_plan
from compress.run.folder import Run
from compress.schema.recipe import BenchSection, ExportSection
from tests.recipes.tyr.small import small_job
from tests.tiny import ARCHITECTURES, tiny, uneven

SEARCH = {"positions": 12, "singles_windows": 2, "generations": 1, "offspring": 4, "steps": [1.0], "survivors": []}
OPTIONS: dict[str, Any] = {"iterations": 1, "levels": 5, "head_levels": 4, "interval": 0.25, "metric": "none"}
OPTIONS |= {"rescale": False, "search": SEARCH}
BENCH = BenchSection(prompt=32, context=16, processes=3)


def machine(layers: Sequence[tuple[int, int, int]], wide: int | None, crowd: float = 0.0) -> dict[str, float]:
    """Seconds of a model: a constant, the head, and each sublayer by its shape; ``crowd``: what every sublayer that is
    there takes more for each other, which no table of single ones can know."""
    found = {"tpot@16": 0.001 + (0.002 if wide is None else 0.0), "ttft@32": 0.004}
    there = 0
    for heads, groups, neurons in layers:
        if heads:
            found["tpot@16"] += 0.0002 + 0.0001 * groups + 0.00002 * heads
            found["ttft@32"] += 0.002 * heads
        if neurons:
            found["tpot@16"] += 0.0001 + 0.00002 * neurons
            found["ttft@32"] += 0.0005 * neurons
        there += bool(heads) + bool(neurons)
    return {k: v * (1 + crowd * there) for k, v in found.items()}


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, int]]:
    """Lets every clock read the made-up machine; what was exported and timed is counted."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))

    def fake(crowd: float = 0.0, noise: float = 0.0) -> dict[str, int]:
        done = {"exports": 0, "times": 0}

        def export(self: Clock, layers: Any, folder: Path, vocabulary: int | None = latency.VOCABULARY) -> Path:
            folder.mkdir()
            (folder / "layers.json").write_text(json.dumps([layers, vocabulary]))
            done["exports"] += 1
            return folder

        def once(self: Clock, place: Path, sample: Any, seed: int, vocabulary: int | None) -> dict[str, float]:
            layers, own = json.loads((place / "layers.json").read_text())
            assert own == vocabulary
            done["times"] += 1
            whole = len(layers) == self.setup.geometry.layers and own is None
            return {k: v * (1 + noise * seed) for k, v in machine(layers, own, crowd if whole else 0.0).items()}

        monkeypatch.setattr(Clock, "_export", export)
        monkeypatch.setattr(Clock, "_once", once)
        return done

    return fake


def setup_of(model: Any) -> Any:
    family = family_for(model.config)
    recipe = SimpleNamespace(bench=BENCH, export=ExportSection(), seed=0)
    return SimpleNamespace(
        config=model.config, family=family, geometry=family.geometry(model.config), costs=family.costs(model.config),
        stored_dtype=torch.float32, recipe=recipe,
    )  # fmt: skip


def job_of(folder: Path, *budgets: str, **options: Any) -> Job:
    job = small_job("llama", {**OPTIONS, **options}, num_hidden_layers=4, windows=(6, 2, 24))
    whole = json.dumps([[(10, 2, 48)] * 4, None])
    with Run.open(folder / "exported") as run:
        dense = run.stage("export-dense", {}, lambda f: (f / "layers.json").write_text(whole))
    return replace(job, clock=Clock(setup_of(job.model), parse(budgets, BENCH), lambda: dense), sparsity=0.3)


LEVELS = Levels(((2, 5), (2, 2), (1, 3), (0, 0)), (48, 24, 0))


def test_a_table_of_a_machine_whose_times_add_up_prices_every_model_exactly(faked: Any, tmp_path: Path) -> None:
    done = faked()
    clock = job_of(tmp_path, "tpot<=0.6x", "ttft<=0.6x").clock
    assert clock is not None
    (tmp_path / "table").mkdir()
    clock.table(tmp_path / "table", LEVELS, clock.dense())
    table = json.loads((tmp_path / "table" / "table.json").read_text())
    assert done["exports"] == 1 + 3 + 2 + latency.CHECKS
    assert sorted(p.name for p in (tmp_path / "table").iterdir()) == ["table.json"]
    for key in ("tpot@16", "ttft@32"):
        prices, dense = prices_of(clock.setup, table, key)
        assert dense == pytest.approx(machine([(10, 2, 48)] * 4, None)[key] * 1e12)
        for (g, p), n in itertools.product(LEVELS.heads, LEVELS.neurons):
            layers = [(10, 2, 48), (g * p, g, n), (0, 0, n), (g * p, g, 0)]
            counts = [(2, 5, 48), (g, p, n), (0, 0, n), (g, p, 0)]
            assert prices.total(counts) == pytest.approx(machine(layers, None)[key] * 1e12)
        # Between two levels lies a line, which is what this machine has there.
        assert prices.ffn(0, 36) == pytest.approx(prices.ffn(0, 48) * 0.5 + prices.ffn(0, 24) * 0.5)
        assert prices.attention(0, 0, 0) == prices.ffn(0, 0) == 0
        assert errors_of(table, key) == {"models": 3, "median": pytest.approx(0), "worst": pytest.approx(0)}


def test_a_machine_on_which_a_sublayer_costs_nothing_is_refused(
    faked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked()
    monkeypatch.setattr(
        Clock, "_once", lambda self, place, *_: dict.fromkeys(("tpot@16", "ttft@32"), 1.0 + len(place.name) / 100)
    )
    clock = job_of(tmp_path, "tpot<=0.6x").clock
    assert clock is not None
    with pytest.raises(CompressError, match=r"without attention were no faster .* cannot be told from this machine"):
        clock.table(tmp_path, LEVELS, clock.dense())


def test_what_all_processes_are_slowed_down_by_alike_changes_no_share(faked: Any, tmp_path: Path) -> None:
    faked(noise=0.5)  # the second pair is half as slow again, the third twice as slow
    clock = job_of(tmp_path, "tpot<=0.6x").clock
    assert clock is not None
    clock.whole([(10, 2, 24)] * 4, tmp_path, clock.dense())
    share = json.loads((tmp_path / "shares.json").read_text())["tpot@16"]
    whole = machine([(10, 2, 24)] * 4, None)["tpot@16"] / machine([(10, 2, 48)] * 4, None)["tpot@16"]
    assert share["median"] == share["low"] == share["high"] == pytest.approx(whole) and len(share["pairs"]) == 3


def produced(folder: Path, job: Job) -> tuple[Plan, list[str]]:
    """The plan of a run, and the names of its stages."""
    with Run.open(folder) as run:
        made = produce_plan(run, job)
        return Plan.load(made), [row["name"] for row in run.stages()]


def share_of(job: Job, plan: Plan, crowd: float) -> float:
    whole = machine(plan.counts(job.geometry), None, crowd)["tpot@16"]
    return whole / machine([(10, 2, 48)] * 4, None, crowd)["tpot@16"]


def test_where_times_add_up_one_search_keeps_the_budget_and_takes_most_of_it(faked: Any, tmp_path: Path) -> None:
    faked()
    job = job_of(tmp_path, "tpot<=0.75x")
    plan, stages = produced(tmp_path / "run", job)
    assert 0.70 < share_of(job, plan, 0.0) <= 0.75
    assert "latency-table" in stages and "latency-whole-1" in stages and "latency-whole-2" not in stages
    (row,) = plan.meta["budgets"]
    assert (
        row["whole"]["median"] == pytest.approx(row["whole"]["predicted"]) == pytest.approx(row["table"] / row["dense"])
    )
    assert row["unit"] == "seconds" and row["search"] == 1 and row["table"] <= row["asked"] and row["floor"] > 0


@pytest.mark.parametrize("crowd", [0.02, -0.012])
def test_where_they_do_not_the_table_is_put_right_and_the_next_search_comes_within_the_budget(
    crowd: float, faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a crowd the pruned model is faster than the table says, and slower with its opposite."""
    faked(crowd)
    job = job_of(tmp_path, "tpot<=0.75x")
    plan, stages = produced(tmp_path / "run", job)
    assert "search-1-again-2" in stages and "latency-whole-2" in stages
    assert 0.68 < share_of(job, plan, crowd) <= 0.75
    (row,) = plan.meta["budgets"]
    assert row["asked"] == pytest.approx(0.75 * row["dense"]) and row["search"] > 1
    assert abs(row["whole"]["predicted"] - row["whole"]["median"]) > 0.01
    assert "the table is put right by that" in capsys.readouterr().err
    # The same run again measures nothing and gives the same plan.
    faked_again = faked(crowd)
    again, _ = produced(tmp_path / "run", job)
    assert again.blocks == plan.blocks and again.meta == plan.meta and not any(faked_again.values())


def test_the_aim_is_on_the_lines_through_what_was_measured() -> None:
    # It saved half as much again as the table says: two thirds of what is wanted must be asked of the table.
    assert timed.aim([(0.8, 0.7)], 0.7) == pytest.approx(0.8)
    assert timed.aim([(0.8, 0.7)], 0.85) == pytest.approx(0.9)
    assert timed.aim([(0.8, 0.7)], 0.55) == pytest.approx(0.7)
    # Between two that were tried, on the line between them.
    assert timed.aim([(0.8, 0.7), (0.6, 0.3)], 0.5) == pytest.approx(0.7)
    assert timed.aim([(0.7, 1.1)], 0.9) == pytest.approx(0.9)  # nothing can be learnt from that


def held(number: int, median: float, half: float, limit: float = 0.7) -> Mapping[str, Any]:
    return {"median": median, "low": median - half, "high": median + half, "predicted": limit}


def test_the_nearest_is_taken_and_said_where_no_search_keeps_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    faked()
    measured = iter([0.8, 0.77, 0.79])
    real = timed._timed

    def off(run: Run, job: Job, number: int, choices: list[Choice]) -> timed.Held:
        found = real(run, job, number, choices)
        return replace(found, shares={"tpot@16": held(number, next(measured), 0.01)})

    monkeypatch.setattr(timed, "_timed", off)
    job = job_of(tmp_path, "tpot<=0.75x")
    plan, stages = produced(tmp_path / "run", job)
    said = capsys.readouterr().err
    assert "not kept by 3 searches; the nearest: tpot at 16 tokens 0.770x" in said
    assert plan.meta["budgets"][0]["search"] == 2 and plan.meta["budgets"][0]["whole"]["median"] == 0.77
    assert [s for s in stages if s.startswith("search")] == ["search-1", "search-1-again-2", "search-1-again-3"]


def test_a_time_beside_what_is_counted_and_a_run_off_keep_all_budgets(faked: Any, tmp_path: Path) -> None:
    from compress.language.limits import counted, limit

    faked()
    job = job_of(tmp_path, "tpot<=0.75x", run_off={"solutions": 2, "windows": 2})
    assert job.clock is not None
    counts = tuple(limit(b, *counted(b, job.clock.setup)) for b in parse(["kv_cache<=0.7x"], BENCH))
    job = replace(job, limits=counts, judging=job.search)
    plan, _ = produced(tmp_path / "run", job)
    assert [row["budget"] for row in plan.meta["budgets"]] == ["kv_cache<=0.7x", "tpot<=0.75x"]
    assert all(row["table"] <= row["asked"] for row in plan.meta["budgets"]) and plan.meta["run_off"]
    chosen = [Choice(g, h // g if g else 0, n) for h, g, n in plan.counts(job.geometry)]
    assert within(job, chosen) and counts_of(chosen)


def test_a_time_below_its_floor_is_refused_when_the_table_is_there(faked: Any, tmp_path: Path) -> None:
    faked()
    with pytest.raises(CompressError, match=r"tpot<=0\.2x allows .* stay") as error:
        produced(tmp_path / "run", job_of(tmp_path, "tpot<=0.2x"))
    nearest = str(error.value.fix).removeprefix("ask for ").removesuffix(" at least")
    assert float(nearest.removeprefix("tpot<=").removesuffix("x")) > 0.2
    with pytest.raises(CompressError, match="there is nothing to prune"):
        produced(tmp_path / "other", job_of(tmp_path, "tpot<=1.0x"))


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_a_model_of_random_weights_has_the_shapes_it_is_asked_for(kind: str) -> None:
    setup = setup_of(tiny(kind))
    layers = [(10, 2, 48), (4, 2, 12), (0, 0, 48), (10, 2, 0)]
    if kind == "qwen2":
        layers[1] = (6, 2, 12)
    for vocabulary in (None, 256):
        model = shaped(setup, layers, vocabulary)
        count = sum(p.numel() for p in model.parameters())
        prices = sum(
            costs.attention(g, h // g if g else 0) + costs.ffn(n)
            for (h, g, n), costs in zip(layers, setup.costs.blocks, strict=True)
        )
        rest = count - prices
        dense = tiny(kind)
        assert model.get_input_embeddings().weight.shape == (vocabulary or 300, 40)
        with torch.no_grad():
            assert model(torch.arange(3, 20)[None]).logits.isfinite().all()
        if vocabulary is None:
            assert rest <= sum(p.numel() for p in dense.parameters()) - setup.costs.backbone


def test_models_whose_times_no_shape_prices_are_refused() -> None:
    with pytest.raises(CompressError, match="blocks of this model differ"):
        check_times(setup_of(uneven()))
    setup = setup_of(tiny("llama"))
    check_times(setup)
    for changed in ({"export": None}, {"bench": None}):
        setup.recipe = SimpleNamespace(**{**vars(setup.recipe), **changed})
        with pytest.raises(CompressError, match="one of them is null"):
            check_times(setup)


def test_a_run_s_table_is_kept_for_plans_of_the_same_shapes_lengths_and_machine(
    faked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked()
    job = job_of(tmp_path, "tpot<=0.75x", "ttft<=0.9x")
    assert job.clock is not None and tables.priced(job.clock) is None
    with Run.open(tmp_path / "run") as run:
        limits = timed.priced(run, job).limits
    fewer = replace(job.clock, budgets=parse(["tpot<=0.5x"], BENCH))
    found = tables.priced(fewer)
    assert found is not None
    (limit,), told = found
    assert limit.dense == limits[0].dense == round(1e12 * machine([(10, 2, 48)] * 4, None)["tpot@16"])
    assert [limit.prices.attention(0, *h) for h in ((2, 5), (1, 3))] == [
        limits[0].prices.attention(0, *h) for h in ((2, 5), (1, 3))
    ]
    assert told["tpot<=0.5x"]["table_error"]["models"] == latency.CHECKS
    # Another length, another vocabulary, another machine: nothing is known.
    assert tables.priced(replace(job.clock, budgets=parse(["tpot@17<=0.5x"], BENCH))) is None
    setup = SimpleNamespace(**{**vars(job.clock.setup), "geometry": replace(job.clock.setup.geometry, vocab=301)})
    assert tables.priced(replace(job.clock, setup=setup)) is None
    monkeypatch.setattr("compress.system.host.processor", lambda: "another")
    assert tables.priced(fewer) is None
    monkeypatch.undo()
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    (file,) = (tmp_path / "cache" / "latency-tables").iterdir()
    file.write_text(file.read_text().replace('"measured": "2', '"measured": "3'))
    with pytest.raises(CompressError, match="changed since it was written") as error:
        tables.priced(fewer)
    assert error.value.where == str(file) and "delete it" in error.value.fix


def test_a_cache_that_cannot_be_written_is_said_and_costs_the_run_nothing(
    faked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faked()
    monkeypatch.setenv("COMPRESS_CACHE", "/proc/none")
    with Run.open(tmp_path / "run") as run:
        assert timed.priced(run, job_of(tmp_path, "tpot<=0.75x")).limits
        assert tables.known(job_of(tmp_path / "other", "tpot<=0.75x").clock) is None  # type: ignore[arg-type]
    assert "the latency table is not kept" in capsys.readouterr().err
