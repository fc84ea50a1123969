"""Threads that wait without spinning, except where times are measured; and a machine that is busy with other work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compress.exporters.bench.local import LOCAL
from compress.run.progress import Progress
from compress.system import host
from compress.system.threads import OTHERS, OURS, POLICY, to_measure, use
from tests.command import compress

CODE = (
    "import json, os, sys\n{first}\nfrom compress.system import threads\n"
    "threads.wait_passively()\nfound = threads.to_measure()\n"
    "print(json.dumps([os.environ.get('OMP_WAIT_POLICY'), found.get('OMP_WAIT_POLICY'), 'COMPRESS_WAITS' in found]))"
)


def policies(first: str = "", **environment: str) -> list[object]:
    """The policy of a new process, of one that it starts to measure, and whether that one hears of ours."""
    clean = {k: v for k, v in os.environ.items() if k not in (POLICY, OURS, *OTHERS)}
    words = [sys.executable, "-c", CODE.format(first=first)]
    done = subprocess.run(words, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_threads_wait_passively_but_for_what_is_measured() -> None:
    assert policies() == ["PASSIVE", None, False]
    # A process that we start finds ours, and hands on that it is.
    assert policies(**{POLICY: "PASSIVE", OURS: "1"}) == ["PASSIVE", None, False]


def test_what_the_user_says_is_left_and_counts_for_what_is_measured_too() -> None:
    assert policies(**{POLICY: "ACTIVE"}) == ["ACTIVE", "ACTIVE", False]
    assert policies(**{POLICY: "PASSIVE"}) == ["PASSIVE", "PASSIVE", False]
    assert policies(GOMP_SPINCOUNT="100") == [None, None, False]


def test_where_torch_is_loaded_already_nothing_is_said() -> None:
    assert policies("sys.modules['torch'] = sys") == [None, None, False]


def test_the_measuring_process_is_started_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def run(words: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.update(env)
        return subprocess.CompletedProcess(words, 0, "{}", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv(POLICY, "PASSIVE")
    monkeypatch.setenv(OURS, "1")
    LOCAL.run({"do": "available"})
    assert "PATH" in seen and POLICY not in seen and OURS not in seen


def test_a_number_of_threads_is_for_this_process_and_those_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    try:
        use(None)
        assert torch.get_num_threads() == before
        use(2)
        assert torch.get_num_threads() == 2 and to_measure()["OMP_NUM_THREADS"] == "2"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("given", ["0", "-1", "5000", "two"])
def test_a_number_that_is_none_is_refused(given: str, tmp_path: Path) -> None:
    ran = compress("plan", tmp_path, "--recipe", "tyr", "--threads", given)
    assert ran.code == 2 and "--threads" in ran.err


def test_the_command_line_waits_passively_and_hands_threads_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int | None] = []
    waits: list[bool] = []
    monkeypatch.setattr("compress.system.threads.wait_passively", lambda: waits.append(True))
    monkeypatch.setattr("compress.system.threads.use", asked.append)
    nothing = tmp_path / "nothing"
    for words in (("plan", nothing, "--recipe", "tyr"), ("prune", nothing, "--recipe", "tyr"), ("eval", nothing)):
        assert compress(*words, "--threads", 3).code != 0
    assert compress("plan", nothing, "--recipe", "tyr").code != 0
    assert asked == [3, 3, 3, None] and waits == [True] * 4


@contextmanager
def crowded(others: int) -> Iterator[None]:
    """This process on one processor, beside so many that never rest there."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("processes cannot be bound to a processor here")
    allowed = os.sched_getaffinity(0)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    one = {min(allowed)}
    try:
        for process in busy:
            os.sched_setaffinity(process.pid, one)
        os.sched_setaffinity(0, one)
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        for process in busy:
            process.kill()
            process.wait()


def work(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_time_that_this_process_was_kept_waiting_is_told() -> None:
    before = host.waited()
    if before is None:
        pytest.skip("this system does not tell how long a process was kept waiting")
    began, ran = time.monotonic(), time.process_time()
    with crowded(3):
        work(1.0)
        waited = host.waited()
        assert waited is not None
    spent, had = time.monotonic() - began, time.process_time() - ran
    # What it did not have of the time is what it waited.
    assert had < 0.6 * spent and 0.5 * (spent - had) < waited - before + 0.3


def test_a_progress_line_says_when_the_machine_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if host.waited() is None:
        pytest.skip("this system does not tell how long a process was kept waiting")
    monkeypatch.setattr("compress.run.progress.QUIET_SECONDS", 0.5)
    with crowded(3), Progress(2, "single candidates") as progress:
        work(1.0)
        progress.update(2)
    assert "the machine is busy: " in capsys.readouterr().err


def test_alone_it_says_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.run.progress import _Machine

    times = iter([(1.0, 5.0), (2.0, 5.1), (3.0, 6.6), (3.1, 9.0)])
    now = [0.0, 0.0]

    def step() -> None:
        now[:] = next(times)

    monkeypatch.setattr(time, "process_time", lambda: now[0])
    monkeypatch.setattr(host, "waited", lambda: now[1])
    step()
    machine = _Machine()
    said = []
    for _ in range(3):
        step()
        said.append(machine.words())
    # A tenth of it waited; most of it waited; and most, of which there was less than says something.
    assert said[0] == "" and said[1] == ", the machine is busy: 40% of the processor time that it asks for"
    assert said[2].startswith(", the machine is busy: 4%")
    monkeypatch.setattr(host, "waited", lambda: None)
    assert machine.words() == ""
