"""Asks a stock llama.cpp about a GGUF, in a process of its own: one that aborts is one error here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.exporters.llama_cpp import library
from compress.processes.children import python

STEPS = 24  # tokens that are given one by one


@dataclass(frozen=True)
class Answer:
    """What libllama says.

    ``tokens`` of each text; ``windows``: (n, vocab) logits of each window of tokens; ``stepped``: those of the first
    one, its last `STEPS` tokens given one by one; ``greedy`` tokens behind the prompt; ``ends``: those asked that end a
    text.
    """

    vocab: int
    load: float
    tokens: list[list[int]]
    ends: list[int]
    windows: list[NDArray[np.float32]]
    stepped: NDArray[np.float32] | None
    greedy: list[int]


def ask(
    gguf: Path,
    *,
    texts: Sequence[str] = (),
    windows: Sequence[Sequence[int]] = (),
    stepped: bool = False,
    prompt: Sequence[int] = (),
    greedy: int = 0,
    ends: Sequence[int] = (),
    threads: int = 1,
    plain_cache: bool = False,
) -> Answer:
    """Loads ``gguf`` in a fresh process.

    Args:
        plain_cache: keys and values are kept in float32, not float16.

    Raises:
        CompressError: it is refused, aborts, or is laid out in a way that is not known here; with libllama's last
            words.
    """
    longest = max([len(prompt) + greedy, 32, *map(len, windows)])
    with tempfile.TemporaryDirectory(prefix="compress-gguf-") as place:
        job: dict[str, Any] = {
            "library": str(library.find()), "gguf": str(gguf), "texts": list(texts), "threads": threads, "out": place,
            "windows": [list(w) for w in windows], "stepped": list(windows[0]) if stepped else [], "steps": STEPS,
            "prompt": list(prompt), "greedy": greedy, "ends": list(ends), "length": longest, "plain_cache": plain_cache,
        }  # fmt: skip
        found = _answer(job, gguf)
        made = [np.load(Path(place) / f"window-{i}.npy") for i in range(len(windows))]
        steps = np.load(Path(place) / "stepped.npy") if stepped else None
    return Answer(found["vocab"], found["load"], found["tokens"], found["ends"], made, steps, found.get("greedy", []))


def losses(gguf: Path, windows: Sequence[Sequence[int]], threads: int) -> list[NDArray[np.float64]]:
    """(length - 1,) nats of every token of each window but its first, in libllama as users run it.

    Raises:
        CompressError: see `ask`.
    """
    with tempfile.TemporaryDirectory(prefix="compress-gguf-") as place:
        job = {
            "do": "losses", "library": str(library.find()), "gguf": str(gguf), "threads": threads, "out": place,
            "windows": [list(w) for w in windows],
        }  # fmt: skip
        _answer(job, gguf)
        return [np.load(Path(place) / f"losses-{i}.npy") for i in range(len(windows))]


def go_on(gguf: Path, ids: Sequence[int], count: int, threads: int, seen: Callable[[int | None], None]) -> str:
    """The likeliest tokens behind ``ids``, ``count`` at most; one that ends a text is the last.

    Args:
        seen: told None when the file is loaded and the prompt begins to be read, then every token as it comes.

    Returns:
        Their text.

    Raises:
        CompressError: see `ask`.
    """
    job = {
        "do": "go on", "library": str(library.find()), "gguf": str(gguf), "threads": threads,
        "ids": list(ids), "count": count,
    }  # fmt: skip
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        command = python("-m", "compress.exporters.llama_cpp.worker")
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8", env=environment
        ) as child:
            assert child.stdin is not None and child.stdout is not None  # pipes
            child.stdin.write(json.dumps(job))
            child.stdin.close()
            last = ""
            for line in child.stdout:
                last = line
                fact = json.loads(line)
                if "loaded" in fact or "token" in fact:
                    seen(fact.get("token"))
        log.seek(0)
        done = subprocess.CompletedProcess(command, child.returncode, last, log.read())
    return str(_facts(done, gguf)["text"])


def _answer(job: dict[str, Any], gguf: Path) -> dict[str, Any]:
    """What the worker says of the whole ``job``."""
    done = subprocess.run(
        python("-m", "compress.exporters.llama_cpp.worker"),
        input=json.dumps(job),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    return _facts(done, gguf)


def _facts(done: subprocess.CompletedProcess[str], gguf: Path) -> dict[str, Any]:
    fix = (
        "this is a fault of ours where another program's GGUF of the model is taken; `compress doctor` has the versions"
    )
    if done.returncode:
        words = said(done.stderr) or f"it says nothing and ends with {done.returncode}"
        raise CompressError(f"llama.cpp ends at this file: {words}", where=str(gguf), fix=fix)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in found and "refused" not in found:
        raise CompressError(**found["error"])
    if "refused" in found:
        words = said(done.stderr)
        raise CompressError(
            f"llama.cpp refuses this file: {found['refused']}" + (f" ({words})" if words else ""),
            where=str(gguf),
            fix=fix,
        )
    return found


def said(log: str) -> str:
    """The line of libllama's log that says what is wrong: the first that speaks of an error, else the last."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip(" .\n")]
    telling = [
        line for line in lines if re.search(r"error|GGML_ASSERT|wrong|missing|unknown|invalid|abort", line, re.I)
    ]
    return (telling or lines[-1:] or [""])[0][:300]
