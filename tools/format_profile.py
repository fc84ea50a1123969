"""Where the time of an exported model goes in a runtime, by kind of work, and which kind keeps a speed-up small.

Each runtime's own profiler: ONNX Runtime's, OpenVINO's counters, ExecuTorch's ETDump. They name and cut the nodes
differently; what they all tell apart is products with weights, products of two activations (attention), and the rest.
A node's time is its least over some calls: what other work on the machine adds falls on few of them.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WEIGHTS, ATTENTION, REST = "layers with weights", "attention's products", "all else"
STARTING = "starting them"  # ExecuTorch tells the time of a call with and without its kernel
PART = {"latency": "model", "ttft": "prefill", "tpot": "decode"}
CALLS = {"model": 30, "prefill": 8, "decode": 20}

# Operators as OpenVINO and XNNPACK call them.
HAVE_WEIGHTS = ("FullyConnected", "Fully Connected", "Convolution", "GroupConvolution", "Deconvolution")
OF_ACTIVATIONS = ("MatMul", "Batch Matrix Multiply", "ScaledDotProductAttention")


Kinds = dict[str, dict[str, float]]  # kind -> operator, as the runtime calls it -> seconds of one call


def kinds_of(form: str, folder: Path, figure: str, spec: Mapping[str, Any]) -> Kinds:
    """Where the time of a call goes, measured in a process of its own.

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
    found: Kinds = json.loads(done.stdout.splitlines()[-1])
    return found


def _sorted(nodes: Sequence[tuple[str, str, float]]) -> Kinds:
    """Of (kind, operator, seconds) of every node."""
    found: Kinds = {WEIGHTS: {}, ATTENTION: {}, REST: {}}
    for kind, operator, seconds in nodes:
        found[kind][operator] = found[kind].get(operator, 0.0) + seconds
    return found


def _kind(operator: str) -> str:
    if operator.startswith(HAVE_WEIGHTS):
        return WEIGHTS
    return ATTENTION if operator.startswith(OF_ACTIVATIONS) else REST


def _onnx(folder: Path, part: str, spec: Mapping[str, Any]) -> Kinds:
    from compress.exporters.bench.explain import COMPUTE, profile
    from compress.exporters.bench.local import LOCAL

    def kind(node: Mapping[str, Any]) -> str:
        if not any(operator in node["op"] for operator in COMPUTE):
            return REST
        # Both factors of scores have a batch and heads; a weight has not, and is not told at all once it is packed.
        second = node["inputs"][1:2]
        return ATTENTION if "Conv" not in node["op"] and second and len(second[0]) > 2 else WEIGHTS

    nodes = profile(folder, spec, LOCAL, CALLS[part])[part]["nodes"]
    return _sorted([(kind(node), node["op"], node["seconds"]) for node in nodes.values()])


def _feed(folder: Path, part: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Random inputs of the measured sizes."""
    from compress.exporters.formats import BuildOptions, components, profiles_of, random_feed, read_graph, text_profiles

    said = {} if part == "model" else text_profiles(spec["prompt"], spec["context"])
    graph = read_graph(components(folder)[part])
    (axes,) = profiles_of(BuildOptions("onnx", profiles=said), part, graph)
    return random_feed(graph, {a: s[1] for a, s in axes.items()})


def _openvino(folder: Path, part: str, spec: Mapping[str, Any]) -> Kinds:
    from compress.exporters.runtimes import load

    runner = load("openvino", str(folder / "openvino" / f"{part}.xml"), spec["threads"], profile=True)
    call = runner.prepare(_feed(folder, part, spec))
    least: dict[str, tuple[str, str, float]] = {}
    for _ in range(CALLS[part]):
        call()
        for row in runner.native.profiling_info:
            before = least[row.node_name][2] if row.node_name in least else math.inf
            seconds = min(before, row.real_time.total_seconds())
            least[row.node_name] = _kind(row.node_type), row.node_type, seconds
    return _sorted(list(least.values()))


def _executorch(folder: Path, part: str, spec: Mapping[str, Any]) -> Kinds:
    import torch
    from executorch.devtools import Inspector
    from executorch.extension.pybindings import portable_lib

    method = "forward" if part == "model" else part
    portable_lib._unsafe_reset_threadpool(spec["threads"])
    module = portable_lib._load_for_executorch(str(folder / "executorch" / "model.pte"), enable_etdump=True)
    feed = [torch.from_numpy(array) for array in _feed(folder, part, spec).values()]
    for _ in range(CALLS[part]):
        module.run_method(method, feed)
    with tempfile.TemporaryDirectory() as beside:
        path = f"{beside}/etdump"
        module.write_etdump_result_to_file(path)
        blocks = Inspector(etdump_path=path).event_blocks
    (run,) = [block for block in blocks if block.name == "Execute"]
    nodes = []
    for event in run.events:
        seconds, operator = min(event.perf_data.raw) / 1000, event.name.split(" (")[0]
        if event.is_delegated_op:
            nodes += [(_kind(operator), operator, seconds), (REST, STARTING, -seconds)]
        elif operator.startswith("native_call_"):
            nodes += [(REST, operator.removeprefix("native_call_"), seconds), (REST, STARTING, -seconds)]
        elif operator in ("OPERATOR_CALL", "DELEGATE_CALL"):  # each holds some of the above
            nodes.append((REST, STARTING, seconds))
    return _sorted(nodes)


def explained(dense: Kinds, pruned: Kinds, work: tuple[Mapping[str, int], Mapping[str, int]], unit: str) -> list[str]:
    """What each kind of work took before and after, and its share of the time that is missing from the ideal.

    Args:
        work: (dense, pruned) amounts of ``unit`` by kind.
    """
    left = sum(work[1].values()) / sum(work[0].values())
    times = [{kind: sum(operators.values()) for kind, operators in side.items()} for side in (dense, pruned)]
    totals = [sum(side.values()) for side in times]
    missing = totals[1] - left * totals[0]
    said = [
        f"under the profiler {1e3 * totals[0]:.2f} -> {1e3 * totals[1]:.2f} ms; at the ideal it would be"
        f" {1e3 * left * totals[0]:.2f}"
    ]
    if missing <= 0:
        return [*said, "so the profiled calls miss nothing, and do not say what the timed ones miss"]
    lost = {kind: times[1][kind] - left * times[0][kind] for kind in dense if times[0][kind]}
    for kind in sorted(lost, key=lambda k: -lost[k]):
        before, after = (side.get(kind, 0) for side in work)
        if not before:
            why = f"no {unit} are counted for them"
        elif before == after:
            why = f"their {unit} stay as they were"
        else:
            rate = (after / times[1][kind]) / (before / times[0][kind])
            why = f"{before / after:.2f}x fewer {unit}, at {100 * rate:.0f} % of the rate they were done at before"
        if kind == REST:
            most = sorted(pruned[REST].items(), key=lambda row: -row[1])[:4]
            why += f" ({', '.join(f'{operator} {1e3 * seconds:.1f}' for operator, seconds in most)})"
        said.append(
            f"{kind}: {1e3 * times[0][kind]:.2f} -> {1e3 * times[1][kind]:.2f} ms; {why};"
            f" {100 * lost[kind] / missing:.0f} % of what is missing"
        )
    return said


def main() -> None:
    request = json.loads(sys.argv[1])
    function = {"openvino": _openvino, "executorch": _executorch}[request["form"]]
    print(json.dumps(function(Path(request["folder"]), request["part"], request["spec"])))


if __name__ == "__main__":
    main()
