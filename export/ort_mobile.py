"""ONNX Runtime's own file format (.ort) for its mobile packages: fused when it is made, loaded without parsing.

Made by ``onnxruntime.tools.convert_onnx_models_to_ort``, which also lists the operators that a build of ONNX Runtime
with nothing else must hold. The weights stand inside each file: prefill and decode cannot share them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.exporters import formats, onnx_file, parity, runtimes

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner

CONFIG = "required_operators.config"


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``<component>.ort`` and the list of operators that they need.

    Raises:
        CompressError: ONNX Runtime cannot convert the graph.
    """
    import onnxruntime as ort
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    began = time.monotonic()
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as beside, tempfile.TemporaryDirectory() as given:
        for name, path in formats.components(source.path).items():
            made[name] = onnx_file.convert(
                path, Path(given) / f"{name}.onnx", source, name, replace(options, fusions="none")
            )
        # It prints what it does; where it fails it says so with an exception of any kind.
        with redirect_stdout(sys.stderr):
            try:
                convert_onnx_models_to_ort(Path(given), Path(beside), [OptimizationStyle.Fixed])
            except Exception as e:
                raise CompressError(
                    f"ONNX Runtime cannot convert the graph: {(str(e).splitlines() or [type(e).__name__])[0][:300]}",
                    where=str(source.path),
                    fix="name another --format",
                ) from e
        for name in made:
            written = Path(beside) / f"{name}.ort"
            (folder / written.name).write_bytes(written.read_bytes())
        operators = sorted(Path(beside).glob("*.config"))
        if operators:
            (folder / CONFIG).write_bytes(operators[0].read_bytes())
    return {
        "components": made,
        "versions": {"onnxruntime": ort.__version__},
        "seconds": round(time.monotonic() - began, 1),
    }


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    return parity.check_built(source, folder, options, load)


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    return runtimes.load("ort", str(folder / f"{component}.ort"), options.threads)
