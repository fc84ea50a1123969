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
# What the last norm is called, by the families.
NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "layer_norm", "final_norm")
# Keys of a configuration that say that a model does more with its head's output, or its input, than to cap it.
SCALED = ("logits_scaling", "logit_scale", "dim_model_base", "lm_head_multiplier")


def blocks(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = model.model.layers
    return found


def norm_name(model: Any) -> str:
    """What the last norm is called in the model's body; empty where it is not found."""
    return next((name for name in NORMS if name in model.model._modules), "")


def norm_of(model: Any) -> nn.Module:
    found: nn.Module = getattr(model.model, norm_name(model))
    return found


def norm_weight(model: Any) -> str:
    """The name of the last norm's weight among the model's parameters."""
    return f"model.{norm_name(model)}.weight"


def norm_width(model: Any, config: Any) -> int:
    """Channels of the residual stream."""
    weight = getattr(norm_of(model), "weight", None)
    width: int = config.hidden_size if weight is None else weight.numel()
    return width


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
    made: Tensor = norm_of(model)(hidden)
    return made


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits before the cap that some families put on them: (..., hidden) -> (..., vocab)."""
    if any(getattr(model.config, key, None) is not None for key in SCALED):
        return _by_its_own_forward(model, hidden)
    z: Tensor = model.lm_head(hidden)
    return z


def _by_its_own_forward(model: Any, hidden: Tensor) -> Tensor:
    """The same by the model's own forward, with a body that gives ``hidden``: what is scaled, and how, it knows."""
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Body(nn.Module):
        def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(last_hidden_state=hidden.reshape(1, -1, hidden.shape[-1]))

    made = copy.copy(model)
    made._modules = {**model._modules, "model": Body()}
    made.config = copy.copy(model.config)
    if getattr(made.config, "final_logit_softcapping", None) is not None:
        made.config.final_logit_softcapping = None
    z: Tensor = made(input_ids=None).logits
    return z.reshape(*hidden.shape[:-1], z.shape[-1])


def capped(model: Any, z: Tensor) -> Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return z if cap is None else (z / cap).tanh() * cap
