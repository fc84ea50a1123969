"""Medians, spreads, bootstrap intervals of paired ratios, and what such a ratio supports.

`finding` and `against` alone decide what may be said of a measured ratio: card, plots, pages, lines and `verify` print
their words. What the spread does not support is no finding, whatever the median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from compress.words.wording import counted

P90_FROM, P99_FROM = 100, 1000  # samples below which a tail quantile says nothing
FEWEST = 5  # pairs: of fewer, the outermost two hold the true median less than 93 times in 100, and no interval is 95 %
NEAR = 0.05  # an interval that lies this near to 1 as a whole says that nothing has changed
WIDE = 0.25  # half an interval over its middle, from which a share of the ideal says nothing
UNRESOLVED = "not resolved on this machine"


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


Kind = Literal["more", "less", "same", "unresolved", "beyond"]


@dataclass(frozen=True)
class Found:
    """What a measured ratio (dense / pruned, above 1: better) supports.

    ``kind``: ``more`` and ``less`` are findings; ``same`` is one too, that nothing has changed; ``unresolved`` is what
    the spread leaves open; ``beyond`` lies above all that the work promises, and is the machine's doing. ``short`` is
    for a plot, ``words`` for a table or a line, always with the spread.
    """

    kind: Kind
    short: str
    words: str


def finding(
    ratio: Mapping[str, Any], promised: float | None = None, pairs: int | None = None, what: str = "fast"
) -> Found:
    """What is said of a ratio.

    Args:
        ratio: ``median``, ``low`` and ``high``, as `paired_ratio` gives them.
        promised: the most that the work which went can bring, where it is known.
        pairs: how many it is the median of, where ``ratio`` does not hold them; None: not known.
        what: as in "1.5x as fast".
    """
    middle, low, high = ratio["median"], ratio["low"], ratio["high"]
    spread, short = f"[{low:.2f}, {high:.2f}]", f"{middle:.2f}x"
    count = len(ratio["pairs"]) if ratio.get("pairs") else pairs
    if 1 - NEAR <= low <= high <= 1 + NEAR:
        return Found("same", "no change", f"no change {spread}")
    if count is not None and count < FEWEST:
        few = counted(count, "process", "processes")
        return Found("unresolved", "not resolved", f"{UNRESOLVED} {spread}, of {few}")
    if low <= 1 <= high:
        return Found("unresolved", "not resolved", f"{UNRESOLVED} {spread}")
    if promised is not None and low > max(promised, 1.0):
        return Found("beyond", "not resolved", f"{UNRESOLVED} {spread}: {_beyond(promised)}")
    return Found("more" if low > 1 else "less", short, f"{short} as {what} {spread}")


def _beyond(promised: float) -> str:
    return f"above the {promised:.2f}x that the work promises, so noise of a shared machine and no gain of the pruning"


def against(ratio: Mapping[str, Any] | None, ideal: float, most: float | None = None) -> Found:
    """What is said of a speed-up beside the one that the FLOPs promise.

    Args:
        ratio: as of `finding`, with its pairs; None where each model was measured once.
        ideal: what the FLOPs promise.
        most: what FLOPs or bytes promise, whichever is more; ``ideal`` where it is None.
    """
    promise = f"the FLOPs promise {ideal:.2f}x"
    if ratio is None:
        once = "each model was profiled once, so the spread is not known"
        return Found("unresolved", "not resolved", f"{UNRESOLVED}: {once}; {promise}")
    found = finding(ratio, max(ideal, most or 0.0))
    middle, low, high = ratio["median"], ratio["low"], ratio["high"]
    wide = (high - low) / 2 > WIDE * middle
    if found.kind == "beyond" or (found.kind == "unresolved" and len(ratio["pairs"]) < FEWEST):
        return Found(found.kind, found.short, f"{found.words}; {promise}")
    if wide:
        return Found("unresolved", "not resolved", f"{UNRESOLVED} [{low:.2f}, {high:.2f}]; {promise}")
    if found.kind in ("same", "unresolved"):  # narrow, and around 1
        return Found("same", found.short, f"no gain that can be told [{low:.2f}, {high:.2f}] where {promise}")
    return Found(found.kind, found.short, f"{found.words} where {promise} ({100 * middle / ideal:.0f} %)")


PARTS = {"ttft": "prefill", "tpot": "decode"}  # the graph whose work a figure of a language model is


def found_in(record: Mapping[str, Any], key: str) -> Found:
    """What is said of a figure of a bench record (``ttft``, ``tpot``, ``latency``, ``peak_rss``), see `finding`."""
    what = "small" if key == "peak_rss" else "fast"
    processes = (record.get("spec") or {}).get("processes")
    return finding(record["ratios"][key], promised(record, key), processes, what)


def promised(record: Mapping[str, Any], key: str) -> float | None:
    """The most that the work which went can bring to a figure; None where it is not known.

    A runtime that multiplies by zeros does as much work as before where the files are as large as before.
    """
    if key == "peak_rss":
        return None
    explained = (record.get("why") or {}).get(PARTS.get(key, "model"))
    if explained:
        return max(float(explained["ideal"]), float(explained.get("ideal_bytes") or 0.0))
    sizes = [(record.get(side) or {}).get("bytes") for side in ("dense", "pruned")]
    runtime = str((record.get("spec") or {}).get("runtime", ""))
    return 1.0 if runtime.startswith("onnxruntime") and sizes[0] and sizes[0] == sizes[1] else None
