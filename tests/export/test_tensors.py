"""The one walk over a model's tensors: what it finds, which files it takes, and which it refuses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.errors import CompressError
from compress.exporters import formats, runtimes
from compress.exporters.bench.transport import artefact, folder_name
from compress.exporters.bisect import tensors as every_tensor
from compress.exporters.formats import BuildOptions, Source, make
from compress.exporters.gate_models import find
from compress.exporters.onnx_module import input_shape
from compress.exporters.ort import session
from compress.exporters.tensors import files, gather, read, size, walk
from tests.command import compress, one_error

W = np.random.default_rng(3).standard_normal((32, 32)).astype(np.float32)
BYTES = W.nbytes
value = helper.make_tensor_value_info


def tensor(name: str, factor: float = 1.0) -> Any:
    return numpy_helper.from_array(W * np.float32(factor), name)


def matmul(weight: str, out: str = "y") -> Any:
    return helper.make_node("MatMul", ["x", weight], [out], name=f"by {weight}")


def branch(name: str) -> Any:
    graph = [matmul(f"w{name}", f"o{name}")], name, [], [value(f"o{name}", TensorProto.FLOAT, None)]
    return helper.make_graph(*graph, [tensor(f"w{name}", 2.0 if name == "else" else 1.0)])


def model(kind: str) -> Any:
    """A network of one input whose weights stand in one kind of place."""
    nodes, weights, sparse, functions = [matmul("W")], [], [], []
    if kind == "initialiser":
        weights = [tensor("W")]
    elif kind == "constant":
        nodes = [helper.make_node("Constant", [], ["W"], value=tensor("W")), *nodes]
    elif kind == "branches":
        limit = numpy_helper.from_array(np.array(1e3, np.float32), "limit")  # ones stay below
        test = [
            helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
            helper.make_node("Greater", ["s", "limit"], ["c"]),
        ]
        both = {"then_branch": branch("then"), "else_branch": branch("else")}
        nodes, weights = [*test, helper.make_node("If", ["c"], ["y"], **both)], [limit]
    elif kind == "function":
        inner = [helper.make_node("Constant", [], ["W"], value=tensor("W")), matmul("W")]
        functions = [helper.make_function("own", "Layer", ["x"], ["y"], inner, [helper.make_opsetid("", 17)])]
        nodes = [helper.make_node("Layer", ["x"], ["y"], domain="own")]
    elif kind == "sparse":
        places = numpy_helper.from_array(np.arange(W.size, dtype=np.int64), "at")
        flat = numpy_helper.from_array(W.reshape(-1), "W")
        sparse = [helper.make_sparse_tensor(flat, places, [32, 32])]
    ends = [value("x", TensorProto.FLOAT, ["batch", 32])], [value("y", TensorProto.FLOAT, ["batch", 32])]
    graph = helper.make_graph(nodes, "g", *ends, weights, sparse_initializer=sparse)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def apart(made: Any, path: Path, location: str = "net.data", base: int = 0) -> Path:
    """Writes the model with every tensor of over 1,000 bytes in a file, by ONNX's messages alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = bytearray(base)

    def move(one: Any) -> None:
        if len(one.raw_data) > 1000:
            one.external_data.add(key="location", value=location)
            one.external_data.add(key="offset", value=str(len(data)))
            one.external_data.add(key="length", value=str(len(one.raw_data)))
            data.extend(one.raw_data)
            one.ClearField("raw_data")
            one.data_location = TensorProto.EXTERNAL

    def graph(g: Any) -> None:
        for one in (*g.initializer, *(t for s in g.sparse_initializer for t in (s.values, s.indices))):
            move(one)
        nodes(g.node)

    def nodes(found: Any) -> None:
        for attribute in (a for n in found for a in n.attribute):
            if attribute.HasField("t"):
                move(attribute.t)
            if attribute.HasField("g"):
                graph(attribute.g)

    graph(made.graph)
    for function in made.functions:
        nodes(function.node)
    target = path.parent / location
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(bytes(data))
    path.write_bytes(made.SerializeToString())
    return path


KINDS = {"initialiser": 1, "constant": 1, "branches": 2, "function": 1, "sparse": 3}  # of W's bytes; int64 are double


@pytest.mark.parametrize("kind", KINDS)
def test_weights_count_as_size_wherever_they_stand(kind: str, tmp_path: Path) -> None:
    path = apart(model(kind), tmp_path / "net.onnx")
    assert {p.name for p in files(path)} == {"net.onnx", "net.data"}
    found = find(str(path))
    assert found.bytes == path.stat().st_size + KINDS[kind] * BYTES
    assert artefact(path).bytes == found.bytes and set(artefact(path).hashes()) == {"net.onnx", "net.data"}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_missing_or_cut_short_are_named_wherever_they_stand(kind: str, tmp_path: Path) -> None:
    path = apart(model(kind), tmp_path / "net.onnx")
    data = tmp_path / "net.data"
    data.write_bytes(data.read_bytes()[:-1])
    for door in (files, lambda p: find(str(p)), artefact, lambda p: session(p, 1), formats.read_graph):
        with pytest.raises(CompressError, match=r"weights of net\.onnx are cut short") as caught:
            door(path)
        assert caught.value.where == str(data)
    data.unlink()
    with pytest.raises(CompressError, match=r"weights of net\.onnx are missing"):
        find(str(path))


def test_the_walk_finds_each_tensor_that_onnx_can_hold() -> None:
    training = onnx.TrainingInfoProto()
    training.algorithm.initializer.append(tensor("trained"))
    whole = model("branches")
    whole.training_info.append(training)
    whole.functions.extend(model("function").functions)
    whole.graph.sparse_initializer.extend(model("sparse").graph.sparse_initializer)
    several = helper.make_node("Own", ["x"], ["z"], name="several", domain="own")
    several.attribute.append(helper.make_attribute("tensors", [tensor("first"), tensor("second")]))
    several.attribute.append(helper.make_attribute("graphs", [branch("inner")]))
    sparse = onnx.SparseTensorProto(values=tensor("sparse value"), dims=[32, 32])
    several.attribute.append(helper.make_attribute("sparse", sparse))
    unnamed = helper.make_node("Constant", [], ["made"], value=numpy_helper.from_array(W))
    whole.graph.node.extend([several, unnamed])
    names = [held.name for held in walk(whole)]
    wanted = ["limit", "wthen", "welse", "W", "at", "trained", "W", "first", "second", "winner"]
    assert sorted(names) == sorted([*wanted, "sparse value", "made"])
    assert {h.name for h in walk(whole) if h.initialiser} == {"limit", "wthen", "welse", "winner", "trained"}


def test_a_file_counts_once_however_often_and_by_whatever_name_it_is_named(tmp_path: Path) -> None:
    made = model("branches")
    path = apart(made, tmp_path / "net.onnx")
    graphs = [a.g for n in made.graph.node for a in n.attribute if a.HasField("g")]
    graphs[0].initializer[0].external_data[0].value = "./net.data"
    os.link(tmp_path / "net.data", tmp_path / "again.data")
    graphs[1].initializer[0].external_data[0].value = "again.data"
    path.write_bytes(made.SerializeToString())
    assert {p.name for p in files(path)} == {"net.onnx", "net.data", "again.data"}  # both must be on a device
    assert find(str(path)).bytes == path.stat().st_size + 2 * BYTES == size(files(path))


def at(path: Path, made: Any, **entries: str | None) -> Path:
    """The model with other words about where its one weight lies."""
    (weight,) = made.graph.initializer
    kept = {e.key: e.value for e in weight.external_data} | entries
    del weight.external_data[:]
    for key, text in kept.items():
        if text is not None:
            weight.external_data.add(key=key, value=text)
    path.write_bytes(made.SerializeToString())
    return path


LEAVING = [
    "../secret", "sub/../../secret", "sub/../net.data", "/etc/passwd", "SECRET", "..", "..\\secret", "C:\\secret",
    "c:secret", "sub\\net.data", "\\\\host\\share", "net.data\0", "net\n.data", "*/_ORT_MEM_ADDR_/*",
]  # fmt: skip


def doors(path: Path) -> list[Callable[[], Any]]:
    """All that reads a graph, or hands it to a runtime."""
    folder = path.parent
    return [
        lambda: read(path),
        lambda: files(path),
        lambda: formats.read_graph(path),
        lambda: find(str(path)),
        lambda: find(str(folder)),
        lambda: artefact(path),
        lambda: artefact(folder),
        lambda: session(path, 1),
        lambda: every_tensor(path, {}),
        lambda: input_shape(folder),
        lambda: make(Source(path), folder.parent / "out", BuildOptions("ort")),
        lambda: make(Source(folder), folder.parent / "out", BuildOptions("onnx", "int8-weights")),
    ]


@pytest.mark.parametrize("location", LEAVING)
def test_a_place_outside_the_graphs_folder_is_refused_at_every_door(location: str, tmp_path: Path) -> None:
    made = model("initialiser")
    path = apart(made, tmp_path / "net" / "model.onnx")
    shutil.copy(tmp_path / "net" / "net.data", tmp_path / "secret")
    (tmp_path / "net" / "sub").mkdir()
    location = location.replace("SECRET", str(tmp_path / "secret"))
    at(path, made, location=location)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for door in doors(path):
        with pytest.raises(CompressError, match=r"the tensor 'W' keeps its values outside the folder of") as caught:
            door()
        assert repr(location) in caught.value.what and caught.value.where == str(path)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_may_leave_the_folder_wherever_it_stands(kind: str, tmp_path: Path) -> None:
    path = apart(model(kind), tmp_path / "net" / "model.onnx", location="../secret")
    for door in doors(path):
        with pytest.raises(CompressError, match="outside the folder"):
            door()


def test_links_that_leave_the_folder_are_refused_and_those_within_are_not(tmp_path: Path) -> None:
    made = model("initialiser")
    path = apart(made, tmp_path / "net" / "model.onnx", location="sub/net.data")
    away = tmp_path / "away"
    (tmp_path / "net" / "sub").rename(away)
    for link, target in (("sub", "../away"), ("sub", str(away))):  # a folder that is a link
        (tmp_path / "net" / link).symlink_to(target)
        for door in doors(path):
            with pytest.raises(CompressError, match=r"'W' .* 'sub/net.data', a link to .*away/net.data"):
                door()
        (tmp_path / "net" / link).unlink()
    (tmp_path / "net" / "sub").mkdir()
    (tmp_path / "net" / "sub" / "net.data").symlink_to("../../away/net.data")
    with pytest.raises(CompressError, match="a link to"):
        find(str(path))
    shutil.copy(away / "net.data", tmp_path / "net" / "real")
    (tmp_path / "net" / "sub" / "net.data").unlink()
    (tmp_path / "net" / "sub" / "net.data").symlink_to("../real")
    assert find(str(path)).bytes == path.stat().st_size + BYTES
    (tmp_path / "net" / "real").unlink()
    (tmp_path / "net" / "real").symlink_to("real")  # a ring
    with pytest.raises(CompressError, match="missing"):
        find(str(path))


def test_a_graph_in_the_hubs_cache_takes_the_blobs_of_its_own_repository_alone(tmp_path: Path) -> None:
    hub = tmp_path / "models--org--name"
    snapshot = hub / "snapshots" / "0123" / "onnx"
    made = model("initialiser")
    path = apart(made, snapshot / "model.onnx")
    (hub / "blobs").mkdir()
    for name, blob in (("model.onnx", "aaa"), ("net.data", "bbb")):
        (snapshot / name).rename(hub / "blobs" / blob)
        (snapshot / name).symlink_to(f"../../../blobs/{blob}")
    x = np.ones((2, 32), np.float32)
    assert np.allclose(session(path, 1).run(None, {"x": x})[0], x @ W, atol=1e-4)
    assert find(str(path)).bytes == path.stat().st_size + BYTES
    facts = make(Source(path), tmp_path / "out", BuildOptions("onnx", fusions="basic"))
    assert np.allclose(ran(facts, tmp_path / "out"), x @ W, atol=1e-4)
    done = compress("bench", snapshot, snapshot, "--processes", 1)
    assert done.code == 0, done.err
    # Another repository's blobs, or a folder of that name elsewhere, are outside.
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(hub / "blobs" / "bbb", other / "bbb")
    for place in ("../../../../models--org--other/blobs/bbb", str(other / "bbb")):
        (snapshot / "net.data").unlink()
        (snapshot / "net.data").symlink_to(place)
        with pytest.raises(CompressError, match="outside the folder"):
            find(str(path))
    (snapshot / "net.data").unlink()
    (snapshot / "net.data").symlink_to("../../../blobs/bbb")
    hub.rename(tmp_path / "downloaded")  # not laid out by the hub's client
    with pytest.raises(CompressError, match="outside the folder"):
        find(str(tmp_path / "downloaded" / "snapshots" / "0123" / "onnx" / "model.onnx"))


def ran(facts: dict[str, Any], folder: Path) -> Any:
    """What a built network gives for ones."""
    path = folder / f"model.{facts['format']}"
    return runtimes.load("onnx", str(path)).run({"x": np.ones((2, 32), np.float32)})["y"]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"location": "sub"}, "are no file: the tensor 'W' names 'sub'"),
        ({"location": "."}, "are no file"),
        ({"location": "pipe"}, "are no file"),
        ({"location": ""}, "names no file"),
        ({"location": None}, "names no file"),
        ({"location": "n" * 300}, "are missing"),
        ({"location": "net.data/x"}, "are missing"),
        ({"offset": "-1"}, "the offset '-1', which is no number of bytes"),
        ({"offset": "1e3"}, "which is no number of bytes"),
        ({"length": "many"}, "the length 'many'"),
        ({"length": "10"}, "is said to take 10 bytes; its shape and type need 4,096"),
        ({"offset": "64"}, "are cut short: 4,160 bytes are needed, 4,096 are there"),
        ({"length": None, "offset": "1"}, "are cut short: 4,097"),
        ({"length": "9223372036854775807"}, "are cut short"),
    ],
)
def test_words_about_a_place_that_make_no_sense_are_one_error(
    entries: dict[str, str | None], said: str, tmp_path: Path
) -> None:
    made = model("initialiser")
    path = apart(made, tmp_path / "model.onnx")
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    at(path, made, **entries)
    with pytest.raises(CompressError, match=said):
        find(str(path))


def test_a_place_that_is_said_twice_is_refused(tmp_path: Path) -> None:
    made = model("initialiser")
    path = apart(made, tmp_path / "model.onnx")
    made.graph.initializer[0].external_data.add(key="location", value="other.data")
    path.write_bytes(made.SerializeToString())
    with pytest.raises(CompressError, match="the tensor 'W' names its location twice"):
        find(str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_gives_the_same_and_holds_no_byte_twice(kind: str, tmp_path: Path) -> None:
    path = apart(model(kind), tmp_path / "a" / "net.onnx", "deep/down/all.data", base=5000)
    (tmp_path / "b").mkdir()
    gather(path, tmp_path / "b" / "copy.onnx")
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    want, got = (
        onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for p in (path, tmp_path / "b" / "copy.onnx")
    )
    assert np.array_equal(want, got)
    there = sum(p.stat().st_size for p in (tmp_path / "b").iterdir())
    assert {p.name for p in (tmp_path / "b").iterdir()} <= {"copy.onnx", "copy.data"}
    assert KINDS[kind] * BYTES <= there < KINDS[kind] * BYTES + 3000


def test_bytes_that_two_tensors_share_are_copied_once(tmp_path: Path) -> None:
    made = model("branches")
    graphs = [a.g for n in made.graph.node for a in n.attribute if a.HasField("g")]
    path = apart(made, tmp_path / "net.onnx")
    for entry, twin in zip(*(g.initializer[0].external_data for g in graphs), strict=True):
        twin.value = entry.value
    path.write_bytes(made.SerializeToString())
    gather(path, tmp_path / "copy.onnx")
    assert (tmp_path / "copy.data").stat().st_size == BYTES


@pytest.mark.parametrize("kind", ["initialiser", "constant", "branches", "function"])
@pytest.mark.parametrize(
    "options",
    [BuildOptions("onnx"), BuildOptions("onnx", fusions="basic"), BuildOptions("onnx", fusions="all"),
     BuildOptions("ort"), BuildOptions("onnx", "fp16")],
    ids=["plain", "basic", "all", "ort", "fp16"],
)  # fmt: skip
def test_weights_in_folders_and_in_nodes_are_exported_and_nothing_is_left_over(
    kind: str, options: BuildOptions, tmp_path: Path
) -> None:
    if kind in ("branches", "function") and options.precision == "fp16":
        pytest.skip("a graph within a graph is not cast, and says so")
    path = apart(model(kind), tmp_path / "net.onnx", "deep/all.data")
    facts = make(Source(path), tmp_path / "out", options)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} <= {
        "model.onnx", "model.data", "model.ort", "required_operators.config", "onnx.json", "ort.json",
    }  # fmt: skip
    assert set(facts["bytes"]) == {p.name for p in out.iterdir() if p.suffix != ".json"}
    most = (1 + 0.2) * KINDS[kind] * BYTES + 3000
    assert sum(facts["bytes"].values()) < most, "the bytes are there twice"
    assert np.allclose(ran(facts, out), (2 if kind == "branches" else 1) * np.ones((2, 32)) @ W, atol=2e-2)


def test_an_old_weights_file_is_not_left_beside_the_new_one(tmp_path: Path) -> None:
    path = apart(model("initialiser"), tmp_path / "in" / "net.onnx", "net.data")
    for fusions in ("none", "basic", "all"):
        out = tmp_path / fusions
        facts = make(Source(path), out, BuildOptions("onnx", fusions=fusions))
        assert sum(facts["bytes"].values()) < 1.5 * BYTES and "net.data" not in facts["bytes"]


def test_openvino_takes_weights_from_folders_and_nodes(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    for kind in ("initialiser", "constant"):
        path = apart(model(kind), tmp_path / kind / "net.onnx", "deep/all.data")
        facts = make(Source(path), tmp_path / f"out-{kind}", BuildOptions("openvino"))
        assert facts["parity"]["outputs"]["model.y"] < 1e-5


@pytest.mark.parametrize(
    ("form", "name", "weights"), [("openvino", "m.xml", "m.bin"), ("mnn", "m.mnn", "m.mnn.weight")]
)
def test_weights_of_other_formats_count_and_may_not_leave_the_folder_either(
    form: str, name: str, weights: str, tmp_path: Path
) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / name).write_bytes(b"graph")
    assert artefact(folder / name).bytes == 5
    (folder / weights).write_bytes(bytes(100))
    (folder / "other.bin").write_bytes(bytes(1000))
    made = artefact(folder / name)
    assert (made.format, made.bytes, set(made.hashes())) == (form, 105, {name, weights})
    (tmp_path / "secret").write_bytes(b"s")
    (folder / weights).unlink()
    (folder / weights).symlink_to("../secret")
    with pytest.raises(CompressError, match=f"lie outside its folder: {weights} is a link to .*secret"):
        artefact(folder / name)


def test_weights_in_a_folder_are_not_brought_to_a_device_in_part(tmp_path: Path) -> None:
    path = apart(model("initialiser"), tmp_path / "model.onnx", "deep/all.data")
    with pytest.raises(CompressError, match="weights in a folder below the graph are not brought to a device"):
        folder_name(artefact(path).files)


def test_the_command_line_refuses_a_stranger_that_reads_elsewhere(tmp_path: Path) -> None:
    made = model("initialiser")
    good = apart(made, tmp_path / "good" / "model.onnx")
    bad = apart(made := model("initialiser"), tmp_path / "bad" / "model.onnx")
    at(bad, made, location="../good/net.data")
    said = "the tensor 'W' keeps its values outside the folder of model.onnx: '../good/net.data'"
    one_error(compress("gate", good, bad, "-b", "size<=2x"), 2, said, str(bad))
    one_error(compress("gate", bad.parent, good.parent, "-b", "latency<=2x"), 2, said)
    one_error(compress("bench", good.parent, bad.parent, "--processes", 1), 1, said)
    one_error(compress("export", bad, "--format", "ort", "--out", tmp_path / "out"), 1, said)
    one_error(compress("export", bad.parent, "--format", "onnx", "--out", tmp_path / "out"), 1, said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "good"]
