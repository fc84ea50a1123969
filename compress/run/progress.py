"""A progress bar on a terminal, plain lines elsewhere; always on standard error, so that output can be piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from compress.processes import distributed
from compress.words.escape import terminal

QUIET_SECONDS = 2.0  # shorter work shows nothing
LINE_SECONDS = 15.0  # distance of two plain lines
# Called with (label, steps done, steps in all), for a program that shows progress in its own way.
listener: Callable[[str, int, int], None] | None = None


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
        self._shown = False
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
            self._draw(now)

    def _draw(self, now: float) -> None:
        self._last, self._shown = now, True
        spent = now - self._began
        fresh = self.done - self._from
        left = f", {_clock(spent / fresh * (self.total - self.done))} left" if fresh else ""
        text = terminal(f"{self.label} {self.done}/{self.total} ({_clock(spent)}{left}) {self._note}".rstrip())
        if self._live:
            filled = round(20 * self.done / max(1, self.total))
            print(f"\r\x1b[K[{'#' * filled}{'.' * (20 - filled)}] {text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.monotonic()
        if distributed.is_main() and (self._shown or now - self._began >= QUIET_SECONDS):
            self._draw(now)
            if self._live:
                print(file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error; of several processes the main one speaks."""
    if distributed.is_main():
        print(terminal(text), file=sys.stderr, flush=True)
