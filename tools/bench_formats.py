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
    draw_speed_up(found, given.out)


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
    from compress.export.bench.explain import why
    from compress.export.bench.local import LOCAL
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
                spec = {"threads": 1, "batch": 1}
                for line in why(folders[1.0], folders[share], spec, LOCAL)["model"]["lines"]:
                    print(f"    {line}", flush=True)
    return found


def draw_speed_up(found: dict[str, Any], folder: Path) -> None:
    """speed-up.png: every point against the ideal."""
    from compress.export.bench.plots import speed_up
    from compress.plots import draw

    points = [
        {
            "runtime": f"{name}, {form['runtime'].split()[0]}",
            "flops_removed": 1 - 1 / form[f"speed-up {share}"]["ideal"],
            "ratio": form[f"speed-up {share}"],
        }
        for name, one in found.items()
        for form in one["formats"].values()
        for share in SHARES[1:]
    ]
    draw({}, folder, {"speed-up": lambda _, plt: speed_up(points, plt)}, latency=False)


if __name__ == "__main__":
    main()
