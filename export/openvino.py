"""ONNX to OpenVINO's intermediate representation: a graph in XML, and weights that may be stored in float16.

With ``fp16`` the weights are halved on disk; the arithmetic of the CPU plugin stays float32 unless it is asked for
otherwise. ``int8`` is made of the file that ONNX Runtime quantised: OpenVINO takes its scales as they are.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.exporters import formats, parity, quantize, runtimes
from compress.exporters.refused import of_graph, plain
from compress.run.progress import say

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``<component>.xml`` and ``<component>.bin``.

    Raises:
        CompressError: OpenVINO cannot read the graph; it says which operator.
    """
    # Without this module OpenVINO takes its own stub; with it, it sends usage figures away when it is imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino as ov

    began = time.monotonic()
    made: dict[str, Any] = {}
    for name, path in formats.components(source.path).items():
        say(f"openvino: converting {name} to {options.precision}")
        with tempfile.TemporaryDirectory() as beside:
            graph = path
            if options.precision == "int8":
                graph = Path(beside) / "int8.onnx"
                # It makes activations unsigned; without VNNI its sums of 8 bits by 8 then saturate in 16.
                quantize.static_int8(path, graph, source.calibration.get(name, ()), seven_bits=True)
            try:
                model = ov.Core().read_model(graph)
                ov.save_model(model, folder / f"{name}.xml", compress_to_fp16=options.precision == "fp16")
            except RuntimeError as e:  # OpenVINO's exceptions are of this kind
                raise CompressError(
                    f"openvino cannot take the graph: {_reason(str(e), path)}",
                    where=str(path),
                    fix="rewrite what it names, or name another --format",
                ) from e
            ops: dict[str, int] = {}
            for node in model.get_ops():
                ops[node.get_type_name()] = ops.get(node.get_type_name(), 0) + 1
            made[name] = {"ops": dict(sorted(ops.items()))}
    return {
        "components": made,
        "versions": {"openvino": ov.__version__},
        "seconds": round(time.monotonic() - began, 1),
    }


def _reason(text: str, graph: Path) -> str:
    """What OpenVINO's message says after the lines that say where in its own code."""
    unknown = re.search(r"No conversion rule found for operations: (?:[\w.]+\.)?([A-Za-z]\w*)(?:-\d+)?", text)
    if unknown:
        return f"it has no rule for {of_graph(unknown[1], graph)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "not supported" in line or "No conversion rule" in line or "onnx" in line]
    return plain((telling or lines or [""])[0])


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    return parity.check_built(source, folder, options, load)


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    return runtimes.load("openvino", str(folder / f"{component}.xml"), options.threads)
