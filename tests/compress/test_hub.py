"""Releases to the hub and back, against the stand-in of `tests.hub`: the hub itself cannot be had in a test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import Job, compress, one_error
from tests.hub import TOKEN, Hub, Repo, stand_in

pytestmark = pytest.mark.usefixtures("done_once")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, as the hub that huggingface_hub knows; XET, the hub's other way to store, is not part of it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with stand_in() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.endpoint + "/" + template.split("/", 3)[-1])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield found
    close_session()


@pytest.fixture
def release(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "release", tmp_path / "release"))


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is verified before an upload is the same each time, and takes seconds: here only the hub's part counts."""
    from compress.claims import hub as ours
    from compress.report.build import read_report

    monkeypatch.setattr(ours, "_verified", lambda release, network: read_report(release))


def test_a_release_goes_up_as_it_is_and_comes_back_verified(hub: Hub, finished: Path) -> None:
    ran = compress("card", finished, "--push", "me/pruned", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    repo = hub.repos["me/pruned"]
    assert found["private"] is True and repo.private, "nobody's model is made public unasked"
    assert found["commit"] == repo.sha and len(repo.commits) == 1, "one commit, or nothing"
    names = {p.relative_to(finished / "release").as_posix() for p in (finished / "release").rglob("*") if p.is_file()}
    assert set(repo.files) == names | {".gitattributes"}
    assert {"README.md", "report.json", "report.html", "model.safetensors", "onnx/decode.onnx", "seal.json"} <= names
    for name in names:
        assert repo.files[name] == (finished / "release" / name).read_bytes(), name
    ran = compress("verify", "me/pruned", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["fail"] == 0 and json.loads(ran.out)["hold"] == 8


def test_the_same_release_again_changes_nothing(hub: Hub, finished: Path, believed: None) -> None:
    for _ in range(2):
        ran = compress("card", finished, "--push", "me/pruned")
        assert ran.code == 0, ran.err
    assert "there already" in ran.out and len(hub.repos["me/pruned"].commits) == 1


def test_a_model_that_was_changed_on_the_hub_is_found(hub: Hub, finished: Path, believed: None) -> None:
    assert compress("card", finished, "--push", "me/pruned").code == 0
    files = hub.repos["me/pruned"].files
    files["README.md"] = files["README.md"].replace(b"perplexity", b"accuracy")
    ran = compress("verify", "me/pruned")
    assert ran.code == 1 and "README.md" in ran.err


def test_a_repository_with_something_else_is_left_alone_unless_it_is_to_be_replaced(
    hub: Hub, finished: Path, believed: None
) -> None:
    hub.repos["me/other"] = Repo(private=False, files={"README.md": b"mine", "old.bin": b"x"})
    one_error(compress("card", finished, "--push", "me/other"), 1, "something else already: 2 files", "--replace")
    assert hub.repos["me/other"].files == {"README.md": b"mine", "old.bin": b"x"}
    ran = compress("card", finished, "--push", "me/other", "--replace", "--json")
    assert ran.code == 0, ran.err
    assert "old.bin" not in hub.repos["me/other"].files and hub.repos["me/other"].files["README.md"] != b"mine"
    assert json.loads(ran.out)["private"] is False, "what was public stays so, and that is said"


def test_public_is_only_what_was_asked_to_be(hub: Hub, finished: Path, believed: None) -> None:
    assert compress("card", finished, "--push", "me/open", "--public").code == 0
    assert not hub.repos["me/open"].private


def test_nothing_goes_up_of_a_release_that_does_not_bear_out_its_report(hub: Hub, release: Path) -> None:
    path = release / "config.json"
    text = path.read_text()
    path.unlink()
    path.write_text(text + " ")
    ran = compress("card", release, "--push", "me/bad")
    assert ran.code == 1 and "config.json" in ran.err and "not hold" in ran.err
    path.write_text(text)
    (release / "notes.txt").write_text("not for the public")
    one_error(compress("card", release, "--push", "me/bad"), 1, "not sealed with it: notes.txt")
    (release / "notes.txt").unlink()
    (release / "seal.json").unlink()
    one_error(compress("card", release, "--push", "me/bad"), 1, "no sealed release", "seal.json")
    assert hub.repos == {} and not [a for a in hub.asked if a.startswith(("POST", "PUT"))]


def test_every_no_of_the_hub_is_one_message(
    hub: Hub, finished: Path, believed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    one_error(compress("card", finished, "--push", "no-owner"), 2, "no id of the hub", "ORG/NAME")
    one_error(compress("card", finished, "--public"), 2, "are for an upload")
    one_error(compress("card", finished, "--push", "me/x", "--out", tmp_path), 2, "do not go together")
    one_error(compress("verify", "me/none"), 1, "no such model", "me/none")
    one_error(compress("card", finished, "--push", "others/x"), 1, "does not allow it with this token")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    one_error(compress("card", finished, "--push", "me/x"), 1, "does not allow it with this token")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    one_error(compress("card", finished, "--push", "me/x"), 1, "there is no token", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    one_error(compress("card", finished, "--push", "me/x"), 1, "cannot be reached", "check the network")
    assert hub.repos == {}


def test_a_card_that_the_hub_refuses_is_not_uploaded(hub: Hub, release: Path, believed: None) -> None:
    path = release / "README.md"
    text = path.read_text().replace("tags:\n", "tags:\n- broken\n")
    path.unlink()
    path.write_text(text)
    one_error(compress("card", release, "--push", "me/x"), 1, "refuses the card", "model-index")
    assert not hub.repos["me/x"].commits


def test_without_the_hub_a_name_that_is_no_folder_is_told_so() -> None:
    one_error(compress("verify", "me/nothing-here"), 1, "no folder me/nothing-here, and the hub cannot be reached")


def test_the_dense_model_is_fetched_from_the_hub_at_the_commit_that_the_report_names(
    hub: Hub, release: Path, job: Job
) -> None:
    from compress.models.sources import resolve
    from compress.report.build import finish

    hub.repos["org/dense"] = Repo(False, {p.name: p.read_bytes() for p in job.model.iterdir()})
    origin = dict(resolve("org/dense").origin)
    assert origin == {"hub": "org/dense", "revision": hub.repos["org/dense"].sha}
    report = json.loads((release / "report.json").read_text())
    del report["bench"]
    report["origin"] = origin
    finish(report)
    (release / "seal.json").unlink()
    (release / "report.json").write_text(json.dumps(report))

    def found() -> dict[str, dict[str, str]]:
        ran = compress("verify", release, "--measure", "--json")
        assert ran.code == 0, ran.err
        return {c["claim"]: c for c in json.loads(ran.out)["claims"]}

    cache = Path(str(resolve("org/dense").folder)).parents[1]
    shutil.rmtree(cache)
    hub.asked.clear()
    there = found()
    assert there["the dense model"]["verdict"] == there["perplexity, first text, dense"]["verdict"] == "holds"
    assert any("org/dense" in asked and origin["revision"] in asked for asked in hub.asked)
    del hub.repos["org/dense"]
    shutil.rmtree(cache)
    gone = found()["the dense model"]
    assert gone["verdict"] == "cannot be checked here" and "org/dense" in gone["reason"]
