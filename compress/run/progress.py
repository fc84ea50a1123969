"""A progress bar on a terminal, plain lines elsewhere; always on standard error, so that output can be piped."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from compress.processes import distributed
from compress.system import host
from compress.words.escape import terminal

QUIET_SECONDS = 2.0  # shorter work shows nothing
LINE_SECONDS = 15.0  # distance of two plain lines
BUSY = 1 / 3  # of the time that threads could run: kept waiting so much by other work is said
ENOUGH = 0.3  # seconds of such time that say something
# Called with (label, steps done, steps in all), for a program that shows progress in its own way.
listener: Callable[[str, int, int], None] | None = None


class _Machine:
    """Whether it is the machine that makes work slow: how much of the time that this process could have run it did."""

    def __init__(self) -> None:
        self._ran, self._waited = time.process_time(), host.waited()

    def words(self) -> str:
        """What to say of the time since the last call; nothing where most was had."""
        ran, waited = time.process_time(), host.waited()
        had, kept = ran - self._ran, None if waited is None or self._waited is None else waited - self._waited
        self._ran, self._waited = ran, waited
        if kept is None or had + kept < ENOUGH or kept < BUSY * (had + kept):
            return ""
        return f", the machine is busy: {had / (had + kept):.0%} of the processor time that it asks for"


class _Shown(Protocol):
    def draw(self, now: float) -> None: ...


class _Watch:
    """Draws what is being done again where nothing was shown for a while: work that counts no steps, or a long one."""

    def __init__(self) -> None:
        self._doing: list[_Shown] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self.last = time.monotonic()  # when a line was shown
        self.unfinished = False  # the cursor stands behind a line that is drawn over

    def begin(self, work: _Shown) -> None:
        if not self._doing:
            self.last, self._over = time.monotonic(), threading.Event()
            self._thread = threading.Thread(target=self._tick, args=(self._over,), daemon=True, name="progress")
            self._thread.start()
        self._doing.append(work)

    def end(self, work: _Shown) -> None:
        with self._lock:
            self._doing.remove(work)
        if not self._doing and self._thread is not None:
            self._over.set()
            self._thread.join()
            self.clear()

    def _tick(self, over: threading.Event) -> None:
        while not over.wait(0.5):
            live = sys.stderr.isatty()
            with self._lock:
                now = time.monotonic()
                if self._doing and now - self.last >= (QUIET_SECONDS if live else LINE_SECONDS):
                    self._doing[-1].draw(now)

    def show(self, text: str, live: bool) -> None:
        """Draws a line over the last one on a terminal (``live``), or behind what is there."""
        with self._lock:
            print(f"\r\x1b[K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)
            self.unfinished = live
            if not live:
                self.last = time.monotonic()

    def clear(self) -> None:
        with self._lock:
            if self.unfinished:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.unfinished = False


_watch = _Watch()


class _Busy:
    def __init__(self, label: str) -> None:
        self.label, self._began, self._machine = label, time.monotonic(), _Machine()

    def draw(self, now: float) -> None:
        words = f"{self.label} ({_clock(now - self._began)}{self._machine.words()})"
        _watch.show(terminal(words), sys.stderr.isatty())


@contextmanager
def busy(label: str) -> Iterator[None]:
    """Around work that counts no steps: where nothing is shown for a while, its label and the time it took so far."""
    work = _Busy(label)
    if not distributed.is_main():
        yield
        return
    _watch.begin(work)
    try:
        yield
    finally:
        _watch.end(work)


class Progress:
    """Counts ``total`` steps; on a terminal one line that redraws itself, elsewhere a line now and then.

    Args:
        total: the steps there are.
        label: what is counted.
        start: steps already done when the work began (a resumed run).
    """

    def __init__(self, total: int, label: str, start: int = 0) -> None:
        self.total, self.label, self.done, self._from = total, label, start, start
        self._note = ""
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._began = self._last = time.monotonic()
        self._shown, self._machine, self._busy = False, _Machine(), ""
        self._asked = self._began
        if distributed.is_main():
            _watch.begin(self)
        return self

    def update(self, steps: int, note: str = "") -> None:
        self.to(self.done + steps, note)

    def to(self, done: int, note: str = "") -> None:
        """Sets the count to ``done``; ``note`` (a figure worth seeing) is printed behind it."""
        self.done, self._note = done, note or self._note
        if listener is not None and distributed.is_main():
            listener(self.label, done, self.total)
        now = time.monotonic()
        if now - self._began < QUIET_SECONDS or not distributed.is_main():
            return
        if now - self._last >= (0.1 if self._live else LINE_SECONDS) or (self._live and not self._shown):
            self.draw(now)

    def draw(self, now: float) -> None:
        self._last, self._shown = now, True
        spent = now - self._began
        fresh = self.done - self._from
        left = f", {_clock(spent / fresh * (self.total - self.done))} left" if fresh else ""
        if now - self._asked >= QUIET_SECONDS:
            self._asked, self._busy = now, self._machine.words()
        count = f"{self.label} {self.done}/{self.total} ({_clock(spent)}{left}{self._busy})"
        text = terminal(f"{count} {self._note}".rstrip())
        filled = round(20 * self.done / max(1, self.total))
        _watch.show(f"[{'#' * filled}{'.' * (20 - filled)}] {text}" if self._live else text, self._live)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not distributed.is_main():
            return
        now = time.monotonic()
        if self._shown or now - self._began >= QUIET_SECONDS:
            self.draw(now)
            if self._live:
                print(file=sys.stderr)
                _watch.unfinished = False
        _watch.end(self)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error; of several processes the main one speaks."""
    if distributed.is_main():
        _watch.clear()
        _watch.show(terminal(text), live=False)
