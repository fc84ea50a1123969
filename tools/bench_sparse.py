"""Whether a runtime runs unstructured zeros faster than its own dense path, on this CPU, one thread.

    python tools/bench_sparse.py [--rounds 9] [--processes 3] [--only mnn,torch] [--python deepsparse=PATH]

Two things are run: MobileNet-V1 on one 224x224 image, with its 1x1 convolutions pruned by magnitude (they hold 95 % of
the multiplications), and a plain product of a 1024x1024 matrix with 196 columns, the pixels of a 14x14 map. Each
runtime runs the dense and the pruned weights in turn in one process, in an order that turns round every round, and
starts afresh for every process. Time is the processor's, of one thread: on a quiet machine the clock says the same.
The ratio is dense time over sparse time of the same round (above 1: zeros are faster), its median and 95 % interval
over all rounds; beside it the medians of the single processes, lowest to highest, the same ratio by the clock, and how
many times as fast the zeros are as ONNX Runtime with the dense weights, measured in the same rounds. Outputs are
compared with float64 (product) or torch (network): what is wrong is not timed.

What is not installed is named with what to install. A runtime that does not go with this environment is measured with
an interpreter of its own: it needs numpy, onnx and that runtime, and none of this project.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from compress.system.files import write_whole

Call = Callable[[], Any]
SPARSITIES = (0.8, 0.9, 0.95)
SIZE, ROWS, COLUMNS, PIXELS = 224, 1024, 1024, 196
SAMPLE = 0.04  # seconds that one sample lasts at least
TOLERANCE = 1e-3  # of the largest output
REFERENCE = "onnxruntime dense"  # the fastest dense path that every environment has
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "asimd", "sve")

# --- what is run: files that every runtime reads --------------------------------------------------------------------


def labels(pattern: str) -> list[str]:
    return ["2:4-0.5"] if pattern == "2:4" else [f"{pattern}-{s}" for s in SPARSITIES]


def prune(weight: np.ndarray, sparsity: float, pattern: str) -> np.ndarray:
    """(out, in) with the share ``sparsity`` of its blocks zero: those of the smallest sums."""
    if pattern == "2:4":
        import torch

        from compress.recipes.global_mp.pattern import two_four_mask

        return weight * two_four_mask(torch.from_numpy(weight)).numpy()
    a, b = block = PATTERNS[pattern]
    size = np.abs(weight).reshape(weight.shape[0] // a, a, weight.shape[1] // b, b).sum((1, 3))
    cut = np.partition(size.ravel(), round(size.size * sparsity) - 1)[round(size.size * sparsity) - 1]
    return weight * np.kron(size > cut, np.ones(block, weight.dtype))


# (of out, of in) that are zero together; of "2:4" one column in two, see compress.recipes.global_mp.pattern
PATTERNS = {"random": (1, 1), "2:4": (1, 1), "4x1": (4, 1), "1x4": (1, 4), "16x1": (16, 1), "4x4": (4, 4)}


def write_product(folder: Path) -> None:
    """x (pixels, in), weight (out, in) and y for every label, and ONNX files of x @ weight.T."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    x = rng.standard_normal((PIXELS, COLUMNS)).astype(np.float32)
    dense = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    for label in ["dense", *(name for p in PATTERNS for name in labels(p))]:
        pattern, _, share = label.partition("-")
        weight = prune(dense, float(share), pattern) if share else dense
        there = folder / label
        there.mkdir(parents=True)
        np.save(there / "x.npy", x)
        np.save(there / "weight.npy", weight)
        np.save(there / "y.npy", x.astype(np.float64) @ weight.T.astype(np.float64))
        shapes = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
            for n, s in (("input", x.shape), ("y", (PIXELS, ROWS)))
        ]
        node = helper.make_node("MatMul", ["input", "w"], ["y"])
        kept = np.ascontiguousarray(weight.T)
        for file, sparse in (("model.onnx", False), ("sparse.onnx", True)):
            graph = helper.make_graph([node], "product", shapes[:1], shapes[1:])
            if sparse:
                at = np.flatnonzero(kept)
                graph.sparse_initializer.append(
                    helper.make_sparse_tensor(
                        numpy_helper.from_array(kept.ravel()[at], "w"),
                        numpy_helper.from_array(at.astype(np.int64), "w_at"),
                        kept.shape,
                    )
                )
            else:
                graph.initializer.append(numpy_helper.from_array(kept, "w"))
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), there / file)


def write_network(folder: Path) -> None:
    """x, y and ONNX files (opset 20 and 17) of MobileNet-V1, and its weights, for every label."""
    import onnx
    import torch
    from safetensors.torch import save_file

    from compress.exporters.onnx_module import export_module
    from compress.models.zoo import build

    for label in ["dense", *labels("random"), *labels("4x1")]:
        pattern, _, share = label.partition("-")
        model = build("mobilenet-v1", {"classes": 1000}, seed=0)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 3, SIZE, SIZE, generator=generator)
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1) and share:
                    cut = prune(m.weight[:, :, 0, 0].numpy(), float(share), pattern)
                    m.weight.copy_(torch.from_numpy(cut)[:, :, None, None])
                if isinstance(m, torch.nn.BatchNorm2d):
                    m.momentum = 1.0  # the norms take this batch's figures, so that every layer's signal lives
            model.train()(x)
            y = model.eval()(x[:1])
        there = folder / label
        there.mkdir(parents=True)
        np.save(there / "x.npy", x[:1].numpy())
        np.save(there / "y.npy", y.numpy())
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, there / "model.safetensors")
        export_module(model, x[:2], ["y"], there)
        graph = onnx.load(there / "model.onnx")
        for node in graph.graph.node:
            if node.op_type == "ReduceMean":  # before opset 18 the axes were an attribute
                del node.input[1:], node.attribute[:]
                node.attribute.extend(
                    [onnx.helper.make_attribute("axes", [2, 3]), onnx.helper.make_attribute("keepdims", 0)]
                )
        graph.ir_version, graph.opset_import[0].version = 8, 17
        onnx.save(graph, there / "old.onnx")


# --- runtimes: from a folder to a call that gives the output --------------------------------------------------------


def onnxruntime(folder: Path, file: str = "model.onnx") -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    feed = {"input": np.load(folder / "x.npy")}
    return lambda: session.run(None, feed)[0]


def onnxruntime_sparse(folder: Path) -> Call:
    return onnxruntime(folder, "model.onnx" if folder.name == "dense" else "sparse.onnx")


def openvino(folder: Path) -> Call:
    import openvino as ov

    core = ov.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    if folder.name != "dense":
        settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = 0.5
    x = np.load(folder / "x.npy")
    model = core.read_model(folder / "model.onnx")
    model.reshape(list(x.shape))
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer([x], share_inputs=True)[0]


def deepsparse(folder: Path) -> Call:
    os.environ["NM_DISABLE_ANALYTICS"] = "True"
    from deepsparse import compile_model

    file = folder / "old.onnx" if (folder / "old.onnx").exists() else folder / "model.onnx"
    x = np.load(folder / "x.npy")
    engine = compile_model(str(file), batch_size=x.shape[0], num_cores=1)
    return lambda: engine.run([x])[0]


def mnn(folder: Path) -> Call:
    """The converter's flag makes the sparse layers; the blocks of 4 output channels are said in a file."""
    import MNN.expr as expr
    import MNN.nn as nn

    from compress.exporters.mnn import FILE, export_mnn

    made = folder / FILE
    if not made.exists():
        block = 4 if folder.name.startswith("4x1") else 1
        export_mnn(folder / "model.onnx", folder, sparse=folder.name != "dense", block=block)
    x = np.load(folder / "x.npy")
    manager = nn.create_runtime_manager(({"precision": "high", "backend": "CPU", "numThread": 1},))
    module = nn.load_module_from_file(str(made), ["input"], ["y"], runtime_manager=manager)

    def call() -> Any:
        given = expr.placeholder(list(x.shape), expr.NCHW)
        given.write(x)
        return np.array(expr.convert(module.forward([given])[0], expr.NCHW).read())

    return call


def executorch(folder: Path) -> Call:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    x, file = torch.from_numpy(np.load(folder / "x.npy")), folder / "model.pte"
    if not file.exists():
        program = torch.export.export(_torch_network(folder), (x,))
        made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        file.write_bytes(made.buffer)
    method = Runtime.get().load_program(file).load_method("forward")
    assert method is not None
    return lambda: method.execute([x])[0].numpy()


def litert(folder: Path) -> Call:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=_flatbuffer(folder), num_threads=1)  # with XNNPACK where it can
    interpreter.allocate_tensors()
    x = np.load(folder / "x.npy")
    put, take = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)

    def call() -> Any:
        interpreter.set_tensor(put, x)
        interpreter.invoke()
        return interpreter.get_tensor(take)

    return call


def torch_csr(folder: Path, blocks: tuple[int, int] | None = None) -> Call:
    import torch

    torch.set_num_threads(1)
    x = torch.from_numpy(np.load(folder / "x.npy"))
    if not (folder / "weight.npy").exists():
        model = _torch_network(folder)
        if folder.name != "dense":
            for name, m in list(model.named_modules()):
                if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1):
                    parent, _, last = name.rpartition(".")
                    setattr(model.get_submodule(parent), last, _csr_layer(m))
        return lambda: model(x).numpy()
    weight = torch.from_numpy(np.load(folder / "weight.npy"))
    columns = x.T.contiguous()
    if folder.name != "dense":
        weight = weight.to_sparse_csr() if blocks is None else weight.to_sparse_bsr(blocks)
    return lambda: (weight @ columns).T.numpy()


def torch_two_four(folder: Path) -> Call:
    import torch

    if folder.name == "dense":
        return torch_csr(folder)
    x = torch.from_numpy(np.load(folder / "x.npy"))
    weight = torch.sparse.to_sparse_semi_structured(torch.from_numpy(np.load(folder / "weight.npy")))
    return lambda: torch.nn.functional.linear(x, weight).numpy()


def torch_bsr(folder: Path) -> Call:
    return torch_csr(folder, PATTERNS["4x4"])


def scipy(folder: Path) -> Call:
    from scipy.sparse import bsr_array, csr_array

    weight, columns = np.load(folder / "weight.npy"), np.load(folder / "x.npy").T.copy()
    pattern = folder.name.partition("-")[0]
    if pattern == "dense":
        return lambda: (weight @ columns).T
    held = csr_array(weight) if pattern == "random" else bsr_array(weight, blocksize=PATTERNS[pattern])
    return lambda: (held @ columns).T


def _torch_network(folder: Path) -> Any:
    """The network with its norms folded into the convolutions before them."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    from compress.models.zoo import build

    torch.set_grad_enabled(False)
    model = build("mobilenet-v1", {"classes": 1000}, seed=0)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    layers = list(model.features.children())  # type: ignore[union-attr, operator]
    model.features = torch.nn.Sequential(
        *(
            fuse_conv_bn_eval(a, b) if isinstance(a, torch.nn.Conv2d) else a
            for a, b in zip(layers, [*layers[1:], None], strict=True)
            if not isinstance(a, torch.nn.BatchNorm2d)
        )
    )
    return model


def _csr_layer(conv: Any) -> Any:
    import torch

    class Sparse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = conv.weight[:, :, 0, 0].to_sparse_csr()
            self.bias = conv.bias[:, None]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x (1, in, h, w), as it lies in memory the matrix (in, h * w)."""
            y = torch.addmm(self.bias, self.weight, x.flatten(2)[0])
            return y.view(1, -1, *x.shape[2:])

    return Sparse()


def _flatbuffer(folder: Path) -> bytes:
    """A TFLite model of the ONNX file; the sparse labels' weights are stored as such, dense ones behind DENSIFY.

    Convolutions (a 3x3 with stride 2 behind an explicit PAD), ReLU fused into them, the mean, and the last layer.
    """
    import flatbuffers
    import onnx
    from ai_edge_litert import schema_py_generated as s
    from onnx import numpy_helper

    graph = onnx.load(folder / "model.onnx").graph
    held = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    model, sub = s.ModelT(), s.SubGraphT()
    model.version, model.buffers, model.operatorCodes = 3, [s.BufferT()], []
    sub.tensors, sub.operators = [], []
    pattern = folder.name.partition("-")[0]

    def code(builtin: int, version: int = 1) -> int:
        for i, c in enumerate(model.operatorCodes):
            if c.builtinCode == builtin:
                return i
        made = s.OperatorCodeT()
        made.builtinCode, made.deprecatedBuiltinCode, made.version = builtin, min(builtin, 127), version
        model.operatorCodes.append(made)
        return len(model.operatorCodes) - 1

    def tensor(shape: tuple[int, ...], data: np.ndarray | None = None, sparsity: Any = None) -> int:
        made = s.TensorT()
        made.shape, made.name, made.sparsity = list(shape), f"t{len(sub.tensors)}".encode(), sparsity
        made.type = s.TensorType.INT32 if data is not None and data.dtype == np.int32 else s.TensorType.FLOAT32
        made.buffer = 0
        if data is not None:
            buffer = s.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            model.buffers.append(buffer)
            made.buffer = len(model.buffers) - 1
        sub.tensors.append(made)
        return len(sub.tensors) - 1

    def operator(
        builtin: int, inputs: list[int], output: int, kind: int = 0, options: Any = None, version: int = 1
    ) -> None:
        made = s.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = code(builtin, version), inputs, [output]
        made.builtinOptionsType, made.builtinOptions = kind, options
        sub.operators.append(made)

    def dimension(size: int, rows: np.ndarray | None = None, at: np.ndarray | None = None) -> Any:
        made = s.DimensionMetadataT()
        made.format, made.denseSize = s.DimensionType.DENSE, size
        if rows is not None and at is not None:
            made.format = s.DimensionType.SPARSE_CSR
            kinds = s.SparseIndexVector.Int32Vector
            for name, values in (("arraySegments", rows), ("arrayIndices", at)):
                vector = s.Int32VectorT()
                vector.values = values.astype(np.int32)
                setattr(made, name, vector)
                setattr(made, name + "Type", kinds)
        return made

    def weights(value: np.ndarray, block: int) -> int:
        """value (out, ..., in), its last axis stored as rows of its non-zeros, or of its non-zero blocks."""
        lead, width = value.shape[:-1], value.shape[-1]
        flat = value.reshape(-1, width // block, block)
        full = (flat != 0).any(-1)
        rows, at = np.concatenate([[0], full.sum(1).cumsum()]), np.nonzero(full)[1]
        made = s.SparsityParametersT()
        made.traversalOrder = list(range(value.ndim + (block > 1)))
        made.dimMetadata = [*(dimension(d) for d in lead), dimension(0, rows, at)]
        if block > 1:
            made.blockMap = [value.ndim - 1]
            made.dimMetadata.append(dimension(block))
        return tensor(value.shape, flat[full], made)

    def parameter(value: np.ndarray, direct: bool) -> int:
        value = np.ascontiguousarray(value, dtype=np.float32)
        if pattern == "dense" or (value == 0).mean() < 0.5:
            return tensor(value.shape, value)
        stored = weights(value, 4 if pattern == "1x4" else 1)
        if direct:
            return stored
        dense = tensor(value.shape)
        operator(s.BuiltinOperator.DENSIFY, [stored], dense, s.BuiltinOptions.DensifyOptions, s.DensifyOptionsT())
        return dense

    x = np.load(folder / "x.npy").shape
    shape = (x[0], x[2], x[3], x[1]) if len(x) == 4 else x
    now = first = tensor(shape)
    nodes = list(graph.node)
    for i, node in enumerate(nodes):
        relu = i + 1 < len(nodes) and nodes[i + 1].op_type == "Relu"
        act = s.ActivationFunctionType.RELU if relu else s.ActivationFunctionType.NONE
        if node.op_type == "Conv":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            weight, stride = held[node.input[1]], attributes["strides"][0]  # (out, in / groups, h, w)
            deep, kernel = attributes.get("group", 1) > 1, weight.shape[2]
            if stride == 2 and kernel == 3:
                shape = (1, shape[1] + 2, shape[2] + 2, shape[3])
                pads = tensor((4, 2), np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
                wide = tensor(shape)
                operator(s.BuiltinOperator.PAD, [now, pads], wide, s.BuiltinOptions.PadOptions, s.PadOptionsT())
                now = wide
            options: Any = s.DepthwiseConv2DOptionsT() if deep else s.Conv2DOptionsT()
            options.padding = s.Padding.VALID if stride == 2 else s.Padding.SAME
            options.strideH = options.strideW = stride
            options.dilationHFactor = options.dilationWFactor = 1
            options.fusedActivationFunction = act
            if deep:
                options.depthMultiplier = 1
            order = (1, 2, 3, 0) if deep else (0, 2, 3, 1)
            taken = [now, parameter(weight.transpose(order), False), tensor((len(weight),), held[node.input[2]])]
            size = (shape[1] - kernel) // 2 + 1 if stride == 2 else shape[1]
            shape = (1, size, size, len(weight))
            now = tensor(shape)
            which = s.BuiltinOperator.DEPTHWISE_CONV_2D if deep else s.BuiltinOperator.CONV_2D
            kind = s.BuiltinOptions.DepthwiseConv2DOptions if deep else s.BuiltinOptions.Conv2DOptions
            operator(which, taken, now, kind, options)
        elif node.op_type == "ReduceMean":
            mean = s.ReducerOptionsT()
            mean.keepDims = False
            axes, shape = tensor((2,), np.array([1, 2], np.int32)), (1, shape[3])
            before, now = now, tensor(shape)
            operator(s.BuiltinOperator.MEAN, [before, axes], now, s.BuiltinOptions.ReducerOptions, mean)
        elif node.op_type in ("Gemm", "MatMul"):
            last = s.FullyConnectedOptionsT()
            last.fusedActivationFunction = act
            weight = held[node.input[1]]
            gemm = node.op_type == "Gemm"  # (out, in) there, (in, out) in MatMul
            bias = tensor((len(weight),), held[node.input[2]]) if gemm else -1
            weight = weight if gemm else weight.T
            shape = (shape[0], len(weight))
            before, now = now, tensor(shape)
            taken = [before, parameter(weight, not gemm), bias]
            version = 1 if sub.tensors[taken[1]].sparsity is None else 8  # XNNPACK takes none of the newer
            operator(
                s.BuiltinOperator.FULLY_CONNECTED, taken, now, s.BuiltinOptions.FullyConnectedOptions, last, version
            )
        elif node.op_type != "Relu":
            raise ValueError(f"no TFLite form is written here for {node.op_type}")
    sub.inputs, sub.outputs = [first], [now]
    model.subgraphs = [sub]
    builder = flatbuffers.Builder(1 << 24)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


# (what, runtime) -> the call, its distribution, and the patterns it is tried on.
NETWORK: dict[str, tuple[Callable[[Path], Call], str, tuple[str, ...]]] = {
    "onnxruntime": (onnxruntime, "onnxruntime", ("random",)),
    "openvino": (openvino, "openvino", ("random",)),
    "executorch": (executorch, "executorch", ("random",)),
    "litert": (litert, "ai-edge-litert", ("random",)),
    "torch": (torch_csr, "torch", ("random",)),
    "mnn": (mnn, "MNN", ("random", "4x1")),
    "deepsparse": (deepsparse, "deepsparse<1.9", ("random", "4x1")),
}
PRODUCT: dict[str, tuple[Callable[[Path], Call], str, tuple[str, ...]]] = {
    "onnxruntime": (onnxruntime_sparse, "onnxruntime", ("random",)),
    "openvino": (openvino, "openvino", ("random",)),
    "litert": (litert, "ai-edge-litert", ("random", "1x4")),
    "torch": (torch_csr, "torch", ("random",)),
    "torch-bsr": (torch_bsr, "torch", ("4x4",)),
    "torch-2:4": (torch_two_four, "torch", ("2:4",)),
    "scipy": (scipy, "scipy", ("random", "16x1")),
    "mnn": (mnn, "MNN", ("2:4", "random", "4x1")),
    "deepsparse": (deepsparse, "deepsparse<1.9", ("2:4", "random", "4x1")),
}
TASKS = {"network": NETWORK, "product": PRODUCT}

# --- measuring ------------------------------------------------------------------------------------------------------


def agent(spec: dict[str, Any]) -> dict[str, Any]:
    """One runtime in this process: the share of error of every label's output, and seconds a call, round by round."""
    make, _, patterns = TASKS[spec["task"]][spec["runtime"]]
    folder = Path(spec["folder"]) / spec["task"]
    calls, errors, refused = {}, {}, {}
    for label in ["dense", *(name for p in patterns for name in labels(p))]:
        try:
            calls[label] = make(folder / label)
            want, got = np.load(folder / label / "y.npy"), calls[label]()
        except Exception as e:  # a runtime's own kinds of refusal; the row says what it said
            if isinstance(e, ImportError) or label == "dense":
                raise
            refused[label] = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:120]}"
            calls.pop(label, None)
            continue
        errors[label] = float(np.abs(np.asarray(got).reshape(want.shape) - want).max() / np.abs(want).max())
        if not errors[label] <= TOLERANCE:
            refused[label] = f"wrong output, off by {errors[label]:.1e}"
            del calls[label]
    calls[REFERENCE] = onnxruntime(folder / "dense")
    times: dict[str, list[float]] = {label: [] for label in calls}
    walls: dict[str, list[float]] = {label: [] for label in calls}
    repeats = {}
    for label, call in calls.items():
        began = time.perf_counter()
        while time.perf_counter() - began < 0.2:  # warm
            call()
        began = time.perf_counter()
        call()
        repeats[label] = max(1, round(SAMPLE / (time.perf_counter() - began)))
    for i in range(spec["rounds"]):
        for label in list(calls) if i % 2 else list(calls)[::-1]:
            began, wall = time.process_time(), time.perf_counter()
            for _ in range(repeats[label]):
                calls[label]()
            times[label].append((time.process_time() - began) / repeats[label])
            walls[label].append((time.perf_counter() - wall) / repeats[label])
    return {"times": times, "walls": walls, "errors": errors, "refused": refused}


def rows(task: str, runtime: str, folder: Path, spec: argparse.Namespace, python: str) -> Iterator[dict[str, Any]]:
    """A row a label, or one that says why there is none."""
    from compress.report.stats import paired_ratio

    needs = TASKS[task][runtime][1]
    request = {"task": task, "runtime": runtime, "folder": str(folder), "rounds": spec.rounds}
    found = []
    for _ in range(spec.processes):
        out = folder / "answer.json"
        done = subprocess.run(
            [python, __file__, "--agent", str(out)], input=json.dumps(request), capture_output=True, text=True
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
            missing = "ModuleNotFoundError" in lines[-1] or "ImportError" in lines[-1]
            yield {"task": task, "runtime": runtime, "note": f"not here: pip install {needs}" if missing else lines[-1]}
            return
        found.append(json.loads(out.read_text("utf-8")))
    for label in dict.fromkeys(k for f in found for k in (*f["times"], *f["refused"])):
        if label in ("dense", REFERENCE):
            continue
        said = [f["refused"][label] for f in found if label in f["refused"]]
        if said:
            yield {"task": task, "runtime": runtime, "label": label, "note": said[0]}
            continue
        dense = [t for f in found for t in f["times"]["dense"]]
        sparse = [t for f in found for t in f["times"][label]]
        single = [median(a / b for a, b in zip(f["times"]["dense"], f["times"][label], strict=True)) for f in found]
        yield {
            "task": task,
            "runtime": runtime,
            "label": label,
            "dense": median(dense),
            "sparse": median(sparse),
            **{k: v for k, v in paired_ratio(dense, sparse).items() if k != "pairs"},
            "processes": sorted(single),
            "reference": paired_ratio([t for f in found for t in f["times"][REFERENCE]], sparse)["median"],
            "wall": paired_ratio(*([t for f in found for t in f["walls"][k]] for k in ("dense", label)))["median"],
            "error": max(f["errors"][label] for f in found),
            "raw": {"dense": dense, "sparse": sparse},
        }


def machine() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = file.read().splitlines()
    except OSError:
        return platform.machine()
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    have = {w for x in lines if x.startswith(("flags", "Features")) for w in x.partition(":")[2].split()}
    told = " ".join(f for f in FLAGS if f in have)
    return f"{names[0] if names else platform.machine()}, {len(names)} cores, of {' '.join(FLAGS)}: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--only", default="", help="runtimes, by comma")
    parser.add_argument("--task", choices=sorted(TASKS), action="append")
    parser.add_argument("--python", action="append", default=[], metavar="RUNTIME=PATH", help="its own interpreter")
    parser.add_argument("--json", type=Path, help="the rows with their raw samples go there too")
    parser.add_argument("--agent", type=Path, help=argparse.SUPPRESS)
    spec = parser.parse_args()
    if spec.agent:
        write_whole(spec.agent, json.dumps(agent(json.load(sys.stdin))))
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    pythons = dict(p.split("=", 1) for p in spec.python)
    only = [n for n in spec.only.split(",") if n]
    print(machine())
    kept = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in spec.task or TASKS:
            (write_network if task == "network" else write_product)(folder / task)
            print(
                f"\n{task:8} {'runtime':12} {'zeros':12} {'dense ms':>9} {'sparse ms':>9}"
                "  ratio [95 %]        processes   wall  vs ort  error"
            )
            for runtime in TASKS[task]:
                if only and runtime not in only:
                    continue
                for row in rows(task, runtime, folder, spec, pythons.get(runtime, sys.executable)):
                    kept.append(row)
                    head = f"{task:8} {runtime:12} {row.get('label', ''):12} "
                    if "note" in row:
                        print(head + row["note"], flush=True)
                        continue
                    print(
                        f"{head}{1e3 * row['dense']:9.2f} {1e3 * row['sparse']:9.2f}  {row['median']:.2f}"
                        f" [{row['low']:.2f}, {row['high']:.2f}]  {row['processes'][0]:.2f}-{row['processes'][-1]:.2f}"
                        f"   {row['wall']:.2f}  {row['reference']:.2f}   {row['error']:.0e}",
                        flush=True,
                    )
    if spec.json:
        write_whole(spec.json, json.dumps({"machine": machine(), "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
