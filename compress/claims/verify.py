"""A saved or published model against its own report: every claim is checked again, or it is said why it cannot be.

What binds what: seal.json holds the hash of every file of a sealed folder, report.json that of every file it was
written for and of its own content. A hash shows that a file was changed; it does not show who wrote the report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from compress.errors import CompressError, UsageError
from compress.report.multimodal import NAME as MULTIMODAL
from compress.report.rows import check
from compress.run.cache import sha256_of
from compress.run.folder import RECIPE_LOCK, SEAL, STAGE_NAMES, fingerprint, read_seal, sealed_folders
from compress.run.seals import VERSION, entries, inside, read_stamped
from compress.words.wording import small

Verdict = Literal["holds", "does not hold", "is another", "cannot be checked here"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OTHER: Verdict = "is another"  # what was found here is not what the report was made with
OPEN: Verdict = "cannot be checked here"

REPORT = "report.json"


@dataclass(frozen=True)
class Claim:
    """One thing that the report says, what was found here, and the verdict. ``reason`` stands where it is needed."""

    claim: str
    said: str
    found: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Subject:
    """What is checked: the folder that was named, the folder of the model with its report, the report, and the
    FILE.py:FUNCTION that was named for a network."""

    folder: Path
    release: Path
    report: dict[str, Any] | None
    network: str | None


def verify(
    where: str,
    network: str | None = None,
    *,
    measure: bool = False,
    like: Path | None = None,
    dense: str | None = None,
) -> dict[str, Any]:
    """Checks a run folder, a release or model folder, or a model of the hub.

    Code that lies in a folder is run only where this version would have written it so, or ``network`` names it; and
    nothing is loaded of a folder whose files are not those that its report and seals name.

    Args:
        where: a folder, or a hub id.
        measure: measures quality and latency again too, of the dense model as well where it can be had.
        like: a run folder whose held-out text or data is taken.
        dense: the dense model (a folder, a hub id, an alias), or an export of it; looked for where the report says by
            default.

    Returns:
        ``claims`` (a dict a `Claim`), how many hold, fail, are another and are open; ``models`` as loaded,
        ``sealed_files``, and ``report``, its hash, where there is one.

    Raises:
        UsageError, CompressError: there is nothing to be checked.
    """
    folder = located(where)
    places = (folder, folder / "model", folder / "model-padded", folder / MULTIMODAL)
    models = [p for p in places if (p / "config.json").exists()]
    networks = [p for p in places if (p / "network.json").exists()]
    if not models and not networks:
        raise CompressError(
            "there is no model here", where=str(folder), fix="name a model folder or a finished run folder"
        )
    if models:
        from compress.language.setup import quiet

        quiet()
    if models and network is not None:
        raise UsageError("this is a language model", where=str(folder), fix="leave out --network")
    release = folder / "release" if (folder / "release" / REPORT).exists() else folder
    report, rows = _own_report(release)
    count, claims = _seals(folder, made_with(report))
    claims += rows
    whole = all(c.verdict != FAILS for c in claims)
    loaded: dict[str, Any] = {}
    subject = Subject(folder, release, report, network)
    if whole:
        for place in (*models, *networks):
            name = str(place.relative_to(folder)) if place != folder else "the model"
            loaded[str(place)], row = _load(place, name, network)
            claims.append(row)
    else:
        claims.append(Claim("loads in a clean process", "", "", OPEN, "nothing is loaded of files that were changed"))
    whole = whole and all(c.verdict != FAILS for c in claims)
    if whole and report is not None:
        from compress.claims.budgets import budgets
        from compress.report.build import of_report

        with of_report(release):
            claims += _counts(subject, loaded)
            claims += _carried(subject, loaded)
            claims += budgets(subject)
            claims += _parity(subject)
        if measure:
            from compress.claims.remeasure import measured

            claims += measured(subject, like, dense)
    found = {
        "path": str(folder),
        "sealed_files": count,
        "models": {k: v for k, v in loaded.items() if v is not None},
        "claims": [asdict(c) for c in claims],
        "hold": sum(c.verdict == HOLDS for c in claims),
        "fail": sum(c.verdict == FAILS for c in claims),
        "other": sum(c.verdict == OTHER for c in claims),
        "open": sum(c.verdict == OPEN for c in claims),
    }
    return found | ({"report": report["sha256"]} if report is not None else {})


def refuse_failed(found: Mapping[str, Any]) -> None:
    """Raises CompressError where a claim of `verify`'s facts does not hold."""
    bad = [c for c in found["claims"] if c["verdict"] == FAILS]
    if bad:
        first = bad[0]
        detail = first["reason"] or f"the report says {first['said']}, found: {first['found']}"
        raise CompressError(
            f"{len(bad)} of {len(found['claims'])} claims {'does' if len(bad) == 1 else 'do'} not hold:"
            f" {first['claim']}: {detail}",
            where=found["path"],
            fix="fetch or copy it again, or make it again with `compress prune --fresh`",
        )


def lines(found: Mapping[str, Any]) -> list[str]:
    """What the command line says: the table, and the sum."""
    said = [f"sealed   {found['sealed_files']} files are named in seals"] if found["sealed_files"] else []
    for folder, m in found["models"].items():
        said.append(
            f"reloaded {folder} as {m['class']}: logits differ by {small(m['max_logit_difference'])}"
            f" (allowed {small(m['tolerance'])})"
        )
    if "report" in found:
        said.append(f"report   {found['report'][:16]}")
    rows = [("claim", "report says", "found", "verdict")]
    rows += [(c["claim"], c["said"], c["found"], c["verdict"]) for c in found["claims"]]
    wide = [max(len(r[i]) for r in rows) for i in range(3)]
    notes = ["", *(c["reason"] for c in found["claims"])]
    for row, note in zip(rows, notes, strict=True):
        cells = "  ".join(f"{cell:{w}}" for cell, w in zip(row[:3], wide, strict=True))
        said.append(f"{cells}  {row[3]}" + (f": {note}" if note else ""))
    other = f" {found['other']} {'is' if found['other'] == 1 else 'are'} another," if found["other"] else ""
    said.append(f"{found['hold']} hold, {found['fail']} do not hold,{other} {found['open']} cannot be checked here")
    return said


def located(where: str) -> Path:
    """The folder that is meant; a hub id is fetched.

    Raises:
        UsageError: there is no such folder.
        CompressError: the hub cannot be reached, or has no such model.
    """
    path = Path(where)
    if path.is_dir():
        return path
    if where.count("/") == 1 and not where.startswith((".", "/", "~")) and not path.exists():
        from compress.claims.hub import fetch

        return fetch(where)
    raise UsageError("there is no such folder", where=where, fix="name a run folder, a model folder, or a hub id")


def _compare(folder: Path, files: Mapping[str, Any], title: str, source: str) -> list[Claim]:
    """A row for all files that are as they were named, and one for each that is not."""
    bad = []
    for name, facts in files.items():
        shown = (f"{title}/{name}" if title else name) + (", sealed" if source.endswith(SEAL) else "")
        if not inside(name):
            bad.append(Claim(shown, "", "", FAILS, f"{source} names a file outside its folder"))
            continue
        if not (isinstance(facts, dict) and type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)):
            bad.append(Claim(shown, "", "", FAILS, f"{source} gives no size and hash of it"))
            continue
        path = folder / name
        if not path.is_file():
            bad.append(Claim(shown, f"sha256 {facts['sha256'][:12]}", "missing", FAILS, "the file is missing"))
            continue
        sha = sha256_of(path)
        if path.stat().st_size != facts["bytes"] or sha != facts["sha256"]:
            bad.append(
                Claim(
                    shown,
                    f"sha256 {facts['sha256'][:12]}",
                    f"sha256 {sha[:12]}",
                    FAILS,
                    f"the file was changed since it was written (by {source})",
                )
            )
    return bad


def made_with(report: Mapping[str, Any] | None) -> int:
    """The version that a believed report says it was made with; without one, the version that shows a change."""
    return VERSION if report is None or "rows" in report else min(VERSION, int(report.get("schema_version", 1)))


def _seals(folder: Path, version: int) -> tuple[int, list[Claim]]:
    """(how many files seals name, the claims about them, and about what no seal names)."""
    count, bad = 0, []
    sealed = list(sealed_folders(folder))
    for place in sealed:
        title = str(place.relative_to(folder)) if place != folder else ""
        source = str(PurePosixPath(title) / SEAL)
        try:
            files = read_seal(place, version)["files"]
        except CompressError as e:
            bad.append(Claim(source, "", "", FAILS, e.what))
            continue
        count += len(files)
        bad += _compare(place, files, title, source)
        if title:
            named = {SEAL, *files}
            more = (p for p in entries(place) if p.relative_to(place).as_posix() not in named)
            bad += [
                Claim(str(p.relative_to(folder)), "", "a file more", FAILS, f"{source} does not name it") for p in more
            ]
    run = os.path.lexists(folder / RECIPE_LOCK)
    if run:
        bad += _of_run(folder, sealed, version)
    if bad or not count:
        return count, bad
    claims = [Claim("files named in seals", f"{count} files", "all unchanged", HOLDS)]
    if version == 1:
        what = f"seals and {RECIPE_LOCK}" if run else "seals"
        reason = f"made by version 1: its {what} do not carry their own hash, so whether one was changed is not checked"
        claims.append(Claim(f"{what} themselves", "no hash", "", OPEN, reason))
    return count, claims


def _of_run(folder: Path, sealed: list[Path], version: int) -> list[Claim]:
    """What of a run folder is damaged outside its seals: the recipe's lock, and stages that have none."""
    bad = []
    try:
        if version > 1:
            read_stamped(folder / RECIPE_LOCK, RECIPE_LOCK, "")
    except CompressError as e:
        bad.append(Claim(RECIPE_LOCK, "", "", FAILS, e.what))
    known = set(sealed)
    bare = {p.parent if not p.is_symlink() else p for p in entries(folder) if known.isdisjoint(p.parents)}
    for place in sorted(bare):
        name = place.relative_to(folder)
        if name.parts and STAGE_NAMES.fullmatch(name.parts[0]):
            bad.append(
                Claim(str(name), "", "no seal", FAILS, "what is in it has no seal: it is gone, or it is not a stage")
            )
    return bad


def _own_report(folder: Path) -> tuple[dict[str, Any] | None, list[Claim]]:
    """(the report, where it is believed; the claims about it and the files it names)."""
    path = folder / REPORT
    if not path.exists():
        return None, []
    from compress.report.build import of_report, own_json

    try:
        report = own_json(path)
    except CompressError as e:
        return None, [Claim(REPORT, "", "", FAILS, e.what)]
    stamp = report.pop("sha256")
    found = fingerprint(report)
    if found != stamp:
        reason = "the report was changed since it was written"
        return None, [Claim(REPORT, f"sha256 {str(stamp)[:12]}", f"sha256 {found[:12]}", FAILS, reason)]
    report["sha256"] = stamp
    try:
        check(report)
    except CompressError as e:
        return None, [Claim(REPORT, "", "", FAILS, e.what)]
    with of_report(path):
        return _of_its_files(folder, report)


def _of_its_files(folder: Path, report: dict[str, Any]) -> tuple[dict[str, Any], list[Claim]]:
    """A report whose hash fits, and the claims about the files that it names."""
    claims = [Claim(REPORT, f"sha256 {report['sha256'][:12]}", "the same", HOLDS)]
    files = report.get("files")
    if not isinstance(files, dict):
        return report, [*claims, Claim("files of the model", "", "", OPEN, "the report names no hashes")]
    bad = _compare(folder, files, "", REPORT)
    bad += _strangers(folder, files)
    claims += bad or [Claim("files of the model", f"{len(files)} files", "all unchanged", HOLDS)]
    claims += _card(folder, report)
    return report, claims if bad else claims + _sample(folder, report)  # what was changed is not read


def _strangers(folder: Path, files: Mapping[str, Any]) -> list[Claim]:
    """What could be run and is none of ours, whether the report names it or not: anybody can write a report."""
    from compress.language.checkpoint import written_code
    from compress.models.folder import CONFIG, is_code, is_pickle

    try:
        written = {name: source.encode() for name, source in written_code(folder).items()}
    except CompressError as e:
        return [Claim(CONFIG, "", "", FAILS, e.what)]
    bad = []
    for path in entries(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and path.is_dir():
            bad.append(Claim(name, "", "a link to a folder", FAILS, "what lies there is no part of the release"))
        elif is_code(name) and not path.is_dir() and not (path.is_file() and path.read_bytes() == written.get(name)):
            bad.append(Claim(name, "", "code", FAILS, "this version of compress did not write it; it was not run"))
        elif is_pickle(name) and name not in files:
            bad.append(Claim(name, "", "a file more", FAILS, "it could be run, and the report does not name it"))
    return bad


def _card(folder: Path, report: dict[str, Any]) -> list[Claim]:
    """The results in the card's head against the report's."""
    from compress.report.metadata import results

    path = folder / "README.md"
    if not path.exists():
        return []
    import yaml
    from huggingface_hub import ModelCard

    try:
        data: Any = ModelCard(path.read_text(encoding="utf-8")).data
        shown = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results or ()}
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as e:
        return [Claim("README.md", "", "", FAILS, f"its head cannot be read: {' '.join(str(e).split())}")]
    said = {(r.dataset_name, r.metric_name): r.metric_value for r in results(report)}
    if shown == said:
        return [Claim("results in README.md", f"{len(said)} figures", "the report's", HOLDS)]
    key = next(k for k in (*said, *shown) if said.get(k) != shown.get(k))
    return [
        Claim(
            f"README.md: {key[1]}, {key[0]}",
            str(said.get(key, "nothing")),
            str(shown.get(key, "nothing")),
            FAILS,
            "the card does not say what the report does",
        )
    ]


def _sample(folder: Path, report: dict[str, Any]) -> list[Claim]:
    """The outputs that the report holds against those of the fingerprint's file."""
    from compress.report.build import output_sample

    said = report.get("fingerprint")
    if said is None:
        return [Claim("fingerprint of the outputs", "", "", OPEN, "the report holds none")]
    if not inside(str(said.get("file", ""))) or not (folder / said["file"]).is_file():
        return [Claim("fingerprint of the outputs", "", "missing", FAILS, "the file is missing")]
    same = output_sample(folder / said["file"]) == said
    count = sum(len(out["values"]) for out in said["outputs"].values())
    return [
        Claim(
            "fingerprint of the outputs",
            f"{count} values",
            "the same" if same else "others",
            HOLDS if same else FAILS,
            "" if same else f"{said['file']} holds other outputs than the report",
        )
    ]


def _load(place: Path, name: str, network: str | None) -> tuple[dict[str, Any] | None, Claim]:
    title = f"{name} loads in a clean process"
    try:
        if (place / "config.json").exists():
            from compress.language.checkpoint import FINGERPRINT, check_code, verify_clean
            from compress.models.reading import check_weights

            check_code(place)
            check_weights(place)
            if not (place / FINGERPRINT).exists():
                verify_clean(place)  # says what is missing
            found = verify_clean(place)
        else:
            from compress.models.folder import refuse_code
            from compress.networks.reload import check_named
            from compress.networks.setup import verify_network

            check_named(place, network)
            refuse_code(place, {})
            found = verify_network(place, network)
    except UsageError:
        raise
    except CompressError as e:
        if "no fingerprint" in e.what or "did not write" in e.what:
            raise
        return None, Claim(title, "the outputs it was saved with", "", FAILS, e.what)
    said = f"outputs within {small(found['tolerance'])}"
    return found, Claim(title, said, f"{small(found['max_logit_difference'])}, as {found['class']}", HOLDS)


def _counts(subject: Subject, loaded: Mapping[str, Any]) -> list[Claim]:
    """How many parameters, or non-zeros, are left."""
    report = subject.report
    assert report is not None
    size = report["size"]
    if "nonzero_parameters" in size:
        said, found = size["nonzero_parameters"], _nonzeros(subject)
        title = "non-zero parameters"
    elif "total_parameters" in (size.get("pruned") or {}) and report["quality"].get("layout") in ("per-layer", "stock"):
        place = subject.folder / "model" if (subject.folder / "model").is_dir() else subject.folder
        said, found = size["pruned"]["total_parameters"], loaded[str(place)]["parameters"]
        title = "parameters"
    elif "pruned" in (size.get("parameters") or {}):
        said, found = size["parameters"]["pruned"], next(iter(loaded.values()))["parameters"]
        title = "parameters"
    else:
        return []
    return [Claim(title, f"{said:,}", f"{found:,}", HOLDS if said == found else FAILS)]


def _carried(subject: Subject, loaded: Mapping[str, Any]) -> list[Claim]:
    """Of a checkpoint that sees as well: its parameters, and that the parts beside the language part are the dense
    one's."""
    from compress.models.composite import Names, carried

    assert subject.report is not None
    place = subject.folder / MULTIMODAL
    if MULTIMODAL not in subject.report or str(place) not in loaded:
        return []
    said = subject.report[MULTIMODAL]
    found = carried(place, Names(**said["names"]))
    rows = [
        (f"parameters of {MULTIMODAL}", said["pruned"]["parameters"], loaded[str(place)]["parameters"]),
        ("tensors beside the language part", said["carried"]["tensors"], found.tensors),
    ]
    claims = [Claim(name, f"{a:,}", f"{b:,}", HOLDS if a == b else FAILS) for name, a, b in rows]
    before, now = said["carried"]["sha256"], found.sha256
    verdict = HOLDS if before == now else FAILS
    return [*claims, Claim("their bytes", f"sha256 {before[:12]}", f"sha256 {now[:12]}", verdict)]


def _nonzeros(subject: Subject) -> int:
    if (subject.release / "network.json").exists():
        from compress.networks.reload import reload

        model = reload(subject.release, subject.network).model
        return sum(int((p != 0).sum()) for p in model.parameters())
    from safetensors import safe_open

    from compress.models.reading import weight_files

    count = 0
    for path in weight_files(subject.release):
        with safe_open(path, "pt") as file:
            count += sum(int((file.get_tensor(n) != 0).sum()) for n in file.keys())  # noqa: SIM118
    return count


def _parity(subject: Subject) -> list[Claim]:
    """Every exported format against torch again."""
    report = subject.report
    assert report is not None
    claims = []
    for form, facts in (report.get("export") or {}).items():
        title = f"{form} gives what torch gives"
        pruned = facts.get("pruned", facts) if isinstance(facts, Mapping) else {}
        folder = subject.release / form
        check = _checker(subject, form)
        if not folder.is_dir():
            claims.append(Claim(title, "", "", OPEN, f"there is no folder {form}"))
        elif isinstance(check, str):
            claims.append(Claim(title, "", "", OPEN, check))
        else:
            tolerance = float(pruned["tolerance"])
            said = f"{small(pruned['largest_difference'])} (allowed {small(tolerance)})"
            try:
                worst = max(check(folder, tolerance).values())
                claims.append(Claim(title, said, small(worst), HOLDS))
            except CompressError as e:
                claims.append(Claim(title, said, "", FAILS, e.what))
    return claims


def _checker(subject: Subject, form: str) -> Callable[[Path, float], dict[str, float]] | str:
    """The comparison of one format with torch, or why there is none."""
    release = subject.release
    if (release / "network.json").exists():
        from compress.networks.reload import reload

        saved = reload(release, subject.network)
        names = [task["name"] for task in saved.facts["tasks"]]
        if form == "onnx":
            from compress.exporters.onnx_module import check_module

            return lambda f, t: dict(check_module(saved.model, f, saved.inputs, names, tolerance=t)["outputs"])
        if form == "mnn":
            from compress.exporters.mnn import check_mnn, require_mnn

            try:
                require_mnn()
            except UsageError as e:
                return f"{e.what} ({e.fix})"
            return lambda f, t: dict(check_mnn(saved.model, f, saved.inputs, names, tolerance=t)["outputs"])
    elif form == "onnx":
        from compress.exporters.parity import check_llm
        from compress.language.setup import quiet
        from compress.models.families import family_for
        from compress.models.reading import load_config, load_model

        quiet()
        family = family_for(load_config(release))
        model = load_model(release, family)
        vocab = family.geometry(model.config).vocab
        return lambda f, t: dict(check_llm(model, f, tolerance=t, vocab=vocab)["outputs"])
    return "this verb has no comparison for the format; its files' hashes were checked"
