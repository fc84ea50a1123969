"""The dense model that a report compares with: looked for where the report says, and known by its hash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.claims.verify import HOLDS, OPEN, OTHER, Claim, Subject
from compress.errors import CompressError, UsageError
from compress.models.saved import KINDS
from compress.run.cache import sha256_of

NAME_IT = "name it with --dense"


@dataclass(frozen=True)
class Dense:
    """``folder`` holds the report's dense model, or there is none and ``why`` says so; ``export`` is one that the user
    has named. ``claims`` are what was found out about it."""

    folder: Path | None
    export: Path | None
    claims: list[Claim]
    why: str = ""


def find_dense(subject: Subject, named: str | None) -> Dense:
    """Looks for the dense model: where it was named, or else where the report says that it was.

    Args:
        named: a model folder, a hub id, an alias, a run folder, or an export of the dense model.

    Raises:
        UsageError: ``named`` is no such name.
    """
    of = _network if "data" in (subject.report or {}) else _text
    if named is None:
        return of(subject, None, None)
    folder = Path(named)
    places = (folder, folder / "export-dense")
    export = next((p for p in places if any((p / kind.graphs[0]).is_file() for kind in KINDS.values())), None)
    alone = export is not None and not (folder / "dense" / "network.json").is_file()
    return of(subject, None if alone else named, export)


def _text(subject: Subject, named: str | None, export: Path | None) -> Dense:
    from compress.models.reading import weights_hash
    from compress.models.sources import resolve, resolve_origin

    report = subject.report
    assert report is not None
    model = report["model"]
    # Reports of earlier versions do not say more than the name.
    origin = report.get("origin") or {"alias": model["name"]}
    looked = named or ", ".join(f"{k} {v}" for k, v in origin.items())
    try:
        folder = resolve(named).folder if named is not None else resolve_origin(origin, model["source"])
        found = weights_hash(folder)
    except UsageError as e:
        if named is not None:
            raise
        return _absent(model["sha256"], export, f"{e.what} (looked for {looked})")
    except CompressError as e:
        return _absent(model["sha256"], export, f"{e.what} (looked for {looked})")
    except (OSError, ValueError, KeyError) as e:
        return _absent(model["sha256"], export, f"it cannot be read: {' '.join(str(e).split())} (looked for {looked})")
    return _judged(model["sha256"], found, folder, export, f"{looked}: {folder}")


def _network(subject: Subject, named: str | None, export: Path | None) -> Dense:
    from compress.networks.reload import check_named
    from compress.networks.setup import WEIGHTS

    report = subject.report
    assert report is not None
    said = report["model"].get("dense_sha256")
    if said is None:
        return _absent("", export, "the report holds no hash of the network that was trained")
    places = [subject.folder / "dense"] if named is None else [Path(named) / "dense", Path(named)]
    folder = next((p for p in places if (p / "network.json").is_file() and (p / WEIGHTS).is_file()), None)
    if folder is None and named is not None:
        raise UsageError("there is no network here", where=named, fix="name the dense network's folder, or its run")
    if folder is None:
        return _absent(said, export, f"it was trained in the run, and there is no {places[0]}")
    check_named(folder, subject.network)
    return _judged(said, sha256_of(folder / WEIGHTS), folder, export, str(folder))


def _absent(said: str, export: Path | None, why: str) -> Dense:
    claim = Claim("the dense model", f"sha256 {said[:12]}" if said else "", "", OPEN, f"{why}; {NAME_IT}")
    return Dense(None, export, [claim], f"the dense model is not here: {why}; {NAME_IT}")


def _judged(said: str, found: str, folder: Path, export: Path | None, where: str) -> Dense:
    shown = (f"sha256 {said[:12]}", f"sha256 {found[:12]}")
    if found == said:
        return Dense(folder, export, [Claim("the dense model", *shown, HOLDS, where)])
    claim = Claim("the dense model", *shown, OTHER, f"{where} is not the one that the report was made with")
    return Dense(None, export, [claim], f"the dense model found here is another: {shown[1]}, the report has {shown[0]}")
