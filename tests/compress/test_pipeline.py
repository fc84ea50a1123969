"""A whole run on a tiny model: every stage, again without work, and every figure where it belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress.language.evaluate import perplexity
from compress.language.plan import Plan
from compress.pipeline import METHODS
from compress.report.build import read_report
from compress.run.cache import sha256_of
from compress.run.folder import SEAL
from compress.schema.recipe import load_recipe
from tests.command import Job, compress


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    return read_report(finished)


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Path -> (time of last change, hash) of every file."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "recipe.lock.yaml")]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, sha256_of(p)) for p in files}


def test_a_whole_run_seals_every_stage_and_leaves_nothing_half_made(finished: Path) -> None:
    sealed = {str(p.parent.relative_to(finished)).split("/")[0] for p in finished.rglob(SEAL)}
    assert sealed == {
        *("text", "metrics", "final", "plan"),
        *("supernet-1", "singles-1", "search-1", "supernet-2", "singles-2", "search-2"),
        *("model", "model-padded", "evaluation-dense", "evaluation-pruned", "export-dense", "export-pruned"),
        *("curve", "bench", "release"),
    }
    assert not list(finished.rglob("*.partial")) and not list((finished / ".scratch").iterdir())


def test_the_same_command_again_does_nothing(job: Job, finished: Path, report: dict[str, Any]) -> None:
    before = contents(finished)
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", finished, "--json")
    assert ran.code == 0
    assert contents(finished) == before
    again = json.loads(ran.out)
    assert again.pop("run") == str(finished) and again == report


def test_a_changed_sparsity_is_refused_by_name_and_nothing_is_touched(job: Job, finished: Path) -> None:
    before = contents(finished)
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", finished, "--sparsity", "0.4")
    assert ran.code == 1 and "sparsity was 0.3, now 0.4" in ran.err and "--fresh" in ran.err
    assert contents(finished) == before


def test_what_is_removed_is_what_was_asked_and_what_the_files_hold(finished: Path, report: dict[str, Any]) -> None:
    from safetensors import safe_open

    size = report["size"]
    # The finest step of this recipe is four neurons: 4 x 3 x 40 parameters.
    backbone = size["dense"]["backbone_parameters"]
    assert abs(size["backbone_removed"] - 0.3) * backbone <= 4 * 3 * 40 / 2
    with safe_open(finished / "model" / "model.safetensors", "pt") as file:
        held = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert sum(held.values()) == size["pruned"]["total_parameters"]
    inside = sum(n for name, n in held.items() if ".layers." in name and "norm" not in name)
    assert inside == size["pruned"]["backbone_parameters"]


def test_layers_of_the_report_are_the_shapes_of_the_saved_model(finished: Path, report: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    weights = load_file(finished / "model" / "model.safetensors")
    for row in report["layers"]:
        q = weights.get(f"model.layers.{row['layer']}.self_attn.q_proj.weight", torch.zeros(0, 40))
        up = weights.get(f"model.layers.{row['layer']}.mlp.up_proj.weight", torch.zeros(0, 40))
        assert (len(q), len(up)) == (8 * row["heads"], row["neurons"])
        assert row["ffn_sparsity"] == pytest.approx(1 - row["neurons"] / 48)


def test_both_layouts_give_the_same_logits_in_plain_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    ids = torch.arange(3, 23)[None]
    padded = AutoModelForCausalLM.from_pretrained(finished / "model-padded")
    ragged = AutoModelForCausalLM.from_pretrained(finished / "model", trust_remote_code=True)
    assert type(padded) is LlamaForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(padded(ids).logits, ragged(ids).logits, atol=1e-5, rtol=1e-5)


def test_perplexities_of_the_report_are_those_of_the_saved_model(finished: Path, report: dict[str, Any]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished / "model", trust_remote_code=True).eval()
    windows = load_file(finished / "text" / "windows.safetensors")
    for i, text in enumerate(report["quality"]["texts"]):
        assert perplexity(model, windows[f"evaluation.{i}"])["ppl"] == pytest.approx(text["pruned_ppl"], rel=1e-5)


def test_searched_windows_are_not_calibrated_on(finished: Path) -> None:
    from safetensors.torch import load_file

    windows = load_file(finished / "text" / "windows.safetensors")
    rows = {tuple(r.tolist()) for r in windows["calibration"]}
    assert len(windows["calibration"]) == 8 and len(windows["search"]) == 3
    assert not rows & {tuple(r.tolist()) for r in windows["search"]}


def test_the_lock_file_holds_the_recipe_the_model_and_the_versions(job: Job, finished: Path) -> None:
    lock = yaml.safe_load((finished / "recipe.lock.yaml").read_text())
    assert lock["recipe"] == load_recipe(str(job.recipe), METHODS).resolved()
    assert len(lock["model"]["sha256"]) == 64 and lock["versions"]["torch"]


def test_every_iteration_lowers_or_keeps_the_kl_it_started_from(report: dict[str, Any]) -> None:
    for row in report["search"]["iterations"]:
        assert row["kl"] <= row["kl_start"] == min(row["starts"].values())


def test_the_work_of_the_search_only_rises(report: dict[str, Any]) -> None:
    work = [row["work"] for row in report["search"]["log"] if row["iteration"] == 1]
    assert work == sorted(work)


def test_the_plan_is_the_one_the_model_was_sliced_by(finished: Path, report: dict[str, Any]) -> None:
    plan = Plan.load(finished / "plan")
    kept = [(len(b.heads), len(b.neurons)) for b in plan.blocks]
    assert kept == [(row["heads"], row["neurons"]) for row in report["layers"]]
    size = report["size"]
    assert plan.meta["removed"] == size["dense"]["backbone_parameters"] - size["pruned"]["backbone_parameters"]


def test_until_stops_behind_the_stage_named(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--recipe", job.recipe, "--out", out, "--set", "tyr.iterations=1")
    ran = compress("prune", job.model, *words, "--until", "plan", "--json")
    assert ran.code == 0 and (out / "plan").exists() and not (out / "model").exists()
    assert json.loads(ran.out)["size"]["backbone_removed"] == pytest.approx(0.3, abs=0.005)


def test_fresh_forgets_the_earlier_run(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--recipe", job.recipe, "--out", out, "--set", "tyr.iterations=1", "--until", "plan")
    assert compress("prune", job.model, *words).code == 0
    assert compress("prune", job.model, *words, "--sparsity", "0.2").code == 1
    assert compress("prune", job.model, *words, "--sparsity", "0.2", "--fresh").code == 0
    assert Plan.load(out / "plan").meta["sparsity_asked"] == 0.2
