"""ONNX files from elsewhere: inputs of no dimension, of other types, of no value and of too many; NaN and infinity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import CompressError, UsageError
from compress.exporters import runtimes
from compress.exporters.bisect import largest_difference
from compress.exporters.formats import random_feed, read_graph
from compress.models.reading import load_config
from compress.models.sources import resolve
from compress.run.strict_json import read_json
from compress.run.tensor_files import load_tensors
from tests.command import compress, one_error

pytestmark = pytest.mark.processes
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"


def saved(path: Path, nodes: list[onnx.NodeProto], **inputs: tuple[int, list[int | str | None]]) -> Path:
    """A graph that gives ``y`` (float, of the first input's shape) of these inputs, each a type and a shape."""
    given = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    out = [helper.make_tensor_value_info("y", FLOAT, next(iter(inputs.values()))[1])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", given, out), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.save(model, path)
    return path


def scaled(path: Path) -> Path:
    """x times a sampling rate: an integer of no dimension."""
    cast = helper.make_node("Cast", ["rate"], ["r"], to=FLOAT)
    return saved(path, [cast, helper.make_node("Mul", ["x", "r"], ["y"])], x=(FLOAT, [2]), rate=(INT64, []))


@pytest.mark.parametrize("form", ["ort", "openvino", "mnn"])
def test_an_input_of_no_dimension_is_one_number(form: str, tmp_path: Path) -> None:
    path = scaled(tmp_path / "net.onnx")
    assert random_feed(read_graph(path), {})["rate"].shape == ()
    np.savez(tmp_path / "x.npz", x=np.array([1, 2], np.float32), rate=np.array(16_000))
    for given in ((), ("--inputs", tmp_path / "x.npz")):
        ran = compress("export", path, *given, "--format", form, "--out", tmp_path / f"out{len(given)}", "--json")
        assert ran.code == 0, ran.err


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.BFLOAT16])
def test_an_input_of_a_type_that_no_array_has_is_named(kind: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "net.onnx", [helper.make_node("Cast", ["x"], ["y"], to=FLOAT)], x=(kind, [2]))
    np.savez(tmp_path / "x.npz", x=np.zeros(2, np.float32))
    for given in ((), ("--inputs", tmp_path / "x.npz")):
        ran = compress("export", path, *given, "--format", "openvino", "--out", tmp_path / "out")
        one_error(ran, ran.code, "the input 'x' is ", "such array")
    ran = compress("gate", path, path, "-b", "latency<=2x")
    one_error(ran, 2, "input 'x' is ", "numbers are measured")


def test_inputs_that_no_memory_holds_are_refused_before_one_is_made(tmp_path: Path) -> None:
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    free = read_graph(saved(tmp_path / "free.onnx", relu, x=(FLOAT, ["n", 16])))
    with pytest.raises(UsageError, match="inputs of these shapes take 64,000,000,000,000 bytes"):
        random_feed(free, {"n": 10**12})
    assert random_feed(free, {"n": 3})["x"].shape == (3, 16)
    fixed = read_graph(saved(tmp_path / "fixed.onnx", relu, x=(FLOAT, [10**6, 10**6])))
    with pytest.raises(UsageError, match="take 4,000,000,000,000 bytes"):
        random_feed(fixed, {})
    none = read_graph(saved(tmp_path / "none.onnx", relu, x=(FLOAT, [0, 16])))
    with pytest.raises(UsageError, match="the input 'x' is 0x16, which is no value at all"):
        random_feed(none, {})


def test_nan_that_the_file_itself_gives_is_not_blamed_on_what_is_built(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.onnx", [helper.make_node("Log", ["x"], ["y"])], x=(FLOAT, [4]))
    ran = compress("export", path, "--format", "ort", "--out", tmp_path / "out")
    one_error(ran, 1, "the ONNX file itself gives NaN in its output 'y'", "net.onnx", "--inputs")
    # An infinity that both give is no difference.
    np.savez(tmp_path / "x.npz", x=np.array([1, 2, 0, 3], np.float32))
    ran = compress("export", path, "--inputs", tmp_path / "x.npz", "--format", "ort", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err


def test_a_name_that_no_runtime_opens_is_said_so(tmp_path: Path) -> None:
    path = scaled(tmp_path / "net.onnx")
    odd = tmp_path / "n\udcff.onnx"
    odd.write_bytes(path.read_bytes())
    for model, out in ((odd, tmp_path / "out"), (path, tmp_path / "o\udcff")):
        ran = compress("export", model, "--format", "ort", "--out", out)
        one_error(ran, 2, "the name is not UTF-8", "rename it")
    with pytest.raises(runtimes.CannotRun, match="its name is not UTF-8"):
        runtimes.load("onnx", str(odd))


def test_a_difference_is_relative_to_what_is_finite() -> None:
    inf, nan = np.inf, np.nan
    one = np.array([2.0, -inf, inf])
    assert largest_difference(one, one) == 0
    assert largest_difference(one, np.array([1.0, -inf, inf])) == 0.5
    for other in ([2.0, inf, inf], [2.0, 0.0, inf]):
        assert largest_difference(one, np.array(other)) == inf
    assert np.isnan(largest_difference(one, np.array([nan, -inf, inf])))
    assert np.isnan(largest_difference(np.array([nan]), np.array([nan])))


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    """What a clone without Git LFS has in the place of weights, ONNX files and tokenizers."""

    def refused(read: object, *words: object) -> None:
        with pytest.raises(CompressError, match="a pointer of Git LFS is in its place") as e:
            read(*words)  # type: ignore[operator]
        assert "git lfs pull" in e.value.fix

    for name in ("config.json", "net.onnx", "w.safetensors", "m.gguf"):
        (tmp_path / name).write_text(POINTER)
    refused(load_config, tmp_path)
    refused(read_json, tmp_path / "config.json", "the file")
    refused(load_tensors, tmp_path / "w.safetensors", "the weights")
    refused(read_graph, tmp_path / "net.onnx")
    refused(lambda: load_config(resolve(str(tmp_path / "m.gguf")).folder))
