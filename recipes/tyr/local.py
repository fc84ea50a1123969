"""Layer-wise pruning by optimal brain surgeon (OBS): one nested greedy pass, every level with its exact refit.

Symbols are the paper's: X are the inputs of a projection W (in, out), H = X^T X, and the objective is
||T - X W'||^2 for a target T. With T = X W this is the paper's ||X W - X W'||^2; with other targets the
least-squares optimum W* = H^-1 X^T T takes W's place, and everything after it is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.processes.distributed import ExactSum, agree

Score = Literal["obs", "tyr"]
SHRINK = 0.85  # the matrices are shrunk when this share of their rows is still alive


class Moments:
    """Sums over calibration tokens: H = X^T X (in, in) and G = X^T T (in, out), the same for any number of processes.

    Args:
        where: the sublayer's name, for errors.
    """

    ROWS = 1024  # rows of H made at once: what is held beside the sums

    def __init__(self, n_in: int, n_out: int, where: str = "", device: torch.device | None = None) -> None:
        self.where = where
        self._H, self._G = ExactSum(n_in, n_in, device=device), ExactSum(n_in, n_out, device=device)
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, target: Tensor) -> None:
        """Adds tokens: ``x`` (..., in) and ``target`` (..., out). Products in the inputs' type, sums exact.

        Every process adds at least once: the first time they agree on the grid of the sums.

        Raises:
            CompressError: the statistics hold NaN or infinity.
        """
        x = x.reshape(-1, x.shape[-1])
        target = target.reshape(-1, target.shape[-1])
        try:
            if not self._H.has_grid:
                squares = float(x.double().pow(2).sum(0).max())
                aims = float(target.double().pow(2).sum(0).max())
                size_H, size_G = agree([squares, (squares * aims) ** 0.5])
                self._H.set_grid(size_H)
                self._G.set_grid(size_G)
            for first in range(0, x.shape[1], self.ROWS):
                rows = slice(first, first + self.ROWS)
                left = x[:, rows].T
                self._H.add(left @ x, rows)
                self._G.add(left @ target, rows)
        except OverflowError:
            raise CompressError(
                "the calibration activations hold NaN or infinity"
                if not (torch.isfinite(x).all() and torch.isfinite(target).all())
                else "the calibration activations add up to more than 2^18 times those of the first batch",
                where=self.where,
                fix="check the model's weights (`compress verify`) and the calibration text",
            ) from None

    def sums(self) -> tuple[Tensor, Tensor]:
        """(H, G) over all processes, float64. Nothing can be added any more."""
        if self._sums is None:
            self._sums = self._H.total(), self._G.total()
        return self._sums

    def taken(self) -> tuple[Tensor, Tensor]:
        """The same, for the caller to change and to let go: they are not held here any longer."""
        sums = self.sums()
        self._sums = None
        return sums


@dataclass
class Problem:
    """The damped quadratic: minimise tr((W - W*)^T H (W - W*)) over the kept rows of W.

    ``H`` (in, in) float64, damped; ``G`` = H W* (in, out) float64.
    """

    H: Tensor
    G: Tensor

    def factor(self, last: bool) -> Tensor:
        """The lower Cholesky factor of H (in, in). With ``last`` it takes H's place, and H is gone: at 70B either of
        them takes 6.6 GB."""
        # H is symmetric, and its transpose lies in memory as LAPACK wants it.
        H = self.H.mT if last else self.H
        if last:
            self.H = torch.empty(0)
        factor: Tensor = torch.linalg.cholesky(H, out=H if last else None)
        return factor

    def loss(self, keep: Tensor, refitted: Tensor) -> float:
        """Loss of the best weights ``refitted`` (len(keep), out) on the rows ``keep``, up to a constant:
        -tr(G_K^T H_KK^-1 G_K)."""
        return -float((refitted.to(self.G.device) * self.G[keep]).sum())

    def refit(self, keep: Tensor) -> Tensor:
        """The exact least-squares weights (len(keep), out) float64 when only the rows ``keep`` may stay."""
        if not len(keep):
            return self.G.new_zeros(0, self.G.shape[1])
        factor = torch.linalg.cholesky(self.H[keep][:, keep])
        return torch.cholesky_solve(self.G[keep], factor)


def damp(moments: Moments, W: Tensor, damping: float) -> Problem:
    """Adds the ridge lambda ||W' - W||^2, lambda = damping * mean(diag H): it holds the refit to the original ``W``.
    In place: the moments are spent.

    Args:
        W: the dense projection (in, out).
    """
    H, G = moments.taken()
    scale = float(H.diagonal().mean())
    ridge = damping * (scale if scale > 0 else 1.0)
    H.diagonal().add_(ridge)
    return Problem(H, G.add_(W, alpha=ridge))


def _block_losses(inverse: Tensor, w: Tensor, units: Tensor, score: Score, G: Tensor | None) -> Tensor:
    """Score of removing each unit. ``units`` (u, c) are the rows of each of u units of c channels; returns (u,)."""
    if score == "tyr":
        assert G is not None
        # The paper's eq. for one channel: |G_p W_p^T| + ||W_p||^2 / (2 [H^-1]_pp); a head's is the mean of its own.
        rows = units.reshape(-1)
        channel = (G[rows] * w[rows]).sum(1).abs() + (w[rows] ** 2).sum(1) / (2 * inverse.diagonal()[rows])
        return channel.reshape(units.shape).mean(1)
    if units.shape[1] == 1:
        rows = units[:, 0]
        return (w[rows] ** 2).sum(1) / inverse.diagonal()[rows]
    losses = []
    for unit in units:  # one by one: units of many channels are few
        rows_w = w[unit]  # (c, out)
        factor = torch.linalg.cholesky(inverse[unit][:, unit])
        losses.append((rows_w * torch.cholesky_solve(rows_w, factor)).sum())
    return torch.stack(losses)


class Eliminator:
    """Removes units one step after another, keeping the weights of what stays optimal (block OBS update).

    After every step ``weights`` are the exact least-squares weights of the rows still alive, so that each level on
    the way down is emitted for the price of a copy. The matrices are updated in place, and shrunk only now and then:
    copying them at every step would cost several times the arithmetic.

    Args:
        metric: (out, out) positive definite; errors are measured as e^T metric e. The optimum does not depend on it,
            the scores do. None is the identity.
        last: the problem's H is not needed afterwards; it makes room.
    """

    def __init__(
        self, problem: Problem, score: Score = "obs", metric: Tensor | None = None, last: bool = False
    ) -> None:
        self.score: Score = score
        self.alive = torch.arange(len(problem.G))  # on the CPU, whatever the matrices lie on
        factor = problem.factor(last)
        self._w = torch.cholesky_solve(problem.G, factor)
        self._G = problem.G if score == "tyr" else None  # this score alone asks for it
        if last:
            problem.G = problem.G.cpu()  # the losses of a few levels are all it is needed for
        self._inverse = torch.cholesky_inverse(factor, out=factor)
        self._root = None if metric is None else torch.linalg.cholesky(metric.to(self._w))
        if self._root is not None:
            # Every update is linear in the outputs: in the metric's own coordinates it is the plain problem again.
            self._w = self._w @ self._root
            self._G = None if self._G is None else self._G @ self._root
        self._at = self.alive  # where the alive rows stand in the matrices

    @property
    def weights(self) -> Tensor:
        """(len(alive), out) float64, the optimum for the rows in ``alive``."""
        w = self._w[self._at]
        return w if self._root is None else torch.linalg.solve_triangular(self._root, w, upper=False, left=False)

    def scores(self, units: Tensor) -> Tensor:
        """Score (u,) of removing each unit, on the CPU; ``units`` (u, c) holds positions in ``alive``."""
        return _block_losses(self._inverse, self._w, self._at[units], self.score, self._G).cpu()

    def remove(self, positions: Tensor) -> None:
        """Removes the rows at ``positions`` (of ``alive``) together and refits the others."""
        stay = torch.ones(len(self.alive), dtype=torch.bool)
        stay[positions] = False
        gone = self._at[positions]
        self.alive, self._at = self.alive[stay], self._at[stay]
        if len(self.alive):
            column = self._inverse[:, gone]  # (n, g)
            block = torch.linalg.cholesky(self._inverse[gone][:, gone])
            self._w.addmm_(column, torch.cholesky_solve(self._w[gone], block), alpha=-1)
            self._inverse.addmm_(column, torch.cholesky_solve(column.T, block), alpha=-1)
        if len(self._at) <= SHRINK * len(self._w):
            self._shrink()

    def _shrink(self) -> None:
        """In place: at 70B a second matrix takes 5 GB, and between the two of them a GPU's memory is left in pieces."""
        # Symmetric: whichever way it lies in memory, its rows are there one behind another.
        whole = self._inverse if self._inverse.is_contiguous() else self._inverse.mT
        size = len(self._at)
        made = whole.view(-1)[: size * size].view(size, size)
        for first in range(0, size, Moments.ROWS):
            # What is written lies in front of all that is still to be read: a row moves forwards, and gets shorter.
            rows = self._at[first : first + Moments.ROWS]
            made[first : first + len(rows)] = whole[rows][:, self._at]
        self._inverse = made
        self._w = self._w[self._at]
        self._G = None if self._G is None else self._G[self._at]
        self._at = torch.arange(len(self.alive))

    def copy(self) -> Eliminator:
        """An eliminator that goes its own way from here."""
        twin = object.__new__(Eliminator)
        twin.__dict__.update(self.__dict__)
        twin._inverse, twin._w = self._inverse.clone(), self._w.clone()
        return twin


def neuron_levels(
    problem: Problem,
    counts: Iterable[int],
    step: int,
    score: Score = "obs",
    metric: Tensor | None = None,
    last: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """One greedy pass over FFN neurons that emits every level in ``counts``, most first.

    Args:
        counts: numbers of neurons to keep (0 to n).
        step: neurons removed together between two updates (fewer where a level comes first).
        last: the problem's H is not needed afterwards; it makes room.

    Yields:
        count, kept indices (count,) int64 sorted, their exact least-squares weights (count, out) float64.
        Levels are nested: each is a subset of the one above.
    """
    n = len(problem.G)
    wanted = sorted(set(counts), reverse=True)
    if wanted and not (wanted[-1] >= 0 and wanted[0] <= n):
        raise ValueError(f"levels of {wanted[-1]} to {wanted[0]} neurons in a layer of {n}")
    eliminator = Eliminator(problem, score, metric, last)
    for count in wanted:
        while len(eliminator.alive) > count:
            alive = len(eliminator.alive)
            # A step ends on a multiple of `step`, so that levels which are multiples do not change one another.
            size = min(alive - count, (alive - 1) % step + 1)
            scores = eliminator.scores(torch.arange(alive)[:, None])
            order = torch.argsort(scores, stable=True)
            eliminator.remove(order[:size].sort().values)
        yield count, eliminator.alive, eliminator.weights


def prune_neurons(
    problem: Problem, counts: Iterable[int], step: int, score: Score = "obs", metric: Tensor | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """All of `neuron_levels` together: ``{count: (kept indices, weights)}``."""
    return {count: (kept, w) for count, kept, w in neuron_levels(problem, counts, step, score, metric)}


@dataclass(frozen=True)
class Heads:
    """A choice of query heads: ``groups`` KV groups stay, each with ``per_group`` query heads; ``heads`` are their
    original indices, sorted."""

    groups: int
    per_group: int
    heads: tuple[int, ...]


def channels(heads: Sequence[int], head_dim: int) -> Tensor:
    """The o_proj input channels (len(heads) * head_dim,) int64 of some query heads."""
    return torch.tensor([h * head_dim + c for h in heads for c in range(head_dim)], dtype=torch.int64)


def _units_of(alive: Tensor, owner: Tensor, size: int) -> tuple[list[int], Tensor]:
    """Groups the positions of ``alive`` by ``owner[channel]``; every owner has ``size`` channels left."""
    owners = owner[alive]
    names = torch.unique(owners)
    positions = torch.stack([torch.nonzero(owners == o)[:, 0] for o in names]) if len(names) else alive.new_zeros(0, 1)
    return names.tolist(), positions.reshape(len(names), size) if len(names) else positions


def head_states(kv_heads: int, group: int, trim: bool) -> Iterator[tuple[int, int]]:
    """Every (KV groups, query heads per group) that can be kept, as elimination comes to them: the dense one first,
    nothing last; with ``trim`` each number of groups with fewer and fewer of their query heads."""
    for groups in range(kv_heads, 0, -1):
        for per_group in range(group, 0, -1) if trim else (group,):
            yield groups, per_group
    yield 0, 0


def prune_heads(
    problem: Problem,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    trim: bool,
    score: Score = "obs",
    metric: Tensor | None = None,
) -> list[Heads]:
    """All nested choices of whole KV groups and, with ``trim``, of equally many query heads in each kept group.

    KV groups are removed greedily, one at a time, down to none; from each of these states query heads are removed
    greedily, one from every kept group a round. Ordered by the number of query heads kept, most first.
    """
    group = heads // kv_heads
    head_of = torch.arange(heads * head_dim) // head_dim
    group_of = head_of // group
    found = []
    by_group = by_head = Eliminator(problem, score, metric)
    for kept, per_group in head_states(kv_heads, group, trim):
        if per_group in (group, 0):
            if kept < kv_heads:
                _, units = _units_of(by_group.alive, group_of, group * head_dim)
                by_group.remove(units[int(by_group.scores(units).argmin())])
            by_head = by_group.copy()
        else:
            for g in torch.unique(group_of[by_head.alive]).tolist():
                names, units = _units_of(by_head.alive, head_of, head_dim)
                mine = torch.tensor([i for i, h in enumerate(names) if h // group == g])
                scores = by_head.scores(units)[mine]
                by_head.remove(units[int(mine[int(scores.argmin())])])
        found.append(Heads(kept, per_group, tuple(torch.unique(head_of[by_head.alive]).tolist())))
    return sorted(found, key=lambda h: (-len(h.heads), -h.groups))
