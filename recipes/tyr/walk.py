"""A walk over all blocks with both residual streams: what the supernet and the last passes have in common.

Every block that has been made is a sealed stage; the streams in front of the next one are kept beside, so that a walk
that was stopped goes on there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.language.activations import Room, is_whole
from compress.models.blocks import BlockRunner
from compress.models.streaming import in_step, is_streamed, only_blocks
from compress.processes.distributed import device_bytes, is_main, main_says, meet
from compress.recipes.tyr import TyrOptions
from compress.recipes.tyr.choice import Job
from compress.recipes.tyr.sensitivity import output_metrics
from compress.recipes.tyr.supernet import Accumulation, Local, Menu, Streams, prune_block, runner_tokens
from compress.run.folder import Run, fingerprint, seal_hash
from compress.run.progress import Progress


@dataclass(frozen=True)
class Metrics:
    """The sealed output metrics of all sublayers; a block's are read, and checked, when they are asked for. None: no
    metric."""

    folders: list[Path] | None
    run: Run

    def of(self, block: int) -> tuple[Tensor | None, Tensor | None]:
        """(attention's, FFN's), each (hidden, hidden) float32 or None. All processes ask for it together."""
        if self.folders is None:
            return None, None
        with safe_open(self.run.check(self.folders[block]) / "metrics.safetensors", "pt") as file:
            return file.get_tensor("attention"), file.get_tensor("ffn")

    def hash(self) -> str | None:
        return None if self.folders is None else fingerprint({str(i): seal_hash(f) for i, f in enumerate(self.folders)})


def metrics_of(run: Run, job: Job) -> Metrics:
    options = job.options
    if options.metric == "none":
        return Metrics(None, run)
    windows = job.calibration[: options.metric_windows]
    inputs = {**job.inputs, "windows": len(windows), "seed": job.seed}
    layers = job.geometry.layers

    def write(block: int, found: dict[str, Tensor], began: float) -> None:
        run.stage(
            f"metrics/block-{block:03d}",
            {**inputs, "block": block},
            lambda folder: save_file(found, folder / "metrics.safetensors"),
            began,
        )

    # The backward pass goes from the last block to the first.
    left = layers
    while left and run.is_sealed(f"metrics/block-{left - 1:03d}", {**inputs, "block": left - 1}):
        run.stage(f"metrics/block-{left - 1:03d}", {**inputs, "block": left - 1}, never, read=False)
        left -= 1
    if left:
        # Gradients are float32 whatever the forwards of the walk are.
        runner = BlockRunner(job.model, job.family, windows.shape[1], batch=job.computing.batch_tokens)
        with in_step(job.model):
            output_metrics(runner, windows, job.seed, run.scratch("metrics"), left, write, job.skip)
    run.drop_scratch("metrics")
    return Metrics([run.folder / f"metrics/block-{i:03d}" for i in range(layers)], run)


STREAMS = 2  # the dense and the pruned one, for which there must be room
CHEAP = 0.05  # seconds: what takes no longer is kept behind every block; else a stop costs what keeping would have
# The options that decide what a candidate is, beside the levels themselves.
LOCAL_OPTIONS = {"score", "target", "damping", "accumulation", "round_to", "token_weight", "metric"}


def local_of(options: TyrOptions, accumulation: Accumulation) -> Local:
    """How a walk with this error accumulation makes a block's candidates."""
    return Local(
        damping=options.damping,
        target=options.target,
        accumulation=accumulation,
        score=options.score,
        step=options.round_to,
        trim=options.query_heads,
        token_weight=options.token_weight,
    )


def walk(
    run: Run,
    job: Job,
    name: str,
    inputs: Mapping[str, Any],
    calibration: Tensor,
    block_menu: list[Menu],
    accumulation: Accumulation,
    metrics: Metrics,
    write: Any,
) -> list[Path]:
    """Walks the blocks with both streams, resuming behind the last block whose stage and streams are on disk."""
    layers = job.geometry.layers
    scratch = run.scratch(name)
    sealed = 0
    while sealed < layers and run.is_sealed(f"{name}/block-{sealed:03d}", {**inputs, "block": sealed}):
        # Raises where the sealed block was made from other inputs.
        run.stage(f"{name}/block-{sealed:03d}", {**inputs, "block": sealed}, never, read=False)
        sealed += 1
    folders = [run.folder / name / f"block-{i:03d}" for i in range(sealed)]
    if sealed == layers:
        run.drop_scratch(name)
        return folders
    runner = job.runner(calibration.shape[1])
    room = room_for(run, job, name, runner, STREAMS * calibration.numel())
    how = local_of(job.options, accumulation)

    def last_kept() -> int:
        every = [int(p.name.removeprefix("before-")) for p in scratch.glob("before-*") if is_whole(p, len(calibration))]
        return max((k for k in every if k <= sealed), default=0)

    start = main_says(last_kept)
    if start:
        streams = Streams.load(scratch / f"before-{start:03d}", calibration, room, runner_tokens(runner))
    else:
        streams = Streams.start(runner, calibration, accumulation, room)
    spent = cost = 0.0  # since the streams were last kept, and what keeping them took
    bar = Progress(layers, f"{name}: blocks", start=start)
    with only_blocks(job.model, runner.device), in_step(job.model), bar:
        for index in range(start, layers):
            began = time.monotonic()
            costs = job.costs.blocks[index]
            attention, ffn = prune_block(runner, index, streams, block_menu[index], costs, how, metrics.of(index))
            spent += time.monotonic() - began
            keeps = index + 1 < layers and main_says(lambda due=spent >= cost or cost < CHEAP: bool(due))  # type: ignore[misc]
            if keeps:
                began_keeping = time.monotonic()
                streams.save(scratch / f"before-{index + 1:03d}")
                spent, cost = 0.0, time.monotonic() - began_keeping
            meet(f"{name}, behind block {index}")
            if index >= sealed:
                folders.append(write(index, attention, ffn, began))
            if keeps and is_main():
                for older in scratch.glob("before-*"):
                    if older.name < f"before-{index + 1:03d}":
                        shutil.rmtree(older, ignore_errors=True)
            bar.update(1)
    run.drop_scratch(name)
    return folders


def room_for(run: Run, job: Job, name: str, runner: BlockRunner, tokens: int) -> Room:
    """Where the activations of so many tokens lie: in files where the recipe says so; on the device where they take a
    quarter of what is free there at most, and no block must be read to be run; else in memory."""
    if job.offload:
        return Room(run.scratch(name) / "activations")
    near = not is_streamed(job.model) and lies_near(tokens, job.geometry.hidden, device_bytes() // 4)
    return Room(None, runner.device if near else None)


def lies_near(tokens: int, hidden: int, spare: float) -> bool:
    """Whether the activations of so many tokens find room in the ``spare`` bytes of a device."""
    return 4 * tokens * hidden <= spare


def never(_: Path) -> None:
    raise AssertionError("a sealed stage was built again")
