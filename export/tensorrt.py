"""ONNX to a TensorRT engine, by `tensorrt_rtx` or `tensorrt`: one path, as both have one API.

`tensorrt_rtx` builds without a GPU for the compute capabilities that are named, and compiles the rest where the engine
is loaded. `tensorrt` builds for the GPU that is there. Both take the types of the graph as they are (strongly typed),
so a lower precision is written into the graph first, see `compress.exporters.cast`.

Source: NVIDIA's documentation of TensorRT 11 and TensorRT for RTX 1.7.
"""

from __future__ import annotations

import importlib
import re
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.exporters import formats, parity, runtimes
from compress.exporters.cast import cast_file
from compress.exporters.refused import plain
from compress.run.cache import sha256_of
from compress.system.files import whole_file

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner

SUFFIX = ".engine"


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``<component>.engine`` for every component.

    Returns:
        ``{"components": {name: {"profiles", "layers", "network_layers", "bytes", "seconds"}}, "capabilities",
        "versions", "timing_cache", "seconds"}``.

    Raises:
        UsageError: a compute capability or shape is wrong, or there is no GPU where one is needed.
        CompressError: an operator is not supported (its node is named), or the engine cannot be built.
    """
    began = time.monotonic()
    trt = importlib.import_module(options.format)
    log = runtimes.trt_logger(trt)
    made: dict[str, Any] = {}
    for name, path in formats.components(source.path).items():
        say_what = f"{options.format}: building {name} in {options.precision}"
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            graph = path
            if options.precision != "fp32":
                graph = Path(beside) / f"{name}.onnx"
                cast_file(path, graph, options.precision)
            made[name] = _build_one(trt, log, name, graph, path, folder / f"{name}{SUFFIX}", options, say_what)
    return {
        "components": made,
        "capabilities": list(options.capabilities) if _is_rtx(trt) else ["the GPU it was built on"],
        "versions": {options.format: trt.__version__, "onnx parser": str(trt.get_nv_onnx_parser_version())},
        "timing_cache": _cache_facts(trt, options.timing_cache),
        "seconds": round(time.monotonic() - began, 1),
    }


def _build_one(
    trt: Any, log: Any, name: str, graph: Path, original: Path, target: Path, options: BuildOptions, doing: str
) -> dict[str, Any]:
    from compress.run.progress import say

    say(doing)
    began = time.monotonic()
    builder = _builder(trt, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise CompressError(
            f"{options.format} cannot take the graph: {_refusal(trt, parser, log)}",
            where=str(original),
            fix="rewrite what it names, or name another --format",
        )
    config = builder.create_builder_config()
    if _is_rtx(trt):
        _set_capabilities(trt, config, options.capabilities)
    cache = _use_timing_cache(trt, config, options.timing_cache)
    ports = formats.read_graph(original)
    profiles = formats.profiles_of(options, name, ports)
    dynamic = any(isinstance(a, str) for p in ports.inputs for a in p.shape)
    for axes in profiles if dynamic else ():
        profile = builder.create_optimization_profile()
        for port in ports.inputs:
            low, opt, high = (port.at({a: s[i] for a, s in axes.items()}) for i in range(3))
            profile.set_shape(port.name, low, opt, high)
        if config.add_optimization_profile(profile) < 0:
            raise CompressError(f"{options.format} refuses the profile {axes}: {log.last}", where=str(original), fix="")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise CompressError(
            f"{options.format} cannot build {name}: {log.last}",
            where=str(original),
            fix="change the shapes or rewrite what it names",
        )
    with target.open("wb") as file:
        file.write(memoryview(engine))
    _keep_timing_cache(trt, config, cache, options.timing_cache)
    return {
        "profiles": profiles if dynamic else [],
        "network_layers": network.num_layers,
        "layers": _layers(network),
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "bytes": target.stat().st_size,
        "seconds": round(time.monotonic() - began, 1),
    }


def _builder(trt: Any, log: Any) -> Any:
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError) as e:  # pybind's answer to a null pointer
        raise UsageError(
            f"{trt.__name__} gives no builder here: {log.last}",
            where="--format",
            fix="tensorrt builds for the GPU that is there; tensorrt_rtx builds without one",
        ) from e
    return builder


def _is_rtx(trt: Any) -> bool:
    return hasattr(trt, "ComputeCapability")


def _set_capabilities(trt: Any, config: Any, names: Sequence[str]) -> None:
    known = {n.lower(): v for n, v in trt.ComputeCapability.__members__.items() if n.startswith("SM")}
    if not names:
        raise UsageError("no compute capability is named", where="capabilities", fix=f"one of: {', '.join(known)}")
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        if name.lower() not in known:
            raise UsageError(
                f"{trt.__name__} {trt.__version__} builds for no compute capability {name!r}",
                where="capabilities",
                fix=f"one of: {', '.join(known)}",
            )
        config.set_compute_capability(known[name.lower()], i)


def _refusal(trt: Any, parser: Any, log: Any) -> str:
    """The first node the parser did not take, by operator and name."""
    if not parser.num_errors:
        return plain(log.last)
    error = parser.get_error(0)
    operator, node = error.node_operator(), error.node_name()
    why = str(error.desc()).strip().splitlines()
    reason = re.sub(r"^In (node|function) .*?: ", "", why[0]) if why else "it does not say why"
    if not operator:
        return reason
    told = "" if reason == "false" or reason.startswith("Invalid Node") else f" ({plain(reason)})"
    return f"the operator {operator} of the node {node or error.node()!r}{told}"


def _layers(network: Any) -> dict[str, int]:
    """Layers by kind and output type, as the network is before TensorRT fuses it.

    What it becomes is known by the engine inspector, which needs the GPU to load the engine.
    """
    found: dict[str, int] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = f"{layer.type.name.lower()} {_type(layer.get_output(0).dtype) if layer.num_outputs else ''}".strip()
        found[kind] = found.get(kind, 0) + 1
    return dict(sorted(found.items()))


def _type(dtype: Any) -> str:
    return str(dtype.name).lower()


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": _type(tensor.dtype), "shape": [int(d) for d in tensor.shape]}


def _use_timing_cache(trt: Any, config: Any, path: Path | None) -> Any:
    """With the kernel timings of an earlier build the same kernels are chosen; the RTX form times none."""
    if path is None or _is_rtx(trt):
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _keep_timing_cache(trt: Any, config: Any, cache: Any, path: Path | None) -> None:
    if cache is None or path is None:
        return
    with warnings.catch_warnings(), whole_file(path) as partial:
        warnings.simplefilter("ignore", DeprecationWarning)
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _cache_facts(trt: Any, path: Path | None) -> Mapping[str, str]:
    if _is_rtx(trt):
        return {"none": "tensorrt_rtx times no kernels when it builds"}
    if path is None:
        return {"none": "not asked for"}
    return {"file": path.name, "sha256": sha256_of(path)}


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Runs the engines where there is a CUDA driver, see `parity.check_built`; says why where there is none."""
    return parity.check_built(source, folder, options, load)


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    return runtimes.load(options.format, str(folder / f"{component}{SUFFIX}"), options.threads)
