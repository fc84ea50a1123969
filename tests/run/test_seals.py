"""Seals: what was sealed is what is there, whoever or whatever has been at it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError
from compress.run.folder import Run
from compress.run.seals import SEAL, check_sealed, read_seal, read_stamped, seal_hash, seal_text, stamped, verify_seal


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("some text")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "b.bin").write_bytes(bytes(range(256)))


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    with Run.open(tmp_path / "run") as run:
        return run.stage("plan", {"weights": "aaa", "share": 0.5, "none": None, "é": float("inf")}, fill)


def again(stage: Path) -> None:
    """What the next command does with the run."""
    with Run.open(stage.parent) as run:
        run.stage("plan", {"weights": "aaa", "share": 0.5, "none": None, "é": float("inf")}, lambda _: None)


def damage(path: Path, at: int, bit: int) -> bytes:
    before = path.read_bytes()
    path.write_bytes(before[:at] + bytes([before[at] ^ 1 << bit]) + before[at + 1 :])
    return before


def test_what_was_sealed_is_taken_as_it_is(stage: Path) -> None:
    again(stage)
    assert verify_seal(stage) == 2
    assert seal_hash(stage) == seal_hash(stage)


def test_any_bit_of_a_seal_that_flips_is_noticed_by_the_next_command(stage: Path) -> None:
    path = stage / SEAL
    every = [(at, bit) for at in range(path.stat().st_size) for bit in range(8)]
    for at, bit in random.Random(1).sample(every, 400):
        before = damage(path, at, bit)
        with pytest.raises(CompressError) as said:
            again(stage)
        assert said.value.where == str(path), (at, bit, said.value)
        path.write_bytes(before)
    again(stage)


def test_any_bit_of_a_sealed_file_that_flips_is_noticed_by_the_next_command(stage: Path) -> None:
    for name in ("a.txt", "deep/er/b.bin"):
        path = stage / name
        for at in range(0, path.stat().st_size, 5):
            before = damage(path, at, at % 8)
            with pytest.raises(CompressError, match="changed since it was written") as said:
                again(stage)
            assert said.value.where == str(path)
            path.write_bytes(before)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a file is gone": (lambda f: (f / "a.txt").unlink(), "a.txt", "missing"),
    "a file is cut": (lambda f: os.truncate(f / "a.txt", 3), "a.txt", "changed"),
    "a file is empty": (lambda f: os.truncate(f / "deep/er/b.bin", 0), "deep/er/b.bin", "changed"),
    "a folder stands for a file": (
        lambda f: ((f / "a.txt").unlink(), (f / "a.txt").mkdir()),
        "a.txt",
        "no file any more",
    ),
    "a file stands for a folder": (
        lambda f: ((f / "deep").rename(f.parent / "deep"), (f / "deep").touch()),
        "deep/er/b.bin",
        "missing",
    ),
    "a pipe stands for a file": (
        lambda f: ((f / "a.txt").unlink(), os.mkfifo(f / "a.txt")),
        "a.txt",
        "no file any more",
    ),
    "a link leads nowhere": (
        lambda f: ((f / "a.txt").unlink(), (f / "a.txt").symlink_to("gone")),
        "a.txt",
        "missing",
    ),
    "a link leads in a circle": (
        lambda f: ((f / "a.txt").unlink(), (f / "a.txt").symlink_to("a.txt")),
        "a.txt",
        "cannot be read",
    ),
    "a file more": (lambda f: (f / "deep/er/c.safetensors").touch(), "deep/er/c.safetensors", "not sealed with"),
    "a hidden file more": (lambda f: (f / ".c").write_text("c"), ".c", "not sealed with"),
    "a linked folder more": (lambda f: (f / "more").symlink_to(f.parent), "more", "not sealed with"),
    "the seal is gone": (lambda f: (f / SEAL).unlink(), SEAL, "missing"),
    "the seal is a folder": (lambda f: ((f / SEAL).unlink(), (f / SEAL).mkdir()), SEAL, "no file"),
    "the seal is empty": (lambda f: os.truncate(f / SEAL, 0), SEAL, "no JSON"),
    "the seal is another stage's": (
        lambda f: (f / SEAL).write_text(seal_text({**without_hash(f), "stage": "final"})),
        "",
        "another stage, 'final'",
    ),
    "the stage is a file": (lambda f: (f.rename(f.parent / "gone"), f.touch()), "", "a link or a file"),
    "the stage is a link": (lambda f: (f.rename(f.parent / "gone"), f.symlink_to("gone")), "", "a link or a file"),
}


def without_hash(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in read_seal(folder).items() if k != "sha256"}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_with_a_stage_is_named_before_it_is_built_on(name: str, stage: Path) -> None:
    do, place, word = DAMAGES[name]
    do(stage)
    with pytest.raises(CompressError, match=word) as said:
        again(stage)
    assert said.value.where == str(stage / place) and said.value.fix


SEALS: dict[str, tuple[str, str]] = {
    "[]": ("the whole", "a list, not an object"),
    "{}": ("'stage'", "missing"),
    "null": ("the whole", "null"),
    '"x"': ("the whole", "a text"),
    "1e3": ("the whole", "a number"),
    "files: null": ("'files'", "null, not an object"),
    "files: []": ("'files'", "a list"),
    'files: {"a.txt": 1}': ("'files.a.txt'", "a whole number, not an object"),
    'files: {"a.txt": {"bytes": 1}}': ("'files.a.txt.sha256'", "missing"),
    'files: {"a.txt": {"bytes": true, "sha256": "x"}}': ("'files.a.txt.bytes'", "true or false"),
    'files: {"a.txt": {"bytes": 9, "sha256": 5}}': ("'files.a.txt.sha256'", "a whole number, not a text"),
    'files: {"a.txt": {"bytes": 9, "sha256": "abc"}}': ("'files.a.txt'", "no SHA-256"),
    "inputs: 3": ("'inputs'", "a whole number, not an object"),
    'stage: ["plan"]': ("'stage'", "a list, not a text"),
    'seconds: "long"': ("'seconds'", "a text, not a number"),
    "sha256: null": ("'sha256'", "null, not a text"),
}


def with_field(folder: Path, text: str) -> str:
    key, colon, value = text.partition(": ")
    if not colon or text.startswith("{"):
        return text
    return json.dumps(read_seal(folder) | {key: json.loads(value)})


@pytest.mark.parametrize("text", SEALS)
def test_a_seal_that_is_none_is_one_error_with_its_file_and_field(text: str, stage: Path) -> None:
    (stage / SEAL).write_text(with_field(stage, text))
    for read in (read_seal, verify_seal, seal_hash, again):
        with pytest.raises(CompressError) as said:
            read(stage)
        # Not --fresh: it cannot tell what is whose where the seal is none.
        assert said.value.where == str(stage / SEAL) and "delete the stage's folder" in said.value.fix
        assert all(word in said.value.what for word in SEALS[text]), said.value.what


def test_a_seal_with_a_key_twice_or_of_bytes_that_are_no_text_is_refused(stage: Path) -> None:
    whole = (stage / SEAL).read_text()
    twice = whole.replace('"files": {', '"files": {}, "files": {', 1)
    for raw, word in (
        (twice.encode(), "'files' twice"),
        (b'{"files":{"\xe9":1}}', "not UTF-8"),
        (whole.encode("utf-16"), "not UTF-8"),
        (b"[" * 10_000, "nests"),
        (whole.replace('"peak_rss_bytes": ', '"peak_rss_bytes": ' + "9" * 200, 1).encode(), "digits"),
    ):
        (stage / SEAL).write_bytes(raw)
        with pytest.raises(CompressError, match=word):
            again(stage)


@pytest.mark.parametrize(
    "name", ["../out.txt", "/etc/hosts", "deep/../a.txt", "./a.txt", "a\\b", "a\0b", "", "deep//b", SEAL]
)
def test_a_seal_names_files_of_its_own_folder_alone(name: str, stage: Path) -> None:
    facts = without_hash(stage)
    facts["files"] = {name: {"bytes": 1, "sha256": "0" * 64}}
    (stage / SEAL).write_text(seal_text(facts))
    with pytest.raises(CompressError, match="outside its folder"):
        read_seal(stage)


def test_names_that_no_file_can_have_are_not_looked_for(stage: Path) -> None:
    from compress.run.seals import inside

    assert inside("deep/er/b.bin") and inside("a" * 255) and inside("/".join("ab" * 300)[:999])
    for name in ("a" * 256, "é" * 128, "/".join("a" * 600), "x/" + "b" * 300):
        assert not inside(name)


def test_a_reports_facts_of_files_that_are_none_are_claims_that_do_not_hold(tmp_path: Path) -> None:
    from compress.claims.verify import FAILS, _compare

    (tmp_path / "a").touch()
    for facts in (1, None, [], {}, {"bytes": 0}, {"bytes": True, "sha256": "x"}, {"bytes": 0, "sha256": 5}):
        (claim,) = _compare(tmp_path, {"a": facts}, "", "report.json")
        assert claim.verdict == FAILS and "no size and hash" in claim.reason


def test_a_seal_of_an_earlier_version_is_refused_for_its_lack_of_a_hash(stage: Path) -> None:
    (stage / SEAL).write_text(json.dumps(without_hash(stage), indent=1) + "\n")
    with pytest.raises(CompressError, match="'sha256' is missing"):
        again(stage)


def test_a_file_is_hashed_once_however_many_names_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.run import seals

    def build_both() -> list[str]:
        hashed: list[str] = []
        real = seals.sha256_of
        with monkeypatch.context() as patch:
            patch.setattr(seals, "sha256_of", lambda path: (hashed.append(path.name), real(path))[1])
            with Run.open(tmp_path / "run") as run:
                for _ in range(2):
                    a = run.stage("model", {}, fill) / "a.txt"
                    run.stage("release", {}, lambda f, a=a: os.link(a, f / "linked.txt"))  # type: ignore[misc]
        return hashed

    assert build_both() == [], "what was just sealed need not be read again"
    assert sorted(build_both()) == ["a.txt", "b.bin"]


def test_what_may_never_be_read_is_hashed_when_it_is(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        stage = run.stage("supernet-1/block-000", {}, fill, read=False)
    damage(stage / "a.txt", 3, 1)
    with Run.open(tmp_path / "run") as run:
        assert run.stage("supernet-1/block-000", {}, fill, read=False) == stage
        with pytest.raises(CompressError, match="changed"):
            run.check(stage)
        os.truncate(stage / "a.txt", 2)
        with pytest.raises(CompressError, match="changed"):  # sizes and what there is are looked at always
            run.stage("supernet-1/block-000", {}, fill, read=False)


def test_files_more_are_no_matter_where_that_is_said(stage: Path) -> None:
    (stage / ".gitattributes").touch()
    assert verify_seal(stage, strangers=False) == 2
    check_sealed(stage, read_seal(stage), None, strangers=False)


def test_a_stamped_text_comes_back_and_any_other_does_not(tmp_path: Path) -> None:
    path, text = tmp_path / "recipe.lock.yaml", "recipe: {method: tyr}\nname: é\n"
    path.write_text(stamped(text))
    assert read_stamped(path, "the lock", "mend") == text
    for at in range(path.stat().st_size):
        before = damage(path, at, at % 8)
        with pytest.raises(CompressError, match="the lock"):
            read_stamped(path, "the lock", "mend")
        path.write_bytes(before)
    for raw in (b"", text.encode(), stamped(text).encode() + b"more: 1\n", b"\xff"):
        path.write_bytes(raw)
        with pytest.raises(CompressError, match="the lock"):
            read_stamped(path, "the lock", "mend")
