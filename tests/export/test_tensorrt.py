"""Real TensorRT engines, built without a GPU: for named devices, smaller where the model is, refused by operator.

What an engine computes is compared where a CUDA driver is; that part says here that it is skipped, and why.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tensorrt_rtx", reason="needs the extra [tensorrt]")

from compress.errors import CompressError, UsageError
from compress.exporters import formats, tensorrt
from compress.exporters.cast import cast_file
from compress.exporters.formats import BuildOptions, Source, make, network_profiles, text_profiles
from compress.exporters.onnx import export_llm
from compress.exporters.onnx_module import export_module
from compress.exporters.runtimes import load
from compress.models.zoo import build
from tests.export.test_onnx import ragged
from tests.export.test_onnx_module import inputs
from tests.networks.test_train import TwoHeads

pytestmark = pytest.mark.processes

DEVICES = ("sm86", "sm89")


def options(precision: str = "fp32", **changes: Any) -> BuildOptions:
    given = {"profiles": network_profiles(4, 8), "capabilities": DEVICES, **changes}
    return BuildOptions("tensorrt_rtx", precision, **given)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of models/resnet8-emoji.yaml."""
    folder = tmp_path_factory.mktemp("cnn")
    model = build("resnet", {"depth": 8, "width": 12, "classes": 9}, seed=0).eval()
    export_module(model, torch.randn(2, 3, 24, 24), ["emoji"], folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    export_llm(ragged("llama"), folder)
    return folder


def driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_cnn_becomes_an_engine_for_named_devices_in_its_precision(cnn: Path, precision: str, tmp_path: Path) -> None:
    facts = make(Source(cnn), tmp_path / "out", options(precision))
    engine = tmp_path / "out" / "model.engine"
    assert engine.read_bytes()[:4] == b"vtrt" and facts["bytes"] == {"model.engine": engine.stat().st_size}
    assert facts["capabilities"] == ["sm86", "sm89"]
    made = facts["components"]["model"]
    assert made["profiles"] == [{"batch": (1, 4, 8)}]
    named = {"fp32": "float", "fp16": "half", "bf16": "bf16"}[precision]
    # All seven convolutions and the linear layer compute in it, and a caller sees float32.
    assert made["layers"][f"convolution {named}"] == 7 and made["layers"][f"matrix_multiply {named}"] == 1
    assert {p["dtype"] for p in (*made["inputs"], *made["outputs"])} == {"float"}
    assert formats.describe(tmp_path / "out", "tensorrt_rtx")["sha256"] == facts["sha256"]
    if driver():
        assert facts["parity"]["outputs"].keys() == {"model.emoji"}
    else:
        assert "no CUDA driver" in facts["parity"]["skipped"]


def test_half_precision_halves_what_the_weights_take(tmp_path: Path) -> None:
    export_module(
        build("wrn", {"depth": 10, "widen": 4, "classes": 9}, seed=0).eval(), torch.randn(2, 3, 8, 8), ["y"], tmp_path
    )
    size = {
        p: make(Source(tmp_path), tmp_path / p, options(p))["bytes"]["model.engine"] for p in ("fp32", "fp16", "bf16")
    }
    weights = (tmp_path / "model.onnx").stat().st_size
    assert 0.4 * weights < size["fp32"] - size["fp16"] < 0.6 * weights
    assert abs(size["fp16"] - size["bf16"]) < 0.05 * weights


def test_every_head_of_a_network_with_several_is_an_output(tmp_path: Path) -> None:
    export_module(TwoHeads().eval(), inputs(2), ["shape", "matte"], tmp_path)
    made = make(Source(tmp_path), tmp_path / "out", options())["components"]["model"]
    assert [p["name"] for p in made["outputs"]] == ["shape", "matte"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_llama_of_uneven_layers_becomes_prefill_and_decode(llama: Path, precision: str, tmp_path: Path) -> None:
    given = text_profiles(16, 24, most=64)
    facts = make(Source(llama), tmp_path / "out", options(precision, profiles=given))
    assert sorted(facts["bytes"]) == ["decode.engine", "prefill.engine"]
    prefill, decode = (facts["components"][name] for name in ("prefill", "decode"))
    assert prefill["profiles"] == [{"batch": (1, 1, 1), "sequence": (1, 16, 64)}]
    assert decode["profiles"][0]["past"] == (1, 24, 64) and decode["profiles"][0]["total"] == (2, 25, 65)
    kv = [p for p in decode["inputs"] if p["name"].startswith("past_key_values.")]
    assert len(kv) == 6 and {len(p["shape"]) for p in kv} == {4}
    assert len({p["shape"][1] for p in kv}) > 1, "the layers of the test model must differ in KV heads"
    if precision == "fp16":
        # Squares and means of the norms, and the positions' sines, stay in float32.
        assert decode["layers"]["reduce float"] == 9 and "reduce half" not in decode["layers"]
        assert decode["layers"]["matrix_multiply half"] > 20


def test_a_narrower_network_is_a_smaller_engine(tmp_path: Path) -> None:
    size = []
    for width in (32, 24, 16):
        folder = tmp_path / str(width)
        folder.mkdir()
        model = build("resnet", {"depth": 14, "width": width, "classes": 9}, seed=0).eval()
        export_module(model, torch.randn(2, 3, 16, 16), ["y"], folder)
        facts = make(Source(folder), folder / "out", options())
        size.append((facts["bytes"]["model.engine"], (folder / "model.onnx").stat().st_size))
    for (engine, file), (smaller, smaller_file) in pairwise(size):
        # What is saved in the file is saved in the engine; beside weights it holds code, which varies little.
        assert 0.9 < (engine - smaller) / (file - smaller_file) < 1.5


def write(path: Path, nodes: list[Any], opset: int = 20) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 3, 3])],
        [value("y", TensorProto.FLOAT, ["batch"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def test_an_operator_that_is_not_supported_is_named_with_its_node(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.onnx",
        [helper.make_node("Relu", ["x"], ["r"], "clip"), helper.make_node("Det", ["r"], ["y"], "volume of the block")],
    )
    with pytest.raises(CompressError, match="operator Det of the node 'volume of the block'") as caught:
        make(Source(path), tmp_path / "out", options())
    assert caught.value.where == str(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"], "nothing half-written may stay"


def test_shapes_that_cannot_be_are_refused(cnn: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'batch' are no range: 4, 2, 8"):
        make(Source(cnn), tmp_path / "out", options(profiles={"model": [{"batch": (4, 2, 8)}]}))
    with pytest.raises(UsageError, match="no input of the model graph has an axis 'length'"):
        make(Source(cnn), tmp_path / "out", options(profiles={"model": [{"length": (1, 2, 3)}]}))
    with pytest.raises(UsageError, match="no compute capability 'sm10'") as caught:
        make(Source(cnn), tmp_path / "out", options(capabilities=("sm10",)))
    assert "sm86" in caught.value.fix
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk cannot be had in a test: the write of the engine fails as it would there."""
    import errno

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorrt, "_build_one", full)
    with pytest.raises(CompressError, match="the disk is full") as caught:
        make(Source(cnn), tmp_path / "out", options())
    assert caught.value.where == str(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_changed_engine_is_noticed(cnn: Path, tmp_path: Path) -> None:
    make(Source(cnn), tmp_path / "out", options())
    engine = tmp_path / "out" / "model.engine"
    data = bytearray(engine.read_bytes())
    data[-1] ^= 1
    engine.write_bytes(data)
    with pytest.raises(CompressError, match="has changed since it was built"):
        formats.describe(tmp_path / "out", "tensorrt_rtx")
    (tmp_path / "out" / "tensorrt_rtx.json").write_text("{")
    with pytest.raises(CompressError, match="was built as tensorrt_rtx is no JSON"):
        formats.describe(tmp_path / "out", "tensorrt_rtx")


def test_the_form_that_needs_a_gpu_says_so(cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tensorrt` cannot be had here: the same module stands in for it, and gives no builder, as without a GPU."""
    import sys

    import tensorrt_rtx

    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: object())

    def none(*_: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(tensorrt_rtx, "Builder", none)
    given = BuildOptions("tensorrt", "fp32", network_profiles(1))
    with pytest.raises(UsageError, match="gives no builder here") as caught:
        make(Source(cnn), tmp_path / "out", given)
    assert "tensorrt_rtx builds without one" in caught.value.fix
    monkeypatch.undo()
    if not formats.importlib.util.find_spec("tensorrt"):
        with pytest.raises(UsageError, match="needs tensorrt, which is not installed"):
            make(Source(cnn), tmp_path / "out", given)


def test_a_cast_graph_keeps_squares_and_sines_in_float32_and_masks_finite(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Pow", ["x", "two"], ["square"], "square"),
            helper.make_node("ReduceMean", ["square"], ["mean"], "mean", keepdims=1),
            helper.make_node("Sqrt", ["mean"], ["root"], "root"),
            helper.make_node("Div", ["x", "root"], ["normed"], "divide"),
            helper.make_node("Mul", ["x", "frequency"], ["angle"], "angle"),
            helper.make_node("Cos", ["angle"], ["wave"], "wave"),
            helper.make_node("Add", ["normed", "mask"], ["masked"], "mask"),
        ],
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 4])],
        [value(n, TensorProto.FLOAT, ["batch", 4]) for n in ("masked", "wave")],
        [
            numpy_helper.from_array(np.float32(2), "two"),
            numpy_helper.from_array(np.float32([1.001, 0.37, 1.7, 0.01]), "frequency"),
            numpy_helper.from_array(np.float32([0, 0, 0, np.finfo(np.float32).min]), "mask"),
        ],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    counts = cast_file(path, tmp_path / "half.onnx", "fp16")
    assert counts == {"cast": 2, "kept": 5}
    feed = {"x": np.float32([[300, 1000, 4000, 2000]])}  # squares far over 65,504, angles with no bits left in float16
    want, got = (load("onnx", str(p)).run(feed) for p in (path, tmp_path / "half.onnx"))
    np.testing.assert_allclose(got["masked"][0, :3], want["masked"][0, :3], rtol=2e-3)
    assert np.isfinite(got["masked"]).all() and got["masked"][0, 3] < -65000
    np.testing.assert_allclose(got["wave"], want["wave"], atol=1e-6)
