"""One number behind the last pass: the scale that makes the pruned model as sure as the dense one.

What pruning takes away acts like noise on the last hidden state, and noise makes a model surer than it may be. The
scale is folded into the last norm, so it costs nothing and stock classes load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.models.blocks import BlockRunner
from compress.plan import Plan
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.recipes.tyr.choice import Job

SCALES = tuple(i / 100 for i in range(60, 121))


def fit_scale(job: Job, plan: Plan) -> tuple[float, float, float]:
    """The scale in `SCALES` with the least mean KL(dense || pruned) over all positions of the search windows.

    Returns:
        (scale, KL at scale 1, KL at the scale), in nats.
    """
    runner = BlockRunner(job.model, job.family, job.search.shape[1])
    blocks = [plan.block(i, job.family, block, job.family.sliced) for i, block in enumerate(runner.blocks)]
    sums = torch.zeros(len(SCALES), dtype=torch.float64)
    with torch.no_grad(), Progress(len(job.search), "the logits' scale: windows") as bar:
        for ids in job.search.split(1):
            dense = pruned = runner.embed(ids)
            for i, block in enumerate(blocks):
                dense, pruned = runner.run(i, dense), runner.run(i, pruned, block)
            teacher = runner.logits(dense).log_softmax(-1)
            raw = runner.raw_logits(pruned)
            for k, scale in enumerate(SCALES):
                student = runner.capped(raw * scale).log_softmax(-1)
                sums[k] += (teacher.exp() * (teacher - student)).sum(-1).double().mean()
            bar.update(1)
    mean = sums / len(job.search)
    best = int(mean.argmin())
    return SCALES[best], float(mean[SCALES.index(1.0)]), float(mean[best])
