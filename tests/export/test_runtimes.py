"""Every runtime behind one face: names, shapes and outputs are the file's; what is missing is said in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.exporters import runtimes
from compress.exporters.runtimes import CannotRun, Missing, bound, load

WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def two_in_two_out(path: Path) -> Path:
    """scaled = (x @ W) * scale, positive = relu(x @ W); the batch of x may vary."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["product"], "multiply"),
            helper.make_node("Mul", ["product", "scale"], ["scaled"], "rescale"),
            helper.make_node("Relu", ["product"], ["positive"], "clip"),
        ],
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 4]), value("scale", TensorProto.FLOAT, [1, 6])],
        [value("scaled", TensorProto.FLOAT, ["batch", 6]), value("positive", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(WEIGHT, "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def given(batch: int = 3) -> dict[str, Any]:
    draw = np.random.default_rng(batch)
    return {
        "x": draw.standard_normal((batch, 4)).astype(np.float32),
        "scale": draw.standard_normal((1, 6)).astype(np.float32),
    }


def expected(feed: dict[str, Any]) -> dict[str, Any]:
    product = feed["x"].astype(np.float64) @ WEIGHT.astype(np.float64)
    return {"scaled": product * feed["scale"], "positive": np.maximum(product, 0)}


def agrees(runner: runtimes.Runner) -> None:
    """In batches that differ, by `run` and by a prepared call, against float64."""
    for batch in (3, 1, 5):
        want = expected(given(batch))
        got = runner.run(given(batch))
        again = runner.prepare(given(batch))()
        assert list(got) == [v.name for v in runner.outputs]
        for name, other in zip(got, again, strict=True):
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(np.asarray(other), got[name])


@pytest.mark.parametrize("optimisation", ["all", "none"])
def test_onnx_runtime_gives_what_the_graph_says(tmp_path: Path, optimisation: str) -> None:
    runner = load("onnx", str(two_in_two_out(tmp_path / "m.onnx")), 1, optimisation=optimisation)
    assert [tuple(v) for v in runner.inputs] == [("x", (None, 4), "float32"), ("scale", (1, 6), "float32")]
    assert [v.name for v in runner.outputs] == ["scaled", "positive"]
    assert runner.version.startswith("onnxruntime 1.")
    agrees(runner)


def test_a_bound_call_gives_the_same_and_every_call_anew(tmp_path: Path) -> None:
    """What runs on a GPU is bound there; here to the CPU, which needs no other package."""
    import onnxruntime as ort

    path = two_in_two_out(tmp_path / "m.onnx")
    runner = load("onnx", str(path), 1)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (3, 5):
        want = runner.run(given(batch))
        call = bound(ort, session, given(batch), list(want), "cpu")
        for _ in range(2):
            for name, found in zip(want, call(), strict=True):
                np.testing.assert_array_equal(found.numpy(), want[name])


def test_a_provider_that_this_onnx_runtime_lacks_is_named(tmp_path: Path) -> None:
    path = two_in_two_out(tmp_path / "m.onnx")
    with pytest.raises(Missing, match=r"has no ROCMExecutionProvider; it has .*CPUExecutionProvider"):
        load("onnx", str(path), 1, providers=["ROCMExecutionProvider"])


@pytest.mark.skipif(not find_spec("openvino"), reason="needs the extra [openvino]")
def test_openvino_gives_the_same_under_the_same_names(tmp_path: Path) -> None:
    runner = load("openvino", str(two_in_two_out(tmp_path / "m.onnx")), 1)
    assert {v.name: v.shape for v in runner.inputs} == {"x": (None, 4), "scale": (1, 6)}
    assert [v.name for v in runner.outputs] == ["scaled", "positive"]
    agrees(runner)
    # It sends usage figures away when it is imported, unless this module cannot be. In a process of its own: here
    # another library may have come first.
    code = (
        "import sys; from compress.exporters.runtimes import load; load('openvino', sys.argv[1], 1);"
        "assert sys.modules.get('openvino_telemetry', 'loaded') is None"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.onnx")], check=True)


@pytest.mark.parametrize(("said", "held"), [(None, "1"), ("0", "0")])
def test_onnx_runtime_is_told_to_send_nothing_before_it_starts(said: str | None, held: str) -> None:
    """From 1.29 on it sends usage figures away, and keeps an id of the user, unless this is set when it is imported."""
    code = "import sys, compress, os; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    own = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    own |= {} if said is None else {"ORT_DISABLE_TELEMETRY": said}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [held, "False"]


@pytest.mark.skipif(not find_spec("MNN"), reason="needs the extra [mnn]")
def test_mnn_gives_the_same_and_leaves_standard_output_alone(tmp_path: Path, capfd: Any) -> None:
    from compress.exporters.mnn import FILE, export_mnn

    export_mnn(two_in_two_out(tmp_path / "m.onnx"), tmp_path)
    runner = load("mnn", str(tmp_path / FILE), 1)
    assert [v.name for v in runner.inputs] == ["x", "scale"]
    agrees(runner)
    assert capfd.readouterr().out == ""


def test_a_wrong_feed_is_named(tmp_path: Path) -> None:
    runner = load("onnx", str(two_in_two_out(tmp_path / "m.onnx")))
    feed = given()
    with pytest.raises(CannotRun, match="no value is given for the input scale"):
        runner.run({"x": feed["x"]})
    with pytest.raises(CannotRun, match="x is float32, and float64 was given"):
        runner.run({**feed, "x": feed["x"].astype(np.float64)})
    with pytest.raises(CannotRun, match=r"x has the shape \(None, 4\), and \(3, 5\) was given"):
        runner.run({**feed, "x": np.zeros((3, 5), np.float32)})


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no model at all")
    for form in ("onnx", *(["openvino"] if find_spec("openvino") else [])):
        with pytest.raises(CannotRun, match="cannot load broken"):
            load(form, str(tmp_path / "broken"))
    with pytest.raises(CannotRun, match="no file"):
        load("onnx", str(tmp_path / "absent"))
    with pytest.raises(CannotRun, match="no runtime for the format 'coreml'"):
        load("coreml", str(tmp_path / "broken"))


def test_a_runtime_that_is_not_installed_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Missing, match="needs tensorrt, which cannot be imported") as caught:
        load("tensorrt", str(tmp_path / "m"))
    assert "pip install tensorrt" in caught.value.fix


def test_it_runs_alone_and_is_python_39(tmp_path: Path) -> None:
    """On a device it lies without the package around it."""
    import ast

    source = Path(runtimes.__file__).read_text()
    ast.parse(source, feature_version=(3, 9))
    (tmp_path / "runtimes.py").write_text(source)
    two_in_two_out(tmp_path / "m.onnx")
    ask = (
        "import sys, runtimes, numpy as np\n"
        "r = runtimes.load('onnx', 'm.onnx')\n"
        "r.run({'x': np.ones((2, 4), 'float32'), 'scale': np.ones((1, 6), 'float32')})\n"
        "print(sorted(m for m in sys.modules if m in ('compress', 'torch', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr
