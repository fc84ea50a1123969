"""Clean processes that load a model again, forked from an interpreter that has torch and transformers loaded already.

Importing them is five seconds of a processor, and a run loads what it saved in a process of its own for every layout. A
fork has nothing of the test's own process and nothing of an earlier load, so what it finds is what a fresh interpreter
finds; that a fresh one does is asked where it is the subject, by the mark ``cold``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compress.language import reload
from compress.processes.children import python

# What is run so: the two scripts that load a saved model and say what it gives.
LOADERS = ((str(Path(str(reload.__file__))),), ("-m", "compress.networks.reload"))
ASKED = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}  # how they are run
# What is read when torch and transformers are imported: it must be as it was when the server was started.
READ = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "TORCH_HOME")


class Warm:
    """Has `subprocess.run` do such a load in a fork; everything else it does as ever."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._started: dict[str, str] = {}
        self._one = threading.Lock()
        self.cold = False  # whether it stands back
        self.forks = 0

    def run(self, command: Any, **options: Any) -> Any:
        words = tuple(command[len(python()) :]) if isinstance(command, list) else ()
        ours = isinstance(command, list) and command[: len(python())] == python()
        environment = dict(options.get("env") or os.environ)
        if (
            self.cold
            or not ours
            or not any(words[: len(loader)] == loader for loader in LOADERS)
            or {k: v for k, v in options.items() if k != "env"} != ASKED
            or (self._server is not None and any(environment.get(k) != self._started.get(k) for k in READ))
        ):
            return _run(command, **options)
        with self._one, tempfile.TemporaryDirectory() as folder:
            if self._server is None:
                self._started = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
                self._server = _Popen(
                    python(str(Path(__file__).with_name("warm_server.py"))),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._started,
                )  # fmt: skip
            out, err = Path(folder, "out"), Path(folder, "err")
            asked = {"words": words, "environment": environment, "out": str(out), "err": str(err)}
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            self.forks += 1
            said = [path.read_text("utf-8", errors="replace") for path in (out, err)]
        return subprocess.CompletedProcess(command, code, *said)

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()
            self._server = None


_run, _Popen = subprocess.run, subprocess.Popen
WARM = Warm()


@contextmanager
def warm() -> Iterator[None]:
    """While it is open, saved models are loaded so."""
    if sys.platform == "win32":  # no fork
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", WARM.run)
        try:
            yield
        finally:
            WARM.close()
