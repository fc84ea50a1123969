"""What PAGCP can cut of public architectures: groups, time, memory, and the proof of each cut.

    python tools/coverage.py                      # every architecture whose library is installed
    python tools/coverage.py --only vit resnet50  # some
    python tools/coverage.py --write docs/measured/coverage.md  # the table, behind the page's marker

Each architecture is built with random weights, from its library's own configuration, and runs in a process of its own
on one core. Told are: seconds and peak memory of finding groups; the share of the FLOPs in layers of which a group cuts
an axis ("within reach"), and how much can go at most; then 30 % of the FLOPs are cut, the same share of every group,
and the result is compared with zeros at full shape (float64), written and read again, and run in ONNX Runtime. Beside
it torch-pruning's own pruner alone is asked to take 30 % of the channels of the same network. torchvision, timm and
ultralytics are no part of the project: where they are absent, so are their architectures.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.system.host import limit_processor

CUT = 0.3  # of the FLOPs
SECONDS, BYTES = 60, 2 * 2**30  # what groups may take
LIMIT = 300  # seconds of a processor for all of ours, or for torch-pruning alone


class Plain(nn.Module):
    """One tensor of a network's outputs: logits, or the last map."""

    def __init__(self, net: nn.Module, of: str) -> None:
        super().__init__()
        self.net, self.of = net, of

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        found: Tensor = getattr(out, self.of)
        return found


class First(nn.Module):
    """The first of a network's outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        while not isinstance(out, Tensor):
            out = out[0]
        return out


@dataclass(frozen=True)
class Network:
    """One architecture; ``attention`` says whether it has any."""

    library: str
    build: Callable[[], nn.Module]
    size: int = 224
    attention: bool = False


def _hf(name: str, model: str, of: str = "logits", **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind: Any = getattr(transformers, f"{name}Config")
        made: nn.Module = getattr(transformers, model)(kind(**config))
        return Plain(made, of)

    return build


def _of(library: str, name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import importlib

        if library == "timm":
            made: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False, **more)
            return made
        if library == "ultralytics":
            found = importlib.import_module("ultralytics").YOLO(name).model
            found.model[-1].dynamic = True  # its grid is made at every call, or the file takes one batch
            return First(found)
        if library == "zoo":
            from compress.models.zoo import build as zoo

            return zoo(name, more)
        made = importlib.import_module("torchvision.models").get_model(name, weights=None, **more)
        return made

    return build


def _image(name: str, **config: Any) -> Callable[[], nn.Module]:
    return _hf(name, f"{name}ForImageClassification", **config)


SWIN = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
NETWORKS: dict[str, Network] = {
    "resnet50": Network("zoo", _of("zoo", "resnet50")),
    "mobilenet-v2": Network("zoo", _of("zoo", "mobilenet-v2")),
    "ResNet-50": Network("transformers", _image("ResNet")),
    "RegNet": Network("transformers", _image("RegNet")),
    "BiT": Network("transformers", _image("Bit")),
    "ConvNeXt-T": Network("transformers", _image("ConvNext")),
    "ConvNeXt V2-T": Network("transformers", _image("ConvNextV2")),
    "MobileNet V1": Network("transformers", _image("MobileNetV1")),
    "MobileNet V2": Network("transformers", _image("MobileNetV2")),
    "EfficientNet-B0": Network(
        "transformers", _image("EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
    ),
    "PoolFormer-S12": Network("transformers", _image("PoolFormer")),
    "HGNet V2": Network("transformers", _image("HGNetV2")),
    "FocalNet-T": Network("transformers", _image("FocalNet")),
    "TextNet": Network("transformers", _image("TextNet")),
    "DINOv3 ConvNeXt": Network("transformers", _hf("DINOv3ConvNext", "DINOv3ConvNextModel", "pooler_output")),
    "ViT-B": Network("transformers", _image("ViT"), attention=True),
    "DeiT-B": Network("transformers", _image("DeiT"), attention=True),
    "BEiT-B": Network("transformers", _image("Beit"), attention=True),
    "data2vec-vision": Network("transformers", _image("Data2VecVision"), attention=True),
    "ViT-MSN": Network("transformers", _image("ViTMSN"), attention=True),
    "DINOv2-B": Network("transformers", _image("Dinov2"), attention=True),
    "DINOv2-B, registers": Network("transformers", _image("Dinov2WithRegisters"), attention=True),
    "DINOv3 ViT": Network("transformers", _hf("DINOv3ViT", "DINOv3ViTModel", "pooler_output"), attention=True),
    "Swin-T": Network("transformers", _image("Swin", **SWIN), attention=True),
    "Swin V2-T": Network("transformers", _image("Swinv2", **SWIN), 256, attention=True),
    "SegFormer-B0": Network("transformers", _hf("Segformer", "SegformerForSemanticSegmentation"), attention=True),
    "MobileViT-S": Network("transformers", _image("MobileViT"), 256, attention=True),
    "MobileViT V2": Network("transformers", _image("MobileViTV2"), 256, attention=True),
    "PVT-T": Network("transformers", _image("Pvt"), attention=True),
    "PVT V2-B0": Network("transformers", _image("PvtV2"), attention=True),
    "LeViT": Network("transformers", _image("Levit"), attention=True),
    "CvT-13": Network("transformers", _image("Cvt"), attention=True),
    "SwiftFormer": Network("transformers", _image("SwiftFormer"), attention=True),
    "Hiera": Network("transformers", _image("Hiera"), attention=True),
    "I-JEPA": Network("transformers", _image("IJepa", hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072), attention=True),
    "SigLIP": Network("transformers", _image("Siglip"), attention=True),
    "GLPN": Network("transformers", _hf("GLPN", "GLPNForDepthEstimation", "predicted_depth"), attention=True),
    "YOLOS": Network("transformers", _hf("Yolos", "YolosForObjectDetection", image_size=[224, 224],
        num_detection_tokens=20), attention=True),
    "ShuffleNet V2": Network("torchvision", _of("torchvision", "shufflenet_v2_x1_0")),
    "GoogLeNet": Network("torchvision", _of("torchvision", "googlenet", init_weights=False, aux_logits=False)),
    "DenseNet-121": Network("torchvision", _of("torchvision", "densenet121")),
    "SqueezeNet": Network("torchvision", _of("torchvision", "squeezenet1_1")),
    "MNASNet": Network("torchvision", _of("torchvision", "mnasnet1_0")),
    "VGG-11": Network("torchvision", _of("torchvision", "vgg11_bn", num_classes=100)),
    "MobileNet V3-S": Network("torchvision", _of("torchvision", "mobilenet_v3_small")),
    "EfficientNet V2-S": Network("torchvision", _of("torchvision", "efficientnet_v2_s")),
    "ViT-B/16 (torchvision)": Network("torchvision", _of("torchvision", "vit_b_16"), attention=True),
    "MaxViT-T": Network("torchvision", _of("torchvision", "maxvit_t"), attention=True),
    "ResNeSt-50": Network("timm", _of("timm", "resnest50d")),
    "Mixer-S": Network("timm", _of("timm", "mixer_s16_224")),
    "FastViT-T8": Network("timm", _of("timm", "fastvit_t8"), 256),
    "EdgeNeXt-XS": Network("timm", _of("timm", "edgenext_x_small"), 256, attention=True),
    "DeiT-S (timm)": Network("timm", _of("timm", "deit_small_patch16_224"), attention=True),
    "CaiT-XXS": Network("timm", _of("timm", "cait_xxs24_224"), attention=True),
    "EfficientFormer-L1": Network("timm", _of("timm", "efficientformer_l1"), attention=True),
    "YOLOv8n": Network("ultralytics", _of("ultralytics", "yolov8n.yaml"), 320),
    "YOLOv8n-seg": Network("ultralytics", _of("ultralytics", "yolov8n-seg.yaml"), 320),
    "YOLO11n": Network("ultralytics", _of("ultralytics", "yolo11n.yaml"), 320, attention=True),
    "YOLO12n": Network("ultralytics", _of("ultralytics", "yolo12n.yaml"), 320, attention=True),
}  # fmt: skip


def awake(model: nn.Module) -> nn.Module:
    """No weight of one value: a factor that begins at 0 or 1e-6 would hide what stands behind it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model.eval()


def uniform(model: nn.Module, groups: Any, costs: Any, share: float) -> tuple[dict[tuple[str, str], list[int]], float]:
    """The channels of the smallest cut, the same share of every group, that takes ``share`` of the FLOPs; and what it
    takes."""
    from compress.recipes.pagcp.saliency import weight_scores

    orders = [torch.argsort(weight_scores(model, g, 1), stable=True).tolist() for g in groups]
    dense = sum(costs.flops({}).values())
    removed: dict[tuple[str, str], list[int]] = {}
    gone = 0.0
    for percent in range(2, 101, 2):
        every: dict[tuple[str, str], set[int]] = {}
        for group, order in zip(groups, orders, strict=True):
            kept = min(group.levels(), key=lambda n, g=group: abs(n - g.units * (1 - percent / 100)))
            for at, channels in group.removed(order[: group.units - kept]).items():
                every.setdefault(at, set()).update(channels)
        removed = {at: sorted(channels) for at, channels in every.items()}
        gone = 1 - sum(costs.flops(removed).values()) / dense
        if gone >= share:
            break
    return removed, gone


def measure(name: str, onnx: bool = True) -> dict[str, Any]:
    """All facts of one architecture, in this process."""
    from compress.networks.surgery import changed_widths, cut, resize, zeroed
    from compress.recipes.pagcp.costs import Costs
    from compress.recipes.pagcp.groups import find_groups, tensors
    from compress.recipes.pagcp.plan import Plan
    from compress.system.host import peak_memory

    torch.set_num_threads(1)
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = awake(network.build())
    x = torch.randn(2, 3, network.size, network.size)
    began = time.process_time()
    found = find_groups(model, x)
    facts: dict[str, Any] = {
        "seconds": time.process_time() - began,
        "bytes": peak_memory(),
        "groups": len(found.groups),
        "left": {v.layer: v.reason for v in found.left},
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    costs = Costs(model, x)
    flops = costs.flops({})
    facts["flops"] = dense = sum(flops.values())
    touched = {m.layer for g in found.groups for m in g.members}
    facts["reach"] = sum(v for n, v in flops.items() if n in touched) / dense
    facts["weights"] = sum(v for n, v in costs.weights({}).items() if n in touched) / sum(costs.weights({}).values())
    facts["most"] = uniform(model, found.groups, costs, 1.0)[1]
    removed, facts["cut"] = uniform(model, found.groups, costs, CUT)
    with torch.no_grad():
        double, inputs = model.double(), x.double()
        want, got = tensors(zeroed(double, removed)(inputs)), tensors(cut(double, removed)(inputs))
        scale = max(float(t.abs().max()) for t in want)
        facts["masked_is_sliced"] = max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True)) / scale
        model = model.float()
        smaller = cut(model, removed).eval()
        facts["counted"] = sum(p.numel() for p in smaller.parameters()) == costs.parameters(removed)
        with tempfile.TemporaryDirectory() as place:
            Plan.of(model, removed).save(Path(place))
            again = Plan.load(Path(place)).apply(model)
            shapes = json.loads(json.dumps(changed_widths(model, smaller)))
            fresh = resize(network.build().eval(), shapes)
            fresh.load_state_dict(smaller.state_dict())
            outs = [tensors(m(x)) for m in (smaller, again, fresh)]
            facts["read_again"] = all(torch.equal(a, b) for a, b in zip(outs[0], outs[1], strict=True)) and all(
                torch.equal(a, b) for a, b in zip(outs[0], outs[2], strict=True)
            )
    if onnx:
        facts["onnx"] = _onnx(smaller, x)
    return facts


def _onnx(model: nn.Module, x: Tensor) -> str:
    """ "same", or why not."""
    from compress.errors import CompressError
    from compress.exporters.onnx_module import write_checked_module

    with tempfile.TemporaryDirectory() as place:
        try:
            write_checked_module(First(model).eval(), x, ["out"], Path(place), 1e-3)
        except CompressError as e:
            return e.what
    return "same"


def alone(name: str) -> dict[str, Any]:
    """torch-pruning's own pruner on the same network: the share of FLOPs that it takes where a third of every layer's
    channels is to go, or its error."""
    import torch_pruning as tp

    from compress.networks.flops import count_flops

    torch.set_num_threads(1)
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = awake(network.build())
    x = torch.randn(2, 3, network.size, network.size)
    before = sum(f.dense for f in count_flops(model, x[:1]))
    began = time.process_time()
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    pruner = tp.pruner.MagnitudePruner(
        model, x, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.3, ignored_layers=[last], round_to=8
    )
    pruner.step()
    with torch.no_grad():
        model(x)
    after = sum(f.dense for f in count_flops(model, x[:1]))
    return {"seconds": time.process_time() - began, "cut": 1 - after / before}


def started(name: str, kind: str, limit: float, *more: str) -> dict[str, Any]:
    """One measurement in a process of its own, which has so many seconds of a processor."""
    words = [sys.executable, __file__, "--inside", kind, *more, "--only", name]

    bounded = partial(limit_processor, int(limit))
    ran = subprocess.run(words, capture_output=True, encoding="utf-8", preexec_fn=bounded, check=False)
    if ran.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"error": f"no end within {limit:.0f} s of a processor, or out of memory"}
    last = ran.stdout.strip().splitlines()[-1:] or [""]
    if ran.returncode or not last[0].startswith("{"):
        return {"error": (ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"])[-1][:200]}
    found: dict[str, Any] = json.loads(last[0])
    return found


def passed(facts: Mapping[str, Any]) -> bool:
    """Whether all that is asked of an architecture holds."""
    return (
        "error" not in facts
        and facts["seconds"] < SECONDS
        and (facts["bytes"] or 0) < BYTES
        and facts["cut"] >= CUT
        and facts["masked_is_sliced"] <= 1e-8
        and facts["read_again"]
        and facts["counted"]
        and facts.get("onnx", "same") == "same"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--inside", choices=["groups", "alone"])
    parser.add_argument("--jsonl", type=Path, help="one line an architecture; those that are there are not run again")
    parser.add_argument("--write", type=Path, help="write the table into this page, behind its marker")
    parser.add_argument("--no-onnx", action="store_true", help="leave ONNX out")
    parser.add_argument("--no-alone", action="store_true", help="leave torch-pruning out")
    given = parser.parse_args()
    names = given.only if given.only is not None else list(NETWORKS)
    if given.inside:
        print(json.dumps(measure(names[0], not given.no_onnx) if given.inside == "groups" else alone(names[0])))
        return
    rows: dict[str, dict[str, Any]] = {}
    if given.jsonl is not None and given.jsonl.exists():
        rows = {r["name"]: r for r in map(json.loads, given.jsonl.read_text("utf-8").splitlines())}
    for name in names:
        if name not in rows:
            facts = started(name, "groups", LIMIT, *["--no-onnx"] * given.no_onnx)
            rows[name] = {"name": name, "groups": facts}
            if not given.no_alone:
                rows[name]["alone"] = started(name, "alone", LIMIT)
            if given.jsonl is not None:
                with given.jsonl.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[name]) + "\n")
        print(line(rows[name]), flush=True)
    if given.write is not None:
        before = given.write.read_text("utf-8").partition(MARKER)[0]
        given.write.write_text(f"{before}{MARKER}\n{table(rows)}", encoding="utf-8")


MARKER = "<!-- the table: tools/coverage.py -->\n"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the rows come to and the table, as Markdown."""
    good = sum(passed(r["groups"]) for r in rows.values())
    wide = sum("error" not in r["groups"] and r["groups"]["reach"] >= 0.8 for r in rows.values())
    attention = sum(NETWORKS[name].attention for name in rows)
    shown = "architecture library pass groups s GB reach most masked-sliced read ONNX torch-pruning"
    lines = [
        f"{len(rows)} architectures, {attention} with attention: {good} pass all checks (groups in under {SECONDS} s"
        f" of one core and {BYTES / 2**30:.0f} GB in all, {100 * CUT:.0f} % of the FLOPs cut, masked is sliced, read"
        " again,"
        f" ONNX where it was tried), {wide} have 80 % or more of their FLOPs within reach. `-`: not tried.",
        "",
        f"| {' | '.join(shown.split())} |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        facts, beside = row["groups"], row.get("alone")
        cut = (
            "-" if beside is None else beside.get("error") or f"{100 * beside['cut']:.0f} %, {beside['seconds']:.0f} s"
        )
        if "error" in facts:
            cells = ["no", *["-"] * 7, facts["error"].replace("|", "/")[:80]]
        else:
            cells = [
                "yes" if passed(facts) else "no",
                str(facts["groups"]),
                f"{facts['seconds']:.0f}",
                f"{facts['bytes'] / 2**30:.1f}",
                f"{100 * facts['reach']:.0f} %",
                f"{100 * facts['most']:.0f} %",
                f"{facts['masked_is_sliced']:.0e}",
                "yes" if facts["read_again"] and facts["counted"] else "no",
                facts.get("onnx", "-").replace("|", "/")[:60],
            ]
        lines.append(f"| {' | '.join([name, NETWORKS[name].library, *cells, cut.replace('|', '/')[:60]])} |")
    return "\n".join(lines) + "\n"


def line(row: Mapping[str, Any]) -> str:
    facts = row["groups"]
    if "error" in facts:
        return f"{row['name']:28} {facts['error'][:150]}"
    beside = row.get("alone", {})
    other = beside.get("error", f"{100 * beside.get('cut', 0):.0f} % in {beside.get('seconds', 0):.0f} s")
    told = (
        f"{row['name']:28} {'ok  ' if passed(facts) else 'FAIL'} {facts['seconds']:5.1f} s",
        f"{facts['bytes'] / 2**30:4.1f} GB {facts['groups']:4} groups",
        f"reach {100 * facts['reach']:5.1f} %, most {100 * facts['most']:5.1f} %, cut {100 * facts['cut']:4.1f} %",
        f"off {facts['masked_is_sliced']:.0e}, read {facts['read_again']}, counted {facts['counted']}",
        f"onnx {facts.get('onnx', '-')[:60]} | {other[:60]}",
    )
    return ", ".join(told)


if __name__ == "__main__":
    main()
