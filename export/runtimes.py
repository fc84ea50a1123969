"""Loads an exported file in its runtime and runs it: one face for all of them.

This file is copied to devices and runs there alone: it needs Python 3.9, numpy and the one runtime, and nothing of the
package that it lies in.

``load(format, path, threads)`` gives a ``Runner``: ``inputs`` and ``outputs`` (name, shape with None for an axis that
may vary, dtype), ``run(feed) -> outputs`` by name, and ``prepare(feed) -> call``, which places the inputs once; then
``call()`` is one inference and nothing else, which is what a benchmark times.
"""

# ruff: noqa: UP035, UP045, B905  (they ask for what Python 3.9 cannot do)

import contextlib
import ctypes
import importlib
import json
import os
import re
import sys
from typing import Any, Callable, NamedTuple, Optional

import numpy as np


class Value(NamedTuple):
    """One input or output; ``shape`` has None where an axis may vary, ``dtype`` is numpy's name."""

    name: str
    shape: tuple  # type: ignore[type-arg]
    dtype: str


class Missing(Exception):
    """The runtime, or the driver it stands on, is not here.

    Args:
        what: one sentence.
        fix: what to install.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class CannotRun(Exception):
    """The runtime is here, and cannot load or run this file."""


class Runner(NamedTuple):
    """A loaded file.

    ``prepare(feed)`` returns a function without arguments that runs once and returns the outputs in their order, as
    the runtime gives them; it is valid until the next ``prepare``. ``device_seconds`` is given by runtimes with a clock
    on the device: the seconds of the last call there, transfers not counted. ``native`` is the runtime's own object.
    """

    format: str
    version: str
    inputs: list  # type: ignore[type-arg]
    outputs: list  # type: ignore[type-arg]
    run: Callable[[dict], dict]  # type: ignore[type-arg]
    prepare: Callable[[dict], Callable[[], Any]]  # type: ignore[type-arg]
    device_seconds: Optional[Callable[[], float]] = None
    native: Any = None


# format -> (module that must import, what to install: the runtime itself, for a device has nothing else of ours)
NEEDS = {
    "onnx": ("onnxruntime", "pip install onnxruntime"),
    "ort": ("onnxruntime", "pip install onnxruntime"),
    "mnn": ("MNN", "pip install MNN"),
    "openvino": ("openvino", "pip install openvino"),
    "executorch": ("executorch", "pip install executorch"),
    "litert": ("ai_edge_litert", "pip install ai-edge-litert"),
    "genai": ("onnxruntime_genai", "pip install 'onnxruntime-genai>=0.18'"),
    "tensorrt": ("tensorrt", "pip install tensorrt (its libraries come from the vendor's index)"),
    "tensorrt_rtx": ("tensorrt_rtx", "pip install tensorrt-rtx-cu13"),
}
# The first release that was found to run what we write; an older one is refused.
OLDEST = {"genai": (0, 18)}


def load(format: str, path: str, threads: int = 1, **options: Any) -> Runner:
    """Loads ``path``.

    Args:
        format: a key of ``NEEDS``.
        threads: for runtimes on the CPU.
        options: ``onnx`` and ``ort``: ``optimisation`` (``all``, ``extended``, ``basic``, ``none``: how far ONNX
            Runtime fuses nodes when it loads; an .ort file is fused already), ``providers``, ``profile`` (prefix of a
            profile file). ``openvino``: ``device``, ``precision`` (``f32``, ``bf16``, ``f16`` of the arithmetic),
            ``profile`` (True: count per layer). ``executorch``: ``method``. ``mnn``: ``precision`` (``high``,
            ``normal``, ``low``), ``names`` of the outputs. ``tensorrt`` and ``tensorrt_rtx``: ``profile`` (its index),
            ``cuda_graph``, ``runtime_cache`` (path; kept between processes).

    Raises:
        Missing: the runtime or its driver is not installed.
        CannotRun: the file cannot be loaded.
    """
    if format not in LOADERS:
        raise CannotRun(f"there is no runtime for the format {format!r}; there is: {', '.join(LOADERS)}")
    if not os.path.exists(path):
        raise CannotRun(f"there is no file {path}")
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise CannotRun("its name is not UTF-8, and no runtime opens another: rename it") from None
    runner: Runner = LOADERS[format](format, str(path), threads, **options)
    return runner


def available(format: str) -> str:
    """The version of the runtime of ``format``.

    Raises:
        Missing: it is not installed, or does not load.
    """
    return _module(format)[1]


def _module(format: str) -> "tuple[Any, str]":
    name, fix = NEEDS[format]
    # ONNX Runtime and its GenAI send usage figures away from their start on, unless this is set before.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        if name == "openvino":
            # Without this module OpenVINO takes its own stub; with it, it sends usage figures away when it is imported.
            sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        with stdout_to_stderr() if name == "MNN" else contextlib.nullcontext():
            module = importlib.import_module(name)
    except ImportError as e:
        raise Missing(f"the format {format} needs {name}, which cannot be imported ({e})", fix) from e
    version = getattr(module, "__version__", "") or _distribution_version(name)
    least = OLDEST.get(format, ())
    if tuple(int(n) for n in re.findall(r"\d+", str(version))[: len(least)]) < least:
        oldest = ".".join(map(str, least))
        raise Missing(f"the format {format} needs {name} {oldest} or newer, and {version} is installed", fix)
    return module, f"{name} {str(version).split('-')[0]}"  # OpenVINO adds the commit and the branch


def _distribution_version(name: str) -> str:
    from importlib import metadata

    for candidate in (name, name.replace("_", "-")):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _said(error: BaseException) -> str:
    """The first line of a runtime's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]


def _ordered(inputs: Any, feed: Any) -> list:  # type: ignore[type-arg]
    """The arrays of ``feed`` in the order of ``inputs``, checked; what the file does not ask for is left out."""
    absent = [v.name for v in inputs if v.name not in feed]
    if absent:
        raise CannotRun(f"no value is given for the input {absent[0]}; the file takes {[v.name for v in inputs]}")
    found = []
    for value in inputs:
        array = np.asarray(feed[value.name], order="C")  # a scalar stays one
        if array.dtype.name != value.dtype and array.dtype.kind in "iu" and np.dtype(value.dtype).kind in "iu":
            # MNN and TensorRT make int32 of an int64 input; what it holds is taken.
            kept = array.astype(value.dtype)
            array = kept if np.array_equal(kept, array) else array
        if array.dtype.name != value.dtype:
            raise CannotRun(f"the input {value.name} is {value.dtype}, and {array.dtype} was given")
        if len(array.shape) != len(value.shape) or any(
            n is not None and n != m for n, m in zip(value.shape, array.shape)
        ):
            raise CannotRun(f"the input {value.name} has the shape {value.shape}, and {array.shape} was given")
        found.append(array)
    return found


ORT_TYPES = {
    "float": "float32", "float16": "float16", "double": "float64", "bfloat16": "bfloat16", "int64": "int64",
    "int32": "int32", "int8": "int8", "uint8": "uint8", "bool": "bool",
}  # fmt: skip


def _load_ort(
    format: str,
    path: str,
    threads: int,
    optimisation: str = "all",
    providers: Any = ("CPUExecutionProvider",),
    profile: Optional[str] = None,
) -> Runner:
    ort, version = _module(format)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    levels = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    settings.graph_optimization_level = levels[optimisation]
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, profile
    if "CUDAExecutionProvider" in providers and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's and cuDNN's, where they come as packages
    absent = [p for p in providers if p not in ort.get_available_providers()]
    if absent:
        raise Missing(
            f"this ONNX Runtime has no {absent[0]}; it has {', '.join(ort.get_available_providers())}",
            "install the ONNX Runtime package for that device",
        )
    try:
        session = ort.InferenceSession(path, settings, providers=list(providers))
    except Exception as e:  # its exception types are not public
        raise CannotRun(f"ONNX Runtime cannot load {os.path.basename(path)}: {_said(e)}") from e

    def value(v: Any) -> Value:
        dtype = v.type[len("tensor(") : -1]
        return Value(v.name, tuple(d if isinstance(d, int) else None for d in v.shape), ORT_TYPES.get(dtype, dtype))

    inputs, outputs = [value(v) for v in session.get_inputs()], [value(v) for v in session.get_outputs()]
    names = [v.name for v in outputs]

    device = "cuda" if providers[0] == "CUDAExecutionProvider" else None

    def prepare(feed: Any) -> Any:
        given = dict(zip([v.name for v in inputs], _ordered(inputs, feed)))
        if device is not None:
            return bound(ort, session, given, names, device)

        def call() -> Any:
            return session.run(names, given)

        return call

    return _runner(format, version, inputs, outputs, prepare, native=session)


def bound(ort: Any, session: Any, given: Any, names: Any, device: str) -> Any:
    """A call whose inputs and outputs lie on the device, as trtexec's: what it takes is the inference alone, without
    the way over the bus. Gives OrtValues; it returns when the device is done."""
    binding = session.io_binding()
    for name, array in given.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    for name in names:
        binding.bind_output(name, device, 0)

    def call() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()

    return call


def _runner(format: str, version: str, inputs: Any, outputs: Any, prepare: Any, **more: Any) -> Runner:
    """A runner whose ``run`` is one prepared call."""

    def run(feed: Any) -> Any:
        call = prepare(feed)
        try:
            found = call()
        except CannotRun:
            raise
        except Exception as e:  # every runtime has its own types; the message is passed on
            raise CannotRun(f"{version} cannot run the file: {_said(e)}") from e
        # Copies: some runtimes give views of memory that the next call overwrites.
        return {v.name: np.array(x.numpy() if hasattr(x, "numpy") else x) for v, x in zip(outputs, found)}

    return Runner(format, version, inputs, outputs, run, prepare, **more)


@contextlib.contextmanager
def stdout_to_stderr() -> Any:
    """MNN's C++ writes to standard output, where a program's own answer belongs."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _load_mnn(
    format: str, path: str, threads: int, precision: str = "high", names: Any = (), input_names: Any = ()
) -> Runner:
    with stdout_to_stderr():
        mnn, _ = _module(format)
        from MNN import expr, nn

        # "high": float32 on a phone as well, where the default would be float16.
        settings = {"precision": precision, "backend": "CPU", "numThread": threads}
        manager = nn.create_runtime_manager((settings,))
        try:
            module = nn.load_module_from_file(path, list(input_names), list(names), runtime_manager=manager)
            info = module.get_info()
        except Exception as e:  # MNN raises plain exceptions of several kinds
            raise CannotRun(f"MNN cannot load {os.path.basename(path)}: {_said(e)}") from e
    version = f"MNN {mnn.version()}"
    kinds = {expr.float: "float32", expr.int: "int32", expr.int64: "int64", expr.uint8: "uint8", expr.int8: "int8"}
    # The converter writes 1 for an axis that may vary.
    inputs = [
        Value(name, tuple(d if d > 1 else None for d in given.shape), kinds.get(given.dtype, "float32"))
        for name, given in zip(info["inputNames"], info["inputs"])
    ]
    outputs = [Value(name, (), "float32") for name in (names or info["outputNames"])]

    def prepare(feed: Any) -> Any:
        placed = []
        for array in _ordered(inputs, feed):
            kind = next(k for k, name in kinds.items() if name == array.dtype.name)
            variable = expr.placeholder(list(array.shape), expr.NCHW, kind)
            variable.write(array)
            placed.append(variable)

        def call() -> Any:
            return [np.array(expr.convert(out, expr.NCHW).read(), copy=False) for out in module.forward(placed)]

        return call

    return _runner(format, version, inputs, outputs, prepare, native=module)


def _load_openvino(
    format: str, path: str, threads: int, device: str = "CPU", precision: str = "f32", profile: bool = False
) -> Runner:
    ov, version = _module(format)
    core = ov.Core()
    settings: Any = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = threads
    if profile:
        settings["PERF_COUNT"] = True
    try:
        model = core.read_model(path)
        compiled = core.compile_model(model, device, settings)
    except Exception as e:  # OpenVINO raises RuntimeError of its own kinds
        raise CannotRun(f"OpenVINO cannot load {os.path.basename(path)}: {_said(e)}") from e

    def value(port: Any, name: str) -> Value:
        shape = tuple(None if d.is_dynamic else d.get_length() for d in port.get_partial_shape())
        return Value(name, shape, np.dtype(port.get_element_type().to_dtype()).name)

    inputs = [value(p, p.get_any_name()) for p in compiled.inputs]
    outputs = [value(p, _result_name(p)) for p in compiled.outputs]
    request = compiled.create_infer_request()

    def prepare(feed: Any) -> Any:
        for port, array in zip(compiled.inputs, _ordered(inputs, feed)):
            # A copy: a tensor that shares memory dies with the array.
            request.set_tensor(port, ov.Tensor(array))

        def call() -> Any:
            request.infer()
            return [request.get_tensor(port).data for port in compiled.outputs]

        return call

    return _runner(format, version, inputs, outputs, prepare, native=request)


def _result_name(port: Any) -> str:
    """The output's name in the file it was converted from: a port may carry the names of nodes before it, too."""
    friendly = str(port.get_node().get_friendly_name()).split("/sink_port")[0]
    return friendly if friendly in port.get_names() or not port.get_names() else str(port.get_any_name())


def _load_executorch(format: str, path: str, threads: int, method: str = "forward") -> Runner:
    _, version = _module(format)
    if not version.split()[-1][0].isdigit():
        version = "executorch " + _distribution_version("executorch")
    try:
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
    except ImportError as e:
        raise Missing(f"ExecuTorch's Python runtime does not load ({e})", NEEDS[format][1]) from e
    portable_lib._unsafe_reset_threadpool(threads)  # the one way to set it; before a program is loaded
    try:
        program = Runtime.get().load_program(path)
        loaded = program.load_method(method)
        if loaded is None:
            raise CannotRun(f"{os.path.basename(path)} has no method {method}")
        meta = program.metadata(method)
    except (RuntimeError, KeyError) as e:
        raise CannotRun(f"ExecuTorch cannot load {method} of {os.path.basename(path)}: {_said(e)}") from e
    # A .pte keeps no names: they lie in it as a constant method that gives JSON as bytes.
    names: Any = {"inputs": [], "outputs": []}
    if "signature" in program.method_names:
        given = program.load_method("signature")
        assert given is not None
        names = json.loads(bytes(given.execute([])[0].numpy().astype(np.uint8)).decode())
        names = names.get(method, names)
    types = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool"}

    def values(kind: str, count: int, read: Any) -> Any:
        found = []
        for i in range(count):
            info = read(i)
            name = names[kind][i]["name"] if i < len(names[kind]) else f"{kind[:-1]}{i}"
            shape = names[kind][i]["shape"] if i < len(names[kind]) else list(info.sizes())
            found.append(Value(name, tuple(shape), types.get(info.dtype(), str(info.dtype()))))
        return found

    inputs = values("inputs", meta.num_inputs(), meta.input_tensor_meta)
    outputs = values("outputs", meta.num_outputs(), meta.output_tensor_meta)

    def prepare(feed: Any) -> Any:
        placed = [torch.from_numpy(np.array(a)) for a in _ordered(inputs, feed)]

        def call() -> Any:
            return [x.numpy() for x in loaded.execute(placed)]

        return call

    return _runner(format, version, inputs, outputs, prepare, native=program)


def _load_litert(format: str, path: str, threads: int) -> Runner:
    _, version = _module(format)
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=path, num_threads=threads)
        signatures = interpreter.get_signature_list()
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as e:
        raise CannotRun(f"LiteRT cannot load {os.path.basename(path)}: {_said(e)}") from e
    key = "serving_default" if "serving_default" in signatures else next(iter(signatures), None)
    if key is None:
        raise CannotRun(f"{os.path.basename(path)} has no signature, so its inputs have no names")
    runner = interpreter.get_signature_runner(key)
    # It names them by their place (args_0, output_0); the real names lie beside the file.
    beside = os.path.join(os.path.dirname(path), "signature.json")
    names: Any = {"inputs": [], "outputs": []}
    if os.path.exists(beside):
        with open(beside, encoding="utf-8") as file:
            names = json.load(file)

    def place(name: str) -> Any:
        return int(name.rpartition("_")[2]) if name.rpartition("_")[2].isdigit() else 0, name

    taken = sorted(runner.get_input_details(), key=place)
    given_out = sorted(runner.get_output_details(), key=place)

    def values(kind: str, keys: Any, details: Any) -> Any:
        found = []
        for i, key in enumerate(keys):
            detail = details[key]
            name = names[kind][i] if i < len(names[kind]) else key
            marks = detail.get("shape_signature", detail["shape"])
            found.append(Value(name, tuple(int(d) if d >= 0 else None for d in marks), np.dtype(detail["dtype"]).name))
        return found

    inputs = values("inputs", taken, runner.get_input_details())
    outputs = values("outputs", given_out, runner.get_output_details())

    def prepare(feed: Any) -> Any:
        given = dict(zip(taken, _ordered(inputs, feed)))

        def call() -> Any:
            found = runner(**given)
            return [found[key] for key in given_out]

        return call

    return _runner(format, version, inputs, outputs, prepare, native=interpreter)


def genai_model(folder: str, threads: Optional[int] = None) -> Any:
    """The model of a folder with genai_config.json in ONNX Runtime GenAI.

    Raises:
        Missing: it is not installed, or too old.
        CannotRun: it cannot load it.
    """
    og, _ = _module("genai")
    og.disable_telemetry_events()
    try:
        settings = og.Config(folder)
        if threads is not None:
            options = {"session_options": {"intra_op_num_threads": threads, "inter_op_num_threads": 1}}
            settings.overlay(json.dumps({"model": {"decoder": options}}))
        return og.Model(settings)
    except RuntimeError as e:
        raise CannotRun(f"ONNX Runtime GenAI cannot load {folder}: {_said(e)}") from e


def _load_genai(format: str, path: str, threads: int) -> Runner:
    """``path`` is genai_config.json in the folder. Tokens go in, the logits behind each come out; no cache is kept."""
    og, version = _module(format)
    model = genai_model(os.path.dirname(path), threads)
    with open(path, encoding="utf-8") as file:
        facts = json.load(file)["model"]
    inputs = [Value("input_ids", (1, None), "int32")]
    outputs = [Value("logits", (1, None, int(facts["vocab_size"])), "float32")]

    def prepare(feed: Any) -> Any:
        (ids,) = _ordered(inputs, feed)

        def call() -> Any:
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(do_sample=False, max_length=ids.shape[1] + 1)
            generator = og.Generator(model, parameters)
            generator.append_tokens(ids[0])
            return [generator.get_output("logits")]

        return call

    return _runner(format, version, inputs, outputs, prepare, native=model)


class Cuda:
    """What TensorRT needs of the CUDA driver, by its C interface: the driver alone must be installed.

    Raises:
        Missing: there is no driver, or no device.
    """

    def __init__(self, device: int = 0) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self.lib = ctypes.CDLL(name)
        except OSError as e:
            raise Missing(f"there is no CUDA driver here ({name} does not load)", "run it on a machine with one") from e
        for function, arguments in {
            "cuMemAlloc_v2": [ctypes.c_void_p, ctypes.c_size_t],
            "cuMemFree_v2": [ctypes.c_uint64],
            "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p],
            "cuMemcpyDtoHAsync_v2": [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p],
            "cuStreamCreate": [ctypes.c_void_p, ctypes.c_uint],
            "cuStreamSynchronize": [ctypes.c_void_p],
            "cuEventCreate": [ctypes.c_void_p, ctypes.c_uint],
            "cuEventRecord": [ctypes.c_void_p, ctypes.c_void_p],
            "cuEventElapsedTime": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
            "cuDeviceGet": [ctypes.c_void_p, ctypes.c_int],
            "cuDevicePrimaryCtxRetain": [ctypes.c_void_p, ctypes.c_int],
            "cuCtxSetCurrent": [ctypes.c_void_p],
        }.items():
            getattr(self.lib, function).argtypes = arguments
        try:
            self._call("cuInit", 0)
            handle, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(handle), device)
        except CannotRun as e:
            raise Missing(f"there is no CUDA device {device} here: {e}", "run it on a machine with one") from e
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)  # the context the runtime API uses, too
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # CU_STREAM_NON_BLOCKING
        self.stream = stream

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self.lib, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorString(status, ctypes.byref(text))
            raise CannotRun(f"CUDA: {function} failed: {text.value.decode() if text.value else status}")

    def alloc(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def to_device(self, address: int, array: Any) -> None:
        if array.nbytes:
            self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def to_host(self, array: Any, address: int) -> None:
        if array.nbytes:
            self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    def event(self) -> Any:
        found = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(found), 0)
        return found

    def record(self, event: Any) -> None:
        self._call("cuEventRecord", event, self.stream)

    def seconds(self, begin: Any, end: Any) -> float:
        found = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(found), begin, end)
        return found.value / 1000

    def wait(self) -> None:
        self._call("cuStreamSynchronize", self.stream)


def _load_tensorrt(
    format: str,
    path: str,
    threads: int,
    profile: int = 0,
    cuda_graph: bool = False,
    runtime_cache: Optional[str] = None,
    device: int = 0,
) -> Runner:
    trt, version = _module(format)
    cuda = Cuda(device)
    logger = trt_logger(trt)
    runtime = trt.Runtime(logger)
    engine = _trt_engine(runtime, logger, path, version)
    if not 0 <= profile < engine.num_optimization_profiles:
        raise CannotRun(f"the engine has {engine.num_optimization_profiles} optimisation profiles, no {profile}")
    context, save_cache = _trt_context(trt, engine, cuda_graph, runtime_cache)
    if context is None or not context.set_optimization_profile_async(profile, cuda.stream.value):
        raise CannotRun(f"{version} gives no execution context: {logger.last}")
    cuda.wait()
    loaded = _Engine(trt, version, cuda, logger, engine, context, profile)

    def run(feed: Any) -> Any:
        found = {v.name: x.fetch() for v, x in zip(loaded.outputs, loaded.prepare(feed)())}
        save_cache()
        return found

    native = (engine, context, runtime, logger)
    return Runner(
        format, version, loaded.inputs, loaded.outputs, run, loaded.prepare, lambda: loaded.last_seconds, native
    )


def _trt_engine(runtime: Any, logger: Any, path: str, version: str) -> Any:
    with open(path, "rb") as file:
        engine = runtime.deserialize_cuda_engine(file.read())
    if engine is not None:
        return engine
    # As TensorRT-RTX 1.7 says it on an H100.
    pattern = r"has compute capability (\d+\.\d+)\. Supported compute capabilities: ([\d. ]*\d)"
    other = re.search(pattern, logger.last)
    if other is not None:
        raise Missing(
            f"this GPU has compute capability {other[1]}, the engine was built for {other[2].replace(' ', ', ')}",
            "run it on such a GPU",
        )
    raise CannotRun(f"{version} cannot load {os.path.basename(path)}: {logger.last}")


class _Engine:
    """An engine with a context of its own and room on the device for what goes in and out."""

    def __init__(self, trt: Any, version: str, cuda: Any, logger: Any, engine: Any, context: Any, profile: int) -> None:
        self.version, self.cuda, self.logger = version, cuda, logger
        self.engine, self.context, self.profile = engine, context, profile
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

        def value(name: str) -> Value:
            shape = tuple(None if d < 0 else int(d) for d in engine.get_tensor_shape(name))
            return Value(name, shape, np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name)

        self.inputs = [value(n) for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [value(n) for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self._host = trt.TensorLocation.HOST
        self._buffers: Any = {}  # name -> (address, bytes)
        self._held: Any = {}  # arrays on the host that the engine reads its shapes from
        self._begin, self._end = cuda.event(), cuda.event()
        self.last_seconds = 0.0

    def _room(self, name: str, size: int) -> int:
        address, have = self._buffers.get(name, (0, -1))
        if have < size:
            if have >= 0:
                self.cuda.free(address)
            address = self.cuda.alloc(size)
            self._buffers[name] = (address, size)
        return int(address)

    def _place(self, name: str, array: Any) -> None:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if any(not a <= n <= b for a, n, b in zip(low, array.shape, high)):
            raise CannotRun(
                f"the shape {tuple(array.shape)} of {name} lies outside the engine's profile:"
                f" {tuple(low)} to {tuple(high)}"
            )
        if not self.context.set_input_shape(name, tuple(array.shape)):
            raise CannotRun(f"{self.version} refuses the shape {tuple(array.shape)} of {name}: {self.logger.last}")
        if self.engine.get_tensor_location(name) == self._host:
            self._held[name] = array
            self.context.set_tensor_address(name, array.ctypes.data)
            return
        address = self._room(name, array.nbytes)
        self.cuda.to_device(address, array)
        self.context.set_tensor_address(name, address)

    def _output_size(self, value: Value) -> int:
        """Bytes; where the values say how large an output gets, the most it may be."""
        shape = tuple(self.context.get_tensor_shape(value.name))
        if any(d < 0 for d in shape):
            return int(self.context.get_max_output_size(value.name))
        return int(np.prod(shape, dtype=np.int64)) * np.dtype(value.dtype).itemsize

    def prepare(self, feed: Any) -> Any:
        """Brings ``feed`` onto the device; returns what runs the engine on it."""
        for value, array in zip(self.inputs, _ordered(self.inputs, feed)):
            self._place(value.name, array)
        unknown = self.context.infer_shapes()
        if unknown:
            raise CannotRun(f"the shapes of {', '.join(unknown)} are not known")
        for value in self.outputs:
            self.context.set_tensor_address(value.name, self._room(value.name, self._output_size(value)))
        self.cuda.wait()
        return self._call

    def _call(self) -> Any:
        self.cuda.record(self._begin)
        if not self.context.execute_async_v3(self.cuda.stream.value):
            raise CannotRun(f"{self.version} cannot run the engine: {self.logger.last}")
        self.cuda.record(self._end)
        self.cuda.wait()
        self.last_seconds = self.cuda.seconds(self._begin, self._end)
        return [_OnDevice(self.cuda, self._buffers[v.name][0], self.context, v) for v in self.outputs]


class _OnDevice(NamedTuple):
    """An output that has not been copied to the host."""

    cuda: Any
    address: int
    context: Any
    value: Value

    def fetch(self) -> Any:
        array = np.empty(tuple(self.context.get_tensor_shape(self.value.name)), np.dtype(self.value.dtype))
        self.cuda.to_host(array, self.address)
        self.cuda.wait()
        return array


def trt_logger(trt: Any) -> Any:
    """A logger that keeps the last error for the message to the user."""

    class Keep(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "it did not say why"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = message.strip().splitlines()[0][:400] if message.strip() else self.last

    return Keep()


def _trt_context(trt: Any, engine: Any, cuda_graph: bool, cache_path: Optional[str]) -> Any:
    """An execution context; the RTX form compiles kernels when it is made and can keep them in a file."""

    def nothing() -> None:
        return None

    if not hasattr(trt, "CudaGraphStrategy"):  # the form for data centres: no compilation when it runs
        if cuda_graph or cache_path is not None:
            raise CannotRun("cuda_graph and runtime_cache are options of tensorrt_rtx; tensorrt has neither")
        return engine.create_execution_context(), nothing
    config = engine.create_runtime_config()
    strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if cuda_graph else trt.CudaGraphStrategy.DISABLED
    config.cuda_graph_strategy = strategy
    # With LAZY the first calls would run a fallback kernel, and a benchmark would time that.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if cache_path is None:
        return engine.create_execution_context(config), nothing
    cache = config.create_runtime_cache()
    if os.path.exists(cache_path):
        with open(cache_path, "rb") as file:
            cache.deserialize(file.read())
    config.set_runtime_cache(cache)

    def save() -> None:
        partial = f"{cache_path}.{os.getpid()}.partial"
        with open(partial, "wb") as file:
            file.write(bytes(cache.serialize()))
        os.replace(partial, cache_path)

    return engine.create_execution_context(config), save


LOADERS: "dict[str, Any]" = {
    "onnx": _load_ort,
    "ort": _load_ort,
    "mnn": _load_mnn,
    "openvino": _load_openvino,
    "executorch": _load_executorch,
    "litert": _load_litert,
    "genai": _load_genai,
    "tensorrt": _load_tensorrt,
    "tensorrt_rtx": _load_tensorrt,
}
