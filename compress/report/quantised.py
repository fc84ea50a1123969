"""The table that a person decides by: dense and pruned at every precision, quality against bytes and speed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compress.words.escape import markdown
from compress.words.wording import megabytes, milliseconds

BYTES, SPEED = "bytes", "tpot"
FORMATS, SIDES, PRECISION = ("gguf", "genai"), ("dense", "pruned"), re.compile(r"[a-z0-9_]+")


def files(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every file that was built at fewer bits, the smallest first.

    Raises:
        ValueError: a row is of no format, precision or side; they name folders, and a report may be a stranger's.
    """
    rows = (report.get("quantised") or {}).get("files") or ()
    for row in rows:
        if row["format"] not in FORMATS or row["side"] not in SIDES or not PRECISION.fullmatch(row["precision"]):
            raise ValueError(f"quantised: {row['side']!r:.40}, {row['format']!r:.40}, {row['precision']!r:.40}")
    return sorted(rows, key=lambda row: row["bytes"])


def name_of(row: Mapping[str, Any]) -> str:
    """``FORMAT-PRECISION``: of its stage, its bench and its folder in the release."""
    return f"{row['format']}-{row['precision']}"


def best(rows: Sequence[Mapping[str, Any]], cost: str) -> list[bool]:
    """Whether each row is Pareto-optimal: no other has as low a perplexity for as low a cost, and one of them lower.

    Args:
        cost: ``bytes``, or ``tpot``, the seconds of a token. A row without it is not.
    """

    def beats(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        pair = [(a[key], b[key]) for key in ("perplexity", cost)]
        return all(x <= y for x, y in pair) and any(x < y for x, y in pair)

    known = [row for row in rows if cost in row]
    return [cost in row and not any(beats(other, row) for other in known) for row in rows]


def title(row: Mapping[str, Any]) -> str:
    return f"{row['side']}, {row['format']} {row['precision']}"


def section(report: Mapping[str, Any]) -> list[str]:
    """The card's section; nothing where there are none."""
    rows = files(report)
    if not rows:
        return []
    largest = max(row["bytes"] for row in rows)
    lines = [
        "## At fewer bits",
        "",
        "| | file | perplexity, geometric mean | TTFT | a token | tokens a second | peak memory | best for its |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, small, fast in zip(rows, best(rows, BYTES), best(rows, SPEED), strict=True):
        times = [milliseconds(row[key]) if key in row else "" for key in ("ttft", "tpot")]
        rate = f"{1 / row['tpot']:.3g}" if "tpot" in row else ""
        memory = megabytes(row["peak_rss"], row["peak_rss"]) if row.get("peak_rss") else ""
        marks = " and ".join(word for word, is_ in (("bytes", small), ("speed", fast)) if is_)
        cells = [megabytes(row["bytes"], largest), f"{row['perplexity']:.2f}", *times, rate, memory]
        lines.append(f"| {markdown(title(row))} | {' | '.join(cells)} | {f'**{marks}**' if marks else ''} |")
    return [*lines, "", *(f"- {one}" for one in _notes(report, rows)), ""]


def _notes(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    runtimes = ", ".join(dict.fromkeys(markdown(row["runtime"]) for row in rows))
    said = [
        f"Each file in its own runtime ({runtimes}): perplexity on the windows of the first table. **Best**:"
        " no other row has as low a perplexity for as few bytes, or for as short a token.",
    ]
    found = report["quantised"]
    for name, record in (found.get("bench") or {}).items():
        beside = "" if record["pruned_is"] == name else f", beside the pruned {markdown(record['pruned_is'])}"
        said.append(
            f"{markdown(name)}: measured in {record['spec']['processes']:d} fresh processes of each model, interleaved"
            f" {markdown(record['spec']['order'])}{beside}."
        )
    cache = found.get("cache")
    held = [row for row in rows if cache and row["bytes"] <= cache]
    if held:
        said.append(
            f"{len(held)} of these files are no larger than the last cache of this processor ({megabytes(cache, cache)}"
            "): their tokens may be read from it, and be slower on a device whose cache is smaller. A cold cache was"
            " not measured."
        )
    notes = dict.fromkeys(
        f"{title(row)}: {note}" for row in rows for note in row.get("notes") or () if row["side"] == "pruned"
    )
    return [*said, *(f"{markdown(note)}." for note in notes)]


def lines(report: Mapping[str, Any]) -> list[str]:
    """What the command line says: a line a file; those that are best for their bytes have a star."""
    rows = files(report)
    largest = max((row["bytes"] for row in rows), default=0)
    return [
        f"{'*' if good else ' '} {title(row):24} {megabytes(row['bytes'], largest):>10}  ppl {row['perplexity']:.2f}"
        + (f"  {1 / row['tpot']:.3g} tokens a second" if "tpot" in row else "")
        for row, good in zip(rows, best(rows, BYTES), strict=True)
    ]
