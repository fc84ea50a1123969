"""Budgets of times: the table that prices every shape, and the whole model that is timed before its weights are made.

A time depends on shapes alone, so the search's solution is timed as a model of random weights. Where it misses a budget
by more than its interval, or leaves over a twentieth of what it may take, the table is put right by what was measured
and the search is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compress import __version__
from compress.language.latency import Levels, errors_of, key_of, timed_limits
from compress.language.limits import TIMES
from compress.language.tables import keep
from compress.processes.distributed import main_says
from compress.recipes.tyr.choice import Choice, Curves, Job, check_limits, counts_of, head_levels, settle, smallest
from compress.recipes.tyr.supernet import neuron_counts
from compress.run.folder import Run
from compress.run.progress import say

STATES, WIDTHS = 5, 5  # shapes of attention and of the FFN that are timed at most; between them lies a line
TRIES = 3  # searches at most
MARGINS = 0.01, 0.03  # below a budget that a further search aims at: half the interval, but from and up to so much
SLACK = 0.05  # of the time that a budget allows may be left


def levels_of(job: Job) -> Levels:
    """The shapes to time: those of the first iteration's menus, evenly thinned; the dense one and what is gone are
    among them."""
    g, options = job.geometry.blocks[0], job.options
    heads = {h for i in range(job.geometry.layers) for h in head_levels(job, i)} | {(0, 0), (g.kv_heads, g.group)}
    costs = job.costs.blocks[0]
    states = sorted(heads, key=lambda h: (-costs.attention(*h), -h[0]))
    step = max(options.round_to, round(options.interval * g.ffn / options.round_to) * options.round_to)
    counts = sorted({*neuron_counts(g.ffn, g.ffn // 2, step, options.levels, options.round_to), g.ffn, 0}, reverse=True)
    return Levels(tuple(_spread(states, STATES)), tuple(_spread(counts, WIDTHS)))


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spread, both ends among them."""
    at = dict.fromkeys(round(float(i)) for i in np.linspace(0, len(rows) - 1, min(most, len(rows))))
    return [rows[i] for i in at]


def priced(run: Run, job: Job) -> Job:
    """The job with the limits of its times, from a table that is measured once.

    Raises:
        CompressError: a budget is below its floor.
    """
    assert job.clock is not None  # asked by the caller
    dense = job.clock.dense()
    levels = levels_of(job)
    inputs = {"version": __version__, **job.clock.facts(), "levels": [levels.heads, levels.neurons]}
    clock = job.clock
    folder = run.stage("latency-table", inputs, lambda f: clock.table(f, levels, dense))
    table = json.loads((folder / "table.json").read_text("utf-8"))
    main_says(lambda: keep(clock, table))
    made = timed_limits(clock.setup, clock.budgets, table, run.seal_hash(folder))
    for found in made:
        off = errors_of(table, key_of(found.budget))
        say(
            f"latency table, {key_of(found.budget)}: off by {100 * off['median']:.1f} % (median) and"
            f" {100 * off['worst']:.1f} % at most on {off['models']} models that it has not seen"
        )
    job = replace(job, limits=(*job.limits, *made))
    check_limits(job)
    return job


@dataclass(frozen=True)
class Held:
    """What was timed of the solution of search ``number``: of every figure the share of the dense model's time that was
    predicted, and the one that was measured with its interval."""

    number: int
    choices: list[Choice]
    shares: dict[str, dict[str, Any]]

    def over(self, job: Job) -> float:
        """The most by which a figure's lower bound is over its budget, as a share of it; 0 or less: none is over."""
        assert job.clock is not None
        return max(float(self.shares[key_of(b)]["low"]) / b.limit - 1 for b in job.clock.budgets)

    def under(self, job: Job) -> bool:
        """Whether all times leave over `SLACK` of what they may take, by more than their intervals."""
        assert job.clock is not None
        return all(self.shares[key_of(b)]["high"] < (1 - SLACK) * b.limit for b in job.clock.budgets)


def hold(
    run: Run,
    job: Job,
    result: dict[str, Any],
    curves: Curves,
    again: Callable[[Job, int], dict[str, Any]],
) -> tuple[Job, Held, dict[str, Any]]:
    """Times the solution as a whole model, and searches again with a table put right where that is called for.

    Args:
        result: the search's.
        curves: of its single losses.
        again: the result of one more search, by its number from 2, under the limits of the job it is given.

    Returns:
        The job with the limits, the settled choices and the result of the search that keeps the budgets with the most
        time taken, or comes nearest to them.
    """
    tried: list[Tried] = []
    for number in range(1, TRIES + 1):
        found = _timed(run, job, number, settle(job, [Choice(**c) for c in result["choices"]], curves))
        tried.append((job, found, result))
        over = found.over(job)
        if (over <= 0 and not found.under(job)) or number == TRIES:
            break
        say(f"search {number}: {_said(job, found)}; the table is put right by that, and the search goes on")
        other = _corrected(job, [t[1] for t in tried])
        if other is None:
            break
        job, result = other, again(other, number + 1)
    best = _best(tried)
    if best[1].over(best[0]) > 0:
        say(f"the budgets of times are not kept by {len(tried)} searches; the nearest: {_said(best[0], best[1])}")
    return best


Tried = tuple[Job, Held, dict[str, Any]]


def _best(tried: Sequence[Tried]) -> Tried:
    """What keeps the budgets and takes most of the time they allow; where none does, what comes nearest."""

    def worst(one: Tried) -> float:
        job, held, _ = one
        assert job.clock is not None
        return max(float(held.shares[key_of(b)]["median"]) / b.limit for b in job.clock.budgets)

    within = [one for one in tried if worst(one) <= 1]
    return max(within, key=worst) if within else min(tried, key=worst)


def _timed(run: Run, job: Job, number: int, choices: list[Choice]) -> Held:
    clock = job.clock
    assert clock is not None
    layers = [(c.groups * c.per_group, c.groups, c.neurons) for c in choices]
    dense = clock.dense()
    inputs = {
        "version": __version__,
        **clock.facts(),
        "bench": clock.bench.model_dump(mode="json"),
        "dense": run.seal_hash(dense),
        "shapes": layers,
    }
    folder = run.stage(f"latency-whole-{number}", inputs, lambda f: clock.whole(layers, f, dense))
    measured = json.loads((folder / "shares.json").read_text("utf-8"))
    counts = counts_of(choices)
    return Held(
        number,
        choices,
        {
            key_of(limit.budget): {
                "predicted": limit.prices.total(counts) / limit.dense,
                **{k: measured[key_of(limit.budget)][k] for k in ("median", "low", "high")},
            }
            for limit in job.limits
            if limit.budget.figure in TIMES
        },
    )


def _corrected(job: Job, tried: Sequence[Held]) -> Job | None:
    """The job whose limits of times are put right by what was measured; None where one is then below its floor."""
    limits = []
    for limit in job.limits:
        if limit.budget.figure in TIMES:
            key = key_of(limit.budget)
            points = [(h.shares[key]["predicted"], h.shares[key]["median"]) for h in tried]
            last = tried[-1].shares[key]
            margin = min(max((last["high"] - last["low"]) / 2 / last["median"], MARGINS[0]), MARGINS[1])
            limit = replace(limit, most=int(aim(points, (1 - margin) * limit.budget.limit) * limit.dense))
        limits.append(limit)
    least = counts_of(smallest(job))
    for limit in limits:
        if limit.prices.total(least) > limit.most:
            say(f"{limit.text}: less time than that is out of reach")
            return None
    return replace(job, limits=tuple(limits))


def aim(points: Sequence[tuple[float, float]], target: float) -> float:
    """The share that the table must say, so that ``target`` is measured.

    Between the dense model, of which both are 1, and what was tried, (said, measured), lie straight lines; below the
    least that was measured the line from the dense model goes on.
    """
    every = [(1.0, 1.0), *points]
    above = min((p for p in every if p[1] > target), key=lambda p: p[1])
    below = max((p for p in every if p[1] <= target), key=lambda p: p[1], default=None)
    if below is None:
        below, above = above, every[0]
    if below[1] >= above[1]:  # it was no faster than the dense model
        return target
    return below[0] + (target - below[1]) / (above[1] - below[1]) * (above[0] - below[0])


def _said(job: Job, found: Held) -> str:
    assert job.clock is not None
    return ", ".join(
        f"{b.figure} at {b.length} tokens {s['median']:.3f}x ({s['low']:.3f} to {s['high']:.3f}) where"
        f" {b.limit:g}x is asked and the table says {s['predicted']:.3f}x"
        for b in job.clock.budgets
        for s in (found.shares[key_of(b)],)
    )


def told(run: Run, job: Job, found: Held | None) -> dict[str, dict[str, Any]]:
    """By the text of a budget of a time, what a plan says of it beside what it says of every budget: how far off the
    table was on unseen models, and what the whole model of random weights took, where it was timed at these shapes."""
    assert job.clock is not None
    table = json.loads((run.folder / "latency-table" / "table.json").read_text("utf-8"))
    return {
        b.text: {
            "table_error": errors_of(table, key_of(b)),
            **({"whole": found.shares[key_of(b)], "search": found.number} if found is not None else {}),
        }
        for b in job.clock.budgets
    }
