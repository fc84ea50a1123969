"""What verbs leave behind: all or nothing, and one error that says why."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.written import append, disk_errors, written


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_files_appear_together_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    (tmp_path / "out" / "a.txt").write_text("old")
    with written(tmp_path / "out") as beside:
        (beside / "plots").mkdir()
        (beside / "plots" / "b.png").write_bytes(b"b")
        (beside / "a.txt").write_text("new")
        assert (tmp_path / "out" / "a.txt").read_text() == "old"
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"mine.txt", "a.txt", "plots/b.png"} and (tmp_path / "out" / "a.txt").read_text() == "new"


def test_an_error_leaves_nothing_of_what_was_made(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError), written(tmp_path / "a" / "b") as beside:
        (beside / "half.txt").write_text("half")
        raise ValueError
    assert [p.name for p in tmp_path.rglob("*")] == ["mine.txt"]


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/x")):
        with pytest.raises(CompressError, match="cannot be written") as caught, written(place):
            raise AssertionError("the work has begun")
        assert caught.value.where == str(place)
    for place in (tmp_path, tmp_path / "none" / "s.md"):
        with pytest.raises(CompressError, match="cannot be written"):
            append(place, "text")
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]


def test_a_full_disk_is_said_and_left_as_it_was(disk: Path) -> None:
    (disk / "log.md").write_text("before\n")
    with pytest.raises(CompressError, match="the disk is full"), written(disk / "out") as beside, disk_errors(disk):
        (beside / "large.bin").write_bytes(bytes(100_000))
    with pytest.raises(CompressError, match="the disk is full"):
        append(disk / "log.md", "x" * 100_000)
    with pytest.raises(CompressError, match="the disk is full"):
        append(disk / "new.md", "x" * 100_000)
    assert [p.name for p in disk.iterdir()] == ["log.md"] and (disk / "log.md").read_text() == "before\n"
    append(disk / "log.md", "after\n")
    assert (disk / "log.md").read_text() == "before\nafter\n"


def test_without_text_it_is_only_found_out_whether_a_file_can_be_written(tmp_path: Path) -> None:
    append(tmp_path / "new.md", "")
    assert not list(tmp_path.iterdir())
