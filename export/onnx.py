"""A causal language model to ONNX: `prefill.onnx` and `decode.onnx` over one weights file.

Both graphs come from one trace, with batch, length and past length dynamic:

- ``decode.onnx``: input_ids (b, s), attention_mask (b, past + s), position_ids (b, s) and the KV cache
  past_key_values.<layer>.key / .value (b, KV heads of that layer, past, head_dim) -> logits (b, s, vocab) and
  present.<layer>.key / .value. The past may be empty and s may be any length, so it scores whole texts too.
- ``prefill.onnx``: the same without a past, and logits (b, 1, vocab) of the last position only: what the first token
  needs. Prompts of unequal length are padded on the left.

Layers without attention have no cache.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.exporters.names import DECODE, OPSET, PREFILL, WEIGHTS
from compress.exporters.refused import refusal, still
from compress.exporters.repeated import kinds, name_nodes, one_of_each, repeat, speaks_of, widths_of
from compress.models.decoder import blocks
from compress.run.progress import say


@dataclass(frozen=True)
class Exported:
    """What an export wrote: file names, their sizes in bytes, and the time it took."""

    folder: Path
    bytes: dict[str, int]
    seconds: float
    traced: int = 0  # blocks of a decoder; the others' nodes are copies


def cached_layers(model: Any) -> list[tuple[int, int, int]]:
    """(layer, KV heads, channels of a head) of every layer that keeps a cache.

    Raises:
        CompressError: a layer keeps something else than keys and values.
    """
    found = []
    for i, block in enumerate(blocks(model)):
        attention: Any = getattr(block, "self_attn", None)
        weights = attention is not None and any(True for _ in attention.parameters())
        if attention is None or (weights and not (hasattr(attention, "head_dim") and hasattr(attention, "o_proj"))):
            return _layers_seen(model)  # attention of another make, such as Phi's
        if not weights:
            continue
        groups = getattr(attention, "num_key_value_groups", 1)
        heads = attention.o_proj.in_features // attention.head_dim
        if hasattr(attention, "k_proj") and attention.k_proj.out_features * groups != heads * attention.head_dim:
            return _layers_seen(model)
        found.append((i, heads // groups, attention.head_dim))
    return found


def _layers_seen(model: Any) -> list[tuple[int, int, int]]:
    """The same of a model whose attention is of another make, seen in the cache that one token leaves."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        kept = [(i, layer.keys, layer.values) for i, layer in enumerate(cache.layers) if layer.keys is not None]
    except Exception as e:  # what a cache of keys and values is no place for, each family says in its own type
        raise _no_cache(f"{type(e).__name__}: {' '.join(str(e).split())[:100]}") from e
    if any(keys.shape != values.shape for _, keys, values in kept):
        raise _no_cache("keys and values of different sizes")
    return [(i, keys.shape[1], keys.shape[3]) for i, keys, _ in kept if keys.numel()]


def _no_cache(why: str) -> CompressError:
    return CompressError(
        f"a layer keeps another state from token to token than keys and values ({why})",
        where="ONNX",
        fix="load the pruned model with transformers; its ONNX graphs hold keys and values alone",
    )


class _WithCache(torch.nn.Module):
    """The model with its cache as plain tensors in and out."""

    def __init__(self, model: Any, layers: list[int]) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.hidden: list[torch.Tensor] = []  # what is given beside the logits and the cache

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for n, layer in enumerate(self.layers):
            cache.update(past[2 * n], past[2 * n + 1], layer)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        present = [t for layer in self.layers for t in (cache.layers[layer].keys, cache.layers[layer].values)]
        return (logits, *present, *self.hidden)


def _example(layers: list[tuple[int, int, int]]) -> tuple[Any, Any]:
    """Inputs to trace with, and which of their lengths are dynamic."""
    batch, length, past_length = 2, 3, 5
    ids = torch.zeros(batch, length, dtype=torch.int64)
    mask = torch.ones(batch, past_length + length, dtype=torch.int64)
    positions = torch.arange(past_length, past_length + length)[None].repeat(batch, 1)
    past = [torch.zeros(batch, heads, past_length, head_dim) for _, heads, head_dim in layers for _ in range(2)]
    b, s, p = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    t = torch.export.Dim("total", min=4)  # torch traces every dynamic length as 2 or more: past + sequence
    return (ids, mask, positions, past), ({0: b, 1: s}, {0: b, 1: t}, {0: b, 1: s}, [{0: b, 2: p}] * len(past))


def _traced(model: Any, layers: list[tuple[int, int, int]], each: bool) -> tuple[Any, int]:
    """The graph of the whole model, of one trace of a block of each kind (or of every one), and how many those are."""
    whole = _WithCache(model, [i for i, *_ in layers])
    caches: dict[int, Any] = {i: shape for i, *shape in layers}
    example, _ = _example(layers)
    kind = list(range(len(blocks(model)))) if each else kinds(model, lambda: whole(*example), caches, widths=True)
    program, hidden = _program(model, layers, kind)
    if speaks_of(program.model.graph, widths_of(model, kind)):
        kind = kinds(model, lambda: whole(*example), caches, widths=False)
        program, hidden = _program(model, layers, kind)
    name_nodes(program.model.graph)
    repeat(program.model, model, kind, hidden, [i for i, *_ in layers])
    program.optimize()
    return program.model, len(set(kind))


def _program(model: Any, layers: list[tuple[int, int, int]], kind: list[int]) -> tuple[Any, list[str]]:
    """What torch makes of the model with one block of each kind, and what the hidden states between them are called."""
    firsts = sorted(set(kind))
    layers = [layer for layer in layers if layer[0] in firsts]
    names = [f"{i}.{kind}" for i, *_ in layers for kind in ("key", "value")]
    hidden = [f"hidden.{n}" for n in range(len(firsts) + 1)]
    example, shapes = _example(layers)
    module, traced = _WithCache(model, [i for i, *_ in layers]), None
    say(f"tracing {len(firsts)} of {len(kind)} layers for ONNX")
    with one_of_each(model, kind) as between:
        module.hidden = between
        try:
            with still():
                traced = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
                program = torch.onnx.export(
                    traced,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=[
                        *("input_ids", "attention_mask", "position_ids"),
                        *(f"past_key_values.{n}" for n in names),
                    ],
                    output_names=["logits", *(f"present.{n}" for n in names), *hidden],
                    optimize=False,
                    verbose=False,
                )
        except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError, RuntimeError) as e:
            raise refusal(e, "ONNX", module, traced) from e
    assert program is not None
    return program, hidden


def export_llm(model: Any, folder: Path, each: bool = False) -> Exported:
    """Exports ``model`` (float32, any mix of layer sizes) into the existing, empty ``folder``.

    Args:
        each: traces every block, where it would trace one of each kind.

    Raises:
        CompressError: the exporter cannot handle the model.
    """
    import onnx_ir as ir

    began = time.monotonic()
    layers = cached_layers(model)
    names = [f"{i}.{kind}" for i, *_ in layers for kind in ("key", "value")]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter, nothing a user can act on
        decode, traced = _traced(model, layers, each)
    _name_axes(decode, names)
    forget_trace(decode)
    ir.save(decode, folder / DECODE, external_data=WEIGHTS)
    prefill = ir.load(folder / DECODE)
    _cut_past(prefill, layers, names)
    _last_position_only(prefill)
    ir.save(prefill, folder / PREFILL)
    sizes = {name: (folder / name).stat().st_size for name in (PREFILL, DECODE, WEIGHTS)}
    return Exported(folder, sizes, time.monotonic() - began, traced)


def _name_axes(model: Any, names: list[str]) -> None:
    """Gives dynamic axes names a reader understands."""
    import onnx_ir as ir

    axes: dict[str, list[str | None]] = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        "logits": ["batch", "sequence", None],
    }
    axes |= {f"past_key_values.{n}": ["batch", None, "past", None] for n in names}
    axes |= {f"present.{n}": ["batch", None, "total", None] for n in names}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(
            [old if name is None else name for old, name in zip(value.shape, axes[value.name], strict=True)]
        )


def forget_trace(model: Any) -> None:
    """Drops the stack traces that the exporter notes at every node: paths of this machine, and most of the file."""
    for item in (model, model.graph, *model.graph):
        item.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    for function in model.functions.values():
        for node in function:
            node.metadata_props.clear()


def _cut_past(model: Any, layers: list[tuple[int, int, int]], names: list[str]) -> None:
    """Puts an empty tensor in the place of every past input."""
    import numpy as np
    import onnx_ir as ir

    graph = model.graph
    ids = next(v for v in graph.inputs if v.name == "input_ids")
    made: list[Any] = [ir.node("Shape", [ids], attributes={"start": 0, "end": 1}, num_outputs=1)]
    made[0].outputs[0].name = "batch_size"
    size_of = {f"{i}.{kind}": (heads, head_dim) for i, heads, head_dim in layers for kind in ("key", "value")}
    empty: dict[tuple[int, int], Any] = {}
    for heads, head_dim in sorted(set(size_of.values())):
        label = f"empty_past_{heads}" if heads not in {h for h, _ in empty} else f"empty_past_{heads}x{head_dim}"
        tail = ir.tensor(np.array([heads, 0, head_dim], dtype=np.int64), name=f"{label}.tail")
        constant = ir.node("Constant", [], attributes={"value": tail}, num_outputs=1)
        constant.outputs[0].name = tail.name
        shape = ir.node("Concat", [made[0].outputs[0], constant.outputs[0]], attributes={"axis": 0}, num_outputs=1)
        shape.outputs[0].name = f"{label}.shape"
        zeros = ir.node("ConstantOfShape", [shape.outputs[0]], num_outputs=1)
        zeros.outputs[0].name = label
        zeros.outputs[0].type, zeros.outputs[0].dtype = ir.TensorType(ir.DataType.FLOAT), ir.DataType.FLOAT
        made += [constant, shape, zeros]
        empty[heads, head_dim] = zeros.outputs[0]
    for name in names:
        value = next(v for v in graph.inputs if v.name == f"past_key_values.{name}")
        ir.convenience.replace_all_uses_with(value, empty[size_of[name]])
        graph.inputs.remove(value)
    graph.insert_before(next(iter(graph)), made)
    for value in (*graph.inputs, *graph.outputs):
        if value.name != "logits":
            value.shape = ir.Shape(
                ["sequence" if axis in ("past", "total") else axis for axis in map(_plain, value.shape)]
            )
    _forget_inner_shapes(graph)


def _plain(axis: Any) -> Any:
    return axis if isinstance(axis, int) else str(axis.value)


def _forget_inner_shapes(graph: Any) -> None:
    """Shapes recorded inside the graph speak of the past that was cut."""
    outputs = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None


def _last_position_only(model: Any) -> None:
    """Slices the input of the head, so that prefill computes one row of logits."""
    import numpy as np
    import onnx_ir as ir

    graph = model.graph
    logits = next(v for v in graph.outputs if v.name == "logits")
    head = logits.producer()
    while head.op_type not in ("MatMul", "Gemm"):
        head = next(v.producer() for v in head.inputs if v is not None and v.producer() is not None)
    limits = []
    for name, number in (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1)):
        tensor = ir.tensor(np.array([number], dtype=np.int64), name=f"last_position.{name}")
        constant = ir.node("Constant", [], attributes={"value": tensor}, num_outputs=1)
        constant.outputs[0].name = tensor.name
        limits.append(constant)
    cut = ir.node("Slice", [head.inputs[0], *(c.outputs[0] for c in limits)], num_outputs=1)
    cut.outputs[0].name = "last_position"
    head.replace_input_with(0, cut.outputs[0])
    graph.insert_before(head, [*limits, cut])
    logits.shape = ir.Shape(["batch", 1, logits.shape[2]])
