"""Parity: silent where the export is right, and pointing at the layer where it is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.exporters.check import write_checked
from compress.exporters.onnx import WEIGHTS, export_llm
from compress.exporters.ort import OrtLLM, session
from compress.exporters.parity import check_llm, first_fault, greedy_agrees
from compress.models.families import family_for
from compress.schema.recipe import ExportSection
from tests.models.families.test_families import ragged_plan
from tests.tiny import tiny, word_tokenizer

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = tiny("llama")
    plan = ragged_plan(model)
    plan.apply(model, family_for(model.config))
    folder = tmp_path_factory.mktemp("onnx")
    export_llm(model, folder)
    return model, folder


def changed(model: Any, layer: int, path: str) -> Any:
    """A copy of ``model`` with one entry of one projection changed."""
    other = copy.deepcopy(model)
    module = other.model.layers[layer].get_submodule(path)
    with torch.no_grad():
        module.weight[1, 1] += 1.0
    return other


@pytest.mark.parametrize(
    ("layer", "path", "named"),
    [
        (0, "self_attn.k_proj", "first at the inputs of layer 0's cache"),
        (0, "mlp.down_proj", "first at the inputs of layer 1's cache"),
        (1, "self_attn.v_proj", "first at the inputs of layer 1's cache"),
        (1, "self_attn.o_proj", "first at the inputs of layer 3's cache"),
        (3, "self_attn.q_proj", "every layer's cache agrees"),
    ],
)
def test_a_changed_weight_is_found_and_its_layer_named(
    exported: tuple[Any, Path], layer: int, path: str, named: str
) -> None:
    model, folder = exported
    with pytest.raises(CompressError, match="differs from torch") as error:
        check_llm(changed(model, layer, path), folder, tolerance=1e-3, vocab=300)
    assert named in error.value.what


def test_the_blame_spans_the_layers_without_a_cache() -> None:
    fault = first_fault({"prefill.present.3.key": 0.1, "decode.logits": 0.2}, [0, 1, 3])
    assert "layers 1 to 2 or in layer 3's projections" in fault
    fault = first_fault({"decode.present.1.value": 0.1}, [0, 1, 3])
    assert "layer 0 or in layer 1's projections" in fault


def test_a_byte_changed_in_the_weights_file_is_found(exported: tuple[Any, Path], tmp_path: Path) -> None:
    import shutil

    import numpy as np

    model, folder = exported
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = np.fromfile(broken / WEIGHTS, dtype=np.float32)
    weights[len(weights) // 2 :] += 0.05
    weights.tofile(broken / WEIGHTS)
    with pytest.raises(CompressError, match="differs from torch"):
        check_llm(model, broken, tolerance=1e-3, vocab=300)


def test_a_small_difference_passes_only_a_wide_tolerance(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.model.norm.weight *= 1 + 1e-3
    found = check_llm(near, folder, tolerance=1e-2, vocab=300)["outputs"]
    assert found["decode.logits"] == pytest.approx(1e-3, rel=0.1)
    with pytest.raises(CompressError, match="logits"):
        check_llm(near, folder, tolerance=1e-4, vocab=300)


def test_nan_never_passes(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(CompressError, match="differs from torch"):
        check_llm(broken, folder, tolerance=1e9, vocab=300)


def test_greedy_text_that_differs_names_the_token(exported: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = exported
    tokenizer = word_tokenizer(tmp_path)
    agreed = greedy_agrees(model, folder, tokenizer, "the cat sat", 10)
    assert agreed["tokens"] > 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight *= -1
    with pytest.raises(CompressError, match="differs from torch's at token 0"):
        greedy_agrees(other, folder, tokenizer, "the cat sat", 10)


def test_greedy_text_is_compared_up_to_any_token_that_ends_a_text(exported: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = exported
    tokenizer = word_tokenizer(tmp_path)
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    likeliest = OrtLLM(folder, 2).greedy(ids.numpy(), 10)
    at = next(i for i in range(2, 10) if likeliest[i] not in (2, *likeliest[:i]))
    ending = copy.deepcopy(model)  # as Llama 3's: several, of which the tokenizer names one
    ending.generation_config.eos_token_id = [2, likeliest[at]]
    tokenizer.end_ids = (2, likeliest[at])
    assert greedy_agrees(ending, folder, tokenizer, "the cat sat", 10)["tokens"] == at


def test_what_is_checked_is_noted(tmp_path: Path) -> None:
    import json

    model = tiny("llama", num_hidden_layers=2)
    folder = tmp_path / "onnx"
    folder.mkdir()
    facts = write_checked(model, word_tokenizer(tmp_path / "tokenizer"), folder, ExportSection(greedy_tokens=4), 300)
    assert json.loads((folder / "export.json").read_text()) == facts
    assert facts["bytes"] == {name: (folder / name).stat().st_size for name in facts["bytes"]}
    assert facts["outputs_compared"] == 10 and facts["largest_difference"] < 1e-4


def test_a_file_that_is_no_onnx_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no such ONNX file"):
        session(tmp_path / "x.onnx", 1)
    (tmp_path / "x.onnx").write_text("no model")
    with pytest.raises(CompressError, match="no valid ONNX file"):
        session(tmp_path / "x.onnx", 1)
