"""What pruning brings on each runtime, against what the FLOPs promise: a network at several sparsities.

    python tools/bench_speedup.py --out runs/speedup     # resnet-20 of 64 channels; ONNX Runtime, OpenVINO, ExecuTorch

Channels go in whole blocks (``--round-to``), by the magnitude pruner of Torch-Pruning: what is asked here is what the
runtimes make of smaller layers, not which channels may go. Every point is the median of paired ratios over fresh
processes, interleaved, with its 95 % interval. Writes speedup.json with all raw samples and speed-up.png; where a point
on ONNX Runtime is below 80 % of the ideal, its layers are named.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from compress.export.bench.explain import why
from compress.export.bench.local import LOCAL, compare
from compress.export.bench.plots import speed_up
from compress.export.formats import BuildOptions, Source, make, network_profiles
from compress.export.onnx_module import export_module
from compress.models.zoo import build
from compress.plots import draw

TITLES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "ExecuTorch (XNNPACK)"}


def network(width: int, depth: int, ratio: float, round_to: int) -> torch.nn.Module:
    import torch_pruning

    torch.manual_seed(0)
    model = build("resnet", {"depth": depth, "width": width, "classes": 10}).eval()
    if ratio:
        importance = torch_pruning.importance.MagnitudeImportance()
        torch_pruning.pruner.MagnitudePruner(
            model,
            torch.randn(1, 3, 32, 32),
            importance,
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=[model.classifier],
        ).step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5], help="channels to remove")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--processes", type=int, default=5)
    given = parser.parse_args()
    spec = {"batch": 1, "processes": given.processes, "threads": 1, "min_seconds": 1.0, "min_runs": 10}
    built: dict[float, Path] = {}
    for ratio in (0.0, *given.ratios):
        folder = built[ratio] = given.out / f"{100 * ratio:.0f}"
        if folder.exists():
            continue
        model, x = network(given.width, given.depth, ratio, given.round_to), torch.randn(2, 3, 32, 32)
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        export_module(model, x, ["classes"], partial)
        for name in given.formats:
            if name != "onnx":
                make(Source(partial, model), partial / name, BuildOptions(name, profiles=network_profiles()))
        partial.rename(folder)
    points: list[dict[str, Any]] = []
    for ratio in given.ratios:
        explained = why(built[0.0], built[ratio], spec, LOCAL)["model"]
        for name in given.formats:
            places = [built[r] if name == "onnx" else built[r] / name for r in (0.0, ratio)]
            found = compare(places[0], places[1], spec, format=name)
            point = {
                "runtime": TITLES[name],
                "version": found["spec"]["runtime"],
                "channels_removed": ratio,
                "flops_removed": 1 - 1 / explained["ideal"],
                "ratio": {k: found["ratios"]["latency"][k] for k in ("median", "low", "high")},
                "milliseconds": [1e3 * found[k]["latency"]["median"] for k in ("dense", "pruned")],
                "reached": found["ratios"]["latency"]["median"] / explained["ideal"],
                "bench": found,
            }
            points.append(point)
            print(
                f"{point['runtime']:22} {100 * point['flops_removed']:.0f} % of the FLOPs:"
                f" {point['milliseconds'][0]:.3f} -> {point['milliseconds'][1]:.3f} ms,"
                f" {point['ratio']['median']:.2f}x ({point['ratio']['low']:.2f} to {point['ratio']['high']:.2f}),"
                f" {100 * point['reached']:.0f} % of the ideal {explained['ideal']:.2f}x",
                flush=True,
            )
        print("\n".join(f"    profile: {line}" for line in explained["lines"]), flush=True)
    (given.out / "speedup.json").write_text(json.dumps(points, indent=1) + "\n")
    draw({"points": points}, given.out, {"speed-up": lambda found, plt: speed_up(found["points"], plt)}, latency=False)


if __name__ == "__main__":
    main()
