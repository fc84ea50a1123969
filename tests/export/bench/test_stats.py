"""Statistics against numpy on whole populations and against what is known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from compress.export.bench.stats import paired_ratio, summary


def test_tails_are_told_only_where_there_are_samples_for_them() -> None:
    assert not {"p90", "p99"} & set(summary(range(1, 100)))
    assert summary(range(1, 101))["p90"] == pytest.approx(np.percentile(range(1, 101), 90))
    assert "p99" not in summary(range(1, 1000)) and "p99" in summary(range(1, 1001))


def test_summary_by_hand() -> None:
    found = summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found == {"samples": 5, "median": 3.0, "min": 1.0, "max": 5.0, "spread_within": pytest.approx(2 / 3)}


def test_ratios_are_paired() -> None:
    # The machine slows down by half in the middle; each pair still says 2.
    before, after = [2.0, 2.0, 4.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0, 2.0]
    found = paired_ratio(before, after)
    assert (found["median"], found["low"], found["high"]) == (2.0, 2.0, 2.0) and found["pairs"] == [2.0] * 5


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        ratios = 1.5 * np.exp(0.1 * rng.standard_normal(15))
        found = paired_ratio(list(ratios), [1.0] * 15, seed=seed, draws=500)
        held += found["low"] <= 1.5 <= found["high"]
    assert 0.88 <= held / 200 <= 1.0


def test_the_same_seed_gives_the_same_interval() -> None:
    before, after = [1.0, 1.2, 1.1, 1.4, 1.3], [1.0, 0.9, 1.1, 1.0, 0.8]
    assert paired_ratio(before, after) == paired_ratio(before, after)


def test_pairs_that_do_not_match_are_refused() -> None:
    for before, after in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="pairs of equal number"):
            paired_ratio(before, after)
