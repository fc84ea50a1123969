"""What narrower layers are worth in each runtime: the speed-up beside the work that went, and why it falls short.

    PYTHONPATH=. python tools/bench_formats.py --out /tmp/bench-formats
    PYTHONPATH=. python tools/bench_formats.py --out /tmp/bench-formats --models smollm2-135m --plan runs/demo/plan

A ResNet, a network with three heads and a language model (see format_cases.py) in ONNX Runtime, ExecuTorch and OpenVINO
on one thread. Every size runs in fresh processes, in turn forwards and backwards; the speed-up is the median of the
ratios of a round, with its 95 % interval: of CPU time, in which waiting for a core that others use is not counted, and
beside it by the clock. The ideal goes by FLOPs, and by bytes of weights for the decoding of a token. Where less than
80 % of it is reached, the runtime's own profile says what did not get faster.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from compress.errors import CompressError
from compress.exporters.bench.explain import why
from compress.exporters.bench.local import LOCAL, measure_once
from compress.exporters.bench.plots import speed_up
from compress.report.explained import GOAL, lines
from compress.report.plots import draw
from compress.report.stats import paired_ratio
from compress.system.files import write_whole
from tools.format_cases import Case, llm_case, network_case
from tools.format_profile import PART, explained, kinds_of

NETWORKS = ("resnet", "three-heads")
FORMATS = ("onnx", "executorch", "openvino")
TITLES = {"latency": "one image", "ttft": "a prompt of 512 tokens", "tpot": "a token at 512 of context"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=[*NETWORKS, "smollm2-135m"], help="or another language model")
    parser.add_argument("--plan", type=Path, nargs="+", default=[], help="folders with a plan of the language model")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in given.models:
            if name in NETWORKS:
                case = network_case(name, given.formats, given.out)
            else:
                case = llm_case(name, given.plan, given.formats, given.out)
            found = compare(case, given.formats, given.processes, given.seconds)
            write_whole(given.out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    except CompressError as e:
        raise SystemExit(str(e)) from e
    # What an earlier call measured into the same folder is drawn with it.
    draw_all(given.out, [json.loads(path.read_text("utf-8")) for path in sorted(given.out.glob("*.json"))])


def compare(case: Case, formats: list[str], processes: int, seconds: float) -> dict[str, Any]:
    """Every size in every format, and the speed-ups beside their ideals."""
    spec = {**case.spec, "min_seconds": seconds}
    found: dict[str, Any] = {"name": case.name, "work": case.work, "units": case.units, "formats": {}}
    for form in formats:
        runs: dict[str, list[dict[str, Any]]] = {size: [] for size in case.folders}
        load = [os.getloadavg()[0]]
        for i in range(processes):
            for size in case.folders if i % 2 == 0 else reversed(case.folders):
                folder = case.folders[size]
                where = folder if form == "onnx" else folder / form
                runs[size].append(measure_once(where, spec, format=form, seed=i))
            load.append(os.getloadavg()[0])
        one = found["formats"][form] = {"runtime": next(iter(runs.values()))[0]["runtime"], "load": load, "figures": {}}
        print(f"{case.name} in {one['runtime']}; load {min(load):.1f} to {max(load):.1f}", flush=True)
        for figure in case.work:
            one["figures"][figure] = judged(case, form, figure, runs)
    return found


def judged(case: Case, form: str, figure: str, runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One figure of one format: medians of the processes, speed-ups, and why one is under `GOAL` of its ideal."""
    dense, *smaller = case.folders

    def medians(clock: str) -> dict[str, list[float]]:
        return {size: [median(r["figures"][figure][clock]) for r in rows] for size, rows in runs.items()}

    cpu, wall = medians("cpu"), medians("samples")
    found: dict[str, Any] = {"cpu": cpu, "wall": wall, "speed_up": {}}
    spreads = [100 * (max(t[dense]) - min(t[dense])) / median(t[dense]) for t in (cpu, wall)]
    print(
        f"  {TITLES[figure]}: dense {1000 * median(cpu[dense]):.2f} ms, its processes {spreads[0]:.0f} % apart"
        f" (by the clock {1000 * median(wall[dense]):.2f} ms, {spreads[1]:.0f} %)"
    )
    for size in smaller:
        ideal = case.ideal(figure, size)
        ratio, clock = (paired_ratio(t[dense], t[size]) for t in (cpu, wall))
        one = found["speed_up"][size] = {**ratio, "by the clock": clock, "ideal": ideal, "why": []}
        print(
            f"    {size}: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] times as fast;"
            f" {ideal:.2f} times fewer {case.units[figure]}; {100 * ratio['median'] / ideal:.0f} % of the ideal"
            f" (by the clock {clock['median']:.2f} [{clock['low']:.2f}, {clock['high']:.2f}])",
            flush=True,
        )
        if ratio["median"] < GOAL * ideal:
            profiles = [kinds_of(form, case.folders[s], figure, case.spec) for s in (dense, size)]
            work = case.work[figure]
            one["why"] = explained(*profiles, (work[dense], work[size]), case.units[figure])
            if form == "onnx":
                spec = tuple(case.spec.items())
                one["why"] += lines(by_layer(case.folders[dense], case.folders[size], spec)[PART[figure]])
            for line in one["why"]:
                print(f"      {line}", flush=True)
    return found


@functools.cache
def by_layer(dense: Path, pruned: Path, spec: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """`why` by layers, once for both figures of a language model."""
    return why(dense, pruned, dict(spec), LOCAL, calls=10)


def draw_all(folder: Path, found: list[dict[str, Any]]) -> None:
    """speed-up.png: every point against the ideal; networks side by side, a language model's two figures apart."""
    panels: dict[str, dict[str, Any]] = {}
    for one in found:
        for form in one["formats"].values():
            for figure, measured in form["figures"].items():
                network = figure == "latency"
                title = "Networks, one image" if network else f"{one['name']}, {TITLES[figure]}"
                panel = panels.setdefault(title, {"title": title, "work": one["units"][figure], "points": []})
                runtime = form["runtime"].split()[0]
                panel["points"] += [
                    {
                        "runtime": f"{one['name']}, {runtime}" if network else runtime,
                        "removed": 1 - 1 / ratio["ideal"],
                        "ratio": ratio,
                    }
                    for ratio in measured["speed_up"].values()
                ]
    draw({}, folder, {"speed-up": lambda _, plt: speed_up(list(panels.values()), plt)})


if __name__ == "__main__":
    main()
