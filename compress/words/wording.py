"""Numbers as a person writes them, in tables, sentences, labels and lines."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Three figures or all whole ones: for labels."""
    size = abs(value)
    if size >= 100 or size == 0:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.{1 if size >= 10 else 2}f}"
    return f"{value:.{min(8, 2 - math.floor(math.log10(size)))}f}"


def counted(count: int, noun: str, nouns: str = "") -> str:
    """``1 epoch``, ``1,200 epochs``."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def small(difference: float) -> str:
    """A difference beside its tolerance."""
    return f"{difference:.1e}" if difference else "0"


def duration(seconds: float) -> str:
    """A forecast's time: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    if value >= 1000:
        return f"{value:,.0f} ms"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f} ms"


def megabytes(count: float, beside: float = 0) -> str:
    """``beside``: a size that it stands next to, so that both have one unit."""
    if max(count, beside) < 1e5:
        return f"{count:,.0f} bytes"
    return f"{number(count / 1e6)} MB"
