"""Every format behind one face: built beside its place, equal to the ONNX file, described, refused in one sentence."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.export.formats import FORMATS, BuildOptions, Source, make, module_of, network_profiles, text_profiles
from compress.export.onnx import export_llm
from compress.export.onnx_module import INPUT, export_module
from tests.compress.test_train import TwoHeads
from tests.export.test_onnx import ragged
from tests.networks import shape_data


def feeds(count: int, first: int = 0) -> list[dict[str, Any]]:
    data = shape_data()
    x = data.prepare(data.train.inputs[torch.arange(first, first + count)]).numpy()
    return [{INPUT: x[i : i + 4]} for i in range(0, count, 4)]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    model = TwoHeads().eval()
    export_module(model, torch.randn(2, 3, 12, 12), ["shape", "matte"], folder)
    return Source(folder, model, {"model": feeds(8)}, {"model": feeds(64, 8)})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("llama")
    model = ragged("llama")
    export_llm(model, folder)
    return Source(folder, model)


def here(form: str) -> None:
    if not find_spec(FORMATS[form].package):
        pytest.skip(f"needs {FORMATS[form].package}")


NETWORK = [
    ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("ort", "fp32"), ("ort", "int8"), ("openvino", "fp32"),
    ("openvino", "fp16"), ("openvino", "int8"), ("mnn", "fp32"), ("executorch", "fp32"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "precision"), NETWORK)
def test_a_network_with_two_heads_gives_the_same_in_every_format(
    heads: Source, form: str, precision: str, tmp_path: Path
) -> None:
    here(form)
    options = BuildOptions(form, precision, network_profiles(4))
    facts = make(heads, tmp_path / "out", options)
    assert sorted(facts["parity"]["outputs"]) == ["model.matte", "model.shape"] and facts["parity"]["samples"] == 2
    largest = max(facts["parity"]["outputs"].values())
    assert largest < {"fp32": 1e-5, "fp16": 3e-3, "int8": 0.1}[precision]
    assert precision == "fp32" or largest > 1e-6, "a lower precision cannot give the very same"
    module = module_of(FORMATS[form])
    assert module.describe(tmp_path / "out")["bytes"] == facts["bytes"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


TEXT = [
    ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8-weights"), ("ort", "fp32"), ("openvino", "fp32"),
    ("openvino", "fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "precision"), TEXT)
def test_a_llama_of_uneven_layers_gives_the_same_in_every_format(
    llama: Source, form: str, precision: str, tmp_path: Path
) -> None:
    here(form)
    facts = make(llama, tmp_path / "out", BuildOptions(form, precision, text_profiles(16, 24)))
    outputs = facts["parity"]["outputs"]
    # Logits, keys and values of three blocks (one has no attention), for both graphs.
    assert len(outputs) == 2 * (1 + 2 * 3)
    assert max(outputs.values()) < {"fp32": 1e-4, "fp16": 1e-2, "int8-weights": 5e-2}[precision]
