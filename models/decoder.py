"""Where a decoder keeps its parts, and what their parameters are called: no other file names them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# What the families with a file of their own call their parameters; of a block what stands before its index.
BLOCKS = "model.layers."
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
# What models call their blocks, in their bodies; and what the names of the blocks' parameters begin with.
LAYERS = ("layers", "h", "blocks")
_PLACES = ("model.layers.", "transformer.h.", "transformer.blocks.", "gpt_neox.layers.")
# What the last norm is called, by the families.
NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "layer_norm", "final_norm", "ln_f", "norm_f")
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # keys of the bound that some models put on logits
# Keys of a configuration that say that a model does more with its head's output, or its input, than to cap it.
SCALED = ("logits_scaling", "logit_scale", "dim_model_base", "lm_head_multiplier")


def body_name(model: Any) -> str:
    name: str = model.base_model_prefix
    return name


def body(model: Any) -> Any:
    """What stands in front of the head: embeddings, blocks, last norm."""
    return model._modules[body_name(model)]


def layers_name(model: Any) -> str:
    """What the list of blocks is called in the body; empty where there is none."""
    from torch import nn

    inner = model._modules.get(body_name(model))
    held = {} if inner is None else inner._modules
    return next((name for name in LAYERS if isinstance(held.get(name), nn.ModuleList)), "")


def prefix(model: Any) -> str:
    """What the names of the blocks' parameters begin with, before the block's index."""
    return f"{body_name(model)}.{layers_name(model)}."


def blocks(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = body(model)._modules[layers_name(model)]
    return found


def norm_name(model: Any) -> str:
    """What the last norm is called in the model's body; empty where it is not found."""
    return next((name for name in NORMS if name in body(model)._modules), "")


def norm_of(model: Any) -> nn.Module:
    found: nn.Module = body(model)._modules[norm_name(model)]
    return found


def norm_weight(model: Any) -> str:
    """The name of the last norm's weight among the model's parameters."""
    return f"{body_name(model)}.{norm_name(model)}.weight"


def head_name(model: Any) -> str:
    """What the linear layer that gives the logits is called; empty where there is none beside the body."""
    from torch import nn

    found = model.get_output_embeddings()
    held = (name for name, module in model._modules.items() if module is found and isinstance(module, nn.Linear))
    return next(held, "")


def norm_width(model: Any, config: Any) -> int:
    """Channels of the residual stream."""
    weight = getattr(norm_of(model), "weight", None)
    width: int = config.hidden_size if weight is None else weight.numel()
    return width


def put_blocks(model: Any, made: nn.ModuleList) -> None:
    setattr(body(model), layers_name(model), made)


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
    made, inner = copy.copy(model), copy.copy(body(model))
    made._modules = {**model._modules, body_name(model): inner}
    inner._modules = dict(inner._modules)
    return made


def block_of(name: str) -> tuple[int, str] | None:
    """The block's index and the rest of the name, of a parameter that lies in a block."""
    for place in _PLACES:
        if name.startswith(place):
            index, _, inside = name.removeprefix(place).partition(".")
            return int(index), inside
    return None


def last_hidden(model: Any, ids: Tensor) -> Tensor:
    """Token ids (b, length) -> what the head reads, behind the last norm: (b, length, hidden)."""
    hidden: Tensor = body(model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def normed(model: Any, hidden: Tensor) -> Tensor:
    """The last norm: (..., hidden) -> (..., hidden)."""
    made: Tensor = norm_of(model)(hidden)
    return made


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits before the cap that some families put on them: (..., hidden) -> (..., vocab)."""
    if any(getattr(model.config, key, None) is not None for key in SCALED):
        return _by_its_own_forward(model, hidden)
    z: Tensor = model._modules[head_name(model)](hidden)
    return z


def _by_its_own_forward(model: Any, hidden: Tensor) -> Tensor:
    """The same by the model's own forward, with a body that gives ``hidden``: what is scaled, and how, it knows."""
    from torch import nn
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Body(nn.Module):
        def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
            return MoeModelOutputWithPast(last_hidden_state=hidden.reshape(1, -1, hidden.shape[-1]))

    made = copy.copy(model)
    made._modules = {**model._modules, body_name(model): Body()}
    made.config = copy.copy(model.config)
    for key in CAPS:
        if getattr(made.config, key, None) is not None:
            setattr(made.config, key, None)
    z: Tensor = made(input_ids=None).logits
    return z.reshape(*hidden.shape[:-1], z.shape[-1])


def capped(model: Any, z: Tensor) -> Tensor:
    cap = next((getattr(model.config, key) for key in CAPS if getattr(model.config, key, None) is not None), None)
    return z if cap is None else (z / cap).tanh() * cap
