"""What version 1 released is verified, drawn as a card and as a page, and never taken for what version 2 releases."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError
from compress.report.build import read_report
from compress.report.rows import rows
from compress.run.seals import fingerprint, read_seal, seal_text
from tests.command import Ran, compress

pytestmark = pytest.mark.usefixtures("done_once")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v1"
NETWORKS = {"global-mp-network": "small", "pagcp": "wide"}
NAMES = ("tyr", "global-mp-text", *NETWORKS)
MISSING = "'sha256' is missing (version 1 wrote none, but this is of version 2)"
TOLD = "made by version 1: its seals do not carry their own hash, so whether one was changed is not checked"


@pytest.fixture
def release(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A release, unpacked anew for each test."""
    name = getattr(request, "param", "global-mp-text")
    with zipfile.ZipFile(FIXTURES / f"{name}.zip") as file:
        file.extractall(tmp_path / name)
    return tmp_path / name


def words(release: Path) -> list[object]:
    name = NETWORKS.get(release.name)
    return ["verify", release, *(("--network", f"{FIXTURES / 'mine.py'}:{name}") if name else ())]


@pytest.mark.parametrize("release", NAMES, indirect=True)
def test_it_is_verified_and_what_cannot_be_checked_is_told(release: Path) -> None:
    assert read_report(release)["schema_version"] == 1 and "sha256" not in json.loads(
        (release / "seal.json").read_text()
    )
    ran = compress(*words(release), "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["fail"] == 0 and found["hold"] >= 6 and found["sealed_files"] >= 8
    assert [(c["verdict"], c["reason"]) for c in found["claims"] if "seals themselves" in c["claim"]] == [
        ("cannot be checked here", TOLD)
    ]
    assert TOLD in compress(*words(release)).out


@pytest.mark.parametrize("release", NAMES, indirect=True)
def test_card_and_page_are_drawn_of_it(release: Path, tmp_path: Path) -> None:
    report = read_report(release)
    assert "rows" not in report and any(row.main for row in rows(report))
    assert compress("card", release, "--out", tmp_path / "card").code == 0
    card = (tmp_path / "card" / "README.md").read_text()
    for row in rows(report):
        if row.main:
            assert row.value("pruned") in card and row.value("dense") in card
    assert compress("report", release, "--out", tmp_path / "page.html").code == 0
    assert report["sha256"] in (tmp_path / "page.html").read_text()


def refused(ran: Ran, *parts: str) -> None:
    """The table is shown, and a claim that does not hold says ``parts``."""
    wrong = [line for line in ran.out.splitlines() if "does not hold" in line]
    assert ran.code == 1 and ran.err.count("error: ") == 1 and wrong, ran.out
    assert all(part in "\n".join(wrong) for part in parts), wrong


def changed(path: Path, change: Callable[[Any], object]) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts, indent=1) + "\n")


def test_a_file_that_was_changed_shows(release: Path) -> None:
    (release / "nonzero.json").write_text((release / "nonzero.json").read_text() + " ")
    refused(compress(*words(release)), "nonzero.json")


def test_a_report_that_was_changed_makes_no_version_1(release: Path) -> None:
    changed(release / "report.json", lambda report: report["model"].update(name="another"))
    refused(compress(*words(release)), MISSING)


def test_a_report_of_version_1_has_no_seal_of_version_2(release: Path) -> None:
    facts = json.loads((release / "seal.json").read_text())
    (release / "seal.json").write_text(seal_text(facts))
    refused(compress(*words(release)), "the seal is of version 2, and the report of version 1")


def as_version_2(release: Path) -> dict[str, Any]:
    """The release with the report and the seal that version 2 writes; the seal's facts."""
    from compress.report.build import finish
    from compress.run.cache import sha256_of

    report = read_report(release)
    report["schema_version"] = 2
    finish(report)
    path = release / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    facts: dict[str, Any] = json.loads((release / "seal.json").read_text())
    facts["files"]["report.json"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (release / "seal.json").write_text(seal_text(facts))
    return facts


def test_version_2_with_the_hash_taken_out_of_its_seal_is_no_version_1(release: Path) -> None:
    facts = as_version_2(release)
    ran = compress(*words(release), "--json")
    assert ran.code == 0 and TOLD not in ran.out and read_report(release)["schema_version"] == 2, ran.err
    (release / "seal.json").write_text(json.dumps(facts, indent=1) + "\n")
    refused(compress(*words(release)), MISSING)
    # Nor with a report that calls itself of version 1: its rows are those of version 2.
    report = json.loads((release / "report.json").read_text())
    del report["sha256"]
    report["schema_version"] = 1
    (release / "report.json").write_text(json.dumps({**report, "sha256": fingerprint(report)}, indent=1) + "\n")
    refused(compress(*words(release)), MISSING)


def test_a_run_is_never_built_on_a_seal_without_a_hash(release: Path) -> None:
    assert read_seal(release, 1)["stage"] == "release"
    with pytest.raises(CompressError, match="version 1 wrote none"):
        read_seal(release)
