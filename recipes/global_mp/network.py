"""Global MP on a torch module: what is prunable, how much goes, masks in one shot and masks that grow in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.networks.flops import COUNTED, flops_elsewhere
from compress.networks.ties import aliases
from compress.networks.train import Moment, Remask
from compress.recipes.global_mp.floors import budget as exact_budget
from compress.recipes.global_mp.magnitude import global_masks
from compress.recipes.global_mp.options import NetworkOptions
from compress.recipes.global_mp.schedule import Shape, targets


def prunable(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, Tensor]:
    """Every weight of a convolution or a linear layer by its parameter name, first layer and classifier included.

    Norms and biases are left alone. A weight that several layers share stands once, under the first name that the model
    has for it; one that lies over another's memory, or is computed from other parameters, is none (`left_out` has
    it).

    Args:
        skip: shell patterns of names that are left out.

    Raises:
        CompressError: there is none.
        UsageError: a pattern matches nothing.
    """
    found = _candidates(model)
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise UsageError(
                f"the pattern {pattern!r} matches no prunable layer",
                where="global-mp.skip",
                fix=f"the layers are: {', '.join(list(found)[:4])} ...",
            )
    kept = {name: w for name, w in found.items() if not any(fnmatchcase(name, p) for p in skip)}
    if not kept:
        raise CompressError(
            "the model has no prunable weight: no convolution, no linear layer"
            + (" that is not skipped" if skip else ""),
            where=type(model).__name__,
            fix="build it from torch.nn.Conv1d, Conv2d, Conv3d and Linear",
        )
    return kept


def _candidates(model: nn.Module) -> dict[str, Tensor]:
    names, two_of_one = {id(p): n for n, p in model.named_parameters()}, aliases(model)
    found: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, COUNTED):
            weight = module.weight
            name = names.get(id(weight))
            # A weight of one dimension or none is a scale, not a matrix.
            if name is not None and name not in two_of_one and weight.dim() >= 2 and weight.numel():
                found[name] = weight.detach()
    return found


@dataclass(frozen=True)
class LeftOut:
    """A parameter of two or more dimensions that is not pruned: the layer that it is of, and why it is left."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def left_out(model: nn.Module, skip: Sequence[str] = ()) -> list[LeftOut]:
    """What `prunable` leaves, each parameter once: whoever reads a share is to know of what it is one."""
    candidates, two_of_one = _candidates(model), aliases(model)
    kept = {name for name in candidates if not any(fnmatchcase(name, p) for p in skip)}
    found = []
    for name, parameter in model.named_parameters():
        if name in kept or parameter.dim() < 2 or not parameter.numel():
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        if name in candidates:
            reason = "left out by the recipe"
        elif name in two_of_one:
            reason = f"its memory is also that of {', '.join(two_of_one[name])}"
        else:
            reason = "no weight of a convolution or a linear layer"
        found.append(LeftOut(name, type(module).__name__, tuple(parameter.shape), reason))
    return found


def left_facts(model: nn.Module, skip: Sequence[str], sample: Tensor | None = None) -> dict[str, Any]:
    """`left_out` for a report: its weights, their share of all, and with a ``sample`` the FLOPs that nothing else
    counts (of a parameter: None where nothing is known of its layer)."""
    rows, total = left_out(model, skip), sum(w.numel() for w in prunable(model, skip).values())
    flops = flops_elsewhere(model, sample) if sample is not None else {}
    weights = sum(row.weights for row in rows)
    return {
        "weights": weights,
        "share": weights / (weights + total),
        "flops": sum(flops.values()),
        "parameters": [{**asdict(row), "weights": row.weights, "flops": flops.get(row.name)} for row in rows],
    }


def left_line(facts: Mapping[str, Any]) -> str:
    """What a person reads of `left_facts`: how much, and of which layers."""
    layers: dict[str, int] = {}
    for row in facts["parameters"]:
        label = f"{row['name'].rpartition('.')[0] or row['name']} ({row['kind']})"
        layers[label] = layers.get(label, 0) + row["weights"]
    largest = sorted(layers, key=lambda label: -layers[label])
    more = f" and {len(largest) - 3} more layers" if len(largest) > 3 else ""
    named = ", ".join(f"{label} {layers[label]:,}" for label in largest[:3])
    return f"{facts['weights']:,} weights ({100 * facts['share']:.1f} % of all) stay dense: {named}{more}"


def budget(weights: Mapping[str, Any], sparsity: float, options: NetworkOptions) -> tuple[int, dict[str, int]]:
    """How many weights go in all, and how many every layer keeps at least; checked to be feasible.

    Raises:
        UsageError, CompressError: see `floors`; or the sparsity is less than one weight.
    """
    sizes = {name: int(w.numel()) for name, w in weights.items()}
    return exact_budget(sizes, sparsity, options.floor, options.floors)


def masks_of(model: nn.Module, prune: int, floors: Mapping[str, int], skip: Sequence[str] = ()) -> dict[str, Tensor]:
    """Masks that keep all but the ``prune`` smallest weights of the model as it is now."""
    return global_masks(prunable(model, skip), prune, floors)


def increments(final: int, epochs: int, per_epoch: int, until: float, shape: Shape) -> dict[int, int]:
    """A gradual schedule: step -> weights that are to be gone from it on, once an epoch, ``final`` at the last.

    The paper spreads the sparsity over the epochs without giving the increments: here they are cubic or linear, from
    the second epoch's start to that of the epoch ``until`` (a share of all).
    """
    times = max(1, min(epochs - 1, round(until * epochs)))
    return {(i + 1) * per_epoch: count for i, count in enumerate(targets(final, times, shape)) if count}


def gradual(steps: Mapping[int, int], floors: Mapping[str, int], skip: Sequence[str] = ()) -> Remask:
    """Masks that grow while the network is trained: ``steps`` as `increments` gives them.

    A weight that was masked is zero, so that the next threshold takes it again.
    """

    def remask(moment: Moment, model: nn.Module) -> dict[str, Tensor] | None:
        if moment.step not in steps:
            return None
        with torch.no_grad():
            return masks_of(model, steps[moment.step], floors, skip)

    return remask
