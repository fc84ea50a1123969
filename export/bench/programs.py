"""Runtimes' own benchmark programs: how each is called, and what its output says.

For devices where there is no Python. The formats are those of the programs' documentation and source:
onnxruntime_perf_test (onnxruntime/test/perftest), LiteRT's benchmark_model (tensorflow/lite/tools/benchmark), MNN's
MNNV2Basic.out (tools/cpp).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import CompressError
from compress.exporters.bench.protocol import throttled

NUMBER = r"([0-9.]+(?:e[+-]?[0-9]+)?)"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """
    Args:
        title: the program's usual name.
        words: (program, model, request, file for raw samples) -> the argument list.
        read: (its output, the text of that file) -> ``load``, ``first`` and ``samples`` in seconds, ``version`` and
            ``peak_rss`` where it says so, and ``summary`` (its own figures) where it keeps no samples.
        raw: it writes a file with raw samples.
    """

    title: str
    words: Callable[[str, str, Mapping[str, Any], str], Sequence[str]]
    read: Callable[[str, str], Figures]
    raw: bool = False


def _found(pattern: str, text: str) -> float | None:
    match = re.search(pattern, text)
    return float(match[1]) if match else None


def _unreadable(program: str, said: str) -> CompressError:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return CompressError(
        f"{program} did not say how long an inference takes: {lines[-1][:200] if lines else 'it said nothing'}",
        where=program,
        fix="run it by hand on the device; another version may write another format",
    )


def _ort_words(program: str, model: str, request: Mapping[str, Any], raw: str) -> list[str]:
    # -I: random inputs; -f: sizes of the axes that the file leaves open; the last word is the file of raw samples.
    words = [program, "-I", "-e", "cpu", "-m", "times", "-r", str(request["runs"]), "-x", str(request["threads"]), "-s"]
    for axis, size in request.get("axes", {}).items():
        words += ["-f", f"{axis}:{size}"]
    return [*words, model, raw]


def read_ort(said: str, raw: str = "") -> Figures:
    """onnxruntime_perf_test; ``raw`` has ``model,seconds,peak memory,CPU,run`` lines."""
    samples = [
        float(cells[1])
        for cells in (line.split(",") for line in raw.splitlines())
        if len(cells) == 5 and cells[4].isdigit()
    ]
    load = _found(rf"Session creation time cost:\s*{NUMBER}", said)
    first = _found(rf"First inference time cost:\s*{NUMBER}", said)  # whole milliseconds
    mean = _found(rf"Average inference time cost(?: total)?:\s*{NUMBER}", said)
    if mean is None or load is None:
        raise _unreadable("onnxruntime_perf_test", said)
    found: Figures = {"load": load, "samples": samples}
    if first is not None:
        found["first"] = first / 1000
    peak = _found(rf"Peak working set size:\s*{NUMBER}", said)
    if peak is not None:
        found["peak_rss"] = int(peak)
    found["summary"] = {"mean": mean / 1000, "count": int(_found(rf"Total inference requests:\s*{NUMBER}", said) or 0)}
    for name, key in (("Min", "min"), ("Max", "max"), ("P50", "median"), ("P90", "p90"), ("P99", "p99")):
        value = _found(rf"{name} Latency(?: is)?:?\s*{NUMBER}", said)
        if value is not None:
            found["summary"][key] = value
    return found


def _litert_words(program: str, model: str, request: Mapping[str, Any], raw: str) -> list[str]:
    return [
        program,
        f"--graph={model}",
        f"--num_threads={request['threads']}",
        f"--num_runs={request['runs']}",
        f"--min_secs={request['min_seconds']}",
        "--report_peak_memory_footprint=true",
    ]


def read_litert(said: str, raw: str = "") -> Figures:
    """benchmark_model: microseconds; the last ``count=`` line is the steady phase."""
    names = ("Init", "First inference", r"Warmup \(avg\)", r"Inference \(avg\)")
    match = re.search("Inference timings in us: " + ", ".join(f"{name}: {NUMBER}" for name in names), said)
    counts = re.findall(r"count=\d+ .*", said)
    if match is None or not counts:
        raise _unreadable("benchmark_model", said)
    init, first, _, mean = (float(part) / 1e6 for part in match.groups())
    summary = {"mean": mean}
    for key, name in (("min", "min"), ("max", "max"), ("std", "std"), ("median", "median"), ("p95", "p95")):
        value = _found(rf"\b{name}={NUMBER}", counts[-1])
        if value is not None:
            summary[key] = value / 1e6
    summary["count"] = int(_found(r"count=(\d+)", counts[-1]) or 0)
    found: Figures = {"load": init, "first": first, "samples": [], "summary": summary}
    peak = _found(rf"Overall peak memory footprint \(MB\) via periodic monitoring: {NUMBER}", said)
    if peak is not None:
        found["peak_rss"] = int(peak * 1e6)
    return found


def _mnn_words(program: str, model: str, request: Mapping[str, Any], raw: str) -> list[str]:
    # MNNV2Basic.out model runs savedTensors forwardType threads
    return [program, model, str(request["runs"]), "0", "0", str(request["threads"])]


def read_mnn(said: str, raw: str = "") -> Figures:
    """MNNV2Basic.out: milliseconds; it tells no load and no first inference."""
    match = re.search(rf"Avg= {NUMBER} ms, OpSum = {NUMBER} ms min= {NUMBER} ms, max= {NUMBER} ms", said)
    if match is None:
        raise _unreadable("MNNV2Basic.out", said)
    mean, _, low, high = (float(part) / 1000 for part in match.groups())
    return {"samples": [], "summary": {"mean": mean, "min": low, "max": high}}


PROGRAMS = {
    "onnx": Program("onnxruntime_perf_test", _ort_words, read_ort, raw=True),
    "ort": Program("onnxruntime_perf_test", _ort_words, read_ort, raw=True),
    "litert": Program("benchmark_model", _litert_words, read_litert),
    "mnn": Program("MNNV2Basic.out", _mnn_words, read_mnn),
}


def figure(found: Figures) -> dict[str, Any]:
    """What a program said, as the agent would have said it.

    What it does not tell is None. A program that keeps no raw samples gives one: the median where it tells it, else the
    mean. Tails, spread and throttling are not told then, and ``of_program`` holds what it says itself.
    """
    summary = found.get("summary", {})
    samples = found["samples"] or [summary.get("median", summary.get("mean"))]
    middle = {
        "load": found.get("load"),
        "first": found.get("first"),
        "samples": samples,
        "calls_per_sample": 1 if found["samples"] else max(int(summary.get("count", 0)), 2),
        "warm_up": [],
        "warm": True,  # each of these programs warms up by itself, by a rule of its own
        "throttled": None,
        "of_program": summary,
    }
    if found["samples"]:
        middle["throttled"] = throttled(found["samples"])
    return middle
