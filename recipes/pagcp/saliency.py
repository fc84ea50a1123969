"""Which channels of a group go first: the sum over the group's layers of what each channel is worth there.

``l1`` is the paper's: the mean |W| of a channel's filter, added up over the layers that the group ties. ``l2`` takes
the filters' norms. ``taylor`` takes the change of each task's loss to first order (Molchanov et al. 2019): the square
of sum(w dL/dw) over all that makes the channel, divided by the task's mean over the network, and then the worst task's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.images import Split, Splits, batches
from compress.data.tasks import by_task, task_loss
from compress.networks.surgery import CHANNELWISE, TRANSPOSED
from compress.processes.distributed import gather, rank, world
from compress.recipes.pagcp.groups import Group

BATCH = 32  # samples of one gradient: their squares are what is averaged


@torch.no_grad()
def weight_scores(model: nn.Module, group: Group, norm: int) -> Tensor:
    """(units,) float64: the mean |W| (``norm`` 1) or the root mean square (2) of each unit's filters, over layers."""
    modules = dict(model.named_modules())
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        if member.axis != "out" or isinstance(modules[member.layer], CHANNELWISE):
            continue
        module: Any = modules[member.layer]
        weight = module.weight.detach().cpu().double()
        if isinstance(module, TRANSPOSED):
            weight = _transposed_rows(weight, module.groups)
        rows = weight.flatten(1)  # (out, weights of a filter)
        score = rows.abs().mean(1) if norm == 1 else rows.square().mean(1).sqrt()
        total += _by_unit(score, member.index)
    return total


def _transposed_rows(weight: Tensor, groups: int) -> Tensor:
    """(in, out / groups, ...) -> (out, in / groups, ...)."""
    parts = weight.chunk(groups)
    return torch.cat([part.transpose(0, 1) for part in parts])


def _by_unit(score: Tensor, index: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([score[list(at)].sum() if at else score.new_zeros(()) for at in index])


def taylor_scores(
    model: nn.Module, groups: Sequence[Group], data: Splits, split: Split, batch: int = BATCH
) -> list[Tensor]:
    """(units,) float64 of every group; the samples are shared among the processes, and the result is the same."""
    place = next(model.parameters()).device

    def losses(at: Tensor) -> list[Tensor]:
        outputs = by_task(model(data.prepare(split.inputs[at].to(place))), data.tasks)
        return [task_loss(t, outputs[t.name], split.targets[t.name][at].to(place)) / len(at) for t in data.tasks]

    return first_order(model, groups, [partial(losses, at) for at in batches(len(split), batch)])


def first_order(model: nn.Module, groups: Sequence[Group], parts: Sequence[Callable[[], list[Tensor]]]) -> list[Tensor]:
    """`taylor_scores` of any losses: each of ``parts`` gives every task's, of a batch; processes take them in turn."""
    modules = dict(model.named_modules())
    mine: list[tuple[int, list[list[list[float]]]]] = []
    for number, losses in enumerate(parts):
        if number % world() != rank():
            continue
        with torch.enable_grad():
            found, rows = losses(), []
            for i, loss in enumerate(found):
                model.zero_grad()
                loss.backward(retain_graph=i + 1 < len(found))  # type: ignore[no-untyped-call]
                rows.append([_first_order(modules, group).square().tolist() for group in groups])
        mine.append((number, rows))
    model.zero_grad()
    # In the order of the batches, whoever had them: float sums depend on it.
    gathered = sorted(gather(mine))
    totals = []
    for i in range(len(gathered[0][1])):
        sums = [torch.zeros(g.units, dtype=torch.float64) for g in groups]
        for _, rows in gathered:
            for total, row in zip(sums, rows[i], strict=True):
                total += torch.tensor(row, dtype=torch.float64)
        mean = torch.cat(sums).mean().clamp_min(1e-300)
        totals.append([s / mean for s in sums])
    return [torch.stack(list(of)).amax(0) for of in zip(*totals, strict=True)]


@torch.no_grad()
def _first_order(modules: dict[str, nn.Module], group: Group) -> Tensor:
    """(units,) float64: the sum of w dL/dw over all that makes a unit's channels."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        if member.axis != "out":
            continue
        module: Any = modules[member.layer]
        for key, parameter in module._parameters.items():
            if parameter is None or parameter.grad is None or not parameter.dim():
                continue
            product = (parameter * parameter.grad).cpu().double()
            if key == "weight" and isinstance(module, TRANSPOSED):
                product = _transposed_rows(product, module.groups)
            total += _by_unit(product.flatten(1).sum(1) if product.dim() > 1 else product, member.index)
    return total


def rankings(
    model: nn.Module, groups: Sequence[Group], data: Splits, split: Split, saliency: str
) -> dict[str, tuple[int, ...]]:
    """Of every group the units in the order in which they go: the least salient first."""
    if saliency == "taylor":
        scores = taylor_scores(model, groups, data, split)
    else:
        scores = [weight_scores(model, group, 1 if saliency == "l1" else 2) for group in groups]
    return ranked(groups, scores)


def ranked(groups: Sequence[Group], scores: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Of every group the units by rising score; of two alike the first."""
    return {g.name: tuple(torch.argsort(s, stable=True).tolist()) for g, s in zip(groups, scores, strict=True)}
