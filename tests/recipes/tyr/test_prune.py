"""From calibration windows to a plan: the budget is met, runs repeat byte for byte, and resumed runs end the same."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.language.budget import target_removed
from compress.language.plan import Plan
from compress.models.blocks import BlockRunner
from compress.recipes.tyr import walk
from compress.recipes.tyr.choice import Choice, Job, block_menus, removed, settle
from compress.recipes.tyr.last_pass import contenders_of, final_pass, joined
from compress.recipes.tyr.prune import full_shape_bytes, produce_plan
from compress.recipes.tyr.supernet import Streams, Supernet
from compress.run.folder import Journal, Run
from tests.models.families.test_families import linear_parameters
from tests.recipes.tyr.small import OPTIONS, pruned_block, small_job, whole_kl
from tests.tiny import tokens

FILES = ("plan.json", "plan.safetensors", "search.json")


def job_of(sparsity: float = 0.3, model_type: str = "llama", seed: int = 0, **changes: Any) -> Job:
    return small_job(model_type, {**OPTIONS, **changes}, sparsity, seed, num_hidden_layers=3, windows=(8, 3, 24))


def planned(folder: Path, job: Job) -> dict[str, bytes]:
    """The bytes of every file of the plan."""
    with Run.open(folder) as run:
        made = produce_plan(run, job)
    return {name: (made / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def job() -> Job:
    return job_of()


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder of one whole run, and how often it pruned a block and noted an evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        for where, name in ((walk, "prune_block"), (Journal, "append")):
            patch.setattr(where, name, counted(done, name, getattr(where, name)))
        planned(folder, job)
    return folder, done


@pytest.fixture(scope="module")
def first(whole: tuple[Path, dict[str, int]]) -> Path:
    """The folder of one whole run; tests must not change it."""
    return whole[0]


class Cut(BaseException):
    """Ends a run as a kill would: nothing catches it."""


def counted(done: dict[str, int], name: str, plain: Callable[..., Any], cut: int | None = None) -> Callable[..., Any]:
    """``plain``, its calls counted in ``done``; the call after ``cut`` of them raises `Cut`."""

    def call(*arguments: Any, **named: Any) -> Any:
        if done.get(name, 0) == cut:
            raise Cut
        done[name] = done.get(name, 0) + 1
        return plain(*arguments, **named)

    return call


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "plan" / name).read_bytes() for name in FILES}


# --- the plan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "sparsity", "changes"),
    [
        ("llama", 0.3, {}),
        ("llama", 0.55, {"query_heads": False, "metric": "none"}),
        ("llama", 0.2, {"attention": False, "iterations": 1, "score": "tyr"}),
        ("gemma2", 0.4, {"iterations": 1, "token_weight": "none"}),
    ],
)
def test_the_plan_removes_what_comes_nearest_to_the_target(
    model_type: str, sparsity: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    job = job_of(sparsity, model_type, **changes)
    dense = linear_parameters(job.model)
    planned(tmp_path / "run", job)
    plan = Plan.load(tmp_path / "run" / "plan")
    model = copy.deepcopy(job.model)
    plan.apply(model, job.family)
    gone = dense - linear_parameters(model)
    target = target_removed(sparsity, dense)
    assert gone == plan.removed(job.costs) == plan.meta["removed"]
    # With the attention that was chosen, no widths in steps of four come nearer.
    heads, costs = [(h, g) for h, g, _ in plan.counts(job.geometry)], job.costs.blocks[0]  # all are alike
    by_attention = sum(costs.attention_dense - costs.attention(g, h // g if g else 0) for h, g in heads)
    steps = range(3 * 48 // 4 + 1)
    assert abs(gone - target) == min(abs(by_attention + 4 * 120 * n - target) for n in steps)
    if changes.get("attention") is False:
        assert [h for h, _ in heads] == [10, 10, 10]
    if changes.get("query_heads") is False:
        assert all(h == 5 * g for h, g in heads)
    with torch.no_grad():
        assert torch.isfinite(model(job.search).logits).all()


def test_every_cut_projection_comes_with_a_refit_that_helps(first: Path, job: Job) -> None:
    plan = Plan.load(first / "plan")
    for i, (heads, _, neurons) in enumerate(plan.counts(job.geometry)):
        assert (f"blocks.{i}.o" in plan.weights) == (heads < 10)
        assert (f"blocks.{i}.down" in plan.weights) == (neurons < 48)
    assert plan.weights
    errors = {}
    for name, weights in (("refit", plan.weights), ("dense columns", {})):
        errors[name] = last_error(job, Plan(plan.blocks, weights))
    assert errors["refit"] < 0.9 * errors["dense columns"]


@pytest.mark.parametrize(("iteration", "accumulation"), [(1, "none"), (2, "expectation")])
def test_only_later_supernets_are_fitted_behind_pruned_blocks(
    iteration: int, accumulation: Any, first: Path, job: Job
) -> None:
    found = json.loads((first / "search-1" / "search.json").read_text())["choices"]
    menus = block_menus(job, iteration, None if iteration == 1 else [Choice(**c) for c in found])
    runner = BlockRunner(job.model, job.family, 24)
    files = sorted((first / f"supernet-{iteration}").glob("block-*/levels.safetensors"))
    supernet = Supernet(files, job.geometry)
    with torch.no_grad():
        streams = Streams.start(runner, job.calibration, accumulation)
    for i, menu in enumerate(menus):
        metrics = walk.Metrics(sorted((first / "metrics").iterdir()), Run(first)).of(i)
        made = pruned_block(
            runner, job, i, streams, menu, accumulation=accumulation, token_weight="norm", metrics=metrics
        )
        for kind, levels in zip(("attention", "ffn"), made, strict=True):
            assert len(levels) == len(supernet.facts[i][kind])
            for e, level in enumerate(levels):
                written = supernet.level(i, kind, e)  # type: ignore[arg-type]
                assert written.units == level.units
                if level.weight is not None:
                    assert written.weight is not None
                    torch.testing.assert_close(written.weight, level.weight.bfloat16().float())


def test_the_search_is_reported_with_the_plan(first: Path, job: Job) -> None:
    results = json.loads((first / "plan" / "search.json").read_text())
    assert [r["iteration"] for r in results] == [1, 2]
    for r in results:
        assert r["removed"] == removed(job, [Choice(**c) for c in r["choices"]])
        assert r["kl"] <= r["kl_start"] == min(r["starts"].values())
        assert r["removed"] == removed(job, [Choice(**c) for c in r["choices_starts"]["knapsack"]])
    files = sorted((first / "supernet-2").glob("block-*/levels.safetensors"))
    supernet = Supernet(files, job.geometry)
    assert len(files) == 3 and results[1]["supernet_bytes"] == sum(f.stat().st_size for f in files)
    full = 0
    for block in supernet.facts:
        full += 4 * 40 * 80 * sum(not level["dense"] for level in block["attention"])
        full += 4 * 40 * 48 * sum(not level["dense"] for level in block["ffn"])
    assert full_shape_bytes(supernet, job) == results[1]["full_shape_bytes"] == full


def test_what_every_search_has_found_goes_into_the_run_off(tmp_path: Path) -> None:
    spec = {"solutions": 2, "windows": 3}
    job = replace(job_of(0.4, iterations=3, run_off=spec), judging=tokens(3, 24, seed=97))
    planned(tmp_path / "run", job)
    plan = Plan.load(tmp_path / "run" / "plan")
    results = json.loads((tmp_path / "run" / "plan" / "search.json").read_text())
    curves = [
        json.loads((tmp_path / "run" / f"singles-{i}" / "singles.json").read_text())["options"] for i in (1, 2, 3)
    ]
    found = contenders_of(job, results, curves)
    for result, options in zip(results, curves, strict=True):
        assert settle(job, [Choice(**c) for c in result["choices"]], options) in found.values()
    assert next(iter(found)) == "search" and len(found) > 2  # the first's two, and one that a later search found
    judged = plan.meta["run_off"]
    assert list(judged) == list(found)
    best = found[min(judged, key=lambda label: (judged[label], label))]
    assert [c[1:] for c in plan.counts(job.geometry)] == [(c.groups, c.neurons) for c in best]


@pytest.mark.parametrize("calibration", [None, 5])
def test_the_run_off_takes_what_is_best_behind_a_last_pass(calibration: int | None, tmp_path: Path) -> None:
    judging = tokens(3, 24, seed=97)
    spec = {"solutions": 4, "windows": 3, "calibration": calibration}
    job = replace(job_of(0.4, iterations=1, rescale=False, run_off=spec), judging=judging)
    done: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "prune_block", counted(done, "pruned", walk.prune_block))
        found = planned(tmp_path / "run", job)
    plan = Plan.load(tmp_path / "run" / "plan")
    judged = plan.meta["run_off"]
    assert len(judged) >= 2 and "search" in judged
    # A pass for every solution; the winner's is the last one where it saw all windows.
    assert done["pruned"] == 3 * (1 + len(judged) + (calibration is not None))
    few = replace(job, calibration=job.calibration[:calibration])
    for k, label in enumerate(judged):
        blocks = sorted((tmp_path / "run" / f"run-off-{k}").glob("block-*"))
        again = joined(blocks)
        assert json.loads((tmp_path / "run" / f"run-off-{k}-judged" / "kl.json").read_text())["solution"] == label
        assert judged[label] == pytest.approx(whole_kl(few, again, judging), rel=1e-4)
        if judged[label] == min(judged.values()):
            assert plan.blocks == again.blocks or calibration is not None
            assert plan.removed(job.costs) == again.removed(job.costs)
            assert [c[1:] for c in plan.counts(job.geometry)] == [c[1:] for c in again.counts(job.geometry)]
    # Lost and made again: the same bytes.
    for name in ("plan", "run-off-0-judged"):
        shutil.rmtree(tmp_path / "run" / name)
    shutil.rmtree(tmp_path / "run" / "run-off-1" / "block-002")
    assert planned(tmp_path / "run", job) == found


def test_streams_that_are_dear_to_keep_are_kept_less_often_and_a_stop_ends_in_the_same_bytes(
    first: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeping takes an hour by the clock: the stream behind the first block is kept, and the walk goes on there."""
    saved: list[str] = []
    clock = {"hours": 0}
    plain, now = Streams.save, walk.time.monotonic

    def save(self: Streams, folder: Path) -> None:
        saved.append(folder.name)
        clock["hours"] += 1
        plain(self, folder)

    monkeypatch.setattr(Streams, "save", save)
    monkeypatch.setattr(walk.time, "monotonic", lambda: now() + 3600 * clock["hours"])
    folder = tmp_path / "run"
    done: dict[str, int] = {}
    shutil.copytree(first, folder)
    for name in ("final", "plan"):
        shutil.rmtree(folder / name)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(walk, "prune_block", counted(done, "pruned", walk.prune_block, cut=2))
        planned(folder, job)
    assert saved == ["before-001"], "behind the first block alone"
    assert [p.name for p in sorted((folder / "final").iterdir())] == ["block-000", "block-001"]
    with monkeypatch.context() as patch:
        patch.setattr(walk, "prune_block", counted(done, "again", walk.prune_block))
        assert planned(folder, job) == bytes_of(first)
    assert done["again"] == 2, "block 1 again, whose stream was not kept, and block 2"


def test_nothing_is_left_in_the_scratch_folder(first: Path) -> None:
    assert list((first / ".scratch").iterdir()) == []


def test_a_budget_out_of_reach_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="asks to remove"), Run.open(tmp_path / "run") as run:
        produce_plan(run, job_of(0.99))
    assert not (tmp_path / "run").exists()


# --- the same bytes -------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes(first: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # nothing may hang on the global generator
    assert planned(tmp_path / "second", job_of()) == bytes_of(first)


ORDER = ["metrics", "supernet-1", "singles-1", "search-1", "supernet-2", "singles-2", "search-2", "final", "plan"]


@pytest.mark.parametrize("lost", ["plan", "final", "singles-2", "search-1"])
def test_a_run_that_lost_its_last_stages_ends_in_the_same_bytes(
    lost: str, first: Path, job: Job, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(first, folder)
    assert set(ORDER) <= {p.name for p in folder.iterdir()}
    for name in ORDER[ORDER.index(lost) :]:
        shutil.rmtree(folder / name)
    assert planned(folder, job) == bytes_of(first)


@pytest.mark.parametrize("group", ["supernet-2", "final"])
def test_a_walk_goes_on_behind_its_last_sealed_block(group: str, first: Path, job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(first, folder)
    for name in ORDER[ORDER.index(group) + 1 :]:
        shutil.rmtree(folder / name)
    shutil.rmtree(folder / group / "block-002")
    shutil.rmtree(folder / group / "block-001")  # no streams were kept: the walk starts over, and seals only these
    kept = (folder / group / "block-000" / "seal.json").read_bytes()
    assert planned(folder, job) == bytes_of(first)
    assert (folder / group / "block-000" / "seal.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        (walk, "prune_block", 2),  # in the first supernet
        (walk, "prune_block", 7),  # in the last pass
        (Journal, "append", 9),  # between single candidates
        (Journal, "append", 34),  # in the first search
    ],
)
def test_a_run_that_was_cut_goes_on_where_it_stopped(
    where: Any, name: str, calls: int, whole: tuple[Path, dict[str, int]], job: Job, tmp_path: Path
) -> None:
    folder, wanted = whole
    done: dict[str, int] = {}
    plain = getattr(where, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, counted(done, name, plain, cut=calls))
        with pytest.raises(Cut):
            planned(tmp_path / "run", job)
        patch.setattr(where, name, counted(done, name, plain))
        assert planned(tmp_path / "run", job) == bytes_of(folder)
    # What was done before the cut was not done again.
    assert done[name] == wanted[name]


def test_other_inputs_are_refused_rather_than_mixed(first: Path, job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(first, folder)
    with pytest.raises(CompressError, match="other inputs"):
        planned(folder, job_of(damping=0.5))
    with pytest.raises(CompressError, match=r"search-1.*other inputs.*sparsity was 0\.3"):
        planned(folder, job_of(0.25))
    with pytest.raises(CompressError, match="other inputs"):
        planned(folder, replace(job, inputs={"model": "another"}))
    assert bytes_of(folder) == bytes_of(first)


# --- error accumulation ---------------------------------------------------------------------------------------


def last_error(job: Job, plan: Plan) -> float:
    """Relative squared error of the final hidden states (before the last norm) on the calibration windows."""
    model = copy.deepcopy(job.model)
    plan.apply(model, job.family)
    streams = []
    for m in (job.model, model):
        handle = m.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0].double()))
        with torch.no_grad():
            m(job.calibration)
        handle.remove()
    return float((streams[1] - streams[0]).pow(2).sum() / streams[0].pow(2).sum())


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_error_accumulation_lowers_the_error_of_the_final_hidden_states(model_type: str, tmp_path: Path) -> None:
    choices = [Choice(2, 3, 24), Choice(1, 5, 28), Choice(2, 2, 20)]
    for seed in range(4):
        errors = {}
        for accumulation in ("expectation", "uniform", "none"):
            job = job_of(0.4, model_type, seed, accumulation=accumulation, token_weight="none", metric="none")
            with Run.open(tmp_path / f"{seed} {accumulation}") as run:
                errors[accumulation] = last_error(job, Plan.load(final_pass(run, job, choices, [])))
        assert errors["expectation"] == errors["uniform"]  # one level a sublayer: the mean is that level
        assert errors["expectation"] < 0.97 * errors["none"], (seed, errors)


def test_the_last_pass_keeps_exactly_what_was_chosen(tmp_path: Path) -> None:
    job = job_of()
    choices = [Choice(1, 2, 0), Choice(0, 0, 20), Choice(2, 5, 48)]
    with Run.open(tmp_path / "run") as run:
        plan = Plan.load(final_pass(run, job, choices, []))
    assert plan.counts(job.geometry) == [(2, 1, 0), (0, 0, 20), (10, 2, 48)]
    assert plan.meta["removed"] == removed(job, choices) == plan.removed(job.costs)
