"""Whole files and what is said of a disk: never half of one, one error whoever says it."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.run.folder import AGAIN, Run
from compress.system import files
from compress.system.files import DiskFull, disk_errors, settle, whole_file, write_whole

ROOT = Path(__file__).parents[2]


def test_a_file_has_its_name_when_it_is_whole_and_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    path = tmp_path / "new" / "a.json"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert not path.exists() and partial.parent == path.parent and partial.name.startswith(".")
        partial.write_text("whole")
    assert path.read_text() == "whole" and [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert done == ["sync", "rename", "sync"]  # the bytes, the name, the folder's list of names


def test_an_error_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(ValueError), whole_file(path) as partial:
        partial.write_text("half")
        raise ValueError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_a_kill_leaves_is_no_file_and_is_removed_after_a_day(tmp_path: Path) -> None:
    path = tmp_path / "a.[json]"
    code = (
        "import os, signal, sys; from pathlib import Path; from compress.system.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert not path.exists() and left.read_text() == "half"
    mine = tmp_path / ".a.[json].notes.partial"
    mine.write_text("not ours")
    write_whole(path, "whole")
    assert left.exists(), "another process may be writing it"
    for old in (left, mine):
        os.utime(old, (0, 0))
    write_whole(path, "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name, path.name]


def test_of_two_writers_neither_writes_into_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with whole_file(path) as one:
        with whole_file(path) as other:
            other.write_text("second")
        one.write_text("first")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "a").write_text("a")
    (made / "link").symlink_to("/nowhere")
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    settle(made, tmp_path / "out")
    assert {p.relative_to(tmp_path).as_posix() for p in synced} == {"made", "made/deep", "made/deep/a", "."}
    assert synced[-1] == tmp_path and (tmp_path / "out" / "deep" / "a").read_text() == "a"


def fails(error: Exception) -> Callable[[Path], None]:
    def raising(_: Path) -> None:
        raise error

    return raising


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full ("),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full ("),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full ("),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written: Permission denied"),
    ],
)
def test_one_error_whoever_says_it(error: Exception, said: str, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none" / "a"):
        for every in (True, False):
            with pytest.raises(CompressError) as caught, disk_errors(place, every=every):
                raise error
            assert said in caught.value.what and caught.value.where == str(place) and caught.value.fix
    with pytest.raises(CompressError) as caught, Run.open(tmp_path / "run") as run:
        run.stage("plan", {}, fails(error))
    assert said in caught.value.what
    assert (caught.value.fix == AGAIN) == isinstance(caught.value, DiskFull)


def test_an_error_that_is_none_of_the_disks_is_left_as_it_is(tmp_path: Path) -> None:
    for error in (ValueError("no"), FileNotFoundError(errno.ENOENT, "No such file")):
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path, every=False):
            raise error
        assert caught.value is error
    with pytest.raises(CompressError, match="cannot be written: Not a directory"), disk_errors(tmp_path):
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory")


def test_a_file_elsewhere_that_may_not_be_read_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="cannot be opened") as caught, disk_errors(tmp_path / "run", every=False):
        raise PermissionError(errno.EACCES, "Permission denied", "/models/weights.safetensors")
    assert caught.value.where == "/models/weights.safetensors"


# These run alone on a device, where nothing of ours is.
ALONE = {"export/bench/receiver.py", "export/runtimes.py"}


def test_nothing_else_renames_or_syncs_or_knows_what_a_full_disk_says() -> None:
    found = set()
    for folder in ("compress", "recipes", "models", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            at = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                name = node.attr if isinstance(node, ast.Attribute) else ""
                call = node.func if isinstance(node, ast.Call) else None
                # Path.replace takes one argument, str.replace two.
                renames = isinstance(call, ast.Attribute) and call.attr == "replace" and len(node.args) == 1  # type: ignore[attr-defined]
                if name in ("fsync", "ENOSPC", "EDQUOT", "EROFS", "EACCES") or renames:
                    found.add(at)
    links = {f"compress/{name}" for name in ("recipes", "models", "exporters")}
    found = {at for at in found if not any(at.startswith(link) for link in links)}
    assert found <= {"compress/system/files.py", "compress/run/lock.py", *ALONE}, found
