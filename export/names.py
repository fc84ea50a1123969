"""What the ONNX files are called, for those that read them and need no torch."""

from __future__ import annotations

OPSET = 20
# A language model's two graphs, and the weights that both read.
PREFILL, DECODE = "prefill.onnx", "decode.onnx"
WEIGHTS = "weights.data"
# A network's one file, and the name of its input where it has one.
FILE = "model.onnx"
INPUT = "input"
