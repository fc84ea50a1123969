"""What differs is named: a weight that was changed in the file, a node that a converter gets wrong, a sliced layer."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from compress.errors import CompressError
from compress.exporters import bisect, formats, onnx_file, parity
from compress.exporters.formats import BuildOptions, Source, make, network_profiles, text_profiles
from compress.exporters.names import INPUT
from compress.exporters.onnx import DECODE, export_llm
from compress.exporters.onnx_module import _Outputs, export_module
from compress.exporters.runtimes import load
from compress.models.zoo import build
from tests.export.test_onnx import ragged
from tests.export.test_onnx_module import inputs

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet: two branches meet in every block."""
    folder = tmp_path_factory.mktemp("resnet")
    export_module(build("resnet", {"depth": 14, "width": 4, "classes": 3}, seed=0).eval(), inputs(2), ["y"], folder)
    return folder / "model.onnx"


def convolutions(path: Path) -> list[Any]:
    return [n for n in onnx.load(path).graph.node if n.op_type == "Conv"]


def changed(path: Path, target: Path, weight: str, factor: float = 1.5) -> Path:
    """The file with one number of ``weight`` changed."""
    model = onnx.load(path)
    tensor = next(i for i in model.graph.initializer if i.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    at = np.unravel_index(np.abs(values).argmax(), values.shape)
    values[at] *= factor
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("which", [0, 4, -1])
def test_a_changed_weight_is_found_among_all_nodes(branched: Path, tmp_path: Path, which: int) -> None:
    node = convolutions(branched)[which]
    other = changed(branched, tmp_path / "other.onnx", node.input[1])
    feed = {INPUT: inputs(2).numpy()}
    assert bisect.between_onnx(branched, branched, feed, 1e-6) == "no tensor that both files have differs"
    assert f"first at the node {node.name!r} (Conv)" in bisect.between_onnx(branched, other, feed, 1e-4)


@pytest.mark.parametrize("which", [1, 5, 10])
def test_a_node_that_is_built_wrong_is_found_by_cutting_the_graph(branched: Path, tmp_path: Path, which: int) -> None:
    """The builder here changes one weight wherever the node is in the cut graph: so would a converter with a fault."""
    node = convolutions(branched)[which]
    builds = []

    def run(cut: Path, feed: dict[str, Any]) -> Any:
        builds.append(cut)
        if node.input[1] in {i.name for i in onnx.load(cut).graph.initializer}:
            cut = changed(cut, tmp_path / "built.onnx", node.input[1], 3.0)
        return next(iter(load("onnx", str(cut)).run(feed).values()))

    found = bisect.first_node(branched, "y", {INPUT: inputs(2).numpy()}, 1e-4, run)
    assert found == f"first at the node {node.name!r} (Conv), whose inputs agree"
    assert len(builds) <= 12, "a search, not one build a node"


@pytest.mark.parametrize("form", ["openvino", "ort", "mnn"])
def test_a_wrong_artefact_stops_the_export_and_names_the_node(
    branched: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file the format is built from is corrupted on the way, as a faulty converter would; the real one runs it."""
    pytest.importorskip({"openvino": "openvino", "mnn": "MNN"}.get(form, "onnxruntime"))
    node = convolutions(branched)[6]
    module: Any = formats.module_of(formats.FORMATS[form])
    real = module.build

    def faulty(source: Source, folder: Path, options: BuildOptions) -> Any:
        path = source.path
        if node.input[1] in {i.name for i in onnx.load(path).graph.initializer}:
            path = changed(path, tmp_path / "faulty.onnx", node.input[1], 4.0)
        return real(Source(path), folder, options)

    monkeypatch.setattr(module, "build", faulty)
    source = Source(branched, feeds={"model": [{INPUT: inputs(2).numpy()}]})
    with pytest.raises(
        CompressError, match=f"first at the node {re.escape(repr(node.name))} .Conv., whose inputs agree"
    ):
        make(source, tmp_path / "out", BuildOptions(form, profiles=network_profiles(2)))
    assert not (tmp_path / "out").exists()


def test_a_changed_weight_of_a_language_model_is_found_in_decode(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    export_llm(ragged("llama"), tmp_path / "a")
    options = BuildOptions("onnx", profiles=text_profiles(8, 8))
    make(Source(tmp_path / "a"), tmp_path / "b", options)
    graph = onnx.load(tmp_path / "b" / DECODE)
    weights = {i.name for i in graph.graph.initializer}
    node = [n for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in weights][9]
    changed(tmp_path / "b" / DECODE, tmp_path / "b" / "changed.onnx", node.input[1], 8.0)
    (tmp_path / "b" / "changed.onnx").replace(tmp_path / "b" / DECODE)
    with pytest.raises(CompressError, match=f"decode.*first at the node {re.escape(repr(node.name))} .MatMul."):
        onnx_file.check(Source(tmp_path / "a"), tmp_path / "b", options)


def test_a_sliced_network_that_differs_names_the_layer() -> None:
    before = build("resnet", {"depth": 8, "width": 4, "classes": 3}, seed=0).eval()
    after = copy.deepcopy(before)
    x = inputs(3)
    assert parity.check_modules(before, after, x, ["y"], 1e-6, "slicing")["outputs"] == {"y": 0.0}
    layers = [(name, m) for name, m in after.named_modules() if isinstance(m, nn.Conv2d)]
    name, layer = layers[3]
    with torch.no_grad():
        layer.weight[0] *= 3
    with pytest.raises(CompressError, match=f"differs after slicing: y by .*first in the output of {re.escape(name)},"):
        parity.check_modules(before, after, x, ["y"], 1e-4, "slicing")


def channels(gone: bool) -> nn.Sequential:
    """Five of eight channels: the other three masked (zero weights, zero norm), or sliced away."""
    torch.manual_seed(0)
    first, norm, second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
    kept = [0, 2, 3, 5, 7]
    with torch.no_grad():
        dead = [c for c in range(8) if c not in kept]
        for p in (first.weight, first.bias, norm.weight, norm.bias):
            p[dead] = 0
        if gone:
            sliced, small, last = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)
            sliced.weight.copy_(first.weight[kept])
            sliced.bias.copy_(first.bias[kept])
            last.weight.copy_(second.weight[:, kept])
            last.bias.copy_(second.bias)
            first, norm, second = sliced, small, last
    return nn.Sequential(first, norm, nn.ReLU(), second).eval()


def test_channels_that_were_sliced_away_are_compared_with_those_that_were_masked() -> None:
    masked, sliced = channels(False), channels(True)
    x = inputs(4)
    assert max(parity.check_modules(masked, sliced, x, ["y"], 1e-5, "slicing")["outputs"].values()) < 1e-6
    for layer in (0, 3):
        wrong = copy.deepcopy(sliced)
        with torch.no_grad():
            wrong[layer].weight[1] *= -2
        with pytest.raises(CompressError, match=f"first in the output of {layer},"):
            parity.check_modules(masked, wrong, x, ["y"], 1e-4, "slicing")


def test_executorch_that_lowers_a_layer_wrong_is_found_by_that_layer(
    branched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the lowering cannot be had: the traced program has one weight changed before it is lowered."""
    pytest.importorskip("executorch")
    real = torch.export.export
    model = build("resnet", {"depth": 14, "width": 4, "classes": 3}, seed=0).eval()
    name = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][5]

    def faulty(module: Any, *given: Any, **more: Any) -> Any:
        program = real(module, *given, **more)
        if not isinstance(module, _Outputs):  # ExecuTorch's own passes trace their patterns
            return program
        key = next(k for k in program.state_dict if k.endswith(f"{name}.weight"))
        changed = program.state_dict[key].detach().clone()
        changed[0] *= 3
        program.state_dict[key] = nn.Parameter(changed)
        return program

    monkeypatch.setattr(torch.export, "export", faulty)
    source = Source(branched, model, {"model": [{INPUT: inputs(2).numpy()}]})
    with pytest.raises(CompressError, match=f"first in the output of {re.escape(name)},"):
        make(source, tmp_path / "out", BuildOptions("executorch", profiles=network_profiles(2)))


def test_a_graph_that_is_cut_keeps_what_its_branches_take_from_around_them(tmp_path: Path) -> None:
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "W")
    never = numpy_helper.from_array(np.array(False), "never")

    def branch(name: str) -> Any:
        node = onnx.helper.make_node("MatMul", ["doubled", "W"], [name])
        return onnx.helper.make_graph([node], name, [], [value(name, kind, None)])

    nodes = [
        onnx.helper.make_node("Add", ["x", "x"], ["doubled"]),
        onnx.helper.make_node("If", ["never"], ["chosen"], then_branch=branch("a"), else_branch=branch("b")),
        onnx.helper.make_node("Relu", ["chosen"], ["y"], name="last"),
    ]
    ends = [value("x", kind, ["batch", 4])], [value("y", kind, ["batch", 4])]
    graph = onnx.helper.make_graph(nodes, "g", *ends, [weight, never])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")

    def wrong(path: Path, feed: Any) -> Any:
        (got,) = load("onnx", str(path)).run(feed).values()
        return got + any(n.name == "last" for n in onnx.load(path).graph.node)

    feed = {"x": np.ones((2, 4), np.float32)}
    assert "first at the node 'last'" in bisect.first_node(tmp_path / "m.onnx", "y", feed, 1e-4, wrong)
