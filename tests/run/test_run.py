"""The run folder: whole stages or none, whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.run.folder import Journal, Run, verify_seal


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("a")


def test_peak_memory_is_the_process_s_own_and_not_its_parent_s() -> None:
    # The outer process holds 600 MB when it starts the inner one, which holds 60 MB of its own.
    inner = "held = bytearray(60_000_000); from compress.system.host import peak_memory; print(peak_memory())"
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


def test_a_stage_of_a_run_beside_is_linked_where_its_inputs_are_the_same(tmp_path: Path) -> None:
    with Run.open(tmp_path / "a") as run:
        run.stage("plan/block-0", {"weights": "aaa"}, fill)
        run.stage("final", {"weights": "aaa"}, fill)
    with Run.open(tmp_path / "b", beside=[tmp_path / "none", tmp_path / "a"]) as run:
        assert not run.is_sealed("plan/block-0") and not run.is_sealed("plan/block-0", {"weights": "bbb"})
        assert run.is_sealed("plan/block-0", {"weights": "aaa"})
        run.stage("plan/block-0", {"weights": "aaa"}, never)
        run.stage_together("final", {"weights": "aaa"}, never)
        for name in ("plan/block-0", "final"):
            for file in (tmp_path / "a" / name).iterdir():
                assert file.samefile(tmp_path / "b" / name / file.name)
        with pytest.raises(CompressError, match="made from other inputs"):
            run.stage("final", {"weights": "bbb"}, fill)
        assert not (tmp_path / "b" / ".building").exists()
    with Run.open(tmp_path / "c", beside=[tmp_path / "a"]) as run:  # made here where they differ
        assert not (run.stage("final", {"weights": "bbb"}, fill) / "seal.json").samefile(tmp_path / "a/final/seal.json")


def test_a_stage_that_was_damaged_beside_is_named_and_not_taken(tmp_path: Path) -> None:
    with Run.open(tmp_path / "a") as run:
        held = run.stage("plan", {}, fill)
    file = next(path for path in held.iterdir() if path.name != "seal.json")
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with Run.open(tmp_path / "b", beside=[tmp_path / "a"]) as run:
        with pytest.raises(CompressError, match="was changed since") as error:
            run.stage("plan", {}, fill)
        assert error.value.where == str(file) and not (tmp_path / "b" / "plan").exists()


def never(_: Path | None) -> None:
    raise AssertionError("it was built again")


def test_a_failed_build_leaves_no_stage(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise ValueError("no")

    with Run.open(tmp_path / "run") as run:
        with pytest.raises(ValueError, match="no"):
            run.stage("plan", {}, broken)
        assert not run.is_sealed("plan") and not (run.folder / "plan").exists()
    with Run.open(tmp_path / "run") as run:
        assert not list(run.folder.rglob("*plan*")), "what was half made is cleared away"


def test_a_kill_in_the_middle_leaves_no_stage(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from compress.run.folder import Run\n"
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


def finished(folder: Path) -> Path:
    with Run.open(folder) as run:
        run.stage("plan", {}, fill)
        run.stage("supernet-1/block-000", {}, lambda f: ((f / "deep").mkdir(), fill(f / "deep")))
        run.journal("search-1", "log.jsonl").append({"kl": 0.5})
    return folder


def everything(folder: Path) -> dict[str, bytes | str]:
    """Every path below a folder: a file's bytes, where a link leads."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else ""
        for p in folder.rglob("*")
    }


def test_fresh_forgets_all_that_runs_have_made_and_nothing_else_was_there(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (run / "recipe.lock.yaml").write_text("recipe: {}\n")
    (run / ".building" / "final.partial").mkdir(parents=True)
    fill(run / ".building" / "final.partial")
    (run / "supernet-1" / "block-001").mkdir()  # a kill came between the folder and the stage
    with Run.open(run, fresh=True):
        assert [p.name for p in run.rglob("*")] == [".lock"]


def foreign_places(run: Path, home: Path) -> dict[str, Callable[[], object]]:
    (home / "years.txt").write_text("years of work")

    def copied() -> None:
        shutil.copytree(run / "plan", run / "plan-as-it-was")

    def beside_a_broken_seal() -> None:
        (run / "plan" / "seal.json").write_text("{}")
        (run / "plan" / "notes.txt").write_text("mine")

    def folder_for_a_folder() -> None:
        (home / "a.txt").write_text("mine, of a name that a seal has")
        shutil.rmtree(run / "supernet-1/block-000/deep")
        (run / "supernet-1/block-000/deep").symlink_to(home)

    def file_to_folder() -> None:
        (run / "plan/a.txt").unlink()
        (run / "plan/a.txt").mkdir()
        (run / "plan/a.txt/mine.txt").write_text("mine")

    return {
        "notes.txt": lambda: (run / "notes.txt").write_text("mine"),
        ".x.partial": lambda: ((run / ".x.partial").mkdir(), (run / ".x.partial/keep.txt").write_text("mine")),
        "thesis/chapter.tex": lambda: ((run / "thesis").mkdir(), (run / "thesis/chapter.tex").write_text("mine")),
        "plan/mine.txt": lambda: (run / "plan/mine.txt").write_text("mine"),
        "supernet-1/mine.txt": lambda: (run / "supernet-1/mine.txt").write_text("mine"),
        "plan-as-it-was/": copied,
        "linked": lambda: (run / "linked").symlink_to(home),
        ".scratch/mine.txt": lambda: (run / ".scratch/mine.txt").write_text("mine"),
        ".scratch/linked": lambda: (run / ".scratch/linked").symlink_to(home),
        "plan/": beside_a_broken_seal,
        "supernet-1/block-000/deep": folder_for_a_folder,
        "plan/a.txt/mine.txt": file_to_folder,
        ".git/config": lambda: ((run / ".git").mkdir(), (run / ".git/config").write_text("mine")),
    }


@pytest.mark.parametrize("number", range(13))
def test_fresh_names_what_no_run_has_made_and_removes_nothing(number: int, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    run = finished(tmp_path / "run")
    places = foreign_places(run, home)
    assert len(places) == 13
    name, put = list(places.items())[number]
    put()
    before = everything(tmp_path)
    with pytest.raises(CompressError, match="what no run has made") as said, Run.open(run, fresh=True):
        raise AssertionError("it was opened")
    assert str(run / name) in said.value.what
    assert everything(tmp_path) == before


def test_without_fresh_what_is_somebody_elses_stays_where_it_is(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    run = finished(tmp_path / "run")
    places = foreign_places(run, home)
    for name in ("notes.txt", ".x.partial", "thesis/chapter.tex", "linked", ".git/config"):
        places[name]()
    (run / ".building").mkdir()
    (run / ".building" / "mine.txt").write_text("mine")
    (run / "supernet-1" / ".y.partial").mkdir()
    before = everything(tmp_path)
    with Run.open(run) as again:
        again.stage("plan", {}, fill)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", ".x.partial", "src/main.c"])
def test_a_lock_of_somebody_elses_makes_no_run_of_a_folder(name: str, tmp_path: Path) -> None:
    place = tmp_path / "proj" / name
    place.parent.mkdir(parents=True)
    place.write_text("years of work")
    (tmp_path / "proj" / ".lock").touch()
    before = everything(tmp_path)
    for fresh in (True, False):
        with pytest.raises(CompressError, match="not made by compress"), Run.open(tmp_path / "proj", fresh=fresh):
            raise AssertionError("it was opened")
    assert everything(tmp_path) == before


def test_a_run_reached_through_a_link_is_forgotten_and_the_link_stays(tmp_path: Path) -> None:
    run = finished(tmp_path / "disk" / "run")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with Run.open(tmp_path / "runs" / "run", fresh=True):
        assert [p.name for p in run.iterdir()] == [".lock"]
    assert (tmp_path / "runs").is_symlink()


class Fault(Exception):
    pass


def test_an_error_before_anything_was_made_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    def broken(_: Path) -> None:
        raise Fault

    def fails(folder: Path, *, journal: bool = False) -> None:
        with pytest.raises(Fault), Run.open(folder) as run:
            (run.folder / "recipe.lock.yaml").write_text("recipe: {}\n")
            made = run.journal("plan", "log.jsonl")
            if journal:
                made.append({"kl": 0.5})
            run.stage("plan", {}, broken)

    fails(tmp_path / "runs" / "deep" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    fails(tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []
    fails(tmp_path / "noted", journal=True)
    assert (tmp_path / "noted/.scratch/plan/log.jsonl").exists(), "what a long stage has noted is not lost"
    run = finished(tmp_path / "run")
    before = everything(run)
    fails(run.parent / "run" / "inner")  # a folder in a run's folder is nobody's run
    assert everything(run) == before
    with pytest.raises(Fault), Run.open(run) as again:
        again.stage("final", {}, broken)
    assert everything(run) == before, "an error in a later stage costs none before it"


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


def test_a_line_of_the_journal_that_was_changed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    journal = Journal(path)
    for i in range(4):
        journal.append({"kl": 0.1 * i, "genome": [i, 2], "phase": "é"})
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for at in range(len(whole) - 1):
        for bit in (at % 8, (at + 3) % 8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(CompressError, match=r"^line \d") as said:
                Journal(path)
            assert said.value.where == str(path) and "delete" in said.value.fix
    for keep in range(last, len(whole)):
        path.write_bytes(whole[:keep])
        assert Journal(path).rows() == journal.rows()[:3], "a cut last line is dropped"
    path.write_bytes(whole)
    assert Journal(path).rows() == journal.rows()


def test_stages_add_up_their_blocks(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        for i in range(3):
            run.stage(f"supernet/block-{i}", {"block": i}, lambda f: (fill(f), time.sleep(0.02)))
        (row,) = run.stages()
    assert row["name"] == "supernet" and row["bytes"] == 3 and row["seconds"] >= 0.06
