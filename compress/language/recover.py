"""Recovery: the sliced model is trained to do what the dense one does, by low-rank updates or in full.

What is learned from is the dense model's next-token distribution (its k likeliest tokens and the rest as one bucket)
and, where asked, its residual stream: pruning leaves the width of the stream as it was, so the two compare as they are.
What comes out is a plan whose weights hold what was trained; an update of low rank is merged, no adapter is left.

A step is the same whoever does it: the windows of a step depend on the seed and the step alone, and processes divide
them. So a checkpoint, by which a run that was killed goes on, is the trained weights, the optimiser's moments and the
number of steps done; the rate and the order of the windows follow from that number, and nothing else is random.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.distribution import install_line
from compress.errors import CompressError, UsageError
from compress.language.plan import Plan
from compress.language.recover_checkpoints import Checkpoints
from compress.language.recover_lesson import Streams, lesson, losses
from compress.language.recover_student import merged, seed_of, student, trained_weights
from compress.models import decoder
from compress.processes.distributed import (
    Trainer,
    device,
    dispatched,
    empty_weights,
    gather,
    is_main,
    main_says,
    share,
    trainer,
    world,
)
from compress.run.folder import Run, fingerprint, seal_hash
from compress.run.progress import Progress
from compress.schema.recipe import Recipe, RecoverSection, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.language.setup import Setup, Windows
    from compress.models.families.base import Family

BETAS = (0.9, 0.95)
# What may change between two halves of a run: it decides how the work is done, not what comes out but for rounding.
HOW = frozenset({"checkpoint_every", "teacher", "teacher_memory", "shard", "micro", "save_memory"})


def check(recipe: Recipe, family: Family, config: Any) -> None:
    """What can be known to be wrong before any weight is read.

    Raises:
        UsageError: an unknown target, a block that is not there, fewer windows than one step takes, no peft.
    """
    spec = recipe.recover
    if spec is None:
        return
    there = spec.windows or recipe.calibration.windows
    if there < spec.batch:
        raise UsageError(
            f"a step of recovery takes {spec.batch} windows, there are {there} to train on",
            where="recover.batch",
            fix=f"set recover.batch to at most {there}, or recover.windows to at least {spec.batch}",
        )
    layers = family.geometry(config).layers
    beyond = [i for i in spec.hidden_layers or () if i >= layers]
    if beyond:
        raise UsageError(
            f"there is no block {beyond[0]}", where="recover.hidden_layers", fix=f"name blocks from 0 to {layers - 1}"
        )
    if spec.method != "lora":
        return
    known = linear_names(family, config)
    for target in spec.targets or ():
        if target not in known:
            raise UsageError(f"unknown linear layer {target!r}", where="recover.targets", fix=nearest(target, known))
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            "low-rank updates need the package 'peft'",
            where="recover.method",
            fix=f"{install_line('recover')}, or train in full (--set recover.method=full)",
        )


def linear_names(family: Family, config: Any) -> list[str]:
    """The names that linear layers have in this architecture's blocks, such as ``q_proj``."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    with empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    blocks = decoder.blocks(model)
    return sorted({n.rsplit(".", 1)[-1] for n, m in blocks.named_modules() if isinstance(m, nn.Linear)})


def training_windows(run: Run, setup: Setup, windows: Windows) -> Tensor:
    """Windows (n, length) int64 to train on: those calibrated on, or as many from the same sources as the recipe asks
    for. None is from the evaluation's part of a source, and that they do not overlap is checked."""
    from compress.data.text import assert_disjoint, calibration_windows, keep_windows, kept_windows, packing_inputs

    recipe = setup.recipe
    spoken = {text.name for text in recipe.evaluation.texts if text.source.dialogues is not None}
    assert recipe.recover is not None  # asked by the caller
    wanted = recipe.recover.windows
    if wanted is None:
        return windows.calibration

    def build(folder: Path) -> None:
        spec = recipe.calibration
        found = calibration_windows(spec.sources, setup.tokenizer, wanted, spec.length)
        for name, held_out in windows.evaluation.items():
            assert_disjoint(found, held_out, name, windows.own[name] if name in spoken else None)
        keep_windows({"recover": found}, windows.begin, folder / "windows.safetensors")

    inputs = {
        "version": __version__,
        "weights": setup.weights,
        "windows": wanted,
        "calibration": recipe.calibration.model_dump(mode="json", exclude_none=True, exclude={"windows"}),
        **packing_inputs(setup.tokenizer, recipe.dialogues()),
    }
    return kept_windows(run.stage("text-recover", inputs, build) / "windows.safetensors")[0]["recover"]


def recover(run: Run, setup: Setup, windows: Tensor, plan_folder: Path, begin: int = 0) -> Path:
    """Trains what the plan in ``plan_folder`` leaves of the model; resumable behind the last checkpoint.

    Args:
        windows: token ids (n, length) int64 to train on.
        begin: of a window's first tokens, those that stand in front of every text: they are read, and that one follows
            on another is not learned.

    Returns:
        The sealed folder that holds the plan with the trained weights, and recover.json.

    Raises:
        CompressError: the loss or the gradient is not finite; the last checkpoint is kept.
    """
    import hashlib

    spec = setup.recipe.recover
    assert spec is not None  # asked by the caller
    inputs = {
        "version": __version__,
        "weights": setup.weights,
        "plan": seal_hash(plan_folder),
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16],
        "recover": spec.model_dump(mode="json", exclude=set(HOW)),
        "seed": seed_of(setup),
    }

    _ = setup.streamed  # all processes decide it together, and not in the midst of what one does alone

    def build(folder: Path | None) -> None:
        plan = Plan.load(plan_folder)
        scratch = run.scratch("recover")
        # Another recipe's checkpoints are not taken for ours.
        checkpoints = Checkpoints(scratch / fingerprint(inputs)[:16])
        steps = steps_of(spec, windows.shape[1])
        if main_says(checkpoints.latest) < steps:
            _train(setup, plan, windows, steps, checkpoints, scratch / "offload", begin)
        if folder is not None:
            _write(setup, plan, windows, steps, checkpoints, folder)

    folder = run.stage_together("recover", inputs, build)
    run.drop_scratch("recover")
    return folder


def steps_of(spec: RecoverSection, length: int) -> int:
    """Optimiser steps: as asked, or as many whole ones as hold the tokens asked for."""
    return spec.steps if spec.steps is not None else math.ceil((spec.tokens or 0) / (spec.batch * length))


def rate(step: int, steps: int, warmup: float) -> float:
    """The share of the full learning rate in step ``step`` (from 0): up in a line, down with a cosine, never 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def windows_of(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Which of ``count`` windows step ``step`` trains on: every window once, in a drawn order, then drawn anew."""
    found = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(place, count)
        found.append(_order(seed, epoch, count)[at])
    return found


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    import torch

    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()
    return order


def parts_of(batch: Sequence[int], micro: int) -> list[tuple[list[int], bool]]:
    """This process's windows of a step in parts of ``micro``: (windows, whether they count). Every process has equally
    many parts, as sharded weights are gathered by all together; what one lacks is filled with what does not count."""
    mine = [batch[i] for i in share(len(batch))]
    most = math.ceil(len(batch) / world())
    parts = []
    for at in range(0, most, micro):
        part = mine[at : at + micro]
        parts.append((part, True) if part else (list(batch[:1]), False))
    return parts


def _teacher(setup: Setup, spec: RecoverSection, offload: Path) -> Any:
    if spec.teacher == "dispatch" or setup.streamed:
        offload.mkdir(parents=True, exist_ok=True)
        mine = Path(offload / f"{os.environ.get('RANK', '0')}")
        return dispatched(setup.resolved.folder, setup.config, spec.teacher_memory, mine)
    model = setup.model
    there = device()
    return model if setup.family.embedding_device(model).type == there.type else copy.deepcopy(model).to(there)


def _train(
    setup: Setup, plan: Plan, windows: Tensor, steps: int, checkpoints: Checkpoints, offload: Path, begin: int
) -> None:
    """Trains from the latest checkpoint on (or from the start) and leaves the last one behind."""
    import torch

    spec = setup.recipe.recover
    assert spec is not None  # asked by the caller
    sharded = spec.shard == "fsdp" and world() > 1
    # What is to be sharded comes to the devices in shards, from the main process.
    model = student(setup, plan, "cpu" if sharded else device(), empty=sharded and not is_main())
    if spec.save_memory:
        # The blocks' own switch asks for training mode; no block of these families draws anything in it but dropout.
        # The second is the older name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()
        _no_dropout(model)
    teacher = _teacher(setup, spec, offload)
    layers = spec.hidden_layers if spec.hidden_layers is not None else list(range(setup.geometry.layers))
    layers = sorted(set(layers)) if spec.hidden > 0 else []
    seed, low = seed_of(setup), spec.dtype == "bfloat16"
    full = spec.learning_rate if spec.learning_rate is not None else {"lora": 5e-4, "full": 5e-5}[spec.method]
    with trainer(model, sharded, low) as trained, contextlib.ExitStack() as stack:
        told = Streams(decoder.blocks(teacher), layers)
        stack.callback(told.close)
        seen = Streams(decoder.blocks(model), layers)
        weights = trained_weights(model)
        optimizer = torch.optim.AdamW(_groups(weights, spec.weight_decay), lr=full, betas=BETAS)
        start, log = checkpoints.load(weights, optimizer)
        with Progress(steps, "recover: steps", start=start) as bar:
            for step in range(start, steps):
                for group in optimizer.param_groups:
                    group["lr"] = full * rate(step, steps, spec.warmup)
                optimizer.zero_grad()
                chosen = windows_of(step, spec.batch, len(windows), seed)
                kl, error = _backward(trained, teacher, told, seen, windows, chosen, spec, max(0, begin - 1))
                loss, norm = spec.kl * kl + spec.hidden * error, math.nan
                if math.isfinite(loss):
                    norm = trained.clip(spec.clip)
                if not math.isfinite(norm):
                    kept = checkpoints.latest()
                    raise CompressError(
                        f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite in step {step + 1}",
                        where="recover",
                        fix=f"lower recover.learning_rate (it is {full:g})"
                        + (f"; the checkpoint behind step {kept} is kept in {checkpoints.folder}" if kept else ""),
                    )
                optimizer.step()
                log.append({"step": step + 1, "loss": loss, "kl": kl, "hidden": error, "norm": norm})
                if (step + 1) % spec.checkpoint_every == 0 or step + 1 == steps:
                    checkpoints.save(step + 1, weights, optimizer, log)
                bar.to(step + 1, note=f"loss {loss:.4f}")


def _no_dropout(model: nn.Module) -> None:
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _groups(weights: Mapping[str, Any], decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not."""
    matrices = [p for p in weights.values() if p.dim() > 1]
    vectors = [p for p in weights.values() if p.dim() <= 1]
    return [{"params": params, "weight_decay": d} for params, d in ((matrices, decay), (vectors, 0.0)) if params]


def _backward(
    trained: Trainer,
    teacher: Any,
    told: Streams,
    seen: Streams,
    windows: Tensor,
    chosen: Sequence[int],
    spec: RecoverSection,
    skip: int,
) -> tuple[float, float]:
    """Leaves the gradient of the step's mean loss in the weights; returns the mean KL and stream error. What the first
    ``skip`` positions say of the next token is not learned from."""
    import torch

    parts = parts_of(chosen, spec.micro)
    found: list[tuple[float, float]] = []
    for at, (part, counts) in enumerate(parts):
        ids = windows[part].to(device())  # (micro, length)
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            given = lesson(teacher(input_ids=ids, use_cache=False).logits[:, skip:].to(device()), told.take(), spec)
        logits = trained(input_ids=ids, use_cache=False).logits[:, skip:]
        kl, error = losses(logits, seen.take(), given, spec.temperature)
        # accelerate takes the mean over processes; wanted is the mean over the windows of all.
        total = (spec.kl * kl + spec.hidden * error).sum() * (world() / len(chosen)) * float(counts)
        trained.backward(total, last=at + 1 == len(parts))
        if counts:
            found += zip(kl.tolist(), error.tolist(), strict=True)
    # Summed in the order of the windows, whichever process had them.
    every = gather(found)
    assert len(every) == len(chosen), "a window was lost between the processes"
    return math.fsum(k for k, _ in every) / len(every), math.fsum(e for _, e in every) / len(every)


def _write(setup: Setup, plan: Plan, windows: Tensor, steps: int, checkpoints: Checkpoints, folder: Path) -> None:
    spec = setup.recipe.recover
    assert spec is not None  # asked by the caller
    log = checkpoints.checked(steps)["log"]
    weights = checkpoints.weights(steps)
    model = student(setup, plan)
    _, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, "the checkpoint is another model's"
    facts = {
        "method": spec.method,
        "steps": steps,
        "tokens": steps * spec.batch * windows.shape[1],
        "windows": len(windows),
        "trained_parameters": sum(w.numel() for w in weights.values()),
    }
    Plan(plan.blocks, {**plan.weights, **merged(model, spec, setup.family)}, {**plan.meta, "recovered": facts}).save(
        folder
    )
    (folder / "recover.json").write_text(json.dumps({**facts, "log": log}, indent=1) + "\n", encoding="utf-8")
