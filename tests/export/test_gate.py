"""Budgets, bounds and verdicts, against brute force and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from compress.errors import UsageError
from compress.exporters import gate
from compress.exporters.gate import Budget, parse_budget
from compress.report.rows import FIGURES, Row, better, better_of, is_share
from compress.report.stats import paired_ratio


def test_budgets_say_what_they_say() -> None:
    assert parse_budget("latency<=1.05x") == Budget("latency<=1.05x", "latency", "fastest", "relative", 1.05)
    assert parse_budget(" latency.p90 <= 40 ms ") == Budget("latency.p90 <= 40 ms", "latency", "p90", "absolute", 0.04)
    assert parse_budget("ttft.median<=0.9x").statistic == "median"
    assert parse_budget("memory<=64MiB").limit == 64 * 2**20
    assert parse_budget("size<=0.8x").kind == "relative"
    assert parse_budget("accuracy>=-0.5%").limit == -0.005
    assert parse_budget("perplexity<=1.02x").limit == 1.02


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("latency", "this is no budget"),
        ("latency<=", "this is no budget"),
        ("latency<=1.05", "the unit is missing"),
        ("latency<=5%", "no unit '%'"),
        ("latncy<=1.05x", "did you mean 'latency'"),
        ("latency>=1.05x", "bounded from above"),
        ("latency.p95<=10ms", "no statistic 'p95'"),
        ("latency.p90<=1.1x", "pinned"),
        ("memory.p90<=1.1x", "no statistic 'p90'"),
        ("latency<=0x", "above 0"),
        ("latency<=-1x", "above 0"),
        ("accuracy>=0.5%", "percentage points"),
        ("accuracy<=-0.5%", "percentage points"),
        ("perplexity<=20", "the unit is missing"),
        ("size<=3ms", "no unit 'ms'"),
        ("latency<=nanx", "this is no budget"),
        ("latency<=1e400x", "no budget"),
    ],
)
def test_a_wrong_budget_is_refused_with_its_text(text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert part in str(caught.value) and text in str(caught.value)


def test_ranks_are_those_of_the_binomial_distribution() -> None:
    for pairs, tail in itertools.product(range(1, 22), (0.001, 0.0037, 0.025, 0.1)):
        k = gate.allowed(pairs, tail)
        assert k == -1 or binom.cdf(k, pairs, 0.5) <= tail
        assert binom.cdf(k + 1, pairs, 0.5) > tail


def test_the_error_over_all_looks_is_what_every_sequence_of_tosses_gives() -> None:
    first, last, tail = 4, 11, 0.07
    crossed = 0
    for tosses in itertools.product((0, 1), repeat=last):
        heads = np.cumsum(tosses)
        crossed += any(heads[n - 1] <= gate.allowed(n, tail) for n in range(first, last + 1))
    assert gate.error_over_looks(tail, first, last) == pytest.approx(crossed / 2**last)


def test_a_candidate_at_the_limit_fails_in_under_one_percent_and_passes_in_under_five() -> None:
    tail = gate.fail_tail()
    assert 0.005 < gate.error_over_looks(tail) < 0.01
    assert gate.error_over_looks(gate.LEVEL_TAIL) < 0.05
    # No larger tail would do.
    assert gate.error_over_looks(tail + 0.0002) > 0.01


@pytest.mark.parametrize("noise", ["normal", "cauchy", "two clocks"])
def test_the_interval_holds_the_median_as_often_as_it_says_where_the_bootstrap_does_not(noise: str) -> None:
    rng = np.random.default_rng(0)
    draws = {
        "normal": lambda: rng.standard_normal(7),
        "cauchy": lambda: np.clip(rng.standard_cauchy(7), -50, 50),
        "two clocks": lambda: rng.choice([-5.0, 0.0, 5.0], 7) + rng.standard_normal(7),
    }[noise]
    ours, bootstrap, gates = 0, 0, 1500
    for seed in range(gates):
        ratios = np.exp(0.02 * draws())
        low, high = gate.bounds(ratios, gate.LEVEL_TAIL)
        ours += low <= 1.0 <= high
        found = paired_ratio(list(ratios), [1.0] * 7, seed=seed, draws=200)
        bootstrap += found["low"] <= 1.0 <= found["high"]
    assert ours / gates > 0.95
    assert bootstrap / gates < 0.93


def test_verdicts() -> None:
    quiet = [1.0, 1.001, 0.999, 1.0, 1.002, 0.998, 1.0]
    assert gate.decide(quiet[:6], 1.05) is None
    assert gate.decide(quiet, 1.05) == "pass"
    assert gate.decide(quiet, 1.0) is None
    slow = [1.1 * r for r in quiet]
    # Seven of seven over the limit come by chance once in 128 gates, which is too often.
    assert gate.decide(slow, 1.05) is None
    assert gate.decide([*slow, 1.1, 1.1], 1.05) == "fail"
    assert gate.decide([0.9, 1.2] * 10 + [1.1], 1.05) == "inconclusive"
    # One pair of nine is an accident, whatever its size.
    assert gate.decide([*quiet, 9.0, 1.0], 1.05) == "pass"


def test_a_limit_exactly_met_passes() -> None:
    assert gate.decide([1.05] * 7, 1.05) == "pass"


def test_only_what_is_farther_from_1_than_the_smallest_change_is_decided_by_a_tight_budget() -> None:
    tight = {"limit": 1.01, "smallest": 0.03}
    assert gate.decide([1.02] * 21, **tight) == "inconclusive"
    assert gate.decide([1.0] * 21, **tight) == "inconclusive"
    assert gate.decide([1.10] * 21, **tight) == "fail"
    assert gate.decide([0.90] * 21, **tight) == "pass"
    assert gate.too_tight(1.01, 0.03) and gate.too_tight(0.98, 0.03) and not gate.too_tight(0.9, 0.03)


def test_the_smallest_change_is_detected_in_95_percent_of_gates() -> None:
    rng = np.random.default_rng(0)
    sigma = 0.03
    seen = np.exp(sigma * rng.standard_normal(400))
    smallest = gate.smallest_change(seen, draws=4000)
    detected = 0
    for _ in range(400):
        values = np.exp(smallest + sigma * rng.standard_normal(gate.LAST))
        detected += any(gate.decide(list(values[:n]), 1.0) == "fail" for n in range(gate.FIRST, gate.LAST + 1))
    assert 0.92 < detected / 400 < 0.98
    assert gate.smallest_change([1.0] * 21) == 0.0
    assert gate.smallest_change(seen**2, draws=4000) == pytest.approx(2 * smallest, rel=0.05)


def test_tails_ask_for_the_samples_that_they_need() -> None:
    assert gate.samples_needed([parse_budget("latency<=1.05x")]) == gate.SAMPLES
    assert 7 * gate.samples_needed([parse_budget("latency.p90<=40ms")]) >= 100
    assert 7 * gate.samples_needed([parse_budget("latency.p99<=40ms")]) >= 1000


def test_spread_and_throttling() -> None:
    assert gate.spread(np.random.default_rng(0).normal(10, 0.5, 20000)) == pytest.approx(0.05, rel=0.05)
    assert gate.throttled([1.0] * 8) is None
    assert gate.throttled([1.0] * 6 + [1.2] * 2) == pytest.approx(0.2)
    assert gate.throttled([1.0, 2.0]) is None


def test_one_fail_fails_and_strict_takes_inconclusive_for_one() -> None:
    assert gate.overall(["pass", "inconclusive", "fail"]) == "fail"
    assert gate.overall(["pass", "inconclusive"]) == "inconclusive"
    assert gate.overall(["pass"]) == "pass"
    codes = {v: gate.exit_code(v, False) for v in ("pass", "fail", "inconclusive")}  # type: ignore[arg-type]
    assert codes == {"pass": 0, "fail": 1, "inconclusive": 3}
    assert gate.exit_code("inconclusive", True) == 1 and gate.exit_code("pass", True) == 0


def test_no_budget_is_infinite() -> None:
    assert all(math.isfinite(parse_budget(t.strip()).limit) for t in gate.EXAMPLES.split(","))


@pytest.mark.parametrize("figure", FIGURES)
def test_which_way_and_in_what_a_figure_is_counted_is_the_rows_word(figure: str) -> None:
    """A budget bounds a figure from its worse side, in the units of its row."""
    unit = {"seconds": "ms", "bytes": "MB"}.get(FIGURES[figure], "x")
    right, wrong = ("<=", ">=") if better_of(figure) == "lower" else (">=", "<=")
    number = f"-0.5{'%'}" if FIGURES[figure] == "score" else f"5{unit}"
    assert gate.parse_budget(f"{figure}{right}{number}").figure == figure
    with pytest.raises(UsageError):
        gate.parse_budget(f"{figure}{wrong}{number}")
    for other in {"ms", "MB", "x", "%"} - {number.lstrip("-.05"), "x"}:
        with pytest.raises(UsageError):
            gate.parse_budget(f"{figure}{right}5{other}")


def test_only_a_share_that_is_better_when_it_is_larger_is_an_accuracy() -> None:
    def score(metric: str, said: bool | None = None) -> Row:
        return Row(name=metric, unit="score", better=better(metric, said), metric=metric, task="t", dense=1, pruned=1)

    assert is_share(score("acc,none")) and is_share(score("accuracy")) and is_share(score("mIoU"))
    assert not is_share(score("rmse")) and not is_share(score("accuracy loss")) and not is_share(score("bits"))
    assert not is_share(score("acc", said=False))
