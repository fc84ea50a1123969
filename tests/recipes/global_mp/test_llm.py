"""Global MP on tiny language models, through the command line: exact counts, plain reload, resume, honest report."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compress.models.reading import weight_files
from compress.recipes.global_mp.card import body
from compress.recipes.global_mp.floors import target_count
from compress.recipes.global_mp.magnitude import global_masks
from compress.recipes.global_mp.masks import load_masks, masked
from compress.recipes.global_mp.packed import unpack_folder
from compress.recipes.global_mp.pattern import check_two_four
from compress.recipes.global_mp.prune import write_masked
from compress.report.build import read_report
from tests.command import compress, one_error
from tests.tiny import prose, saved_tiny, tokens

pytestmark = [pytest.mark.usefixtures("done_once"), pytest.mark.processes]

RECIPE = """\
method: global-mp
sparsity: 0.6
evaluation:
  texts:
    - {name: first text, source: {files: [FOLDER/first.txt]}}
    - {name: "second | text", source: {files: [FOLDER/second.txt]}}
  windows: 2
  length: 32
  curve: [0.8, 0.2]
export:
  greedy_tokens: 8
bench: {prompt: 24, context: 24, processes: 2, threads: 1, min_seconds: 0.01, min_runs: 2}
global-mp:
  floor: 0.005
"""


@dataclass(frozen=True)
class Job:
    model: Path
    recipe: Path
    folder: Path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    for seed, name in enumerate(("first", "second")):
        (folder / f"{name}.txt").write_text(prose(160, seed))
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    return Job(saved_tiny(folder / "model"), recipe, folder)


@pytest.fixture(scope="module")
def finished(job: Job) -> Path:
    out = job.folder / "run"
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out)
    assert ran.code == 0, ran.err
    assert "pruned   " in ran.out and "ppl      first text" in ran.out and "packed" in ran.out
    return out


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    found = read_report(finished)
    del found["rows"]  # what a test changes in the sections shows
    return found


def layers_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The linear layers of a tiny Llama's blocks, told from the rest by their names."""
    return {name: w for name, w in state.items() if "_proj.weight" in name}


def test_the_saved_model_is_the_dense_one_with_the_smallest_weights_zero(job: Job, finished: Path) -> None:
    dense, saved = (load_file(folder / "model.safetensors") for folder in (job.model, finished / "model"))
    layers = layers_of(dense)
    total = sum(w.numel() for w in layers.values())
    floors = {name: min(-(-total // 200), w.numel()) for name, w in layers.items()}
    masks = global_masks(layers, target_count(0.6, total), floors)
    assert saved.keys() == dense.keys()
    for name, weight in dense.items():
        want = masked(weight, masks[name]) if name in masks else weight
        assert torch.equal(saved[name].view(torch.int32), want.view(torch.int32)), name


def test_the_report_counts_what_the_files_hold(job: Job, finished: Path, report: dict[str, Any]) -> None:
    dense, saved = (load_file(folder / "model.safetensors") for folder in (job.model, finished / "model"))
    layers, size = layers_of(saved), report["size"]
    assert size["prunable_weights"] == sum(w.numel() for w in layers.values())
    assert size["nonzero_weights"] == sum(int((w != 0).sum()) for w in layers.values())
    assert size["dense_nonzero_parameters"] == sum(int((w != 0).sum()) for w in dense.values())
    assert size["nonzero_parameters"] == sum(int((w != 0).sum()) for w in saved.values())
    assert size["pruned_weights"] == size["prunable_weights"] - size["nonzero_weights"]
    assert size["pruned_weights"] == target_count(0.6, size["prunable_weights"])
    assert size["total_parameters"] == sum(w.numel() for w in dense.values())
    # Tied: the embeddings are the output layer's matrix, used by every token.
    head = dense["model.embed_tokens.weight"].numel()
    assert size["flops_per_token"] == {
        "dense": 2 * (size["prunable_weights"] + head),
        "sparse": 2 * (size["nonzero_weights"] + head),
    }
    gone = {row["name"]: row["pruned"] for row in report["layers"]}
    assert gone == {name: int((w == 0).sum()) for name, w in layers.items()}
    on_disk = (finished / "packed" / "model.packed.safetensors").stat().st_size
    assert size["bytes"]["packed"] == on_disk < size["bytes"]["dense"] == size["bytes"]["saved"]


def test_plain_transformers_load_it(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert type(model) is LlamaForCausalLM
    kept = load_file(finished / "model" / "fingerprint.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(kept["tokens"]).logits, kept["logits"], atol=1e-5, rtol=1e-5)


def test_masks_and_packed_form_belong_to_the_model(finished: Path, tmp_path: Path) -> None:
    lock = yaml.safe_load((finished / "recipe.lock.yaml").read_text())
    saved = load_file(finished / "model" / "model.safetensors")
    shapes = {name: list(w.shape) for name, w in layers_of(saved).items()}
    masks = load_masks(finished / "model" / "masks.safetensors", lock["model"]["sha256"], shapes)
    assert all(torch.equal(saved[name] != 0, mask) for name, mask in masks.items())
    unpack_folder(finished / "packed", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == saved.keys() and all(torch.equal(back[name], saved[name]) for name in saved)
    assert (tmp_path / "back" / "config.json").read_text() == (finished / "model" / "config.json").read_text()


def test_perplexities_are_those_of_the_two_models(job: Job, finished: Path, report: dict[str, Any]) -> None:
    for folder, key in ((job.model, "dense_ppl"), (finished / "model", "pruned_ppl")):
        ran = compress("eval", folder, "--like", finished, "--json")
        assert ran.code == 0, ran.err
        found = json.loads(ran.out)["texts"]
        for text in report["quality"]["texts"]:
            assert found[text["name"]]["ppl"] == pytest.approx(text[key], rel=1e-5)


def test_the_curve_is_what_a_run_of_that_sparsity_gives(job: Job, report: dict[str, Any]) -> None:
    points = report["quality"]["curve"]
    assert [point["pruned_share"] for point in points] == pytest.approx([0.2, 0.8], abs=1e-4)
    out = job.folder / "at-80"
    words = ("--set", "sparsity=0.8", "--set", "evaluation.curve=[]", "--until", "evaluation", "--json")
    ran = compress("prune", job.model, "-r", job.recipe, "--out", out, *words)
    assert ran.code == 0, ran.err
    for text in json.loads(ran.out)["quality"]["texts"]:
        assert points[1]["texts"][text["name"]] == pytest.approx(text["pruned_ppl"], rel=1e-6)


def test_the_card_says_what_zeros_do_not_bring(finished: Path, report: dict[str, Any]) -> None:
    from huggingface_hub import ModelCard

    text = (finished / "release" / "README.md").read_text()
    assert ModelCard(text).data.to_dict()["tags"][:2] == ["pruned", "unstructured-pruning"]
    assert "Zeros in place save neither memory nor time" in text and "| TTFT, 24 tokens |" in text
    size = report["size"]
    assert f"| {size['dense_nonzero_weights']:,} | {size['nonzero_weights']:,} | -60.0 % |" in text
    assert (finished / "release" / "plots" / "sparsity-per-layer.png").stat().st_size > 0
    for name in ("model.safetensors", "masks.safetensors", "report.json", "onnx/prefill.onnx"):
        assert (finished / "release" / name).exists(), name


@pytest.mark.parametrize(
    ("low", "high", "runtime", "part"),
    [
        (0.95, 1.05, "onnxruntime 1.32.0", "and no faster than"),
        (0.3, 1.6, "onnxruntime 1.32.0", "does not tell the two models apart"),
        (1.2, 1.4, "onnxruntime 1.32.0", "does not tell the two models apart"),  # it multiplies by the zeros
        (1.2, 1.4, "one that skips zeros", "and faster than"),
    ],
)
def test_the_card_claims_of_speed_what_the_intervals_allow(
    report: dict[str, Any], low: float, high: float, runtime: str, part: str
) -> None:
    changed = copy.deepcopy(report)
    changed["bench"]["spec"]["runtime"] = runtime
    for ratio in changed["bench"]["ratios"].values():
        ratio.update(low=low, high=high, pairs=[low] * 5)
    assert part in body(changed, {})
    del changed["bench"]
    assert "Latency was not measured in this run" in body(changed, {})


def test_verify_and_card_take_the_run(finished: Path, tmp_path: Path) -> None:
    ran = compress("verify", finished)
    assert ran.code == 0, ran.err
    assert "as LlamaForCausalLM" in ran.out
    ran = compress("card", finished, "--out", tmp_path / "card")
    assert ran.code == 0, ran.err
    assert (tmp_path / "card" / "README.md").read_text() == (finished / "release" / "README.md").read_text()


def test_the_same_command_again_does_nothing_and_a_lost_stage_comes_back_the_same(job: Job, finished: Path) -> None:
    out = job.folder / "resumed"
    shutil.copytree(finished, out)
    before = {p.relative_to(out): p.stat().st_mtime_ns for p in out.rglob("seal.json")}
    assert compress("prune", job.model, "-r", job.recipe, "--out", out).code == 0
    assert {p.relative_to(out): p.stat().st_mtime_ns for p in out.rglob("seal.json")} == before
    for name in ("plan", "model", "packed"):
        shutil.rmtree(out / name)
    assert compress("prune", job.model, "-r", job.recipe, "--out", out).code == 0
    for name in ("plan/masks.safetensors", "plan/plan.json", "model/model.safetensors", "packed/config.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    ran = compress("prune", job.model, "-r", job.recipe, "--out", out, "--sparsity", "0.5")
    one_error(ran, 1, "the stage 'plan' was made from other inputs: sparsity was 0.6, now 0.5")


def plan_only(job: Job, model: Path, *words: object) -> Any:
    out = job.folder / "plans" / str(len(list(job.folder.glob("plans/*"))))
    return compress("prune", model, "-r", job.recipe, "--out", out, "--until", "plan", "--json", *words)


def names_pruned(ran: Any) -> set[str]:
    assert ran.code == 0, ran.err
    return {row["name"] for row in json.loads(ran.out)["layers"]}


def test_embeddings_and_head_are_pruned_only_when_asked(job: Job, tmp_path: Path) -> None:
    tied = names_pruned(plan_only(job, job.model))
    assert len(tied) == 4 * 7 and all(".layers." in name for name in tied)
    for option in ("head", "embeddings"):
        more = names_pruned(plan_only(job, job.model, "--set", f"global-mp.{option}=true"))
        assert more - tied == {"model.embed_tokens.weight"}  # one matrix, counted once
    model = saved_tiny(tmp_path / "qwen3", "qwen3", tie_word_embeddings=False)
    plain = names_pruned(plan_only(job, model))
    assert names_pruned(plan_only(job, model, "--set", "global-mp.head=true")) - plain == {"lm_head.weight"}
    assert names_pruned(plan_only(job, model, "--set", "global-mp.embeddings=true")) - plain == {
        "model.embed_tokens.weight"
    }


def test_skipped_layers_stay_dense(job: Job) -> None:
    found = names_pruned(plan_only(job, job.model, "--set", 'global-mp.skip=["*.layers.0.*", "*down_proj*"]'))
    assert len(found) == 3 * 6 and not any(".layers.0." in name or "down" in name for name in found)
    one_error(plan_only(job, job.model, "--set", 'global-mp.skip=["*.nowhere"]'), 2, "matches no prunable layer")
    one_error(plan_only(job, job.model, "--set", 'global-mp.skip=["*"]'), 2, "every layer is skipped")


def test_a_floor_rescues_a_layer_that_would_collapse(job: Job, tmp_path: Path) -> None:
    model = saved_tiny(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    weak = "model.layers.1.self_attn.k_proj.weight"
    state[weak] *= 1e-3
    save_file(state, model / "model.safetensors", {"format": "pt"})

    def rows(*words: object) -> dict[str, Any]:
        ran = plan_only(job, model, *words)
        assert ran.code == 0, ran.err
        found = json.loads(ran.out)
        assert found["size"]["pruned_weights"] == target_count(0.6, found["size"]["prunable_weights"])
        return {row["name"]: row for row in found["layers"]}

    without, with_ = rows("--set", "global-mp.floor=0"), rows("--set", "global-mp.floor=50")
    assert without[weak]["pruned"] == without[weak]["weights"]
    assert with_[weak]["pruned"] == with_[weak]["weights"] - 50 and with_[weak]["held_by_floor"]
    named = rows("--set", 'global-mp.floors={"*k_proj*": 0.25}')
    assert named[weak]["pruned"] == 0.75 * named[weak]["weights"]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("sparsity=0",), 2, "number between 0 and 1"),
        (("sparsity=1",), 2, "number between 0 and 1"),
        (("sparsity=-0.5",), 2, "number between 0 and 1"),
        (("sparsity=0.0000001",), 2, "less than one of"),
        (("global-mp.floor=-1",), 2, "greater than or equal to 0"),
        (("global-mp.floor=1.5",), 2, "a floor of 1.5 is out of range"),
        (("global-mp.floor=0.5",), 1, "ask for a sparsity of at most"),
        (('global-mp.floors={"*q_proj*": 99999}',), 2, "larger than the layer"),
        (('global-mp.floors={"*nowhere*": 1}',), 2, "matches no prunable layer"),
        (("evaluation.curve=[0.9]",), 1, "ask for a sparsity of at most"),
        (("global-mp.flor=1",), 2, "did you mean 'floor'?"),
        (("global-mp.pattern=2:4",), 2, "prunes half, not 0.6"),
        (("calibration={}",), 2, "unknown key 'calibration'"),
        (("task=images",), 2, "knows no task 'images'"),
        (("task=[text]",), 2, "knows no task"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_sealed(
    job: Job, tmp_path: Path, words: tuple[str, ...], code: int, part: str
) -> None:
    out = tmp_path / "run"
    settings = [word for text in words for word in ("--set", text)]
    ran = compress("prune", job.model, "-r", job.recipe, "--out", out, *settings)
    one_error(ran, code, part)
    assert not list(out.rglob("seal.json"))


def test_a_weight_that_is_not_finite_is_named_before_anything_is_sealed(job: Job, tmp_path: Path) -> None:
    model = saved_tiny(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    ran = compress("prune", model, "-r", job.recipe, "--out", tmp_path / "run")
    one_error(ran, 1, "the weight model.layers.2.mlp.up_proj.weight holds 1 NaN")
    assert not list((tmp_path / "run").rglob("seal.json"))


def test_a_model_that_is_a_pickle_is_refused(job: Job, tmp_path: Path) -> None:
    model = saved_tiny(tmp_path / "model")
    torch.save({"a": torch.ones(1)}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    ran = compress("prune", model, "-r", job.recipe, "--out", tmp_path / "run")
    one_error(ran, 1, "no safetensors weights, only pytorch_model.bin", "pickled weights are not loaded")


def test_two_of_four_on_a_model_is_half_of_every_layer(job: Job) -> None:
    out = job.folder / "two-four"
    words = ("--set", "sparsity=0.5", "--set", "global-mp.pattern='2:4'", "--until", "evaluation", "--json")
    ran = compress("prune", job.model, "-r", job.recipe, "--out", out, *words)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    layers = layers_of(load_file(out / "model" / "model.safetensors"))
    assert sorted(check_two_four(layers)) == sorted(layers)
    assert report["size"]["pruned_share"] == 0.5 and report["quality"]["curve"] == []
    assert all(2 * row["pruned"] == row["weights"] for row in report["layers"])


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("qwen2", torch.float32), ("phi3", torch.bfloat16), ("gemma2", torch.bfloat16), ("gemma3_text", torch.float16)],
)
def test_every_family_is_pruned_exactly_and_loads_again(
    job: Job, tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    model = saved_tiny(tmp_path / "model", model_type)
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(model, max_shard_size="40KB")
    if (model / "model.safetensors.index.json").exists():
        (model / "model.safetensors").unlink(missing_ok=True)
    ran = plan_only(job, model)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    plan = Path(report["run"]) / "plan"
    shutil.copytree(model, tmp_path / "pruned")
    write_masked(weight_files(model), load_masks(plan / "masks.safetensors"), tmp_path / "pruned", "unstructured")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    gone = 0
    for row in report["layers"]:
        weight = again.get_parameter(row["name"])
        assert weight.dtype == dtype and prod(weight.shape) == row["weights"]
        gone += int((weight == 0).sum())
    assert report["size"]["pruned_weights"] == target_count(0.6, report["size"]["prunable_weights"])
    assert gone >= report["size"]["pruned_weights"]  # 16 bits may round a weight to zero by themselves
    with torch.no_grad():
        assert again(tokens(1, 9)).logits.isfinite().all()


def test_plan_says_what_would_be_done_and_reads_no_weight(job: Job, tmp_path: Path) -> None:
    ran = compress("plan", job.model, "-r", job.recipe)
    assert ran.code == 0, ran.err
    facts = json.loads(compress("plan", job.model, "-r", job.recipe, "--json").out)
    assert facts["remove"] == target_count(0.6, facts["prunable_weights"]) and facts["layers"] == 28
    assert f"prune {facts['remove']:,} of" in ran.out and "everything that loads the dense model" in ran.out
