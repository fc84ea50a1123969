"""A model's folder from anywhere: which files make the model, and that nothing else in it is read or run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.data.text import pack
from compress.errors import CompressError
from compress.language.checkpoint import check_code, verify_clean
from compress.models.families import family_for
from compress.models.folder import is_code, own_file, read_config, seen, weights_of
from compress.models.reading import load_config, load_model, load_tokenizer
from compress.run.seals import entries
from tests.command import compress, one_error
from tests.tiny import saved_tiny

pytestmark = pytest.mark.processes

EVIL = "from pathlib import Path\nPath(__file__).with_name('PWNED').write_text('1')\nimport os\nos._exit(0)\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved_tiny(tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    facts = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**facts, **changes}))


def sharded(folder: Path) -> dict[str, str]:
    """Cuts a model's weights into two files with an index, as the hub has large ones; returns the index's map."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, name))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


# Which files make a model


def test_all_readers_take_the_same_shards(model: Path) -> None:
    family = family_for(load_config(model))
    before = load_model(model, family).state_dict()
    places = sharded(model)
    found = weights_of(model)
    assert [p.name for p in found.files] == sorted(set(places.values()))
    assert {t: p.name for t, p in found.places.items()} == places
    after = load_model(model, family).state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors", "/etc/model.safetensors", "below/model.safetensors", "..\\m.safetensors",
        "C:m.safetensors", "m.safetensors\n::error::x", "m.bin", "", ".safetensors", " m.safetensors", 7, None, ["a"],
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder_only(model: Path, name: Any) -> None:
    other = shutil.copytree(model, model.parent / "other")
    assert (other / "model.safetensors").exists()
    places: dict[str, Any] = dict(sharded(model))
    places[next(iter(places))] = name
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CompressError, match="no safetensors file of this folder") as e:
        weights_of(model)
    assert "index.json" in str(e.value)


@pytest.mark.parametrize("raw", ["", "{}", "null", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map":'])
def test_an_index_that_is_none_is_one_error(model: Path, raw: str) -> None:
    sharded(model)
    (model / "model.safetensors.index.json").write_text(raw)
    ran = compress("eval", model, "--text", model / "config.json")
    one_error(ran, 1, "index")


def test_an_index_that_names_a_tensor_twice_is_refused(model: Path) -> None:
    names = sharded(model)
    first = next(iter(names))
    text = json.dumps({"weight_map": names}).replace(f'"{first}"', f'"{first}": "x.safetensors", "{first}"', 1)
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CompressError, match="twice"):
        weights_of(model)


def test_a_weight_that_two_files_hold_is_refused(model: Path) -> None:
    """transformers would take the last one it reads, the streamed model the one that the index names."""
    places = sharded(model)
    first, second = sorted(set(places.values()))
    name = next(n for n, place in places.items() if place == first)
    tensors = load_file(model / second)
    tensors[name] = load_file(model / first)[name] * 2
    save_file(tensors, model / second, metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"two files hold|says to be in"):
        weights_of(model)


def test_a_weight_that_the_index_does_not_name_is_refused(model: Path) -> None:
    places = sharded(model)
    name, place = next(iter(places.items()))
    del places[name]
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CompressError, match=f"{place} holds the weight {name}, which the index does not name"):
        weights_of(model)


def test_two_sets_of_weights_are_refused(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    sharded(model)
    (model / "model.safetensors").write_bytes(whole)
    with pytest.raises(CompressError, match="two sets of weights"):
        weights_of(model)


def test_an_index_beside_its_one_file_is_no_second_set(model: Path) -> None:
    names = list(load_file(model / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [p.name for p in weights_of(model).files] == ["model.safetensors"]
    load_model(model, family_for(load_config(model)))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_that_leaves_the_folder_is_refused(model: Path, name: str) -> None:
    away = model.parent / "away"
    (model / name).rename(away)
    (model / name).symlink_to(away)
    with pytest.raises(CompressError, match=f"{name} is a link that leaves the folder"):
        load_tokenizer(model)
        weights_of(model)


def test_a_link_within_the_folder_is_followed(model: Path) -> None:
    (model / "kept").mkdir()
    (model / "model.safetensors").rename(model / "kept" / "w")
    (model / "model.safetensors").symlink_to("kept/w")
    load_model(model, family_for(load_config(model)))


def test_a_snapshot_of_the_hubs_cache_is_taken_with_its_own_blobs(model: Path) -> None:
    """huggingface_hub keeps models--ORG--NAME/snapshots/COMMIT/file as links to models--ORG--NAME/blobs/HASH."""
    sharded(model)
    root = model.parent / "hub" / "models--org--name"
    snapshot, blobs = root / "snapshots" / "0123abc", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    load_model(snapshot, family_for(load_config(snapshot)))
    assert load_tokenizer(snapshot)("the cat")["input_ids"]
    # Another repository's blobs are not its own.
    strange = root.parent / "models--org--other" / "blobs"
    strange.mkdir(parents=True)
    (blobs / "hash0").rename(strange / "hash0")
    link = next(p for p in snapshot.iterdir() if os.readlink(p).endswith("hash0"))
    link.unlink()
    link.symlink_to("../../../models--org--other/blobs/hash0")
    with pytest.raises(CompressError, match="leaves the folder"):
        own_file(snapshot, link.name)


def test_what_is_no_file_is_refused_and_not_waited_for(model: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(CompressError, match="no regular file"):
        read_config(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CompressError, match="link to nothing"):
        weights_of(model)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"attn_implementation": "org/kernel"}, "attn_implementation"),
        ({"_attn_implementation": {"": "org/kernel@main:attention"}}, "_attn_implementation"),
        ({"experts_implementation": "org/experts"}, "experts_implementation"),
        ({"attn_implementation": 3}, "attn_implementation"),
        ({"text_config": {"attn_implementation": "org/kernel"}}, "text_config.attn_implementation"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq)"),
        ({"quantization_config": ["fp8"]}, "quantised"),
        ({"num_attention_heads": 3, "head_dim": None}, "config"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "(6) do not divide among num_key_value_heads (4)"),
        ({"hidden_size": 40.5}, "hidden_size is 40.5"),
        ({"hidden_size": 10**30}, "hidden_size is 1000"),
        ({"intermediate_size": []}, "intermediate_size is []"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"dtype": "float13"}, "dtype is 'float13'"),
        ({"torch_dtype": "float8_e4m3fn", "dtype": None}, "float8_e4m3fn"),
        ({"text_config": {"hidden_size": "x"}}, "text_config.hidden_size"),
        ({"hidden_act": "nosuch"}, "hidden_act is 'nosuch'"),
        ({"rope_parameters": 3}, "configuration"),
    ],
)
def test_a_configuration_that_brings_other_weights_or_code_into_play_is_refused_in_plan(
    model: Path, changes: dict[str, Any], word: str
) -> None:
    edit(model / "config.json", **changes)
    ran = compress("plan", model, "--recipe", "tyr-demo")
    one_error(ran, 1, word, "config.json")


def test_a_text_part_that_is_no_section_does_not_end_a_tokenizer(model: Path) -> None:
    edit(model / "config.json", text_config=[1])
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    assert load_tokenizer(model).embedding_rows == rows


def test_a_quantised_model_names_its_base_where_its_card_does(model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    for card, fix in (
        ("---\nbase_model: org/dense-7b\n---\n# x\n", "name the unquantised model: org/dense-7b"),
        ("---\nbase_model: [org/dense-7b, b/c]\n---\n", "name the unquantised model: org/dense-7b"),
        ("---\nbase_model: 'org/x; rm -rf'\n---\n", "name the unquantised model"),
        ("---\nbase_model: {a: b}\n---\n", "name the unquantised model"),
        ("---\n[\n---\n", "name the unquantised model"),
        ("no head", "name the unquantised model"),
    ):
        (model / "README.md").write_text(card)
        with pytest.raises(CompressError, match=r"quantised \(awq\)") as e:
            read_config(model)
        assert e.value.fix == fix


def test_a_token_without_a_row_in_the_embedding_is_named_where_a_text_uses_it(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<picture>"])
    tokenizer.save_pretrained(model)
    edit(model / "config.json", vocab_size=len(tokenizer) - 1)
    read = load_tokenizer(model)
    assert len(read) > read.embedding_rows == len(tokenizer) - 1
    pack(["some words " * 40], read, 16, 1, "t")
    with pytest.raises(CompressError) as e:
        pack(["some <picture> " * 40], read, 16, 1, "t")
    assert (
        "'<picture>'" in e.value.what and f"{len(read):,}" in e.value.what and e.value.where.endswith("tokenizer.json")
    )


def test_kernels_that_transformers_has_itself_are_left_to_this_machine(model: Path) -> None:
    edit(model / "config.json", _attn_implementation="flash_attention_2")
    load_model(model, family_for(load_config(model)))


# Adapters


def test_an_adapter_beside_the_model_is_refused_by_name(model: Path) -> None:
    edit(model / "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA")
    for words in (("plan", model, "--recipe", "tyr-demo"), ("eval", model, "--text", model / "config.json")):
        one_error(compress(*words), 1, "an adapter lies beside the model (adapter_config.json)")


def test_an_adapter_alone_is_told_from_a_model_and_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    edit(tmp_path / "only" / "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA")
    ran = compress("plan", tmp_path / "only", "--recipe", "tyr-demo")
    one_error(ran, 1, "this is an adapter, not a model", "its base is org/base", "merge")


# Code


@pytest.mark.parametrize(
    "name",
    [
        "a.py", "a.PY", "a.Pyc", "sub/a.pyw", "lib.so", "lib.so.1", "LIB.SO.1.2", "x.dll", "x.pyz", "run.sh",
    ],
)  # fmt: skip
def test_names_of_code_are_known_in_every_spelling(name: str) -> None:
    assert is_code(name)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "onnx/weights.data", "README.md", "a.onnx", "vocab.json", "onnx/model.pte", "a.sofa"]
)
def test_data_is_no_code(name: str) -> None:
    assert not is_code(name)


def test_transformers_sees_known_data_and_nothing_else(model: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(EVIL)
    (model / "modeling_evil.py").write_text(EVIL)
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / "adapter").mkdir()
    with seen(model, code="x = 1\n") as private:
        names = {p.relative_to(private).as_posix() for p in entries(private)}
        assert names <= {p.name for p in model.iterdir()} | {"modeling_compress.py"}
        assert not names & {"custom_generate", "modeling_evil.py", "pytorch_model.bin", "adapter"}
        assert (private / "model.safetensors").is_symlink(), "weights are not copied"
        assert (private / "modeling_compress.py").read_text() == "x = 1\n"
    assert not private.exists()


def plant(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL)


def plant_link(folder: Path) -> None:
    away = folder.parent / "away"
    away.mkdir()
    (away / "generate.py").write_text(EVIL)
    (folder / "custom_generate").symlink_to(away)


def plant_spelt(folder: Path) -> None:
    (folder / "Configuration.PYC").write_bytes(b"\0")


def plant_library(folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "libx.so.1").write_bytes(b"\x7fELF")


def change_line_ends(folder: Path) -> None:
    path = folder / "modeling_compress.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def change_code(folder: Path) -> None:
    path = folder / "modeling_compress.py"
    path.write_text(path.read_text() + "\n" + EVIL)


def name_code(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["org/evil--t.T", None]})


@pytest.mark.parametrize(
    "change", [plant, plant_link, plant_spelt, plant_library, change_line_ends, change_code, name_code]
)
def test_verify_names_code_in_a_model_folder_and_does_not_run_it(
    finished: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / "model", folder)
    (folder / "seal.json").unlink()  # a stranger's folder has none
    change(folder)
    with pytest.raises(CompressError, match=r"did not write|link to a folder"):
        check_code(folder)
    ran = compress("verify", folder)
    assert ran.code == 1 and "Traceback" not in ran.err
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.cold
def test_even_where_code_lies_beside_the_model_the_clean_process_has_none_of_it(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / "model", folder)
    plant(folder)
    change_code(folder)
    assert verify_clean(folder)["class"].startswith("Compressed")
    assert not list(tmp_path.rglob("PWNED"))


def test_a_release_whose_report_names_the_code_does_not_hold(finished: Path, tmp_path: Path) -> None:
    from compress.report.build import finish
    from compress.run.folder import SEAL

    release = tmp_path / "release"
    shutil.copytree(finished / "release", release)
    plant(release)
    (release / SEAL).unlink()
    report = json.loads((release / "report.json").read_text())
    code = release / "custom_generate" / "generate.py"
    from compress.run.cache import sha256_of

    report["files"]["custom_generate/generate.py"] = {"bytes": code.stat().st_size, "sha256": sha256_of(code)}
    finish(report)
    (release / "report.json").write_text(json.dumps(report))
    ran = compress("verify", release, "--json")
    bad = {c["claim"]: c for c in json.loads(ran.out)["claims"] if c["verdict"] == "does not hold"}
    assert ran.code == 1 and "did not write it" in bad["custom_generate/generate.py"]["reason"]
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("what", ["config", "model", "tokenizer"])
def test_nobody_is_asked_whether_a_strangers_code_should_run(
    model: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`yes | compress plan m`: transformers' question would be answered."""
    import builtins

    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    classes = (
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig): model_type = 'evil'\nclass M(LlamaForCausalLM): pass\n"
        "class T(PreTrainedTokenizerFast): pass\n"
    )
    (model / "evil.py").write_text(f"open({str(model / 'PWNED')!r}, 'w').write('1')\n" + classes)
    if what == "config":
        edit(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    elif what == "model":
        edit(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.M", "AutoConfig": "evil.C"})
    else:
        edit(model / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    if what == "model":
        assert type(load_model(model, family_for(load_config(model)))).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(CompressError, match=r"code of its own|cannot be read"):
            load_config(model) if what == "config" else load_tokenizer(model)
    assert not (model / "PWNED").exists()


def test_what_is_loaded_is_known_by_the_users_folder(model: Path) -> None:
    config = load_config(model)
    assert config._name_or_path == str(model)
    assert load_model(model, family_for(config)).name_or_path == str(model)
    assert load_tokenizer(model).name_or_path == str(model)
