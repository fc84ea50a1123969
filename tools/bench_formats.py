"""What narrower layers are worth in each runtime: the speed-up beside the FLOPs that went, and why it falls short.

    PYTHONPATH=. python tools/bench_formats.py --out /tmp/bench-formats

A ResNet and a network with three heads, each dense and with 3/4 and 1/2 of its channels, weights drawn by seed, in ONNX
Runtime, ExecuTorch and OpenVINO on one thread. Every model runs in fresh processes, in turn forwards and backwards; the
speed-up is the median of the ratios of a round, with its 95 % interval. Where it is under 80 % of the ideal, ONNX
Runtime's own profile says which layers did not get faster.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

SHARES = (1.0, 0.75, 0.5)
FORMATS = ("onnx", "executorch", "openvino")


class ThreeHeads(nn.Module):
    """A trunk of 3x3 convolutions, and per task two more and an output: a class, a mask, a depth."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

        w = width
        self.trunk = nn.Sequential(block(3, w, 2), block(w, w, 1), block(w, 2 * w, 2), block(2 * w, 2 * w, 1))
        self.mask = nn.Sequential(block(2 * w, w, 1), block(w, w, 1), nn.Conv2d(w, 1, 1))
        self.depth = nn.Sequential(block(2 * w, w, 1), block(w, w, 1), nn.Conv2d(w, 1, 1))
        self.body, self.kind = block(2 * w, 2 * w, 2), nn.Linear(2 * w, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.trunk(x)
        return {"kind": self.kind(self.body(y).mean((2, 3))), "mask": self.mask(y), "depth": self.depth(y)}


def network(name: str, share: float) -> tuple[nn.Module, list[str], tuple[int, ...]]:
    """(network, outputs, input shape of one sample)."""
    from compress.models.zoo import build

    torch.manual_seed(0)
    if name == "resnet":
        return (
            build("resnet", {"depth": 14, "width": round(64 * share), "classes": 10}, seed=0).eval(),
            ["class"],
            (3, 64, 64),
        )
    return ThreeHeads(round(64 * share)).eval(), ["kind", "mask", "depth"], (3, 96, 96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(json.loads(given.one))))
        return
    if given.out is None:
        parser.error("--out is needed")
    found = {name: compare(name, given) for name in ("resnet", "three-heads")}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "formats.json").write_text(json.dumps(found, indent=1) + "\n")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """One model in a process of its own."""
    import numpy as np

    from compress.export.bench.protocol import steady
    from compress.export.runtimes import load

    runner = load(spec["format"], spec["path"], 1)
    values = np.random.default_rng(0).standard_normal([1, *spec["shape"]]).astype(np.float32)
    call = runner.prepare({"input": values})
    return {**steady(call, spec["seconds"], 5), "runtime": runner.version}


def compare(name: str, given: argparse.Namespace) -> dict[str, Any]:
    from compress.export.bench.stats import paired_ratio
    from compress.export.command import network_source
    from compress.export.formats import BuildOptions, make
    from compress.export.onnx_module import export_module
    from compress.flops import count_flops

    flops, shapes, folders = {}, {}, {}
    for share in SHARES:
        model, names, shape = network(name, share)
        folder = given.out / f"{name}-{share}"
        if not (folder / "model.onnx").exists():
            folder.mkdir(parents=True, exist_ok=True)
            export_module(model, torch.randn(2, *shape), names, folder)
        for form in given.formats:
            if form != "onnx" and not (folder / form).exists():
                options = BuildOptions(form)
                make(network_source(folder, model, torch.randn(2, *shape), options, {}), folder / form, options)
        flops[share] = sum(f.dense for f in count_flops(model, torch.randn(1, *shape)))
        shapes[share], folders[share] = shape, folder
    found: dict[str, Any] = {"flops": flops, "formats": {}}
    for form in given.formats:
        times: dict[float, list[float]] = {share: [] for share in SHARES}
        runtime = ""
        for i in range(given.processes):
            for share in SHARES if i % 2 == 0 else reversed(SHARES):
                file = {"onnx": "model.onnx", "executorch": "executorch/model.pte", "openvino": "openvino/model.xml"}[
                    form
                ]
                spec = {
                    "format": form,
                    "path": str(folders[share] / file),
                    "shape": shapes[share],
                    "seconds": given.seconds,
                }
                done = subprocess.run(
                    [sys.executable, __file__, "--one", json.dumps(spec)], capture_output=True, text=True, check=True
                )
                one = json.loads(done.stdout.splitlines()[-1])
                times[share].append(median(one["samples"]))
                runtime = one["runtime"]
        found["formats"][form] = {"runtime": runtime, "medians": times}
        print(f"{name}, {runtime}: dense {1000 * median(times[1.0]):.2f} ms", flush=True)
        for share in SHARES[1:]:
            ideal = flops[1.0] / flops[share]
            ratio = paired_ratio(times[1.0], times[share])
            found["formats"][form][f"speed-up {share}"] = {**ratio, "ideal": ideal}
            print(
                f"  {share:.2f} of the channels: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] times"
                f" as fast; FLOPs {ideal:.2f} times fewer; {100 * ratio['median'] / ideal:.0f} % of the ideal",
                flush=True,
            )
            if form == "onnx" and ratio["median"] < 0.8 * ideal:
                for line in slow_layers(folders[1.0], folders[share], shapes[share], ideal):
                    print(f"    {line}", flush=True)
    return found


def slow_layers(dense: Path, pruned: Path, shape: Sequence[int], ideal: float) -> list[str]:
    """The layers that got less faster than the FLOPs say, the costliest first, by ONNX Runtime's profile."""
    before, after = (profile(folder, shape) for folder in (dense, pruned))
    rows = []
    for kind, now in after.items():
        was = before.get(kind, 0.0)
        if was and was / now < 0.8 * ideal:
            rows.append((now - was / ideal, f"{kind}: {1000 * was:.2f} -> {1000 * now:.2f} ms ({was / now:.2f} times)"))
    return [text for _, text in sorted(rows, reverse=True)[:4]]


def profile(folder: Path, shape: Sequence[int]) -> dict[str, float]:
    """Seconds a call of every node, the median over 30 calls, by the node's name."""
    import tempfile

    import numpy as np

    from compress.export.runtimes import load

    with tempfile.TemporaryDirectory() as beside:
        runner = load("onnx", str(folder / "model.onnx"), 1, profile=f"{beside}/p")
        call = runner.prepare({"input": np.random.default_rng(0).standard_normal([1, *shape]).astype(np.float32)})
        for _ in range(30):
            call()
        events = json.loads(Path(runner.native.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = f"{event['name'].removesuffix('_kernel_time')} ({event['args']['op_name']})"
            times.setdefault(name, []).append(event["dur"] / 1e6)
    return {name: median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
