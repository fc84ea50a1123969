"""report.json: the one source of the card, the plots and (later) the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.run import fingerprint

REQUIRED = ("model", "recipe", "size", "layers", "search", "verify", "quality", "environment", "commands")


def finish(report: dict[str, Any]) -> None:
    """Stamps the report with the hash of its own content.

    Raises:
        CompressError: a section is missing.
    """
    missing = [key for key in REQUIRED if key not in report]
    if missing:
        raise CompressError(f"the report lacks {', '.join(missing)}", where="report.json", fix="run the whole pipeline")
    report.pop("sha256", None)
    report["sha256"] = fingerprint(report)


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report and checks that nothing in it was changed since it was written.

    Args:
        path: report.json, or a folder that holds it (a run folder or a release).

    Raises:
        CompressError: there is none, it is not readable, or its hash does not fit.
    """
    candidates = [path] if path.is_file() else [path / "report.json", path / "release" / "report.json"]
    found = next((p for p in candidates if p.is_file()), None)
    if found is None:
        raise CompressError(
            "there is no report.json", where=str(path), fix="name a run folder in which `compress prune` has finished"
        )
    try:
        report = json.loads(found.read_text())
        stamp = report.pop("sha256")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as e:
        raise CompressError(
            "report.json cannot be read", where=str(found), fix="make it again with `compress prune`"
        ) from e
    if fingerprint(report) != stamp:
        raise CompressError(
            "report.json was changed since it was written", where=str(found), fix="make it again with `compress prune`"
        )
    report["sha256"] = stamp
    return dict(report)
