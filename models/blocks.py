"""Runs a decoder block by block, and in the pieces where pruning cuts: what `o_proj` and `down_proj` read.

Everything runs the model's own modules; nothing of a family's forward is written again here. The tests hold the
pieces, put together, against the model's own forward.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.models import decoder
from compress.models.families.base import alone, caught
from compress.processes.compute import fast

if TYPE_CHECKING:
    from compress.models.families.base import Family


def _passing(block: Any, values: int) -> nn.Module:
    """A stand-in that the model's own forward takes for ``block`` (whose weights need not be there): it gives back what
    it is given, as one of so many values (0: alone)."""
    made: nn.Module = copy.copy(block)
    made._modules, made._parameters = {}, {}
    made._forward_pre_hooks, made._forward_pre_hooks_with_kwargs = OrderedDict(), OrderedDict()
    made.forward = (  # type: ignore[method-assign]
        lambda hidden_states, *_, **__: (hidden_states, *[None] * (values - 1)) if values else hidden_states
    )
    return made


class BlockRunner:
    """A causal language model cut at its blocks, for windows of one fixed length.

    What goes in may lie on any device; what comes out lies on ``device``.

    Args:
        model: a transformers causal LM in evaluation mode, resident or streamed; its weights are read, never changed.
        family: its adapter.
        length: tokens per window; position embeddings and masks are captured once for it.
        compute: the type that products in the blocks are computed in (`compress.processes.compute`). What comes out is
            of the model's own type.
        batch: tokens per forward, at most, where the run has settled it.
    """

    def __init__(
        self, model: nn.Module, family: Family, length: int, compute: str = "float32", batch: int | None = None
    ) -> None:
        self.compute, self.batch = compute, batch
        self.model, self.family, self.length = model.eval(), family, length
        self.blocks = decoder.blocks(model)
        self.device = family.embedding_device(model)
        self._kwargs: list[dict[str, Any]] = []
        self._stubs = nn.ModuleList(_passing(b, family.block_values) for b in self.blocks._modules.values())
        for stub in self._stubs:

            def hook(stub: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                # Some models give masks and positions by their place.
                names = list(inspect.signature(type(stub).forward).parameters)[1:]
                given = {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
                self._kwargs.append({k: v for k, v in given.items() if k not in ("hidden_states", "past_key_values")})

            stub.register_forward_pre_hook(hook, with_kwargs=True)
        # One window of zeros: masks and position embeddings depend on the length alone.
        self._body(torch.zeros(1, length, dtype=torch.int64))
        for stub in self._stubs:
            stub._forward_pre_hooks.clear()
            stub._forward_pre_hooks_with_kwargs.clear()

    def _body(self, ids: Tensor) -> None:
        """The model's own forward with nothing done in the blocks."""
        decoder.put_blocks(self.model, self._stubs)
        try:
            with torch.no_grad():
                decoder.body(self.model)(input_ids=ids.to(self.device), use_cache=False)
        finally:
            decoder.put_blocks(self.model, self.blocks)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (b, length) -> the residual stream in front of block 0, (b, length, hidden)."""
        return caught(self._stubs[0], lambda: self._body(ids))

    def stream(self, ids: Tensor) -> Tensor:
        """What the pieces of block 0 start from: the stream in front of it; where attention and FFN read the same
        stream, with zeros beside it, which is where attention's output goes, (b, length, 2 * hidden)."""
        first = self.embed(ids)
        return torch.cat([first, torch.zeros_like(first)], -1) if self.family.parallel else first

    def run(self, index: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        """Block ``index`` (or a pruned stand-in for it): (b, length, hidden) -> the same shape."""
        made = block if block is not None else self.blocks[index]
        with fast(self.device, self.compute):
            return self._exact(alone(made(hidden.to(self.device), **self._kwargs[index])))

    def _exact(self, found: Tensor) -> Tensor:
        return found.float() if self.compute == "bfloat16" else found

    def context(self, index: int, hidden: Tensor) -> Tensor:
        """What `o_proj` of block ``index`` reads: (b, length, heads * head_dim). Of attention that stays whole what it
        gives, (b, length, hidden)."""
        with fast(self.device, self.compute):
            return self._exact(self.family.context(self.blocks[index], hidden.to(self.device), self._kwargs[index]))

    def middle(self, index: int, hidden: Tensor, attention: Tensor) -> Tensor:
        """The residual stream between attention and FFN, given `o_proj`'s output ``attention`` (b, length, hidden)."""
        return self.family.middle(self.blocks[index], hidden.to(self.device), attention, self._kwargs[index])

    def activation(self, index: int, middle: Tensor) -> Tensor:
        """What `down_proj` of block ``index`` reads: (b, length, ffn). Of an FFN that stays whole what it gives,
        (b, length, hidden)."""
        with fast(self.device, self.compute):
            return self._exact(self.family.activation(self.blocks[index], middle.to(self.device), self._kwargs[index]))

    def output(self, index: int, middle: Tensor, ffn: Tensor) -> Tensor:
        """The residual stream behind block ``index``, given `down_proj`'s output ``ffn`` (b, length, hidden)."""
        return self.family.output(self.blocks[index], middle.to(self.device), ffn, self._kwargs[index])

    def logits(self, hidden: Tensor) -> Tensor:
        """The final norm and the head: (..., hidden) -> (..., vocab)."""
        return self.capped(self.raw_logits(hidden))

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """The same before the cap that some families put on logits; linear in the scale of the final norm."""
        return decoder.head(self.model, decoder.normed(self.model, hidden.to(self.device)))

    def capped(self, z: Tensor) -> Tensor:
        return decoder.capped(self.model, z)
