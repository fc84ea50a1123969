"""Statistics against numpy on whole populations and against what is known by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compress.report.stats import against, finding, found_in, paired_ratio, summary


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


def ratio(middle: float, low: float, high: float, pairs: int = 5) -> dict[str, Any]:
    return {"median": middle, "low": low, "high": high, "pairs": [middle] * pairs}


@pytest.mark.parametrize(
    ("given", "promised", "kind"),
    [
        (ratio(1.50, 1.25, 1.75), 2.0, "more"),
        (ratio(0.80, 0.70, 0.90), 2.0, "less"),
        (ratio(1.11, 0.79, 1.96), 2.0, "unresolved"),
        (ratio(1.20, 1.00, 1.40), 2.0, "unresolved"),
        (ratio(1.01, 0.97, 1.04), 2.0, "same"),
        (ratio(1.50, 1.25, 1.75, pairs=4), 2.0, "unresolved"),
        (ratio(2.48, 2.40, 2.60), 1.29, "beyond"),
        (ratio(1.35, 1.25, 1.45), 1.29, "more"),
        (ratio(1.20, 1.10, 1.30), 1.0, "beyond"),
        (ratio(1.20, 1.10, 1.30), 0.5, "beyond"),
        (ratio(1.50, 1.25, 1.75), None, "more"),
    ],
)
def test_what_the_spread_does_not_support_is_no_finding(given: Any, promised: float | None, kind: str) -> None:
    found = finding(given, promised)
    assert found.kind == kind
    assert f"[{given['low']:.2f}, {given['high']:.2f}]" in found.words, "the spread always stands there"
    number = f"{given['median']:.2f}x"
    if kind in ("more", "less"):
        assert found.words.startswith(f"{number} as fast") and found.short == number
    else:
        assert number not in found.words and number not in found.short
        assert found.words.startswith("no change" if kind == "same" else "not resolved on this machine")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (ratio(1.19, 1.15, 1.22), "1.19x as fast [1.15, 1.22] where the FLOPs promise 1.29x (92 %)"),
        (ratio(0.90, 0.85, 0.95), "0.90x as fast [0.85, 0.95] where the FLOPs promise 1.29x (70 %)"),
        (ratio(1.05, 0.95, 1.12), "no gain that can be told [0.95, 1.12] where the FLOPs promise 1.29x"),
        (ratio(1.60, 1.10, 2.40), "not resolved on this machine [1.10, 2.40]; the FLOPs promise 1.29x"),
        (ratio(1.19, 1.15, 1.22, pairs=2), "not resolved on this machine [1.15, 1.22], of 2 processes; the FLOPs"),
        (ratio(2.48, 2.40, 2.60), "not resolved on this machine [2.40, 2.60]: above the 1.29x that the work promises"),
        (None, "not resolved on this machine: each model was profiled once"),
    ],
)
def test_a_share_of_the_ideal_is_told_where_its_interval_is_narrow_and_below_it(given: Any, want: str) -> None:
    assert against(given, 1.29).words.startswith(want)


def test_bytes_that_fell_by_more_than_the_flops_may_explain_a_speed_up() -> None:
    assert against(ratio(2.48, 2.40, 2.60), 1.29, 2.5).kind == "more"


def test_a_record_tells_what_its_work_promises() -> None:
    record: dict[str, Any] = {
        "spec": {"runtime": "onnxruntime 1.32.0", "processes": 5},
        "dense": {"bytes": 1000},
        "pruned": {"bytes": 1000},
        "ratios": {"tpot": ratio(1.2, 1.1, 1.3)},
    }
    assert found_in(record, "tpot").kind == "beyond", "zeros are multiplied by: as much work as before"
    assert found_in({**record, "spec": {"runtime": "MNN 3.6"}}, "tpot").kind == "more", "its kernels skip zeros"
    assert found_in({**record, "pruned": {"bytes": 500}}, "tpot").kind == "more"
    record["why"] = {"prefill": {"ideal": 9.0}, "decode": {"ideal": 1.05}}
    assert found_in(record, "tpot").kind == "beyond"
    record["why"]["decode"]["ideal_bytes"] = 1.5
    assert found_in(record, "tpot").kind == "more"
