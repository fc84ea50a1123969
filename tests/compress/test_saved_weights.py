"""What is evaluated, exported and shown is made of the weights that are saved, in the type that they are saved in."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from compress.errors import CompressError
from compress.language.checkpoint import save_model
from compress.language.plan import Plan
from compress.language.setup import prepare
from compress.models.families import family_for
from compress.models.reading import load_model
from compress.models.streaming import stream_model
from compress.pipeline import METHODS
from compress.report.build import read_report
from compress.schema.recipe import load_recipe
from tests.command import Job, compress
from tests.tiny import tiny, tiny_job, tokens, word_tokenizer

pytestmark = pytest.mark.usefixtures("done_once")

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = (
    *("--set", "tyr.iterations=1", "--set", "tyr.search.generations=0", "--set", "bench=null"),
    *("--set", "evaluation.curve=[0.2]"),
)


def stored_job(folder: Path, model_type: str, dtype: str) -> Job:
    """A tiny model whose files hold ``dtype``; of two layers, since tracing takes most of a run here."""
    model, recipe = tiny_job(folder, model_type)
    tiny(model_type, num_hidden_layers=2).to(TYPES[dtype]).save_pretrained(model)
    assert {t.dtype for t in load_file(model / "model.safetensors").values()} == {TYPES[dtype]}
    return Job(model, recipe, folder)


def prune(job: Job, out: Path, *words: object) -> Path:
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out, *SHORT, *words)
    assert ran.code == 0, ran.err
    return out


def in_graph(folder: Path) -> list[np.ndarray[Any, Any]]:
    """The weights of an exported model, each sorted: a graph may hold them transposed."""
    # A copy: onnx reads no weights of a file that has two names, as a release's have in its run folder.
    with tempfile.TemporaryDirectory() as place:
        graph = onnx.load(str(shutil.copytree(folder, Path(place) / "copy") / "prefill.onnx")).graph
    return [np.sort(numpy_helper.to_array(t).astype(np.float32), axis=None) for t in graph.initializer]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return stored_job(tmp_path_factory.mktemp("bf16"), "llama", "bfloat16")


@pytest.fixture(scope="module")
def run(bf16: Job) -> Path:
    """A whole run of a bfloat16 model; tests must not change it."""
    return prune(bf16, bf16.folder / "run")


def published_is_proven(run: Path, dtype: str) -> None:
    """The run verifies, its card is written, and its ONNX holds the saved weights bit for bit."""
    ran = compress("verify", run)
    assert ran.code == 0, ran.err
    assert compress("card", run).code == 0
    saved = load_file(run / "release" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {TYPES[dtype]}
    exported = in_graph(run / "release" / "onnx")
    for name, tensor in saved.items():
        want = np.sort(tensor.float().numpy(), axis=None)
        # A Gemma's norm multiplies by 1 + weight, which an exporter may fold.
        forms = [want, np.sort((tensor.float() + 1.0).numpy(), axis=None)] if "norm" in name else [want]
        assert any(np.array_equal(form, found) for form in forms for found in exported), name


def test_a_bfloat16_llama_is_published_as_it_is_proven(run: Path) -> None:
    published_is_proven(run, "bfloat16")
    # The last norm is refitted in float32: were that exported, this would show it.
    refitted = Plan.load(run / "plan").weights["norm"]
    assert not torch.equal(refitted, refitted.bfloat16().float())


@pytest.mark.parametrize(("model_type", "dtype"), [("gemma3_text", "bfloat16"), ("qwen2", "float16")])
@pytest.mark.slow
def test_a_half_precision_model_is_published_as_it_is_proven(model_type: str, dtype: str, tmp_path: Path) -> None:
    job = stored_job(tmp_path, model_type, dtype)
    published_is_proven(prune(job, tmp_path / "run", "--set", "layouts=[per-layer]"), dtype)


def test_a_recovered_bfloat16_model_is_published_as_it_is_proven(bf16: Job, run: Path, tmp_path: Path) -> None:
    section = "recover={method: full, steps: 3, batch: 2, learning_rate: 0.003}"
    recovered = prune(bf16, tmp_path / "run", "--set", section, "--set", "layouts=[per-layer]")
    published_is_proven(recovered, "bfloat16")
    before = read_report(recovered)["recover"]["texts"][0]["before_ppl"]
    # What it was before the training is what the run without any has saved and measured.
    plain = read_report(run)["quality"]["texts"][0]
    assert before == pytest.approx(plain["pruned_ppl"], rel=1e-6) and before != plain["dense_ppl"]


def test_a_model_saved_at_full_shape_alone_is_exported_small_and_of_its_own_weights(bf16: Job, tmp_path: Path) -> None:
    run = prune(bf16, tmp_path / "run", "--set", "layouts=[padded]")
    assert compress("verify", run).code == 0
    onnx_ = read_report(run)["export"]["onnx"]
    assert sum(onnx_["pruned"]["bytes"].values()) < sum(onnx_["dense"]["bytes"].values())
    saved = load_file(run / "model-padded" / "model.safetensors")
    want = np.sort(saved["model.norm.weight"].float().numpy())
    assert any(np.array_equal(want, found) for found in in_graph(run / "export-pruned"))


@pytest.mark.slow
def test_a_streamed_bfloat16_run_leaves_the_same_bytes(bf16: Job, run: Path, tmp_path: Path) -> None:
    streamed = prune(bf16, tmp_path / "run", "--set", "memory.stream=true")
    for name in ("model/model.safetensors", "model-padded/model.safetensors", "export-pruned/weights.data"):
        assert (streamed / name).read_bytes() == (run / name).read_bytes(), name
    for stage in ("evaluation-dense/evaluation", "evaluation-pruned/evaluation"):
        texts = [json.loads((r / f"{stage}.json").read_text())["texts"] for r in (streamed, run)]
        here, there = ({name: found["nll"] for name, found in each.items()} for each in texts)
        assert here == pytest.approx(there, rel=1e-6)
    here, there = (json.loads((r / "curve" / "curve.json").read_text()) for r in (streamed, run))
    assert len(here) == len(there) == 1
    assert here[0]["texts"] == pytest.approx(there[0]["texts"], rel=1e-5)


def test_a_plan_in_memory_is_what_it_would_be_if_it_were_saved(bf16: Job, run: Path, tmp_path: Path) -> None:
    plan = Plan.load(run / "plan")
    generator = torch.Generator().manual_seed(0)
    # As training leaves them: no bfloat16 number among them.
    rough = {n: w.float() + 1e-4 * torch.randn(w.shape, generator=generator) for n, w in plan.weights.items()}
    plan = Plan(plan.blocks, rough, plan.meta)
    for stream in ("false", "true"):
        recipe = load_recipe(str(bf16.recipe), METHODS, [f"memory.stream={stream}"])
        setup = prepare(str(bf16.model), recipe)
        dense = {n: t.clone() for n, t in load_model(bf16.model, setup.family).state_dict().items()}
        made, counts = setup.as_saved(plan), plan.counts(setup.geometry)
        folder = tmp_path / stream
        folder.mkdir()
        pruned = setup.pruned(plan)[0]
        save_model(
            pruned, setup.family, counts, folder, tokenizer=setup.tokenizer, dtype=torch.bfloat16, tokens=tokens(1, 8)
        )
        want = load_model(folder, setup.family)
        with torch.no_grad():
            assert torch.equal(made(tokens(2, 9)).logits, want(tokens(2, 9)).logits)
            assert not torch.equal(pruned(tokens(2, 9)).logits, want(tokens(2, 9)).logits)
        # The dense model, whose tensors are shared, is as it was.
        again = setup.model if stream == "false" else load_model(bf16.model, setup.family)
        assert all(torch.equal(t, dense[n]) for n, t in again.state_dict().items())


def test_a_weight_that_the_type_cannot_hold_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e5
    family = family_for(model.config)
    with pytest.raises(CompressError, match=r"layers\.1\.mlp\.down_proj\.weight goes up to 1e\+05.*float16"):
        save_model(
            model, family, None, tmp_path, tokenizer=word_tokenizer(tmp_path), dtype=torch.float16, tokens=tokens(1, 8)
        )


def test_global_mp_publishes_a_bfloat16_model_as_it_is_proven(bf16: Job, tmp_path: Path) -> None:
    recipe = tmp_path / "mp.yaml"
    texts = f"[{{name: first, source: {{files: [{bf16.folder}/first.txt]}}}}]"
    recipe.write_text(
        f"method: global-mp\ndescription: small\nsparsity: 0.5\nbench: null\n"
        f"evaluation: {{texts: {texts}, windows: 2, length: 32}}\n"
    )
    ran = compress("prune", bf16.model, "--recipe", recipe, "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    published_is_proven(tmp_path / "run", "bfloat16")


def test_a_changed_block_of_a_streamed_model_can_be_changed_again(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    blocks = stream_model(tmp_path, family_for(model.config), 1, torch.device("cpu")).model.layers
    seen: list[str] = []
    twice = blocks.changed(lambda i, b: seen.append(f"first {i}") or b).changed(lambda i, b: seen.append("then") or b)
    assert twice[2] is not None and seen == ["first 2", "then"]
