"""Functions and commands run by several real processes of one gloo group, as `compress.processes.distributed.launch`
starts them; forked from one that has torch and transformers loaded, which is most of what a fresh one takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from compress import cli
from compress.processes import distributed
from compress.processes.children import python
from tests.command import Ran, compress
from tests.forks import Process, server


def start(count: int, function: Callable[..., Any], *arguments: Any, **environment: str) -> tuple[list[Process], Any]:
    """Starts ``function(*arguments)`` in ``count`` processes that have joined; what each gives goes into the queue."""
    results = server.Queue()
    processes = []
    for place in distributed.places(count):
        surroundings = {**environment, **place}
        process = server.Process(target=_work, args=(surroundings, results, function, arguments))
        process.start()
        processes.append(process)
    return processes, results


def run(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` gives in each of ``count`` processes, by rank."""
    processes, results = start(count, function, *arguments)
    found = dict(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    failed = {rank: text for rank, (good, text) in found.items() if not good}
    assert not failed, "\n".join(failed.values())
    return [found[rank][1] for rank in range(count)]


def _work(surroundings: dict[str, str], results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(surroundings)
    import torch

    torch.set_num_threads(1)
    rank = int(surroundings["RANK"])
    try:
        distributed.join()
        found = function(*arguments)
        distributed.leave()
        results.put((rank, (True, found)))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
        raise


class Forked:
    """What `subprocess.Popen` makes of ``python -m compress ...`` for `distributed.launch`: a real process with a
    number, an exit code and signals, of which only the start is another."""

    def __init__(
        self, command: list[str], *, env: Mapping[str, str], stdout: Any, stderr: Any, first: dict[str, Any], **_: Any
    ) -> None:
        start = [*python(), "-m", "compress"]
        assert command[: len(start)] == start
        out = first["out"] if stdout is None else os.devnull
        err = first["err"] if stderr is None else stderr.name
        arguments = (command[len(start) :], dict(env), str(out), str(err), first["before"])
        self._process = server.Process(target=_as_command, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("compress", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(int(self.pid or 0), number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def command(*words: object, before: Callable[[], None] | None = None) -> Ran:
    """`compress *words`, where --processes asks for several, with its group of processes forked.

    Args:
        before: called in each of them first.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        first = {"out": Path(folder, "out"), "err": Path(folder, "err"), "before": before}
        for name in ("out", "err"):
            first[name].touch()
        patch.setattr(distributed.subprocess, "Popen", lambda words, **how: Forked(words, first=first, **how))
        ran = compress(*words)
        return Ran(ran.code, ran.out + first["out"].read_text("utf-8"), ran.err + first["err"].read_text("utf-8"))


def _as_command(
    words: list[str], surroundings: dict[str, str], out: str, err: str, before: Callable[[], None] | None
) -> None:
    os.environ.clear()
    os.environ.update(surroundings)
    for path, place in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), place)
    import torch

    torch.set_num_threads(int(surroundings["OMP_NUM_THREADS"]))
    if before is not None:
        before()
    sys.argv = ["compress", *words]
    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
