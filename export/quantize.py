"""8 bits by ONNX Runtime's own quantisers.

``static_int8``: weights and activations, with scales from real inputs of the calibration split (QDQ: a quantise and a
dequantise node around each operator, which other runtimes read as well). ``weights_int8``: only the weights of matrix
products, in blocks, for language models.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.exporters.ort import Arrays
from compress.exporters.tensors import read

BLOCK = 32  # weights that share a scale


def static_int8(source: Path, target: Path, feeds: Sequence[Arrays], *, seven_bits: bool = False) -> None:
    """Writes ``target``: int8 weights (a scale per output channel) and int8 activations.

    Args:
        seven_bits: of the weights, for a runtime whose sums would saturate on processors without VNNI.

    Raises:
        UsageError: there are no calibration inputs.
        CompressError: the graph cannot be quantised.
    """
    import sys

    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not feeds:
        raise UsageError(
            "static int8 needs inputs to calibrate on",
            where="--precision int8",
            fix="name a model of a run, whose calibration split is known, or another --precision",
        )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Arrays | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as beside, redirect_stdout(sys.stderr):
        ready = Path(beside) / "ready.onnx"
        logging.getLogger().setLevel(max(logging.ERROR, logging.getLogger().level))
        try:
            quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
            quantize_static(
                str(ready),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=seven_bits,
                # Both signed: with unsigned activations the sums of x86 without VNNI saturate.
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
            )
        except (ValueError, RuntimeError, TypeError) as e:
            raise CompressError(
                f"ONNX Runtime cannot quantise the graph: {str(e).splitlines()[0][:300]}",
                where=str(source),
                fix="name another --precision",
            ) from e


def weights_int8(source: Path, target: Path) -> int:
    """Writes ``target`` with the weights of matrix products in 8 bits, weights beside it; returns how many products.

    Raises:
        UsageError: there is no product with a constant weight.
    """
    import sys

    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model = read(source, weights=True)
    with redirect_stdout(sys.stderr):
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=8)
        quantizer = MatMulNBitsQuantizer(model, algo_config=config)
        quantizer.process()
    made: Any = quantizer.model.model
    count: int = sum(node.op_type == "MatMulNBits" for node in made.graph.node)
    if not count:
        raise UsageError(
            "there is no matrix product with constant weights, so nothing to quantise",
            where="--precision int8-weights",
            fix="use int8, which takes convolutions too",
        )
    data = f"{target.stem}.data"
    onnx.save(made, target, save_as_external_data=True, all_tensors_to_one_file=True, location=data)
    return count
