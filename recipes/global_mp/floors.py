"""How many weights go in all, and how few a layer may keep.

The paper's minimum threshold keeps the ``min(sigma, m_l)`` largest weights of every layer l (m_l: its size); what a
floor gives back is taken from the other layers, so that the total is met exactly. Protecting those weights and cutting
the unprotected rest at one threshold is the same as pouring water into vessels: at a threshold t, layer l loses

    loss_l(t) = min(number of its weights below t, cap_l),    cap_l = m_l - floor_l,

because its floor_l largest weights are the last that t reaches. The sum over layers never falls as t rises, so the
threshold at which it meets the target is found by counting alone, without a loop that rescales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction

from compress.errors import CompressError, UsageError


def target_count(sparsity: float, total: int) -> int:
    """The integer number of weights to prune: ``sparsity * total`` to the nearest, a half upwards.

    The sparsity is taken as the decimal it is written as, so that 0.7 of 10 is 7.

    Raises:
        UsageError: the sparsity is negative, 1 or more, or NaN; or it would leave no weight at all.
    """
    if not 0 <= sparsity < 1:
        raise UsageError(
            f"a sparsity of {sparsity:g} cannot be reached",
            where="sparsity",
            fix="give the share of weights to prune as a number from 0 up to, but not including, 1",
        )
    wanted = _share_of(sparsity, total, round_up=False)
    if wanted == total > 0:
        raise UsageError(
            f"a sparsity of {sparsity:g} leaves none of {total:,} weights", where="sparsity", fix="give a smaller one"
        )
    return wanted


def layer_floors(
    sizes: Mapping[str, int], sigma: int | float = 0, by_name: Mapping[str, int | float] | None = None
) -> dict[str, int]:
    """The number of weights that every layer keeps at least.

    Args:
        sizes: prunable weights of each layer.
        sigma: the same for all layers: an int is a count of weights, a float a share of all prunable weights together,
            rounded up (the paper's MT is this, in per cent). A smaller layer is kept whole.
        by_name: shell pattern -> the floor of the layers it matches, in place of sigma: an int is a count, a float a
            share of that layer, rounded up. The last pattern that matches a layer decides.

    Raises:
        UsageError: a floor is out of range, a pattern matches no layer, or a pattern's count is larger than a layer
            that it names.
    """
    if sigma < 0 or (isinstance(sigma, float) and not sigma < 1):
        raise UsageError(
            f"a floor of {sigma:g} is out of range",
            where="floor",
            fix="give a count of weights (an integer), or a share of the model from 0.0 and below 1.0",
        )
    sigma = sigma if isinstance(sigma, int) else _share_of(sigma, sum(sizes.values()), round_up=True)
    floors = {name: min(sigma, size) for name, size in sizes.items()}
    for pattern, wanted in (by_name or {}).items():
        matched = [name for name in sizes if fnmatchcase(name, pattern)]
        where = f"floor of {pattern!r}"
        if not matched:
            raise UsageError(
                "the pattern matches no prunable layer", where=where, fix=f"the layers are: {_some(list(sizes))}"
            )
        if wanted < 0 or (isinstance(wanted, float) and not wanted <= 1):
            raise UsageError(
                f"a floor of {wanted:g} is out of range",
                where=where,
                fix="give a count of weights (an integer), or a share of the layer from 0.0 to 1.0",
            )
        for name in matched:
            own = wanted if isinstance(wanted, int) else _share_of(wanted, sizes[name], round_up=True)
            if own > sizes[name]:
                raise UsageError(
                    f"a floor of {own:,} weights is larger than the layer {name} ({sizes[name]:,})",
                    where=where,
                    fix="give at most the layer's size, or 1.0 to keep the layer whole",
                )
            floors[name] = own
    return floors


def check_feasible(sizes: Mapping[str, int], floors: Mapping[str, int], prune: int) -> None:
    """Raises CompressError where the floors leave fewer than ``prune`` weights to be pruned.

    It names the layers whose floors hold the most, and the largest feasible sparsity.
    """
    total, held = sum(sizes.values()), {name: min(floors.get(name, 0), size) for name, size in sizes.items()}
    free = total - sum(held.values())
    if prune <= free:
        return
    largest = sorted((name for name in held if held[name]), key=lambda name: (-held[name], name))
    listed = [f"{name} ({held[name]:,} of {sizes[name]:,})" for name in largest]
    raise CompressError(
        f"the floors of {len(largest)} layers hold {total - free:,} of {total:,} weights; {prune:,} cannot be pruned",
        where=_some(listed),
        fix=f"lower the floors, or ask for a sparsity of at most {_rounded_down(free, total)} ({free:,} weights)",
    )


def allot(below: Sequence[int], upto: Sequence[int], caps: Sequence[int], target: int) -> list[int]:
    """How many weights each layer loses once the threshold t is known, so that the sum is ``target`` exactly.

    Every layer loses what lies below t, up to its cap. What is missing then comes from the weights equal to t: the
    layers are asked in the order given, each for as many as it has and its cap allows.

    Args:
        below: weights of each layer smaller than t.
        upto: weights of each layer not larger than t.
        caps: the most that each layer may lose.

    Raises:
        ValueError: t is not the threshold of this target.
    """
    least = [min(b, c) for b, c in zip(below, caps, strict=True)]
    most = [min(u, c) for u, c in zip(upto, caps, strict=True)]
    left = target - sum(least)
    if not 0 <= left <= sum(most) - sum(least):
        raise ValueError(f"{target} is not between {sum(least)} and {sum(most)}")
    losses = []
    for low, high in zip(least, most, strict=True):
        extra = min(left, high - low)
        losses.append(low + extra)
        left -= extra
    return losses


def _share_of(share: float, total: int, round_up: bool) -> int:
    exact = Fraction(str(share)) * total
    return math.ceil(exact) if round_up else math.floor(exact + Fraction(1, 2))


def _rounded_down(part: int, total: int) -> str:
    """A decimal of which `target_count` makes no more than ``part``."""
    millionths = 10**6 * part // total
    return f"{millionths / 10**6:.6f}".rstrip("0").rstrip(".")


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def budget(
    sizes: Mapping[str, int], sparsity: float, floor: float | int, floors: Mapping[str, float | int]
) -> tuple[int, dict[str, int]]:
    """How many weights go in all, and how many every layer keeps at least; checked to be feasible.

    Args:
        sizes: weights of every layer.
        floor, floors: as in `layer_floors`.

    Raises:
        UsageError: the sparsity is less than one weight.
        CompressError: it cannot be met.
    """
    prune, kept = target_count(sparsity, sum(sizes.values())), layer_floors(sizes, floor, floors)
    if not prune:
        raise UsageError(
            f"a sparsity of {sparsity:g} is less than one of {sum(sizes.values()):,} weights",
            where="sparsity",
            fix="give a larger one",
        )
    check_feasible(sizes, kept, prune)
    return prune, kept
