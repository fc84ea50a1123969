"""How often `compress gate` errs: real A/A gates and real slow-downs on this machine, and simulated ones.

    PYTHONPATH=. python tools/gate_experiment.py --out /tmp/gate-exp --gates 200
    PYTHONPATH=. python tools/gate_experiment.py --simulate 2000
    PYTHONPATH=. python tools/gate_experiment.py --out /tmp/gate-exp --spread 40

The first makes two ONNX networks of 3x3 convolutions, one with 10 % more of the same layers, and gates them under
`latency<=1.05x`: the smaller against itself (a fail is false) and, every third gate, the larger against the smaller (a
fail is right). Every gate is a line in OUT/gates.jsonl, and the same command again goes on behind the last; it may be
started twice at once.

The second draws the times of processes: with slow drift, with bursts of other work, and with two clock rates. The third
says how far apart pairs of processes lie by their fastest calls and by the medians of their samples.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.exporters import gate
from compress.exporters.gate_measure import Measuring, measure
from compress.exporters.gate_models import find
from compress.exporters.gate_run import compare
from tools.ci.models import chain

LAYERS, MORE = 10, 11  # all alike: a tenth of the time more
BUDGET = "latency<=1.05x"
SLOW_EVERY = 3


def real(out: Path, gates: int, samples: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    small, large = chain(out / "small.onnx", LAYERS), chain(out / "large.onnx", MORE)
    journal = out / "gates.jsonl"
    budget, spec = gate.parse_budget(BUDGET), Measuring(samples=samples)
    while True:
        kinds = [row["kind"] for row in read(journal)]
        alike, slowed = kinds.count("A/A"), kinds.count("slow")
        if alike >= gates and slowed >= gates // SLOW_EVERY:
            break
        slow = slowed < alike // SLOW_EVERY
        began = time.monotonic()
        record = compare(find(str(small)), find(str(large if slow else small)), [budget], spec)
        (row,) = record["budgets"]
        keep = ("verdict", "rounds", "value", "low", "high", "smallest_change", "reason", "values")
        line = {
            "kind": "slow" if slow else "A/A",
            "samples": samples,
            "seconds": round(time.monotonic() - began, 2),
            "load": record["machine"]["after"].get("load_average"),
            **{k: row[k] for k in keep},
        }
        with journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    tell(read(journal))


def pairs_apart(out: Path, processes: int) -> None:
    """Prints the spread of the ratios of neighbouring processes of the smaller network, by both figures."""
    model = find(str(chain(out / "small.onnx", LAYERS)))
    runs = [measure(model, Measuring(), i)["latency"] for i in range(processes)]
    for name, key, figure in (("fastest call", "fastest", min), ("median of samples", "samples", median)):
        times = [figure(run[key]) for run in runs]
        ratios = [b / a for a, b in zip(times[::2], times[1::2], strict=False)]
        print(
            f"{name:17} {1000 * median(times):.3f} ms; ratios' spread {100 * gate.spread(ratios):.2f} %, outermost"
            f" {100 * max(abs(r - 1) for r in ratios):.0f} %; load {os.getloadavg()[0]:.1f}"
        )


def read(journal: Path) -> list[dict[str, Any]]:
    """The whole lines: one without its end was being written when a run was stopped, or is now."""
    if not journal.exists():
        return []
    found = []
    for line in journal.read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def tell(done: list[dict[str, Any]]) -> None:
    for kind in ("A/A", "slow"):
        rows = [r for r in done if r["kind"] == kind]
        if not rows:
            continue
        counts = {v: sum(r["verdict"] == v for r in rows) for v in gate.EXIT_CODES}
        rounds = [r["rounds"] for r in rows]
        pairs = np.log([v for r in rows for v in r["values"]])
        print(
            f"{kind:4} {len(rows)} gates: {', '.join(f'{n} {v}' for v, n in counts.items())};"
            f" rounds median {median(rounds):g}, most {max(rounds)}; {median(r['seconds'] for r in rows):.1f} s a gate;"
            f" ratio {np.exp(np.median(pairs)):.3f}; pairs' spread {100 * gate.spread(np.exp(pairs)):.2f} %, outermost"
            f" {100 * np.abs(np.expm1(pairs - np.median(pairs))).max():.0f} %;"
            f" load {min(r['load'] for r in rows):.1f} to {max(r['load'] for r in rows):.1f}"
        )


# Figures of the processes of one gate in the order in which they run, (COUNT,), all for one and the same model: as many
# as a gate on a noisy machine takes.
Noise = Callable[[np.random.Generator], NDArray[Any]]
COUNT = 2 * gate.FIRST + 2 * gate.REPEATS * gate.LAST


def calm(rng: np.random.Generator) -> NDArray[Any]:
    return np.exp(0.01 * rng.standard_normal(COUNT))


def drift(rng: np.random.Generator) -> NDArray[Any]:
    """The machine gets slower (or faster) by up to 40 % over a gate of 42 processes, and wavers."""
    at, short = np.arange(COUNT), 2 * gate.LAST
    wave = 0.05 * np.sin(2 * np.pi * (at / rng.uniform(5, 40) + rng.uniform()))
    return np.exp(0.01 * rng.standard_normal(COUNT) + rng.uniform(-0.35, 0.35) * at / short + wave)


def bursts(rng: np.random.Generator) -> NDArray[Any]:
    """Other work comes and goes: a process in a burst takes 1.1 to 3 times as long."""
    busy, state = np.zeros(COUNT, bool), False
    for i in range(COUNT):
        state = rng.random() < (0.7 if state else 0.12)
        busy[i] = state
    return np.exp(0.01 * rng.standard_normal(COUNT)) * np.where(busy, rng.uniform(1.1, 3.0, COUNT), 1.0)


def clocks(rng: np.random.Generator) -> NDArray[Any]:
    """Two clock rates, 25 % apart; every process gets one or the other."""
    return np.exp(0.01 * rng.standard_normal(COUNT)) * np.where(rng.random(COUNT) < 0.5, 1.0, 1.25)


def heavy(rng: np.random.Generator) -> NDArray[Any]:
    """Tails nearly as heavy as Cauchy's."""
    return np.exp(0.02 * np.clip(rng.standard_t(1.5, COUNT), -50, 50))


def one(noise: Noise, ratio: float, limit: float, rng: np.random.Generator) -> tuple[str, int]:
    """One whole gate on drawn times: (verdict, rounds)."""
    times = iter(noise(rng))
    repeats, i = 1, 0
    pairs: list[list[float]] = []
    while True:
        found: list[list[float]] = [[], []]
        for which in gate.order(i, repeats):
            found[which].append(float(next(times)) * (ratio if which else 1.0))
        pairs.append([min(own) for own in found])
        i += 1
        watched = gate.PILOT <= i <= gate.FIRST and repeats == 1
        if watched and gate.noisy([list(own) for own in zip(*pairs, strict=True)]):
            repeats, i, pairs = gate.REPEATS, 0, []
            continue
        verdict, _ = gate.judge([b / a for a, b in pairs], limit, draws=200)
        if verdict is not None:
            return verdict, i


def simulate(gates: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows: noise, case, share of each verdict, rounds."""
    for noise in (calm, drift, bursts, clocks, heavy):
        for case, ratio, limit in (("A/A", 1.0, 1.05), ("at the limit", 1.05, 1.05), ("slow", 1.10, 1.05)):
            rng = np.random.default_rng(seed)
            found = [one(noise, ratio, limit, rng) for _ in range(gates)]
            shares = {v: sum(w == v for w, _ in found) / gates for v in gate.EXIT_CODES}
            yield {"noise": noise.__name__, "case": case, **shares, "rounds": median(n for _, n in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of the networks and the journal")
    parser.add_argument("--gates", type=int, default=200, help="A/A gates; a third as many slow-downs")
    parser.add_argument("--samples", type=int, default=1, help="of 0.1 s, in one process")
    parser.add_argument("--simulate", type=int, help="gates of each simulated case")
    parser.add_argument("--spread", type=int, help="processes whose figures are compared")
    parser.add_argument("--tell", action="store_true", help="only say what the journal holds so far")
    given = parser.parse_args()
    if given.simulate:
        print(f"{given.simulate} gates each, {BUDGET}")
        for row in simulate(given.simulate):
            shares = "  ".join(f"{v} {100 * row[v]:6.2f} %" for v in gate.EXIT_CODES)
            print(f"{row['noise']:7} {row['case']:13} {shares}  rounds {row['rounds']:g}", flush=True)
    if given.out and given.spread:
        pairs_apart(given.out, given.spread)
    elif given.out and given.tell:
        tell(read(given.out / "gates.jsonl"))
    elif given.out:
        real(given.out, given.gates, given.samples)


if __name__ == "__main__":
    main()
