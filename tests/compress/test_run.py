"""The run folder: whole stages or none, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.run import Journal, Run, verify_seal


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("a")


def test_peak_memory_is_the_process_s_own_and_not_its_parent_s() -> None:
    # The outer process holds 600 MB when it starts the inner one, which holds 60 MB of its own.
    inner = "held = bytearray(60_000_000); from compress.run import peak_rss; print(peak_rss())"
    outer = (
        "import subprocess, sys; held = bytearray(600_000_000);"
        f"print(subprocess.run([sys.executable, '-c', {inner!r}], capture_output=True, text=True, check=True).stdout)"
    )
    found = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True, check=True)
    assert 60e6 < int(found.stdout) < 400e6


def test_a_sealed_stage_is_not_built_again(tmp_path: Path) -> None:
    built = []
    for _ in range(2):
        with Run.open(tmp_path / "run") as run:
            run.stage("x/y", {"k": 1}, lambda f: (fill(f), built.append(1)))
    assert built == [1]
    assert verify_seal(tmp_path / "run" / "x" / "y") == 1


def test_a_changed_input_is_named_and_refused_and_fresh_forgets(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        run.stage("plan", {"weights": "aaa", "recipe": {"sparsity": 0.5}}, fill)
        with pytest.raises(CompressError, match=r"recipe\.sparsity was 0\.5, now 0\.4") as error:
            run.stage("plan", {"weights": "aaa", "recipe": {"sparsity": 0.4}}, fill)
        assert "--fresh" in error.value.fix
    with Run.open(tmp_path / "run", fresh=True) as run:
        run.stage("plan", {"weights": "aaa", "recipe": {"sparsity": 0.4}}, fill)


def test_a_failed_build_leaves_no_stage(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise ValueError("no")

    with Run.open(tmp_path / "run") as run:
        with pytest.raises(ValueError, match="no"):
            run.stage("plan", {}, broken)
        assert not run.is_sealed("plan") and not (run.folder / "plan").exists()
    with Run.open(tmp_path / "run") as run:
        assert not list(run.folder.glob(".plan*")), "what was half made is cleared away"


def test_a_kill_in_the_middle_leaves_no_stage(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from compress.run import Run\n"
        "def build(f):\n    (f / 'half').write_text('half'); print('here', flush=True); time.sleep(60)\n"
        f"with Run.open(Path({str(tmp_path / 'run')!r})) as run:\n"
        "    run.stage('first', {}, lambda f: (f / 'a').write_text('a'))\n    run.stage('second', {}, build)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"here\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Run.open(tmp_path / "run") as run:
        assert run.is_sealed("first") and not run.is_sealed("second")
        run.stage("second", {}, fill)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    twice = pytest.raises(CompressError, match=f"another run holds this folder .process {os.getpid()}")
    with Run.open(tmp_path / "run"), twice, Run.open(tmp_path / "run"):
        raise AssertionError("both got in")
    with Run.open(tmp_path / "run"):
        pass  # the lock is free again


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        folder = run.stage("plan", {}, fill)
    (folder / "a.txt").write_text("b")
    with pytest.raises(CompressError, match="changed"):
        verify_seal(folder)


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CompressError, match="not made by compress"), Run.open(tmp_path, fresh=True):
        raise AssertionError("it was opened")
    assert (tmp_path / "thesis.txt").exists()


def test_an_unwritable_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressError, match="cannot be written"), Run.open(tmp_path / "file" / "run"):
        raise AssertionError("it was opened")


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with Run.open(disk / "run") as run:
            first = run.stage("first", {}, fill)
            with pytest.raises(CompressError, match="disk is full") as error:
                run.stage("second", {}, lambda f: (f / "big").write_bytes(b"x" * 1_000_000))
            assert "goes on behind the last whole stage" in error.value.fix
            assert verify_seal(first) == 1 and not run.is_sealed("second")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_journal_drops_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    journal = Journal(path)
    journal.append({"kl": 0.1})
    journal.append({"kl": 0.2})
    path.write_bytes(path.read_bytes()[:-4])
    again = Journal(path)
    assert again.rows() == [{"kl": 0.1}]
    again.append({"kl": 0.3})
    assert Journal(path).rows() == [{"kl": 0.1}, {"kl": 0.3}]


def test_stages_add_up_their_blocks(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        for i in range(3):
            run.stage(f"supernet/block-{i}", {"block": i}, lambda f: (fill(f), time.sleep(0.02)))
        (row,) = run.stages()
    assert row["name"] == "supernet" and row["bytes"] == 3 and row["seconds"] >= 0.06
