"""A block of each kind is traced, and the graph is the one that tracing every block gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

from compress.exporters import check
from compress.exporters.onnx import DECODE, PREFILL, cached_layers, export_llm
from compress.exporters.ort import OrtLLM
from compress.exporters.repeated import kinds, speaks_of
from compress.language.plan import BlockPlan, Plan
from compress.models.decoder import blocks
from compress.models.families import family_for
from compress.schema.recipe import ExportSection
from tests.tiny import tiny, tokens, word_tokenizer

pytestmark = pytest.mark.processes


def of(model: Any, widths: bool = True) -> list[int]:
    def run() -> None:
        with torch.no_grad():
            model(tokens(2, 4))

    return kinds(model, run, {i: shape for i, *shape in cached_layers(model)}, widths)


def cut(model: Any, *kept: tuple[int, int]) -> Any:
    """``model`` with so many query heads and neurons in each block."""
    plan = Plan(tuple(BlockPlan(tuple(range(heads)), tuple(range(neurons))) for heads, neurons in kept))
    plan.apply(model, family_for(model.config))
    return model


ALL = (10, 48)


def test_kinds_are_told_by_what_a_graph_is_made_of() -> None:
    assert of(tiny("llama")) == [0, 0, 0, 0]
    # Every second block of Gemma 2 looks through a window, which no weight shows.
    assert of(tiny("gemma2")) == [0, 1, 0, 1]
    # One width may differ: the graph does not speak of it. Heads may not, nor what is gone.
    assert of(cut(tiny("llama"), ALL, (10, 20), (5, 20), (10, 0))) == [0, 0, 2, 3]
    assert of(cut(tiny("llama"), ALL, (10, 20), (5, 20), (10, 0)), widths=False) == [0, 1, 2, 3]
    assert of(cut(tiny("llama"), (0, 48), ALL, (0, 20), (0, 0))) == [0, 1, 0, 3]
    # gate and up are one matrix of twice the width.
    assert of(cut(tiny("phi3"), ALL, (10, 20), (10, 24), ALL)) == [0, 0, 0, 0]


def test_an_attribute_a_configuration_and_a_buffer_make_a_kind() -> None:
    scaled, configured, held = tiny("llama"), tiny("llama"), tiny("llama")
    blocks(scaled)[2].self_attn.scaling = 0.5
    mine = type(configured.config)(**{**configured.config.to_dict(), "rms_norm_eps": 0.5})
    blocks(configured)[1].self_attn.config = mine
    blocks(held)[3].register_buffer("more", torch.zeros(3))
    assert of(scaled) == [0, 0, 2, 0] and of(configured) == [0, 1, 0, 0] and of(held) == [0, 0, 0, 3]


def test_blocks_that_are_no_chain_or_share_a_weight_are_each_their_own() -> None:
    shared, doubled = tiny("llama"), tiny("llama")
    blocks(shared)[2].mlp.up_proj.weight = blocks(shared)[0].mlp.up_proj.weight
    assert of(shared) == [0, 1, 2, 3]
    blocks(doubled)[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    assert of(doubled) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A model of four blocks of two kinds, in graphs of two traced blocks, and of four. The first of the second kind
    stands behind a copy, and is copied itself."""
    model = cut(tiny("llama"), (10, 20), ALL, (0, 48), (0, 20))
    folder = tmp_path_factory.mktemp("both")
    (folder / "once").mkdir()
    (folder / "each").mkdir()
    assert export_llm(model, folder / "once").traced == 2
    assert export_llm(model, folder / "each", each=True).traced == 4
    return model, folder / "once", folder / "each"


def test_the_graph_is_that_of_every_block_traced(both: tuple[Any, Path, Path]) -> None:
    _, once, each = both
    for name in (PREFILL, DECODE):
        a, b = (onnx.load(folder / name).graph for folder in (once, each))
        assert Counter(n.op_type for n in a.node) == Counter(n.op_type for n in b.node)
        for ours, theirs in ((a.input, b.input), (a.output, b.output)):
            assert [(v.name, v.type.SerializeToString()) for v in ours] == [
                (v.name, v.type.SerializeToString()) for v in theirs
            ]
        weights = [
            Counter((tuple(t.dims), bytes(onnx.numpy_helper.to_array(t).tobytes())) for t in graph.initializer)
            for graph in (a, b)
        ]
        assert weights[0] == weights[1]
        onnx.checker.check_model(str(once / name), full_check=True)


def test_its_outputs_are_those_of_every_block_traced_bit_for_bit(both: tuple[Any, Path, Path]) -> None:
    _, once, each = both
    ids = tokens(2, 6).numpy()
    ours, theirs = OrtLLM(once, threads=1), OrtLLM(each, threads=1)
    for a, b in (
        (ours.prefill(ids), theirs.prefill(ids)),
        (ours.decode(ids, ours.empty_cache(2)), theirs.decode(ids, theirs.empty_cache(2))),
    ):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_the_numbers_that_a_graph_speaks_of(both: tuple[Any, Path, Path]) -> None:
    graph = onnx_ir.load(both[1] / DECODE).graph
    assert speaks_of(graph, {8}) and speaks_of(graph, {20, 10})  # channels of a head, heads
    assert not speaks_of(graph, {20, 48}) and not speaks_of(graph, set())


@pytest.mark.slow
def test_a_width_that_the_graph_speaks_of_is_a_kind(tmp_path: Path) -> None:
    # 8 is a head's channels too: its constant cannot be told from a width's.
    model = cut(tiny("llama", num_hidden_layers=2), (10, 8), ALL)
    assert of(model) == [0, 0]
    assert export_llm(model, tmp_path).traced == 2


def test_a_block_whose_graph_depends_on_its_number_is_traced_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama", num_hidden_layers=2)
    for block in blocks(model):  # GPT-2's `scale_attn_by_inverse_layer_idx` is of this make
        block.mlp.register_forward_hook(lambda _, __, out, n=block.self_attn.layer_idx: out * (n + 1))
    assert of(model) == [0, 0]
    tokenizer = word_tokenizer(tmp_path)
    (tmp_path / "onnx").mkdir()
    facts = check.write_checked(model, tokenizer, tmp_path / "onnx", ExportSection(greedy_tokens=2), 300)
    assert facts["largest_difference"] < 1e-4
    said = capsys.readouterr().err
    assert "one block's graph is not another's" in said and "tracing 2 of 2 layers" in said
