"""What the tests of this recipe share: a job on a tiny model, and a written supernet of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from compress.language.plan import Plan
from compress.models.blocks import BlockRunner
from compress.models.families import family_for
from compress.models.families.base import Costs
from compress.recipes.tyr import TyrOptions
from compress.recipes.tyr.choice import Job
from compress.recipes.tyr.supernet import Local, Menu, Streams, Supernet, prune_block, write_block
from tests.tiny import tiny, tokens

# Options of a short whole search.
SEARCH = {
    "positions": 12,
    "singles_windows": 2,
    "generations": 2,
    "offspring": 4,
    "steps": [0.5, 1.0],
    "survivors": [2],
}
OPTIONS: dict[str, Any] = {"iterations": 2, "levels": 5, "refine_levels": 3, "head_levels": 4, "interval": 0.25}
OPTIONS |= {"metric_windows": 2, "search": SEARCH}


def small_job(
    model_type: str = "llama",
    options: dict[str, Any] | None = None,
    sparsity: float = 0.3,
    seed: int = 0,
    windows: tuple[int, int, int] = (8, 3, 32),
    **changes: Any,
) -> Job:
    """A job on a tiny model; ``windows`` are (calibration, search, length)."""
    model = tiny(model_type, seed, **changes)
    return job_on(model, family_for(model.config).costs(model.config), options, sparsity, seed, windows)


def job_on(
    model: Any,
    costs: Costs,
    options: dict[str, Any] | None = None,
    sparsity: float = 0.3,
    seed: int = 0,
    windows: tuple[int, int, int] = (8, 3, 32),
) -> Job:
    """The same on any model."""
    calibration, search, length = windows
    return Job(
        model,
        family_for(model.config),
        model.config,
        costs.geometry,
        costs,
        tokens(calibration, length, seed=100 + seed),
        tokens(search, length, seed=200 + seed),
        sparsity,
        seed,
        TyrOptions.model_validate({"round_to": 4, **(options or {})}),
        {"model": f"tiny {model.config.model_type} {seed}"},
    )


def pruned_block(runner: BlockRunner, job: Job, index: int, streams: Streams, menu: Menu, **changes: Any) -> Any:
    """`prune_block` with plain settings; ``changes`` replace them."""
    metrics = changes.pop("metrics", (None, None))
    settings: dict[str, Any] = {
        "damping": 0.01,
        "target": "residual",
        "accumulation": "expectation",
        "score": "obs",
        "step": 4,
        "trim": True,
        **changes,
    }
    with torch.no_grad():
        return prune_block(runner, index, streams, menu, job.costs.blocks[index], Local(**settings), metrics)


def written_supernet(folder: Path, job: Job, menu: Menu) -> Supernet:
    """A supernet of the whole model, every block with the same menu, without error accumulation."""
    runner = BlockRunner(job.model, job.family, job.calibration.shape[1])
    streams = Streams.start(runner, job.calibration, "none")
    files = []
    for index in range(job.geometry.layers):
        attention, ffn = pruned_block(runner, job, index, streams, menu, accumulation="none")
        files.append(folder / f"{index}.safetensors")
        write_block(files[-1], attention, ffn, torch.bfloat16)
    return Supernet(files, job.geometry)


def whole_kl(job: Job, plan: Plan, windows: torch.Tensor) -> float:
    """Mean KL(dense || pruned) over all positions of ``windows``, from whole forwards of both models."""
    pruned = copy.deepcopy(job.model)
    plan.apply(pruned, job.family)
    with torch.no_grad():
        p, q = (m(windows).logits.double().log_softmax(-1) for m in (job.model, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())
