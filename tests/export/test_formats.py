"""Every format behind one face: built beside its place, equal to the ONNX file, described, refused in one sentence."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.exporters.formats import FORMATS, BuildOptions, Source, describe, make, network_profiles, text_profiles
from compress.exporters.names import INPUT
from compress.exporters.onnx import export_llm
from compress.exporters.onnx_module import export_module
from compress.models.zoo import build
from tests.command import compress, one_error
from tests.export.test_onnx import ragged
from tests.networks import shape_data
from tests.networks.test_train import TwoHeads

pytestmark = pytest.mark.processes


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
    ("executorch", "int8"),
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
    assert describe(tmp_path / "out", form)["bytes"] == facts["bytes"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


TEXT = [
    ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8-weights"), ("ort", "fp32"), ("openvino", "fp32"),
    ("openvino", "fp16"), pytest.param("executorch", "fp32", marks=pytest.mark.slow),
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


def test_executorch_takes_a_recurrent_network_and_batches_that_vary(tmp_path: Path) -> None:
    here("executorch")
    model = build("fastgrnn", {"channels": 3, "hidden": 8, "classes": 4, "r_W": 3, "r_U": 8}, seed=0).eval()
    export_module(model, torch.randn(2, 3, 12), ["activity"], tmp_path)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 12, generator=draw).numpy()
    source = Source(tmp_path, model, {"model": [{INPUT: x}, {INPUT: x[:1]}, {INPUT: x[2:5]}]})
    facts = make(source, tmp_path / "out", BuildOptions("executorch", "fp32", {"model": [{"batch": (1, 2, 6)}]}))
    assert facts["parity"]["samples"] == 3 and max(facts["parity"]["outputs"].values()) < 1e-5


def test_fusions_are_written_into_the_file_and_leave_the_outputs(llama: Source, tmp_path: Path) -> None:
    facts = make(llama, tmp_path / "out", BuildOptions("onnx", "fp32", text_profiles(16, 24), fusions="all"))
    for made in facts["components"].values():
        assert made["nodes"] < 0.8 * made["nodes_before"]
        # ONNX Runtime's own operators: nothing else can read the file any more.
        assert made["ops"]["SkipSimplifiedLayerNormalization"] == 8
    assert facts["components"]["decode"]["ops"]["MultiHeadAttention"] == 3
    assert max(facts["parity"]["outputs"].values()) < 1e-4


def test_prefill_and_decode_share_their_weights_at_every_precision(llama: Source, tmp_path: Path) -> None:
    size = {}
    for precision in ("fp32", "fp16", "int8-weights"):
        facts = make(llama, tmp_path / precision, BuildOptions("onnx", precision, text_profiles(8, 8)))
        size[precision] = facts["bytes"]["weights.data"]
        assert sorted(facts["bytes"]) == ["decode.onnx", "prefill.onnx", "weights.data"]
    plain = (llama.path / "weights.data").stat().st_size
    assert 0.95 * plain < size["fp32"] < 1.1 * plain
    assert 0.45 < size["fp16"] / size["fp32"] < 0.6
    assert size["int8-weights"] < 0.8 * size["fp32"]  # the embedding stays as it is


def test_a_quantised_network_is_judged_by_the_given_measure(heads: Source, tmp_path: Path) -> None:
    held = feeds(40, 120)

    def error(runners: Any) -> dict[str, float]:
        """Against torch, so that the ONNX file itself has an error near 0."""
        found = [runners["model"].run(feed) for feed in held]
        with torch.no_grad():
            want = [heads.model(torch.from_numpy(feed[INPUT])) for feed in held]
        pairs = zip(found, want, strict=True)
        return {"error": float(np.mean([np.abs(f["matte"] - w["matte"].numpy()).mean() for f, w in pairs]))}

    facts = make(replace(heads, evaluate=error), tmp_path / "out", BuildOptions("onnx", "int8", network_profiles(4)))
    before, after = facts["measures"]["before"]["error"], facts["measures"]["after"]["error"]
    assert before < 1e-6 < 1e-4 < after < 0.1
    assert facts["components"]["model"]["ops"]["QuantizeLinear"] >= 3


def test_what_cannot_be_is_refused_in_one_sentence(heads: Source, llama: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no format 'coreml'"):
        make(heads, out, BuildOptions("coreml"))
    with pytest.raises(UsageError, match="MNN is not built in bf16"):
        make(heads, out, BuildOptions("mnn", "bf16"))
    with pytest.raises(UsageError, match="made of the torch model"):
        make(Source(heads.path), out, BuildOptions("executorch"))
    with pytest.raises(UsageError, match="needs inputs to calibrate on"):
        make(Source(heads.path), out, BuildOptions("onnx", "int8"))
    with pytest.raises(UsageError, match="nothing to quantise"):
        make(heads, out, BuildOptions("onnx", "int8-weights"))
    if find_spec("MNN"):
        with pytest.raises(UsageError, match="a language model is not exported to MNN"):
            make(llama, out, BuildOptions("mnn"))
    (tmp_path / "corrupt.onnx").write_bytes((heads.path / "model.onnx").read_bytes()[:-300])
    with pytest.raises(CompressError, match="no valid ONNX file"):
        make(Source(tmp_path / "corrupt.onnx"), out, BuildOptions("ort"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corrupt.onnx"]


def test_an_operator_that_a_format_lacks_is_named(tmp_path: Path) -> None:
    here("openvino")
    value = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("Wavelet", ["x"], ["y"], "the odd one", domain="some.vendor")
    graph = onnx.helper.make_graph([node], "g", [value("x", kind, ["batch", 4])], [value("y", kind, ["batch", 4])])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("some.vendor", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    for form in ("openvino", "ort"):
        with pytest.raises(CompressError, match="Wavelet"):
            make(Source(tmp_path / "m.onnx"), tmp_path / "out", BuildOptions(form))


@pytest.mark.skipif(not find_spec("litert_torch"), reason="needs the extra [litert], an environment of 2 GB")
def test_litert_gives_the_same(heads: Source, tmp_path: Path) -> None:
    facts = make(heads, tmp_path / "out", BuildOptions("litert", "fp32", network_profiles(4)))
    assert max(facts["parity"]["outputs"].values()) < 1e-5


def test_the_command_exports_any_onnx_file(heads: Source, tmp_path: Path) -> None:
    file = heads.path / "model.onnx"
    done = compress(
        "export", str(file), "--format", "ort", "--format", "onnx", "--precision", "fp16", "--shape", "batch=1:4:8",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "2 outputs agree with ONNX" in done.out
    assert (tmp_path / "out" / "ort-fp16" / "model.ort").exists()
    assert (tmp_path / "out" / "onnx-fp16" / "model.onnx").exists()
    other = ("--out", tmp_path / "other")
    one_error(compress("export", file, *other), 2, "this is ONNX already")
    (tmp_path / "broken.onnx").write_text("no")
    one_error(compress("export", tmp_path / "broken.onnx", "--format", "ort", *other), 1, "no valid ONNX file")
    one_error(
        compress("export", file, "--format", "ort", "--shape", "length=3", *other),
        2,
        "no input of the model graph has an axis 'length'",
    )
    one_error(compress("export", file, "--format", "ort", "--shape", "batch=x", *other), 2, "'batch=x' is no shape")
    one_error(compress("export", file, "--format", "coreml", *other), 2, "no format 'coreml'", "tensorrt_rtx")
    assert not (tmp_path / "other").exists()
