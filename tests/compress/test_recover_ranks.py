"""Recovery by several real processes: as one does it, divided by DDP or FSDP2, killed and gone on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from compress.language import recover
from compress.language.recover_student import student
from compress.processes import distributed
from tests import ranks
from tests.language.recovery import FULL, LORA, distance, read, setup_of, start_of, train
from tests.models.families.test_families import ragged_plan

# Five windows a step: two or three processes cannot have equally many. Two: one of three has none.
SMALL = {**FULL, "batch": 2}
LOW = {**FULL, "dtype": "bfloat16", "save_memory": True}
SETTINGS = {"lora": LORA, "full": FULL, "small": SMALL, "low": LOW}
SHARDS = ("none", "fsdp")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery") / "job"
    setup_of(folder, steps=1)
    return folder


@pytest.fixture(scope="module")
def alone(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of each of the settings."""
    folder = tmp_path_factory.mktemp("alone")
    for name, settings in SETTINGS.items():
        train(job, folder / name, settings)
    return folder


def train_all(job: Path, folder: Path) -> int:
    """Every setting by this group; and the elements of the weights that this process holds under FSDP2."""
    for shard in SHARDS:
        for name, settings in SETTINGS.items():
            train(job, folder / f"{name}-{shard}", {**settings, "shard": shard})
    setup = setup_of(job, **FULL, shard="fsdp")
    model = student(setup, ragged_plan(setup.model), empty=not distributed.is_main())
    with distributed.trainer(model, True, False) as trained:
        assert trained.sharded
        return sum(p.to_local().numel() for p in model.parameters())


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_and_fsdp_divides_the_weights(
    processes: int, job: Path, alone: Path, tmp_path: Path
) -> None:
    held = ranks.run(processes, train_all, job, tmp_path)
    for name, settings in SETTINGS.items():
        one = read(alone / name)
        for shard in SHARDS:
            many = read(tmp_path / f"{name}-{shard}")
            # Adam's first steps magnify the rounding of small gradients.
            apart, off = (0.2, 2e-2) if settings is LOW else (5e-3, 1e-3)
            assert distance(one.plan, many.plan, start_of(job, settings)) < apart, (name, shard)
            for a, b in zip(one.facts["log"], many.facts["log"], strict=True):
                assert b == pytest.approx(a, rel=off), (name, shard)
    setup = setup_of(job, **FULL)
    total = sum(p.numel() for p in student(setup, ragged_plan(setup.model)).parameters())
    assert sum(held) == total and max(held) < 1.2 * total / processes


def dies_at(job: Path, out: Path, settings: dict[str, Any], step: int) -> None:
    """Trains, and is killed (every process of the group) when step ``step`` begins."""

    def windows_of(at: int, *others: Any) -> Any:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(at, *others)

    plain = recover.windows_of
    recover.windows_of = windows_of  # type: ignore[assignment]
    train(job, out, settings)


def killed(processes: int, *arguments: Any) -> None:
    started, _ = ranks.start(processes, dies_at, *arguments)
    for process in started:
        process.join()
    assert any(p.exitcode == -9 for p in started)


@pytest.mark.parametrize(("processes", "shard"), [pytest.param(3, "none", marks=pytest.mark.slow), (2, "fsdp")])
def test_a_group_that_was_killed_goes_on_to_the_same_bytes(
    processes: int, shard: str, job: Path, tmp_path: Path
) -> None:
    settings = {**FULL, "steps": 5, "checkpoint_every": 2, "shard": shard}
    ranks.run(processes, train, job, tmp_path / "whole", settings)
    for step in (1, 3):
        killed(processes, job, tmp_path / "killed", settings, step)
    (kept,) = (tmp_path / "killed" / ".scratch" / "recover").iterdir()
    assert [p.name for p in kept.iterdir()] == ["step-00000002"]
    ranks.run(processes, train, job, tmp_path / "killed", settings)
    assert read(tmp_path / "killed").bytes == read(tmp_path / "whole").bytes
    assert read(tmp_path / "killed").facts == read(tmp_path / "whole").facts
    assert not list((tmp_path / "killed" / ".scratch").iterdir())


def test_another_number_of_processes_goes_on_from_the_checkpoint(job: Path, tmp_path: Path) -> None:
    settings = {**FULL, "steps": 6, "checkpoint_every": 1}
    train(job, tmp_path / "whole", settings)
    for processes, shard, step in ((2, "fsdp", 2), (3, "none", 4)):
        killed(processes, job, tmp_path / "run", {**settings, "shard": shard}, step)
    train(job, tmp_path / "run", settings)
    assert distance(read(tmp_path / "whole").plan, read(tmp_path / "run").plan, start_of(job)) < 5e-3
    assert len(read(tmp_path / "run").facts["log"]) == 6
