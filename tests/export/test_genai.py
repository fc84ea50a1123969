"""Folders for ONNX Runtime GenAI: its tokens are torch's, whatever the layers have; fewer bits are held to a bound."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.exporters import gate_measure, gate_models, genai
from compress.exporters.formats import BuildOptions, Source, describe, make
from compress.exporters.onnx import export_llm
from compress.language.plan import BlockPlan, Plan
from compress.models.families import family_for
from compress.models.reading import load_tokenizer
from tests.command import Job, compress, one_error
from tests.tiny import let_it_add, saved_tiny, tiny, tokens

pytestmark = [
    pytest.mark.skipif(not find_spec("onnxruntime_genai"), reason="needs the extra [genai]"),
    pytest.mark.usefixtures("done_once"),
    pytest.mark.processes,
]

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a: {% endif %}"
)


def sharp(model: Any) -> Any:
    """Its distributions as peaked as a trained model's, so that nonsense lies far from them."""
    with torch.no_grad():
        model.model.norm.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A Llama of 2 and 1 KV groups and then a block without attention, its ONNX, and a tokenizer with a template."""
    folder = tmp_path_factory.mktemp("uneven")
    saved_tiny(folder / "model", num_hidden_layers=3)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    model = sharp(tiny("llama", num_hidden_layers=3))
    kept = [(range(10), 48), (range(5), 15), ((), 33)]
    Plan(tuple(BlockPlan(tuple(heads), tuple(range(n))) for heads, n in kept)).apply(model, family_for(model.config))
    (folder / "onnx").mkdir()
    export_llm(model, folder / "onnx")
    return Source(folder / "onnx", model, tokenizer=load_tokenizer(folder / "model"))


@pytest.fixture(scope="module")
def built(uneven: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai") / "fp32"
    make(uneven, folder, BuildOptions("genai"))
    return folder


def test_layers_that_differ_and_layers_without_attention_give_torchs_tokens(uneven: Source, built: Path) -> None:
    facts = describe(built, "genai")
    assert facts["parity"]["greedy"]["tokens"] > 20 and facts["parity"]["chat_template"] == "agrees"
    assert facts["parity"]["outputs"]["decode.logits"] < 1e-4
    ids = tokens(1, 20)
    with torch.no_grad():
        want = uneven.model(ids).logits[0].numpy()
    # In two parts, the second behind the first one's cache.
    assert np.abs(genai.Genai(built).logits(ids[0].tolist()) - want).max() < 1e-3 * np.abs(want).max()


def test_the_folder_stands_alone(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "else where")
    names = {"model.onnx", "weights.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json", "genai.json"}
    assert {p.name for p in built.iterdir()} == names | {"chat_template.jinja"}
    assert not any(p.is_symlink() for p in built.iterdir())
    runtime = genai.Genai(tmp_path / "else where")
    assert len(runtime.greedy(runtime.encode("the cat sat"), 5)) == 5
    for path in built.iterdir():
        assert str(built.parent).encode() not in path.read_bytes()
    settings = json.loads((built / "genai_config.json").read_text())
    assert settings["search"] == {"do_sample": False, "max_length": 256, "past_present_share_buffer": False}
    model = settings["model"]
    assert (model["context_length"], model["vocab_size"]) == (256, 300)
    assert (model["bos_token_id"], model["pad_token_id"]) == (1, 0)
    assert (model["decoder"]["head_size"], model["decoder"]["num_hidden_layers"]) == (8, 3)


def test_every_end_token_ends_a_text(uneven: Source, built: Path, tmp_path: Path) -> None:
    ids = tokens(1, 9, seed=3)[0].tolist()
    whole = genai.Genai(built).greedy(ids, 12)
    end = next(token for token in whole[1:] if token not in (whole[0], 2))
    tokenizer = load_tokenizer(Path(uneven.tokenizer.name_or_path))
    tokenizer.end_ids = (2, end)
    make(replace(uneven, tokenizer=tokenizer), tmp_path / "out", BuildOptions("genai"), check=False)
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["eos_token_id"] == [2, end]
    assert genai.Genai(tmp_path / "out").greedy(ids, 12) == whole[: whole.index(end) + 1]


@pytest.mark.parametrize(("template", "begins"), [("<s> $A", [1]), ("$A </s>", []), ("<s> $A </s>", [1])])
def test_a_text_begins_with_what_the_tokenizer_puts_in_front(
    uneven: Source, built: Path, template: str, begins: list[int], tmp_path: Path
) -> None:
    """The runtime puts nothing there by itself, and a Gemma without its first token is another model."""
    shutil.copytree(built, tmp_path / "out")
    shutil.copytree(uneven.tokenizer.name_or_path, tmp_path / "model")
    let_it_add(tmp_path / "model", template)
    tokenizer = load_tokenizer(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "out")
    runtime = genai.Genai(tmp_path / "out")
    assert runtime.opening == begins
    assert runtime.encode("the cat sat") == [*begins, *runtime.encode("the cat sat", begin=False)]
    assert genai.check(replace(uneven, tokenizer=tokenizer), tmp_path / "out", BuildOptions("genai"))["greedy"]


@pytest.mark.parametrize(("precision", "most"), [("fp16", 1e-3), ("int8", 0.05), ("int4", 1.0)])
def test_fewer_bits_are_smaller_and_their_distance_is_recorded(
    uneven: Source, built: Path, precision: str, most: float, tmp_path: Path
) -> None:
    facts = make(uneven, tmp_path / "out", BuildOptions("genai", precision))
    measured = facts["parity"]["divergence"]
    assert 0 < measured["kl"] < most and measured["tokens"] > 300
    assert measured["perplexity"][0] == pytest.approx(describe(built, "genai")["parity"]["divergence"]["perplexity"][0])
    ratio = facts["bytes"]["weights.data"] / (built / "weights.data").stat().st_size
    assert ratio < {"fp16": 0.55, "int8": 0.55, "int4": 0.45}[precision]  # rows of 40 are filled up to 64
    made = facts["components"]["decode"]
    if precision in genai.BITS:
        bits = genai.BITS[precision]
        # q, k, v and o of two blocks, gate, up and down of three, and the head.
        want = {"block": 32, "accuracy_level": 4, "bits": bits, "products": 18, "head_bits": 8, "embedding_bits": 8}
        assert made["quantised"] == want
        assert made["ops"]["MatMulNBits"] == 18 and made["ops"]["GatherBlockQuantized"] == 1


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("byte", [0x33, 0xFF])
def test_nonsense_and_nan_are_no_model(uneven: Source, precision: str, byte: int, tmp_path: Path) -> None:
    options = BuildOptions("genai", precision)
    make(uneven, tmp_path / "out", options, check=False)
    weights = tmp_path / "out" / "weights.data"
    held = weights.read_bytes()
    weights.write_bytes(held[: len(held) // 2] + bytes([byte]) * (len(held) - len(held) // 2))
    with pytest.raises(CompressError, match="not those of the ONNX file"):
        genai.check(uneven, tmp_path / "out", options)


def test_a_tied_table_in_8_bits_is_the_tables_own_rows(uneven: Source, tmp_path: Path) -> None:
    """What GatherBlockQuantized gives is a row of the embedding, to half a step of its block."""
    import onnxruntime as ort

    from compress.exporters.quantize import weights_nbits

    weights_nbits(uneven.path / "decode.onnx", tmp_path / "m.onnx", 8, level=4)
    model = onnx.load(tmp_path / "m.onnx")
    (gather,) = (n for n in model.graph.node if n.op_type == "GatherBlockQuantized")
    model.graph.output.append(onnx.helper.make_tensor_value_info(gather.output[0], onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "seen.onnx")
    session = ort.InferenceSession(tmp_path / "seen.onnx")
    feed = {"input_ids": np.arange(300)[None], "attention_mask": np.ones((1, 300), np.int64)}
    feed |= {"position_ids": np.arange(300)[None]}
    feed |= {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    (rows,) = session.run([gather.output[0]], feed)
    want = uneven.model.model.embed_tokens.weight.numpy()
    step = np.stack([np.abs(want[:, a:b]).max(1) for a, b in ((0, 32), (32, 40))], 1).repeat([32, 8], 1) / 127
    assert (np.abs(rows[0] - want) <= 0.51 * step).all() and np.abs(rows[0] - want).max() > 0


def test_the_command_makes_one_of_a_model_and_says_what_it_is_worth(job: Job, tmp_path: Path) -> None:
    ran = compress("export", job.model, "--out", tmp_path / "out", "--format", "genai", "--precision", "int4")
    assert ran.code == 0, ran.err
    assert "against ONNX in fp32" in ran.out and "nats a token, perplexity" in ran.out
    assert describe(tmp_path / "out" / "genai-int4", "genai")["parity"]["chat_template"] == "none"
    runtime = genai.Genai(tmp_path / "out" / "genai-int4")
    assert len(runtime.greedy(runtime.encode("the cat sat"), 4)) == 4


def test_a_tokenizer_that_is_missing_is_one_error(job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    ran = compress("export", tmp_path / "model", "--out", tmp_path / "out", "--format", "genai")
    one_error(ran, 1, "the tokenizer cannot be read")
    assert not (tmp_path / "out").exists()


def refused(source: Source, out: Path, options: BuildOptions, kind: type[CompressError], words: str) -> None:
    with pytest.raises(kind, match=words) as e:
        make(source, out, options)
    assert e.value.fix and "\n" not in e.value.what
    assert not list(out.parent.iterdir())


def test_what_cannot_be_is_refused_in_one_sentence_and_leaves_nothing(
    uneven: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "there" / "out", BuildOptions("genai")
    out.parent.mkdir()
    refused(replace(uneven, tokenizer=None), out, plain, UsageError, "a saved language model with its tokenizer")
    refused(uneven, out, replace(plain, fusions="all"), UsageError, "without fusions")
    refused(uneven, out, BuildOptions("genai", "bf16"), UsageError, "not built in bf16")
    with monkeypatch.context() as patch:
        patch.setattr(genai.Genai, "opening", [2])
        refused(uneven, out, plain, CompressError, "makes other tokens of a text than transformers does")
    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime_genai.__version__", "0.9.2")
        refused(uneven, out, plain, UsageError, r"needs onnxruntime_genai 0.18 or newer, and 0.9.2 is installed")
    with monkeypatch.context() as patch:
        patch.setattr(uneven.model.config, "max_position_embeddings", 0)
        refused(uneven, out, plain, CompressError, "does not say how long a text may be")


def test_a_cache_of_another_kind_is_refused(uneven: Source, tmp_path: Path) -> None:
    shutil.copytree(uneven.path, tmp_path / "onnx")
    path = tmp_path / "onnx" / "decode.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["past_conv.0" if name == "past_key_values.0.key" else name for name in node.input]
    next(v for v in model.graph.input if v.name == "past_key_values.0.key").name = "past_conv.0"
    onnx.save(model, path)
    (tmp_path / "there").mkdir()
    source = replace(uneven, path=tmp_path / "onnx")
    refused(
        source, tmp_path / "there" / "out", BuildOptions("genai"), CompressError, "the graph's cache has past_conv.0"
    )


def test_a_network_is_none(tmp_path: Path) -> None:
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", kind, [1, 4])], [value("y", kind, [1, 4])])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    ran = compress("export", tmp_path / "m.onnx", "--format", "genai", "--out", tmp_path / "out")
    one_error(ran, 2, "a saved language model with its tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_broken_is_one_error(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "out")
    path = tmp_path / "out" / "genai_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    odd = json.dumps(settings | {"model": settings["model"] | {"type": "none"}})
    for broken in ("{", "[]", '{"model": {}}', odd):
        path.write_text(broken)
        ran = compress("run", tmp_path / "out", "the cat sat")
        one_error(ran, 1, "genai_config.json" if broken != odd else "cannot load the folder")
    path.write_text(json.dumps(settings))
    (tmp_path / "out" / "weights.data").unlink()
    one_error(compress("run", tmp_path / "out", "the cat sat"), 1, "the weights of model.onnx are missing")
    shutil.copy(built / "weights.data", tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("no")
    one_error(compress("run", tmp_path / "out", "the cat sat"), 1, "cannot load the folder")


def test_a_chat_goes_through_the_runtimes_own_rendering(uneven: Source, built: Path) -> None:
    ran = compress("run", built, "the cat sat", "--chat", "--tokens", 6, "--json")
    (result,) = json.loads(ran.out)["results"].values()
    runtime = genai.Genai(built)
    ids = runtime.encode("<s>user: the cat sat</s><s>a: ", begin=False)
    assert result["prompt_tokens"] == len(ids) and ids.count(1) == 2
    assert result["text"] == runtime.decode(runtime.greedy(ids, 6))


def decoder(**more: Any) -> dict[str, Any]:
    return {"model": {"context_length": 8, "decoder": {"filename": "model.onnx", **more}}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (decoder(session_options={"custom_ops_library": "x.so"}), "session_options.custom_ops_library"),
        (decoder(session_options={"enable_profiling": "/tmp/x"}), "session_options.enable_profiling"),
        (decoder(session_options={"provider_options": [{"cuda": {}}]}), "session_options.provider_options"),
        (decoder(pipeline=[{"a": {"session_options": {"config_entries": {}}}}]), "session_options.config_entries"),
        (decoder(ep_library="x.so"), "model.decoder.ep_library"),
        (decoder(filename="../model.onnx"), "names a file outside its folder"),
        (decoder(pipeline=[{"a": {"filename": "/etc/passwd"}}]), "names a file outside its folder"),
        (decoder(filename=3), "names a file outside its folder"),
    ],
)
def test_a_strangers_folder_loads_no_code_and_no_file_from_elsewhere(
    built: Path, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes((built / "model.onnx").read_bytes())
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(CompressError) as e:
        genai.Genai(tmp_path)
    assert words in str(e.value) and "\n" not in e.value.what


def test_a_link_to_weights_elsewhere_is_refused(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "out")
    (tmp_path / "out" / "weights.data").unlink()
    (tmp_path / "out" / "weights.data").symlink_to(built / "weights.data")
    with pytest.raises(CompressError, match=r"weights\.data"):
        genai.Genai(tmp_path / "out")


def test_two_folders_are_measured_in_the_runtimes_own_loop(uneven: Source, built: Path, tmp_path: Path) -> None:
    make(uneven, tmp_path / "int4", BuildOptions("genai", "int4"), check=False)
    short = ("--prompt", 24, "--context", 20, "--processes", 1, "--threads", 1)
    ran = compress("bench", built, tmp_path / "int4", *short, "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["spec"]["runtime"].startswith("onnxruntime_genai 0.")
    for key in ("ttft", "tpot"):
        assert facts["dense"][key]["median"] > 0 and facts["pruned"][key]["load"] > 0
    held = {p: (built / p).stat().st_size for p in ("genai_config.json", "model.onnx", "weights.data")}
    assert facts["dense"]["bytes"] == sum(held.values()) > facts["pruned"]["bytes"]
    assert facts["dense"]["peak_rss"] > 0
    one_error(compress("bench", built, uneven.path, *short), 1, "one is a folder for ONNX Runtime GenAI")
    ran = compress("gate", built, tmp_path / "int4", "-b", "size<=0.9x", "--json")
    assert ran.code == 0, ran.err
    bits = facts["pruned"]["bytes"] / facts["dense"]["bytes"]
    assert json.loads(ran.out)["budgets"][0]["value"] == pytest.approx(bits)
    # Built without a check: nothing says its perplexity.
    one_error(compress("gate", built, tmp_path / "int4", "-b", "perplexity<=2x"), 2, "nothing says what perplexity")
    sample = gate_measure.measure(
        gate_models.find(str(built)), gate_measure.Measuring(samples=2, prompt=8, context=8), 0
    )
    assert all(min(sample[figure]["fastest"]) > 0 for figure in ("ttft", "tpot"))
    one_error(compress("bench", built, built, "--prompt", 300, "--processes", 1), 1, "cannot run the folder")
