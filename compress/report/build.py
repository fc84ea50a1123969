"""report.json: the one source of the card, the plots and (later) the gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.run.folder import RECIPE_LOCK, SEAL, fingerprint
from compress.run.strict_json import member, read_json, typed

if TYPE_CHECKING:
    pass

FINGERPRINT = "fingerprint.safetensors"
REQUIRED = ("model", "recipe", "size", "layers", "verify", "quality", "environment", "commands")


def finish(report: dict[str, Any]) -> None:
    """Fills in the rows of what was measured, and stamps the report with the hash of its own content.

    Raises:
        CompressError: a section is missing, or a figure in one.
    """
    from compress.report.rows import made

    missing = [key for key in REQUIRED if key not in report]
    if missing:
        raise CompressError(f"the report lacks {', '.join(missing)}", where="report.json", fix="run the whole pipeline")
    report.pop("sha256", None)
    report["rows"] = [row.model_dump(exclude_defaults=True) for row in made(report)]
    report["sha256"] = fingerprint(report)


def write_release(report: dict[str, Any], folder: Path, card: Callable[[dict[str, Any], Path], Path]) -> None:
    """Into a folder that holds the model and its exports: the report with the hash of every file and some of the
    model's outputs, the card that ``card`` writes, and the HTML report."""
    from compress.report.html import NAME, write_html
    from compress.run.cache import sha256_of

    files = sorted(p for p in folder.rglob("*") if p.is_file())
    report["files"] = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files
    }
    if (folder / FINGERPRINT).exists():
        report["fingerprint"] = output_sample(folder / FINGERPRINT)
    finish(report)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_html(report, card(report, folder), folder / NAME)


def output_sample(path: Path, count: int = 16) -> dict[str, Any]:
    """``count`` values of every output in a fingerprint's file, evenly spaced, as they stand there."""
    from safetensors.numpy import load_file

    outputs = {}
    for name, values in sorted(load_file(path).items()):
        if name in ("tokens", "input"):
            continue
        flat = values.reshape(-1)
        at = [i * (flat.size - 1) // max(1, count - 1) for i in range(min(count, flat.size))]
        outputs[name] = {"shape": list(values.shape), "at": at, "values": [float(flat[i]) for i in at]}
    return {"file": path.name, "outputs": outputs}


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report and checks that nothing in it was changed since it was written.

    Args:
        path: report.json, or a folder that holds it (a run folder or a release).

    Raises:
        CompressError: there is none, it is not readable, its hash does not fit, or it is of a newer version.
    """
    from compress.report.rows import check

    found = _found(path)
    if found is None:
        raise CompressError(
            "there is no report.json" + _unfinished(path),
            where=str(path),
            fix="name a run folder in which `compress prune` has finished",
        )
    report = own_json(found)
    stamp = report.pop("sha256")
    content = fingerprint(report)
    if content != stamp:
        raise CompressError(
            f"report.json was changed since it was written: it says sha256 {str(stamp)[:16]}, its content has"
            f" {content[:16]}",
            where=str(found),
            fix="make it again with `compress prune`",
        )
    report["sha256"] = stamp
    with of_report(found):
        check(report)  # found out here, and not in the middle of what is made of it
    return dict(report)


@contextmanager
def of_report(path: Path) -> Iterator[None]:
    """What is made of a report that came from elsewhere: a part of it that is no part of a report is the report's
    fault. ``path`` is the report, or the folder that holds it.

    Raises:
        CompressError: where the block meets a value of another kind than reports have.
    """
    try:
        yield
    except CompressError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        said = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise CompressError(
            f"report.json is not what a report is: a part is missing or of another kind ({said})",
            where=str(_found(path) or path),
            fix="make it again with `compress prune`",
        ) from e


def own_json(path: Path) -> dict[str, Any]:
    """A report as it stands in a file, whatever its hash; `CompressError` where it is none, or has no hash."""
    what, where = "report.json", str(path)
    report = typed(read_json(path, what, constants=True), dict, "", what, where)
    member(report, "sha256", str, what, where)
    return report


def _found(path: Path) -> Path | None:
    candidates = [path] if path.is_file() else [path / "report.json", path / "release" / "report.json"]
    return next((p for p in candidates if p.is_file()), None)


def _unfinished(run: Path) -> str:
    """What a run that has no report has not measured; nothing where the folder is no run."""
    if not (run / RECIPE_LOCK).is_file():
        return ""
    stages = {
        "model": "saved no model",
        "evaluation-pruned": "measured no quality",
        "export-pruned": "exported nothing",
        "bench": "measured no latency",
    }
    lacking = [what for stage, what in stages.items() if not (run / stage / SEAL).is_file()]
    return f": the run is not finished, it has {', '.join(lacking)}" if lacking else ": the run is not finished"


def export_lines(report: dict[str, Any]) -> list[str]:
    """What the command line says of a network's exports: how large they are, and how far from what they are of."""
    from compress.words.wording import small

    found = []
    for form, facts in (report.get("export") or {}).items():
        dense, pruned = (sum(facts[k]["bytes"].values()) if k in facts else None for k in ("dense", "pruned"))
        off = facts["pruned"].get("largest_difference")
        told = f"outputs agree to {small(off)}" if off is not None else f"not run: {facts['pruned']['skipped']}"
        was = f"{dense:,} -> " if dense is not None else ""
        found.append(f"{form:8} {was}{pruned:,} bytes; {told}")
    return found


def run_line(report: dict[str, Any]) -> str:
    """Where the run lies, and its card where it got so far."""
    return f"run      {report['run']}" + ("  (release/README.md is the model card)" if "commands" in report else "")
