"""How much the loss minds an error of a sublayer's output, direction by direction: the empirical Fisher matrix.

A layer-wise objective counts an error in every output direction alike; the model does not. To second order the KL of
an output error e is e^T F e / 2, F = E[g g^T], with g the gradient of the log-likelihood of labels drawn from the
model's own predictions (as in K-FAC, arXiv 1503.05671). F weighs the *choice* of units; their refit does not depend
on it, since the least-squares optimum is the same in every output metric.

The backward pass goes block by block from streams kept on disk: only one block's graph is ever held.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.language.activations import is_whole, load_part, save_part
from compress.models.blocks import BlockRunner
from compress.processes.distributed import ExactSum, gather, is_main, main_says, meet, share
from compress.run.progress import Progress

RIDGE = 1e-3  # share of the mean diagonal added, so that directions no gradient was seen in still count
KINDS = ("attention", "ffn")


def output_metrics(
    runner: BlockRunner,
    windows: Tensor,
    seed: int,
    scratch: Path,
    left: int,
    write: Callable[[int, dict[str, Tensor], float], None],
    skip: int = 0,
) -> None:
    """The metrics of blocks ``left`` - 1 down to 0, from one backward pass per window. Processes divide the windows.

    Args:
        windows: token ids (n, length) int64.
        seed: of the labels drawn.
        scratch: a folder for the streams; a run that was stopped goes on from what is in it.
        write: called behind every block with its number, ``{"attention", "ffn": (hidden, hidden) float32}``, each
            scaled to a mean diagonal of 1, and `time.monotonic()` when the work for it began.
        skip: of a window's first positions, those whose next token is no label.
    """
    layers, mine, total = len(runner.blocks), share(len(windows)), len(windows)
    streams, gradients_at = scratch / "streams", scratch / "gradients"

    def resumable() -> tuple[int, bool]:
        whole = [i for i in range(layers + 1) if is_whole(streams / f"{i:03d}", total)]
        ready = left < layers and is_whole(gradients_at / f"{left:03d}", total) and whole[:left] == list(range(left))
        return max(whole, default=-1), ready

    last, ready = main_says(resumable)
    if not ready:
        left = layers
        _forward(runner, windows, mine, streams, last)
        hidden = _read(streams / f"{layers:03d}", mine)
        gradients = [_at_the_top(runner, h, seed + 1_000_003 * k, skip) for k, h in zip(mine, hidden, strict=True)]
    else:
        gradients = _read(gradients_at / f"{left:03d}", mine)
    with Progress(layers, "sensitivities: backward", start=layers - left) as bar:
        for i in range(left - 1, -1, -1):
            began = time.monotonic()
            found, gradients = _backward(runner, i, _read(streams / f"{i:03d}", mine), gradients)
            _keep(gradients_at / f"{i:03d}", mine, gradients)
            meet(f"sensitivities, in front of block {i}")
            write(i, found, began)
            if is_main():
                shutil.rmtree(gradients_at / f"{i + 1:03d}", ignore_errors=True)
                shutil.rmtree(streams / f"{i + 1:03d}", ignore_errors=True)
            bar.update(1)


def _forward(runner: BlockRunner, windows: Tensor, mine: range, streams: Path, last: int) -> None:
    """Writes the dense stream in front of every block and behind the last; those up to ``last`` are there."""
    with torch.no_grad(), Progress(len(runner.blocks), "sensitivities: forward", start=max(0, last)) as bar:
        if last < 0:
            hidden = [runner.embed(windows[k : k + 1]).cpu() for k in mine]
            _keep(streams / "000", mine, hidden)
        else:
            hidden = _read(streams / f"{last:03d}", mine)
        for i in range(max(0, last), len(runner.blocks)):
            block = runner.blocks[i]
            hidden = [runner.run(i, h, block).cpu() for h in hidden]
            _keep(streams / f"{i + 1:03d}", mine, hidden)
            bar.update(1)
    meet("sensitivities, forward")


def _read(folder: Path, windows: range) -> list[Tensor]:
    return list(load_part(folder, windows)["x"].split(1)) if windows else []


def _keep(folder: Path, windows: range, tensors: list[Tensor]) -> None:
    if windows:
        save_part(folder, windows, {"x": torch.cat(tensors)})


def _at_the_top(runner: BlockRunner, hidden: Tensor, seed: int, skip: int) -> Tensor:
    """The loss's gradient behind the last block, (1, length, hidden), for labels drawn from the model itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        x = hidden.to(runner.device).detach().requires_grad_(True)
        logits = runner.logits(x)[0]
        chances = logits.detach().float().softmax(-1).cpu()
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[skip:], labels[skip:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    return gradient.cpu()


def _backward(
    runner: BlockRunner, index: int, streams: Any, gradients: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Block ``index``'s metrics over all processes' windows, and this one's gradients in front of it."""
    block = runner.blocks[index]
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            outputs[name] = out

        return hook

    layers = runner.family.pruned_layers(block)
    handles = [layer.register_forward_hook(keep(kind)) for kind, layer in layers.items()]
    passed: list[Tensor] = []
    seen: dict[str, list[Tensor]] = {kind: [] for kind in layers}
    try:
        for stream, gradient in zip(streams, gradients, strict=True):
            with torch.enable_grad():
                x = stream.to(runner.device).detach().requires_grad_(True)
                out = runner.run(index, x, block)
                wanted = (x, *(outputs[kind] for kind in layers))
                g_x, *found = torch.autograd.grad(out, wanted, gradient.to(runner.device))
            passed.append(g_x.cpu())
            for kind, g in zip(layers, found, strict=True):
                seen[kind].append(g.reshape(-1, g.shape[-1]))
    finally:
        for handle in handles:
            handle.remove()
    width = runner.family.geometry(runner.model.config).hidden
    # Nothing is chosen in a sublayer that stays whole.
    metrics = {kind: torch.eye(width) for kind in KINDS if kind not in layers}
    for kind, parts in seen.items():
        # One grid for all windows, however unlike they are.
        sizes = [float(g.double().pow(2).sum(0).max()) for g in parts]
        if not all(map(math.isfinite, sizes)):
            raise CompressError(
                "the gradients hold NaN or infinity",
                where=f"block {index}, {kind}",
                fix="check the model's weights (`compress verify`), or set tyr.metric=none",
            )
        total = ExactSum(width, width, device=runner.device)
        total.set_grid(max(gather(sizes)))
        for g in parts:
            total.add(g.T @ g)
        metrics[kind] = _scaled(total.total()).cpu()
    return metrics, passed


def _scaled(total: Tensor) -> Tensor:
    mean = float(total.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(total))
    made = total / mean
    made.diagonal().add_(RIDGE)
    return made.float()
