"""What decides the bits of a run beside its inputs: the type that forwards are computed in, and how many tokens run
together. Both stand in the lock file, so that a run goes on elsewhere as it began.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.processes.compute import TYPES, emulated, type_for
from compress.processes.distributed import device, is_main, main_says
from compress.run.progress import say

if TYPE_CHECKING:
    from compress.models.families.base import Geometry

BATCH_TOKENS = 2048  # tokens per forward, at most
GPU_BATCH_TOKENS, GPU_BATCH_BYTES = 16384, 2**30


def batch_tokens(geometry: Geometry, gpu: bool) -> int:
    """Tokens per forward, at most. A GPU is given more of them, as long as they fit in `GPU_BATCH_BYTES`: launching a
    kernel takes it as long as a small model's work on a thousand tokens."""
    if not gpu:
        return BATCH_TOKENS
    each = 4 * 4 * (max(block.ffn for block in geometry.blocks) + geometry.hidden)
    return max(BATCH_TOKENS, min(GPU_BATCH_TOKENS, GPU_BATCH_BYTES // each // BATCH_TOKENS * BATCH_TOKENS))


@dataclass(frozen=True)
class Computing:
    """``type``: one of `compress.processes.compute.TYPES`; ``batch_tokens``: tokens per forward, at most (None: what
    suits the device)."""

    type: str = "float32"
    batch_tokens: int | None = None

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def settle(asked: str, geometry: Geometry, locked: Any, where: str) -> Computing:
    """What a run computes with; all processes come here together.

    Args:
        asked: the recipe's ``compute``.
        locked: the lock file's ``compute`` (None: there is none, or it was written before there was a choice).
        where: the lock file, for errors.

    Raises:
        CompressError: the lock file holds something else, or the type cannot be computed here.
    """
    if locked is not None and (
        not isinstance(locked, dict)
        or locked.get("type") not in TYPES
        or type(locked.get("batch_tokens")) is not int
        or locked["batch_tokens"] < 1
    ):
        raise CompressError(
            "'compute' is not a type and a number of tokens", where=where, fix="delete it: the same command writes it"
        )
    found, has_units = type_for(asked, None if locked is None else locked["type"])
    if not has_units and is_main():
        say(emulated(device()))
    if locked is not None:
        return Computing(found, locked["batch_tokens"])
    return Computing(found, main_says(lambda: batch_tokens(geometry, device().type != "cpu")))
