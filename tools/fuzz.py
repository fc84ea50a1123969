"""Gives every reader of an outside file thousands of inputs with one fault each, and counts how they end.

    PYTHONPATH=. python tools/fuzz.py --examples 2000                 # all readers
    PYTHONPATH=. python tools/fuzz.py --examples 500 coco network     # some

Prints a line a reader: how many inputs were tried; refused by one clear error, of the good input's result, or of
another that is right too; and, as faults, tracebacks, hangs, memory, wrong culprits and wrong silences. Faults are
shown below it, each kind once, with the input. It ends with 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.fuzz import words
from tests.fuzz.readers import READERS
from tests.fuzz.tries import Counts, Ended, Reader, one_try, spoilt

EVERY = (*READERS, "numbers", "set", "names")
FAULTS = ("traceback", "late", "memory", "culprit", "silence")


Tries = Iterator[SearchStrategy[tuple[str, Callable[[], Ended]]]]


@contextmanager
def of_reader(reader: Reader) -> Tries:
    """Tries of one reader's files."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "in"
        folder.mkdir()
        reader.make(folder)
        good = reader.read(folder)
        yield spoilt(reader, folder).map(lambda d: (str(d[0]), lambda: one_try(reader, folder, good, *d)))


@contextmanager
def of_names() -> Tries:
    """Tries of what stands for a name, in a folder of their own."""
    with tempfile.TemporaryDirectory() as place, chdir(place):
        words.make(Path(place))
        yield words.name_tries(Path(place))


def tries(name: str) -> AbstractContextManager[SearchStrategy[tuple[str, Callable[[], Ended]]]]:
    own = {
        "numbers": lambda: nullcontext(words.number_tries()),
        "set": lambda: nullcontext(words.set_tries()),
        "names": of_names,
    }
    return own[name]() if name in own else of_reader(READERS[name])


def run(name: str, examples: int, number: int) -> tuple[Counts, dict[str, str]]:
    """(how the tries ended, one example of every kind of fault)."""
    counts, faults = Counts(), dict[str, str]()
    with tries(name) as strategy:

        @seed(number)
        @settings(
            max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def one(drawn: tuple[str, Callable[[], Ended]]) -> None:
            what, act = drawn
            ended = act()
            counts.add(ended)
            if ended.fault:
                kind = f"{ended.verdict}: {ended.detail.strip().splitlines()[-1][:150]}"
                faults.setdefault(kind, f"{what}\n{ended.detail.strip()}")

        one()
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("readers", nargs="*", help=f"all by default: {', '.join(EVERY)}")
    parser.add_argument("--examples", type=int, default=1000, help="inputs a reader")
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    print(
        f"{'reader':18}{'tried':>8}{'refused':>9}{'same':>7}{'allowed':>9}"
        + "".join(f"{f:>11}" for f in FAULTS)
        + "   slowest"
    )
    bad, total = 0, Counts()
    for name in given_.readers or EVERY:
        began = time.process_time()
        counts, faults = run(name, given_.examples, given_.seed)
        ends = [counts.ends.get(k, 0) for k in ("refused", "same", "allowed", *FAULTS)]
        widths = (9, 7, 9, *(11,) * len(FAULTS))
        row = "".join(f"{n:>{w},}" for n, w in zip(ends, widths, strict=True))
        print(
            f"{name:18}{counts.tried:>8,}{row}{counts.slowest:>8.2f} s  ({time.process_time() - began:.0f} s CPU)",
            flush=True,
        )
        for kind, example in faults.items():
            bad += 1
            print(f"--- {kind}\n{example[:2500]}\n", file=sys.stderr, flush=True)
        total.tried += counts.tried
        total.slowest = max(total.slowest, counts.slowest)
        for end, number in counts.ends.items():
            total.ends[end] = total.ends.get(end, 0) + number
    print(
        f"in all {total.tried:,}: "
        + ", ".join(f"{n:,} {end}" for end, n in sorted(total.ends.items(), key=lambda e: -e[1]))
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
