"""The lock of a run folder: one holder, and none left behind by a crash."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.run import lock as module
from compress.run.lock import Lock
from compress.system import host

HOLDER = """
import sys, time
from pathlib import Path
from compress.run.lock import Lock
Lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".lock"


def other(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not pass the kernel's lock on. None can be mounted in a test: its answer stands in."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)


def held_elsewhere(path: Path, age: float) -> None:
    path.parent.mkdir()
    path.write_text(module.MARK.decode() + json.dumps({"process": 77, "host": "another-machine", "started": "1"}))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_second_holder_is_refused_with_the_first_ones_name(path: Path) -> None:
    process = other(path)
    with pytest.raises(CompressError, match=f"process {process.pid} on "):
        Lock.take(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    Lock.take(path).release()  # at once: the kernel's lock went with the process


def test_it_can_be_taken_again_when_it_was_released(path: Path) -> None:
    Lock.take(path).release()
    Lock.take(path).release()


@pytest.mark.parametrize("flock", [True, False])
def test_another_machine_that_shows_life_is_respected(path: Path, flock: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # With flock too: a network file system may grant it on two machines at once.
    if not flock:
        no_flock(monkeypatch)
    held_elsewhere(path, module.STALE_SECONDS - 10)
    with pytest.raises(CompressError, match="process 77 on another-machine"):
        Lock.take(path)
    assert [p.name for p in path.parent.iterdir()] == [".lock"]


@pytest.mark.parametrize("flock", [True, False])
def test_another_machine_that_crashed_is_not_waited_for(
    path: Path, flock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flock:
        no_flock(monkeypatch)
    held_elsewhere(path, module.STALE_SECONDS + 10)
    Lock.take(path).release()


def test_without_the_kernels_lock_the_process_table_decides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = other(path)
    no_flock(monkeypatch)
    with pytest.raises(CompressError, match=f"process {process.pid} on "):
        Lock.take(path)
    process.kill()
    process.wait()
    Lock.take(path).release()


def test_the_holder_shows_life(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    held = Lock.take(path)
    os.utime(path, (0, 0))
    late = time.monotonic() + 10
    while path.stat().st_mtime == 0 and time.monotonic() < late:
        time.sleep(0.01)
    assert time.time() - path.stat().st_mtime < 60
    held.release()


def test_a_lock_file_that_a_crash_cut_short_is_no_obstacle(path: Path) -> None:
    path.parent.mkdir()
    mark = module.MARK.decode()
    for left in ("", mark[:20], mark, mark + '{"process": 7', mark + "[1]", mark + '{"process": "x", "host": 3}'):
        path.write_text(left)
        Lock.take(path).release()
        assert path.read_text() == mark, "what marks the folder stays"


@pytest.mark.parametrize("kind", ["empty", "other words", "link", "dangling link", "pipe", "folder"])
def test_a_lock_file_of_something_else_is_not_taken_for_ours(kind: str, path: Path) -> None:
    path.parent.mkdir()
    (path.parent / "thesis.txt").write_text("years of work")
    elsewhere = path.parent.parent / "elsewhere"
    if kind == "other words":
        path.write_text("locked by an editor\n" + module.MARK.decode())
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif "link" in kind:
        path.symlink_to(elsewhere)
        if kind == "link":
            elsewhere.write_bytes(module.MARK)
    else:
        path.touch()
    before = path.lstat()
    with pytest.raises(CompressError, match="not made by compress"):
        Lock.take(path)
    assert path.lstat().st_mtime_ns == before.st_mtime_ns and path.lstat().st_size == before.st_size
    assert elsewhere.exists() == (kind == "link")


def test_the_mark_is_there_whenever_another_process_looks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for owner, name in ((host, "write_at"), (os, "ftruncate")):
        real = getattr(owner, name)

        def looked(*given: object, real: Callable[..., object] = real) -> object:
            done = real(*given)
            seen.append(path.read_bytes())
            return done

        monkeypatch.setattr(owner, name, looked)
    Lock.take(path).release()
    Lock.take(path).release()
    assert len(seen) >= 6 and all(text.startswith(module.MARK) for text in seen)
