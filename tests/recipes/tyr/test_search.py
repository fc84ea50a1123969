"""The search: KL against a sliced model computed from scratch, exact totals, and a journal that can be cut anywhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.errors import CompressError
from compress.language.budget import Option, nearest_feasible
from compress.language.plan import BlockPlan, Plan
from compress.models.blocks import BlockRunner
from compress.recipes.tyr import SearchOptions
from compress.recipes.tyr.choice import Job
from compress.recipes.tyr.search import (
    Evaluator,
    Genome,
    evolve,
    measure_singles,
    menus,
    most_starts,
    offspring,
    starts,
    swaps_and_knapsacks,
)
from compress.recipes.tyr.supernet import Menu, Supernet
from compress.run.folder import Journal
from tests.recipes.tyr.small import small_job, written_supernet

LAYERS, WINDOWS, LENGTH = 3, 4, 20
GENOMES: list[Genome] = [
    (0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 2, 1),
    (0, 0, 1, 2, 0, 3),
    (1, 0, 0, 3, 3, 0),
    (0, 2, 0, 2, 1, 1),
    (0, 2, 0, 1, 1, 1),
    (2, 3, 3, 3, 3, 3),
]


class Counting(BlockRunner):
    """Notes tokens x blocks that are really run."""

    ran = 0

    def run(self, index: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        self.ran += hidden.shape[0] * hidden.shape[1]
        return super().run(index, hidden, block)


class World:
    def __init__(self, folder: Path, model_type: str) -> None:
        self.job: Job = small_job(model_type, num_hidden_layers=LAYERS, windows=(6, WINDOWS, LENGTH))
        menu = Menu((48, 32, 16, 0), ((2, 5), (2, 2), (1, 4), (1, 1)))
        self.supernet: Supernet = written_supernet(folder, self.job, menu)

    def evaluator(self, path: Path, top_k: int = 299, tag: str = "a", positions: int = 7, **more: Any) -> Evaluator:
        runner = Counting(self.job.model, self.job.family, LENGTH)
        log = Journal(path)
        return Evaluator(
            runner, self.supernet, self.job.search, positions=positions, top_k=top_k, seed=3, log=log, tag=tag, **more
        )

    def plan(self, genome: Genome) -> Plan:
        blocks, weights = [], {}
        for i in range(LAYERS):
            a, f = self.supernet.level(i, "attention", genome[2 * i]), self.supernet.level(i, "ffn", genome[2 * i + 1])
            blocks.append(BlockPlan(a.units, f.units))
            weights |= {f"blocks.{i}.{k}": w for k, w in (("o", a.weight), ("down", f.weight)) if w is not None}
        return Plan(tuple(blocks), weights)

    def scratch_kl(self, genome: Genome, positions: Tensor, rows: list[int], top_k: int = 300) -> float:
        """KL(dense || pruned) in float64, from whole models; all but the ``top_k`` likeliest are one outcome."""
        sliced = copy.deepcopy(self.job.model)
        self.plan(genome).apply(sliced, self.job.family)
        total = []
        for row in rows:
            ids = self.job.search[row : row + 1]
            p, q = (
                model(ids, use_cache=False).logits[0, positions[row]].double().softmax(-1)
                for model in (self.job.model, sliced)
            )
            order = p.argsort(-1, descending=True)
            p, q = (
                torch.cat([x[:, :top_k], x[:, top_k:].sum(-1, keepdim=True)], -1)
                for x in (p.gather(-1, order), q.gather(-1, order))
            )
            total.append(float(torch.xlogy(p, p / q).nan_to_num(0.0).sum(-1).mean()))
        return sum(total) / len(total)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("gemma2"), "gemma2")


def test_no_position_whose_next_token_begins_every_text_is_compared(llama: World, tmp_path: Path) -> None:
    every = llama.evaluator(tmp_path / "a.jsonl", positions=LENGTH - 1).teacher.positions
    assert every.tolist() == [list(range(LENGTH - 1))] * WINDOWS
    # Behind three tokens that begin every text: what follows the third is text, what follows the others is not.
    some = llama.evaluator(tmp_path / "b.jsonl", positions=LENGTH - 3, skip=2).teacher.positions
    assert some.tolist() == [list(range(2, LENGTH - 1))] * WINDOWS


# --- the KL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_kl_is_that_of_a_sliced_model_whatever_the_parent(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    world: World = request.getfixturevalue(kind)
    scratch: dict[Any, float] = {}
    for n, parent in enumerate(GENOMES[:1] + GENOMES[4:]):
        evaluator = world.evaluator(tmp_path / f"{n}.jsonl")
        evaluator.set_parent(GENOMES[3])  # the parent is moved twice: states of the first must not stay
        evaluator.set_parent(parent)
        for genome in GENOMES:
            for rows in (None, [1, 3]):
                key = genome, str(rows)
                if key not in scratch:
                    positions = evaluator.teacher.positions
                    scratch[key] = world.scratch_kl(genome, positions, rows or list(range(WINDOWS)))
                assert evaluator.kl(genome, rows) == pytest.approx(scratch[key], rel=2e-3, abs=2e-6)
    assert max(scratch.values()) > 0.05
    assert scratch[GENOMES[0], "None"] == 0


def test_positions_are_distinct_and_the_last_token_predicts_nothing(llama: World, tmp_path: Path) -> None:
    positions = llama.evaluator(tmp_path / "a").teacher.positions
    assert positions.shape == (WINDOWS, 7) and len({tuple(row) for row in positions.tolist()}) > 1
    assert all(row == sorted(set(row)) for row in positions.tolist())
    most = llama.evaluator(tmp_path / "b", positions=LENGTH - 1).teacher.positions
    assert most.tolist() == [list(range(LENGTH - 1))] * WINDOWS


@pytest.mark.parametrize("top_k", [1, 4, 30])
def test_outcomes_beyond_the_likeliest_count_as_one(llama: World, top_k: int, tmp_path: Path) -> None:
    evaluator = llama.evaluator(tmp_path / "a", top_k)
    for genome in GENOMES[1:]:
        expected = llama.scratch_kl(genome, evaluator.teacher.positions, list(range(WINDOWS)), top_k)
        assert evaluator.kl(genome) == pytest.approx(expected, rel=2e-3)


def test_fewer_outcomes_give_a_lower_bound_that_is_never_negative(llama: World, tmp_path: Path) -> None:
    kls = []
    for top_k in (1, 4, 30, 299):
        evaluator = llama.evaluator(tmp_path / str(top_k), top_k)
        assert evaluator.teacher.index.shape[-1] == top_k
        kls.append([evaluator.kl(genome) for genome in GENOMES])
    for fewer, more in pairwise(kls):
        assert all(0 < a <= b for a, b in zip(fewer[1:], more[1:], strict=True))
    assert all(kl == pytest.approx(0, abs=1e-7) for kl, *_ in kls)  # the dense model itself
    assert all(a < 0.9 * b for a, b in zip(kls[0][1:], kls[-1][1:], strict=True))


def test_more_outcomes_than_the_vocabulary_are_the_whole_vocabulary(llama: World, tmp_path: Path) -> None:
    many, all_ = llama.evaluator(tmp_path / "a", 5000), llama.evaluator(tmp_path / "b", 299)
    assert many.kl(GENOMES[3]) == all_.kl(GENOMES[3])


# --- work and journal -----------------------------------------------------------------------------------------


def test_work_is_tokens_times_blocks_really_run(llama: World, tmp_path: Path) -> None:
    evaluator = llama.evaluator(tmp_path / "a")
    runner: Any = evaluator.runner
    whole = WINDOWS * LENGTH * LAYERS
    assert evaluator.work == runner.ran == whole  # the dense model, once
    evaluator.kl((0, 0, 0, 0, 0, 1))
    assert evaluator.work == runner.ran == whole + WINDOWS * LENGTH
    evaluator.kl((0, 0, 1, 0, 0, 1), [2])
    assert evaluator.work == runner.ran == whole + WINDOWS * LENGTH + 2 * LENGTH
    evaluator.set_parent((0, 0, 1, 0, 0, 0))
    assert evaluator.work == runner.ran == whole + 3 * WINDOWS * LENGTH + 2 * LENGTH
    evaluator.set_parent((0, 0, 1, 0, 0, 0))
    evaluator.kl((0, 0, 1, 0, 0, 0), [0, 1])
    assert evaluator.work == runner.ran == whole + 3 * WINDOWS * LENGTH + 2 * LENGTH
    evaluator.kl((1, 0, 1, 0, 0, 0), [0])
    assert evaluator.work == runner.ran == whole + 3 * WINDOWS * LENGTH + (2 + LAYERS) * LENGTH


def test_work_never_falls_when_an_evaluation_is_looked_up(llama: World, tmp_path: Path) -> None:
    evaluator = llama.evaluator(tmp_path / "a")
    for genome in (GENOMES[1], GENOMES[3], GENOMES[6], GENOMES[1]):
        evaluator.kl(genome)
    assert evaluator.work == evaluator.runner.ran  # type: ignore[attr-defined]


def test_an_evaluation_is_looked_up_only_for_the_same_genome_windows_and_tag(llama: World, tmp_path: Path) -> None:
    first = llama.evaluator(tmp_path / "a")
    value = first.kl(GENOMES[3])
    assert first.kl(GENOMES[3]) == value and len(first.log.rows()) == 1
    again = llama.evaluator(tmp_path / "a")
    before = again.runner.ran  # type: ignore[attr-defined]
    assert again.kl(GENOMES[3], range(WINDOWS)) == value
    assert again.runner.ran == before and len(again.log.rows()) == 1  # type: ignore[attr-defined]
    again.kl(GENOMES[3], [0])
    again.kl(GENOMES[4])
    assert len(again.log.rows()) == 3
    other = llama.evaluator(tmp_path / "a", tag="b")
    assert other.kl(GENOMES[3]) == value and len(other.log.rows()) == 4


# --- single candidates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [GENOMES[0], GENOMES[4]])
def test_singles_are_the_rise_over_the_base_made_monotone(llama: World, base: Genome, tmp_path: Path) -> None:
    told: list[int] = []
    found = measure_singles(llama.evaluator(tmp_path / "a"), base, told.append)
    judge = llama.evaluator(tmp_path / "b")
    zero = judge.kl(base)
    plain = menus(llama.supernet)
    for sublayer, menu in enumerate(found):
        assert [o.saving for o in menu] == [o.saving for o in plain[sublayer]]
        rises = [judge.kl((*base[:sublayer], e, *base[sublayer + 1 :])) - zero for e in range(len(menu))]
        assert rises[base[sublayer]] == 0
        expected = np.maximum.accumulate(rises).tolist()
        assert [o.loss for o in menu] == pytest.approx(expected, abs=1e-9)
        assert [o.loss for o in menu] == sorted(o.loss for o in menu)
        if base == GENOMES[0]:
            assert menu[0] == Option(0, 0.0) and menu[-1].loss > 0
    assert told == sorted(told) and told[-1] == sum(len(menu) - 1 for menu in found)


# --- totals ---------------------------------------------------------------------------------------------------

a_menu = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 5)), min_size=2, max_size=4)
some_menus = st.lists(a_menu, min_size=2, max_size=8).filter(lambda m: len(m) % 2 == 0)


def as_options(raw: list[list[tuple[int, float]]]) -> list[list[Option]]:
    """Menus as the search has them: the dense level first, savings rising, losses never falling."""
    return [
        [Option(0, 0.0)]
        + [Option(24 * s, loss) for s, loss in zip(sorted(s for s, _ in m), sorted(loss for _, loss in m), strict=True)]
        for m in raw
    ]


def saved(options: list[list[Option]], genome: Genome) -> int:
    return sum(menu[g].saving for menu, g in zip(options, genome, strict=True))


@settings(max_examples=40, deadline=None)
@given(some_menus, st.floats(0, 1), st.integers(0, 1000))
def test_every_start_and_every_offspring_removes_exactly_the_total(
    raw: list[list[tuple[int, float]]], share: float, seed: int
) -> None:
    options = as_options(raw)
    total = nearest_feasible(options, int(share * sum(m[-1].saving for m in options)))
    first = starts(options, total, None)
    assert {"knapsack", "uniform", "edges left alone", "penalty 1"} <= set(first)
    parent = first["uniform"]
    later = starts(options, total, parent)
    assert later["incumbent"] == parent
    assert (len(first), len(later)) == (most_starts(first=True), most_starts(first=False))
    for genome in (*first.values(), *later.values()):
        assert saved(options, genome) == total
    seen = {parent}
    children = offspring(options, parent, total, 6, np.random.default_rng(seed), seen)
    assert len(set(children)) == len(children) <= 6 and parent not in children
    assert all(saved(options, child) == total for child in children)
    assert seen == {parent, *children}


def test_a_base_that_removes_another_total_is_no_start() -> None:
    options = as_options([[(1, 0.1), (2, 0.5)], [(1, 0.2), (2, 0.3)]])
    assert "incumbent" not in starts(options, 48, (0, 1))


def test_the_knapsack_start_is_the_best_of_all_choices_and_an_impossible_total_is_refused() -> None:
    draw = np.random.default_rng(0)
    options = as_options([[(s, float(draw.random())) for s in (1, 2, 4)] for _ in range(4)])
    found = starts(options, 24 * 7, None)["knapsack"]
    every = [g for g in product(range(4), repeat=4) if saved(options, g) == 24 * 7]
    loss = {g: sum(m[e].loss for m, e in zip(options, g, strict=True)) for g in every}
    assert loss[found] == pytest.approx(min(loss.values()))
    with pytest.raises(CompressError, match="no choice of levels"):
        starts(options, 25, None)


def test_starts_that_know_nothing_cut_every_ffn_alike_and_leave_attention_and_edges() -> None:
    options = as_options([[(1, 9.0), (2, 9.0), (3, 9.0)], [(4, 0.5), (8, 0.6), (12, 5.0)]] * 8)
    found = starts(options, 24 * 8 * 4, None)
    assert found["uniform"] == (0, 1) * 8
    found = starts(options, 24 * 5 * 8, None)
    # 8 blocks: the first two and the last one are edges.
    assert found["edges left alone"] == (0, 0) * 2 + (0, 2) * 5 + (0, 0)


def test_offspring_are_swaps_within_a_kind_and_other_knapsack_solutions() -> None:
    options = as_options([[(1, 0.1), (2, 0.3), (3, 0.7)], [(4, 0.2), (8, 0.5), (12, 1.0)]] * 4)
    parent = (1, 1) * 4
    children = offspring(options, parent, saved(options, parent), 30, np.random.default_rng(0), {parent})
    assert len(children) == 30
    one_step = [c for c in children if max(abs(a - b) for a, b in zip(c, parent, strict=True)) == 1]
    # A swap of one level up and one down in the same kind, and nothing else.
    single = [c for c in one_step if sum(a != b for a, b in zip(c, parent, strict=True)) == 2]
    assert single and all(sum(c[k::2]) == 4 for c in single for k in (0, 1))


# --- evolution ------------------------------------------------------------------------------------------------

SETTINGS = SearchOptions(generations=4, offspring=6, steps=[0.5, 0.75, 1.0], survivors=[4, 2], patience=4)


def limited(generations: int, **changes: Any) -> SearchOptions:
    return SETTINGS.model_copy(update={"generations": generations, **changes})


@pytest.fixture(scope="module")
def priced(llama: World, tmp_path_factory: pytest.TempPathFactory) -> list[list[Option]]:
    return measure_singles(llama.evaluator(tmp_path_factory.mktemp("priced") / "a"), (0,) * 6)


def start_of(priced: list[list[Option]]) -> Genome:
    total = nearest_feasible(priced, sum(m[-1].saving for m in priced) // 3)
    return starts(priced, total, None)["uniform"]


def test_evolution_never_ends_above_its_start_and_keeps_the_total(
    llama: World, priced: list[list[Option]], tmp_path: Path
) -> None:
    start, better = start_of(priced), 0
    for seed in range(3):
        told: list[tuple[int, float]] = []
        path = tmp_path / f"{seed}"
        found = evolve(
            llama.evaluator(path),
            swaps_and_knapsacks(priced, start),
            start,
            SETTINGS,
            seed=seed,
            progress=lambda g, kl, t=told: t.append((g, kl)),
        )
        assert saved(priced, found.genome) == saved(priced, start)
        judge = llama.evaluator(tmp_path / f"judge {seed}")
        assert found.kl_start == pytest.approx(judge.kl(start), abs=1e-6)
        assert found.kl == pytest.approx(judge.kl(found.genome), abs=1e-6)
        assert [kl for _, kl in told] == sorted((kl for _, kl in told), reverse=True)
        assert found.kl <= found.kl_start and told[-1] == (found.generations, found.kl)
        # The result is the best of all that was measured on every window.
        rows = [r for r in Journal(path).rows() if len(r["rows"]) == WINDOWS]
        assert found.kl == min(r["kl"] for r in rows)
        better += found.kl < found.kl_start
    assert better


def test_each_selection_step_passes_on_the_best_on_its_windows(
    llama: World, priced: list[list[Option]], tmp_path: Path
) -> None:
    evolve(
        llama.evaluator(tmp_path / "a"),
        swaps_and_knapsacks(priced, start_of(priced)),
        start_of(priced),
        limited(1),
        seed=5,
    )
    rows = Journal(tmp_path / "a").rows()
    assert rows[0]["phase"] == "parent" and len(rows) == 1 + 6 + 4 + 2
    steps = rows[1:7], rows[7:11], rows[11:13]
    assert [{len(r["rows"]) for r in step} for step in steps] == [{2}, {3}, {WINDOWS}]
    assert len({tuple(r["rows"]) for r in steps[0]}) == len({tuple(r["rows"]) for r in steps[1]}) == 1
    for step, following in pairwise(steps):
        best = sorted(step, key=lambda r: r["kl"])[: len(following)]
        assert sorted(r["genome"] for r in best) == sorted(r["genome"] for r in following)


def untimed(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal without the time they took."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Journal(path).rows()]


def test_evolution_cut_at_any_row_goes_on_to_the_same_end_and_repeats_nothing(
    llama: World, priced: list[list[Option]], tmp_path: Path
) -> None:
    start = start_of(priced)
    whole = evolve(llama.evaluator(tmp_path / "whole"), swaps_and_knapsacks(priced, start), start, limited(2), seed=1)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    keys = {(tuple(r["genome"]), tuple(r["rows"])) for r in Journal(tmp_path / "whole").rows()}
    assert len(keys) == len(lines) > 20
    assert whole.genome != start
    for cut in range(len(lines) + 1):
        path = tmp_path / "cut"
        # The kill came in the middle of a line.
        path.write_bytes(b"".join(lines[:cut]) + (lines[cut][:20] if cut < len(lines) else b""))
        again = evolve(llama.evaluator(path), swaps_and_knapsacks(priced, start), start, limited(2), seed=1)
        assert again == whole
        assert untimed(path) == untimed(tmp_path / "whole")


def test_evolution_stops_when_generations_bring_nothing_better(
    llama: World, priced: list[list[Option]], tmp_path: Path
) -> None:
    total = saved(priced, start_of(priced))
    small = [menu if i >= 2 else [menu[0]] for i, menu in enumerate(priced)]  # block 0 stays: few enough to try all
    judge = llama.evaluator(tmp_path / "all")
    every = [g for g in product(*(range(len(m)) for m in small)) if saved(small, g) == total]
    assert len(every) > 10
    best = min(every, key=judge.kl)
    found = evolve(
        llama.evaluator(tmp_path / "a"), swaps_and_knapsacks(small, best), best, limited(9, patience=2), seed=0
    )
    assert (found.genome, found.generations, found.stopped) == (best, 2, "patience")
    worst = max(every, key=judge.kl)
    found = evolve(
        llama.evaluator(tmp_path / "b"), swaps_and_knapsacks(small, worst), worst, limited(40, patience=3), seed=0
    )
    log = [r for r in Journal(tmp_path / "b").rows() if len(r["rows"]) == WINDOWS]
    last = max(r.get("generation", 0) for r in log if r["kl"] == found.kl)
    assert found.stopped == "patience" and found.kl < found.kl_start and found.generations == last + 3


def test_evolution_stops_on_the_time_limit_and_after_the_last_generation(
    llama: World, priced: list[list[Option]], tmp_path: Path
) -> None:
    start = start_of(priced)
    found = evolve(
        llama.evaluator(tmp_path / "a"), swaps_and_knapsacks(priced, start), start, limited(4, seconds=1e-9), seed=0
    )
    assert (found.generations, found.stopped) == (1, "time limit")
    found = evolve(llama.evaluator(tmp_path / "b"), swaps_and_knapsacks(priced, start), start, limited(2), seed=0)
    assert (found.generations, found.stopped) == (2, "generations")
    found = evolve(llama.evaluator(tmp_path / "c"), swaps_and_knapsacks(priced, start), start, limited(0), seed=0)
    assert (found.genome, found.generations, found.stopped) == (start, 0, "generations")
    assert found.kl == found.kl_start


def test_making_offspring_leaves_the_options_as_they_were() -> None:
    options = as_options([[(1, 0.1), (2, 0.5)], [(1, 0.2), (2, 0.3)]])
    before = [[replace(o) for o in menu] for menu in options]
    offspring(options, (1, 1), 48, 4, np.random.default_rng(0), {(1, 1)})
    assert options == before
