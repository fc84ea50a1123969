"""One try: a reader is given an input with one fault, and how it ends is judged."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

from compress.errors import CompressError
from tests.fuzz import mutate
from tests.fuzz.mutate import Change

SECONDS = 60.0  # that a try may take on a busy machine; a good input takes a few hundredths of one
PIPE_SECONDS = 2.0  # after which a pipe that is waited for is closed
BYTES = 3 << 30  # of memory that a try may take beyond what the process holds
FORMS = Literal["json", "yaml", "text", "bytes", "header"]
LARGEST = 10**15  # what a schema lets pass


class Late(BaseException):
    """The try takes too long."""


@dataclass(frozen=True)
class Reader:
    """What is read of a stranger's files.

    Args:
        make: writes a good input into an empty folder.
        files: each file that is spoilt, and what it holds.
        read: what the program makes of the folder; JSON-like, to be compared.
        judge: what is wrong with a result that is not the good one's; None where it is right.
        also: words that an error may name in the file's place.
        optional: files that need not be there.
        before: brings the rest of the folder in step with the fault, as a hostile author does.
    """

    name: str
    make: Callable[[Path], None]
    files: Mapping[str, FORMS]
    read: Callable[[Path], Any]
    judge: Callable[[Any, Any, Change], str | None]
    also: Sequence[str] = ()
    before: Callable[[Path], None] | None = None
    optional: frozenset[str] = frozenset()


@dataclass
class Ended:
    """How a try ended: ``refused``, ``same``, ``allowed``; or ``traceback``, ``late``, ``memory``, ``culprit``,
    ``silence``, which are faults."""

    verdict: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def fault(self) -> bool:
        return self.verdict not in ("refused", "same", "allowed")


@dataclass
class Counts:
    tried: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    slowest: float = 0.0

    def add(self, ended: Ended) -> None:
        self.tried += 1
        self.ends[ended.verdict] = self.ends.get(ended.verdict, 0) + 1
        self.slowest = max(self.slowest, ended.seconds)


@contextmanager
def bounded(seconds: float = SECONDS, more: int = BYTES) -> Iterator[None]:
    """Work that is stopped when it takes too long, and gets no more memory than that."""

    def late(number: int, frame: object) -> None:
        raise Late

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (held + more, before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(
    act: Callable[[], Any],
    culprit: Callable[[CompressError], str | None],
    judge: Callable[[Any], str],
    waiting: bool = False,
) -> Ended:
    """Acts on an input with a fault.

    Args:
        culprit: what is wrong with an error.
        waiting: there is a pipe that nobody writes to.
        judge: ``same``, ``allowed``, or what is wrong with a result.
    """
    began, worked = time.monotonic(), time.process_time()

    def ended(verdict: str, detail: str = "") -> Ended:
        waited = time.monotonic() - began - (time.process_time() - worked)
        if verdict == "refused" and waited > PIPE_SECONDS and waiting:
            verdict, detail = "late", f"it waited for a pipe; then: {detail}"
        return Ended(verdict, detail, time.monotonic() - began)

    try:
        with bounded():
            found = act()
    except CompressError as e:
        if not (e.what and e.where and e.fix) or e.exit_code not in (1, 2) or len(str(e)) > 5_000:
            return ended("culprit", f"the error is not whole: {str(e)[:500]}")
        wrong = culprit(e)
        return ended("refused", str(e)) if wrong is None else ended("culprit", f"{wrong}: {str(e)[:500]}")
    except Late:
        return ended("late", "".join(traceback.format_exc().splitlines(keepends=True)[-12:]))
    except MemoryError:
        return ended("memory", traceback.format_exc()[-1500:])
    except Exception:
        said = traceback.format_exc()
        return ended("memory" if "not enough memory" in said else "traceback", said[-1500:])
    verdict = judge(found)
    return ended(verdict) if verdict in ("same", "allowed") else ended("silence", verdict)


@st.composite
def spoilt(draw: st.DrawFn, reader: Reader, folder: Path) -> tuple[Change, bytes | str]:
    """(the change, the file's bytes or what stands in its place) of one file of the reader."""
    import json

    import yaml

    name = draw(st.sampled_from(sorted(reader.files)))
    form = reader.files[name]
    data = (folder / name).read_bytes()
    kind = draw(st.sampled_from(["value"] * 6 + ["raw"] * 2 + ["place"]))
    if kind == "place":
        way = draw(mutate.ways())
        return Change(name, way), way
    if kind == "raw" or form in ("text", "bytes"):
        made, change = draw(mutate.raw(data, form != "bytes" and form != "header"))
    elif form == "header":
        size = int.from_bytes(data[:8], "little")
        text, change = draw(mutate.values(json.loads(data[8 : 8 + size])))
        head = text.encode("utf-8", "surrogatepass")
        head += b" " * (-len(head) % 8)
        made = len(head).to_bytes(8, "little") + head + data[8 + size :]
    else:
        good = json.loads(data) if form == "json" else yaml.safe_load(data)
        text, change = draw(mutate.values(good))
        made = text.encode("utf-8", "surrogatepass")
    return Change(name, change.how, change.at, change.put), made


def one_try(reader: Reader, folder: Path, good: Any, change: Change, made: bytes | str) -> Ended:
    """The folder with that fault, read; the folder is as before behind it."""
    path = folder / change.file

    def culprit(e: CompressError) -> str | None:
        said = f"{e.what} {e.where} {e.fix}"
        if path.name in said or any(word in said for word in reader.also):
            return None
        others = [n for n in reader.files if Path(n).name in e.where and Path(n).name != path.name]
        if others:
            return f"{others[0]} is named, not {path.name}"
        places = (str(path.parent), f"data {folder}")  # of a data set as a whole
        return None if any(place in e.where for place in places) else f"{path.name} is not named"

    def judge(found: Any) -> str:
        if found == good and (isinstance(made, bytes) or made != "a pipe"):
            return "same"
        if made == "gone" and change.file in reader.optional:
            return "allowed"
        if isinstance(made, str) and made != "a link outside":
            return f"{made} was taken for a file"
        return reader.judge(good, found, change) or "allowed"

    with mutate.kept(path):
        if isinstance(made, bytes):
            path.write_bytes(made)
        else:
            mutate.put(path, made, folder.parent / "outside")
        # What no parser takes has nothing that could be brought in step.
        with contextlib.suppress(ValueError, OSError, RecursionError):
            if reader.before is not None:
                reader.before(folder)
        with _unblocked(path):
            return attempt(lambda: reader.read(folder), culprit, judge, made == "a pipe")


@contextmanager
def _unblocked(path: Path) -> Iterator[None]:
    """Who waits for a pipe in compiled code cannot be stopped: it is told to be empty after a while."""

    done = threading.Event()

    def release() -> None:
        while not done.wait(PIPE_SECONDS):
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    if not path.is_fifo():
        yield
        return
    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers(inner)


def sensible(value: Any) -> str | None:
    """What is wrong with the numbers in a result."""
    bad = next((n for n in numbers(value) if not math.isfinite(n) or abs(n) > LARGEST), None)
    return None if bad is None else f"{bad!r} was taken"


def differences(one: Any, other: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Where two JSON-like values differ, and what the other has there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            yield from differences(one.get(key, mutate.MISSING), other.get(key, mutate.MISSING), (*at, key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, (*at, i))
    elif type(one) is not type(other) or one != other:
        yield at, other


def as_it_was_put(good: Any, found: Any, change: Change) -> str | None:
    """A result may differ from the good one's in the value that was changed, and have what was put there; or, where a
    text was changed as a text, in what an independent reading of it has."""
    wrong = sensible(found)
    if wrong is not None:
        return wrong
    if change.at is None:
        return None
    for at, value in differences(good, found):
        if at[: len(change.at)] != change.at and change.at[: len(at)] != at:
            return f"{'.'.join(map(str, at))} is {value!r:.80} now"
        if at == change.at and not isinstance(change.put, mutate.Missing) and not _alike(change.put, value):
            return f"{change.put!r:.80} was read as {value!r:.80}"
    return None


def _alike(put: Any, value: Any) -> bool:
    if value is mutate.MISSING or value is None:
        return put is None or put in ("", [], {})
    if isinstance(put, bool) or isinstance(value, bool):
        return put is value
    if isinstance(put, int | float) and isinstance(value, int | float):
        return bool(put == value)
    if isinstance(put, dict | list):
        return isinstance(value, type(put))
    try:
        return str(put) == str(value) or (isinstance(value, int | float) and float(put) == value)
    except ValueError:
        return False
