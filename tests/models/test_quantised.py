"""fp8 checkpoints and GGUF files: what is made of them, against the reference arithmetic in float64."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError, UsageError
from compress.models.families import family_for
from compress.models.quantised import find, plain
from compress.models.reading import load_config, load_model, load_tokenizer
from compress.models.saved import find as find_saved
from compress.models.sources import describe, resolve, resolve_origin
from compress.run.cache import cache_dir
from tests.command import compress, one_error
from tests.models.test_model_folder import edit, sharded
from tests.tiny import RECIPE, prose, tiny, word_tokenizer

pytestmark = pytest.mark.processes

# Blocks of 32: ffn 80 and KV rows 16 leave a last block that is not whole.
BLOCK = 32
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def fp8_of(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fp8 weight, its scales in float32, what they stand for in float64), block by block, by hand."""
    rows, columns = -(-weight.shape[0] // block), -(-weight.shape[1] // block)
    kept, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    reference = torch.empty_like(weight, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[at].float().abs().max() / 448
            kept[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
            reference[at] = kept[at].double() * scales[i, j].double()
    return kept, scales, reference


def fp8_model(
    folder: Path, model_type: str = "qwen3", block: int = BLOCK, **sizes: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny checkpoint as DeepSeek and Qwen publish them, and its weights in float64."""
    tiny(model_type, **{**SIZES, **sizes}).to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer(folder)
    tensors, truth = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"], truth[name] = fp8_of(weight, block)
        else:
            tensors[name], truth[name] = weight, weight.double()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    edit(folder / "config.json", quantization_config={**quantised, "weight_block_size": [block, block]})
    return folder, truth


def test_an_fp8_checkpoint_is_what_its_scales_say_also_in_blocks_that_are_not_whole(tmp_path: Path) -> None:
    folder, truth = fp8_model(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    found = resolve(str(folder))
    assert found.name == "model" and found.source == "local folder, weights dequantised from fp8 to bfloat16"
    made = load_file(found.folder / "model.safetensors")
    assert set(made) == set(truth)
    for name, want in truth.items():
        # The rounding of bfloat16 (8 bits) and of the float32 product before it.
        assert made[name].dtype == torch.bfloat16
        error = (made[name].double() - want).abs()
        assert bool((error <= want.abs() * (2**-8 + 2**-24)).all()), name
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    model = load_model(found.folder, family_for(load_config(found.folder)))
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()
    assert load_tokenizer(found.folder)("the cat")["input_ids"]


def test_whole_blocks_are_bit_for_bit_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder, _ = fp8_model(tmp_path / "model", intermediate_size=96, head_dim=16)
    given = FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=given, dtype=torch.bfloat16).state_dict()
    ours = load_file(resolve(str(folder)).folder / "model.safetensors")
    assert set(ours) - set(theirs) == set()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_every_family_is_dequantised_by_the_same_rule(tmp_path: Path, model_type: str) -> None:
    folder, truth = fp8_model(tmp_path / "model", model_type)
    made = load_file(resolve(str(folder)).folder / "model.safetensors")
    for name, want in truth.items():
        assert torch.allclose(made[name].double(), want, rtol=2**-8 + 2**-24, atol=0), name


def test_shards_links_and_one_scale_for_all_are_taken_as_they_come(tmp_path: Path) -> None:
    folder, truth = fp8_model(tmp_path / "model one ü")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        tensors[f"{name}_scale_inv"] = scale
        truth[name] = tensors[name].double() * 0.5
        tensors["model.layers.0.self_attn.o_proj.activation_scale"] = torch.tensor(2.0)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        made = load_file(resolve(str(folder)).folder / "model.safetensors")
        assert set(made) == set(truth) and torch.allclose(made[name].double(), truth[name], rtol=2**-8 + 2**-24, atol=0)
    # A weight and its scale in two files, behind the links of the hub's cache.
    sharded(folder)
    root = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = root / "snapshots" / "0123abc", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    again = plain(find(snapshot))  # type: ignore[arg-type]
    index = json.loads((again / "model.safetensors.index.json").read_text())
    parts = {n: load_file(again / n) for n in set(index["weight_map"].values())}
    assert {t: n for n, held in parts.items() for t in held} == index["weight_map"]
    for tensor, weight in truth.items():
        assert torch.allclose(parts[index["weight_map"][tensor]][tensor].double(), weight, rtol=2**-8 + 2**-24, atol=0)
    assert load_model(again, family_for(load_config(again))).eval()


def test_an_fp8_model_is_planned_from_its_configuration_alone(tmp_path: Path) -> None:
    folder, _ = fp8_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    found, config = describe(str(folder))
    assert found.source.endswith("weights dequantised from fp8 to bfloat16") and config.dtype == torch.bfloat16
    ran = compress("plan", folder, "--recipe", "tyr-demo", "--sparsity", "0.2", "--set", "tyr.round_to=4")
    assert ran.code == 0, ran.err
    assert "dequantised from fp8 to bfloat16" in ran.out
    assert not (cache_dir() / "models").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("no scale", "has no scale"),
        ("wrong scale", "80 x 64, in blocks of 32 x 32) is 2 x 2"),
        ("nan scale", "holds NaN or infinity"),
        ("block", "weight_block_size is [32], not two whole numbers"),
        ("fp4", "kind of fp8 that is not known"),
        ("gone", "safetensors weights"),
        ("family", "gpt2"),
    ],
)
def test_an_fp8_checkpoint_that_is_not_whole_is_one_error(tmp_path: Path, change: str, word: str) -> None:
    folder, _ = fp8_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight_scale_inv"
    facts = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    if change == "no scale":
        del tensors[name]
    elif change == "wrong scale":
        tensors[name] = torch.ones(2, 2)
    elif change == "nan scale":
        tensors[name][0, 0] = float("nan")
    elif change == "block":
        facts["weight_block_size"] = [BLOCK]
    elif change == "fp4":
        facts["expert_dtype"] = "fp4"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", quantization_config=facts, **({"model_type": "gpt2"} if change == "family" else {}))
    if change == "gone":
        (folder / "model.safetensors").unlink()
    one_error(compress("prune", folder, "-r", "tyr-demo", "--out", tmp_path / "run"), 1, word)
    # Nothing half made stays.
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_what_is_quantised_otherwise_is_refused_in_plan(tmp_path: Path) -> None:
    folder, _ = fp8_model(tmp_path / "model")
    for how in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8"):
        edit(folder / "config.json", quantization_config={"quant_method": how})
        one_error(compress("plan", folder, "-r", "tyr-demo"), 1, f"the weights are quantised ({how})")
    one_error(compress("eval", folder, "--text", __file__), 1, "the weights are quantised (fbgemm_fp8)")


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: the two halves of a head in turn."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_model(path: Path, kind: str = "Q8_0", leave_out: str = "", **changes: Any) -> dict[str, np.ndarray]:
    """A tiny Llama written with the gguf package's own writer, and what its blocks stand for, in float64."""
    import gguf

    sizes = {**SIZES, "head_dim": 16, "intermediate_size": 96, **changes}
    model = tiny("llama", **sizes)
    words = json.loads(word_tokenizer(path.parent / "words").backend_tokenizer.to_str())["model"]
    order = sorted(words["vocab"], key=words["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    tokens = [*order, *(f"<spare {i}>" for i in range(300 - len(order)))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in words["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    truth = {}
    quant = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        weight = tensor.clone()
        for part, heads in (("q_proj", sizes["num_attention_heads"]), ("k_proj", sizes["num_key_value_heads"])):
            weight = permuted(weight, heads) if part in name else weight
        if name.startswith("model.layers."):
            _, _, block, rest = name.split(".", 3)
            theirs = f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"
        else:
            theirs = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        values = weight.numpy()
        if values.ndim == 2:
            held = gguf.quantize(values, quant)
            values = gguf.dequantize(held, quant)
            if theirs != leave_out:
                writer.add_tensor(theirs, held, raw_dtype=quant)
        elif theirs != leave_out:
            writer.add_tensor(theirs, values)
        back = torch.from_numpy(values.copy())
        for part, heads in (("q_proj", sizes["num_attention_heads"]), ("k_proj", sizes["num_key_value_heads"])):
            if part in name:
                back = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        truth[name] = back.double().numpy()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_gguf_is_what_its_blocks_say(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a model.gguf"
    truth = gguf_model(path, kind)
    found = resolve(str(path))
    verb = "taken" if kind == "F16" else "dequantised"
    assert found.source == f"local file, weights {verb} from GGUF ({kind}, F32) to float32"
    assert found.name == "a model" and resolve_origin(found.origin, found.source) == found.folder
    made = load_file(found.folder / "model.safetensors")
    assert set(made) == set(truth)
    for name, want in truth.items():
        np.testing.assert_allclose(made[name].double().numpy(), want, rtol=2**-23, atol=0, err_msg=name)
    config = load_config(found.folder)
    want = {k: v for k, v in SIZES.items() if k not in ("head_dim", "intermediate_size")}
    assert {k: getattr(config, k) for k in want} == want and config.head_dim == 16
    model, tokenizer = load_model(found.folder, family_for(config)), load_tokenizer(found.folder)
    words = tokenizer("the cat sat")["input_ids"]
    assert tokenizer.decode(words) == "the cat sat" and model(torch.tensor([words])).logits.isfinite().all()
    # What was made once is not made again; what was changed since is not believed.
    made_at = os.stat(found.folder).st_ino
    assert os.stat(resolve(str(path)).folder).st_ino == made_at
    edit(found.folder / "dequantised.json", **{"model.safetensors": "0"})
    assert os.stat(resolve(str(path)).folder).st_ino != made_at


def test_the_one_gguf_of_a_folder_is_taken_and_of_several_one_must_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "ggufs of mine"
    folder.mkdir()
    gguf_model(folder / "small.gguf")
    assert resolve(str(folder)).name == "ggufs of mine"
    kind, place = find_saved(str(folder))
    assert kind == "text" and (place / "model.safetensors").exists()
    (folder / "other.gguf").write_bytes((folder / "small.gguf").read_bytes())
    for verb in (("plan", folder, "-r", "tyr-demo"), ("eval", folder, "--text", __file__)):
        one_error(compress(*verb), 2, "2 GGUF files: other.gguf, small.gguf", "name the one that is meant")
    assert resolve(str(folder / "other.gguf")).name == "other"
    # Parts of one are joined first.
    for name in ("small.gguf", "other.gguf"):
        (folder / name).unlink()
    for i in (1, 2):
        (folder / f"big-0000{i}-of-00002.gguf").write_bytes(b"GGUF")
    one_error(compress("plan", folder, "-r", "tyr-demo"), 1, "one part of a GGUF", "llama-gguf-split --merge")


def test_a_gguf_that_is_damaged_or_lacks_a_weight_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf_model(path)
    whole = path.read_bytes()
    bad = {
        "no GGUF": b"PK\3\4" + whole[4:],
        "empty": b"",
        "head": whole[:40],
        "middle": whole[:3000],
        "end": whole[:-2000],
        "many": whole[:8] + (2**60).to_bytes(8, "little") + whole[16:],
    }
    for how, data in bad.items():
        path.write_bytes(data)
        ran = compress("prune", path, "-r", "tyr-demo", "--out", tmp_path / f"run {how}")
        one_error(ran, 1, "GGUF", str(path))
    truth = gguf_model(path)
    norm = truth["model.norm.weight"].astype(np.float32).tobytes()
    path.write_bytes(path.read_bytes().replace(norm, np.full(len(norm) // 4, np.nan, np.float32).tobytes()))
    ran = compress("prune", path, "-r", "tyr-demo", "--out", tmp_path / "run")
    one_error(ran, 1, "model.norm.weight holds", str(path))
    gguf_model(path, leave_out="blk.1.ffn_up.weight")
    one_error(compress("prune", path, "-r", "tyr-demo", "--out", tmp_path / "run"), 1, "missing in the GGUF, the first")
    gguf_model(path, num_hidden_layers=2)
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.bloxx_count"))
    one_error(compress("plan", path, "-r", "tyr-demo"), 1, "holds 2 blocks, and says that it has 32", str(path))
    one_error(compress("plan", tmp_path / "none.gguf", "-r", "tyr-demo"), 2, "unknown model")


def test_what_dequantising_changed_stands_in_the_lock_file(tmp_path: Path) -> None:
    for seed, name in enumerate(("calibration", "first", "second")):
        (tmp_path / f"{name}.txt").write_text(prose(120, seed))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    folder, _ = fp8_model(tmp_path / "model")
    less = ("tyr.iterations=1", "tyr.search.generations=0", "tyr.levels=2", "tyr.head_levels=2")
    changes = [word for change in less for word in ("--set", change)]
    ran = compress("prune", folder, "-r", recipe, "--out", tmp_path / "run", "--until", "plan", *changes)
    assert ran.code == 0, ran.err
    words = "weights dequantised from fp8 to bfloat16"
    assert words in ran.err and words in (tmp_path / "run" / "recipe.lock.yaml").read_text()


def test_several_ggufs_are_no_matter_beside_safetensors(tmp_path: Path) -> None:
    folder, _ = fp8_model(tmp_path / "model")
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    assert find(folder) is not None and find(folder).kind == "fp8"  # type: ignore[union-attr]
    with pytest.raises(CompressError, match="GGUF"):
        resolve(str(folder / "a.gguf"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="2 GGUF files"):
        resolve(str(folder))
