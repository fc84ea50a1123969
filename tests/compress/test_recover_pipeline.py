"""Recovery as a stage of a run: sealed, killed and gone on, measured, and told by report and card."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.language.evaluate import perplexity
from compress.language.plan import Plan
from compress.language.setup import prepare
from compress.pipeline import METHODS
from compress.report.build import read_report
from compress.schema.recipe import load_recipe
from tests import ranks
from tests.command import Job, compress, one_error

pytestmark = pytest.mark.usefixtures("done_once")

SECTION = "recover={method: full, steps: 40, batch: 4, windows: 12, hidden: 0.3, learning_rate: 0.003}"
SHORT = ("--set", "tyr.iterations=1", "--set", "export=null", "--set", "bench=null", "--set", "evaluation.curve=[]")


@pytest.fixture(scope="module")
def recovered(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole `compress prune` with recovery; tests must not change it."""
    out = tmp_path_factory.mktemp("recovered") / "run"
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out, *SHORT, "--set", SECTION)
    assert ran.code == 0, ran.err
    return out


@pytest.fixture(scope="module")
def report(recovered: Path) -> dict[str, Any]:
    return read_report(recovered)


def test_the_saved_model_holds_what_was_trained_at_the_pruned_shapes(job: Job, recovered: Path) -> None:
    before, after = Plan.load(recovered / "plan"), Plan.load(recovered / "recover")
    assert after.blocks == before.blocks and after.meta["removed"] == before.meta["removed"]
    saved = load_file(recovered / "model" / "model.safetensors")
    for name, weight in after.weights.items():
        block, inside = name.removeprefix("blocks.").split(".", 1) if name != "norm" else ("", "")
        inside = {"o": "self_attn.o_proj.weight", "down": "mlp.down_proj.weight"}.get(inside, inside)
        key = f"model.layers.{block}.{inside}" if block else "model.norm.weight"
        assert torch.equal(saved[key], weight), key
        # The norm in front of a sublayer that is gone is read by nothing and stays as it was.
        assert name not in before.weights or not torch.equal(weight, before.weights[name]), key
    for layout in read_report(recovered)["verify"]["layouts"]:
        assert layout["masked_difference"] < 1e-4


def test_the_report_tells_perplexity_before_and_after(job: Job, recovered: Path, report: dict[str, Any]) -> None:
    setup = prepare(str(job.model), load_recipe(str(job.recipe), METHODS))
    windows = load_file(recovered / "text" / "windows.safetensors")
    facts = report["recover"]
    for i, row in enumerate(facts["texts"]):
        for folder, key in (("plan", "before_ppl"), ("recover", "after_ppl")):
            model = setup.pruned(Plan.load(recovered / folder))[0]
            assert perplexity(model, windows[f"evaluation.{i}"])["ppl"] == pytest.approx(row[key], rel=1e-5)
        assert row["after_ppl"] == report["quality"]["texts"][i]["pruned_ppl"]
    assert facts["steps"] == 40 and facts["tokens"] == 40 * 4 * 32 and facts["windows"] == 12
    assert facts["last"]["kl"] < facts["first"]["kl"]
    log = json.loads((recovered / "recover" / "recover.json").read_text())["log"]
    assert [row["step"] for row in log] == list(range(1, 41)) and log[-1] == facts["last"]


def test_the_card_tells_of_the_training_and_how_to_do_without(recovered: Path, report: dict[str, Any]) -> None:
    text = (recovered / "release" / "README.md").read_text()
    mean = report["recover"]["geometric_mean"]
    assert "nothing was trained afterwards" not in text
    assert "then all weights of the blocks were trained for 40 steps (5,120 tokens)" in text
    assert f"geometric mean, {mean['before']:.2f} before and {mean['after']:.2f} after" in text
    assert f"--set recover=null --out {recovered}-unrecovered" in text


def test_trained_windows_are_not_held_out_ones(recovered: Path) -> None:
    trained = load_file(recovered / "text-recover" / "windows.safetensors")["recover"]
    held_out = {k: w for k, w in load_file(recovered / "text" / "windows.safetensors").items() if "evaluation" in k}
    assert len(trained) == 12 and len(held_out) == 2
    rows = {tuple(r.tolist()) for r in trained}
    assert not any(tuple(r.tolist()) in rows for w in held_out.values() for r in w)


def test_a_run_without_recovery_is_not_touched_by_it(job: Job, recovered: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(recovered, out)
    for name in ("recover", "text-recover", "model", "model-padded", "evaluation-pruned", "release"):
        shutil.rmtree(out / name)
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out, *SHORT)
    assert ran.code == 0, ran.err
    report = read_report(out)
    assert "recover" not in report and not (out / "recover").exists()
    assert "nothing was trained afterwards" in (out / "release" / "README.md").read_text()
    before = {r["name"]: r["before_ppl"] for r in read_report(recovered)["recover"]["texts"]}
    assert {t["name"]: t["pruned_ppl"] for t in report["quality"]["texts"]} == pytest.approx(before, rel=1e-5)


def test_a_changed_section_is_refused_by_name_but_how_it_is_done_may_change(job: Job, recovered: Path) -> None:
    words = ("prune", job.model, "--recipe", job.recipe, "--out", recovered, *SHORT, "--set", SECTION)
    ran = compress(*words, "--set", "recover.steps=41")
    assert ran.code == 1 and "recover.steps was 40, now 41" in ran.err
    before = (recovered / "recover" / "seal.json").stat().st_mtime_ns
    assert compress(*words, "--set", "recover.checkpoint_every=7", "--until", "recover").code == 0
    assert (recovered / "recover" / "seal.json").stat().st_mtime_ns == before


def test_faults_of_the_section_are_one_error_each(job: Job, tmp_path: Path) -> None:
    words = ("prune", job.model, "--recipe", job.recipe, "--out", tmp_path / "run", *SHORT)
    one_error(compress(*words, "--set", "recover={steps: 0}"), 2, "recover.steps", "greater than or equal to 1")
    one_error(compress(*words, "--set", "recover={steps: 1, rank: 0}"), 2, "recover.rank")
    one_error(compress(*words, "--set", "recover={steps: 1, targets: [x]}"), 2, "unknown linear layer 'x'")
    one_error(compress(*words, "--set", "recover={steps: 1, batch: 99}"), 2, "takes 99 windows, there are 8")
    assert not (tmp_path / "run").exists()
    ran = compress(*words, "--set", "recover={steps: 1, batch: 4, windows: 100000}")
    one_error(ran, 1, "windows of 32 tokens", "are asked for")


# --- killed ----------------------------------------------------------------------------------------------------------


def until_recovered(job: Job, out: Path) -> None:
    torch.set_num_threads(1)
    words = ("--set", SECTION, "--set", "recover.checkpoint_every=3", "--until", "recover")
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out, *SHORT, *words)
    assert ran.code == 0, ran.err


def started(job: Job, out: Path) -> multiprocessing.process.BaseProcess:
    process = ranks.server.Process(target=until_recovered, args=(job, out))
    process.start()
    return process


def checkpoint(out: Path) -> int:
    """Steps done at the latest checkpoint; -1 before the training."""
    folders = list((out / ".scratch").glob("recover/*/step-*")) if (out / ".scratch").exists() else []
    return max((int(p.name.removeprefix("step-")) for p in folders), default=-1)


@pytest.mark.parametrize("kills", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_at_any_step_it_ends_with_the_same_bytes(kills: int, job: Job, recovered: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        shutil.copytree(recovered, out, ignore=shutil.ignore_patterns("recover", "model*", "evaluation-*", "release"))
    process = started(job, whole)
    process.join()
    assert process.exitcode == 0
    draw = random.Random(4)
    places = []
    for wanted in sorted(draw.sample(range(0, 36), kills)):
        process = started(job, killed)
        while process.exitcode is None and checkpoint(killed) < wanted - 2:
            time.sleep(0.002)
        process.join(0.1 * draw.random())
        assert process.exitcode is None, "it ended before it could be killed"
        process.kill()
        process.join()
        places.append(checkpoint(killed))
    assert not (killed / "recover").exists() and len(set(places)) >= kills // 2 + 1, places
    process = started(job, killed)
    process.join()
    assert process.exitcode == 0
    for name in ("plan.safetensors", "plan.json", "recover.json"):
        assert (killed / "recover" / name).read_bytes() == (whole / "recover" / name).read_bytes(), (name, places)
        # The checkpoints' distance is of no account either: the run before this one noted none on its way.
        assert (whole / "recover" / name).read_bytes() == (recovered / "recover" / name).read_bytes(), name
    assert not list((killed / ".scratch").iterdir())
