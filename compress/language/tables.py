"""Latency tables that runs have measured on this machine, kept for those to come: `compress plan` asks them whether a
time can be reached.

A table belongs to shapes, a runtime, a machine and how it was measured, not to weights. A run measures its own all the
same: what else ran then is in a table's figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.language.latency import Clock, errors_of, key_of, timed_limits
from compress.run.cache import cache_dir, cache_place
from compress.run.progress import say
from compress.run.seals import fingerprint
from compress.run.strict_json import member, read_json, typed
from compress.system.files import write_whole

if TYPE_CHECKING:
    from compress.language.limits import Limit

FOLDER, FORMAT = "latency-tables", 1
MEND = "delete it: the next run with a budget of a time measures it again"


def keep(clock: Clock, table: Mapping[str, Any]) -> None:
    """Keeps a table that a run has measured. A cache that cannot be written is said, and costs the run nothing."""
    facts = {"format": FORMAT, "of": _of(clock), "lengths": _lengths(clock.facts()), "table": table}
    name = fingerprint({k: facts[k] for k in ("of", "lengths")})[:16]
    try:
        made = {**facts, "measured": time.strftime("%Y-%m-%d")}
        write_whole(
            cache_dir() / FOLDER / f"{name}.json", json.dumps({**made, "sha256": fingerprint(made)}, indent=1) + "\n"
        )
    except CompressError as e:
        say(f"the latency table is not kept for `compress plan`: {e.what} ({e.where})")


def known(clock: Clock) -> tuple[Mapping[str, Any], str, Path] | None:
    """A table of these shapes, runtime and machine that holds every length that is asked for, the latest; the day it
    was measured, and where it lies. None where there is none.

    Raises:
        CompressError: one that is there was changed, or cannot be read.
    """
    asked, keys = _of(clock), {key_of(b) for b in clock.budgets}
    folder = cache_place() / FOLDER  # which is looked into, and not made
    found = [(_read(path), path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    able = [(f, path) for f, path in found if f["of"] == asked and keys <= set(f["table"]["dense"])]
    if not able:
        return None
    last, path = max(able, key=lambda f: str(f[0]["measured"]))
    return last["table"], str(last["measured"]), path


def priced(clock: Clock) -> tuple[tuple[Limit, ...], dict[str, dict[str, Any]]] | None:
    """The limits of the clock's budgets by a table that is known, and of each by its text what a forecast says of the
    table: the day, its file, and its error on models that it had not seen."""
    found = known(clock)
    if found is None:
        return None
    table, day, path = found
    told = {
        b.text: {"measured_on": day, "kept": str(path), "table_error": errors_of(table, key_of(b))}
        for b in clock.budgets
    }
    return timed_limits(clock.setup, clock.budgets, table, fingerprint(table)), told


def _of(clock: Clock) -> dict[str, Any]:
    """What a table is of: what decides it but the lengths, and what the whole model's time depends on beside blocks."""
    facts = clock.facts()
    spec = {k: v for k, v in facts["spec"].items() if k not in ("prompts", "contexts")}
    geometry = clock.setup.geometry
    found = {**facts, "spec": spec, "vocabulary": geometry.vocab, "tied": geometry.tied}
    return dict(json.loads(json.dumps(found)))


def _lengths(facts: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    return {k: facts["spec"][k] for k in ("prompts", "contexts")}


def _read(path: Path) -> dict[str, Any]:
    what, where = "a kept latency table", str(path)
    facts = typed(read_json(path, what, fix=MEND), dict, "", what, where, MEND)
    stamp = facts.pop("sha256", None)
    if stamp != fingerprint(facts) or facts.get("format") != FORMAT:
        raise CompressError(f"{what} was changed since it was written, or is of another version", where=where, fix=MEND)
    for key, kind in (("of", dict), ("table", dict), ("measured", str)):
        member(facts, key, kind, what, where, fix=MEND)
    return dict(facts)
