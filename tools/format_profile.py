"""Where the time of an exported model goes in a runtime, by kind of work, and which kind keeps a speed-up small.

Each runtime's own profiler: ONNX Runtime's, OpenVINO's counters, ExecuTorch's ETDump. They name and cut the nodes
differently; what they all tell apart is products with weights, products of two activations (attention), and the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

WEIGHTS, ATTENTION, REST = "layers with weights", "attention's products", "all else"
PART = {"latency": "model", "ttft": "prefill", "tpot": "decode"}
CALLS = {"model": 30, "prefill": 5, "decode": 15}

# Operators as OpenVINO and XNNPACK call them.
HAVE_WEIGHTS = ("FullyConnected", "Fully Connected", "Convolution", "GroupConvolution", "Deconvolution")
OF_ACTIVATIONS = ("MatMul", "Batch Matrix Multiply", "ScaledDotProductAttention")


def kinds_of(form: str, folder: Path, figure: str, spec: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of one call by kind, measured in a process of its own.

    Args:
        folder: with the ONNX export; another format lies in a folder of its name in it.
        spec: as of `measure_once`.
    """
    if form == "onnx":
        return _onnx(folder, PART[figure], spec)
    request = {"form": form, "folder": str(folder), "part": PART[figure], "spec": dict(spec)}
    done = subprocess.run(
        [sys.executable, "-m", "tools.format_profile", json.dumps(request)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _sorted(nodes: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Seconds by kind of (kind, seconds)."""
    return {kind: sum(s for k, s in nodes if k == kind) for kind in (WEIGHTS, ATTENTION, REST)}


def _kind(operator: str) -> str:
    if operator.startswith(HAVE_WEIGHTS):
        return WEIGHTS
    return ATTENTION if operator.startswith(OF_ACTIVATIONS) else REST


def _onnx(folder: Path, part: str, spec: Mapping[str, Any]) -> dict[str, float]:
    from compress.export.bench.explain import COMPUTE, profile
    from compress.export.bench.local import LOCAL

    def kind(node: Mapping[str, Any]) -> str:
        if not any(operator in node["op"] for operator in COMPUTE):
            return REST
        # Both factors of scores have a batch and heads; a weight has not, and is not told at all once it is packed.
        second = node["inputs"][1:2]
        return ATTENTION if "Conv" not in node["op"] and second and len(second[0]) > 2 else WEIGHTS

    nodes = profile(folder, spec, LOCAL, CALLS[part])[part]["nodes"]
    return _sorted([(kind(node), node["seconds"]) for node in nodes.values()])


def _feed(folder: Path, part: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Random inputs of the measured sizes."""
    from compress.export.formats import BuildOptions, components, profiles_of, random_feed, read_graph, text_profiles

    said = {} if part == "model" else text_profiles(spec["prompt"], spec["context"])
    graph = read_graph(components(folder)[part])
    (axes,) = profiles_of(BuildOptions("onnx", profiles=said), part, graph)
    return random_feed(graph, {a: s[1] for a, s in axes.items()})


def _openvino(folder: Path, part: str, spec: Mapping[str, Any]) -> dict[str, float]:
    from compress.export.runtimes import load

    runner = load("openvino", str(folder / "openvino" / f"{part}.xml"), spec["threads"], profile=True)
    call = runner.prepare(_feed(folder, part, spec))
    calls = []
    for _ in range(CALLS[part] + 1):
        call()
        rows = [(_kind(row.node_type), row.real_time.total_seconds()) for row in runner.native.profiling_info]
        calls.append(_sorted(rows))
    return _middle(calls[1:])


def _executorch(folder: Path, part: str, spec: Mapping[str, Any]) -> dict[str, float]:
    import torch
    from executorch.devtools import Inspector
    from executorch.extension.pybindings import portable_lib

    method = "forward" if part == "model" else part
    portable_lib._unsafe_reset_threadpool(spec["threads"])
    module = portable_lib._load_for_executorch(str(folder / "executorch" / "model.pte"), enable_etdump=True)
    feed = [torch.from_numpy(array) for array in _feed(folder, part, spec).values()]
    for _ in range(CALLS[part] + 1):
        module.run_method(method, feed)
    with tempfile.TemporaryDirectory() as beside:
        path = f"{beside}/etdump"
        module.write_etdump_result_to_file(path)
        blocks = Inspector(etdump_path=path).event_blocks
    (run,) = [block for block in blocks if block.name == "Execute"]
    calls: list[dict[str, float]] = [dict.fromkeys((WEIGHTS, ATTENTION, REST), 0.0) for _ in range(CALLS[part] + 1)]
    for event in run.events:
        kind = _kind(event.name) if event.is_delegated_op else REST
        for call, milliseconds in zip(calls, event.perf_data.raw, strict=True):
            if event.name == "Method::execute":
                call[REST] += milliseconds / 1000
            elif kind != REST:
                call[kind] += milliseconds / 1000
                call[REST] -= milliseconds / 1000
    return _middle(calls[1:])


def _middle(calls: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: median(call[kind] for call in calls) for kind in calls[0]}


def explained(
    dense: Mapping[str, float],
    pruned: Mapping[str, float],
    work: tuple[Mapping[str, int], Mapping[str, int]],
    unit: str,
) -> list[str]:
    """What each kind of work took before and after, and its share of the time that is missing from the ideal.

    Args:
        work: (dense, pruned) amounts of ``unit`` by kind.
    """
    left = sum(work[1].values()) / sum(work[0].values())
    totals = sum(dense.values()), sum(pruned.values())
    missing = totals[1] - left * totals[0]
    said = [
        f"under the profiler {1e3 * totals[0]:.2f} -> {1e3 * totals[1]:.2f} ms; at the ideal it would be"
        f" {1e3 * left * totals[0]:.2f}"
    ]
    if missing <= 0:
        return [*said, "so the profiled runs miss nothing: what the timed runs miss is noise"]
    for kind in sorted(dense, key=lambda k: left * dense[k] - pruned[k]):
        if not dense[kind]:
            continue
        before, after = (side.get(kind, 0) for side in work)
        if not before:
            why = f"no {unit} are counted for them"
        elif before == after:
            why = f"their {unit} stay as they were"
        else:
            rate = (after / pruned[kind]) / (before / dense[kind])
            why = f"{before / after:.2f}x fewer {unit}, at {100 * rate:.0f} % of the rate they were done at before"
        said.append(
            f"{kind}: {1e3 * dense[kind]:.2f} -> {1e3 * pruned[kind]:.2f} ms; {why};"
            f" {100 * (pruned[kind] - left * dense[kind]) / missing:.0f} % of what is missing"
        )
    return said


def main() -> None:
    request = json.loads(sys.argv[1])
    function = {"openvino": _openvino, "executorch": _executorch}[request["form"]]
    print(json.dumps(function(Path(request["folder"]), request["part"], request["spec"])))


if __name__ == "__main__":
    main()
