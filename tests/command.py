"""The command line, run inside the test's own process: torch is imported once for all tests."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from compress import cli


@dataclass(frozen=True)
class Ran:
    """What a command left behind: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Job:
    model: Path
    recipe: Path
    folder: Path


def compress(*words: object) -> Ran:
    """Runs `compress` with these words. An exception that is no user's error passes through and fails the test."""
    before, handler, dropped = sys.argv, signal.getsignal(signal.SIGINT), sys.unraisablehook
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["compress", *map(str, words)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    finally:
        sys.argv, sys.unraisablehook = before, dropped
        signal.signal(signal.SIGINT, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    """The same command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "compress", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def one_error(ran: Ran, code: int, *parts: str) -> None:
    """Asserts the one form every user's error has: what, where, how to mend; nothing on standard output."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.count("error: ") == 1 and "Traceback" not in ran.err
    message = ran.err[ran.err.index("error: ") :]
    assert "\n  where: " in message and "\n  fix:   " in message and message.count("\n") == 3, message
    for part in parts:
        assert part in message, message
