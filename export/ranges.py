"""What an ONNX graph allows of its whole-number inputs, read off where it uses them as places in a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Operators whose output holds the values of their first input, in another shape or type.
_SAME = frozenset(
    {
        "Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Slice", "Tile",
        "Gather", "Split",
    }
)  # fmt: skip


def index_ranges(graph: Any) -> dict[str, int]:
    """input -> how many rows the smallest table has that it is used as a place in: 0 to that less 1 may be asked for.

    Tables are the weights that a ``Gather`` reads and the depth of a ``OneHot``. An input that is used so nowhere, or
    only behind arithmetic, is not in the answer.
    """
    from onnx import numpy_helper

    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    values = {t.name: t for t in graph.initializer if len(t.dims) <= 1 and not t.external_data}
    for node in graph.node:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and tensor is not None:
            shapes[node.output[0]] = tuple(tensor.dims)
            values[node.output[0]] = tensor
    origins = {v.name: v.name for v in graph.input if v.name not in shapes}
    found: dict[str, int] = {}
    for node in graph.node:  # in the order in which they are run
        for name, rows in _asked(node, shapes, lambda n: numpy_helper.to_array(values[n]) if n in values else None):
            if name in origins:
                origin = origins[name]
                found[origin] = min(rows, found.get(origin, rows))
        if node.op_type in _SAME and node.input and node.input[0] in origins:
            origins |= dict.fromkeys(node.output, origins[node.input[0]])
    return {name: rows for name, rows in found.items() if rows > 0}


def _asked(node: Any, shapes: dict[str, tuple[int, ...]], value: Any) -> Iterator[tuple[str, int]]:
    """(name, rows): what a node uses as places, and in how many."""
    if node.op_type == "Gather" and node.input[0] in shapes:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        shape = shapes[node.input[0]]
        if -len(shape) <= axis < len(shape):
            yield node.input[1], int(shape[axis])
    elif node.op_type == "OneHot":
        depth = value(node.input[1])
        if depth is not None and depth.size == 1:
            yield node.input[0], int(depth.reshape(()))
