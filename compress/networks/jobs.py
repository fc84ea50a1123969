"""A job's functions as a run asks them: each call is watched, and what goes wrong in it is one error that names it.

A measure that changes the network it measures, or a training that puts other modules in their place, would make every
figure behind it one of another network than the one that is saved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from compress.data.job import NamedJob, aside, fault_of
from compress.errors import CompressError, UsageError
from compress.networks.train import Masks, apply_masks, check_masks, mask_gradients
from compress.processes.distributed import world
from compress.run.progress import say
from compress.schema.recipe import nearest
from compress.schema.sections import DataSpec, NetworkRecipe, TrainSpec

if TYPE_CHECKING:
    from compress.networks.setup import NetworkSetup

COPY = "let it work on a copy: copy.deepcopy(model)"


# --- set-up ---------------------------------------------------------------------------------------------------------


def prepare_job(held: NamedJob, recipe: NetworkRecipe) -> NetworkSetup:
    """A job's set-up: its network is the dense one, and nothing of the recipe's data or dense training is for it.

    Raises:
        UsageError: the recipe asks for what a job does not have.
    """
    from compress.models.sources import Resolved
    from compress.networks.setup import NetworkSetup
    from compress.run.cache import tensors_sha

    _check_recipe(held, recipe)
    changes: dict[str, Any] = {"data": None, "train": recipe.train.model_copy(update=NOTHING)}
    if held.job.train is None:
        changes["finetune"] = None
    options = recipe.options
    if held.job.loss is None and getattr(options, "saliency", None) == "taylor":
        if "saliency" in options.model_fields_set:
            raise UsageError(
                "taylor needs gradients of a loss, and the job gives none",
                where="pagcp.saliency",
                fix="give the job loss and batches, or take the weights' norms: --set pagcp.saliency=l1",
            )
        changes["options"] = options.model_copy(update={"saliency": "l1"})
    path, _, name = held.name.rpartition(":")
    source = f"the job's own, file {Path(path).name}"
    resolved = Resolved(f"{Path(path).stem}-{name}", Path(), source, None, None)
    setup = NetworkSetup(resolved, recipe.model_copy(update=changes), held.name, {}, DataSpec(), "", None, job=held)
    setup.weights = tensors_sha({k: v.cpu() for k, v in setup.build().state_dict().items()})
    return setup


NOTHING: dict[str, Any] = {"epochs": 0, "warmup_epochs": 0.0}  # of a training


def _check_recipe(held: NamedJob, recipe: NetworkRecipe) -> None:
    """Raises UsageError where a recipe asks for what is not there for a job."""

    def refuse(what: str, where: str, fix: str) -> UsageError:
        return UsageError(what, where=where, fix=fix)

    if world() > 1:
        raise refuse("a job runs in one process, and there are several", "--processes", "let its train start its own")
    if recipe.data is not None and recipe.data.named():
        raise refuse("a job has its own data, and the recipe names some", "data", "leave data out")
    if recipe.weights is not None:
        raise refuse("a job's network comes with its weights", "weights", "load them in the job's network")
    if recipe.arguments:
        raise refuse("a job's network takes no arguments", "arguments", f"set them in {held.title}")
    if getattr(recipe.options, "schedule", "") == "gradual":
        raise refuse(
            "a gradual schedule prunes while we train, and a job trains by itself",
            "global-mp.schedule",
            "take one-shot: the masks are held while the job's train runs",
        )
    if getattr(recipe.options, "ranks", None) is not None:
        raise refuse("ranks are FastGRNN's, trained on our data", "global-mp.ranks", "give sparsity")
    if getattr(recipe.options, "trials", None) is not None:
        raise refuse("trials train on our data, and a job has its own", "pagcp.trials", "leave trials out (null)")


def check_job(setup: NetworkSetup) -> dict[str, float]:
    """What a run needs of a job, asked before anything is made: the network takes the example and answers alike twice,
    so does ``calibrate``; ``evaluate`` and ``train`` are asked when their time comes.

    Returns:
        What ``calibrate`` says of the dense network.

    Raises:
        CompressError: see `figures`; the network or ``calibrate`` gives something else the second time.
    """
    from compress.data.inputs import call, mapped
    from compress.data.outputs import floating, tensors

    held = setup.job
    assert held is not None  # asked by the caller
    model = setup.build().eval()
    place = _device(model)
    x = mapped(setup.example, lambda t: t.to(place))
    with torch.no_grad():
        try:
            one, two = floating(call(model, x)), floating(call(model, x))
        except Exception as e:  # the user's own code
            raise CompressError(
                f"the network does not take the example: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}",
                where=f"{held.title}, example {_shapes(setup.example)}",
                fix="give the example as the network is called: a tensor, a tuple of its arguments, a dict by name",
            ) from e
    if not one:
        raise CompressError(
            "the network gives no tensor of floats", where=f"{held.title}, network", fix="return its outputs"
        )
    if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, two, strict=True)):
        raise CompressError(
            "the network gives other outputs for the same example the second time, in evaluation mode",
            where=f"{held.title}, network",
            fix="take out what is random, or what it remembers between calls",
        )
    whole = len(tensors(call(model, x))) - len(one)
    if whole:
        many = "an output" if whole == 1 else f"{whole} outputs"
        say(f"network: {many} of whole numbers: neither compared nor exported")
    found = _check_twice(held, model, setup.recipe.seed)
    if held.job.loss is not None:
        _check_batches(held, model, setup.recipe.seed)
    return found


def _check_twice(held: NamedJob, model: nn.Module, seed: int) -> dict[str, float]:
    first, again = (figures(held, "calibrate", model, seed) for _ in range(2))
    for task, value in first.items():
        if again[task] != value:
            raise CompressError(
                f"calibrate gives {task} {value:.6g}, and {again[task]:.6g} of the same network the second time",
                where=held.where("calibrate"),
                fix="let it see the same samples in the same order each time (no shuffling, no generator that goes on)",
            )
    return first


def _check_batches(held: NamedJob, model: nn.Module, seed: int) -> None:
    """Raises CompressError where ``batches`` gives none, or ``loss`` gives nothing to go backward from."""
    listed = batches(held, seed)
    if not listed:
        raise CompressError("batches gives none", where=held.where("batches"), fix="let it yield training batches")
    marks = _Marks(model)
    with torch.enable_grad():
        losses(held, model, listed[0], seed)
    marks.check(held, "loss")


def _shapes(x: Any) -> str:
    from compress.data.inputs import inputs_by_name

    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in inputs_by_name(x).items())


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# --- measuring ------------------------------------------------------------------------------------------------------


def seeded(seed: int) -> None:
    """Starts the generators that a function of the user's may draw from: each call of it draws alike."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class _Marks:
    """What a network was before a function of the user's was given it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: id(module) for name, module in model.named_modules()}
        self.held = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}

    def check(self, held: NamedJob, role: str) -> None:
        """Raises CompressError where the function has changed modules, weights or buffers."""
        said = _changed(self.modules, {name: id(m) for name, m in self.model.named_modules()}, "module")
        now = _tensors(self.model)
        said = said or _changed(dict.fromkeys(self.held), dict.fromkeys(now), "weight or buffer")
        for name, before in self.held.items() if not said else ():
            tensor, was = now[name].detach(), before.to(now[name].device)
            if not torch.equal(tensor, was) and not torch.equal(_bits(tensor), _bits(was)):
                said = f"{name} is other than before"
                break
        if said:
            raise CompressError(f"{role} changes the network: {said}", where=held.where(role), fix=COPY)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _bits(tensor: Tensor) -> Tensor:
    """NaN equals itself."""
    return torch.nan_to_num(tensor) if tensor.is_floating_point() else tensor


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], what: str) -> str:
    """The first entry that is gone, new or another, in words; empty where none is."""
    for name in (*before, *after):
        if name not in after:
            return f"the {what} {name} is gone"
        if name not in before:
            return f"the {what} {name} is new"
        if before[name] != after[name]:
            return f"the {what} {name or 'at the top'} is another"
    return ""


def figures(held: NamedJob, role: str, model: nn.Module, seed: int) -> dict[str, float]:
    """What ``calibrate`` or ``evaluate`` says of a network, by task in the order of ``better``.

    Args:
        model: in evaluation mode, in which it is left.

    Raises:
        CompressError: the function fails, changes the network, or gives other tasks or no finite numbers.
    """
    marks, place = _Marks(model), _device(model)
    seeded(seed)
    with torch.no_grad():
        given = held.called(role, model)
    where = held.where(role)
    marks.check(held, role)
    model.to(place).eval()
    if not isinstance(given, Mapping):
        raise CompressError(
            f"{role} returned {type(given).__name__}, not a dict of numbers by task",
            where=where,
            fix=f"return {{{', '.join(f'{name!r}: ...' for name in held.job.better)}}}",
        )
    strange = next((str(name) for name in given if name not in held.job.better), None)
    missing = next((name for name in held.job.better if name not in given), None)
    if strange is not None or missing is not None:
        said = (
            f"no {missing!r}, which better names" if missing is not None else f"{strange!r}, which better does not name"
        )
        fix = f"give one number for each of: {', '.join(held.job.better)}"
        if missing is None and strange is not None:
            fix = nearest(strange, list(held.job.better))
        raise CompressError(f"{role} gives {said}", where=where, fix=fix)
    return {name: _number(given[name], name, role, where) for name in held.job.better}


def _number(value: Any, task: str, role: str, where: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise CompressError(
            f"{role} gives a {type(value).__name__} for {task!r}, not a number", where=where, fix="give a float"
        ) from None
    if not math.isfinite(found):
        raise CompressError(
            f"{role} gives {found} for {task!r}",
            where=where,
            fix="give a finite number of every network: the oracle asks of ones that are hardly better than chance",
        )
    return found


def job_named(network: str | None) -> NamedJob:
    """The job that a name leads to.

    Raises:
        UsageError: none is named, or the name is a function's.
    """
    from compress.models.zoo import job_of

    held = job_of(network) if network is not None else None
    if held is None:
        raise UsageError(
            "the network is a job's, which alone can measure it",
            where=network or "--network",
            fix="name the job: --network FILE.py:JOB",
        )
    return held


def asked(held: NamedJob, model: nn.Module, seed: int = 0) -> dict[str, dict[str, float]]:
    """What a job's ``evaluate`` says of a saved network, by task and name."""
    return {name: {name: value} for name, value in figures(held, "evaluate", model.eval(), seed).items()}


# --- a loss and its batches -----------------------------------------------------------------------------------------


def batches(held: NamedJob, seed: int) -> list[Any]:
    """The job's training batches, drawn once in a process."""
    if "batches" not in held.kept:
        seeded(seed)
        given = held.called("batches")
        try:
            with aside():
                held.kept["batches"] = list(given)
        except Exception as e:  # a generator of the user's runs here
            where = held.where("batches")
            raise fault_of(e, "the job's batches", where, where.partition(",")[0]) from e
    found: list[Any] = held.kept["batches"]
    return found


def losses(held: NamedJob, model: nn.Module, batch: Any, seed: int) -> list[Tensor]:
    """What the job's loss gives of a batch, a number a task; each can be gone backward from.

    Raises:
        CompressError: it gives something else.
    """
    seeded(seed)
    given = held.called("loss", model, batch)
    listed = list(given.values()) if isinstance(given, Mapping) else [given]
    where = held.where("loss")
    for value in listed:
        if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite().all()):
            raise CompressError(
                f"loss gives {value if not isinstance(value, Tensor) else tuple(value.shape)!r:.60}, not one finite"
                " number as a tensor",
                where=where,
                fix="return a scalar tensor, or {task: scalar}",
            )
    if torch.is_grad_enabled() and not all(value.requires_grad for value in listed):
        raise CompressError(
            "loss depends on no weight by a differentiable operation", where=where, fix="leave out no_grad and detach"
        )
    return listed


# --- training -------------------------------------------------------------------------------------------------------


def train_by_job(
    held: NamedJob,
    model: nn.Module,
    spec: TrainSpec,
    *,
    seed: int = 0,
    masks: Masks | None = None,
    **_ours: Any,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The user's own loop in place of `compress.networks.train.train`; what is masked stays zero at its every step.

    Returns:
        The masks, and no rows: what the loop printed is its own.

    Raises:
        CompressError: it fails, replaces modules, changes shapes, trains nothing, or moves what is masked.
    """
    kept = dict(masks or {})
    check_masks(model, kept)
    apply_masks(model, kept)
    modules = {name: id(module) for name, module in model.named_modules()}
    before = {name: t.detach().clone() for name, t in _tensors(model).items()}
    hooks = _hooks(model)
    place = _device(model)
    words = {"epochs": spec.epochs, "seed": seed}
    seeded(seed)
    model.train()
    with holding(model, kept), torch.enable_grad():
        held.called("train", model, **{k: v for k, v in words.items() if held.takes("train", k)})
    model.to(place).eval()
    _check_trained(held, model, modules, before)
    left = _changed(hooks, _hooks(model), "hooks of")
    if left:
        raise CompressError(
            f"train leaves {left}: the network that is saved has none",
            where=held.where("train"),
            fix="remove what register_forward_hook gave when the training is over",
        )
    moved = _moved(model, kept)
    if moved:
        raise CompressError(
            f"train moved weights that are pruned: {moved}",
            where=held.where("train"),
            fix="change weights by the steps of a torch.optim optimizer alone, of the parameters of the given model",
        )
    apply_masks(model, kept)
    return kept, []


def _hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks every module calls when it is run."""
    return {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


def _check_trained(held: NamedJob, model: nn.Module, modules: Mapping[str, int], before: Mapping[str, Tensor]) -> None:
    where, now = held.where("train"), _tensors(model)
    said = _changed(modules, {name: id(m) for name, m in model.named_modules()}, "module")
    said = said or _changed(dict.fromkeys(before), dict.fromkeys(now), "weight or buffer")
    was, are = ({n: tuple(t.shape) for n, t in of.items()} for of in (before, now))
    said = said or _changed(was, are, "shape of")
    was_type, is_type = ({n: str(t.dtype) for n, t in of.items()} for of in (before, now))
    said = said or _changed(was_type, is_type, "type of")
    if said:
        raise CompressError(
            f"train changes what the network is made of: {said}",
            where=where,
            fix="train the given model in place, and leave wrapping, fusing and other types to a copy",
        )
    wrong = next((n for n, t in now.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)
    if wrong is not None:
        raise CompressError(
            f"train leaves NaN or infinity in {wrong}", where=where, fix="lower the learning rate, or clip the gradient"
        )
    if all(torch.equal(t.detach().cpu(), before[n].cpu()) for n, t in now.items()):
        raise CompressError(
            "train left every weight as it was",
            where=where,
            fix="train the model that it is given, in place, not a copy",
        )


def _moved(model: nn.Module, masks: Masks) -> str:
    """How many weights of which parameter are not zero where they are masked; empty where all are."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        count = int(torch.count_nonzero(parameters[name].detach()[~mask.to(parameters[name].device)]))
        if count:
            return f"{count:,} of {name}"
    return ""


@contextmanager
def holding(model: nn.Module, masks: Masks) -> Iterator[None]:
    """While it is open, no step of any torch optimiser moves what is masked: gradients are masked before it, weights
    and what the optimiser remembers of them behind it."""
    if not masks:
        yield
        return
    own = {id(p) for p in model.parameters()}

    def ours(optimizer: torch.optim.Optimizer) -> bool:
        gone = next((name for name in masks if name not in dict(model.named_parameters())), None)
        if gone is not None:
            raise CompressError(
                f"train changes what the network is made of: the weight {gone} is gone",
                where="the job's train",
                fix="train the given model in place, and leave wrapping and other parametrisations to a copy",
            )
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if ours(optimizer):
            mask_gradients(model, masks)

    def behind(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if ours(optimizer):
            apply_masks(model, masks, optimizer)

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(behind)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- beforehand -----------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    import time

    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def timed(setup: NetworkSetup) -> dict[str, float | None]:
    """Seconds of one call of ``calibrate`` and ``evaluate``, and of an epoch of ``train`` on a copy; None where there
    is no training, or where it takes no ``epochs``, so that one call is all of it."""
    held = setup.job
    assert held is not None  # asked by the caller
    model, seed = setup.build().eval(), setup.recipe.seed
    found: dict[str, float | None] = {
        role: seconds_of(lambda role=role: figures(held, role, model, seed))  # type: ignore[misc]
        for role in ("calibrate", "evaluate")
    }
    one = setup.recipe.train.model_copy(update={"epochs": 1})
    if held.job.train is not None:
        whole = not held.takes("train", "epochs")
        found["train"] = None if whole else seconds_of(lambda: train_by_job(held, setup.build(), one, seed=seed))
    return found


def timed_lines(facts: Mapping[str, Any]) -> list[str]:
    """What the command line says of a job's forecast: a call was timed, and is multiplied by how many there will be."""
    from compress.words.wording import counted

    lines = []
    for role, seconds in facts["seconds"].items():
        low, high = facts["calls"][role]
        each = "epoch" if role == "train" else "call"
        if not high:
            continue
        if seconds is None:
            lines.append(f"job      {role} was not timed: it takes no epochs, so that one call is the whole training")
            continue
        many = counted(high, each) if low == high else f"{low} to {high} {each}s"
        times = [_duration(n * seconds) for n in (low, high)]
        lines.append(
            f"job      {role}: {_duration(seconds)} a{'n' if each == 'epoch' else ''} {each} here, {many}:"
            f" {times[0] if low == high else ' to '.join(times)}"
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
