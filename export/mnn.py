"""A plain network for MNN, a runtime for phones and PCs whose kernels skip zeros.

The ONNX file is converted with ``--detectSparseSpeedUp``: a layer with more than about 60 % zeros (fewer where they
come in blocks of output channels) is stored and run without them, so that the file gets smaller too. Source: MNN's
documentation of its converter. What it is worth is measured by ``tools/bench_sparse.py``.

MNN's C++ writes to standard output, and its console script ``mnnconvert`` installs a package by itself and sends usage
figures away. So only the compiled converter is called, and everything runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.distribution import install_line
from compress.errors import CompressError, UsageError
from compress.exporters import names as onnx_names
from compress.exporters import onnx_module
from compress.exporters.bench.local import LOCAL
from compress.exporters.bench.transport import answered, stored
from compress.exporters.refused import of_graph, plain
from compress.processes.children import python

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner

FILE = "model.mnn"
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def require_mnn() -> None:
    """Raises:
    UsageError: MNN is not installed.
    """
    if importlib.util.find_spec("MNN") is None or importlib.util.find_spec("_tools") is None:
        raise UsageError(
            "the format mnn needs MNN, which is not installed", where="export.formats", fix=install_line("mnn")
        )


def export_mnn(source: Path, folder: Path, *, sparse: bool = True, block: int = 1) -> dict[str, Any]:
    """Writes ``folder/model.mnn`` from the ONNX file ``source``.

    Args:
        sparse: layers with enough zeros are stored and run without them.
        block: so many output channels of a layer are zero together in a column (Global MP makes 1).

    Returns:
        ``{"bytes": {file: size}, "seconds"}``.

    Raises:
        UsageError: MNN is not installed.
        CompressError: MNN cannot convert the file.
    """
    require_mnn()
    began = time.monotonic()
    target = folder / FILE
    target.unlink(missing_ok=True)
    arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "compress"]
    with tempfile.TemporaryDirectory() as beside:
        if sparse:
            arguments.append("--detectSparseSpeedUp")
        if block > 1:
            (Path(beside) / "blocks").write_bytes(_blocks(block))
            arguments += ["--compressionParamsFile", str(Path(beside) / "blocks")]
        done = subprocess.run(
            python("-c", CONVERT, *arguments), capture_output=True, encoding="utf-8", errors="replace", cwd=beside
        )
    if done.returncode or not target.exists():  # the converter ends with 0 where it fails, too
        raise CompressError(
            f"MNN cannot convert the network: {_reason(done.stdout + done.stderr, source)}",
            where=str(source),
            fix="leave mnn out of export.formats, or rewrite what it names",
        )
    return {"bytes": {FILE: target.stat().st_size}, "seconds": round(time.monotonic() - began, 1)}


def _reason(said: str, graph: Path) -> str:
    """What the converter's pages say: the operator it does not know, or its last words."""
    unknown = re.search(r"Op Not Support: \s*(?:\w+::)?(\w+)", said)
    if unknown:
        return f"it does not know {of_graph(unknown[1], graph)}"
    lines = [line for line in said.splitlines() if line.strip() and "device supports" not in line]
    return plain(re.sub(r"^\[[\d:]+\] :\d+: ", "", lines[-1])) if lines else "it did not say why"


def _blocks(block: int) -> bytes:
    """MNN's protobuf message Compression.Pipeline that says: pruned in blocks of output channels."""

    def field(number: int, value: int | bytes) -> bytes:
        head = bytes([number << 3 | (0 if isinstance(value, int) else 2)])
        return head + bytes([value]) if isinstance(value, int) else head + bytes([len(value)]) + value

    params = field(1, 1) + field(3, field(4, block))  # type SIMD_OC, its oc_blocks
    return field(1, b"1") + field(2, field(1, 1) + field(3, params))  # version; algorithm PRUNE


def run_mnn(path: Path, inputs: NDArray[np.float32], names: Sequence[str], threads: int = 1) -> list[NDArray[Any]]:
    """The outputs ``names`` for one batch, computed in a process of its own.

    Raises:
        CompressError: MNN cannot load or run the file, or its weights lie outside its folder.
    """
    stored("mnn", path)
    with tempfile.TemporaryDirectory() as beside:
        given, found = Path(beside) / "input.npy", Path(beside) / "outputs.npz"
        np.save(given, inputs)
        request = {
            "do": "run", "format": "mnn", "files": {"model": str(path)}, "threads": threads,
            "options": {"names": list(names)}, "input": str(given), "outputs": str(found),
        }  # fmt: skip
        try:
            answered(LOCAL.run(request), str(path))
        except CompressError as e:
            raise CompressError(f"MNN cannot run the network: {e.what}", where=str(path), fix="export it again") from e
        with np.load(found) as held:
            return [held[name] for name in names]


@torch.no_grad()
def check_mnn(
    model: nn.Module, folder: Path, inputs: Tensor, names: Sequence[str], *, tolerance: float, threads: int = 1
) -> dict[str, Any]:
    """Compares MNN with torch on real ``inputs`` (n, ...), in batches of n, 3 and 1: faults may depend on it.

    Returns:
        ``{"outputs": {name: largest difference, relative to the largest value}, "tolerance", "samples"}``.

    Raises:
        CompressError: an output differs by more than ``tolerance``, has another shape, or MNN cannot run the file.
    """
    outputs = onnx_module._Outputs(model, names).eval()
    worst: dict[str, float] = dict.fromkeys(names, 0.0)
    for part in (inputs, inputs[:3], inputs[:1]):
        got = run_mnn(folder / FILE, part.numpy(), names, threads)
        for name, w, g in zip(names, outputs(part), got, strict=True):
            expected = w.numpy()
            scale = float(np.abs(expected).max()) or 1.0
            alike = g.shape == expected.shape
            # np.maximum, not max: NaN must come through.
            worst[name] = float(np.maximum(worst[name], np.abs(expected - g).max() / scale if alike else np.inf))
    bad = {name: value for name, value in worst.items() if not value <= tolerance}
    if bad:
        name, value = next(iter(bad.items()))
        raise CompressError(
            f"the network in MNN differs from torch: {name} by {value:.2e}",
            where=str(folder / FILE),
            fix="leave mnn out of export.formats; where the ONNX file agrees, MNN's converter is at fault",
        )
    return {"outputs": worst, "tolerance": tolerance, "samples": len(inputs)}


def write_checked_mnn(
    model: nn.Module, inputs: Tensor, names: Sequence[str], folder: Path, tolerance: float
) -> dict[str, Any]:
    """Converts ``folder/model.onnx`` and compares on ``inputs`` (2 or more, ...); the facts go into mnn.json too.

    Raises:
        UsageError: MNN is not installed.
        CompressError: the conversion or the comparison failed. MNN 3.6.1 on x86 computes some networks wrong once zeros
            are skipped: a ResNet of 4 to 7 channels by up to 1e31, of 12 at some batches only; of 8, 16 and 32 channels
            all agreed. Such a fault is told apart from others.
    """
    source = folder / onnx_names.FILE
    made = export_mnn(source, folder)
    try:
        parity = check_mnn(model, folder, inputs, names, tolerance=tolerance)
    except CompressError as wrong:
        with tempfile.TemporaryDirectory() as beside:
            export_mnn(source, Path(beside), sparse=False)
            check_mnn(model, Path(beside), inputs, names, tolerance=tolerance)
        raise CompressError(
            f"{wrong.what}; without skipping zeros it agrees, so MNN's kernels for zeros are wrong for this network",
            where=str(folder / FILE),
            fix="leave mnn out of export.formats, or make the channels of every layer a multiple of 8",
        ) from wrong
    facts: dict[str, Any] = {
        **made,
        "largest_difference": max(parity["outputs"].values()),
        "outputs_compared": len(parity["outputs"]),
        **parity,
    }
    (folder / "mnn.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``model.mnn``, its zeros left out where there are enough of them.

    Raises:
        UsageError: it is a language model: MNN's converter has its own exporter for those.
        CompressError: MNN cannot convert the graph.
    """
    from compress.exporters import formats

    files = formats.components(source.path)
    if list(files) != ["model"]:
        raise UsageError(
            "a language model is not exported to MNN", where=str(source.path), fix="name another --format, as ort"
        )
    made = export_mnn(files["model"], folder)
    from compress.exporters.runtimes import available

    return {
        "components": {"model": {"ops": dict(formats.read_graph(files["model"]).ops)}},
        "versions": {"MNN": available("mnn")},
        "seconds": made["seconds"],
    }


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    from compress.exporters import parity

    return parity.check_built(source, folder, options, load)


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    from compress.exporters import runtimes

    return runtimes.load("mnn", str(folder / FILE), options.threads)
