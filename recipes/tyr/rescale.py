"""One number behind the last pass: the scale that makes the pruned model as sure as the dense one.

What pruning takes away acts like noise on the last hidden state, and noise makes a model surer than it may be. The
scale is folded into the last norm, so it costs nothing and stock classes load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.distributed import gather, share
from compress.models.blocks import BlockRunner
from compress.plan import Plan
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.recipes.tyr.choice import Job

SCALES = tuple(i / 100 for i in range(60, 121))


def fit_scale(job: Job, plan: Plan) -> tuple[float, float, float]:
    """The scale in `SCALES` with the least KL(dense || pruned) on the search windows.

    Returns:
        (scale, KL at scale 1, KL at the scale), in nats.
    """
    mean = kl_at(job, plan, job.search, SCALES, "the logits' scale")
    best = int(mean.argmin())
    return SCALES[best], float(mean[SCALES.index(1.0)]), float(mean[best])


def kl_at(job: Job, plan: Plan, windows: Tensor, scales: Sequence[float], label: str) -> Tensor:
    """Mean KL(dense || pruned) in nats over all positions of ``windows`` (n, length) at each scale of the logits:
    (len(scales),) float64. Processes divide the windows."""
    runner = BlockRunner(job.model, job.family, windows.shape[1])
    mine = windows[share(len(windows)).start : share(len(windows)).stop]
    with torch.no_grad(), Progress(len(runner.blocks), f"{label}: blocks") as bar:
        dense = [runner.embed(ids) for ids in mine.split(1)]
        pruned = list(dense)
        for i, block in enumerate(runner.blocks):
            smaller = plan.block(i, job.family, block, job.family.sliced)
            dense = [runner.run(i, hidden, block) for hidden in dense]
            pruned = [runner.run(i, hidden, smaller) for hidden in pruned]
            bar.update(1)
        found = []
        for teaching, hidden in zip(dense, pruned, strict=True):
            teacher, raw = runner.logits(teaching).log_softmax(-1), runner.raw_logits(hidden)
            students = (runner.capped(raw * scale).log_softmax(-1) for scale in scales)
            found.append([float((teacher.exp() * (teacher - z)).sum(-1).double().mean()) for z in students])
    # Summed in the order of the windows, whichever process had them.
    return torch.tensor(gather(found), dtype=torch.float64).mean(0)
