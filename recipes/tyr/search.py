"""Finds one level per sublayer: exact knapsack over measured single KLs, then evolution on the joint KL.

A *genome* holds one level index per sublayer, attention and FFN alternating: (a_0, f_0, a_1, f_1, ...). Every
candidate removes exactly the same number of parameters. Work is counted in token-layers: tokens times blocks run.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from compress.language.activations import Room
from compress.language.budget import Option, knapsack
from compress.models.blocks import BlockRunner
from compress.models.streaming import is_in_step, is_streamed
from compress.processes.distributed import device_bytes, gather, main_says, rank, share, stack, world
from compress.recipes.tyr import SearchOptions
from compress.recipes.tyr.choice import left_alone
from compress.recipes.tyr.supernet import Supernet, runner_tokens

Genome = tuple[int, ...]


def activation_bytes(streamed: bool) -> int:
    """Activations of the candidates that one process runs together: few where blocks are at hand, so that each is noted
    soon; many where a block must be read."""
    return 2**31 if streamed else 2**25


def together(streamed: bool, tokens: float, hidden: int) -> int:
    """How many candidates a process runs together on so many tokens."""
    return max(1, int(activation_bytes(streamed) // (4 * tokens * hidden)))


def group_windows(most: int, windows: int, length: int) -> int:
    """How many of ``windows`` run together in an evaluation, where a forward takes at most ``most`` tokens."""
    return max(1, min(most, windows * length // 4) // length)


def portion_windows(portion: float, windows: int) -> int:
    """How many windows a step of the selection looks at."""
    return max(1, round(portion * windows))


def compared(settings: SearchOptions, length: int, skip: int = 0) -> int:
    """Positions of a window whose logits are compared."""
    return min(settings.positions, length - 1 - skip)


def held_tokens(tokens: int, layers: int) -> int:
    """Tokens of all the streams that an evaluator holds: the parent's in front of every block and behind the last, and
    the one that is being made."""
    return tokens * (layers + 2)


class Log(Protocol):
    """Where evaluations are noted: an append-only journal that survives a kill."""

    def append(self, row: dict[str, Any]) -> None: ...

    def rows(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Teacher:
    """The dense model's next-token distribution at some positions of each window, as its ``k`` likeliest tokens.

    ``positions`` (windows, p) int64; ``index`` (windows, p, k) int64; ``logp`` (windows, p, k) float32; ``rest``
    (windows, p): log of the mass outside the k. With the rest as one more outcome the KL is a true lower bound of
    the full one, and not negative but for rounding.
    """

    positions: Tensor
    index: Tensor
    logp: Tensor
    rest: Tensor

    def rows(self, at: Sequence[int]) -> Teacher:
        i = torch.tensor(at)
        return Teacher(self.positions[i], self.index[i], self.logp[i], self.rest[i])

    def kl(self, logits: Tensor) -> Tensor:
        """KL(dense || candidate) in nats, (windows, p), for candidate ``logits`` (windows, p, vocab)."""
        logp = logits.gather(-1, self.index) - logits.logsumexp(-1, keepdim=True)
        rest = _log_rest(logp)
        inside = (self.logp.exp() * (self.logp - logp)).sum(-1)
        return inside + self.rest.exp() * (self.rest - rest)


def _log_rest(logp: Tensor) -> Tensor:
    mass = logp.double().exp().sum(-1)
    return (1.0 - mass).clamp_min(1e-9).log().float()


class Evaluator:
    """Measures the KL of candidates, running only the blocks behind the first one that differs from the parent.

    Candidates go through a block together, so that a block that must be read is read once for all of them, and are
    divided among the processes; each is measured whole by one of them, so that the figures do not depend on how many
    there are.

    Args:
        runner: the dense model cut in blocks.
        supernet: the levels.
        windows: token ids (n, length) int64.
        positions: positions per window at which logits are compared, drawn with ``seed``.
        skip: of a window's first positions, those that are not compared.
        top_k: dense outcomes kept per position.
        log: evaluations are looked up there before they are made, and noted there after.
        tag: goes into the log with every row, so that one log serves several iterations.
        room: where the parent's streams lie; memory by default.
    """

    def __init__(
        self,
        runner: BlockRunner,
        supernet: Supernet,
        windows: Tensor,
        *,
        positions: int,
        top_k: int,
        seed: int,
        log: Log,
        tag: str,
        room: Room | None = None,
        skip: int = 0,
    ) -> None:
        self.runner, self.supernet, self.windows, self.log, self.tag = runner, supernet, windows, log, tag
        self._room = Room(None) if room is None else room
        self.work = 0
        self.seconds = 0.0  # spent on evaluations, those of the runs that this one goes on from included
        self.layers = len(runner.blocks)
        self.dense: Genome = tuple(0 for _ in range(2 * self.layers))
        # A window runs with the same others whatever process runs it.
        size = group_windows(runner_tokens(runner), *windows.shape)
        self._groups = [range(i, min(i + size, len(windows))) for i in range(0, len(windows), size)]
        self._known = {(r["tag"], tuple(r["genome"]), tuple(r["rows"])): r for r in log.rows() if r.get("kind") == "kl"}
        generator = torch.Generator().manual_seed(seed)
        length = windows.shape[1]
        draw = [
            skip + torch.randperm(length - 1 - skip, generator=generator)[:positions].sort().values
            for _ in range(len(windows))
        ]
        self._parent: Genome = self.dense
        # On a GPU making a block takes longer than running it: so many are kept as fit in a quarter of what is free,
        # where blocks are held at all.
        self._made: OrderedDict[tuple[int, int, int], torch.nn.Module] = OrderedDict()
        self._most_made = 0
        if runner.device.type != "cpu" and not is_streamed(runner.model):
            largest = max(sum(p.numel() for p in block.parameters()) for block in runner.blocks)
            self._most_made = device_bytes() // 4 // (4 * largest)
        self._states: list[Tensor] = []  # _states[i]: the parent's stream in front of block i, (n, length, hidden)
        self._advance(self.dense)
        self.teacher = self._teach(torch.stack(draw), top_k)

    def _teach(self, positions: Tensor, top_k: int) -> Teacher:
        index, logp, rest = [], [], []
        for i in range(len(self.windows)):
            z = self.runner.logits(self._states[-1][i][positions[i]]).log_softmax(-1)
            top = z.topk(min(top_k, z.shape[-1] - 1), dim=-1)
            index.append(top.indices)
            logp.append(top.values)
            rest.append(_log_rest(top.values))
        return Teacher(positions, torch.stack(index), torch.stack(logp), torch.stack(rest))

    def _block(self, index: int, a: int, f: int) -> torch.nn.Module:
        """The really sliced block ``index`` at levels (a, f)."""
        if a == 0 and f == 0:
            dense: torch.nn.Module = self.runner.blocks[index]
            return dense
        if not self._most_made:
            return self._make(index, a, f)
        key = (index, a, f)
        if key not in self._made:
            while len(self._made) >= self._most_made:
                self._made.popitem(last=False)
            self._made[key] = self._make(index, a, f)
        self._made.move_to_end(key)
        return self._made[key]

    def _make(self, index: int, a: int, f: int) -> torch.nn.Module:
        block: torch.nn.Module = self.runner.blocks[index]
        attention, ffn = self.supernet.level(index, "attention", a), self.supernet.level(index, "ffn", f)
        return self.runner.family.sliced(
            block,
            heads=None if a == 0 else torch.tensor(attention.units, dtype=torch.int64),
            neurons=None if f == 0 else torch.tensor(ffn.units, dtype=torch.int64),
            o_weight=attention.weight,
            down_weight=ffn.weight,
        )

    def _grouped(self, rows: Sequence[int]) -> list[list[int]]:
        """Places in ``rows`` (sorted window numbers) that run together."""
        of = {window: g for g, group in enumerate(self._groups) for window in group}
        parts: dict[int, list[int]] = {}
        for place, window in enumerate(rows):
            parts.setdefault(of[window], []).append(place)
        return list(parts.values())

    def _first_change(self, genome: Genome) -> int:
        """The first block in which ``genome`` differs from the parent."""
        pairs = zip(genome[::2], genome[1::2], self._parent[::2], self._parent[1::2], strict=True)
        return next((i for i, (a, f, pa, pf) in enumerate(pairs) if (a, f) != (pa, pf)), self.layers)

    def _advance(self, genome: Genome) -> None:
        """Makes ``genome`` the parent whose streams are reused; the processes divide the windows."""
        if not self._states:
            every = slice(0, len(self.windows))
            self._states = [self._room.hold(self.runner.embed(self.windows[every]).to(self._room.place))]
            same = 0
        else:
            same = self._first_change(genome)
        del self._states[same + 1 :]
        counts = [sum(len(self._groups[g]) for g in share(len(self._groups), r)) for r in range(world())]
        mine = [self._groups[g] for g in share(len(self._groups))]
        first = mine[0].start if mine else 0
        hidden = self._states[same][first : first + sum(map(len, mine))].clone()
        for index in range(same, self.layers):
            block = self._block(index, genome[2 * index], genome[2 * index + 1])
            for group in mine:
                part = slice(group.start - first, group.stop - first)
                hidden[part] = self.runner.run(index, hidden[part], block).to(self._room.place)
            self._states.append(self._room.hold(stack(hidden, counts) if world() > 1 else hidden.clone()))
            self.work += self.windows.numel()
        self._parent = genome

    def set_parent(self, genome: Genome) -> None:
        if genome != self._parent:
            self._advance(genome)

    def kl(self, genome: Genome, rows: Sequence[int] | None = None, **note: Any) -> float:
        """Mean KL in nats of ``genome`` on the windows ``rows`` (all by default)."""
        return self.kls([genome], rows, [note])[0]

    def kls(
        self,
        genomes: Sequence[Genome],
        rows: Sequence[int] | None = None,
        notes: Sequence[Mapping[str, Any]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Mean KL in nats of every genome on the windows ``rows`` (all by default).

        Args:
            notes: what is written beside each genome in the log.
            progress: told how many are done.
        """
        at = tuple(range(len(self.windows))) if rows is None else tuple(sorted(rows))
        notes = [{}] * len(genomes) if notes is None else notes
        todo: dict[Genome, Mapping[str, Any]] = {}
        for genome, note in zip(genomes, notes, strict=True):
            known = self._known.get((self.tag, genome, at))
            if known is None:
                todo.setdefault(genome, note)
            else:
                self.work = max(self.work, known["work"])
                self.seconds = max(self.seconds, known["seconds"])
        tokens = len(at) * self.windows.shape[1]
        several = together(is_streamed(self.runner.model), tokens, self._states[0].shape[-1]) * world()
        left = list(todo)
        for begin in range(0, len(left), several):
            chunk = left[begin : begin + several]
            began = time.monotonic()
            # In turn, not in runs: neighbours in the list cost alike.
            mine = chunk[rank() :: world()]
            first = min(map(self._first_change, chunk))
            kls = self._measure(mine, at, first)
            found = gather(list(zip(range(rank(), len(chunk), world()), kls, strict=True)))
            spent = main_says(lambda began=began: time.monotonic() - began)  # type: ignore[misc]
            for place, kl in sorted(found):
                genome = chunk[place]
                self.work += (self.layers - self._first_change(genome)) * tokens
                self.seconds += spent / len(chunk)
                row = {
                    "kind": "kl",
                    "tag": self.tag,
                    "genome": list(genome),
                    "rows": list(at),
                    "kl": kl,
                    "work": self.work,
                    "seconds": round(self.seconds, 3),
                    **todo[genome],
                }
                self.log.append(row)
                self._known[(self.tag, genome, at)] = row
            if progress:
                progress(len(genomes) - len(left) + begin + len(chunk))
        return [float(self._known[(self.tag, genome, at)]["kl"]) for genome in genomes]

    def _measure(self, genomes: Sequence[Genome], at: tuple[int, ...], first: int) -> list[float]:
        """The KL of every genome, block by block: each block is fetched once for all genomes.

        Args:
            first: the first block that any process needs.
        """
        firsts = [self._first_change(g) for g in genomes]
        parts = self._grouped(at)
        hidden: list[Tensor] = [torch.empty(0)] * len(genomes)
        together = is_in_step(self.runner.model)
        for index in range(first if together else min(firsts, default=self.layers), self.layers):
            if together:
                self.runner.blocks[index]  # all put it together, whoever needs it
            alike: dict[tuple[int, int], list[int]] = {}
            for k, genome in enumerate(genomes):
                if index < firsts[k]:
                    continue
                if index == firsts[k]:
                    hidden[k] = self._states[index][list(at)]
                alike.setdefault((genome[2 * index], genome[2 * index + 1]), []).append(k)
            for (a, f), those in alike.items():
                block = self._block(index, a, f)  # one variant at a time: a large model's are gigabytes each
                for k in those:
                    for part in parts:
                        hidden[k][part] = self.runner.run(index, hidden[k][part], block).to(self._room.place)
                del block
        return [
            self._kl_of(hidden[k] if firsts[k] < self.layers else self._states[-1][list(at)], at)
            for k in range(len(genomes))
        ]

    def _kl_of(self, hidden: Tensor, at: tuple[int, ...]) -> float:
        teacher = self.teacher.rows(at)
        total = 0.0
        for i in range(len(at)):
            z = self.runner.logits(hidden[i][teacher.positions[i]][None])
            total += float(teacher.rows([i]).kl(z).double().mean())
        return total / len(at)


def menus(supernet: Supernet) -> list[list[Option]]:
    """Every sublayer's options (saving, loss not yet measured), in genome order."""
    return [
        [Option(fact["saving"], 0.0) for fact in facts[kind]]
        for facts in supernet.facts
        for kind in ("attention", "ffn")
    ]


def measure_singles(
    evaluator: Evaluator, base: Genome, progress: Callable[[int], None] | None = None
) -> list[list[Option]]:
    """Measures what every level does alone to ``base`` (the dense model, or a solution to improve on).

    The losses are KL(base with that one level changed) - KL(base): what the knapsack adds up. Only the blocks behind
    the change are run. Away from the base's own level a loss never falls with the parameters removed, nor rises with
    those kept (running bounds): KL on finitely many tokens may dip, and the knapsack would chase the dip.
    """
    evaluator.set_parent(base)
    zero = evaluator.kl(base, phase="single")
    options = menus(evaluator.supernet)
    # From the last block to the first: the cheap ones first.
    changed = {
        (sublayer, e): (*base[:sublayer], e, *base[sublayer + 1 :])
        for sublayer in range(len(options) - 1, -1, -1)
        for e in range(len(options[sublayer]))
        if e != base[sublayer]
    }
    notes = [{"phase": "single"}] * len(changed)
    found = dict(zip(changed, evaluator.kls(list(changed.values()), notes=notes, progress=progress), strict=True))
    for sublayer, menu in enumerate(options):
        own = base[sublayer]
        losses = [0.0 if e == own else found[sublayer, e] - zero for e in range(len(menu))]
        for e in range(own - 1, -1, -1):
            losses[e] = min(losses[e], losses[e + 1])
        for e in range(own + 1, len(menu)):
            losses[e] = max(losses[e], losses[e - 1])
        options[sublayer] = [replace(option, loss=loss) for option, loss in zip(menu, losses, strict=True)]
    return options


STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the penalty on deep cuts
RULES = ("uniform", "edges left alone")


def most_starts(first: bool) -> int:
    """How many genomes `starts` gives at most: in the first iteration, and in later ones, which have a base."""
    return 1 + len(STRENGTHS) + (len(RULES) if first else 1)


def starts(options: Sequence[Sequence[Option]], total: int, base: Genome | None) -> dict[str, Genome]:
    """Genomes worth starting from, all of which remove exactly ``total``; every one is an exact knapsack solution.

    Single losses add up well for light cuts and badly for deep ones, where one loss makes the next one worse. So
    beside the plain knapsack stand solutions under losses with a penalty on deep cuts (or, with a ``base``, on
    leaving it), in several strengths, and, without a base, two rules that know nothing: every FFN alike, and the same
    with the first four and last two blocks left alone.
    """
    found = {"knapsack": tuple(knapsack(options, total))}
    if base is not None and sum(options[i][g].saving for i, g in enumerate(base)) == total:
        found["incumbent"] = base
    found |= {label: tuple(knapsack(bent, total)) for label, bent in penalised(options, found["knapsack"], base)}
    if base is None:
        full = [max(o.saving for o in menu) or 1 for menu in options]
        layers = len(options) // 2
        front, back = left_alone(layers)
        edges = {*range(front), *range(layers - back, layers)}
        for label, spared in zip(RULES, (set(), edges), strict=True):
            # Equal quadratic losses make equal cuts; attention is touched only where the FFNs cannot give enough.
            rule = [
                [
                    replace(
                        o,
                        loss=(o.saving / size) ** 2
                        + (1e3 if o.saving and (i % 2 == 0) else 0.0)
                        + (1e6 if o.saving and i // 2 in spared else 0.0),
                    )
                    for o in menu
                ]
                for i, (menu, size) in enumerate(zip(options, full, strict=True))
            ]
            found[label] = tuple(knapsack(rule, total))
    return found


def penalised(
    options: Sequence[Sequence[Option]], plain: Genome, base: Genome | None
) -> Iterator[tuple[str, list[list[Option]]]]:
    """(name, options) under losses with a penalty on deep cuts or, with a ``base``, on leaving it.

    Args:
        plain: the solution without one. What it costs, spread over the depth it goes to, is one unit of penalty.
    """
    full = [max(o.saving for o in menu) or 1 for menu in options]
    if base is not None:
        depth = [
            [((o.saving - menu[at].saving) / size) ** 2 for o in menu]
            for menu, at, size in zip(options, base, full, strict=True)
        ]
    else:
        depth = [[(o.saving / size) ** 2 for o in menu] for menu, size in zip(options, full, strict=True)]
    deep = sum(depth[i][g] for i, g in enumerate(plain))
    cost = abs(sum(options[i][g].loss for i, g in enumerate(plain)))
    for strength in STRENGTHS:
        unit = strength * cost / deep if deep else 0.0
        yield (
            f"penalty {strength:g}",
            [
                [replace(o, loss=o.loss + unit * d) for o, d in zip(menu, far, strict=True)]
                for menu, far in zip(options, depth, strict=True)
            ],
        )


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    genome: Genome
    kl: float
    kl_start: float
    generations: int
    stopped: Literal["generations", "patience", "time limit"]


Breed = Callable[[Genome, int, np.random.Generator, set[Genome]], list[Genome]]


def evolve(
    evaluator: Evaluator,
    breed: Breed,
    start: Genome,
    settings: SearchOptions,
    *,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> Found:
    """Elitist (1 + lambda) evolution with multi-step selection, started from ``start``.

    Each generation's early steps look at other windows than the one before it; the last step looks at all of them, and
    there the parent takes part.

    Args:
        breed: makes so many offspring of a genome, none that was seen; `swaps_and_knapsacks` for ragged solutions.
    """
    n = len(evaluator.windows)
    began = evaluator.seconds
    evaluator.set_parent(start)
    parent, parent_kl = start, evaluator.kl(start, phase="parent")
    first_kl = parent_kl
    seen = {start}
    idle = 0
    generation = 0
    stopped: Literal["generations", "patience", "time limit"] = "generations"
    for generation in range(1, settings.generations + 1):
        rng = np.random.default_rng([seed, generation])

        def notes(phase: str, of: list[Genome], generation: int = generation) -> list[dict[str, Any]]:
            return [{"phase": phase, "generation": generation}] * len(of)

        children = breed(parent, settings.offspring, rng, seen)
        windows = rng.permutation(n).tolist()
        for portion, survivors in zip(settings.steps[:-1], settings.survivors, strict=True):
            rows = sorted(windows[: portion_windows(portion, n)])
            rated = list(zip(evaluator.kls(children, rows, notes("select", children)), children, strict=True))
            children = [child for _, child in sorted(rated)[:survivors]]
            windows = windows[len(rows) :] + windows[: len(rows)]
        finals = list(zip(evaluator.kls(children, notes=notes("final", children)), children, strict=True))
        best = min(finals, default=(parent_kl, parent))
        if best[0] < parent_kl:
            parent_kl, parent = best
            evaluator.set_parent(parent)
            idle = 0
        else:
            idle += 1
        if progress:
            progress(generation, parent_kl)
        if idle >= settings.patience:
            stopped = "patience"
            break
        if settings.seconds is not None and evaluator.seconds - began > settings.seconds:
            stopped = "time limit"
            break
    return Found(parent, parent_kl, first_kl, generation, stopped)


def swaps_and_knapsacks(options: Sequence[Sequence[Option]], start: Genome) -> Breed:
    """Offspring that remove exactly what ``start`` does: in turn the paper's level swaps (min(U{1..4}, U{1..4}) of
    them) and knapsack solutions under losses disturbed by log-normal noise."""
    total = sum(options[i][g].saving for i, g in enumerate(start))
    return lambda parent, count, rng, seen: offspring(options, parent, total, count, rng, seen)


def offspring(
    options: Sequence[Sequence[Option]],
    parent: Genome,
    total: int,
    count: int,
    rng: np.random.Generator,
    seen: set[Genome],
) -> list[Genome]:
    """``count`` new genomes (fewer where no more are found) that remove exactly ``total`` parameters."""

    def kept(child: Sequence[int]) -> bool:
        return sum(options[i][g].saving for i, g in enumerate(child)) == total

    return offspring_of(options, parent, lambda noisy: knapsack(noisy, total), kept, count, rng, seen)


def offspring_of(
    options: Sequence[Sequence[Option]],
    parent: Genome,
    best: Callable[[list[list[Option]]], list[int]],
    kept: Callable[[Sequence[int]], bool],
    count: int,
    rng: np.random.Generator,
    seen: set[Genome],
    attempts: int = 50,
) -> list[Genome]:
    """``count`` new genomes (fewer where no more are found in so many ``attempts`` each): level swaps of the ``parent``
    where what must be ``kept`` is, in turn with the ``best`` solutions under noisy losses."""
    found: list[Genome] = []
    for attempt in range(attempts * count):
        if len(found) == count:
            break
        if attempt % 2:
            child = _swap(options, parent, kept, rng)
        else:
            sigma = (0.1, 0.2, 0.4)[attempt // 2 % 3]
            noisy = [
                [replace(o, loss=o.loss * float(np.exp(sigma * rng.standard_normal()))) for o in menu]
                for menu in options
            ]
            child = tuple(best(noisy))
        if child not in seen:
            seen.add(child)
            found.append(child)
    return found


def _swap(
    options: Sequence[Sequence[Option]],
    parent: Genome,
    kept: Callable[[Sequence[int]], bool],
    rng: np.random.Generator,
) -> Genome:
    """Moves sublayers one level up and others of the same type one down; undone where what must be kept is not."""
    child = list(parent)
    for _ in range(min(int(rng.integers(1, 5)), int(rng.integers(1, 5)))):
        kind = int(rng.integers(2))
        places = np.arange(kind, len(child), 2)
        a, b = (int(i) for i in rng.choice(places, 2, replace=False)) if len(places) > 1 else (kind, kind)
        if child[a] > 0 and child[b] < len(options[b]) - 1:
            child[a] -= 1
            child[b] += 1
            if not kept(child):
                child[a] += 1
                child[b] -= 1
    return tuple(child)
