"""SIGKILL of any of several processes at random moments of a whole run, each time gone on with by another number of
them: it ends with the bytes of what was never disturbed, and repeats no more than a block a kill."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests import ranks
from tests.command import Job
from tests.compress.test_kill import in_work, seals

KILLS = 54
RESULTS = (
    "plan/plan.safetensors", "plan/plan.json", "plan/search.json", "model/model.safetensors",
    "model-padded/model.safetensors", "evaluation-dense/evaluation.json", "evaluation-pruned/evaluation.json",
    "curve/curve.json", "export-dense/prefill.onnx", "export-pruned/decode.onnx",
)  # fmt: skip

pytestmark = pytest.mark.slow


def whole_run(job: Job, out: Path, counts: Path) -> None:
    """`compress prune` to the end; every block's elimination leaves a line in ``counts``."""
    from compress.processes import distributed
    from compress.recipes.tyr import supernet, walk
    from tests.command import compress

    def counted(*arguments: object, **named: object) -> object:
        if distributed.is_main():
            with counts.open("a") as file:
                file.write(f"{arguments[1]}\n")
        return supernet.prune_block(*arguments, **named)  # type: ignore[arg-type]

    walk.prune_block = counted  # type: ignore[assignment]
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out)
    assert ran.code == 0, ran.err


def ended(processes: list[ranks.Process], seconds: float) -> bool:
    late = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, late - time.monotonic()))
    return all(p.exitcode is not None for p in processes)


def test_any_process_killed_at_any_moment_costs_one_block_at_most(job: Job, tmp_path: Path) -> None:
    whole, counts = tmp_path / "whole", tmp_path / "whole.txt"
    ranks.run(1, whole_run, job, whole, counts)
    blocks = len(counts.read_text().split())
    everything = seals(whole)
    draw = random.Random(5)
    kills, places, rounds, alone = 0, set(), 0, 0
    while kills < KILLS:
        rounds += 1
        out, counts = tmp_path / f"killed-{rounds}", tmp_path / f"killed-{rounds}.txt"
        here = 0
        for wanted in sorted(draw.sample(range(everything), 14)):
            several = draw.choice((1, 2, 3))
            processes, _ = ranks.start(several, whole_run, job, out, counts)
            while all(p.exitcode is None for p in processes) and seals(out) < wanted:
                time.sleep(0.002)
            processes[0].join(draw.choice((0.0, 0.05, 0.3)) * draw.random())
            victim = processes[draw.randrange(several)]
            assert victim.exitcode is None, "it ended before it could be killed"
            victim.kill()
            # As `launch` does: a moment for the others, which end by themselves where they wait for it, then their end.
            alone += ended(processes, 1.0) and several > 1
            for other in processes:
                other.kill()
            assert ended(processes, 10)
            kills, here = kills + 1, here + 1
            places.add(in_work(out) if out.exists() else "before the folder")
        ranks.run(draw.choice((1, 2, 3)), whole_run, job, out, counts)
        for name in RESULTS:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), (rounds, name, places)
        assert len(counts.read_text().split()) <= blocks + here
        assert not list(out.rglob("*.partial")) and not os.listdir(out / ".scratch")
    assert kills >= 50
    stages = {place.rsplit("/", 1)[-1].split(".")[0] for place in places if " " not in place}
    assert len(stages) >= 8, places
    assert alone > 0  # some waited for it
    print(f"{kills} kills in {len(places)} places, {rounds} runs, stages {sorted(stages)}")
