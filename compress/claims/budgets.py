"""Budgets of a report: what was counted is counted again; a verdict on a time has to be that of its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.claims.verify import FAILS, HOLDS, OPEN, Claim, Subject
from compress.language.limits import FIGURES, held, measured, shown
from compress.models.families import family_for
from compress.models.reading import load_config

AGAIN = "a time is of the machine that measured it: `compress gate RUN:dense RUN -b {budget}` measures it here"
HELD = {True: "held", False: "not held", None: "not resolved"}


def budgets(subject: Subject) -> list[Claim]:
    report = subject.report
    assert report is not None
    rows = [row for row in report.get("budgets") or () if "measured" in row]
    counted = {row["budget"]: (row["figure"], row.get("length")) for row in rows if row["unit"] != "seconds"}
    found: Mapping[str, int] = {}
    if counted:
        place = subject.folder / "model" if (subject.folder / "model").is_dir() else subject.folder
        known = {budget: of for budget, of in counted.items() if of[0] in FIGURES}
        found = measured(place, family_for(load_config(place)), known)
    return [_counted(row, found) if row["budget"] in counted else _timed(row) for row in rows]


def _counted(row: Mapping[str, Any], found: Mapping[str, int]) -> Claim:
    said, here = row["measured"], found.get(row["budget"])
    kept = here is not None and here <= row["asked"]
    return Claim(
        f"budget {row['budget']}",
        f"{said:,} of {row['asked']:,}, {HELD[row['held']]}",
        f"{here:,}" if here is not None else "no such figure",
        HOLDS if here == said and kept == row["held"] else FAILS,
    )


def _timed(row: Mapping[str, Any]) -> Claim:
    """A time: whether its verdict is the one that its own interval gives."""
    title, said = f"budget {row['budget']}", f"{shown(dict(row), 'measured')}, {HELD[row['held']]}"
    verdict = held(row["share"], row["asked"] / row["dense"])
    if verdict is not row["held"]:
        return Claim(title, said, HELD[verdict], FAILS, "by the report's own interval")
    figure, _, limit = row["budget"].partition("<=")
    return Claim(title, said, "", OPEN, AGAIN.format(budget=f"{figure.partition('@')[0]}<={limit}"))
