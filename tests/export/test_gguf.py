"""GGUF: what a stock llama.cpp computes of it is what torch computes, and what it cannot compute is not written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from compress.errors import CompressError, UsageError
from compress.exporters import gguf
from compress.exporters.formats import GGUF_PRECISIONS, BuildOptions, Source, describe, make
from compress.exporters.llama_cpp import library, pretokenisers, quantise
from compress.exporters.llama_cpp.architectures import Plan as Layout
from compress.exporters.llama_cpp.architectures import plan as layout_of
from compress.exporters.llama_cpp.ask import said
from compress.exporters.llama_cpp.library import CONTEXT, with_fields
from compress.exporters.llama_cpp.vocabulary import PROBE, SPECIAL, compare, vocabulary
from compress.language.checkpoint import save_model
from compress.language.plan import BlockPlan, Plan
from compress.models.families import family_for
from compress.models.reading import load_config, load_tokenizer
from tests.command import compress, one_error
from tests.models.families.test_families import ragged_plan
from tests.tiny import ARCHITECTURES, tiny, tokens, word_tokenizer

pytestmark = [
    pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs xllamacpp"),
    pytest.mark.processes,
]

LARGE = {
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 512,
}


def pruned(folder: Path, model_type: str, plan: Plan, **changes: Any) -> Path:
    """A tiny model, pruned, in the `per-layer` layout."""
    model = tiny(model_type, **changes)
    family = family_for(model.config)
    counts = plan.counts(family.geometry(model.config))
    plan.apply(model, family)
    folder.mkdir(exist_ok=True)
    tokenizer = word_tokenizer(folder)
    save_model(model, family, counts, folder, tokenizer=tokenizer, dtype=torch.float32, tokens=tokens(1, 16))
    return folder


def dense(folder: Path, model_type: str, **changes: Any) -> Path:
    tiny(model_type, **{"num_hidden_layers": 2, **changes}).save_pretrained(folder)
    word_tokenizer(folder)
    return folder


def source(folder: Path, **more: Any) -> Source:
    ids = tokens(2, 40)
    windows = tuple(tuple(row) for row in ids.tolist())
    return Source(folder, saved=gguf.Saved(load_tokenizer(folder), windows, 0, "random tokens", "a model", **more))


def built(folder: Path, out: Path, precision: str = "f32", **more: Any) -> dict[str, Any]:
    return make(source(folder, **more), out, BuildOptions("gguf", precision))


def layout(folder: Path) -> Layout:
    config = load_config(folder)
    return layout_of(config, family_for(config), str(folder))


FEW = (BlockPlan((0, 2, 5, 7), tuple(range(0, 48, 2))), BlockPlan(tuple(range(10)), tuple(range(16))))
# Nothing that llama.cpp stumbles over is left out: the first block without attention, one with attention alone, one
# with an FFN alone, the last with nothing.
TRAPS = Plan(
    (
        BlockPlan((), tuple(range(15))),
        BlockPlan((0, 2, 4, 5, 7, 9), ()),
        BlockPlan((), tuple(range(48))),
        BlockPlan((), ()),
    )
)
SQUARE = {"hidden_size": 80}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("model_type", "plan", "changes", "arch"),
    [
        ("llama", TRAPS, {"attention_bias": True, "mlp_bias": True}, "deci"),
        ("qwen2", Plan(FEW), {"tie_word_embeddings": False}, "deci"),
        ("qwen3", TRAPS, {"tie_word_embeddings": True}, "openelm"),
        pytest.param("phi3", Plan(FEW), {}, "deci", marks=slow),
        ("gemma3_text", None, {}, "gemma3"),
        pytest.param("llama", ragged_plan, {}, "deci", marks=slow),
        pytest.param("mistral", Plan(FEW), {}, "deci", marks=slow),
        pytest.param("llama", None, {"tie_word_embeddings": False}, "llama", marks=slow),
        pytest.param("mistral", None, {}, "llama", marks=slow),
        pytest.param("qwen2", None, {}, "qwen2", marks=slow),
        pytest.param("qwen3", None, {}, "qwen3", marks=slow),
        pytest.param("phi3", None, SQUARE, "phi3", marks=slow),
        pytest.param("gemma2", None, {}, "gemma2", marks=slow),
    ],
)
def test_llama_cpp_computes_what_torch_computes(
    model_type: str, plan: Any, changes: dict[str, Any], arch: str, tmp_path: Path
) -> None:
    if plan is None:
        folder = dense(tmp_path / "model", model_type, **changes)
    else:
        plan = ragged_plan(tiny(model_type)) if callable(plan) else plan
        changes = {"num_hidden_layers": len(plan.blocks), **changes}
        folder = pruned(tmp_path / "model", model_type, plan, **changes)
    facts = built(folder, tmp_path / "out")
    assert facts["components"]["model"]["arch"] == arch
    outputs = facts["parity"]["outputs"]
    # Gemma's GELU is a table of float16 there.
    assert max(outputs.values()) < (1e-3 if "gemma" in model_type else 1e-5) and set(outputs) == {"batch", "stepped"}
    assert facts["parity"]["greedy"]["same"] == facts["parity"]["greedy"]["tokens"]
    assert describe(tmp_path / "out", "gguf")["parity"]["kl"] < 1e-5


@pytest.mark.parametrize(
    ("model_type", "uneven", "arch"),
    [
        ("ernie4_5", True, "deci"),
        ("granite", False, "granite"),
        pytest.param("smollm3", False, "smollm3", marks=slow),
        pytest.param("ministral", True, "deci", marks=slow),
    ],
)
def test_families_known_by_their_structure_are_computed_as_well(
    model_type: str, uneven: bool, arch: str, tmp_path: Path
) -> None:
    from tools import decoders

    model, folder = decoders.tiny(model_type), tmp_path / "model"
    folder.mkdir()
    tokenizer = word_tokenizer(folder)
    if uneven:
        family = family_for(model.config)
        plan = decoders.ragged(model, family)
        counts = plan.counts(family.geometry(model.config))
        plan.apply(model, family)
        save_model(model, family, counts, folder, tokenizer=tokenizer, dtype=torch.float32, tokens=tokens(1, 16))
    else:
        model.save_pretrained(folder)
    facts = built(folder, tmp_path / "out")
    assert facts["components"]["model"]["arch"] == arch
    assert max(facts["parity"]["outputs"].values()) < 1e-5
    assert facts["parity"]["greedy"]["same"] == facts["parity"]["greedy"]["tokens"]


def test_positions_that_are_left_out_otherwise_are_refused(tmp_path: Path) -> None:
    from tools import decoders

    model = decoders.tiny("smollm3")
    model.config.no_rope_layers = [1, 0, 1, 0]
    model.save_pretrained(tmp_path)
    with pytest.raises(CompressError, match="no positions in every fourth block, and here they are otherwise"):
        layout(tmp_path)


def test_what_is_mended_is_said_and_a_block_of_nothing_is_not_there(tmp_path: Path) -> None:
    found = layout(pruned(tmp_path / "model", "llama", TRAPS))
    assert [b.source for b in found.blocks] == [0, 1, 2]
    assert found.keys["attention.head_count"] == [1, 6, 0] and found.keys["feed_forward_length"] == [15, 32, 48]
    assert found.keys["attention.head_count_kv"] == [1, 2, 0]
    assert "left out, as nothing was left of them: 1 block" in found.notes
    assert any("without attention" in n and n.endswith(": 0") for n in found.notes)
    assert any("without FFN" in n and n.endswith(": 1") for n in found.notes)


def test_whole_blocks_gone_leave_a_stock_model_of_fewer_blocks(tmp_path: Path) -> None:
    every = BlockPlan(tuple(range(10)), tuple(range(48)))
    found = layout(pruned(tmp_path / "model", "llama", Plan((every, BlockPlan((), ()), every, every))))
    assert found.arch == "llama" and found.keys["block_count"] == 3
    assert [p.sources[0].split(".")[2] for p in found.parts if p.name.endswith("attn_q.weight")] == ["0", "2", "3"]


@pytest.mark.parametrize(
    ("model_type", "changes", "what"),
    [
        ("qwen3", {"tie_word_embeddings": False}, "the head is its own"),
        ("gemma2", {}, "gemma2's blocks must be alike"),
        ("gemma3_text", {}, "gemma3's blocks must be alike"),
    ],
)
def test_a_ragged_model_that_no_architecture_reads_is_refused_with_a_way_out(
    model_type: str, changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    folder = pruned(tmp_path / "model", model_type, Plan(FEW), num_hidden_layers=2, **changes)
    with pytest.raises(CompressError, match=what) as e:
        layout(folder)
    assert "layouts: [padded]" in e.value.fix and "tyr-stock" in e.value.fix


@pytest.mark.parametrize(
    ("model_type", "changes", "what"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("qwen3", {"attention_bias": True}, "linear layers have biases"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "scaled by 16"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE is dynamic"),
    ],
)
def test_what_an_architecture_takes_for_granted_is_asked(
    model_type: str, changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=what):
        layout(dense(tmp_path / "model", model_type, num_hidden_layers=1, **changes))


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3,
        pytest.param({**YARN, "attention_factor": 1.3}, marks=slow),
        pytest.param(YARN, marks=slow),
        pytest.param({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, marks=slow),
    ],
    ids=["llama3", "yarn with a factor", "yarn", "linear"],
)
def test_scaled_positions_are_those_of_torch(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = dense(tmp_path / "model", "llama", num_hidden_layers=1, head_dim=16, rope_parameters=rope)
    assert max(built(folder, tmp_path / "out")["parity"]["outputs"].values()) < 1e-5


LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip


@slow
@pytest.mark.parametrize(("model_type", "plan"), [("phi3", None), ("phi3", Plan(FEW))], ids=["stock", "ragged"])
def test_phi3s_long_positions_are_those_of_torch(model_type: str, plan: Plan | None, tmp_path: Path) -> None:
    changes = {**SQUARE, "num_hidden_layers": 2, "max_position_embeddings": 1024, "rope_parameters": LONG}
    if plan is None:
        folder = dense(tmp_path / "model", model_type, **changes)
    else:
        folder = pruned(tmp_path / "model", model_type, plan, **changes)
    assert max(built(folder, tmp_path / "out")["parity"]["outputs"].values()) < 1e-5


@slow
def test_qwen2s_yarn_is_that_of_torch(tmp_path: Path) -> None:
    folder = dense(tmp_path / "model", "qwen2", hidden_size=160, rope_parameters=YARN)
    assert max(built(folder, tmp_path / "out")["parity"]["outputs"].values()) < 1e-5


def test_gemmas_pattern_of_sliding_blocks_is_told_where_blocks_are_gone(tmp_path: Path) -> None:
    every = BlockPlan(tuple(range(10)), tuple(range(48)))
    folder = pruned(tmp_path / "model", "gemma2", Plan((every, BlockPlan((), ()), every, every)))
    assert layout(folder).keys["attention.sliding_window_pattern"] == [1, 1, 0]
    assert max(built(folder, tmp_path / "out")["parity"]["outputs"].values()) < 1e-3


def test_a_context_beyond_a_sliding_window_is_not_promised(tmp_path: Path) -> None:
    found = layout(dense(tmp_path / "model", "mistral", num_hidden_layers=1))
    assert found.keys["context_length"] == 16 and "sliding window" in found.notes[0]


def test_a_vocabulary_its_template_and_its_origin_go_along(tmp_path: Path) -> None:
    folder = dense(tmp_path / "model", "llama", num_hidden_layers=1)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    built(folder, tmp_path / "out", license="mit", base_model="somebody/a-model")
    fields = GGUFReader(tmp_path / "out" / "a-model-F32.gguf").fields
    read = {name: field.contents() for name, field in fields.items()}
    assert read["tokenizer.chat_template"] == "{{ messages[0].content }}" and read["tokenizer.ggml.pre"] == "gpt-2"
    assert read["general.license"] == "mit" and read["general.base_model.0.name"] == "a-model"
    assert read["general.base_model.0.repo_url"].endswith("/somebody/a-model")
    assert (read["tokenizer.ggml.bos_token_id"], read["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert read["tokenizer.ggml.add_bos_token"] is False and len(read["tokenizer.ggml.tokens"]) == 300


def test_an_unknown_way_of_splitting_text_is_refused_not_guessed(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    folder = dense(tmp_path / "model", "llama", num_hidden_layers=1)
    tokenizer = load_tokenizer(folder)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), bytes_])
    with pytest.raises(CompressError, match="does not know how this tokenizer splits"):
        vocabulary(tokenizer, 300, str(folder))


def test_a_known_hash_names_a_splitting_that_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(text), 7]}

    found = hashlib.sha256(str([len(pretokenisers.TEXT), 7]).encode()).hexdigest()
    monkeypatch.setattr(pretokenisers, "HASHES", {"tekken": (found,)})
    strange = {"model": {}, "pre_tokenizer": {"type": "Whitespace"}}
    assert pretokenisers.name(tokenizer, strange, "here") == "tekken"


def test_other_tokens_than_the_tokenizers_refuse_the_file(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    right = tokenizer("the cat")["input_ids"]
    assert compare(tokenizer, {"a text": "the cat"}, [right], "here") == {"tokens": {"a text": len(right)}}
    with pytest.raises(CompressError, match="other tokens of a text than the tokenizer: at token 1"):
        compare(tokenizer, {"a text": "the cat"}, [[right[0], 5]], "here")


def test_special_tokens_must_be_seen_and_a_space_behind_one_is_said(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    texts = {SPECIAL: "a<s>b"}
    want = tokenizer("a<s>b")["input_ids"]
    other = [want[0], 1, 77, *want[2:]]
    assert compare(tokenizer, texts, [other], "here")["differs"] == "the words between special tokens"
    with pytest.raises(CompressError, match="other tokens of special tokens among words"):
        compare(tokenizer, texts, [[want[0], 77, *want[2:]]], "here")


def sentencepiece(folder: Path) -> Any:
    """SentencePiece's BPE with bytes to fall back on, as transformers has it: trained on a few lines."""
    import sentencepiece as spm
    from transformers import LlamaTokenizer

    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog did not\nan apple a day keeps the doctor away\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    made = LlamaTokenizer.from_pretrained(folder)
    made.save_pretrained(folder)
    return made


@pytest.mark.skipif(not find_spec("sentencepiece"), reason="needs sentencepiece")
def test_a_sentencepiece_vocabulary_gives_the_same_tokens(tmp_path: Path) -> None:
    folder = dense(tmp_path / "model", "llama", num_hidden_layers=1, vocab_size=340)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    sentencepiece(folder)
    facts = built(folder, tmp_path / "out")
    assert facts["parity"]["tokens"]["a text of many languages, code and signs"] > 500
    # It puts a space behind a special token, as older tokenizers of this kind do; this one is newer.
    assert facts["parity"]["differs"] == "the words between special tokens"
    fields = GGUFReader(tmp_path / "out" / "a-model-F32.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"


def test_the_text_that_is_compared_is_composed() -> None:
    import unicodedata

    assert unicodedata.normalize("NFC", PROBE) == PROBE


# --- types ------------------------------------------------------------------------------------------------------------


def test_quantised_rows_are_what_ggml_itself_reads_back() -> None:
    from gguf import GGMLQuantizationType as T
    from gguf.quants import dequantize

    lib, rows = library.load(library.find()), np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    for kind, most in ((T.Q8_0, 0.02), (T.Q6_K, 0.08), (T.Q4_K, 0.25), (T.Q4_0, 0.4), (T.Q2_K, 1.0)):
        back = dequantize(library.quantise(lib, int(kind), rows, None), kind)
        assert 1e-4 < np.abs(back - rows).max() < most, kind


def test_columns_that_count_more_are_kept_better() -> None:
    from gguf import GGMLQuantizationType as T
    from gguf.quants import dequantize

    lib, rows = library.load(library.find()), np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    importance = np.full(256, 0.01, np.float32)
    importance[::7] = 100.0
    plain, weighted = (
        np.abs(dequantize(library.quantise(lib, int(T.Q3_K), rows, w), T.Q3_K) - rows)[:, ::7].mean()
        for w in (None, importance)
    )
    assert weighted < 0.8 * plain


def test_rows_on_several_threads_are_the_same_bytes() -> None:
    from gguf import GGMLQuantizationType as T

    from compress.exporters.llama_cpp.architectures import Part

    part = Part("blk.0.ffn_up.weight", (37, 256), (), "ffn_up", lambda: torch.zeros(0))
    tensor = torch.randn(37, 256, generator=torch.Generator().manual_seed(0))
    typed = quantise.Typed(part, T.Q4_K, T.Q4_K)
    one, three = (np.concatenate(list(quantise.Converter(n).parts(typed, tensor))) for n in (1, 3))
    assert one.tobytes() == three.tobytes() and one.nbytes == typed.nbytes


def test_the_dearest_tensors_get_more_bits_and_a_tied_head_counts_as_one(tmp_path: Path) -> None:
    found = layout(dense(tmp_path / "model", "llama", **LARGE, num_hidden_layers=8))
    types = {t.part.name: t.type.name for t in quantise.typed(found.parts, "q4_k_m", 2)}
    assert types["token_embd.weight"] == "Q6_K" and types["output_norm.weight"] == "F32"
    six = [i for i in range(8) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert six == [0, 3, 6, 7] and types["blk.1.ffn_down.weight"] == "Q4_K"
    assert {types[f"blk.{i}.attn_q.weight"] for i in range(8)} == {"Q4_K"}


def test_fused_q_k_and_v_are_as_dear_as_v(tmp_path: Path) -> None:
    heads = (BlockPlan((0, 1), tuple(range(256))), BlockPlan((0, 1, 2, 3), tuple(range(256))))
    folder = pruned(
        tmp_path / "model", "qwen3", Plan(heads * 4), **LARGE, tie_word_embeddings=True, num_hidden_layers=8
    )
    types = {t.part.name: t.type.name for t in quantise.typed(layout(folder).parts, "q4_k_m", 2)}
    assert [i for i in range(8) if types[f"blk.{i}.attn_qkv.weight"] == "Q6_K"] == [0, 3, 6, 7]


def test_rows_that_do_not_divide_are_said_with_what_avoids_it(tmp_path: Path) -> None:
    changes = {**LARGE, "intermediate_size": 288}
    found = quantise.typed(layout(dense(tmp_path / "model", "llama", **changes)).parts, "q4_k_m", 2)
    (line,) = quantise.fallbacks([t for t in found if t.part.block == 0])
    assert "ffn_down" in line and "as Q5_0, not Q4_K: rows of 288 numbers" in line and "round_to: 256" in line


@pytest.mark.parametrize(
    ("precision", "most"),
    [
        ("q4_k_m", 0.2),
        *(pytest.param(p, m, marks=slow) for p, m in (("q8_0", 0.01), ("q6_k", 0.05), ("q4_0", 0.5), ("q2_k", 0.8))),
    ],
)
def test_quantised_weights_stay_near_the_model(precision: str, most: float, tmp_path: Path) -> None:
    folder = dense(tmp_path / "model", "llama", **LARGE)
    facts = built(folder, tmp_path / "out", precision)
    parity = facts["parity"]
    assert 0 < parity["kl"] < most * parity["kl_of_the_next_position"] and "tolerance" not in parity
    assert parity["perplexity"]["gguf"] != parity["perplexity"]["torch"]
    assert sum(facts["components"]["model"]["types"].values()) == 2 + 2 * 9


def test_a_weight_beyond_float16_is_named_and_bf16_takes_it(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight[3, 3] = 70000.0
    model.model.layers[0].mlp.down_proj.weight[:, 3] = 0.0
    model.save_pretrained(tmp_path / "model")
    word_tokenizer(tmp_path / "model")
    with pytest.raises(CompressError, match=r"layers\.0\.mlp\.up_proj\.weight goes up to 70000, and float16") as e:
        built(tmp_path / "model", tmp_path / "out", "f16")
    assert e.value.fix == "--precision bf16" and not (tmp_path / "out").exists()
    assert built(tmp_path / "model", tmp_path / "out", "bf16")["parity"]["outputs"]["batch"] < 1e-1


def test_a_file_that_is_not_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dense(tmp_path / "model", "llama", num_hidden_layers=1)
    real = gguf._torch
    monkeypatch.setattr(gguf, "_torch", lambda *a: [np.flip(w, 1).copy() for w in real(*a)])
    with pytest.raises(CompressError, match=r"differ from torch's by .* in one batch"):
        built(folder, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["f32", "q4_0"])
def test_nan_is_never_near(precision: str) -> None:
    found = {"outputs": {"batch": float("nan"), "stepped": 0.0}, "kl": float("nan"), "kl_of_the_next_position": 1.0}
    with pytest.raises(CompressError):
        gguf._judge(found, BuildOptions("gguf", precision), "here")


# --- the library ------------------------------------------------------------------------------------------------------


def test_settings_that_lie_elsewhere_are_one_error() -> None:
    import struct

    words = [value for *_, value in CONTEXT]
    form = "<" + "".join("f" if kind == "f" else "i" for _, kind, _ in CONTEXT)
    right = struct.pack(form, *words) + b"\x7f" * 64
    made = with_fields(right, CONTEXT, {"n_ctx": 99, "type_v": 0}, Path("lib.so"))
    assert made[:4] == struct.pack("<i", 99) and made[-64:] == right[-64:] and len(made) == len(right)
    shifted = struct.pack("<i", 512) + right
    with pytest.raises(CompressError, match="in a way that is not known here \\(n_batch, word 1, is 512"):
        with_fields(shifted, CONTEXT, {}, Path("lib.so"))


def test_a_file_that_llama_cpp_cannot_load_is_one_error_with_its_words(tmp_path: Path) -> None:
    from compress.exporters.llama_cpp.ask import ask

    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 64)
    with pytest.raises(CompressError, match=r"llama\.cpp (refuses|ends at) this file") as e:
        ask(tmp_path / "m.gguf")
    assert e.value.where.endswith("m.gguf")


def test_the_line_of_a_log_that_says_what_is_wrong() -> None:
    log = "loading ...\n..\nerror loading model: tensor 'x' has wrong shape\nfailed\n"
    assert (
        said(log) == "error loading model: tensor 'x' has wrong shape"
        and said(" . \nlast\n") == "last"
        and said("") == ""
    )


def test_another_library_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(UsageError, match="no such file"):
        library.find()
    (tmp_path / "bad.so").write_text("no library")
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "bad.so"))
    with pytest.raises(CompressError, match="cannot be loaded"):
        library.load(library.find())
    import _ctypes

    monkeypatch.setenv(library.VARIABLE, _ctypes.__file__)
    with pytest.raises(CompressError, match="has no function llama_backend_init"):
        library.load(library.find())


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_makes_no_onnx_where_none_is_asked_for(tmp_path: Path) -> None:
    folder = dense(tmp_path / "a model", "llama", num_hidden_layers=1)
    out = tmp_path / "out"
    ran = compress("export", folder, "--out", out, "--format", "gguf")
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == ["a-model-F16.gguf", "gguf.json"]
    assert "a text of many kinds" in ran.out and "perplexity" in ran.out and "greedy tokens equal torch's" in ran.out
    facts = json.loads((out / "gguf-f16" / "gguf.json").read_text("utf-8"))
    assert facts["parity"]["samples"] == 1 and facts["sha256"].keys() == {"a-model-F16.gguf"}


@slow
def test_two_files_are_measured_side_by_side(tmp_path: Path) -> None:
    from compress.exporters.bench.local import compare_gguf

    for name, precision in (("plain", "f16"), ("small", "q8_0")):
        built(dense(tmp_path / f"{name}-model", "llama", num_hidden_layers=1), tmp_path / name, precision)
    spec = {"prompt": 24, "context": 16, "processes": 1, "threads": 1, "min_seconds": 0.01, "min_runs": 2}
    found = compare_gguf(tmp_path / "plain", tmp_path / "small", spec)
    assert {"ttft", "tpot", "peak_rss"} == set(found["ratios"]) and found["spec"]["runtime"] == library.title()
    assert found["dense"]["bytes"] == sum(p.stat().st_size for p in (tmp_path / "plain").glob("*.gguf"))
    shutil.rmtree(tmp_path / "small")
    ran = compress("bench", tmp_path / "plain", tmp_path / "plain-model")
    assert ran.code == 1 and "name a folder made by `compress export`" in ran.err


def test_a_missing_package_an_unknown_precision_and_a_network_are_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dense(tmp_path / "model", "llama", num_hidden_layers=1)
    ran = compress("export", folder, "--out", tmp_path / "out", "--format", "gguf", "--precision", "fp16")
    one_error(ran, 2, "GGUF is not built in fp16", "f16, bf16")
    with pytest.raises(UsageError, match="made of a saved language model"):
        make(Source(tmp_path), tmp_path / "out", BuildOptions("gguf", "f16"))
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "xllamacpp" else find_spec(name, *a)
    )
    ran = compress("export", folder, "--out", tmp_path / "out", "--format", "gguf")
    one_error(ran, 2, "needs xllamacpp", "[gguf]")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_missing_or_of_another_shape_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = dense(tmp_path / "model", "llama", num_hidden_layers=1)
    held = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    for change, what in (
        (held[name][:, :-8], r"gives \(40, 40\), not \(40, 48\)"),
        (None, "down_proj.weight is missing"),
    ):
        given = {k: v for k, v in held.items() if k != name} | ({} if change is None else {name: change.contiguous()})
        save_file(given, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CompressError, match=what):
            built(folder, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dense(tmp_path / "model", "llama", num_hidden_layers=1)

    def full(*_: Any) -> Sequence[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantise.Converter, "_turned", full)
    with pytest.raises(CompressError, match="disk is full"):
        built(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_every_precision_is_one_that_can_be_written() -> None:
    assert set(GGUF_PRECISIONS) == set(quantise.BASE) and GGUF_PRECISIONS[0] == "f16"
    assert {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"} == set(ARCHITECTURES)


def test_names_are_those_of_the_hub() -> None:
    assert gguf.file_name("SmolLM2-135M", "q4_k_m") == "SmolLM2-135M-Q4_K_M.gguf"
    assert gguf.file_name("a model/../x", "f16") == "a-model-..-x-F16.gguf"
    assert [gguf.size_label(n) for n in (134_515_008, 1_711_376_384, 7_000_000_000, 950)] == [
        "135M",
        "1.7B",
        "7B",
        "950",
    ]


def test_a_folder_with_two_files_is_none_that_was_made_here(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(CompressError, match="2 GGUF files"):
        gguf.the_file(tmp_path)


def test_run_goes_on_with_a_text_in_llama_cpp(tmp_path: Path) -> None:
    folder = dense(tmp_path / "model", "llama")
    built(folder, tmp_path / "gguf")
    words = ("the cat sat on", "--tokens", 6, "--json")
    ran = compress("run", folder, *words)
    want = json.loads(ran.out)["results"]["model"]
    file = gguf.the_file(tmp_path / "gguf")
    for place, more in ((tmp_path / "gguf", ()), (file, ("--tokenizer", folder))):
        ran = compress("run", place, *words, *more)
        assert ran.code == 0, ran.err
        got = json.loads(ran.out)["results"]["model"]
        assert "xllamacpp" in got["runtime"] and got["ttft"] > 0
        same = ("text", "prompt_tokens", "tokens", "ended")
        assert [got[k] for k in same] == [want[k] for k in same]
    one_error(compress("run", file, "hello", "--chat"), 2, "--chat", "--tokenizer FOLDER")
    one_error(compress("run", tmp_path / "none.gguf", "hello"), 2, "there is no such file")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:2000])
    one_error(compress("run", damaged, "hello"), 1, "llama.cpp", "damaged.gguf")


def test_a_stock_shape_is_its_familys_own_file(tmp_path: Path) -> None:
    """Gemma-3 cannot be ragged there; pruned to a stock shape it needs not be."""
    model = tiny("gemma3_text", num_hidden_layers=7)
    family = family_for(model.config)
    some = BlockPlan(tuple(range(5)), tuple(range(0, 48, 2)))
    plan = Plan(tuple(BlockPlan((), ()) if i in (0, 3) else some for i in range(7)))
    counts = plan.counts(family.geometry(model.config))
    plan.apply(model, family)
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(
        model, family, counts, folder, tokenizer=word_tokenizer(folder), dtype=torch.float32, tokens=tokens(1, 16),
        stock=True,
    )  # fmt: skip
    facts = built(folder, tmp_path / "gguf")
    assert facts["components"]["model"]["arch"] == "gemma3" and facts["components"]["model"]["blocks"] == 5
    assert max(facts["parity"]["outputs"].values()) <= facts["parity"]["tolerance"]
