"""JSON from a stranger or a damaged disk: the one value it can have, or one clear error."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.run.strict_json import DEPTH, DIGITS, member, parse_json, read_json, typed


def refused(raw: bytes, tmp_path: Path, **options: bool) -> CompressError:
    path = tmp_path / "some.json"
    path.write_bytes(raw)
    with pytest.raises(CompressError) as said:
        read_json(path, "the seal", **options)
    assert said.value.where == str(path) and said.value.fix and said.value.what.startswith("the seal ")
    return said.value


def test_what_python_reads_of_honest_json_is_read(tmp_path: Path) -> None:
    value = {"a": [1, -2, 0.5, 1e300, None, True], "ü": {"nested": [{}], "e": "\U0001f600"}, "": ""}
    path = tmp_path / "some.json"
    for text in (json.dumps(value), json.dumps(value, indent=1), json.dumps(value, ensure_ascii=False)):
        path.write_text(text, encoding="utf-8")
        assert read_json(path, "the seal") == json.loads(text)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b'{"files": {}, "files": {"a": 1}}', "'files' twice"),
        (b'[{"x": {"y": 1, "z": 2, "y": 1}}]', "'y' twice"),
        (b'{"a": 1, "\\u0061": 1}', "'a' twice"),
        (b"NaN", "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b"[1e999]", "1e999"),
        (b"[" + b"9" * (DIGITS + 1) + b"]", "digits"),
        (b"9" * 5000, "digits"),
        (b"[" * 100_000, "nests"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "nests"),
        (b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1), "nests"),
        (b'{"\xe9": 1}', "UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\uDC00x": 1}', "half a character"),
        (b"", "no JSON"),
        (b'{"a": 1} x', "no JSON"),
        (b'{"a": "\n"}', "no JSON"),
        (b'{"a": \x00}', "no JSON"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_what_is_no_plain_json_is_named(raw: bytes, word: str, tmp_path: Path) -> None:
    assert word in refused(raw, tmp_path).what


def test_as_deep_as_is_allowed_is_read() -> None:
    value = parse_json("[" * DEPTH + "]" * DEPTH, "the seal", "here")
    for _ in range(DEPTH - 1):
        (value,) = value
    assert value == []


def test_our_own_figures_may_be_no_numbers_where_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"ppl": [math.nan, math.inf, -math.inf]}))
    first, *rest = read_json(path, "the evaluation", constants=True)["ppl"]
    assert math.isnan(first) and rest == [math.inf, -math.inf]
    assert "float64" in refused(b"[1e999]", tmp_path, constants=True).what


def test_a_file_longer_than_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps("x" * 98))
    assert read_json(path, "the index", limit=100) == "x" * 98
    with pytest.raises(CompressError, match="longer than 99 bytes"):
        read_json(path, "the index", limit=99)


def test_what_is_no_file_is_said_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name, word in (
        ("pipe.json", "no file"),
        ("folder.json", "no file"),
        ("loop.json", "cannot be read"),
        ("gone.json", "missing"),
        ("nul\0.json", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ):
        with pytest.raises(CompressError, match=word) as said:
            read_json(tmp_path / name, "the report")
        assert said.value.where == str(tmp_path / name)


def test_a_deep_stack_does_not_change_what_is_read() -> None:
    def deeper(left: int) -> str:
        if left:
            return deeper(left - 1)
        with pytest.raises(CompressError, match="nests"):
            parse_json("[" * 5000, "the seal", "here")
        return "said"

    assert deeper(sys.getrecursionlimit() // 2) == "said"


def test_a_field_of_another_type_is_named_with_its_file() -> None:
    assert typed({"a": 1}, dict, "files", "the seal", "s.json") == {"a": 1}
    assert typed(3, float, "seconds", "the seal", "s.json") == 3.0
    for value, kind, word in (
        (True, int, "true or false, not a whole number"),
        (1.0, int, "a number, not a whole number"),
        (None, dict, "null, not an object"),
        ([], str, "a list, not a text"),
        (True, float, "true or false, not a number"),
    ):
        with pytest.raises(CompressError, match=f"'files.x' is {word}") as said:
            typed(value, kind, "files.x", "the seal", "s.json")
        assert said.value.where == "s.json"
    with pytest.raises(CompressError, match=r"'files.x.bytes' is missing"):
        member({}, "bytes", int, "the seal", "s.json", "files.x")
