"""ONNX files from elsewhere: what their inputs may hold, inputs that are given, and who is at fault."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from compress.errors import CompressError, UsageError
from compress.exporters.bench import agent
from compress.exporters.bench.local import Local, measure_once, rows_of
from compress.exporters.command import read_inputs
from compress.exporters.formats import random_feed, read_graph
from compress.exporters.gate_run import Measuring, find, whole_shapes
from compress.exporters.ranges import index_ranges
from tests.command import compress, one_error

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def save(graph: Any, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def weights(**arrays: Any) -> list[Any]:
    return [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()]


def encoder(path: Path, words: int = 200, axes: tuple[Any, ...] = ("batch", "sequence")) -> Path:
    """BERT's three inputs: words, a mask, and segments of which there are two."""
    draw = np.random.default_rng(0).standard_normal
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids32"], to=T.INT32),
        helper.make_node("Gather", ["E", "ids32"], ["e"]),
        helper.make_node("Identity", ["token_type_ids"], ["types"]),
        helper.make_node("Gather", ["S", "types"], ["s"]),
        helper.make_node("Add", ["e", "s"], ["x"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=T.FLOAT),
        helper.make_node("Unsqueeze", ["m", "ax"], ["m3"]),
        helper.make_node("Mul", ["x", "m3"], ["xm"]),
        helper.make_node("MatMul", ["xm", "W"], ["logits"]),
    ]
    tables = {"E": draw((words, 16)), "S": draw((2, 16)), "W": draw((16, 4))}
    held = weights(**{k: v.astype(np.float32) for k, v in tables.items()}, ax=np.array([2]))
    inputs = [helper.make_tensor_value_info(n, T.INT64, axes) for n in NAMES]
    outputs = [helper.make_tensor_value_info("logits", T.FLOAT, [*axes, 4])]
    return save(helper.make_graph(nodes, "g", inputs, outputs, held), path)


def test_ranges_are_those_of_the_tables_that_inputs_are_places_in(tmp_path: Path) -> None:
    path = encoder(tmp_path / "a.onnx", 7)
    assert index_ranges(onnx.load(path).graph) == {"input_ids": 7, "token_type_ids": 2} == rows_of(path)
    drawn = [random_feed(read_graph(path), {"batch": 8, "sequence": 50}, seed) for seed in range(3)]
    for feed in drawn:
        assert set(np.unique(feed["input_ids"])) == set(range(7))
        assert set(np.unique(feed["token_type_ids"])) == {0, 1} and (feed["attention_mask"] == 1).all()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_axis_of_the_table_counts_and_a_one_hots_depth(axis: int, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["depth"], value=numpy_helper.from_array(np.array([5]))),
        helper.make_node("Gather", ["E", "a"], ["e"], axis=axis),
        helper.make_node("Reshape", ["b", "flat"], ["b1"]),
        helper.make_node("OneHot", ["b1", "depth", "ends"], ["o"]),
        helper.make_node("Gather", ["E", "b1"], ["e2"]),
        helper.make_node("Add", ["c", "c"], ["d"]),
        helper.make_node("Gather", ["E", "d"], ["e3"]),
    ]
    held = weights(E=np.zeros((9, 3), np.float32), flat=np.array([-1]), ends=np.array([0, 1]))
    inputs = [helper.make_tensor_value_info(n, T.INT64, [4]) for n in "abc"]
    outputs = [helper.make_tensor_value_info(n, T.FLOAT, None) for n in ("e", "o", "e2", "e3")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    assert index_ranges(graph) == {"a": 9 if axis == 0 else 3, "b": 5}, "c is behind arithmetic"


def test_an_encoder_of_three_inputs_is_exported_and_gated(tmp_path: Path) -> None:
    path = encoder(tmp_path / "a.onnx")
    words = ("--format", "ort", "--shape", "batch=2", "--shape", "sequence=8")
    ran = compress("export", path, *words, "--out", tmp_path / "ort")
    assert ran.code == 0 and "1 outputs agree" in ran.out, ran.err
    spec = Measuring(shapes={"input_ids": [1, 8]})
    assert whole_shapes(find(str(path)), spec) == {n: [1, 8] for n in NAMES}
    with pytest.raises(UsageError, match="the axis 'sequence' is 8 and 9"):
        whole_shapes(find(str(path)), Measuring(shapes={"input_ids": [1, 8], "attention_mask": [1, 9]}))
    budget = ("-b", "latency<=9x", "-b", "size<=1x", "--samples", 1)
    ran = compress("gate", path, path, *budget, "--shape", "input_ids=1x8")
    assert ran.code in (0, 3) and "size" in ran.out, ran.err


def test_what_is_measured_reads_the_whole_of_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of two rows alone would lie in a cache that no text's ids lie in."""
    path, asked = encoder(tmp_path / "a.onnx", 7), []

    class Told(Local):
        def run(self, request: dict[str, Any]) -> dict[str, Any]:
            asked.append(request)
            return super().run(request)

    spec = {"min_seconds": 0.01, "min_runs": 2, "shapes": {n: [8, 50] for n in NAMES}}
    assert measure_once(path, spec, transport=Told())["figures"]["latency"]["samples"]
    assert asked[0]["rows"] == {"input_ids": 7, "token_type_ids": 2}
    monkeypatch.syspath_prepend(str(Path(agent.__file__).parents[1]))  # as it lies on a device
    ports = [SimpleNamespace(name=n, shape=(None, None), dtype="int64") for n in NAMES]
    drawn = agent._feed(SimpleNamespace(inputs=ports), {**asked[0], "seed": 0})
    assert [int(drawn[n].max()) for n in NAMES] == [6, 1, 1]


def test_inputs_that_are_given_are_used_and_what_does_not_run_is_the_files_fault(tmp_path: Path) -> None:
    path = encoder(tmp_path / "a.onnx")
    ids = np.arange(12).reshape(2, 6)
    good: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids % 2}
    np.savez(tmp_path / "x.npz", **good)
    feed = read_inputs(tmp_path / "x.npz", read_graph(path))
    assert {n: v.tolist() for n, v in feed.items()} == {n: v.tolist() for n, v in good.items()}
    words = ("export", path, "--format", "ort", "--inputs", tmp_path / "x.npz", "--out", tmp_path / "ort")
    assert compress(*words).code == 0
    np.savez(tmp_path / "x.npz", **{**good, "token_type_ids": ids})
    one_error(compress(*words[:-1], tmp_path / "no"), 1, "the ONNX file itself does not run", "a.onnx", "--inputs")
    assert not (tmp_path / "no").exists()


def test_arrays_that_the_file_does_not_take_are_refused_by_name(tmp_path: Path) -> None:
    graph = read_graph(encoder(tmp_path / "a.onnx"))
    ids = np.zeros((2, 6), np.int64)
    good: dict[str, Any] = {n: ids for n in NAMES}
    for change, what in (
        ({"extra": ids}, "no input 'extra'"),
        ({"input_ids": None}, "no array for input 'input_ids'"),
        ({"input_ids": ids[0]}, "'input_ids' is batchxsequence, the array 6"),
        ({"input_ids": ids[:, :3]}, "'attention_mask' is batchxsequence, the array 2x6"),
        ({"input_ids": ids + 0.5}, "'input_ids' is int64, the array float64"),
        ({"input_ids": np.array([{}])}, "cannot be read"),
    ):
        np.savez(
            tmp_path / "x.npz", allow_pickle=True, **{k: v for k, v in {**good, **change}.items() if v is not None}
        )
        with pytest.raises(UsageError) as e:
            read_inputs(tmp_path / "x.npz", graph)
        assert what in e.value.what, e.value.what
    np.save(tmp_path / "one.npy", ids)
    for name, data in (("one.npy", None), ("cut.npz", b"PK\x03\x04x"), ("text.npz", b"words"), ("none.npz", None)):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=r"cannot be read|one array"):
            read_inputs(tmp_path / name, graph)


def test_free_axes_without_a_name_are_said_as_the_message_says(tmp_path: Path) -> None:
    path = encoder(tmp_path / "a.onnx", axes=(None, None))
    asked = ("export", path, "--format", "ort", "--out", tmp_path / "ort")
    ran = compress(*asked)
    one_error(ran, 2, "--shape input_ids.0=8")
    shapes = [w for n in NAMES for w in ("--shape", f"{n}.0=1", "--shape", f"{n}.1=8")]
    assert compress(*asked, *shapes).code == 0


def test_outputs_that_are_no_tensors_are_one_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("SequenceConstruct", ["x", "x"], ["y"])]
    given = [helper.make_tensor_value_info("x", T.FLOAT, [2])]
    made = [helper.make_tensor_sequence_value_info("y", T.FLOAT, None)]
    path = save(helper.make_graph(nodes, "g", given, made), tmp_path / "a.onnx")
    with pytest.raises(CompressError, match="'y' is a sequence, not a tensor"):
        read_graph(path)
