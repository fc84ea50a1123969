"""How the number of pruned weights grows over a gradual run.

Global MP's paper spreads the sparsity over the epochs and prunes again while the sparsity is below the target, but does
not give the increments. Two are offered: the cubic schedule of Zhu & Gupta (2017, arXiv 1710.01878), which takes most
away early, while there is much to spare,

    s_t = s_f + (s_i - s_f) (1 - t/n)^3,

and a linear one. In both the targets are integers, never fall, and end exactly at the last target.
"""

from __future__ import annotations

from typing import Literal

Shape = Literal["cubic", "linear"]


def targets(final: int, steps: int, shape: Shape = "cubic", start: int = 0) -> list[int]:
    """How many weights are pruned after each of ``steps`` prunings: (steps,), the last is ``final``.

    Args:
        final: weights to prune in the end.
        start: weights pruned before the first.

    Raises:
        ValueError: there is no step, or ``start`` is not between 0 and ``final``.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps")
    if not 0 <= start <= final:
        raise ValueError(f"from {start} to {final}")
    power = 3 if shape == "cubic" else 1
    # In integers: the share that is left, ((steps - t) / steps)^power, of what is to be pruned, rounded down.
    return [final - (final - start) * (steps - t) ** power // steps**power for t in range(1, steps + 1)]
