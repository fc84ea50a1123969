"""What the comparison of runtimes counts as ideal, and how it tells where the time went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.exporters.command import network_source, text_source
from compress.exporters.formats import BuildOptions, make, text_profiles
from compress.exporters.onnx import export_llm
from compress.exporters.onnx_module import export_module
from compress.models.families import family_for
from tests.tiny import tiny
from tools import format_cases
from tools.format_cases import even_plan, llm_work
from tools.format_profile import ATTENTION, REST, WEIGHTS, explained, kinds_of

pytestmark = pytest.mark.processes


def wide(**changes: Any) -> Any:
    return tiny("llama", intermediate_size=256, num_hidden_layers=10, attn_implementation="eager", **changes)


def totals(kinds: dict[str, dict[str, float]]) -> dict[str, float]:
    return {kind: sum(operators.values()) for kind, operators in kinds.items()}


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_even_plan_leaves_the_edges_alone_and_meets_the_share_to_one_step(share: float) -> None:
    model = wide()
    costs = family_for(model.config).costs(model.config)
    plan = even_plan(costs, share)
    widths = [n for _, _, n in plan.counts(costs.geometry)]
    assert widths[:2] == [256, 256] and widths[9:] == [256] and max(widths[2:9]) - min(widths[2:9]) <= 16
    assert all(n % 16 == 0 for n in widths) and max(widths[2:9]) < 256
    step = 16 * costs.blocks[0].neuron
    assert abs(plan.removed(costs) - share * costs.backbone) <= step / 2


def test_the_ideal_counts_what_a_sliced_model_computes_and_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_cases, "TOKENS", 24)
    model = wide()
    family = family_for(model.config)
    costs = family.costs(model.config)
    plan = even_plan(costs, 0.5)
    plan.apply(model, family)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 24, dtype=torch.int64), logits_to_keep=1)
    angles = sum(
        n for name, by in counter.get_flop_counts().items() if name.endswith("rotary_emb") for n in by.values()
    )
    work = llm_work(costs, plan)
    assert sum(work["ttft"].values()) == counter.get_total_flops() - angles
    read = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert work["tpot"] == {WEIGHTS: 4 * read}


def test_the_shares_of_what_is_missing_are_those_of_each_kind() -> None:
    dense = {WEIGHTS: {"Gemm": 0.08}, ATTENTION: {"MatMul": 0.01}, REST: {"Add": 0.002, "Where": 0.008}}
    pruned = {**dense, WEIGHTS: {"Gemm": 0.05}}  # at the ideal 0.04, and 0.005 of each of the others
    said = explained(dense, pruned, ({WEIGHTS: 80, ATTENTION: 20}, {WEIGHTS: 30, ATTENTION: 20}), "FLOPs")
    assert said[0] == "under the profiler 100.00 -> 70.00 ms; at the ideal it would be 50.00"
    assert said[1] == (
        "layers with weights: 80.00 -> 50.00 ms; 2.67x fewer FLOPs, at 60 % of the rate they were done at before;"
        " 50 % of what is missing"
    )
    assert said[2:] == [
        "attention's products: 10.00 -> 10.00 ms; their FLOPs stay as they were; 25 % of what is missing",
        "all else: 10.00 -> 10.00 ms; no FLOPs are counted for them (Where 8.0, Add 2.0); 25 % of what is missing",
    ]
    assert "miss nothing" in explained(dense, {**pruned, WEIGHTS: {}}, ({WEIGHTS: 2}, {WEIGHTS: 1}), "FLOPs")[1]


@pytest.mark.parametrize("form", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_the_time_of_a_language_model_is_told_by_kind(form: str, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(form, form))
    model = tiny("llama", intermediate_size=1024, hidden_size=320, head_dim=32, num_hidden_layers=2)
    export_llm(model, tmp_path)
    options = BuildOptions(form, profiles=text_profiles(64, 64))
    if form != "onnx":
        make(text_source(tmp_path, model, np.arange(100), options), tmp_path / form, options)
    spec = {"threads": 1, "prompt": 64, "context": 64}
    for figure in ("ttft", "tpot"):
        kinds = totals(kinds_of(form, tmp_path, figure, spec))
        assert kinds[WEIGHTS] > kinds[ATTENTION] > 0 and kinds[REST] > 0
        assert sum(kinds.values()) < 0.5


def test_the_time_of_a_network_in_executorch_is_told_by_kind(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.LazyLinear(5)).eval()
    sample = torch.randn(2, 3, 32, 32)
    model(sample)
    export_module(model, sample, ["y"], tmp_path)
    options = BuildOptions("executorch")
    make(network_source(tmp_path, model, sample, options, {}), tmp_path / "executorch", options)
    kinds = totals(kinds_of("executorch", tmp_path, "latency", {"threads": 1, "batch": 1}))
    assert kinds[WEIGHTS] > kinds[REST] > 0 and kinds[ATTENTION] == 0 and sum(kinds.values()) < 0.1
