"""Two small ONNX networks for the project's own gate: one, and the same with half of its channels gone.

    PYTHONPATH=. python tools/ci/models.py FOLDER

Half, not a quarter: ONNX Runtime computes channels in blocks of 16, so 24 of 32 are no faster (the gate says so).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from compress.system.files import whole_file


def chain(path: Path, layers: int, width: int = 32, size: int = 24, channels: int | None = None) -> Path:
    """A network of equal 3x3 convolutions, each with its ReLU; input (batch, channels, size, size), output ``width``.

    ``channels`` is ``width`` by default: then all layers cost the same.
    """
    channels = channels or width
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    weights, nodes, last, before = [], [], "input", channels
    for i in range(layers):
        values = draw.standard_normal((width, before, 3, 3)) / np.sqrt(9 * before)  # (out, in, 3, 3)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        last, before = f"r{i}", width
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", maps, size, size])]
        for name, maps in (("input", channels), (last, width))
    ]
    graph = helper.make_graph(nodes, "chain", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with whole_file(path) as partial:  # another process may be reading it
        onnx.save(model, partial)
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    chain(folder / "dense.onnx", 8, channels=3)
    chain(folder / "pruned.onnx", 8, width=16, channels=3)
