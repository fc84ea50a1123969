"""4 and 8 bits by ONNX Runtime's own quantisers.

``static_int8``: weights and activations, with scales from real inputs of the calibration split (QDQ: a quantise and a
dequantise node around each operator, which other runtimes read as well). ``weights_int8``: only the weights of matrix
products, in blocks, for language models. ``weights_nbits``: these in 4 or 8 bits, and the embedding and the head in 8.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
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
    import onnx

    model = read(source, weights=True)
    made, count = _products(model, 8, None)
    if not count:
        raise UsageError(
            "there is no matrix product with constant weights, so nothing to quantise",
            where="--precision int8-weights",
            fix="use int8, which takes convolutions too",
        )
    data = f"{target.stem}.data"
    onnx.save(made, target, save_as_external_data=True, all_tensors_to_one_file=True, location=data)
    return count


def weights_nbits(source: Path, target: Path, bits: int, *, level: int) -> dict[str, Any]:
    """Writes ``target`` from a language model's graph, weights beside it: matrix products (MatMulNBits) in ``bits``,
    their last, which gives the logits, in 8; the embedding (GatherBlockQuantized) in 8.

    With tied weights, head and embedding are then the same bytes (`compress.exporters.onnx_file.share_weights` keeps
    them once). Scales are symmetric, one for every `BLOCK` weights of a row.

    Args:
        level: MatMulNBits' ``accuracy_level``: what the products compute in, 4 for int8, 1 for float32.

    Returns:
        ``{"block", "accuracy_level", "bits", "products", "head_bits", "embedding_bits"}``.

    Raises:
        CompressError: the graph has no embedding that is looked up, or no product that gives the logits.
    """
    import onnx

    model = read(source, weights=True)
    _fold_transposes(model.graph)
    head, embedding = _head(model.graph), _embedding(model.graph)
    if head is None or embedding is None:
        raise CompressError(
            "the graph has no embedding of input_ids, or no matrix product with constant weights that gives logits",
            where=str(source),
            fix="name another --precision",
        )
    _quantise_table(model.graph, embedding)
    made, inner = _products(model, bits, level, [head])
    made, last = _products(made, 8, level)
    data = f"{target.stem}.data"
    onnx.save(made, target, save_as_external_data=True, all_tensors_to_one_file=True, location=data)
    return {
        "block": BLOCK, "accuracy_level": level, "bits": bits, "products": inner + last, "head_bits": 8,
        "embedding_bits": 8,
    }  # fmt: skip


def _products(model: Any, bits: int, level: int | None, but: Sequence[str] = ()) -> tuple[Any, int]:
    """The model with its matrix products in ``bits``, but for those of these names; and how many it turned."""
    import sys

    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    before = sum(node.op_type == "MatMulNBits" for node in model.graph.node)
    with redirect_stdout(sys.stderr), _quiet("onnxruntime.quantization.matmul_nbits_quantizer"):
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits, accuracy_level=level)
        quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=list(but))
        quantizer.process()
    made = quantizer.model.model
    return made, sum(node.op_type == "MatMulNBits" for node in made.graph.node) - before


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger, which has a line for every node, to its warnings."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _fold_transposes(graph: Any) -> None:
    """Puts the transposed weight in the place of a Transpose of it: a tied head is the embedding, transposed."""
    import numpy as np
    import onnx

    weights = {t.name: t for t in graph.initializer}
    turned = [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]
    for node in turned:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        array = np.transpose(onnx.numpy_helper.to_array(weights[node.input[0]]), perm)
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
        graph.node.remove(node)


def _head(graph: Any) -> str | None:
    """The name of the matrix product with constant weights that gives the logits; scaling and caps may stand behind."""
    makers = {output: node for node in graph.node for output in node.output}
    weights = {t.name for t in graph.initializer}
    node = makers.get("logits")
    while node is not None and node.op_type != "MatMul":
        node = next((makers[name] for name in node.input if name in makers), None)
    return str(node.name) if node is not None and node.input[1] in weights else None


def _embedding(graph: Any) -> Any:
    """The node that looks up ``input_ids`` in a constant table; None where there is none."""
    weights = {t.name for t in graph.initializer}
    return next(
        (n for n in graph.node if n.op_type == "Gather" and n.input[0] in weights and n.input[1] == "input_ids"), None
    )


def _quantise_table(graph: Any, gather: Any) -> None:
    """Puts GatherBlockQuantized in the place of a Gather: a table (rows, channels) in 8 bits, scales (rows, blocks)."""
    import numpy as np
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    (weight,) = (t for t in graph.initializer if t.name == gather.input[0])
    table = onnx.numpy_helper.to_array(weight)
    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=8))
    packed, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(table.T))  # (rows, blocks, BLOCK)
    rows = np.ascontiguousarray(packed.reshape(len(table), -1)[:, : table.shape[1]])
    names = [f"{weight.name}.rows", gather.input[1], f"{weight.name}.rows.scales"]
    for name, array in ((names[0], rows), (names[2], scales)):
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    node = onnx.helper.make_node(
        "GatherBlockQuantized", names, list(gather.output), f"{gather.name}_Q8", domain="com.microsoft",
        gather_axis=0, quantize_axis=1, block_size=BLOCK, bits=8,
    )  # fmt: skip
    gather.CopyFrom(node)
    if not any(weight.name in n.input for n in graph.node):
        graph.initializer.remove(weight)
