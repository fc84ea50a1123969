"""What recovery learns from: what the dense model says of a text, token by token, and how far a model is from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.schema.recipe import RecoverSection

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Lesson:
    """What the dense model says of b windows. ``index`` (b, length, k) int64 and ``logp`` (b, length, k) are its
    likeliest tokens, ``rest`` (b, length) the log of the mass outside them; ``streams`` (b, length, hidden) what stands
    behind the blocks that are compared."""

    index: Tensor
    logp: Tensor
    rest: Tensor
    streams: list[Tensor]


class Streams:
    """Notes the residual stream behind some blocks whenever the model runs."""

    def __init__(self, blocks: nn.ModuleList, layers: Sequence[int]) -> None:
        self._seen: dict[int, Tensor] = {}
        self._layers = layers
        self._handles = [blocks[i].register_forward_hook(functools.partial(self._note, i)) for i in layers]

    def _note(self, layer: int, _: nn.Module, __: Any, out: Any) -> None:
        self._seen[layer] = out[0] if isinstance(out, tuple) else out

    def take(self) -> list[Tensor]:
        """What was noted, in the order of the layers; forgotten afterwards."""
        found = [self._seen[i] for i in self._layers]
        self._seen = {}
        return found

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def lesson(logits: Tensor, streams: list[Tensor], spec: RecoverSection) -> Lesson:
    """The dense ``logits`` (b, length, vocab) as a lesson."""
    logp, index = (logits.float() / spec.temperature).log_softmax(-1).topk(min(spec.top_k, logits.shape[-1] - 1))
    # In float64: what is left beside a sure answer is small.
    rest = (1.0 - logp.double().exp().sum(-1)).clamp_min(1e-9).log().float()
    return Lesson(index, logp, rest, streams)


def losses(logits: Tensor, streams: list[Tensor], given: Lesson, temperature: float) -> tuple[Tensor, Tensor]:
    """How far a model is from the lesson, per window.

    Returns:
        KL(dense || model) in nats times the temperature squared, (b,), mean over positions (Hinton et al.,
        arXiv 1503.02531, section 2.1); and the squared error of the streams over their mean square, (b,), mean over
        positions and blocks.
    """
    import torch

    z = logits.float() / temperature  # (b, length, vocab)
    total = z.logsumexp(-1)
    logp = z.gather(-1, given.index) - total[..., None]
    # The others' own sum, not 1 minus the mass of the k: its gradient stays right where that mass is nearly 1.
    rest = z.scatter(-1, given.index, -torch.inf).logsumexp(-1) - total
    kl = (given.logp.exp() * (given.logp - logp)).sum(-1) + given.rest.exp() * (given.rest - rest)
    errors = [
        ((own.float() - theirs.to(own.device).float()) ** 2).mean(-1)
        / (theirs.to(own.device).float() ** 2).mean(-1).clamp_min(1e-12)
        for own, theirs in zip(streams, given.streams, strict=True)
    ]
    error = torch.stack(errors).mean((0, 2)) if errors else torch.zeros_like(kl[:, 0])
    return kl.mean(-1) * temperature**2, error
