"""YAML from outside: bounded, and one error that names file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.schema.strict_yaml import DEPTH, NODES, parse_yaml, read_yaml


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [" + ",".join("x" * 9) + "]"]
    lines += [f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        (bomb(9), f"more than {NODES:,} values", "line 6"),
        ("z: &z [*z]", "stands inside what it names", "line 1"),
        ("a: 1\nb: 2020-13-45", "'2020-13-45' is no value", "line 2"),
        ("seed: " + "9" * 5000, "is no value", "line 1"),
        ("z: " + "[" * 2000 + "]" * 2000, f"nests more than {DEPTH} levels", "line 1"),
        ("\n".join("  " * i + "k:" for i in range(80)), f"nests more than {DEPTH} levels", "line 51"),
        ("a: 1\na: 2", "'a' stands twice", "line 2"),
        ("a: {b: 1, b: 2}", "'b' stands twice", "line 1"),
        ("a: [1", "not valid YAML", "line 1"),
        ("a: 1\x00", "not valid YAML", ""),
        ("a: 1\n---\nb: 2", "another document", "line"),
        ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor", "line 1"),
        ("? [a]\n: 1", "unhashable", "line 1"),
        ("a: !!binary x", "not valid YAML", "line 1"),
        ("a: !!int x", "is no value", "line 1"),
    ],
)
def test_what_is_no_plain_data_is_one_error_with_its_line(text: str, what: str, line: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_yaml(text, "the file", "f.yaml")
    assert what in e.value.what and e.value.where.startswith("f.yaml") and line in e.value.where


def test_a_file_is_read_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("a: é".encode("utf-8-sig"))
    assert read_yaml(path, "it").value == {"a": "é"}
    path.write_bytes("a: é".encode("utf-16"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_yaml(path, "it")
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(UsageError, match="it "):
            read_yaml(wrong, "it")
    path.write_bytes(b"")
    assert read_yaml(path, "it").value is None


def test_lines_are_those_of_keys_and_items() -> None:
    read = parse_yaml("a: 1\nb:\n  - x\n  - {c: 2}\n", "it", "here")
    assert read.value == {"a": 1, "b": ["x", {"c": 2}]}
    assert read.lines == {("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "c"): 4}


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(plain)
def test_plain_data_come_back(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value), "it", "here").value == value


@settings(max_examples=400, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("ab01-:?&*!|>[]{}#,'\"\n \t%@`<.~\0\ufeff"), max_size=40) | st.binary(max_size=40)
)
def test_no_text_ends_otherwise(text: str | bytes) -> None:
    try:
        parse_yaml(text, "it", "here")
    except UsageError as e:
        assert e.where.startswith("here")
