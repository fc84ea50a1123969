"""ONNX of models whose layers differ: every family equal to torch, small where the model is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.exporters.onnx import DECODE, PREFILL, WEIGHTS, cached_layers, export_llm
from compress.exporters.ort import OrtLLM
from compress.exporters.parity import check_llm
from compress.models.families import family_for
from tests.models.families.test_families import ragged_plan
from tests.tiny import ARCHITECTURES, tiny, tokens

pytestmark = pytest.mark.processes


def ragged(model_type: str) -> Any:
    model = tiny(model_type)
    plan = ragged_plan(model)
    if model_type in ("gemma2", "gemma3_text"):
        # Block 2 of the plan has no attention; the only block of a kind has to keep it.
        assert 2 not in family_for(model.config).keeps_attention(model.config)
    plan.apply(model, family_for(model.config))
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    model = ragged("llama")
    export_llm(model, folder)
    return model, folder


# What each adds to Llama's graph: Phi-3 fused layers, Gemma 3 norms around sublayers, windows and norms of q and k. The
# rest add nothing that one of these has not, and are traced by `make slow`.
MORE = ("mistral", "qwen2", "qwen3", "gemma2")
OTHERS = [pytest.param(t, marks=pytest.mark.slow) if t in MORE else t for t in ARCHITECTURES if t != "llama"]


@pytest.mark.parametrize("model_type", OTHERS)
def test_every_family_equals_torch_with_ragged_layers(model_type: str, tmp_path: Path) -> None:
    model = ragged(model_type)
    export_llm(model, tmp_path)
    found = check_llm(model, tmp_path, tolerance=1e-4, vocab=300)
    # Logits, keys and values of three blocks (one has no attention), for both graphs.
    assert len(found["outputs"]) == 2 * (1 + 2 * 3) and max(found["outputs"].values()) < 1e-4


def test_llama_equals_torch_with_ragged_layers(llama: tuple[Any, Path]) -> None:
    model, folder = llama
    assert max(check_llm(model, folder, tolerance=1e-4, vocab=300)["outputs"].values()) < 1e-4


def test_inputs_are_named_and_dynamic_and_heads_are_those_of_each_layer(llama: tuple[Any, Path]) -> None:
    import onnx

    _, folder = llama
    graph = onnx.load(folder / DECODE, load_external_data=False).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == ["batch", "sequence"] and shapes["attention_mask"] == ["batch", "total"]
    assert shapes["logits"] == ["batch", "sequence", 300]
    # Two groups in blocks 0 and 3, one in block 1, none in block 2.
    for layer, groups in ((0, 2), (1, 1), (3, 2)):
        assert shapes[f"past_key_values.{layer}.key"] == ["batch", groups, "past", 8]
        assert shapes[f"present.{layer}.value"] == ["batch", groups, "total", 8]
    assert not any(".2." in name for name in shapes)
    prefill = onnx.load(folder / PREFILL, load_external_data=False).graph
    assert {v.name for v in prefill.input} <= {"input_ids", "attention_mask", "position_ids"}
    assert [d.dim_param or d.dim_value for d in prefill.output[0].type.tensor_type.shape.dim] == ["batch", 1, 300]


def test_both_graphs_share_one_weights_file_no_larger_than_the_weights(llama: tuple[Any, Path]) -> None:
    model, folder = llama
    assert {p.name for p in folder.iterdir()} == {PREFILL, DECODE, WEIGHTS}
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert (folder / WEIGHTS).stat().st_size < 4 * parameters * 1.15
    dense = tiny("llama")
    assert parameters < 0.75 * sum(p.numel() for p in dense.parameters())


def test_no_path_of_this_machine_is_left_in_the_graphs(llama: tuple[Any, Path]) -> None:
    _, folder = llama
    for name in (PREFILL, DECODE):
        assert b"site-packages" not in (folder / name).read_bytes()


def test_cached_layers_counts_kv_heads_from_the_modules(llama: tuple[Any, Path]) -> None:
    assert cached_layers(llama[0]) == [(0, 2, 8), (1, 1, 8), (3, 2, 8)]


def test_any_batch_and_length_and_an_empty_past(llama: tuple[Any, Path]) -> None:
    model, folder = llama
    runtime = OrtLLM(folder, threads=1)
    for batch, length in ((1, 1), (1, 40), (5, 3)):
        ids = tokens(batch, length)
        with torch.no_grad():
            want = model(ids).logits.numpy()
        scored = runtime.decode(ids.numpy(), runtime.empty_cache(batch))
        np.testing.assert_allclose(scored["logits"], want, atol=1e-4)
        np.testing.assert_allclose(runtime.prefill(ids.numpy())["logits"], want[:, -1:], atol=1e-4)


def test_a_left_padded_prompt_gives_what_it_gives_alone(llama: tuple[Any, Path]) -> None:
    _, folder = llama
    runtime = OrtLLM(folder, threads=1)
    short, long = tokens(1, 6, seed=3).numpy(), tokens(1, 10, seed=4).numpy()
    both = np.concatenate([np.pad(short, ((0, 0), (4, 0))), long])
    mask = np.ones_like(both)
    mask[0, :4] = 0
    got = runtime.prefill(both, mask)["logits"]
    np.testing.assert_allclose(got[:1], runtime.prefill(short)["logits"], atol=1e-4)
    np.testing.assert_allclose(got[1:], runtime.prefill(long)["logits"], atol=1e-4)


def test_greedy_tokens_equal_torchs_generate(llama: tuple[Any, Path]) -> None:
    model, folder = llama
    ids = tokens(1, 9, seed=6)
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    want = whole[0, 9:].tolist()
    got = OrtLLM(folder, threads=1).greedy(ids.numpy(), 12)
    until = want.index(2) if 2 in want else 12  # generate keeps the end token from being chosen
    assert until and got[:until] == want[:until]
