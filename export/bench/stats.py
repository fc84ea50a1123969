"""Medians, spreads, and bootstrap intervals of paired ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

P90_FROM, P99_FROM = 100, 1000  # samples below which a tail quantile says nothing


def summary(samples: Sequence[float], single: bool = True) -> dict[str, Any]:
    """Median and spread of samples (any unit); p90 and p99 only where there are enough of them.

    Args:
        single: a sample is one call. The mean of several calls has no slow one any more: no tail is told of it.
    """
    values = np.asarray(samples, dtype=float)
    quartiles = np.percentile(values, [25, 50, 75])
    found: dict[str, Any] = {
        "samples": len(values),
        "median": float(quartiles[1]),
        "min": float(values.min()),
        "max": float(values.max()),
        "spread_within": float((quartiles[2] - quartiles[0]) / quartiles[1]),
    }
    if single and len(values) >= P90_FROM:
        found["p90"] = float(np.percentile(values, 90))
    if single and len(values) >= P99_FROM:
        found["p99"] = float(np.percentile(values, 99))
    return found


def paired_ratio(before: Sequence[float], after: Sequence[float], seed: int = 0, draws: int = 10_000) -> dict[str, Any]:
    """The median of before[i] / after[i] (above 1: faster, smaller) with a 95 % bootstrap interval over the pairs."""
    if len(before) != len(after) or not before:
        raise ValueError(f"pairs of equal number are needed, got {len(before)} and {len(after)}")
    ratios = np.asarray(before, dtype=float) / np.asarray(after, dtype=float)
    rng = np.random.default_rng(seed)
    medians = np.median(ratios[rng.integers(0, len(ratios), (draws, len(ratios)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {
        "median": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "pairs": [float(r) for r in ratios],
    }
