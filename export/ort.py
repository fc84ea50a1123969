"""Runs an exported language model in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.exporters.tensors import files

Arrays = dict[str, NDArray[Any]]


def session(path: Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        CompressError: the file is missing or is no model, or would have files read that lie outside its folder.
    """
    import onnxruntime as ort

    files(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's own exception types are not public; the message is passed on
        raise CompressError(
            f"ONNX Runtime cannot load the model: {str(e).splitlines()[0]}", where=str(path), fix="export it again"
        ) from e


class OrtLLM:
    """`prefill.onnx` and `decode.onnx` of one folder."""

    def __init__(self, folder: Path, threads: int = 2) -> None:
        from compress.exporters.names import DECODE, PREFILL

        self.prefill_session = session(folder / PREFILL, threads)
        self.decode_session = session(folder / DECODE, threads)
        self._cached = [i for i in self.decode_session.get_inputs() if i.name.startswith("past_key_values.")]

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> Arrays:
        """ids (b, s) -> logits (b, 1, vocab) of the last position and the present cache."""
        mask = np.ones_like(ids) if mask is None else mask
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        return _run(self.prefill_session, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})

    def decode(self, ids: NDArray[np.int64], present: Arrays, mask: NDArray[np.int64] | None = None) -> Arrays:
        """ids (b, s) behind the cache ``present`` -> logits (b, s, vocab) and the new cache."""
        past = {f"past_key_values.{k.removeprefix('present.')}": v for k, v in present.items() if k != "logits"}
        length = next(iter(past.values())).shape[2] + ids.shape[1]
        mask = np.ones((len(ids), length), dtype=np.int64) if mask is None else mask
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        return _run(self.decode_session, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})

    def empty_cache(self, batch: int) -> Arrays:
        """A cache of length 0: with it `decode` scores whole texts."""
        return {
            i.name.replace("past_key_values.", "present."): np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self._cached
        }

    def greedy(self, ids: NDArray[np.int64], tokens: int) -> list[int]:
        """The ``tokens`` likeliest next tokens, one after the other, behind ids (1, s)."""
        return list(islice(self.likeliest(ids), tokens))

    def likeliest(self, ids: NDArray[np.int64]) -> Iterator[int]:
        """The likeliest token behind ids (1, s), then the one behind that, without end."""
        out = self.prefill(ids)
        while True:
            token = int(out["logits"][0, -1].argmax())
            yield token
            out = self.decode(np.array([[token]], dtype=np.int64), out)


def _run(session: Any, feed: Arrays) -> Arrays:
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feed.items() if k in wanted}), strict=True))
