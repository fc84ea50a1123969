"""One number behind the last pass: the scale that makes the pruned model as sure as the dense one.

What pruning takes away acts like noise on the last hidden state, and noise makes a model surer than it may be. The
scale is folded into the last norm, so it costs nothing and stock classes load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.language.plan import Plan
from compress.models.blocks import BlockRunner
from compress.models.streaming import in_step
from compress.processes.distributed import gather, share
from compress.run.progress import Progress

if TYPE_CHECKING:
    from compress.recipes.tyr.choice import Job

SCALES = tuple(i / 100 for i in range(60, 121))
COARSE = SCALES[::5]  # enough to tell solutions apart


def fit_scale(job: Job, plan: Plan) -> tuple[float, float, float]:
    """The scale in `SCALES` with the least KL(dense || pruned) on the search windows.

    Returns:
        (scale, KL at scale 1, KL at the scale), in nats.
    """
    mean = kl_at(job, plan, job.search, SCALES, "the logits' scale")
    best = int(mean.argmin())
    return SCALES[best], float(mean[SCALES.index(1.0)]), float(mean[best])


def _chunks(length: int, vocab: int, device: str) -> list[slice]:
    """Positions whose logits are made together. On a CPU few: what is larger than 32 MB the C library takes from the
    system anew every time, and clearing the pages costs more than the arithmetic."""
    size = length if device != "cpu" else max(1, 2**24 // (4 * vocab))
    return [slice(i, i + size) for i in range(0, length, size)]


def _kl_sums(runner: BlockRunner, teaching: Tensor, hidden: Tensor, scales: Sequence[float]) -> Tensor:
    """Sum over the positions of KL(dense || pruned) at each scale: (len(scales),) float64, on the CPU."""
    teacher, raw = runner.logits(teaching).log_softmax(-1), runner.raw_logits(hidden)
    chances = teacher.exp()
    sure = (chances * teacher).sum(-1)
    sums = []
    for scale in scales:
        z = runner.capped(raw * scale)
        sums.append((sure - (chances * z).sum(-1) + z.logsumexp(-1)).double().sum())
    return torch.stack(sums).cpu()


def kl_at(job: Job, plan: Plan, windows: Tensor, scales: Sequence[float], label: str) -> Tensor:
    """Mean KL(dense || pruned) in nats over all positions of ``windows`` (n, length) that are scored, at each scale of
    the logits: (len(scales),) float64. Processes divide the windows."""
    runner = job.runner(windows.shape[1])
    mine = windows[share(len(windows)).start : share(len(windows)).stop]
    with torch.no_grad(), in_step(job.model), Progress(len(runner.blocks), f"{label}: blocks") as bar:
        dense = [runner.embed(ids) for ids in mine.split(1)]
        pruned = list(dense)
        for i, block in enumerate(runner.blocks):
            smaller = plan.block(i, job.family, block, job.family.sliced)
            dense = [runner.run(i, hidden, block) for hidden in dense]
            pruned = [runner.run(i, hidden, smaller) for hidden in pruned]
            bar.update(1)
        found = []
        for teaching, hidden in ((a[:, job.skip :], b[:, job.skip :]) for a, b in zip(dense, pruned, strict=True)):
            sums = torch.zeros(len(scales), dtype=torch.float64)
            for rows in _chunks(hidden.shape[1], job.geometry.vocab, runner.device.type):
                sums += _kl_sums(runner, teaching[:, rows], hidden[:, rows], scales)
            found.append((sums / hidden.shape[1]).tolist())
    # Summed in the order of the windows, whichever process had them.
    return torch.tensor(gather(found), dtype=torch.float64).mean(0)
