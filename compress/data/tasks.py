"""What a head can be asked: for each kind of task its outputs, its loss, its measure and which way is better.

Every loss is a sum over samples and every measure comes from sums that are exact in float64, so that it does not matter
how samples are divided among batches or processes. What has no target (a pixel without depth, an unknown label) counts
nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.data import boxes
from compress.data.outputs import named
from compress.errors import CompressError

KindName = Literal["classes", "mask", "labels", "depth", "normals", "edges", "attributes", "boxes", "number"]
IGNORE = 255  # the label of a pixel, and the value of an attribute, of which nothing is known


@dataclass(frozen=True)
class Task:
    """What one head is to say.

    Args:
        kind: ``classes``: one of ``classes``, target (n,) int64, negative where unknown.
            ``mask``: a share a pixel, target (n, h, w) uint8, 255 = all of it.
            ``labels``: one of ``classes`` a pixel, target (n, h, w) uint8, 255 = unknown.
            ``depth``: metres a pixel, target (n, h, w) float32, 0 = unknown.
            ``normals``: a direction a pixel, target (n, 3, h, w) float32 of unit length, 0 = unknown.
            ``edges``: whether a pixel is an edge, target (n, h, w) uint8, above 127 = it is one.
            ``attributes``: whether each of ``classes`` holds, target (n, classes) uint8 of 0, 1 and 255 = unknown.
            ``boxes``: objects of ``classes``, target (n, most, 5) float32: label (-1: none), centre x and y, width and
            height as shares of a square image; the head gives (n, 5 + classes, cells), see `compress.data.boxes`.
            ``number``: target (n,) float32, NaN where unknown; the head gives it less ``centre``, in ``scale``.
        log: depth: the head gives the logarithm, and the loss is its L1.
        positive: edges: the weight of an edge's pixel; another pixel has 1 less it.
        centre, scale: number: mean and spread of the training samples', which a head need not learn.
    """

    name: str
    kind: KindName
    classes: tuple[str, ...] = ()
    log: bool = False
    positive: float = 0.95
    centre: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """Numbers that a head gives of a sample, or of a pixel."""
        kind = KINDS[self.kind]
        return kind.outputs + (len(self.classes) if kind.per_class else 0)

    @property
    def metric(self) -> str:
        """The measure's name, as `compress.networks.train.evaluate` gives it."""
        return KINDS[self.kind].metric

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger measure is a better one. A loss is better when it is lower."""
        return KINDS[self.kind].higher_is_better

    def facts(self) -> dict[str, Any]:
        """What a saved network says of the task, JSON-like; ``Task(**facts)`` gives it back."""
        found: dict[str, Any] = {"name": self.name, "kind": self.kind, "classes": list(self.classes)}
        own = {"depth": ("log",), "edges": ("positive",), "number": ("centre", "scale")}.get(self.kind, ())
        return found | {name: getattr(self, name) for name in own}


@dataclass(frozen=True)
class Counts:
    """What is added up over samples: ``sums`` (k,) float64, and rows (m, w) float64 that are put one under another."""

    sums: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Kind:
    """How one kind of task is checked, trained and measured.

    Args:
        outputs: channels of a head; with ``per_class`` one more a class.
        dims: dimensions of a head's output.
        hub: the hub's name of such a task, for cards.
        dense: the target has pixels, which move with the image; ``outside`` stands where an image was moved from.
        loss: (task, output, target, smoothing) -> the sum over samples; of pixels, each sample's mean over valid ones.
        count: (task, output, target) -> what `measure` needs, of these samples.
        measure: (task, counts of all samples) -> figures by name, ``metric`` first.
    """

    metric: str
    higher_is_better: bool
    hub: str
    outputs: int
    per_class: bool
    dims: int
    dense: bool
    loss: Callable[[Task, Tensor, Tensor, float], Tensor]
    count: Callable[[Task, Tensor, Tensor], Counts]
    measure: Callable[[Task, Counts], dict[str, float]]
    outside: int = 0
    regression: bool = False


def wide(x: Tensor) -> Tensor:
    """float32 in place of a half type: what is summed up must not lose its small parts."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exact(x: Tensor) -> Tensor:
    """float64 on a grid of 2**-20, on which sums below 2**33 are exact: their order does not matter."""
    return (x.detach().cpu().double() * 2**20).round() / 2**20


def sums(*values: Tensor) -> Counts:
    """Counts without rows; each value may be a scalar or a vector."""
    joined = torch.cat([exact(v).reshape(-1) for v in values])
    return Counts(joined, torch.zeros(0, 0, dtype=torch.float64))


def together(parts: Sequence[Counts]) -> Counts:
    """The counts of all parts, whose rows keep the parts' order."""
    return Counts(torch.stack([p.sums for p in parts]).sum(0), torch.cat([p.rows for p in parts]))


def _per_sample(values: Tensor, valid: Tensor) -> Tensor:
    """The sum over samples of the mean of ``values`` (b, ...) where ``valid``; a sample without any adds 0."""
    kept = torch.where(valid, values, torch.zeros_like(values)).flatten(1).sum(1)
    return (kept / valid.flatten(1).sum(1).clamp_min(1)).sum()


def _ratio(over: Tensor, under: Tensor) -> float:
    return float(over) / max(float(under), 1.0)


# --- the kinds ------------------------------------------------------------------------------------------------------


def _classes_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    known = target >= 0
    return functional.cross_entropy(wide(output)[known], target[known], reduction="sum", label_smoothing=smoothing)


def _classes_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    return sums((output.argmax(1) == target).sum(), (target >= 0).sum())


def _accuracy(task: Task, counts: Counts) -> dict[str, float]:
    return {"accuracy": _ratio(counts.sums[0], counts.sums[1])}


def _mask_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    share = target.to(wide(output).dtype) / 255
    pixels = functional.binary_cross_entropy_with_logits(wide(output[:, 0]), share, reduction="none")
    return pixels.flatten(1).mean(1).sum()


def _mask_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    said, is_in = output[:, 0] > 0, target > 127
    return sums((said & is_in).sum(), (said | is_in).sum())


def _iou(task: Task, counts: Counts) -> dict[str, float]:
    return {"iou": _ratio(counts.sums[0], counts.sums[1])}


def _labels_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    pixels = functional.cross_entropy(
        wide(output), target.long(), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    return _per_sample(pixels, target != IGNORE)


def _labels_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    valid = target != IGNORE
    said, is_in = output.argmax(1)[valid], target[valid].long()
    count = len(task.classes)
    return sums(
        torch.bincount(is_in[said == is_in], minlength=count),
        torch.bincount(said, minlength=count),
        torch.bincount(is_in, minlength=count),
    )


def _mean_iou(task: Task, counts: Counts) -> dict[str, float]:
    """Over the classes that are there or were said; and the share of pixels that are right."""
    both, said, is_in = counts.sums.view(3, -1)
    union = said + is_in - both
    seen = union > 0
    mean = float((both[seen] / union[seen]).mean()) if bool(seen.any()) else 0.0
    return {"miou": mean, "pixel_accuracy": _ratio(both.sum(), is_in.sum())}


def _depth_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    valid = target > 0
    truth = torch.where(valid, target, torch.ones_like(target)).to(wide(output).dtype)
    return _per_sample((wide(output[:, 0]) - (truth.log() if task.log else truth)).abs(), valid)


def _depth_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    valid = target > 0
    metres = wide(output[:, 0]).exp() if task.log else wide(output[:, 0])
    return sums(exact(((metres.double() - target) ** 2)[valid]).sum(), valid.sum())


def _rmse(task: Task, counts: Counts) -> dict[str, float]:
    return {"rmse": _ratio(counts.sums[0], counts.sums[1]) ** 0.5}


def _normals_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """1 less the cosine of the angle between the two."""
    cosine = (functional.normalize(wide(output), dim=1) * target).sum(1)
    return _per_sample(1 - cosine, target.abs().sum(1) > 0)


def _normals_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    valid = target.abs().sum(1) > 0
    said, truth = (functional.normalize(wide(x).double(), dim=1) for x in (output, target))
    # atan2 instead of acos, which loses half the digits at small angles.
    angle = torch.atan2(torch.linalg.cross(said, truth, dim=1).norm(dim=1), (said * truth).sum(1))
    return sums(exact(torch.rad2deg(angle)[valid]).sum(), valid.sum())


def _angle(task: Task, counts: Counts) -> dict[str, float]:
    return {"degrees": _ratio(counts.sums[0], counts.sums[1])}


def _edges_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    edge = (target > 127).to(wide(output).dtype)
    weight = edge * task.positive + (1 - edge) * (1 - task.positive)
    pixels = functional.binary_cross_entropy_with_logits(wide(output[:, 0]), edge, weight, reduction="none")
    return pixels.flatten(1).mean(1).sum()


def _edges_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    # A weighted loss moves what a logit of 0 means: at this one, edge and no edge are equally likely.
    said, is_in = torch.sigmoid(wide(output[:, 0])) > task.positive, target > 127
    return sums((said & is_in).sum(), said.sum(), is_in.sum())


def _f1(task: Task, counts: Counts) -> dict[str, float]:
    """F1 over all pixels of all samples, exact places (no tolerance of pixels as the benchmark ODS has it)."""
    both, said, is_in = counts.sums
    return {"f1": float(2 * both) / max(float(said + is_in), 1.0)}


def _attributes_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    truth = (target == 1).to(wide(output).dtype)
    return _per_sample(
        functional.binary_cross_entropy_with_logits(wide(output), truth, reduction="none"), target != IGNORE
    )


def _attributes_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    known = target != IGNORE
    right = ((output > 0) == (target == 1)) & known
    rows = torch.cat([wide(output).double(), target.double()], 1).cpu()
    return Counts(sums(right.sum(0), known.sum(0)).sums, rows)


def _attributes(task: Task, counts: Counts) -> dict[str, float]:
    """The mean over attributes of average precision (those that any sample has), and of accuracy."""
    count = len(task.classes)
    scores, truth = counts.rows[:, :count], counts.rows[:, count:]
    found = []
    for i in range(count):
        known = truth[:, i] != IGNORE
        is_in = truth[known, i] == 1
        if bool(is_in.any()):
            found.append(average_precision(scores[known, i], is_in, int(is_in.sum())))
    right, known_sum = counts.sums.view(2, -1)
    accuracy = float((right / known_sum.clamp_min(1)).mean())
    return {"map": sum(found) / len(found) if found else 0.0, "accuracy": accuracy}


def _number_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Huber's, in the units of ``scale``: the far ones do not decide alone."""
    known = ~target.isnan()
    truth = ((target - task.centre) / task.scale).to(wide(output).dtype)
    return functional.smooth_l1_loss(wide(output)[:, 0][known], truth[known], reduction="sum")


def _number_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    known = ~target.isnan()
    # Off in units of the scale, in which sums are exact whatever the number is measured in.
    off = wide(output[:, 0]).double() - (target.double() - task.centre) / task.scale
    return sums(exact(off.abs()[known]).sum(), exact((off**2)[known]).sum(), known.sum())


def _errors(task: Task, counts: Counts) -> dict[str, float]:
    """The mean absolute error and the root of the mean squared one, in the number's own unit."""
    absolute, square, known = counts.sums
    return {"mae": task.scale * _ratio(absolute, known), "rmse": task.scale * _ratio(square, known) ** 0.5}


def average_precision(scores: Tensor, right: Tensor, positives: int) -> float:
    """The sum over distinct scores, from the largest, of precision times the recall that was gained.

    Args:
        scores: (n,).
        right: (n,) bool, whether what was said with that score is so.
        positives: how many there are to be found, found or not.
    """
    if not positives or not len(scores):
        return 0.0
    order = scores.argsort(descending=True, stable=True)
    hits = right[order].double().cumsum(0)
    said = torch.arange(1, len(order) + 1, dtype=torch.float64)
    # Equal scores are one step: no order among them may matter.
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = scores[order][1:] != scores[order][:-1]
    recall, precision = (hits / positives)[last], (hits / said)[last]
    gained = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
    return float((gained * precision).sum())


def _boxes_loss(task: Task, output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return boxes.loss(wide(output), target).sum()


def _boxes_count(task: Task, output: Tensor, target: Tensor) -> Counts:
    parts = boxes.losses(wide(output), target).sum(0)
    there = target[..., 0][target[..., 0] >= 0].long()
    objects = torch.bincount(there, minlength=len(task.classes))
    rows = boxes.detections(wide(output), target)
    return Counts(sums(parts, torch.tensor([float(len(target))]), objects).sums, rows)


def _mean_average_precision(task: Task, counts: Counts) -> dict[str, float]:
    """The mean over the classes that are there of average precision at an IoU of one half; the parts of the loss."""
    parts, samples, objects = counts.sums[:3], counts.sums[3], counts.sums[4:]
    found = []
    for label in (objects > 0).nonzero()[:, 0].tolist():
        own = counts.rows[counts.rows[:, 0] == label]
        found.append(average_precision(own[:, 1], own[:, 2] > 0, int(objects[label])))
    figures = {"map50": sum(found) / len(found) if found else 0.0}
    names = ("box_loss", "objectness_loss", "class_loss")
    return figures | {name: _ratio(part, samples) for name, part in zip(names, parts, strict=True)}


KINDS: dict[str, Kind] = {
    "classes": Kind(
        "accuracy", True, "image-classification", 0, True, 2, False, _classes_loss, _classes_count, _accuracy
    ),
    "mask": Kind("iou", True, "mask-generation", 1, False, 4, True, _mask_loss, _mask_count, _iou),
    "labels": Kind(
        "miou", True, "image-segmentation", 0, True, 4, True, _labels_loss, _labels_count, _mean_iou, outside=IGNORE
    ),
    "depth": Kind(
        "rmse", False, "depth-estimation", 1, False, 4, True, _depth_loss, _depth_count, _rmse, regression=True
    ),
    "normals": Kind(
        "degrees", False, "image-to-image", 3, False, 4, True, _normals_loss, _normals_count, _angle, regression=True
    ),
    "edges": Kind("f1", True, "image-to-image", 1, False, 4, True, _edges_loss, _edges_count, _f1),
    "attributes": Kind(
        "map", True, "image-classification", 0, True, 2, False, _attributes_loss, _attributes_count, _attributes
    ),
    "number": Kind("mae", False, "other", 1, False, 2, False, _number_loss, _number_count, _errors, regression=True),
    "boxes": Kind(
        "map50", True, "object-detection", 5, True, 3, False, _boxes_loss, _boxes_count, _mean_average_precision
    ),
}


# --- heads ----------------------------------------------------------------------------------------------------------


def by_task(outputs: Any, tasks: Sequence[Task]) -> dict[str, Tensor]:
    """A model's outputs by task, see `named`; each has the channels and dimensions that its task needs.

    Raises:
        CompressError: heads and tasks do not fit.
    """
    found = named(outputs, [t.name for t in tasks])
    for task in tasks:
        output, dims = found[task.name], KINDS[task.kind].dims
        if output.dim() != dims or output.shape[1] != task.outputs:
            shape = f"(batch, {task.outputs}{', h, w' if dims == 4 else ', cells' if dims == 3 else ''})"
            raise CompressError(
                f"the head {task.name!r} gives (batch, {', '.join(map(str, output.shape[1:]))}), {task.outputs} are"
                f" needed: {shape}",
                where="model",
                fix="set the model's number of classes",
            )
    return found


def task_loss(task: Task, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum over samples of the kind's loss.

    Raises:
        CompressError: the head's pixels are not the target's.
    """
    if KINDS[task.kind].dense and output.shape[-2:] != target.shape[-2:]:
        given, needed = ("x".join(map(str, t.shape[-2:])) for t in (output, target))
        raise CompressError(
            f"the head {task.name!r} gives {given} pixels, the target has {needed}",
            where="model",
            fix="let the network scale its output to the input's size",
        )
    return KINDS[task.kind].loss(task, output, target, smoothing)


def task_losses(
    model: nn.Module, x: Tensor, targets: Mapping[str, Tensor], tasks: Sequence[Task], smoothing: float = 0.0
) -> Tensor:
    """The sum over samples of every task's loss (tasks,), of prepared inputs."""
    outputs = by_task(model(x), tasks)
    return torch.stack([task_loss(t, outputs[t.name], targets[t.name], smoothing) for t in tasks])


class Weights:
    """How the tasks' losses are weighed: by fixed numbers, or by variances that are learnt along.

    The latter as Kendall et al. (2018) have it: exp(-s) L + s / 2 a sample with s = log variance, L halved where it is
    a regression.

    Raises:
        CompressError: a weight names no task, or all are 0.
    """

    def __init__(
        self, given: Mapping[str, float] | Literal["uncertainty"], tasks: Sequence[Task], like: Tensor
    ) -> None:
        self.names, self.learnt = [t.name for t in tasks], given == "uncertainty"
        factors = [0.5 if KINDS[t.kind].regression else 1.0 for t in tasks]
        if not isinstance(given, str):
            strange = sorted(set(given) - set(self.names))
            if strange:
                raise CompressError(
                    f"a weight is given for {strange[0]!r}, which is no task of the data",
                    where="train.weights",
                    fix=f"one of: {', '.join(self.names)}",
                )
            factors = [given.get(name, 1.0) for name in self.names]
        if not any(factors):
            raise CompressError("all tasks have weight 0", where="train.weights", fix="give one of them a weight")
        self.factors = torch.tensor(factors, dtype=like.dtype, device=like.device)
        self.log_variances = nn.Parameter(torch.zeros_like(self.factors), requires_grad=self.learnt)

    def __call__(self, losses: Tensor, samples: int) -> Tensor:
        """One loss of every task's sum over ``samples`` (tasks,)."""
        weighed = self.factors * losses
        if not self.learnt:
            return weighed.sum()
        return (torch.exp(-self.log_variances) * weighed + samples * self.log_variances / 2).sum()

    def now(self) -> dict[str, float]:
        """Each task's weight."""
        found = self.factors * torch.exp(-self.log_variances.detach())
        return dict(zip(self.names, found.tolist(), strict=True))


def loss_sum(
    model: nn.Module, x: Tensor, targets: Mapping[str, Tensor], tasks: Sequence[Task], smoothing: float = 0.0
) -> Tensor:
    """The sum over samples and tasks of the losses of prepared inputs."""
    return task_losses(model, x, targets, tasks, smoothing).sum()
