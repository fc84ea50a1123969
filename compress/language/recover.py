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
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.distribution import install_line
from compress.errors import CompressError, UsageError
from compress.language.plan import Plan
from compress.models import decoder
from compress.processes.distributed import (
    Trainer,
    device,
    dispatched,
    empty_weights,
    gather,
    is_main,
    like_shard,
    main_says,
    share,
    trainer,
    whole,
    world,
)
from compress.run.cache import sha256_of
from compress.run.folder import Run, fingerprint, seal_hash
from compress.run.progress import Progress
from compress.run.strict_json import read_json, typed
from compress.schema.recipe import Recipe, RecoverSection, nearest
from compress.system.files import settle

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
    from compress.data.text import (
        assert_disjoint,
        calibration_windows,
        keep_windows,
        kept_windows,
        packing_inputs,
    )

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
        "seed": _seed(setup),
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


# --- what is learned from --------------------------------------------------------------------------------------------


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


# --- what is trained -------------------------------------------------------------------------------------------------


def student(setup: Setup, plan: Plan, there: Any = "cpu", empty: bool = False) -> Any:
    """The sliced model on the device ``there``, sharing no tensor with the dense one, with low-rank updates where the
    recipe asks for them; what is to be trained wants a gradient, nothing else does. ``empty``: without weights."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    spec = setup.recipe.recover
    assert spec is not None  # asked by the caller
    if empty:
        with empty_weights():
            model = AutoModelForCausalLM.from_config(setup.config, dtype=torch.float32)
        model.tie_weights()
        plan.apply(model, setup.family)
        model.eval()
    else:
        pruned = setup.pruned(plan)[0]
        # One at a time: where the dense model is streamed, a block is there only as long as it is looked at.
        blocks = [copy.deepcopy(block).to(there) for block in decoder.blocks(pruned)]
        with decoder.without_blocks(pruned):
            model = copy.deepcopy(pruned).to(there)
        decoder.put_blocks(model, nn.ModuleList(blocks))
    model.requires_grad_(False)
    if spec.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(decoder.block_of(name) is not None or name == decoder.norm_weight(model))
        return model
    from peft import LoraConfig, inject_adapter_in_model

    names = _target_names(model, spec)
    if not names:
        raise CompressError(
            "the plan leaves none of the layers that are to be trained", where="recover.targets", fix="name others"
        )
    alpha = spec.alpha if spec.alpha is not None else 2.0 * spec.rank
    config = LoraConfig(r=spec.rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(setup))
        inject_adapter_in_model(config, model)
    # Adapters are in the mode they were made in; there is no dropout to switch on.
    return model.eval()


def _target_names(model: Any, spec: RecoverSection) -> list[str]:
    from torch import nn

    return [
        name
        for name, module in model.named_modules()
        if decoder.block_of(name) is not None
        and isinstance(module, nn.Linear)
        and (spec.targets is None or name.rsplit(".", 1)[-1] in spec.targets)
    ]


def _seed(setup: Setup) -> int:
    spec = setup.recipe.recover
    return setup.recipe.seed if spec is None or spec.seed is None else spec.seed


def _trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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
    seed, low = _seed(setup), spec.dtype == "bfloat16"
    full = spec.learning_rate if spec.learning_rate is not None else {"lora": 5e-4, "full": 5e-5}[spec.method]
    with trainer(model, sharded, low) as trained, contextlib.ExitStack() as stack:
        told = Streams(decoder.blocks(teacher), layers)
        stack.callback(told.close)
        seen = Streams(decoder.blocks(model), layers)
        weights = _trained(model)
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


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Checkpoints:
    """The state behind the last noted step, in a folder of its own that is whole or not there.

    It does not depend on the number of processes, nor on how the weights were divided among them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> int:
        """Steps done at the latest checkpoint; 0 where there is none."""
        return max((int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*")), default=0)

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, weights: Mapping[str, Any], optimizer: Any, log: list[dict[str, Any]]) -> None:
        """All processes come here: sharded tensors are put together by all, and written by the main one, block by
        block, so that it never holds more than one."""
        partial = self.folder / f".{self._at(step).name}.partial"
        if is_main():
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        for file, names in _files(weights).items():
            tensors: dict[str, Tensor] = {}
            for name in names:
                state = optimizer.state.get(weights[name], {})
                # A weight that nothing reads (the norm of a sublayer that is gone) has no moments.
                moments = {kind: state[kind] for kind in MOMENTS if kind in state}
                for kind, tensor in {"weight": weights[name].detach(), **moments}.items():
                    put_together = whole(tensor)
                    if is_main():
                        tensors[f"{kind}:{name}"] = put_together.cpu().contiguous()
            main_says(functools.partial(_write_file, partial / file, tensors))
        main_says(lambda: self._finish(step, partial, log))

    def _finish(self, step: int, partial: Path, log: list[dict[str, Any]]) -> None:
        files = {p.name: sha256_of(p) for p in sorted(partial.glob("*.safetensors"))}
        facts = {"step": step, "log": log, "files": files}
        (partial / "state.json").write_text(json.dumps({**facts, "sha256": fingerprint(facts)}), encoding="utf-8")
        settle(partial, self._at(step))
        for older in self.folder.glob("step-*"):
            if older != self._at(step):
                shutil.rmtree(older)

    def load(self, weights: Mapping[str, Any], optimizer: Any) -> tuple[int, list[dict[str, Any]]]:
        """Fills weights and optimiser from the latest checkpoint; (0, []) and nothing done where there is none."""
        import torch
        from safetensors import safe_open

        step = main_says(self.latest)
        if step == 0:
            return 0, []
        log = main_says(lambda: self.checked(step)["log"])
        for path, names in _files(weights).items():
            with safe_open(self._at(step) / path, "pt") as file, torch.no_grad():
                there = set(file.keys())
                for name in names:
                    parameter = weights[name]
                    parameter.copy_(like_shard(file.get_tensor(f"weight:{name}"), parameter))
                    if f"{MOMENTS[0]}:{name}" in there:
                        optimizer.state[parameter] = {
                            "step": torch.tensor(float(step)),
                            **{kind: like_shard(file.get_tensor(f"{kind}:{name}"), parameter) for kind in MOMENTS},
                        }
        return step, log

    def weights(self, step: int) -> dict[str, Tensor]:
        """The trained weights by name."""
        from safetensors import safe_open

        found = {}
        for path in self._at(step).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it has keys() alone)
                    if name.startswith("weight:"):
                        found[name.removeprefix("weight:")] = file.get_tensor(name)
        return found

    def checked(self, step: int) -> dict[str, Any]:
        """The state behind a step: ``log`` has a row for every step so far.

        Raises:
            CompressError: a file is missing, or is not as it was written.
        """
        folder, fix = self._at(step), f"delete {self._at(step)}: training then starts over"
        facts = typed(
            read_json(folder / "state.json", "the state", constants=True, fix=fix), dict, "", "the state", str(folder)
        )
        if facts.pop("sha256", None) != fingerprint(facts):
            raise CompressError("the state was changed since it was written", where=str(folder), fix=fix)
        for name, sha256 in facts["files"].items():
            if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
                raise CompressError(
                    "the checkpoint is not as it was written: a file was changed or is missing",
                    where=str(folder / name),
                    fix=fix,
                )
        return facts


MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a weight, beside the number of steps


def _files(names: Iterable[str]) -> dict[str, list[str]]:
    """The weights' names by the file of the checkpoint that holds them: one a block, one for what is beside."""
    found: dict[str, list[str]] = {}
    for name in names:
        place = decoder.block_of(name)
        found.setdefault(f"block-{place[0]:03d}.safetensors" if place else "beside.safetensors", []).append(name)
    return found


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


# --- what comes out --------------------------------------------------------------------------------------------------


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


def merged(model: Any, spec: RecoverSection, family: Family) -> dict[str, Tensor]:
    """The trained weights of a `student` under the names they have in a plan; low-rank updates are added in."""
    if spec.method == "full":
        found = {name: p.detach() for name, p in _trained(model).items()}
    else:
        from peft.tuners.lora import LoraLayer

        found = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                layer: Any = module
                layer.merge()
                found[f"{name}.weight"] = layer.get_base_layer().weight.detach()
    return {_plan_name(name, decoder.norm_weight(model), family): tensor for name, tensor in found.items()}


def _plan_name(name: str, norm: str, family: Family) -> str:
    if name == norm:
        return "norm"
    place = decoder.block_of(name)
    assert place is not None  # only what lies in blocks is trained beside the last norm
    block, inside = place
    return f"blocks.{block}.{family.short_names.get(inside, inside)}"
