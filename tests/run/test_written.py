"""What verbs leave behind: all or nothing, and one error that says why."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from compress.errors import CompressError, UsageError
from compress.run import lock
from compress.run.written import MARK, append, is_ours, refuse_replacing, whole, written
from compress.system.files import disk_errors


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
    with pytest.raises(CompressError, match="the disk is full"), written(disk / "out") as beside, disk_errors(disk):
        np.zeros(100_000).tofile(beside / "large.bin")  # how the weights of an ONNX file are written
    assert [p.name for p in disk.iterdir()] == ["log.md"] and (disk / "log.md").read_text() == "before\n"
    append(disk / "log.md", "after\n")
    assert (disk / "log.md").read_text() == "before\nafter\n"


def test_without_text_it_is_only_found_out_whether_a_file_can_be_written(tmp_path: Path) -> None:
    append(tmp_path / "new.md", "")
    assert not list(tmp_path.iterdir())


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """All that stands in a folder."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def test_a_folder_appears_by_one_rename_when_the_block_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with whole(out) as made:
        (made / "x").write_text("x")
        (made / "sub").mkdir()
        assert not out.exists()
    assert tree(tmp_path) == {"a": None, "a/out": None, "a/out/x": b"x", "a/out/sub": None}
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with whole(tmp_path / "link") as made:
        (made / "y").write_text("y")
    assert (tmp_path / "empty" / "y").read_text() == "y" and (tmp_path / "link").is_symlink()


def test_an_error_leaves_nothing_and_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(CompressError) as caught, whole(out) as made:
        (made / "half").write_text("half")
        raise CompressError(f"{made / 'half'} is wrong", where=str(made / "half"))
    assert (caught.value.what, caught.value.where) == (f"{out}/half is wrong", f"{out}/half")
    assert not tree(tmp_path)


def strangers(partial: Path) -> dict[str, Callable[[], object]]:
    """Things of a user's that stand where ours would be made."""

    def folder(**files: str) -> None:
        partial.mkdir()
        for name, text in files.items():
            (partial / name).write_text(text)

    holder = lock.MARK.decode() + '{"process": 1, "host": "h", "started": "1"}'
    return {
        "a file": lambda: partial.write_text("mine"),
        "an empty folder": folder,
        "a folder": lambda: folder(thesis="years"),
        "a link to a folder": lambda: (folder(thesis="years"), partial.rename(partial.parent / "away"),
                                       partial.symlink_to("away")),
        "a link to nothing": lambda: partial.symlink_to("nowhere"),
        "an empty mark": lambda: folder(**{MARK: ""}),
        "a mark with words of another's": lambda: folder(**{MARK: holder[1:], "out": "x"}),
        "a mark of another's": lambda: folder(**{MARK: '["process", "host"]', "out": "x"}),
        "our mark beside what is not ours": lambda: folder(**{MARK: holder, "thesis": "years"}),
        "a mark that is a folder": lambda: (partial / MARK).mkdir(parents=True),
        "a mark that is a link": lambda: (folder(), (partial.parent / "m").write_text(holder),
                                          (partial / MARK).symlink_to("../m")),
    }  # fmt: skip


@pytest.mark.parametrize("what", strangers(Path()))
def test_what_stands_where_ours_is_made_and_is_not_ours_is_left_alone(what: str, tmp_path: Path) -> None:
    strangers(tmp_path / ".out.partial")[what]()
    before = tree(tmp_path)
    said = r"\.out\.partial is in the way, and was not made by compress"
    with pytest.raises(CompressError, match=said), whole(tmp_path / "out"):
        raise AssertionError("the work has begun")
    assert tree(tmp_path) == before


def test_what_a_killed_process_left_is_removed_the_next_time(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from compress.run.written import whole\n"
        "with whole(Path(sys.argv[1])) as made:\n"
        "    (made / 'half').write_text('half'); (made / 'deep').mkdir(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
    assert done.returncode == -signal.SIGKILL
    assert f".out.partial/{MARK}" in tree(tmp_path) and ".out.partial/out/half" in tree(tmp_path)
    with whole(tmp_path / "out") as made:
        (made / "x").write_text("x")
    assert tree(tmp_path) == {"out": None, "out/x": b"x"}


def test_of_two_that_write_one_folder_the_second_is_told_so(tmp_path: Path) -> None:
    with whole(tmp_path / "out") as made:
        (made / "x").write_text("first")
        code = (
            "import sys; from pathlib import Path; from compress.run.written import whole\n"
            "with whole(Path(sys.argv[1])) as made: (made / 'x').write_text('second')\n"
        )
        for place in (tmp_path / "out", tmp_path / "." / "out"):
            done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True)
            said = f"another process is writing this folder (process {os.getpid()} on "
            assert done.returncode == 1 and said in done.stderr, done.stderr
    assert tree(tmp_path) == {"out": None, "out/x": b"first"}


def test_what_came_into_the_place_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="cannot be written"), whole(tmp_path / "out") as made:
        (made / "x").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
    assert tree(tmp_path) == {"out": None, "out/mine": b"kept"}


def test_a_place_that_cannot_be_taken_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "here").mkdir()
    (tmp_path / "ring").symlink_to("ring")
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    for place, kind, said in (
        (tmp_path / "file", UsageError, "no folder"),
        (tmp_path / "ring", UsageError, "no folder"),
        (Path("/dev/null"), UsageError, "no folder"),
        (tmp_path / "full", UsageError, "not empty"),
        (Path("/"), UsageError, "not empty"),
        (Path("."), UsageError, "cannot be replaced"),
        (tmp_path / "here", UsageError, "cannot be replaced"),
        (tmp_path / "file" / "sub", CompressError, "cannot be written"),
        (tmp_path / ("n" * 300), CompressError, "cannot be written"),
        (Path("/proc/x"), CompressError, "cannot be written"),
    ):
        with pytest.raises(kind, match=said) as caught, whole(place):
            raise AssertionError("the work has begun")
        assert caught.value.where == str(place)
    assert tree(tmp_path) == before


def test_a_disk_that_is_mounted_is_not_replaced_and_one_that_fills_up_is_said(disk: Path) -> None:
    with pytest.raises(UsageError, match="cannot be replaced"), whole(disk):
        raise AssertionError("the work has begun")
    with pytest.raises(CompressError, match="the disk is full"), whole(disk / "out") as made:
        (made / "large.bin").write_bytes(bytes(100_000))
    with pytest.raises(CompressError, match="the disk is full"), whole(disk / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert not list(disk.iterdir())


OWN = {
    "gate.json": '{"budgets": [], "exit_code": 0}',
    "junit.xml": '<?xml version="1.0"?>\n<testsuites name="compress gate" tests="1"></testsuites>',
    "summary.md": "## compress gate: pass\n",
    "README.md": "---\n---\nthe raw samples are in `report.json`\n`compress verify FOLDER_OR_ID` checks\n",
    "report.html": '<script id="charts"></script><footer>report.json 01</footer>',
}


@pytest.mark.parametrize("name", [*OWN, "gate.png", "notes.txt"])
def test_a_file_of_the_users_is_never_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("my own words on compress verify and report.json")
    before = tree(tmp_path)
    said = f"there is a {name} already"
    with pytest.raises(UsageError, match=said), written(tmp_path, (name,), refuse_replacing):
        raise AssertionError("the work has begun")
    # What it would write was not known before.
    with pytest.raises(UsageError, match=said), written(tmp_path, (), refuse_replacing) as beside:
        (beside / name).write_text("ours")
    assert tree(tmp_path) == before


def test_what_we_wrote_is_written_anew_with_the_pictures_beside_it(tmp_path: Path) -> None:
    for name, text in OWN.items():
        (tmp_path / name).write_text(text)
        assert is_ours(tmp_path / name)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "size.png").write_bytes(b"old")
    with written(tmp_path, OWN, refuse_replacing) as beside:
        shutil.copytree(tmp_path / "plots", beside / "plots")
        (beside / "plots" / "size.png").write_bytes(b"new")
        (beside / "README.md").write_text("new")
    assert (tmp_path / "plots" / "size.png").read_bytes() == b"new" and (tmp_path / "README.md").read_text() == "new"
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("report.html")
    assert not is_ours(tmp_path / "README.md")
