"""An ONNX file in float16 or bfloat16, with what would overflow or lose its meaning kept in float32.

Inputs and outputs stay float32, so any caller can run the file and it can be compared with the one before. Kept in
float32: squares, means, roots and sums of normalisations (a hidden state of 300 squared is over float16's 65,504), and
everything that leads to a sine or cosine (a position times a frequency has 10 bits in float16).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError

KEEP = frozenset(
    {
        "Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "Sqrt", "Reciprocal", "Exp",
        "Log", "Cos", "Sin", "Range", "CumSum", "LayerNormalization", "RMSNormalization", "InstanceNormalization",
        "GroupNormalization", "BatchNormalization", "Resize", "Upsample", "Einsum",
    }
)  # fmt: skip
NAMES = {"fp16": "float16", "bf16": "bfloat16"}
LOWEST = {"fp16": 65504.0, "bf16": 3.38e38}


def cast_file(source: Path, target: Path, precision: str) -> dict[str, int]:
    """Writes ``target`` from the ONNX file ``source``, its weights beside it where the source has them so.

    Args:
        precision: ``fp16`` or ``bf16``.

    Returns:
        ``{"cast": nodes that compute in it, "kept": nodes that stay in float32}``.

    Raises:
        CompressError: the graph has parts whose types cannot be told.
    """
    import onnx_ir as ir

    model = ir.load(source)
    external = any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())
    counts = cast(model, precision, str(source))
    ir.save(model, target, external_data=f"{target.stem}.data" if external else None)
    return counts


def cast(model: Any, precision: str, where: str) -> dict[str, int]:
    """Changes an onnx_ir model in place, see `cast_file`."""
    import onnx_ir as ir

    graph = model.graph
    low = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16
    _infer_types(model, where)
    kept = _kept(graph)
    low_values: set[Any] = set()  # outputs that come in the low precision
    casts: dict[tuple[Any, Any], Any] = {}
    lowered: dict[Any, Any] = {}
    counts = {"cast": 0, "kept": 0}

    def as_type(value: Any, want: Any, before: Any) -> Any:
        """``value`` in ``want``; a weight is converted, anything else goes through a Cast node behind its producer."""
        if value.is_initializer() and want == low:
            if value not in lowered:
                lowered[value] = _low_initializer(graph, value, low, precision)
            return lowered[value]
        if (value, want) not in casts:
            node = ir.node("Cast", [value], attributes={"to": want}, num_outputs=1)
            node.outputs[0].name = f"{value.name}.{want.name.lower()}"
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(want), value.shape
            node.name = f"cast {value.name} to {want.name.lower()}"
            producer = value.producer()
            if producer is None:
                graph.insert_before(first, node)
            else:
                graph.insert_after(producer, node)
            casts[value, want] = node.outputs[0]
        return casts[value, want]

    nodes = list(graph)
    first = nodes[0]
    for node in nodes:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise CompressError(
                f"{node.op_type} {node.name!r} holds a graph of its own, which is not cast to {precision}",
                where=where,
                fix="use precision fp32",
            )
        inside = node not in kept
        floats = [v is not None and _is_float(v) for v in node.inputs]
        makes = any(_is_float(v) for v in node.outputs)
        if node.op_type == "Cast":
            inside = inside and node.attributes["to"].value == ir.DataType.FLOAT
            if inside:
                node.attributes["to"] = ir.AttrInt64("to", int(low))
        elif node.op_type in ("Constant", "ConstantOfShape"):
            inside = inside and makes
            if inside:
                _low_constant(node, low, precision)
        else:
            inside = inside and (makes or any(floats))
            for i, (value, is_float) in enumerate(zip(node.inputs, floats, strict=True)):
                if not is_float:
                    continue
                have = low if value in low_values else ir.DataType.FLOAT
                want = low if inside else ir.DataType.FLOAT
                # What only tells positions apart (Resize's scales) stays as the operator wants it.
                if have != want:
                    node.replace_input_with(i, as_type(value, want, node))
        if inside and makes:
            for value in node.outputs:
                if _is_float(value):
                    value.type = ir.TensorType(low)
                    low_values.add(value)
        if makes:
            counts["cast" if inside else "kept"] += 1
    for i, value in enumerate(list(graph.outputs)):
        if value not in low_values:
            continue
        name, shape = value.name, value.shape
        value.name = f"{name}.{NAMES[precision]}"
        node = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, num_outputs=1)
        node.name, node.outputs[0].name = f"cast {name} back", name
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), shape
        graph.append(node)
        graph.outputs[i] = node.outputs[0]
    for value in lowered:
        if not value.uses():
            graph.initializers.pop(value.name)
    return counts


def _is_float(value: Any) -> bool:
    import onnx_ir as ir

    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _kept(graph: Any) -> set[Any]:
    """Nodes that stay in float32: of a kind in KEEP, or before a sine or cosine."""
    kept = {node for node in graph if node.op_type in KEEP}
    todo = [node for node in graph if node.op_type in ("Cos", "Sin")]
    while todo:
        node = todo.pop()
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and _is_float(value) and producer not in kept:
                kept.add(producer)
                todo.append(producer)
            elif producer is not None and producer.op_type == "Cast" and producer not in kept:
                kept.add(producer)
    return kept


def _infer_types(model: Any, where: str) -> None:
    """Fills in types that the file does not say.

    Raises:
        CompressError: one cannot be told.
    """
    import onnx
    import onnx_ir as ir

    missing = [v for node in model.graph for v in node.outputs if v.name and v.dtype is None]
    if not missing:
        return
    light = ir.to_proto(model)  # weights outside the file stay outside
    try:
        found = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as e:
        raise CompressError(
            f"the types in the graph cannot be told: {str(e).splitlines()[0][:200]}", where=where, fix="use fp32"
        ) from e
    types = {v.name: v.type.tensor_type.elem_type for v in found.graph.value_info}
    for value in missing:
        if value.name in types:
            value.type = ir.TensorType(ir.DataType(types[value.name]))
    left = [v for v in missing if v.dtype is None]
    if left:
        node = left[0].producer()
        raise CompressError(
            f"the type of {left[0].name!r} ({node.op_type} {node.name!r}) cannot be told", where=where, fix="use fp32"
        )


def _to_low(array: Any, low: Any, precision: str, name: str) -> Any:
    """A tensor in the low precision; -inf-like masks become its lowest value, not -inf."""
    import onnx_ir as ir

    limit = LOWEST[precision]
    finite = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
    return ir.tensor(finite.astype(low.numpy()), dtype=low, name=name)


def _low_initializer(graph: Any, value: Any, low: Any, precision: str) -> Any:
    import onnx_ir as ir

    name = f"{value.name}.{NAMES[precision]}"
    made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(low))
    made.const_value = _to_low(value.const_value.numpy(), low, precision, name)
    graph.register_initializer(made)
    return made


def _low_constant(node: Any, low: Any, precision: str) -> None:
    import onnx_ir as ir

    key = next(k for k in ("value", "value_float", "value_floats", "") if k in node.attributes or not k)
    if key == "value":
        array = node.attributes["value"].value.numpy()
    elif key:
        array = np.asarray(node.attributes.pop(key).value, np.float32)
    else:
        array = np.zeros(1, np.float32)  # ConstantOfShape without a value
    node.attributes["value"] = ir.AttrTensor("value", _to_low(array, low, precision, node.outputs[0].name or ""))
