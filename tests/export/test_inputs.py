"""ONNX files from elsewhere: what their inputs may hold, inputs that are given, and who is at fault."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from compress.errors import CompressError, UsageError
from compress.exporters.bench import agent
from compress.exporters.bench.local import Local, measure_once, rows_of
from compress.exporters.formats import random_feed, read_graph
from compress.exporters.gate_measure import Measuring, whole_shapes
from compress.exporters.gate_models import find
from compress.exporters.inputs import read_inputs
from compress.exporters.ranges import index_ranges
from compress.run.cache import sha256_of
from tests.command import compress, one_error

pytestmark = pytest.mark.processes

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


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(folder with a smaller network, one with a larger, arrays for both)."""
    for name, words in (("a", 50), ("b", 200)):
        (tmp_path / name).mkdir()
        encoder(tmp_path / name / "model.onnx", words)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=ids % 2)
    return tmp_path / "a", tmp_path / "b", tmp_path / "x.npz"


def heard(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every measuring process was given: its request, and the arrays in the file that it names. One process is
    started for each file and shape; the others are told what it answered."""
    asked: list[dict[str, Any]] = []
    answers: dict[str, dict[str, Any]] = {}
    run = Local.run

    def told(self: Local, request: dict[str, Any]) -> dict[str, Any]:
        held = np.load(request["inputs"])
        asked.append({**request, "arrays": {n: held[n] for n in held.files}})
        key = f"{request['files']} {held[NAMES[0]].shape}"
        if key not in answers:
            answers[key] = run(self, {**request, "min_seconds": 0.01, "min_runs": 1, "sample_seconds": 0.001})
        return copy.deepcopy(answers[key])

    monkeypatch.setattr(Local, "run", told)
    return asked


def test_both_sides_of_a_bench_and_a_gate_get_the_same_arrays(
    given: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, file = given
    asked = heard(monkeypatch)
    ran = compress("bench", a, b, "--inputs", file, "--processes", 1, "--out", tmp_path / "bench", "--json")
    assert ran.code == 0, ran.err
    spec = json.loads(ran.out)["spec"]
    assert spec["inputs"]["sha256"] == sha256_of(file) and "batch" not in spec
    about = {n: (v["dtype"], v["shape"]) for n, v in spec["inputs"]["arrays"].items()}
    assert about == {n: ("int64", [2, 6]) for n in NAMES}
    assert json.loads((tmp_path / "bench" / "bench.json").read_text())["spec"]["inputs"] == spec["inputs"]
    budgets = ("-b", "latency<=9x", "--samples", 1, "--out", tmp_path / "gate")
    ran = compress("gate", a, b / "model.onnx", "--inputs", file, *budgets)
    assert ran.code in (0, 1, 3), ran.err
    record = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert record["spec"]["inputs"] == spec["inputs"]
    said = f"{file} (sha256 {sha256_of(file)[:12]}): input_ids int64 2x6, attention_mask int64 2x6"
    assert said in (tmp_path / "gate" / "summary.md").read_text()
    properties = ElementTree.parse(tmp_path / "gate" / "junit.xml").iter("property")
    assert any(p.get("name") == "inputs" and p.get("value", "").startswith(said) for p in properties)
    # A process that is given nothing would draw ids of its own.
    with np.load(file) as held:
        assert len(asked) >= 2 + 14 and all(
            np.array_equal(one["arrays"][n], held[n]) and one["arrays"][n].dtype == np.int64
            for one in asked
            for n in NAMES
        )


def test_a_gate_file_names_its_inputs_and_the_command_line_wins(
    given: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, file = given
    asked = heard(monkeypatch)
    gate = tmp_path / "gate.yaml"
    gate.write_text(f"budgets: ['latency<=9x']\nsamples: 1\ninputs: {file}\n")
    assert compress("gate", a, b, "--gate", gate).code in (0, 1, 3)
    assert asked and asked[0]["arrays"]["input_ids"].shape == (2, 6)
    asked.clear()
    row = np.zeros((1, 3), np.int64)
    np.savez(tmp_path / "y.npz", **{n: row for n in NAMES})
    assert compress("gate", a, b, "--gate", gate, "--inputs", tmp_path / "y.npz").code in (0, 1, 3)
    assert asked and all(one["arrays"]["input_ids"].shape == (1, 3) for one in asked)
    gate.write_text(f"budgets: ['latency<=9x']\ninputs: {file}\nbatch: 2\n")
    one_error(compress("gate", a, b, "--gate", gate), 2, "inputs have shapes of their own")


def test_inputs_that_do_not_fit_are_refused_by_export_bench_and_gate_alike(
    given: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    a, b, file = given
    wrong = tmp_path / "wrong.npz"
    ids = np.zeros((2, 6), np.int64)
    for change, what in (
        ({"input_ids": None}, "there is no array for input 'input_ids'"),
        ({"input_ids": ids + 0.5}, "input 'input_ids' is int64, the array float64"),
        ({"attention_mask": ids[:, :3]}, "input 'attention_mask' is batchxsequence, the array 2x3"),
        ({"token_type_ids": ids[:0]}, "input 'token_type_ids' is batchxsequence, the array 0x6"),
    ):
        np.savez(wrong, **{k: v for k, v in {**dict.fromkeys(NAMES, ids), **change}.items() if v is not None})
        for verb in (
            ("export", a, "--format", "ort", "--out", tmp_path / "no"),
            ("bench", a, b),
            ("gate", a, b, "-b", "latency<=9x"),
        ):
            one_error(compress(*verb, "--inputs", wrong), 2, what, f"--inputs {wrong}")
    one_error(compress("bench", a, b, "--inputs", file, "--batch", 2), 2, "--batch and --inputs do not go together")
    for shape in (("--batch", 2), ("--shape", "input_ids=1x8")):
        ran = compress("gate", a, b, "-b", "latency<=9x", "--inputs", file, *shape)
        one_error(ran, 2, "the arrays have shapes of their own")
    # An array that only one of the two takes.
    save(onnx.compose.add_prefix(onnx.load(b / "model.onnx"), "x").graph, b / "model.onnx")
    one_error(compress("gate", a, b, "-b", "latency<=9x", "--inputs", file), 2, "takes an input")
    one_error(compress("bench", a, b, "--inputs", file), 1, "the exports take other inputs", "xinput_ids")


def test_values_that_the_inputs_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["a"], ["y"], to=T.FLOAT), helper.make_node("Cast", ["b"], ["z"], to=T.FLOAT)]
    kinds = (("a", T.INT32), ("b", T.FLOAT))
    inputs = [helper.make_tensor_value_info(n, kind, [2]) for n, kind in kinds]
    outputs = [helper.make_tensor_value_info(n, T.FLOAT, [2]) for n in "yz"]
    graph = read_graph(save(helper.make_graph(nodes, "g", inputs, outputs), tmp_path / "a.onnx"))
    whole, part = np.array([1, 2]), np.array([0.5, 1.5])
    for change, what in (
        ({"a": whole + 2**31}, "'a' holds values that int32 cannot"),
        ({"b": part * 1e300}, "'b', as float32, holds NaN or infinity"),
        ({"b": part * np.nan}, "'b' holds NaN or infinity"),
    ):
        np.savez(tmp_path / "x.npz", **{"a": whole, "b": part, **change})
        with pytest.raises(UsageError) as e:
            read_inputs(tmp_path / "x.npz", graph)
        assert what in e.value.what


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
