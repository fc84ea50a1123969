"""In which type the products of a forward are computed: float32, or a faster one where the processor has units for it.

Residual stream, norms, logits and everything that is added up stay float32 whatever the type is; float16, whose range a
residual stream leaves, is never taken.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.processes.distributed import device, gather
from compress.system import host

if TYPE_CHECKING:
    import torch

TYPES = ("float32", "tf32", "bfloat16")


def units(where: torch.device) -> list[str]:
    """The fast types that a device has units for."""
    import torch

    if where.type != "cuda":
        return ["bfloat16"] if host.bfloat16_units() else []
    if torch.version.hip is not None:
        return ["bfloat16"]
    return ["tf32", "bfloat16"] if torch.cuda.get_device_capability(where) >= (8, 0) else []


def type_for(asked: str, locked: str | None) -> tuple[str, bool]:
    """The type that this run computes forwards in, and whether every process has units for it; the same in all of them,
    which come here together.

    Args:
        asked: one of `TYPES`, or ``auto``: bfloat16 where every process has units for it, else float32.
        locked: what a run that goes on has begun with; it stands where nothing else is asked for by name.

    Raises:
        CompressError: tf32 is to be computed where there are no units for it, or another type than the run began with.
    """
    if locked is not None and asked not in ("auto", locked):
        raise CompressError(
            f"this run was begun in {locked}, and {asked} is asked for",
            where="compute",
            fix=f"say compute={locked} or auto, or start over with --fresh",
        )
    wanted = locked if locked is not None else asked
    everywhere = set(TYPES[1:]).intersection(*gather([set(units(device()))]))
    if wanted == "auto":
        wanted = "bfloat16" if "bfloat16" in everywhere else "float32"
    if wanted == "tf32" and "tf32" not in everywhere:
        raise CompressError(
            "tf32 is a type of NVIDIA GPUs from sm80 on, and not every process has one",
            where="compute",
            fix="say compute=float32" + (", and start over with --fresh" if locked else ", or auto"),
        )
    return wanted, wanted == "float32" or wanted in everywhere


def emulated(where: torch.device) -> str:
    """What bfloat16 costs where it is emulated, in words; measured now, for half a second."""
    import torch

    exact, slow = (flops(where, kind, side=256, seconds=0.2) for kind in (torch.float32, torch.bfloat16))
    return (
        f"compute: bfloat16 is emulated on this processor: its products do {slow / 1e9:.3g} GFLOP/s, those of float32"
        f" {exact / 1e9:.3g}; what runs the model takes {exact / slow:.1f} times as long as with compute=float32"
    )


def flops(where: torch.device, kind: Any, side: int, seconds: float) -> float:
    """FLOP/s of products of ``side`` x ``side`` matrices of a type."""
    import torch

    x = torch.randn(side, side, device=where).to(kind)

    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize(where)

    x @ x
    wait()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        x @ x
        wait()
        count += 1
    return 2 * side**3 * count / (time.perf_counter() - began)


@contextlib.contextmanager
def fast(where: torch.device, compute: str) -> Iterator[None]:
    """Within it products of float32 tensors on a device are computed in ``compute``; sums within a product, norms and
    softmax stay float32 (torch's autocast decides which operators are products)."""
    import torch

    if compute == "bfloat16":
        # Nothing cached: weights are exchanged between two calls, and a copy of one that is gone must not be used.
        with torch.autocast(where.type, torch.bfloat16, cache_enabled=False):
            yield
    elif compute == "tf32":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    else:
        yield
