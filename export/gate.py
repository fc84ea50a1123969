"""Whether a candidate keeps its budgets against a baseline: budgets, intervals, and when to stop.

Everything here is pure: figures in, verdicts out. A round gives one pair, the ratio candidate / baseline, and after
every round from the 7th on the gate looks at all pairs. The bounds are order statistics of the pairs: how many pairs
lie on either side of a limit is a fair coin's tosses where the true median is the limit, whatever the noise looks like,
so the chance that any of all looks errs is counted exactly (`error_over_looks`).

A time is that of the fastest call of a process unless the budget names another statistic. On a machine where whole
processes are slowed down, which the first rounds show, a round is several processes of each model, and the fastest of
them counts; those first rounds are then set aside. What decides that is each model's own spread, not the ratio, so a
pair stays a fair coin's toss at the limit.

- **pass**: the upper bound of the 95 % interval is within the budget. With all looks counted, a candidate that is
  exactly at the limit passes so in under 5 % of gates, a worse one less often.
- **fail**: the lower bound of a wider interval is over it. Its level is the least strict one with which a candidate
  exactly at the limit fails in under 1 % of gates, all looks counted.
- **inconclusive**: neither, after the last round.

A percentile bootstrap of the median alone would not do: at 7 pairs its 95 % interval holds the median in 88 % of cases,
and looking up to 15 times multiplies the error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compress.errors import UsageError
from compress.report.rows import COSTS, FIGURES, better_of
from compress.report.stats import P90_FROM, P99_FROM

FIRST, LAST = 7, 21  # rounds
PILOT = 3  # from this round to the first look the machine's noise is watched
NOISY = 1.05  # a model's slowest process in them over its fastest: then a round has REPEATS processes of each model
REPEATS = 4
SAMPLES = 3  # of at least 0.1 s each, in one process
LEVEL_TAIL = 0.025  # of the interval that is told, and that a pass rests on
FALSE_FAIL = 0.01  # of candidates exactly at the limit, all looks counted
POWER = 0.95  # with which the smallest detectable change is detected
THROTTLED = 1.05  # the last quarter of the baseline's processes against the first

Verdict = Literal["pass", "fail", "inconclusive"]
EXIT_CODES: dict[str, int] = {"pass": 0, "fail": 1, "inconclusive": 3}

TIMES = tuple(figure for figure, unit in FIGURES.items() if unit == "seconds")
MEASURED = (*TIMES, "memory")
# The fastest call of a process is gated unless another is asked for: preemption, a busy sibling core and interrupts
# only ever add, so it varies least. What it does not show is a candidate that is slow only now and then.
STATISTICS = ("fastest", "median", "p90", "p99")
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
COUNTS = {"k": 1e3, "M": 1e6, "B": 1e9}
UNITS: dict[str, dict[str, float]] = {"seconds": SECONDS, "bytes": BYTES, "parameters": COUNTS}
EXAMPLES = "latency<=1.05x, latency.p90<=40ms, memory<=1.1x, size<=0.8x, accuracy>=-0.5%, perplexity<=1.02x"


@dataclass(frozen=True)
class Budget:
    """What one figure of the candidate may be.

    ``kind`` says how ``limit`` counts: ``relative`` to the baseline's figure, ``absolute`` in seconds or bytes, or
    ``points`` (percentage points against the baseline's).
    """

    text: str
    figure: str
    statistic: str
    kind: Literal["relative", "absolute", "points"]
    limit: float
    length: int | None = None  # tokens, of a figure that is taken at a length


@dataclass(frozen=True)
class Grammar:
    """What budgets may be of: every figure's unit, the statistics of times, the figures that take a length behind an
    @, examples, and what ``x`` is times of."""

    figures: Mapping[str, str]
    statistics: tuple[str, ...]
    lengths: tuple[str, ...]
    examples: str
    times: str


GATE = Grammar(FIGURES, STATISTICS, (), EXAMPLES, "the baseline's")
_FORM = re.compile(
    r"([a-z_]+)(?:\.([a-z0-9]+))?(?:@([0-9]{1,9}))?\s*(<=|>=)\s*([+-]?[0-9]+(?:\.[0-9]*)?|[+-]?\.[0-9]+)\s*([A-Za-z%]*)"
)


def parse_budget(text: str, grammar: Grammar = GATE) -> Budget:
    """A budget such as ``latency<=1.05x``.

    Raises:
        UsageError: it has another form, or a unit or direction that its figure does not have.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise _wrong(text, "this is no budget", f"for example: {grammar.examples}")
    figure, statistic, length, sign, number, unit = match.groups()
    if figure not in grammar.figures:
        from compress.schema.recipe import nearest

        raise _wrong(text, f"there is no figure {figure!r}", nearest(figure, tuple(grammar.figures)))
    counted = grammar.figures[figure]
    value = float(number)
    if not math.isfinite(value):
        raise _wrong(
            text[:40] + "...", "the limit is no number that can be reached", f"for example: {grammar.examples}"
        )
    if length is not None and (figure not in grammar.lengths or int(length) == 0):
        raise _wrong(
            text,
            f"{figure} is not taken at a length" if figure not in grammar.lengths else "a length is at least 1 token",
            f"{', '.join(grammar.lengths)} are: {grammar.lengths[0]}@512<=0.8x" if grammar.lengths else "leave it out",
        )
    allowed_sign = "<=" if counted in COSTS or better_of(figure) == "lower" else ">="
    if counted == "score":
        if statistic or sign != allowed_sign or unit != "%" or number[0] not in "+-":
            raise _wrong(text, "a budget of accuracy is a change in percentage points", "for example: accuracy>=-0.5%")
        return Budget(text.strip(), figure, "value", "points", value / 100)
    if sign != allowed_sign:
        raise _wrong(text, f"{figure} is bounded from above", f"write {figure}<={number}{unit}")
    if statistic is not None and (figure not in TIMES or statistic not in grammar.statistics):
        has = f"times have {', '.join(grammar.statistics)}" if grammar.statistics else "leave it out"
        raise _wrong(text, f"{figure} has no statistic {statistic!r}", has)
    units = UNITS.get(counted, {})
    if unit != "x" and unit not in units:
        known = ", ".join([f"x (times {grammar.times})", *units])
        raise _wrong(text, f"{figure} has no unit {unit!r}" if unit else "the unit is missing", f"one of: {known}")
    if value <= 0:
        raise _wrong(text, "the limit must be above 0", f"for example: {grammar.examples}")
    kind: Literal["relative", "absolute"] = "relative" if unit == "x" else "absolute"
    if kind == "relative" and statistic in ("p90", "p99"):
        raise _wrong(
            text, "a tail is not compared relative to a baseline: it needs a pinned device", f"{figure}<={number}x"
        )
    limit = value if kind == "relative" else value * units[unit]
    usual = grammar.statistics[0] if figure in TIMES and grammar.statistics else "value"
    return Budget(text.strip(), figure, statistic or usual, kind, limit, int(length) if length else None)


def _wrong(text: str, what: str, fix: str) -> UsageError:
    return UsageError(what, where=f"budget {text!r}", fix=fix)


def samples_needed(budgets: Sequence[Budget], first: int = FIRST) -> int:
    """Samples of one process with which the first look already has those that its tails need."""
    wanted = {"p90": P90_FROM, "p99": P99_FROM}
    return max([SAMPLES, *(math.ceil(wanted[b.statistic] / first) for b in budgets if b.statistic in wanted)])


@cache
def allowed(pairs: int, tail: float) -> int:
    """The most heads of that many fair tosses that, or fewer, come with at most the chance ``tail``; -1: not even 0."""
    mass, found = 0.0, -1
    for heads in range(pairs + 1):
        mass += math.comb(pairs, heads) / 2**pairs
        if mass > tail:
            break
        found = heads
    return found


@cache
def error_over_looks(tail: float, first: int = FIRST, last: int = LAST) -> float:
    """The chance that a bound of this tail is on the wrong side of the true median at any look, exactly."""
    alive, crossed = {0: 1.0}, 0.0
    for pairs in range(1, last + 1):
        tossed: dict[int, float] = {}
        for heads, chance in alive.items():
            for one in (0, 1):
                tossed[heads + one] = tossed.get(heads + one, 0.0) + chance / 2
        bound = allowed(pairs, tail) if pairs >= first else -1
        crossed += sum(chance for heads, chance in tossed.items() if heads <= bound)
        alive = {heads: chance for heads, chance in tossed.items() if heads > bound}
    return crossed


@cache
def fail_tail(first: int = FIRST, last: int = LAST) -> float:
    """The largest tail with which the looks err in under ``FALSE_FAIL`` of gates in all."""
    steps = {
        sum(math.comb(n, i) for i in range(heads + 1)) / 2**n for n in range(first, last + 1) for heads in range(n // 2)
    }
    return max((t for t in steps if error_over_looks(t, first, last) < FALSE_FAIL), default=0.0)


def bounds(values: Sequence[float] | NDArray[Any], tail: float) -> tuple[float, float]:
    """Between which values their true median lies, each bound wrong with at most the chance ``tail``.

    Order statistics; infinite where there are too few values for the tail.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    k = allowed(len(ordered), tail)
    return (-math.inf, math.inf) if k < 0 else (float(ordered[k]), float(ordered[-1 - k]))


def decide(
    values: Sequence[float], limit: float, *, first: int = FIRST, last: int = LAST, smallest: float = 0.0
) -> Verdict | None:
    """The verdict on paired ratios (or the candidate's own figures) so far; None: go on measuring.

    Args:
        values: one per round.
        limit: a true median above it is over the budget.
        smallest: a change in the log of the ratio that cannot be told from none (`smallest_change`). Where the limit
            is nearer to 1 than that, only what is farther away from 1 is decided.
    """
    if len(values) < first:
        return None
    over, within = limit, limit
    if smallest and too_tight(limit, smallest):
        over, within = math.exp(smallest), math.exp(-smallest)
    if bounds(values, fail_tail(first, last))[0] > over:
        return "fail"
    if bounds(values, LEVEL_TAIL)[1] <= within:
        return "pass"
    return "inconclusive" if len(values) >= last else None


def smallest_change(
    ratios: Sequence[float], *, first: int = FIRST, last: int = LAST, draws: int = 1000, seed: int = 0
) -> float:
    """The smallest slow-down (log of a ratio) beyond a limit that a gate on this machine fails in 95 % of cases.

    Whole gates are drawn from the pairs seen, centred, either way round: baseline and candidate of an A/A pair are
    alike. A slow-down s over the limit is detected where s plus the largest lower bound of all looks is above 0.
    """
    logs = np.log(np.asarray(ratios, dtype=float))
    centred = logs - np.median(logs)
    pool = np.concatenate([centred, -centred])
    rng = np.random.default_rng(seed)
    gates = pool[rng.integers(0, len(pool), (draws, last))]
    best = np.full(draws, -np.inf)
    tail = fail_tail(first, last)
    for pairs in range(first, last + 1):
        k = allowed(pairs, tail)
        if k >= 0:
            best = np.maximum(best, np.partition(gates[:, :pairs], k, axis=1)[:, k])
    return max(0.0, float(np.quantile(-best, POWER)))


def judge(
    ratios: Sequence[float], limit: float, *, first: int = FIRST, last: int = LAST, draws: int = 1000
) -> tuple[Verdict | None, float | None]:
    """The verdict on a relative budget so far, and the smallest change that could be detected (where it was needed).

    The spread of the pairs themselves says whether the limit is too tight to be decided here.
    """
    verdict = decide(ratios, limit, first=first, last=last)
    if verdict is None:
        return None, None
    smallest = smallest_change(ratios, first=first, last=last, draws=draws)
    return decide(ratios, limit, first=first, last=last, smallest=smallest), smallest


def too_tight(limit: float, smallest: float) -> bool:
    """Whether a relative limit is nearer to 1 than what can be told from no change."""
    return smallest > abs(math.log(limit))


def spread(values: Sequence[float]) -> float:
    """Half of the distance of the outer sextiles, relative to the median: one sigma where the noise is normal."""
    low, middle, high = np.percentile(np.asarray(values, dtype=float), [15.87, 50, 84.13])
    return float((high - low) / 2 / middle)


def noisy(figures: Sequence[Sequence[float]]) -> bool:
    """Whether the processes of one and the same model differ so much that one of them is not enough for a round.

    Args:
        figures: for every model and figure, those of the first rounds' processes.
    """
    return any(max(own) > NOISY * min(own) for own in figures)


def order(round_: int, repeats: int) -> list[int]:
    """Which of the two models every process of a round runs: ABBA over the rounds, and within one."""
    return [which for j in range(repeats) for which in ((0, 1) if (round_ + j) % 2 == 0 else (1, 0))]


def throttled(values: Sequence[float]) -> float | None:
    """How much slower the last quarter of the figures is than the first, where it is by over 5 %; else None."""
    quarter = len(values) // 4
    if not quarter:
        return None
    ratio = float(np.median(values[-quarter:]) / np.median(values[:quarter]))
    return ratio - 1 if ratio > THROTTLED else None


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """One fail fails; else one that is inconclusive leaves all so."""
    for worst in ("fail", "inconclusive"):
        if worst in verdicts:
            return worst  # type: ignore[return-value]
    return "pass"


def exit_code(verdict: Verdict, strict: bool) -> int:
    return EXIT_CODES["fail"] if strict and verdict == "inconclusive" else EXIT_CODES[verdict]
