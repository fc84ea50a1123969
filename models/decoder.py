"""Where a decoder keeps its parts, and what their parameters are called: no other file names them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCKS = "model.layers."  # what the names of the blocks' parameters begin with, before the block's index
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def blocks(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = model.model.layers
    return found


def put_blocks(model: Any, made: nn.ModuleList) -> None:
    model.model.layers = made


@contextmanager
def without_blocks(model: Any) -> Iterator[nn.ModuleList]:
    """While it is open, the model holds only what stands beside its blocks; yields the blocks."""
    from torch import nn

    found = blocks(model)
    put_blocks(model, nn.ModuleList())
    try:
        yield found
    finally:
        put_blocks(model, found)


def beside(model: Any) -> Any:
    """A model whose blocks and last norm can be exchanged without the other's; all tensors are shared with it."""
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made.model = copy.copy(model.model)
    made.model._modules = dict(model.model._modules)
    return made


def block_of(name: str) -> tuple[int, str] | None:
    """The block's index and the rest of the name, of a parameter that lies in a block."""
    if not name.startswith(BLOCKS):
        return None
    index, _, inside = name.removeprefix(BLOCKS).partition(".")
    return int(index), inside


def last_hidden(model: Any, ids: Tensor) -> Tensor:
    """Token ids (b, length) -> what the head reads, behind the last norm: (b, length, hidden)."""
    hidden: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def normed(model: Any, hidden: Tensor) -> Tensor:
    """The last norm: (..., hidden) -> (..., hidden)."""
    made: Tensor = model.model.norm(hidden)
    return made


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits before the cap that some families put on them: (..., hidden) -> (..., vocab)."""
    z: Tensor = model.lm_head(hidden)
    return z


def capped(model: Any, z: Tensor) -> Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return z if cap is None else (z / cap).tanh() * cap
