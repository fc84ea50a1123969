"""The models that bench_formats.py measures: each in several sizes, exported to every format asked for.

A ResNet and a network with three heads, dense and with 3/4 and 1/2 of their channels, weights drawn by seed. And a
language model, dense and with 25 % and 50 % of its backbone sliced away: by the plainest good rule, all FFNs alike and
the first and last blocks left alone, or by the plans of runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.exporters.command import network_source, text_source
from compress.exporters.formats import BuildOptions, make, text_profiles
from compress.exporters.onnx import export_llm
from compress.exporters.onnx_module import export_module
from compress.language.budget import target_removed
from compress.language.plan import BlockPlan, Plan
from compress.models.families.base import Costs
from compress.networks.flops import count_flops
from compress.recipes.tyr.choice import left_alone
from tools.format_profile import ATTENTION, WEIGHTS

SHARES = (1.0, 0.75, 0.5)  # of a network's channels
REMOVED = (0.25, 0.5)  # of a language model's backbone
STEP = 16  # neurons: every width is a multiple of it, as `round_to` of the recipes makes it
TOKENS = 512  # the prompt, and the context behind which one token is decoded


@dataclass(frozen=True)
class Case:
    """One model in several sizes.

    ``folders``: size -> folder with the ONNX export and a folder a format; the dense one first. ``work``: figure ->
    size -> kind of work -> its amount; ``units``: figure -> what is counted. ``spec`` is that of `measure_once`.
    """

    name: str
    folders: dict[str, Path]
    work: dict[str, dict[str, dict[str, int]]]
    units: dict[str, str]
    spec: dict[str, Any]

    def ideal(self, figure: str, size: str) -> float:
        """The speed-up that the work promises."""
        dense = next(iter(self.folders))
        return sum(self.work[figure][dense].values()) / sum(self.work[figure][size].values())


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
    width = round(64 * share)
    if name == "resnet":
        return build("resnet", {"depth": 14, "width": width, "classes": 10}, seed=0).eval(), ["class"], (3, 64, 64)
    return ThreeHeads(width).eval(), ["kind", "mask", "depth"], (3, 96, 96)


def network_case(name: str, formats: Sequence[str], out: Path) -> Case:
    """``name`` is ``resnet`` or ``three-heads``; its work is the FLOPs of its layers."""
    folders, work = {}, {}
    for share in SHARES:
        model, names, shape = network(name, share)
        size = "dense" if share == 1 else f"width {round(64 * share)} for 64"
        folder = folders[size] = out / f"{name}-{share}"
        if not (folder / "model.onnx").exists():
            folder.mkdir(parents=True, exist_ok=True)
            export_module(model, torch.randn(2, *shape), names, folder)
        for form in formats:
            if form != "onnx" and not (folder / form).exists():
                options = BuildOptions(form)
                make(network_source(folder, model, torch.randn(2, *shape), options, {}), folder / form, options)
        work[size] = {WEIGHTS: sum(f.dense for f in count_flops(model, torch.randn(1, *shape)))}
    return Case(name, folders, {"latency": work}, {"latency": "FLOPs"}, {"threads": 1, "batch": 1})


def even_plan(costs: Costs, share: float) -> Plan:
    """All FFNs but those of the first and last blocks cut alike, in steps of `STEP` neurons; attention stays whole."""
    g = costs.geometry
    front, back = left_alone(g.layers)
    steps = round(target_removed(share, costs.backbone) / (STEP * costs.blocks[0].neuron))
    base, more = divmod(steps, g.layers - front - back)
    widths = [block.ffn for block in g.blocks]
    for i in range(front, g.layers - back):
        widths[i] -= STEP * (base + (i - front < more))
    return Plan(
        tuple(BlockPlan(tuple(range(block.heads)), tuple(range(n))) for block, n in zip(g.blocks, widths, strict=True))
    )


def llm_work(costs: Costs, plan: Plan) -> dict[str, dict[str, int]]:
    """FLOPs of a prompt (``ttft``) and bytes of float32 weights read for a token (``tpot``), by kind.

    Of the prompt: the blocks' linear layers for every token, the head for the last one alone, and attention's two
    products over the whole square of scores, masked half included, which is what runtimes compute. Of a token: the
    blocks' linear layers and the head. Norms, embedding and cache are not counted.
    """
    g = costs.geometry
    counts = plan.counts(g)
    kept = costs.backbone - plan.removed(costs)
    head = g.hidden * g.vocab
    columns = sum(heads * block.head_dim for (heads, _, _), block in zip(counts, g.blocks, strict=True))
    scores = 4 * TOKENS * TOKENS * columns
    return {
        "ttft": {WEIGHTS: 2 * (TOKENS * kept + head), ATTENTION: scores},
        "tpot": {WEIGHTS: 4 * (kept + head)},
    }


def plans(costs: Costs, given: Sequence[Path]) -> Iterator[tuple[str, Plan]]:
    """(its size in words, plan): the dense one, and those given or the even ones."""
    g = costs.geometry
    yield "dense", Plan(tuple(BlockPlan(tuple(range(block.heads)), tuple(range(block.ffn))) for block in g.blocks))
    for made in [Plan.load(p) for p in given] or [even_plan(costs, share) for share in REMOVED]:
        made.check(g)
        yield f"{100 * made.removed(costs) / costs.backbone:.1f} % of the backbone gone", made


def llm_case(name: str, given: Sequence[Path], formats: Sequence[str], out: Path) -> Case:
    """A language model from `compress list models`, sliced by every plan and exported."""
    from compress.models.families import family_for
    from compress.models.reading import load_config, load_model
    from compress.models.sources import resolve

    source = resolve(name).folder
    config = load_config(source)
    family = family_for(config)
    costs = family.costs(config)
    profiles = text_profiles(TOKENS, TOKENS)
    ids = torch.randint(0, costs.geometry.vocab, (2 * TOKENS,), generator=torch.Generator().manual_seed(0)).numpy()
    folders: dict[str, Path] = {}
    work: dict[str, dict[str, dict[str, int]]] = {"ttft": {}, "tpot": {}}
    for size, plan in plans(costs, given):
        held = json.dumps([[b.heads, b.neurons] for b in plan.blocks])
        folder = folders[size] = out / f"{name}-{hashlib.sha256(held.encode()).hexdigest()[:8]}"
        wanted = [form for form in formats if form != "onnx" and not (folder / form).exists()]
        if wanted or not (folder / "decode.onnx").exists():
            model = load_model(source, family).float().eval()
            plan.apply(model, family)
            if not (folder / "decode.onnx").exists():
                folder.mkdir(parents=True, exist_ok=True)
                export_llm(model, folder)
            for form in wanted:
                options = BuildOptions(form, profiles=profiles)
                make(text_source(folder, model, ids, options), folder / form, options)
        for figure, amount in llm_work(costs, plan).items():
            work[figure][size] = amount
    units = {"ttft": "FLOPs", "tpot": "bytes of weights"}
    return Case(name, folders, work, units, {"threads": 1, "prompt": TOKENS, "context": TOKENS})
