"""Where the tests' time goes: seconds of a processor that every test and fixture takes, those of its children too.

    PYTHONPATH=. CPU_TIMES=build/times .venv/bin/pytest -p tools.cpu_times -m "not slow" -n 2 --dist loadfile
    python3 tools/cpu_times.py build/times            # by file, then the most expensive tests and fixtures
    python3 tools/cpu_times.py build/times build/old  # and what each file took before

It is the processor's time, not the clock's: other work on the machine does not lengthen it. What a session's fixture
takes stands at the test that asked for it first. A line is written when a test has ended, so a run may be cut short.
(Linux: what children that still live have taken, servers that fork others among them, is read from /proc.)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
MOST = 40  # tests and fixtures that are listed
SMALLEST = 0.05  # seconds; cheaper fixtures are not written down


def taken() -> tuple[float, float, float]:
    """(own seconds of a processor, those of its children, seconds of the clock)."""
    times = os.times()
    living = 0
    for task in Path("/proc/self/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it has ended meanwhile, and is counted once it is waited for
                continue
            living += sum(map(int, fields[11:15]))  # its own and its waited children's, user and system
    return times.user + times.system, times.children_user + times.children_system + living / TICK, time.monotonic()


def since(start: tuple[float, float, float]) -> dict[str, float]:
    own, children, wall = (round(b - a, 3) for a, b in zip(start, taken(), strict=True))
    return {"own": own, "children": children, "wall": wall}


def put(**row: Any) -> None:
    folder = Path(os.environ.get("CPU_TIMES", "build/times"))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


try:
    import pytest
except ImportError:  # only to read what was written
    pass
else:

    @pytest.hookimpl(wrapper=True)
    def pytest_collection() -> Iterator[None]:
        put(kind="start", name="start", own=taken()[0], children=0.0, wall=0.0)
        start = taken()
        try:
            return (yield)
        finally:
            put(kind="collect", name="collect", **since(start))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
        start = taken()
        try:
            return (yield)
        finally:
            put(kind="test", name=item.nodeid, **since(start))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[None]:
        start = taken()
        try:
            return (yield)
        finally:
            found = since(start)
            if found["own"] + found["children"] > SMALLEST:
                put(kind="fixture", name=f"{fixturedef.argname} ({fixturedef.scope}) {request.node.nodeid}", **found)


def read(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
    ]


def by_file(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """File -> [own, children, wall, tests]."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0])
    for row in rows:
        if row["kind"] == "test":
            held = found[row["name"].split("::")[0]]
            for i, amount in enumerate((row["own"], row["children"], row["wall"], 1)):
                held[i] += amount
    return found


def main(folder: Path, before: Path | None = None) -> None:
    rows = read(folder)
    files, old = by_file(rows), by_file(read(before)) if before else {}
    print("  processor =     own + children    clock  tests" + ("  before" if before else ""))
    for name, (own, children, wall, tests) in sorted(files.items(), key=lambda f: -f[1][0] - f[1][1]):
        was = f"{sum(old[name][:2]):8.1f}" if name in old else " " * 8 * bool(before)
        print(f"{own + children:9.1f} s {own:9.1f} {children:9.1f} {wall:9.1f} {tests:6.0f}{was}  {name}")
    for kind in ("test", "fixture"):
        print(f"\nthe most expensive {kind}s")
        mine = sorted((r for r in rows if r["kind"] == kind), key=lambda r: -r["own"] - r["children"])
        for row in mine[:MOST]:
            print(f"{row['own'] + row['children']:9.1f} s {row['own']:9.1f} {row['children']:9.1f}  {row['name']}")
    beside = sum(r["own"] + r["children"] for r in rows if r["kind"] in ("start", "collect"))
    total = sum(own + children for own, children, *_ in files.values())
    print(
        f"\n{total:.0f} s in tests, {beside:.0f} s to start and collect; tests: {sum(f[3] for f in files.values()):.0f}"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
