"""JSON that may come from a stranger or from a disk that lies: one reading, bounded, and one clear error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from compress.errors import CompressError
from compress.system.files import read_bytes

LIMIT = 64 << 20  # bytes of a file
DEPTH = 100  # levels of lists and objects in each other
DIGITS = 100  # of a number
FIX = "fetch or copy it again, or make it again with `compress prune --fresh`"

T = TypeVar("T")


def read_json(path: Path, what: str, *, limit: int = LIMIT, constants: bool = False, fix: str = FIX) -> Any:
    """The value of a UTF-8 JSON file.

    Args:
        what: what the file is, for the error: ``the seal``.
        limit: how many bytes it may have.
        constants: NaN and Infinity, which Python writes and JSON has not, are taken.
        fix: what the error says to do.

    Raises:
        CompressError: it is missing, no regular file, longer than ``limit``, or not what `parse_json` takes; ``where``
            is the path.
    """
    return parse_json(read_bytes(path, what, limit, fix), what, str(path), constants=constants, fix=fix)


def parse_json(data: bytes | str, what: str, where: str, *, constants: bool = False, fix: str = FIX) -> Any:
    """The value of a JSON text.

    Raises:
        CompressError: it is no UTF-8 or no JSON, names a key twice, nests more than `DEPTH` levels, has a number of
            more than `DIGITS` digits or beyond float64, NaN or Infinity (unless ``constants``), or half a character.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=float if constants else _constant,
        )
        _bounded(value, "\\ud" in text or "\\uD" in text)
    except UnicodeDecodeError as e:
        raise CompressError(f"{what} is not UTF-8 (byte {e.start})", where=where, fix=fix) from e
    except RecursionError as e:
        raise CompressError(f"{what} nests more than {DEPTH} levels", where=where, fix=fix) from e
    except json.JSONDecodeError as e:
        raise CompressError(
            f"{what} is no JSON: {e.msg} (line {e.lineno}, column {e.colno})", where=where, fix=fix
        ) from e
    except ValueError as e:
        raise CompressError(f"{what} {e}", where=where, fix=fix) from e
    return value


def typed(value: Any, kind: type[T], field: str, what: str, where: str, fix: str = FIX) -> T:
    """``value`` if it is a ``kind`` (a bool is no int, an int is a float); else a `CompressError` that names ``field``.

    Args:
        field: where in the file the value stands, ``files.config.json.bytes``; empty for the whole.
    """
    if kind is float and type(value) is int:
        return float(value)  # type: ignore[return-value]
    if type(value) is not kind:
        at = repr(field) if field else "the whole"
        raise CompressError(
            f"{what} is not what it should be: {at} is {_named(value)}, not {NAMES[kind]}", where=where, fix=fix
        )
    return value  # type: ignore[no-any-return]


def member(
    facts: dict[str, Any], key: str, kind: type[T], what: str, where: str, within: str = "", fix: str = FIX
) -> T:
    """``facts[key]`` as a ``kind``; a `CompressError` names the key where it is missing or another (see `typed`)."""
    field = f"{within}.{key}" if within else key
    if key not in facts:
        raise CompressError(f"{what} is not what it should be: {field!r} is missing", where=where, fix=fix)
    return typed(facts[key], kind, field, what, where, fix)


NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _named(value: Any) -> str:
    return NAMES[type(value)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"names the key {_short(twice)} twice")
    return found


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"has a number of {len(digits):,} digits")
    return int(digits)


def _number(digits: str) -> float:
    found = float(digits)
    if len(digits) > DIGITS or not math.isfinite(found):
        raise ValueError(f"has a number that no float64 holds: {_short(digits)}")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"has the number {name}, which JSON does not know")


def _bounded(value: Any, halves: bool) -> None:
    """Raises RecursionError where ``value`` nests too deeply; with ``halves``, ValueError where a text cannot be
    written as UTF-8 (a surrogate without its other half)."""
    level: list[Any] = [[value]]
    for _ in range(DEPTH + 1):
        within = [child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent)]
        if halves:
            for text in _texts(level, within):
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"has half a character in {_short(text)}") from None
        level = [child for child in within if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError


def _texts(parents: list[Any], within: list[Any]) -> Iterator[str]:
    for parent in parents:
        if isinstance(parent, dict):
            yield from parent
    for child in within:
        if isinstance(child, str):
            yield child
