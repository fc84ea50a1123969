"""SIGKILL at random moments: what was started again ends with the same bytes as what was never disturbed."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests import forks
from tests.command import Job

KILLS_EACH = 7
RESULTS = ("plan/plan.safetensors", "plan/plan.json", "plan/search.json", "model/model.safetensors")


def run(job: Job, out: Path) -> None:
    import torch

    from tests.command import compress

    torch.set_num_threads(1)
    words = ("--set", "layouts=[per-layer]", "--until", "model")
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out, *words)
    assert ran.code == 0, ran.err


def started(job: Job, out: Path) -> forks.Process:
    process = forks.server.Process(target=run, args=(job, out))
    process.start()
    return process


def finish(job: Job, out: Path) -> None:
    process = started(job, out)
    process.join()
    assert process.exitcode == 0


def seals(out: Path) -> int:
    # os.walk, not rglob: folders vanish while it looks.
    return sum("seal.json" in files for _, _, files in os.walk(out))


def in_work(out: Path) -> str:
    """What a run was killed in."""
    partial = sorted(str(p.relative_to(out)) for p in out.rglob("*.partial"))
    return partial[0] if partial else f"behind {seals(out)} stages"


@pytest.mark.parametrize("folders", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(
    folders: int, job: Job, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    finish(job, whole)
    draw = random.Random(2)
    kills, places = 0, set()
    for attempt in range(folders):
        out = tmp_path / f"killed-{attempt}"
        # What was resumed is killed too, ever further on: behind so many seals, and a moment later.
        for wanted in sorted(draw.sample(range(seals(whole)), KILLS_EACH)):
            process = started(job, out)
            while process.exitcode is None and seals(out) < wanted:
                time.sleep(0.002)
            process.join(draw.choice((0.0, 0.02, 0.05, 0.1)) * draw.random())
            assert process.exitcode is None, "it ended before it could be killed"
            process.kill()
            process.join()
            kills += 1
            places.add(in_work(out) if out.exists() else "before the folder")
        finish(job, out)
        for name in RESULTS:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), (attempt, name, places)
        assert not list(out.rglob("*.partial")) and not list((out / ".scratch").iterdir())
    assert kills == folders * KILLS_EACH >= 7
    assert len(places) >= min(6, 3 + folders), places  # spread over the run


@pytest.mark.parametrize("moment", ["before the seal", "before the rename", "behind the rename"])
def test_killed_around_the_rename_a_stage_is_whole_or_not_there(moment: str, tmp_path: Path) -> None:
    from compress.run.folder import Run, verify_seal

    process = forks.server.Process(target=_dies, args=(tmp_path / "run", moment))
    process.start()
    process.join()
    assert process.exitcode == -9
    there = (tmp_path / "run" / "plan").exists()
    assert there == (moment == "behind the rename")
    with Run.open(tmp_path / "run") as again:
        folder = again.stage("plan", {"k": 1}, lambda f: (f / "a").write_text("a"))
        assert verify_seal(folder) == 1


def _dies(folder: Path, moment: str) -> None:
    import signal

    from compress.run import folder as module
    from compress.system import files

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "before the seal":
        module.sha256_of = die  # type: ignore[assignment]
    elif moment == "before the rename":
        Path.replace = die  # type: ignore[assignment,method-assign]
    else:
        sync = files.sync
        files.sync = lambda path: die() if path == folder else sync(path)
    with module.Run.open(folder) as run:
        run.stage("plan", {"k": 1}, lambda f: (f / "a").write_text("a"))
