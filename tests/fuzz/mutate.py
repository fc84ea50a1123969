"""One fault in a good input: what hypothesis draws of values, texts, bytes and places that nobody meant."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


class Raw(str):
    """Stands in a text as it is: what no value of Python is written as."""


class Pairs(list[tuple[str, Any]]):
    """An object by its pairs: a key may stand twice."""


class Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()
At = tuple[str | int, ...]

# What stands where another value was meant. No text of them is a path that is there.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 10**23, -(10**23), 2**31, 2**63, 1e-320, 1e30, 1e308,
    Raw("1e999"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("9" * 5000), Raw("-0"),
    "", " ", "x", "40", "0.5", "1e999", "nan", "\0", "a\nb", "../../x", "/x", "\U0001f642", "\u202e", "é",
    "x" * 100_000,
    Raw('"\\ud800"'), [], {}, [0], [-1], [None], ["x"], [[]], {"a": None}, {"": ""}, [0] * 1000,
    Raw("[" * 60 + "]" * 60), Raw("[" * 5000 + "]" * 5000), Raw('{"a":' * 3000 + "1" + "}" * 3000),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What was done to one file: ``put`` stands at ``at``, where a value was changed and no more."""

    file: str
    how: str
    at: At | None = None
    put: Any = MISSING

    def __str__(self) -> str:
        return f"{self.file}: {self.how}"


def written(value: Any) -> str:
    """A value as JSON, and so as YAML too."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {written(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def replaced(value: Any, at: At, change: Callable[[Any], Any]) -> Any:
    """The value with what stands at ``at`` changed; MISSING takes it out."""
    if not at:
        return change(value)
    first, *rest = at
    pairs: list[tuple[Any, Any]] = list(value.items() if isinstance(value, dict) else enumerate(value))
    made = [(k, replaced(v, tuple(rest), change) if k == first else v) for k, v in pairs]
    made = [(k, v) for k, v in made if v is not MISSING]
    return dict(made) if isinstance(value, dict) else [v for _, v in made]


def found_at(value: Any, at: At) -> Any:
    for part in at:
        value = value[part]
    return value


@st.composite
def places(draw: st.DrawFn, value: Any) -> At:
    """Where a value stands: shallow ones as often as deep ones, however many there are."""
    at: At = ()
    while isinstance(value, dict | list) and value and (not at or draw(st.integers(0, 3))):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        at, value = (*at, key), value[key]
    return at


@st.composite
def values(draw: st.DrawFn, good: Any) -> tuple[str, Change]:
    """A JSON-like value with one fault, written; the change names no file yet."""
    at = draw(places(good))
    how = draw(st.sampled_from(["put"] * 6 + ["taken out", "twice", "renamed", "wrapped", "more"]))
    here = found_at(good, at)
    within = found_at(good, at[:-1]) if at else None
    name = ".".join(map(str, at)) or "the whole"
    if how == "taken out" and at:
        return written(replaced(good, at, lambda _: MISSING)), Change("", f"{name} taken out", at)
    if how == "twice" and isinstance(within, dict):
        pairs = Pairs([*within.items(), (str(at[-1]), draw(st.sampled_from([here, *ODD[:8]])))])
        return written(replaced(good, at[:-1], lambda _: pairs)), Change("", f"{name} twice")
    if how == "renamed" and isinstance(within, dict):
        other = draw(st.sampled_from(["", "x", f"{at[-1]} ", str(at[-1]).upper(), "\0", "é", "x" * 10_000]))
        pairs = Pairs([(other if k == at[-1] else k, v) for k, v in within.items()])
        return written(replaced(good, at[:-1], lambda _: pairs)), Change("", f"{name} renamed {other[:20]!r}")
    if how == "more" and isinstance(here, dict):
        odd = draw(st.sampled_from(ODD))
        return written(replaced(good, at, lambda v: Pairs([*v.items(), ("more", odd)]))), Change(
            "", f"{name}: a key more"
        )
    put = [here] if how == "wrapped" else draw(st.sampled_from(ODD))
    return written(replaced(good, at, lambda _: put)), Change("", f"{name} is {written(put)[:60]}", at, put)


@st.composite
def raw(draw: st.DrawFn, data: bytes, text: bool) -> tuple[bytes, Change]:
    """Bytes with a fault of a disk, a copy or an editor."""
    ways = ["cut", "flip", "flips", "empty", "junk behind", "NUL", "doubled", "gone in the middle", "noise"]
    how = draw(
        st.sampled_from(ways + (["BOM", "UTF-16", "CRLF", "Latin-1", "line twice", "line gone", "tab"] if text else []))
    )
    at = draw(st.integers(0, max(0, len(data) - 1)))
    lines = data.split(b"\n")
    row = draw(st.integers(0, len(lines) - 1)) if text else 0
    flipped = bytearray(data)
    for place in (
        {at} if how == "flip" else draw(st.sets(st.integers(0, max(0, len(data) - 1)), min_size=2, max_size=8))
    ):
        if data:
            flipped[place] ^= 1 << draw(st.integers(0, 7))
    made = {
        "cut": data[:at],
        "flip": bytes(flipped),
        "flips": bytes(flipped),
        "empty": b"",
        "junk behind": data + b"\n\x00junk",
        "NUL": data[:at] + b"\0" + data[at:],
        "doubled": data + data,
        "gone in the middle": data[: at // 2] + data[at:],
        "noise": draw(st.binary(min_size=1, max_size=200)) if how == "noise" else b"",
        "BOM": b"\xef\xbb\xbf" + data,
        "UTF-16": data.decode("utf-8", "replace").encode("utf-16") if text else b"",
        "CRLF": data.replace(b"\n", b"\r\n"),
        "Latin-1": data[:at] + b"\xe9" + data[at:],
        "line twice": b"\n".join([*lines[:row], lines[row], *lines[row:]]),
        "line gone": b"\n".join([*lines[:row], *lines[row + 1 :]]),
        "tab": data[:at] + b"\t" + data[at:],
    }[how]
    return made, Change("", f"{how}, byte {at}" if how in ("cut", "flip", "NUL", "Latin-1", "tab") else how)


WAYS = ("gone", "a folder", "a link to nothing", "a link in a circle", "a pipe", "a link outside", "closed")


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """The file, whatever the block puts in its place, is back behind it."""
    aside = path.with_name(f".{path.name}.kept")
    path.rename(aside)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        aside.rename(path)


def put(path: Path, way: str, outside: Path) -> None:
    """Something that is no file of its own, where one was."""
    good = path.with_name(f".{path.name}.kept").read_bytes()
    if way == "a folder":
        path.mkdir()
    elif way == "a link to nothing":
        path.symlink_to("nowhere")
    elif way == "a link in a circle":
        path.symlink_to(path.name)
    elif way == "a pipe":
        os.mkfifo(path)
    elif way == "a link outside":
        outside.write_bytes(good)
        path.symlink_to(outside)
    elif way == "closed":
        path.write_bytes(good)
        path.chmod(0)


def ways() -> st.SearchStrategy[str]:
    """What can stand in a file's place; no right is lacking for root."""
    return st.sampled_from(WAYS if os.geteuid() else WAYS[:-1])
