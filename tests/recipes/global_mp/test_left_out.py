"""What Global MP leaves is named and counted: in the plan, the lines, the report and the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from compress.networks.flops import count_flops, flops_elsewhere
from compress.recipes.global_mp.network import left_facts, left_line, left_out, prunable
from tests import tied_nets as nets
from tests.command import compress
from tests.networks import write_class_folders

SAMPLE = torch.zeros(1, 3, 12, 12)
RECIPE = """\
extends: global-mp-network
description: everything as small as it can be
sparsity: 0.8
arguments: {}
data: {folder: FOLDER/data, size: 12}
train: {epochs: 1, batch: 32, lr: 0.02, warmup_epochs: 0}
finetune: null
export: null
bench: null
"""


def matrices(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_every_matrix_is_either_prunable_or_named() -> None:
    model = nets.Mixed()
    kept, left = prunable(model), {row.name: row for row in left_out(model)}
    assert kept.keys() == {"c.weight", "attention.out_proj.weight", "head.weight"}
    assert kept.keys() | left.keys() == {n for n, p in model.named_parameters() if p.dim() > 1}
    assert sum(w.numel() for w in kept.values()) + sum(r.weights for r in left.values()) == matrices(model)
    assert {row.kind for row in left.values()} == {"Mixed", "GRU", "LSTMCell", "MultiheadAttention", "Bilinear"}
    facts = left_facts(model, ())
    assert facts["share"] == facts["weights"] / matrices(model)
    line = left_line(facts)
    assert "gru (GRU) 1,920" in line and "cell (LSTMCell) 768" in line and "and 2 more layers" in line
    assert f"{facts['weights']:,} weights ({100 * facts['share']:.1f} % of all)" in line


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_of_every_kind_are_named(kind: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), getattr(nn, kind)(8, 6, **({"proj_size": 5} if kind == "LSTM" else {})))
    assert {row.kind for row in left_out(net)} == {kind}
    assert sum(row.weights for row in left_out(net)) == matrices(net) - 32


def test_a_layer_that_the_recipe_skips_is_left_out_and_the_reason_says_so() -> None:
    rows = {row.name: row.reason for row in left_out(nets.Twins(how="none"), ["a.*"])}
    assert rows == {"a.weight": "left out by the recipe"}


@pytest.mark.parametrize("how", ["memory", "transpose"])
def test_two_parameters_over_one_memory_stay_dense_and_are_named(how: str) -> None:
    model = nets.Twins(how=how)
    assert prunable(model).keys() == {"stem.weight", "c.weight", "head.weight"}
    rows = {row.name: row.reason for row in left_out(model)}
    assert rows["a.weight"] == "its memory is also that of b.weight" and rows["b.weight"].endswith("a.weight")


def test_a_weight_that_is_computed_is_left_and_what_it_is_computed_from_is_named() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(4, 2))
    assert prunable(model).keys() == {"2.weight"}
    assert {r.name for r in left_out(model)} == {
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    }


def test_flops_of_what_is_left_are_those_counted_by_hand() -> None:
    model, found = nets.Mixed(), flops_elsewhere(nets.Mixed(), SAMPLE)
    gru = {n: p.numel() for n, p in model.named_parameters() if n.startswith("gru.weight")}
    want = {name: 2 * weights * 12 for name, weights in gru.items()}  # 12 steps
    want |= {"cell.weight_ih": 2 * 32 * 16, "cell.weight_hh": 2 * 32 * 8}  # one step
    want |= {f"attention.{k}_proj_weight": 2 * 8 * width * 12 for k, width in (("q", 8), ("k", 16), ("v", 16))}
    want |= {"pair.weight": 2 * 6 * 8 * 8}
    assert found == want, "a bare parameter is used in a way that nothing is known of"
    rows = {row["name"]: row["flops"] for row in left_facts(model, (), SAMPLE)["parameters"]}
    assert rows["place"] is None and rows["pair.weight"] == want["pair.weight"]
    assert left_facts(model, (), SAMPLE)["flops"] == sum(want.values())
    assert flops_elsewhere(model, SAMPLE.expand(5, -1, -1, -1)) == want, "of one sample, whatever the batch"


def test_attentions_projections_work_once_a_query_or_a_key() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.att = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.att(query=x[:, :3], key=x, value=x)[0]
            return out

    x = torch.zeros(1, 7, 8)
    assert flops_elsewhere(Cross(), x) == {"att.in_proj_weight": 2 * 64 * (3 + 7 + 7)}
    assert [(f.name, f.dense) for f in count_flops(Cross(), x)] == [("att.out_proj", 2 * 64 * 3)]


def test_a_sequence_of_any_form_counts_its_steps() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x.transpose(0, 1), [6] * len(x))
            out: torch.Tensor = self.rnn(packed)[1]
            return out

    want = {"rnn.weight_ih_l0": 2 * 20 * 6, "rnn.weight_hh_l0": 2 * 25 * 6}
    assert flops_elsewhere(Packed(), torch.zeros(3, 6, 4)) == want


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left")
    write_class_folders(folder / "data", 90, 40)
    (folder / "net.py").write_text(Path(nets.__file__).read_text())
    (folder / "mp.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    return folder


def test_plan_lines_report_and_card_all_say_what_is_left_out(place: Path, tmp_path: Path) -> None:
    model = f"{place / 'net.py'}:mixed"
    planned = compress("plan", model, "--recipe", place / "mp.yaml")
    assert planned.code == 0 and "left out" in planned.out and "gru (GRU) 1,920" in planned.out
    ran = compress("prune", model, "--recipe", place / "mp.yaml", "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    report: dict[str, Any] = json.loads((tmp_path / "run" / "release" / "report.json").read_text())
    net = nets.Mixed()
    kept = sum(w.numel() for w in prunable(net).values())
    assert report["left_out"]["weights"] == matrices(net) - kept
    share = report["size"]["pruned_weights"] / matrices(net)
    assert report["size"]["pruned_share_of_all"] == share
    assert "left out" in ran.out and f"of all weights {100 * share:.2f} % are pruned" in ran.out
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    assert "of all weights were left out" in card and "| `place` | Mixed | 96 |" in card
    assert any(line.startswith("# ") and "of the prunable weights pruned" in line for line in card.splitlines())


def test_a_network_of_known_layers_says_nothing_of_it(place: Path, tmp_path: Path) -> None:
    model = f"{place / 'net.py'}:twins"
    ran = compress("prune", model, "--recipe", place / "mp.yaml", "--out", tmp_path / "run", "--until", "model")
    assert ran.code == 0, ran.err
    said = ran.out + compress("plan", model, "--recipe", place / "mp.yaml").out
    assert "stay dense" not in said and not any(line.startswith("left out") for line in said.splitlines())


def test_pagcp_names_weights_of_layers_that_it_does_not_cut() -> None:
    from compress.recipes.pagcp.groups import find_groups

    left = {v.layer: v.reason for v in find_groups(nets.Mixed(), torch.randn(2, 3, 12, 12), 4).left}
    assert left["gru"] == "GRU is not cut" and left["place"] == "a parameter of Mixed is not cut"
    assert {"cell", "pair", "attention"} <= set(left)
