"""How much the loss minds an error of a sublayer's output, direction by direction: the empirical Fisher matrix.

A layer-wise objective counts an error in every output direction alike; the model does not. To second order the KL of
an output error e is e^T F e / 2, F = E[g g^T], with g the gradient of the log-likelihood of labels drawn from the
model's own predictions (as in K-FAC, arXiv 1503.05671). F weighs the *choice* of units; their refit does not depend
on it, since the least-squares optimum is the same in every output metric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.progress import Progress

if TYPE_CHECKING:
    from compress.models.families.base import Family

RIDGE = 1e-3  # share of the mean diagonal added, so that directions no gradient was seen in still count


def output_metrics(model: Any, family: Family, windows: Tensor, seed: int) -> dict[str, Tensor]:
    """The metric of every sublayer's output, from one backward pass per window.

    Args:
        windows: token ids (n, length) int64.
        seed: of the labels drawn.

    Returns:
        ``{"<block>.attention", "<block>.ffn": (hidden, hidden) float32}``, each scaled to a mean diagonal of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            out.retain_grad()
            outputs[name] = out

        return hook

    handles = []
    for i, block in enumerate(family.blocks(model)):
        handles.append(family.o_proj(block).register_forward_hook(keep(f"{i}.attention")))
        handles.append(family.down_proj(block).register_forward_hook(keep(f"{i}.ffn")))
    try:
        with torch.enable_grad(), Progress(len(windows), "sensitivities: windows") as bar:
            for ids in windows.split(1):
                embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
                labels = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
                torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
                for name, out in outputs.items():
                    assert out.grad is not None  # retained by the hook
                    g = out.grad.reshape(-1, out.shape[-1])
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + (g.T @ g).double()
                outputs.clear()
                bar.update(1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _scaled(total) for name, total in sums.items()}


def _scaled(total: Tensor) -> Tensor:
    mean = float(total.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(total))
    made = total / mean
    made.diagonal().add_(RIDGE)
    return made.float()
