"""Boxes of a one-stage detector: what its cells say, what they should have said, and what is found.

A head gives (b, 5 + classes, cells): for every cell of one to four square grids, the finest first and each half as fine
as the one before: centre x and y, width and height as shares of the image, an object's logit, the classes' logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import CompressError

TYPICAL = 2.5  # cells: an object's longer side on the grid that is to find it
KEPT, SCORE, OVERLAP = 100, 0.01, 0.5  # most boxes of an image, least score of a box, IoU above which one goes
FOUND = 0.5  # IoU at which an object counts as found
BOX, OBJECTNESS, CLASS = 2.0, 1.0, 1.0  # how the three losses are weighed


def grids(cells: int) -> list[int]:
    """The sides of the grids that have so many cells together: 80 -> [8, 4].

    Raises:
        CompressError: no one to four grids, each half as fine as the last, have.
    """
    for levels in range(1, 5):
        # cells = side^2 (1 + 1/4 + ...); no two levels share a number, as a square is never 5, 21 or 85 times another.
        last = math.isqrt(cells // sum(4**i for i in range(levels)))
        if last and last * last * sum(4**i for i in range(levels)) == cells:
            return [last << i for i in reversed(range(levels))]
    raise CompressError(
        f"{cells} cells are no grids of which each is half as fine as the last",
        where="model",
        fix="give a detector a square input whose side its coarsest stride divides",
    )


def cells_of(sides: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Every cell's centre (cells, 2) as shares of the image, and its side (cells,)."""
    centres, widths = [], []
    for side in sides:
        at = (torch.arange(side, device=device) + 0.5) / side
        y, x = torch.meshgrid(at, at, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()], 1))
        widths.append(torch.full((side * side,), 1 / side, device=device))
    return torch.cat(centres), torch.cat(widths)


def decode(raw: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
    """Four free numbers a cell (b, 4, cells) -> boxes (b, 4, cells): centres up to one cell and a half off, sides of
    0 to 10 cells, typical ones at 0."""
    share = torch.sigmoid(raw)
    middle = centres.T + (share[:, :2] - 0.5) * 3 * widths
    return torch.cat([middle, (2 * share[:, 2:]) ** 2 * TYPICAL * widths], 1)


def moved(target: Tensor, flip: Tensor, by: Tensor) -> Tensor:
    """Boxes (b, most, 5) of images that were mirrored where ``flip`` (b,), and of which the part that begins at ``by``
    (b, 2), x and y as shares, is shown. A box of which less than a third is left is taken out."""
    label, middle, size = target[..., :1], target[..., 1:3].clone(), target[..., 3:]
    middle[..., 0] = torch.where(flip[:, None], 1 - middle[..., 0], middle[..., 0])
    middle = middle - by[:, None]
    least, most = (middle - size / 2).clamp(0, 1), (middle + size / 2).clamp(0, 1)
    left = (most - least).prod(-1, keepdim=True) < size.prod(-1, keepdim=True) / 3
    return torch.cat([torch.where(left, -1.0, label), (least + most) / 2, most - least], -1)


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> left, top, right, bottom."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of boxes (..., 4) given by corners, and the union's area."""
    least, most = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    both = (most - least).clamp_min(0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp_min(0).prod(-1) for b in (one, other)]
    union = areas[0] + areas[1] - both
    return both / union.clamp_min(1e-9), union


def generous(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """GIoU (Rezatofighi et al. 2019) and IoU of boxes (..., 4) given by corners."""
    iou, union = overlap(one, other)
    hull = (torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])).prod(-1)
    return iou - (hull - union) / hull.clamp_min(1e-9), iou


def assign(target: Tensor, sides: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Which cells are to find what.

    An object belongs to the grid on which it is closest to its typical size, to the cell that holds its centre and to
    the two next to it that lie nearest. A cell that two objects claim is the smaller one's.

    Args:
        target: (b, most, 5), see `compress.data.tasks.Task`.

    Returns:
        Three int64 vectors: the image, the cell and the object of every claim.
    """
    image, which = (target[..., 0] >= 0).nonzero(as_tuple=True)
    box = target[image, which, 1:]
    longer = box[:, 2:].amax(1)
    wanted = torch.stack([(longer * side / TYPICAL).clamp_min(1e-6).log2().abs() for side in sides], 1).argmin(1)
    side = torch.tensor(sides, device=target.device)[wanted]
    first = torch.tensor([sum(s * s for s in sides[:i]) for i in range(len(sides))], device=target.device)[wanted]
    at = box[:, :2] * side[:, None]  # in cells
    home = at.floor().long().minimum(side[:, None] - 1).clamp_min(0)
    toward = torch.where(at - home > 0.5, 1, -1)
    claims = []
    for step in ((0, 0), (1, 0), (0, 1)):
        cell = home + toward * torch.tensor(step, device=target.device)
        inside = ((cell >= 0) & (cell < side[:, None])).all(1)
        claims.append(torch.stack([image, first + cell[:, 1] * side + cell[:, 0], which], 1)[inside])
    every = torch.cat(claims)
    area = target[every[:, 0], every[:, 2], 3] * target[every[:, 0], every[:, 2], 4]
    # Largest first, so that the smallest is written last; then one claim a cell is left.
    every = every[area.argsort(descending=True, stable=True)]
    cells = sum(s * s for s in sides)
    held = torch.full((len(target) * cells,), -1, dtype=torch.int64, device=target.device)
    for key, claim in zip((every[:, 0] * cells + every[:, 1]).tolist(), range(len(every)), strict=True):
        held[key] = claim
    kept = every[held[held >= 0]]
    return kept[:, 0], kept[:, 1], kept[:, 2]


def losses(output: Tensor, target: Tensor) -> Tensor:
    """Of each image (b, 3): 1 - GIoU of its claimed cells, binary cross-entropy of all cells, cross-entropy of classes.

    Each is divided by the number of claimed cells; the truth of an object is the IoU that its cell's box has.
    """
    b, _, count = output.shape
    image, cell, which = assign(target, grids(count))
    said = output[image, :, cell]  # (claims, 5 + classes)
    truth = target[image, which]
    generosity, iou = generous(corners(said[:, :4]), corners(truth[:, 1:].to(said.dtype)))
    wanted = torch.zeros(b, count, dtype=output.dtype, device=output.device)
    wanted[image, cell] = iou.detach().clamp_min(0)
    objectness = functional.binary_cross_entropy_with_logits(output[:, 4], wanted, reduction="none").sum(1)
    named = functional.cross_entropy(said[:, 5:], truth[:, 0].long(), reduction="none")
    claims = torch.bincount(image, minlength=b).clamp_min(1).to(output.dtype)

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(b, dtype=output.dtype, device=output.device).index_add(0, image, values) / claims

    return torch.stack([mean(1 - generosity), objectness / claims, mean(named)], 1)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """The weighed sum of each image's three losses (b,)."""
    weights = torch.tensor([BOX, OBJECTNESS, CLASS], dtype=output.dtype, device=output.device)
    return losses(output, target) @ weights


def found(output: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every image: boxes (k, 4) by corners, scores (k,) and labels (k,), the surest first.

    A score is the probability of an object times that of its class. Of boxes of one class that overlap, the surest
    stays.
    """
    scores = torch.sigmoid(output[:, 4:5]) * torch.softmax(output[:, 5:], 1)  # (b, classes, cells)
    every = corners(output[:, :4].transpose(1, 2))  # (b, cells, 4)
    kept = []
    for score, box in zip(scores, every, strict=True):
        label, cell = (score > SCORE).nonzero(as_tuple=True)
        order = score[label, cell].argsort(descending=True, stable=True)
        label, cell = label[order], cell[order]
        place = box[cell]
        over = (overlap(place[:, None], place[None])[0] > OVERLAP) & (label[:, None] == label[None])
        stays: list[int] = []
        gone = torch.zeros(len(label), dtype=torch.bool, device=output.device)
        for i in range(len(label)):
            if not gone[i]:
                stays.append(i)
                gone |= over[i]
            if len(stays) == KEPT:
                break
        at = torch.tensor(stays, dtype=torch.int64, device=output.device)
        kept.append((place[at], score[label[at], cell[at]], label[at]))
    return kept


def detections(output: Tensor, target: Tensor) -> Tensor:
    """All boxes that were found, (m, 3) float64: label, score, and 1 where it is the first to find its object.

    A box finds the object of its class that it overlaps most, if by at least one half; an object is found once, by the
    surest (Everingham et al. 2010, PASCAL VOC).
    """
    rows = []
    for (place, score, label), truth in zip(found(output), target, strict=True):
        there = truth[truth[:, 0] >= 0]
        iou = overlap(place[:, None].double(), corners(there[:, 1:])[None].double())[0]
        iou = torch.where(label[:, None] == there[None, :, 0].long(), iou, -1.0)
        taken: set[int] = set()
        for i in range(len(label)):
            best = int(iou[i].argmax()) if len(there) else -1
            hit = best >= 0 and float(iou[i, best]) >= FOUND and best not in taken
            if hit:
                taken.add(best)
            rows.append([float(label[i]), float(score[i]), float(hit)])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
