"""Kinds of tasks: every loss and measure against a computation that shares no line with it; heads of every form."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.data.tasks import KINDS, Counts, Task, Weights, average_precision, by_task, task_loss, together
from compress.errors import CompressError

draw = np.random.default_rng(0)


def floats(*shape: int) -> Tensor:
    return torch.from_numpy(draw.normal(size=shape))


def measured(task: Task, output: Tensor, target: Tensor, parts: tuple[int, ...] = ()) -> dict[str, float]:
    """The figures of all samples, counted in parts of the given sizes."""
    kind = KINDS[task.kind]
    sizes = list(parts) or [len(output)]
    counts = [kind.count(task, o, t) for o, t in zip(output.split(sizes), target.split(sizes), strict=True)]
    return kind.measure(task, together(counts))


def test_classes_leave_out_unknown_labels_in_loss_and_accuracy() -> None:
    task, output = Task("c", "classes", ("a", "b", "c")), floats(5, 3)
    target = torch.tensor([0, 2, -1, 1, 2])
    p = np.exp(output.numpy()) / np.exp(output.numpy()).sum(1, keepdims=True)
    want = -sum(math.log(p[i, t]) for i, t in enumerate(target.tolist()) if t >= 0)
    assert float(task_loss(task, output, target)) == pytest.approx(want, rel=1e-12)
    right = sum(int(p[i].argmax() == t) for i, t in enumerate(target.tolist()) if t >= 0)
    assert measured(task, output, target) == {"accuracy": right / 4}


def test_a_mask_is_a_share_a_pixel_and_iou_is_over_all_pixels_together() -> None:
    task, output = Task("m", "mask"), floats(3, 1, 4, 5)
    target = torch.from_numpy(draw.integers(0, 256, (3, 4, 5), dtype=np.uint8))
    p, t = 1 / (1 + np.exp(-output[:, 0].numpy())), target.numpy() / 255
    want = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean((1, 2)).sum()
    assert float(task_loss(task, output, target)) == pytest.approx(want, rel=1e-12)
    said, is_in = p > 0.5, target.numpy() > 127
    assert measured(task, output, target)["iou"] == pytest.approx((said & is_in).sum() / (said | is_in).sum())


def test_labels_ignore_255_and_the_mean_iou_is_of_classes_that_are_seen() -> None:
    task = Task("s", "labels", ("a", "b", "c", "never"))
    output = floats(3, 4, 6, 5)
    output[:, 3] = -99  # never said, never there
    target = torch.from_numpy(draw.integers(0, 3, (3, 6, 5)).astype(np.uint8))
    target[0, :3] = 255
    target[2] = 255  # a sample of which nothing is known
    log_p = output.numpy() - np.log(np.exp(output.numpy()).sum(1, keepdims=True))
    want = 0.0
    for i in range(2):
        known = [(y, x) for y in range(6) for x in range(5) if target[i, y, x] != 255]
        want += sum(-log_p[i, int(target[i, y, x]), y, x] for y, x in known) / len(known)
    assert float(task_loss(task, output, target)) == pytest.approx(want, rel=1e-12)
    said, valid = output.numpy().argmax(1), target.numpy() != 255
    ious = [
        ((said == c) & (target.numpy() == c)).sum() / (((said == c) & valid) | (target.numpy() == c)).sum()
        for c in range(3)
    ]
    found = measured(task, output, target)
    assert found["miou"] == pytest.approx(np.mean(ious))
    assert found["pixel_accuracy"] == pytest.approx((said == target.numpy())[valid].mean())


@pytest.mark.parametrize("log", [False, True])
def test_depth_is_compared_where_it_is_known_in_metres(log: bool) -> None:
    task, output = Task("d", "depth", log=log), floats(3, 1, 4, 4)
    target = torch.from_numpy(draw.uniform(0.5, 9, (3, 4, 4)))
    target[0, 0], target[1] = 0, 0
    t, o, valid = target.numpy(), output[:, 0].numpy(), target.numpy() > 0
    off = np.abs(o - np.log(np.where(valid, t, 1))) if log else np.abs(o - t)
    want = sum(off[i][valid[i]].mean() for i in range(3) if valid[i].any())
    assert float(task_loss(task, output, target)) == pytest.approx(want, rel=1e-12)
    metres = np.exp(o) if log else o
    want = math.sqrt(((metres - t)[valid] ** 2).mean())
    assert measured(task, output, target)["rmse"] == pytest.approx(want, rel=1e-6)
    assert not task.higher_is_better


def test_normals_are_compared_by_their_angle_where_they_are_known() -> None:
    task, output = Task("n", "normals"), floats(2, 3, 4, 4)
    target = torch.nn.functional.normalize(floats(2, 3, 4, 4), dim=1)
    target[0, :, 1] = 0
    angles: list[list[float]] = [[], []]
    for i in range(2):
        for y in range(4):
            for x in range(4):
                a, b = output[i, :, y, x].numpy(), target[i, :, y, x].numpy()
                if np.abs(b).sum():
                    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                    angles[i].append(math.acos(min(1.0, max(-1.0, cosine))))
    want = sum(np.mean([1 - math.cos(a) for a in part]) for part in angles)
    assert float(task_loss(task, output, target)) == pytest.approx(want, rel=1e-9)
    every = np.degrees(np.concatenate(angles))
    assert measured(task, output, target)["degrees"] == pytest.approx(every.mean(), rel=1e-6)


def test_edges_weigh_the_rare_ones_and_the_threshold_moves_with_the_weight() -> None:
    task, output = Task("e", "edges", positive=0.8), floats(3, 1, 6, 6) + 1
    target = torch.from_numpy((draw.random((3, 6, 6)) < 0.2).astype(np.uint8) * 255)
    p, t = 1 / (1 + np.exp(-output[:, 0].numpy())), target.numpy() > 127
    want = (-0.8 * t * np.log(p) - 0.2 * ~t * np.log(1 - p)).mean((1, 2)).sum()
    assert float(task_loss(task, output, target)) == pytest.approx(want, rel=1e-12)
    # What a pixel's odds are without the weights: the loss's own minimum for a known share q is at p with these odds.
    odds = p / (1 - p) * 0.2 / 0.8
    said = odds > 1
    precision, recall = (said & t).sum() / said.sum(), (said & t).sum() / t.sum()
    assert measured(task, output, target)["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_attributes_leave_out_the_unknown_and_are_ranked_each_by_itself() -> None:
    task, output = Task("a", "attributes", ("x", "y", "z")), floats(40, 3)
    target = torch.from_numpy(draw.integers(0, 2, (40, 3), dtype=np.uint8))
    target[:5, 1] = 255
    target[:, 2] = 0  # nobody has it: no precision to speak of
    output[3, 0] = output[9, 0] = output[11, 0]  # equal scores
    p, t = 1 / (1 + np.exp(-output.numpy())), target.numpy()
    want = 0.0
    for i in range(40):
        known = [c for c in range(3) if t[i, c] != 255]
        want -= np.mean([math.log(p[i, c] if t[i, c] else 1 - p[i, c]) for c in known])
    assert float(task_loss(task, output, target)) == pytest.approx(want, rel=1e-12)
    found = measured(task, output, target)
    precisions = [brute_precision(p[t[:, c] != 255, c], t[t[:, c] != 255, c]) for c in range(2)]
    assert found["map"] == pytest.approx(np.mean(precisions))
    accuracy = [((p[:, c] > 0.5) == t[:, c])[t[:, c] != 255].mean() for c in range(3)]
    assert found["accuracy"] == pytest.approx(np.mean(accuracy))


def brute_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Average precision by trying every threshold."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        said = scores >= threshold
        recall = truth[said].sum() / truth.sum()
        total += (recall - before) * truth[said].mean()
        before = recall
    return total


def test_average_precision_knows_no_order_among_equal_scores() -> None:
    scores, right = torch.tensor([0.5, 0.5, 0.5, 0.1]), torch.tensor([True, False, True, True])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 2, 3]):
        # Four to be found: 2 of 3 at the first step, then 3 of 4.
        assert average_precision(scores[order], right[order], 4) == pytest.approx(0.5 * 2 / 3 + 0.25 * 3 / 4)
    assert average_precision(scores[:0], right[:0], 4) == 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "boxes"])
def test_figures_are_the_same_to_the_bit_however_samples_are_divided(kind: str) -> None:
    task = Task("t", kind, ("a", "b", "c") if KINDS[kind].per_class else ())  # type: ignore[arg-type]
    n, pixels = 12, (5, 5) if KINDS[kind].dense else ()
    output = floats(n, task.outputs, *pixels)
    target = {
        "classes": lambda: torch.from_numpy(draw.integers(0, 3, n)),
        "attributes": lambda: torch.from_numpy(draw.integers(0, 2, (n, 3), dtype=np.uint8)),
        "labels": lambda: torch.from_numpy(draw.integers(0, 3, (n, 5, 5), dtype=np.uint8)),
        "depth": lambda: floats(n, 5, 5).abs(),
        "normals": lambda: torch.nn.functional.normalize(floats(n, 3, 5, 5), dim=1),
        "number": lambda: floats(n),
    }.get(kind, lambda: torch.from_numpy(draw.integers(0, 256, (n, 5, 5), dtype=np.uint8)))()
    whole = measured(task, output, target)
    assert measured(task, output, target, (5, 4, 3)) == whole == measured(task, output, target, (1,) * n)
    assert next(iter(whole)) == task.metric
    # A sample's loss does not depend on who else is in the batch.
    alone = sum(float(task_loss(task, output[i : i + 1], target[i : i + 1])) for i in range(n))
    assert float(task_loss(task, output, target)) == pytest.approx(alone, rel=1e-12)
    assert float(task_loss(task, output[:0], target[:0])) == 0  # a process without a sample


@dataclass
class Heads:
    matte: Tensor
    shape: Tensor


Pair = namedtuple("Pair", ["matte", "shape"])


def test_heads_may_be_a_dict_a_list_a_tuple_a_named_tuple_or_a_dataclass() -> None:
    tasks = (Task("shape", "classes", ("a", "b")), Task("matte", "mask"))
    shape, matte = floats(3, 2), floats(3, 1, 4, 4)
    for outputs in (
        {"matte": matte, "shape": shape, "more": shape},
        [shape, matte],
        (shape, matte),
        Pair(matte, shape),
        Heads(matte, shape),
    ):
        found = by_task(outputs, tasks)
        assert list(found) == ["shape", "matte"] and found["shape"] is shape and found["matte"] is matte
    assert by_task(shape, tasks[:1])["shape"] is shape
    for outputs, told in (
        (shape, "one output"),
        ([shape], "gives 1 tensors"),
        ({"shape": shape}, "no head 'matte'"),
        ({"shape": shape, "matte": None}, "no head 'matte'"),
        ([matte, shape], "are needed"),
        ("heads", "returned str"),
    ):
        with pytest.raises(CompressError, match=told):
            by_task(outputs, tasks)
    with pytest.raises(CompressError, match="4x4 pixels, the target has 8x8"):
        task_loss(tasks[1], matte, torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_fixed_weights_multiply_and_learnt_ones_are_kendalls() -> None:
    tasks = (Task("c", "classes", ("a", "b")), Task("d", "depth"))
    losses = torch.tensor([6.0, 8.0], dtype=torch.float64)
    assert float(Weights({}, tasks, losses)(losses, 4)) == 14
    assert float(Weights({"d": 0.25}, tasks, losses)(losses, 4)) == 8
    learnt = Weights("uncertainty", tasks, losses)
    with torch.no_grad():
        learnt.log_variances.copy_(torch.tensor([0.3, -0.2], dtype=torch.float64))
    want = math.exp(-0.3) * 6 + 4 * 0.15 + 0.5 * math.exp(0.2) * 8 - 4 * 0.1
    loss = learnt(losses, 4)
    assert loss.item() == pytest.approx(want, rel=1e-12)
    loss.backward()
    gradient = learnt.log_variances.grad
    assert gradient is not None
    assert gradient.tolist() == pytest.approx([2 - math.exp(-0.3) * 6, 2 - 0.5 * math.exp(0.2) * 8])
    assert learnt.now() == pytest.approx({"c": math.exp(-0.3), "d": 0.5 * math.exp(0.2)})
    with pytest.raises(CompressError, match="'matte', which is no task"):
        Weights({"matte": 1.0}, tasks, losses)
    with pytest.raises(CompressError, match="all tasks"):
        Weights({"c": 0.0, "d": 0.0}, tasks, losses)


def test_a_task_is_given_back_by_what_a_saved_network_says_of_it() -> None:
    for task in (Task("d", "depth", log=True), Task("e", "edges", positive=0.7), Task("c", "classes", ("a", "b"))):
        facts = task.facts()
        assert Task(**{**facts, "classes": tuple(facts["classes"])}) == task


def test_counts_of_no_rows_are_put_together() -> None:
    none = Counts(torch.ones(2, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64))
    assert together([none, none]).sums.tolist() == [2, 2]
