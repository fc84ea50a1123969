"""ONNX as a deployed file: as it was exported, in another precision, or with ONNX Runtime's fusions written into it.

Fused files hold operators of ONNX Runtime's own, so nothing else reads them; they load faster and run as fast as what
ONNX Runtime makes of the plain file when it loads it. prefill and decode share one weights file at every precision.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.exporters import formats, parity, quantize, runtimes, tensors
from compress.exporters.cast import cast_file
from compress.run.progress import say

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner

LARGE = 1 << 20  # bytes of weights from which they stand beside the graph


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``<component>.onnx``, and ``weights.data`` where the weights stand beside the graph.

    Raises:
        CompressError: the graph cannot be cast, quantised or fused.
    """
    import onnxruntime as ort

    began = time.monotonic()
    made = {
        name: convert(path, folder / f"{name}.onnx", source, name, options)
        for name, path in formats.components(source.path).items()
    }
    if len(made) > 1:
        share_weights(folder, list(made))
    for name in made:
        made[name]["ops"] = dict(formats.read_graph(folder / f"{name}.onnx", own_operators=False).ops)
    return {
        "components": made,
        "fusions": options.fusions,
        "versions": {"onnxruntime": ort.__version__},
        "seconds": round(time.monotonic() - began, 1),
    }


def convert(path: Path, target: Path, source: Source, component: str, options: BuildOptions) -> dict[str, Any]:
    """``target`` from the ONNX file ``path`` in the precision and with the fusions asked for."""
    say(f"onnx: {component} in {options.precision}")
    facts: dict[str, Any] = {}
    first = target if options.fusions == "none" else target.with_name(f"plain.{target.name}")
    if options.precision in ("fp16", "bf16"):
        facts |= cast_file(path, first, options.precision)
    elif options.precision == "int8":
        quantize.static_int8(path, first, source.calibration.get(component, ()))
    elif options.precision == "int8-weights":
        facts["quantised"] = quantize.weights_int8(path, first)
    else:
        tensors.gather(path, first)
    if options.fusions != "none":
        facts["nodes_before"] = formats.read_graph(first).nodes
        try:
            fuse(first, target, options.fusions)
        except CompressError as e:
            e.rename(first, path)
            raise
        facts["nodes"] = formats.read_graph(target, own_operators=False).nodes
        for left in tensors.files(first):
            left.unlink()
    return facts


def fuse(path: Path, target: Path, how: str) -> None:
    """Writes what ONNX Runtime makes of a graph when it loads it: ``basic``, or ``all`` but what fits one CPU only.

    ``all`` comes with onnxscript's patterns of transformers as well (norms, rotary embeddings, attention), which ONNX
    Runtime finds only in graphs of older exporters.

    Raises:
        CompressError: it cannot load it.
    """
    import onnx_ir as ir
    import onnxruntime as ort

    if how == "all":
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        beside = len(tensors.files(path)) > 1
        model, _ = optimize_for_ort(ir.load(path))
        path = path.with_name(f"patterns.{path.name}")
        held = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        ir.save(model, path, external_data=f"{path.stem}.data" if beside or held > LARGE else None)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    settings.graph_optimization_level = levels.ORT_ENABLE_BASIC if how == "basic" else levels.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(target)
    stored = tensors.files(path)
    if path.stat().st_size < tensors.size(stored[1:]):
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{target.stem}.data"
        )
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(tensors.SMALL)
        )
    try:
        ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as e:  # its exception types are not public
        raise CompressError(
            f"ONNX Runtime cannot fuse the graph: {str(e).splitlines()[0][:300]}", where=str(path), fix="--fusions none"
        ) from e
    if how == "all":
        for left in stored:
            left.unlink()


def share_weights(folder: Path, names: list[str]) -> None:
    """Writes the weights of several graphs once, into ``weights.data``: equal bytes are kept one time."""
    import hashlib

    import onnx

    from compress.exporters.names import WEIGHTS

    paths = {name: folder / f"{name}.onnx" for name in names}
    models = {name: tensors.read(path, weights=True) for name, path in paths.items()}
    for left in {file for path in paths.values() for file in tensors.files(path)}:
        left.unlink()
    places: dict[str, int] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for model in models.values():
            for held in tensors.walk(model):
                tensor = held.tensor
                if not held.initialiser or tensor.data_type == onnx.TensorProto.STRING:
                    continue
                data = onnx.numpy_helper.to_array(tensor).tobytes() if not tensor.raw_data else tensor.raw_data
                if len(data) < tensors.SMALL:
                    continue
                digest = hashlib.sha256(data).hexdigest()
                if digest not in places:
                    file.write(b"\0" * (-file.tell() % 64))
                    places[digest] = file.tell()
                    file.write(data)
                tensors.place(tensor, WEIGHTS, places[digest], len(data))
    for name, model in models.items():
        tensors.write(model, paths[name])


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    return parity.check_built(source, folder, options, load)


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    return runtimes.load("onnx", str(folder / f"{component}.onnx"), options.threads)
