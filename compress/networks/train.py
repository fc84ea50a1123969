"""One training loop: the same for one head and several, dense and masked, one process and many.

The order of the samples and how each is moved or mirrored are decided by the seed and the step alone, and a checkpoint
holds all else, the generators too. So a run that was stopped goes on to the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.data import boxes
from compress.data.folder_images import FolderImages
from compress.data.images import Split, Splits, batches
from compress.data.tasks import KINDS, Counts, Task, Weights, by_task, exact, task_loss, task_losses, together, wide
from compress.errors import CompressError
from compress.processes.distributed import from_main, gather, is_main, meet, rank, sum_floats, world
from compress.run.cache import tensors_sha
from compress.run.folder import fingerprint
from compress.run.progress import Progress
from compress.schema.sections import TrainSpec
from compress.system.files import whole_file

# --- masks ----------------------------------------------------------------------------------------------------------

Masks = Mapping[str, Tensor]


def check_masks(model: nn.Module, masks: Masks) -> None:
    """Raises CompressError where a mask names no parameter of the model, or has another shape or type."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise CompressError(
                f"the mask names {name!r}, which the model does not have", where="mask", fix="use this model's own mask"
            )
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise CompressError(
                f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}, the weight {tuple(parameters[name].shape)}",
                where="mask",
                fix="use this model's own mask (bool, of the weight's shape)",
            )


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Sets masked weights to +0, and the same places of all that the optimiser remembers of them."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameter, gone = parameters[name], ~mask.to(parameters[name].device)
        # Filled, not multiplied: a product would keep NaN and the sign of zero.
        parameter.masked_fill_(gone, 0)
        if optimizer is not None:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(gone, 0)


@torch.no_grad()
def mask_gradients(model: nn.Module, masks: Masks) -> None:
    """Sets the gradients of masked weights to +0. With that no optimiser here moves them: weight and momentum are 0."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        gradient = parameters[name].grad
        if gradient is not None:
            gradient.masked_fill_(~mask.to(gradient.device), 0)


# --- several processes, one batch ------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_floats(x.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_floats(gradients[0].clone())


def _shared_norm(module: Any, x: Tensor) -> Tensor:
    """Batch norm over the batch of all processes together; an empty share takes part like any other."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    if module.training or module.running_mean is None:
        count = sum_floats(torch.tensor([float(x.numel() // x.shape[1])], device=x.device, dtype=wide(x).dtype))
        values = wide(x)
        mean: Tensor = _Sum.apply(values.sum(dims)) / count  # type: ignore[no-untyped-call]
        centred = values - mean.view(shape)
        var: Tensor = _Sum.apply((centred * centred).sum(dims)) / count  # type: ignore[no-untyped-call]
        if module.training and module.running_mean is not None:
            with torch.no_grad():
                module.num_batches_tracked += 1
                share = module.momentum if module.momentum is not None else 1 / float(module.num_batches_tracked)
                module.running_mean.lerp_(mean, share)
                module.running_var.lerp_(var * count / (count - 1).clamp_min(1), share)
    else:
        mean, var = module.running_mean, module.running_var
        centred = wide(x) - mean.view(shape)
    y = centred * torch.rsqrt(var + module.eps).view(shape)
    if module.affine:
        y = y * module.weight.view(shape) + module.bias.view(shape)
    return y.to(x.dtype)


@contextmanager
def _one_batch(model: nn.Module) -> Iterator[None]:
    """While it is open, batch norms of a model that several processes train see the whole batch."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if world() > 1 else []
    for module in norms:
        module.forward = partial(_shared_norm, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _needs_planes(module: nn.Module) -> bool:
    """Whether a convolution's backward pass would write past its memory in oneDNN if channels came last.

    Weights' gradients of a strided 1x1 convolution with fewer input channels than a vector holds: the heap is
    overwritten, the process dies, or the gradient is wrong (uxlfoundation/oneDNN issue 6035, in torch 2.13). That is
    seen below 8 with AVX2; AVX-512, which was not tried, holds 16. Pruned shortcuts are just such convolutions.
    """
    return (
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels < 16
    )


def _planes(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # A copy: of one channel, .contiguous() gives the same tensor with the same strides, which say channels last.
    return tuple(x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x for x in inputs)


@contextmanager
def sound_gradients(model: nn.Module) -> Iterator[None]:
    """While it is open, convolutions that oneDNN gets wrong with channels last see planes."""
    hooks = [m.register_forward_pre_hook(_planes) for m in model.modules() if _needs_planes(m)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _broadcast(model: nn.Module) -> None:
    """Every process starts from the first one's weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        from_main(tensor)


# --- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, data: Splits, split: Split, batch: int = 128) -> dict[str, dict[str, float]]:
    """Loss and quality of every task, in evaluation mode.

    Whole batches are shared among the processes and all sums are exact, so the figures are the same, to the bit, on any
    number of them.

    Returns:
        ``{task: {"loss", its metric, what its kind measures beside it, "samples"}}``; ``Task.higher_is_better`` says
        which way the metric is better.
    """
    was = model.training
    model.eval()
    place = next(model.parameters()).device
    losses = torch.zeros(len(data.tasks), dtype=torch.float64)
    mine: list[tuple[int, list[Counts]]] = []
    for number, at in enumerate(batches(len(split), batch)):
        if number % world() != rank():
            continue
        outputs = by_task(model(data.prepare(split.inputs[at].to(place))), data.tasks)
        targets = {t.name: split.targets[t.name][at].to(place) for t in data.tasks}
        losses += torch.stack([exact(task_loss(t, outputs[t.name], targets[t.name])) for t in data.tasks])
        mine.append((number, [KINDS[t.kind].count(t, outputs[t.name], targets[t.name]) for t in data.tasks]))
    losses = sum_floats(losses.to(place)).cpu()
    model.train(was)
    counts = [found for _, found in sorted(gather(mine), key=lambda part: part[0])]
    return {
        task.name: {
            "loss": float(losses[i]) / len(split),
            **KINDS[task.kind].measure(task, together([c[i] for c in counts])),
            "samples": float(len(split)),
        }
        for i, task in enumerate(data.tasks)
    }


# --- the loop -------------------------------------------------------------------------------------------------------


def rate(spec: TrainSpec, step: int, per_epoch: int) -> float:
    """The learning rate of a step (from 0)."""
    warm, total = spec.warmup_epochs * per_epoch, spec.epochs * per_epoch
    if step < warm:
        return spec.lr * (step + 1) / warm
    return spec.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, total - warm)))


def _optimizer(model: nn.Module, spec: TrainSpec, weights: Weights) -> torch.optim.Optimizer:
    parameters: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if weights.learnt:
        parameters.append({"params": [weights.log_variances], "weight_decay": 0.0})
    if spec.optimizer == "adam":
        return torch.optim.Adam(parameters, spec.lr, (spec.momentum, 0.999), weight_decay=spec.weight_decay)
    return torch.optim.SGD(parameters, spec.lr, spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov)


@dataclass(frozen=True)
class Moment:
    """Where training stands when masks may change: at the start of a step."""

    epoch: int
    step: int  # of all steps
    per_epoch: int
    steps: int


# Given the model as it is now; None keeps the masks as they are.
Remask = Callable[[Moment, nn.Module], Masks | None]


class Trainer(Protocol):
    """A training: `train`, or a user's own in its place.

    The model is trained in place; what is masked stays zero, and a checkpoint that exists is gone on from to the same
    bytes.
    """

    def __call__(
        self,
        model: nn.Module,
        data: Splits,
        spec: TrainSpec,
        *,
        seed: int = 0,
        masks: Masks | None = None,
        remask: Remask | None = None,
        checkpoint: Path | None = None,
        label: str = "training",
        identity: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]: ...


def train(
    model: nn.Module,
    data: Splits,
    spec: TrainSpec,
    *,
    seed: int = 0,
    masks: Masks | None = None,
    remask: Remask | None = None,
    checkpoint: Path | None = None,
    label: str = "training",
    identity: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Trains ``model`` in place on ``data.train``.

    Masked weights, their gradients and their momentum are exactly zero from the moment they are masked.

    Args:
        masks: by parameter name, True = kept; held from the first step.
        remask: asked before every step for other masks (gradual pruning).
        checkpoint: a safetensors file; it is written as training goes on, and where it exists training goes on from it.
            It is left there at the end.
        identity: JSON-like facts that a checkpoint must share to be gone on from (the start weights' hash, say).

    Returns:
        The masks at the end, and one row an epoch: epoch, loss (mean over its samples), lr, pruned (weights); where
        the tasks' weights are learnt, each of them as ``weight TASK``.

    Raises:
        CompressError: the loss is not finite, the masks or weights do not fit, a batch norm would see one sample, or
            the checkpoint is of another run.
    """
    count = len(data.train)
    per_epoch = math.ceil(count / spec.batch)
    steps = per_epoch * spec.epochs
    held = dict(masks or {})
    check_masks(model, held)
    _check_norms(model, spec.batch)
    _broadcast(model)
    weights = Weights(spec.weights, data.tasks, next(model.parameters()))
    optimizer = _optimizer(model, spec, weights)
    apply_masks(model, held)
    average = _Average(model, spec.ema) if spec.ema is not None else None
    torch.manual_seed(seed)
    rows: list[dict[str, float]] = []
    mark = fingerprint(
        {"spec": spec.model_dump(mode="json", exclude={"checkpoint_steps"}), "seed": seed, "data": data.sha256}
        | {"identity": dict(identity or {})}
    )
    state = _State(model, optimizer, average, weights)
    start, total = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        start, total, rows, held = state.read(checkpoint, mark)
    learner = _Learner(model, data, spec, seed, label, weights, optimizer, average)
    model.train()
    with _one_batch(model), sound_gradients(model), Progress(steps, label, start) as bar:
        for step in range(start, steps):
            epoch, within = divmod(step, per_epoch)
            new = None if remask is None else remask(Moment(epoch, step, per_epoch, steps), model)
            if new is not None:
                held = learner.masked(new)
            if not within:
                total, order = 0.0, _order(count, seed, epoch)
            elif step == start:
                order = _order(count, seed, epoch)
            at = order[within * spec.batch : (within + 1) * spec.batch]
            now = rate(spec, step, per_epoch)
            value = learner.step(step, epoch, at, now, held)
            total += value * len(at)
            done = step + 1
            if done % per_epoch == 0:
                rows.append(learner.row(epoch, total / count, now, held))
            if checkpoint is not None and (done == steps or done % (spec.checkpoint_steps or per_epoch) == 0):
                if is_main():
                    state.write(checkpoint, mark, done, total, rows, held)
                meet("behind a checkpoint")
            bar.to(done, f"loss {value:.3f}")
    if average is not None:
        average.give(model)
    model.eval()
    return held, rows


@dataclass(frozen=True)
class _Learner:
    """What every step of one training works with."""

    model: nn.Module
    data: Splits
    spec: TrainSpec
    seed: int
    label: str
    weights: Weights
    optimizer: torch.optim.Optimizer
    average: _Average | None

    def masked(self, masks: Masks) -> dict[str, Tensor]:
        """Holds other masks from here on: momentum and average are masked too."""
        check_masks(self.model, masks)
        held = dict(masks)
        apply_masks(self.model, held, self.optimizer)
        if self.average is not None:
            self.average.mask(held)
        return held

    def step(self, step: int, epoch: int, at: Tensor, lr: float, held: Masks) -> float:
        """One step on the samples ``at``, which the processes divide; returns their mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._loss(step, at)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(sum_floats(loss.detach().clone()))
        if not math.isfinite(value):
            raise CompressError(
                f"the loss is {value} in epoch {epoch + 1}", where=self.label, fix="lower the learning rate, or clip"
            )
        _share_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        mask_gradients(self.model, held)
        if self.spec.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        return value

    def _loss(self, step: int, at: Tensor) -> Tensor:
        """This process's part of the mean loss over ``at``."""
        spec, tasks, place = self.spec, self.data.tasks, next(self.model.parameters()).device
        mine = at[rank() :: world()]
        x, targets = _batch(self.data, mine, spec, self.seed, step, place)
        with torch.autocast(place.type, torch.bfloat16, enabled=spec.precision == "bfloat16"):
            losses = _losses(self.model, x, targets, tasks, spec.label_smoothing)
            return self.weights(losses, len(mine)) / len(at)

    def row(self, epoch: int, loss: float, lr: float, held: Masks) -> dict[str, float]:
        """What is noted of an epoch."""
        pruned = sum(int((~m).sum()) for m in held.values())
        learnt = self.weights.now() if self.weights.learnt else {}
        return {
            "epoch": epoch + 1,
            "loss": loss,
            "lr": lr,
            "pruned": pruned,
            **{f"weight {name}": value for name, value in learnt.items()},
        }


def _check_norms(model: nn.Module, batch: int) -> None:
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if batch == 1 and norms:
        raise CompressError(
            f"a batch of one sample, and {len(norms)} batch norms (the first: {norms[0]}), which would make every"
            " sample its own mean",
            where="train.batch",
            fix="train on batches of 2 or more, better 16; evaluation takes any batch",
        )


def _losses(
    model: nn.Module, x: Tensor, targets: Mapping[str, Tensor], tasks: tuple[Task, ...], smoothing: float
) -> Tensor:
    try:
        return task_losses(model, x, targets, tasks, smoothing)
    except ValueError as e:
        if "more than 1 value per channel" not in str(e):
            raise
        raise CompressError(
            f"the last batch of an epoch holds {len(x)} sample, and a batch norm behind a mean over all pixels sees"
            " nothing else",
            where="train.batch",
            fix="give a batch that leaves a larger rest",
        ) from e


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def _batch(
    data: Splits, at: Tensor, spec: TrainSpec, seed: int, step: int, place: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Prepared inputs and targets of the samples ``at``. What is random is drawn for each sample by itself, so that it
    does not depend on which process holds it."""
    inputs, targets = data.train.inputs, {n: t[at] for n, t in data.train.targets.items()}
    x = inputs.drawn(at, seed * 7_368_787 + step) if isinstance(inputs, FolderImages) else inputs[at]
    if spec.flip or spec.shift:
        x, targets = _moved(x, targets, data.tasks, at, len(data.train), spec, seed, step)
    x = data.prepare(x.to(place))
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions are a fifth faster so, on CPU and GPU
    return x, {n: t.to(place) for n, t in targets.items()}


def _moved(
    x: Tensor,
    targets: dict[str, Tensor],
    tasks: tuple[Task, ...],
    at: Tensor,
    count: int,
    spec: TrainSpec,
    seed: int,
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mirrors and moves images (b, c, h, w) and the pixels and boxes that belong to them alike."""
    generator = torch.Generator().manual_seed(seed * 7_368_787 + step)
    draw = torch.rand(3, count, generator=generator)[:, at]
    flip = (draw[0] < 0.5) & spec.flip
    by = ((draw[1:] * (2 * spec.shift + 1)).long() - spec.shift).clamp(-spec.shift, spec.shift)  # (2, b)

    def move(image: Tensor, outside: int = 0) -> Tensor:
        b, _, h, w = image.shape
        rows, columns = torch.arange(h)[None] + by[0][:, None], torch.arange(w)[None] + by[1][:, None]
        columns = torch.where(flip[:, None], w - 1 - columns, columns)
        inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
        rows, columns = rows.clamp(0, h - 1), columns.clamp(0, w - 1)
        moved = image[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (b, h, w, c)
        return moved.masked_fill(~inside[..., None], outside).permute(0, 3, 1, 2).contiguous()

    def moved(task: Task) -> Tensor:
        target = targets[task.name]
        if task.kind == "boxes":
            return boxes.moved(target, flip, by.flip(0).T / torch.tensor([x.shape[3], x.shape[2]]))
        if not KINDS[task.kind].dense:
            return target
        whole = move(target if target.dim() == 4 else target[:, None], KINDS[task.kind].outside)
        if task.kind == "normals":
            # In a mirror, what looked to the left looks to the right.
            whole[:, 0] = torch.where(flip[:, None, None], -whole[:, 0], whole[:, 0])
        return whole if target.dim() == 4 else whole[:, 0]

    return move(x), {task.name: moved(task) for task in tasks}


@torch.no_grad()
def _share_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums the gradients over all processes, in one message; each loss was divided by the whole batch already."""
    if world() == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = sum_floats(torch.cat([g.flatten() for g in gradients]))
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


class _Average:
    """The exponential moving average of weights and float buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            if name in self.tensors:
                self.tensors[name].mul_(self.decay).add_(tensor, alpha=1 - self.decay)

    @torch.no_grad()
    def mask(self, masks: Masks) -> None:
        for name, mask in masks.items():
            self.tensors[name].masked_fill_(~mask.to(self.tensors[name].device), 0)

    @torch.no_grad()
    def give(self, model: nn.Module) -> None:
        state = model.state_dict()
        for name, tensor in self.tensors.items():
            state[name].copy_(tensor)


class _State:
    """All that a step leaves to the next one, as one safetensors file whose header holds the rest as JSON."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: _Average | None, weights: Weights
    ) -> None:
        self.model, self.optimizer, self.average, self.weights = model, optimizer, average, weights

    def write(self, path: Path, mark: str, step: int, total: float, rows: list[dict[str, float]], masks: Masks) -> None:
        from safetensors.torch import save_file

        # Cloned where two names share one tensor: safetensors keeps none of the ties, the model has them.
        tensors = {f"model.{n}": t.detach().clone() for n, t in self.model.state_dict().items()}
        scalars: dict[str, float] = {}
        for i, parameter in enumerate(p for g in self.optimizer.param_groups for p in g["params"]):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{i}.{key}"] = value.detach().clone()
                elif value is not None:
                    scalars[f"{i}.{key}"] = value
        if self.average is not None:
            tensors |= {f"average.{n}": t.clone() for n, t in self.average.tensors.items()}
        if self.weights.learnt:
            tensors["log_variances"] = self.weights.log_variances.detach().clone()
        tensors |= {f"mask.{n}": m.clone() for n, m in masks.items()}
        tensors["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        facts = {"mark": mark, "step": step, "total": total, "rows": rows, "scalars": scalars}
        held = {k: v.contiguous() for k, v in tensors.items()}
        said = json.dumps(facts)
        # One entry: safetensors writes several in an order that changes from call to call.
        with whole_file(path) as partial:
            save_file(held, partial, {"training": f"{said}\n{fingerprint({said: tensors_sha(held)})}"})

    @torch.no_grad()
    def read(self, path: Path, mark: str) -> tuple[int, float, list[dict[str, float]], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                said, _, sha256 = (file.metadata() or {})["training"].rpartition("\n")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, KeyError, UnicodeDecodeError) as e:
            raise CompressError(
                f"the checkpoint cannot be read: {e}", where=str(path), fix="delete it; training then starts over"
            ) from e
        if fingerprint({said: tensors_sha(tensors)}) != sha256:
            raise CompressError(
                "the checkpoint was changed since it was written",
                where=str(path),
                fix="delete it; training then starts over",
            )
        facts = json.loads(said)
        if facts["mark"] != mark:
            raise CompressError(
                "the checkpoint was made with other settings, data or weights",
                where=str(path),
                fix="go back to them, or delete it",
            )
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(tensors[f"model.{name}"])
        for i, parameter in enumerate(p for g in self.optimizer.param_groups for p in g["params"]):
            prefix = f"optimizer.{i}."
            own: dict[str, Any] = {
                # Adam counts its steps on the CPU, wherever the weights are.
                k.removeprefix(prefix): v.clone() if v.dim() == 0 else v.to(parameter.device, copy=True)
                for k, v in tensors.items()
                if k.startswith(prefix)
            }
            own |= {k.split(".", 1)[1]: v for k, v in facts["scalars"].items() if k.split(".", 1)[0] == str(i)}
            if own:
                self.optimizer.state[parameter] = own
        if self.average is not None:
            for name, tensor in self.average.tensors.items():
                tensor.copy_(tensors[f"average.{name}"])
        if self.weights.learnt:
            self.weights.log_variances.copy_(tensors["log_variances"])
        torch.set_rng_state(tensors["rng"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        masks = {n.removeprefix("mask."): t for n, t in tensors.items() if n.startswith("mask.")}
        return int(facts["step"]), float(facts["total"]), list(facts["rows"]), masks
