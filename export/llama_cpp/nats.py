"""What a token costs under a row of logits. Numpy alone: the child that runs libllama reads it, and starts fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def nats(logits: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float64]:
    """(n - 1,) negative log-likelihood of every token but the first, in float64.

    Args:
        logits: (n, vocab) behind each of the n tokens ``ids``.
    """
    found = np.empty(len(ids) - 1)
    for i, token in enumerate(ids[1:]):
        row = logits[i].astype(np.float64)
        top = row.max()
        found[i] = top + np.log(np.exp(row - top).sum()) - row[token]
    return found
