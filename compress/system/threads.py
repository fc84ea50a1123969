"""Threads that leave the machine to others while they wait, but not in a process that measures."""

from __future__ import annotations

import os
import sys

POLICY = "OMP_WAIT_POLICY"
OTHERS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # say the same to one OpenMP or another
OURS = "COMPRESS_WAITS"  # that the policy is not the user's


def wait_passively() -> None:
    """Threads of OpenMP sleep while they wait for one another. They would spin, and beside other work a product of two
    threads then takes ten times as long: the one that spins holds the processor that the other one waits for.

    It counts where OpenMP is not yet loaded (torch loads it), and where the user has not said otherwise.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in (POLICY, *OTHERS)):
        os.environ[POLICY], os.environ[OURS] = "PASSIVE", "1"


def to_measure() -> dict[str, str]:
    """The environment of a process whose times count: it waits as it would without us."""
    return {k: v for k, v in os.environ.items() if OURS not in os.environ or k not in (POLICY, OURS)}


def use(count: int | None) -> None:
    """``count`` threads for the products of this process, and of those that it starts; None leaves them."""
    if count is None:
        return
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
