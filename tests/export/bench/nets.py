"""Small ONNX networks, written without torch: tests of transports need a file that runs, and nothing of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper


def conv_net(folder: Path, channels: int = 8, size: int = 16, seed: int = 0, layers: int = 2) -> Path:
    """folder/model.onnx: (batch, 3, size, size) -> (batch, 5): convolutions, a mean over the image, a product."""
    draw = np.random.default_rng(seed)
    nodes, held, last, width = [], [], "input", 3
    for i in range(layers):
        w = (draw.standard_normal((channels, width, 3, 3)) / np.sqrt(9 * width)).astype(np.float32)
        held.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"))
        last, width = f"r{i}", channels
    head = draw.standard_normal((channels, 5)).astype(np.float32)
    held.append(numpy_helper.from_array(head, "head"))
    nodes.append(helper.make_node("ReduceMean", [last], ["mean"], "mean", axes=[2, 3], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["mean", "head"], ["classes"], "head"))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("classes", onnx.TensorProto.FLOAT, ["batch", 5])],
        held,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder
