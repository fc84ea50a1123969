"""The kinds of fault that fuzzing has found, each held by inputs of its own."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress.errors import LONGEST, CompressError, UsageError
from compress.exporters.formats import describe
from compress.exporters.gate import parse_budget
from compress.networks.reload import read_facts, reload
from compress.pipeline import METHODS
from compress.report.build import of_report
from compress.run.tensor_files import load_tensors
from compress.schema.recipe import load_recipe
from compress.schema.strict_yaml import parse_yaml
from compress.system.arrays import read_array
from compress.system.files import matching
from tests.command import compress, one_error
from tests.fuzz.readers import READERS
from tools.ci.models import chain


@pytest.mark.parametrize("value", ["1e30", "1e+30", "'1e30'", "1.0e30", "1" + "0" * 30])
def test_a_number_beyond_all_sense_is_refused_however_yaml_reads_it(value: str) -> None:
    """YAML takes 1e30 for a text, as it has no dot, and a text is read as a number where one is meant."""
    for key in ("bench.min_seconds", "export.tolerance", "recover.learning_rate"):
        with pytest.raises(UsageError, match="no number here is beyond"):
            load_recipe("tyr", METHODS, ["recover.steps=2", f"{key}={value}"])
    assert load_recipe("tyr", METHODS, ["export.tolerance=1e-3"]).export.tolerance == 1e-3


def test_a_character_that_json_writes_as_two_halves_is_one_in_yaml() -> None:
    assert parse_yaml('{"x": "\\ud83d\\ude42"}', "it", "here").value == {"x": "\U0001f642"}
    for half in ('{"x": "\\ud83d"}', '{"\\ude42": 1}', '- "\\ude42\\ud83d"'):
        with pytest.raises(UsageError, match="half a character"):
            parse_yaml(half, "it", "here")


def test_an_error_does_not_quote_a_whole_file() -> None:
    said = str(CompressError("x" * 10**6, where="y" * 10**6, fix="z"))
    assert len(said) < 2 * LONGEST + 200 and said.count("\n") == 2


def test_the_limit_of_a_budget_is_written_in_plain_digits() -> None:
    with pytest.raises(UsageError, match="this is no budget"):
        parse_budget("latency<=１.05x")


def test_a_rule_over_several_keys_names_the_one_that_was_set() -> None:
    with pytest.raises(UsageError) as e:
        load_recipe("global-mp-fastgrnn-9-7", METHODS, ["global-mp.floor=8"])
    assert e.value.where.startswith("--set global-mp.floor=8")


@pytest.mark.parametrize("name", ["network.json", "model.safetensors", "fingerprint.safetensors"])
def test_a_pipe_in_a_models_folder_is_not_waited_for(name: str, tmp_path: Path) -> None:
    READERS["network"].make(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CompressError) as e:
        reload(tmp_path)
    assert name in e.value.where


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"network": "resnet99"}, "unknown network"),
        ({"arguments": {"depth": 8, "width": 10**9, "classes": 3}}, "beyond 100,000"),
        ({"arguments": {"depth": 8, "width": 90_000, "classes": 3}}, "bytes, and its weights are"),
        ({"arguments": {"depth": "8"}}, "arguments"),
        ({"input": [3, 12, 0]}, "'input'"),
        ({"mean": [0.4, None, 0.4]}, "'mean'"),
        ({"std": [0.3, 0.0, 0.3]}, "not above 0"),
        ({"tasks": []}, "'tasks'"),
        ({"tasks": [{"name": "class", "kind": "clases", "classes": []}]}, "'clases'"),
        ({"tasks": [{"name": "class", "kind": "classes", "classes": [], "run": "x"}]}, "'run'"),
        ({"widths": {"stem": {"out": "8"}}}, "widths.stem.out"),
    ],
)
def test_what_a_network_says_of_itself_is_typed_and_no_larger_than_its_weights(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    READERS["network"].make(tmp_path)
    path = tmp_path / "network.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CompressError) as e:
        reload(tmp_path)
    assert said in f"{e.value.what} {e.value.where}" and str(path) in e.value.where and e.value.fix


def test_what_our_own_networks_say_of_themselves_is_read(tmp_path: Path) -> None:
    READERS["network"].make(tmp_path)
    assert read_facts(tmp_path) == json.loads((tmp_path / "network.json").read_text())
    assert reload(tmp_path).found["max_abs_difference"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": -1.0}, {"rms_norm_eps": True}, {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"tie_word_embeddings": "yes"}, {"eos_token_id": 10**9}, {"bos_token_id": [1, None, "x"]},
        {"sliding_window": 0},
        {"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4}},
    ],
)  # fmt: skip
def test_a_value_that_no_model_computes_with_is_named_before_weights_are_read(
    change: dict[str, Any], tmp_path: Path
) -> None:
    from compress.models.reading import load_config

    READERS["config-planned"].make(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CompressError) as e:
        load_config(tmp_path)
    assert e.value.where == str(path) and e.value.fix


def test_a_tokenizer_that_its_library_refuses_in_a_bare_exception_is_one_error(tmp_path: Path) -> None:
    from compress.models.reading import load_tokenizer

    READERS["tokenizer"].make(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text())
    for change in (
        {"version": None},
        {"truncation": "x"},
        {"model": {**good["model"], "vocab": []}},
        {"added_tokens": 3},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CompressError, match="the tokenizer cannot be read") as e:
            load_tokenizer(tmp_path)
        assert e.value.where == str(path) and e.value.fix


def test_a_part_of_another_kind_is_the_reports_fault_and_other_faults_are_not(tmp_path: Path) -> None:
    for error in (KeyError("x"), TypeError("x"), ZeroDivisionError("x"), IndexError("x")):
        with pytest.raises(CompressError, match="not what a report is") as e, of_report(tmp_path):
            raise error
        assert e.value.where == str(tmp_path) and e.value.__cause__ is error
    with pytest.raises(AssertionError), of_report(tmp_path):
        raise AssertionError("ours")


def test_a_file_of_tensors_that_is_none_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (b"", b"x", b"\xff" * 100, (8).to_bytes(8, "little") + b"{}      ", (1 << 62).to_bytes(8, "little")):
        path.write_bytes(data)
        if data.endswith(b"{}      "):
            assert load_tensors(path, "the file") == {}
            continue
        with pytest.raises(CompressError, match="damaged or cut short"):
            load_tensors(path, "the file")
    path.unlink()
    path.mkdir()
    with pytest.raises(CompressError, match="the file is no file"):
        load_tensors(path, "the file")


@pytest.mark.parametrize("kept", range(20, 119, 7))
def test_an_array_whose_header_ends_anywhere_is_one_error(kept: int, tmp_path: Path) -> None:
    """numpy reads headers of Python 2 too, by its tokenizer."""
    whole = tmp_path / "whole.npy"
    np.save(whole, np.zeros((4, 3), np.float32))
    header = whole.read_bytes()[10:128][:kept]
    cut = tmp_path / "cut.npy"
    cut.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(CompressError, match="the depths cannot be read"):
        read_array(cut, "the depths", "make it again")


def test_an_onnx_file_that_onnxruntime_refuses_is_the_files_fault(tmp_path: Path) -> None:
    """Not that of a format that is built of it."""
    chain(tmp_path / "net.onnx", 2)
    model = onnx.load(tmp_path / "net.onnx")
    model.opset_import[0].version = 999
    onnx.save(model, tmp_path / "new.onnx")
    ran = compress("export", tmp_path / "new.onnx", "--format", "onnx", "--out", tmp_path / "out")
    one_error(ran, 1, "ONNX Runtime cannot load new.onnx", "new.onnx")


@pytest.mark.parametrize("pattern", ["", " ", "\t"])
def test_a_pattern_that_shows_nothing_is_shown_in_quotes(pattern: str) -> None:
    with pytest.raises(CompressError, match="no file matches") as error:
        matching([pattern], "the text files")
    assert error.value.where == repr(pattern)


@pytest.mark.parametrize(
    ("key", "value"), [("format", -math.inf), ("format", "mnn"), ("precision", 8), ("format", None)]
)
def test_a_record_of_another_format_than_its_name_says_is_one_error(key: str, value: object, tmp_path: Path) -> None:
    facts = {"format": "ort", "precision": "fp32", "bytes": {}, "sha256": {}}
    (tmp_path / "ort.json").write_text(json.dumps(facts))
    assert describe(tmp_path, "ort") == facts
    (tmp_path / "ort.json").write_text(json.dumps({**facts, key: value}))
    with pytest.raises(CompressError, match=f"{key}|speaks of another format") as error:
        describe(tmp_path, "ort")
    assert error.value.where == str(tmp_path / "ort.json")
