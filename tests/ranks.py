"""Functions run by several real processes of one gloo group, as `compress.processes.distributed.launch` starts them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from compress.processes import distributed

# A server that has torch loaded already forks every process.
Process = multiprocessing.process.BaseProcess
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "tests.command",
        "compress.pipeline",
        "compress.recipes.tyr.prune",
        "compress.language.recover",
        "transformers",
        "peft",
    ]
)


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
