"""A torch module to ExecuTorch (.pte), lowered to XNNPACK: for phones and other small devices with a CPU.

A language model becomes one program with the methods ``prefill`` and ``decode``, which share their weights. Their
inputs and outputs are those of the ONNX files, so one caller serves both; lengths are fixed at the benchmarked ones. A
shorter prompt or past is padded on the left and masked, and of the cache that ``decode`` gives, the caller drops the
oldest position. A .pte keeps no names: they are put into it as a constant method ``signature``, JSON as bytes.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.exporters import formats, parity, runtimes
from compress.exporters.refused import refusal, still, unknown_operators
from compress.run.progress import say

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Graph, Source
    from compress.exporters.ort import Arrays
    from compress.exporters.runtimes import Runner

FILE = "model.pte"


class _Lowered(nn.Module):
    """The module in another float type, float32 outside."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        inside = [x.to(self.dtype) if x.is_floating_point() else x for x in given]
        return tuple(y.float() for y in self.model(*inside))


class _Flat(nn.Module):
    """A language model whose cache comes as separate tensors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        return self.inner(input_ids, attention_mask, position_ids, list(past))


class _Prefill(nn.Module):
    """The model without a past: logits (b, 1, vocab) of the last position and the cache it leaves."""

    def __init__(self, model: Any, layers: list[int]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        present = [t for layer in self.layers for t in (cache.layers[layer].keys, cache.layers[layer].values)]
        return (logits, *present)


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``model.pte``.

    Raises:
        CompressError: torch cannot trace the module, or ExecuTorch cannot lower it; it says which operator.
    """
    import executorch.version
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    began = time.monotonic()
    files = formats.components(source.path)
    graphs = {name: formats.read_graph(path) for name, path in files.items()}
    programs: dict[str, Any] = {}
    signature: dict[str, Any] = {}
    say(f"executorch: lowering {', '.join(files)} in {options.precision}")
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # deprecations inside the exporter, nothing a user can act on
        try:
            for name, graph in graphs.items():
                axes = formats.profiles_of(options, name, graph)[0]
                if name != "model":
                    axes = {a: (opt, opt, opt) for a, (_, opt, _) in axes.items()}
                    if options.precision == "int8":
                        raise UsageError(
                            "int8 in ExecuTorch is for networks here", where="--precision", fix="use fp32 or fp16"
                        )
                method = "forward" if name == "model" else name
                programs[method] = _trace(source.model, name, graph, axes, options.precision)
                if options.precision == "int8":
                    feeds = source.calibration.get(name, ())
                    programs[method] = _quantised(programs[method], feeds, [p.name for p in graph.inputs], axes)
                signature[method] = _signature(graph, axes)
            traced = dict(programs)
            lowered = to_edge_transform_and_lower(
                programs,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={"signature": torch.tensor(list(json.dumps(signature).encode()), dtype=torch.uint8)},
            )
            delegated = {m: _delegation(lowered.exported_program(m)) for m in programs}
            with still():
                program = lowered.to_executorch()
        except UsageError:
            raise
        except Exception as e:  # torch.export, the partitioner and the emitter each have their own types
            raise refusal(e, "ExecuTorch", source.model, next(iter(programs.values()), None)) from e
    _known(program.executorch_program, next(iter(traced.values())))
    with (folder / FILE).open("wb") as file:
        program.write_to_file(file)
    return {
        "components": {name: delegated["forward" if name == "model" else name] for name in graphs},
        "versions": {"executorch": executorch.version.__version__, "torch": torch.__version__},
        "seconds": round(time.monotonic() - began, 1),
    }


def _known(program: Any, traced: Any) -> None:
    """Raises CompressError where the program calls an operator that ExecuTorch's runtime does not have: it would be
    built, and not load."""
    from executorch.extension.pybindings.portable_lib import _get_operator_names

    there = set(_get_operator_names())
    called = {f"{o.name}.{o.overload}" if o.overload else o.name for p in program.execution_plan for o in p.operators}
    if called - there:
        raise unknown_operators(sorted(called - there), traced, "ExecuTorch")


def _trace(model: Any, name: str, graph: Graph, axes: Mapping[str, tuple[int, int, int]], precision: str) -> Any:
    """The exported program of a component, its varying axes bounded as the profile says."""
    import copy

    from compress.exporters.onnx import _WithCache, cached_layers
    from compress.exporters.onnx_module import _Outputs

    if name == "model":
        module: nn.Module = _Outputs(copy.deepcopy(model), [p.name for p in graph.outputs])
    else:
        layers = [i for i, *_ in cached_layers(model)]
        inner = copy.deepcopy(model)
        module = _Prefill(inner, layers) if name == "prefill" else _Flat(_WithCache(inner, layers))
    module = module.eval()
    if precision == "fp16":
        module = _Lowered(module, torch.float16)
    sizes = {a: max(2, high) if low < high else opt for a, (low, opt, high) in axes.items()}
    feed = formats.random_feed(graph, sizes)
    given = tuple(torch.from_numpy(feed[p.name] % 2 if p.name == "input_ids" else feed[p.name]) for p in graph.inputs)
    dims = {a: torch.export.Dim(a, min=max(low, 1), max=high) for a, (low, _, high) in axes.items() if low < high}
    if not dims:
        with still():
            return torch.export.export(module, given, strict=False)
    shapes = tuple({i: dims[a] for i, a in enumerate(p.shape) if a in dims} for p in graph.inputs)
    # `_Lowered` takes its arguments as one of many parts.
    taken = (shapes,) if precision == "fp16" else shapes
    with still():
        return torch.export.export(module, given, dynamic_shapes=taken, strict=False)


def _quantised(
    program: Any, feeds: Sequence[Arrays], names: list[str], axes: Mapping[str, tuple[int, int, int]]
) -> Any:
    """The program in int8 by XNNPACK's own quantiser (torchao's PT2E), its scales from ``feeds``.

    Raises:
        UsageError: there are no calibration inputs.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    if not feeds:
        raise UsageError(
            "static int8 needs inputs to calibrate on",
            where="--precision int8",
            fix="name a model of a run, whose calibration split is known, or another --precision",
        )
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(program.module(), quantizer)
    size = next(iter(axes.values()))[1] if axes else None
    for feed in feeds:
        given = [torch.from_numpy(feed[name]) for name in names]
        # A program of one batch size takes its samples so.
        for part in zip(*(x.split(size) if size else [x] for x in given), strict=True):
            if size is None or len(part[0]) == size:
                prepared(*part)
    made = convert_pt2e(prepared)
    sample = tuple(torch.from_numpy(feeds[0][name])[: size or None] for name in names)
    return torch.export.export(made, sample, strict=False)


def _signature(graph: Graph, axes: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    def shape(port: Any) -> list[int | None]:
        return [
            (None if axes.get(a, (0, 0, 1))[0] < axes.get(a, (0, 0, 1))[2] else axes[a][1]) if isinstance(a, str) else a
            for a in port.shape
        ]

    return {
        "inputs": [{"name": p.name, "shape": shape(p)} for p in graph.inputs],
        "outputs": [{"name": p.name, "shape": shape(p)} for p in graph.outputs],
    }


def _delegation(program: Any) -> dict[str, Any]:
    """What XNNPACK took and what is left to the portable kernels, by operator."""
    parts, left = 0, dict[str, int]()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target).split("schema = ")[-1].split("(")[0]
        if "executorch_call_delegate" in name:
            parts += 1
        elif "getitem" not in name:
            left[name] = left.get(name, 0) + 1
    return {"xnnpack_parts": parts, "left_to_portable": dict(sorted(left.items()))}


class _quiet:
    """ExecuTorch's passes log at INFO and WARNING what no user can act on."""

    def __enter__(self) -> None:
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.before)


def first_layer(source: Source, options: BuildOptions, feed: Arrays, tolerance: float) -> str:
    """Names the first layer of a network whose output differs from torch's where all are made outputs."""
    import tempfile

    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    from compress.exporters.bisect import largest_difference
    from compress.exporters.onnx_module import _Outputs

    kinds = nn.Conv2d | nn.Conv1d | nn.Linear
    layers = [name for name, m in source.model.named_modules() if isinstance(m, kinds)]
    graph = formats.read_graph(formats.components(source.path)["model"])
    module = _Outputs(source.model, [p.name for p in graph.outputs], layers).eval()
    given = tuple(torch.from_numpy(feed[p.name]) for p in graph.inputs)
    with torch.no_grad(), warnings.catch_warnings(), _quiet(), tempfile.TemporaryDirectory() as beside:
        warnings.simplefilter("ignore")
        want = module(*given)
        lowered = to_edge_transform_and_lower(
            torch.export.export(module, given, strict=False),
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        path = Path(beside) / FILE
        with path.open("wb") as file:
            lowered.to_executorch().write_to_file(file)
        runner = runtimes.load("executorch", str(path), options.threads)
        got = list(runner.run({v.name: x.numpy() for v, x in zip(runner.inputs, given, strict=True)}).values())
    heads = len(graph.outputs)
    for name, a, b in zip(layers, want[heads:], got[heads:], strict=True):
        if not largest_difference(a.numpy(), b) <= tolerance:
            return f"first in the output of {name}, by {largest_difference(a.numpy(), b):.2e}"
    return "every linear and convolutional layer agrees where its output is asked for"


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    return parity.check_built(source, folder, options, load)


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    method = "forward" if component == "model" else component
    return runtimes.load("executorch", str(folder / FILE), options.threads, method=method)
