"""YAML that may come from a stranger: one reading, bounded, and one clear error that says where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.errors import CompressError, UsageError
from compress.system.files import read_bytes

LIMIT = 4 << 20  # bytes of a file
DEPTH = 50  # levels of maps and lists in each other
NODES = 200_000  # values, those behind aliases counted where they are named
FIX = "mend the syntax there"

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Read:
    """A YAML text: its value, and the line (from 1) of every key and every item, by its path."""

    value: Any
    lines: dict[Keys, int]


def read_yaml(path: Path, what: str, fix: str = "check the path and its rights") -> Read:
    """The value of a UTF-8 YAML file.

    Args:
        what: what the file is, for the error: ``the recipe``.

    Raises:
        UsageError: it is missing, no regular file, longer than `LIMIT`, or not what `parse_yaml` takes.
    """
    try:
        data = read_bytes(path, what, LIMIT, fix)
    except CompressError as e:
        raise UsageError(e.what, where=e.where, fix=e.fix) from None
    return parse_yaml(data, what, str(path))


def parse_yaml(data: bytes | str, what: str, where: str, fix: str = FIX) -> Read:
    """The value of a YAML text; a byte order mark in front is taken for what it is.

    Raises:
        UsageError: it is no UTF-8 or no YAML, names a key twice, nests more than `DEPTH` levels, holds more than
            `NODES` values once its aliases are followed (or one that holds itself), or a value that is none of its
            kind, as a date of month 13.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UsageError(f"{what} is not UTF-8 (byte {e.start})", where=where, fix="save it as UTF-8") from None
    try:
        _shallow(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Read(None, {})
            _bounded(node)
            lines = dict(_lines(node))
            return Read(loader.construct_document(node), lines)
        finally:
            loader.dispose()
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or str(getattr(e, "reason", None) or e).split("\n")[0]
        raise UsageError(f"{what} is not valid YAML: {problem}", where=f"{where}{line}", fix=fix) from None


class _Loader(yaml.SafeLoader):
    """Plain data alone; what Python cannot make of a scalar (a date, a number) is an error of that line."""

    def events(self) -> Iterator[Any]:
        while self.check_event():
            yield self.get_event()

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, OverflowError) as e:
            if isinstance(e, yaml.YAMLError):
                raise
            short = str(getattr(node, "value", ""))[:40]
            raise yaml.constructor.ConstructorError(
                None, None, f"{short!r} is no value: {str(e).split(';')[0]}", node.start_mark
            ) from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """A character that JSON writes as two halves is one; half a character is none."""
        found = str(super().construct_scalar(node))
        if found.isascii():
            return found
        try:
            return found.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise yaml.constructor.ConstructorError(None, None, "it holds half a character", node.start_mark) from None


def _shallow(text: str) -> None:
    """Raises where the text nests too deeply, before anything recurses over it."""
    depth = 0
    for event in _Loader(text).events():
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH:
                mark: Any = event.start_mark
                raise yaml.composer.ComposerError(None, None, f"it nests more than {DEPTH} levels", mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _bounded(root: yaml.Node) -> None:
    """Raises where aliases make more values than `NODES`, or one that holds itself."""
    counts: dict[int, int] = {}
    open_: set[int] = set()

    def count(node: yaml.Node) -> int:
        key = id(node)
        if key in open_:
            raise yaml.composer.ComposerError(None, None, "an alias stands inside what it names", node.start_mark)
        if key not in counts:
            open_.add(key)
            counts[key] = 1 + sum(map(count, _children(node)))
            open_.remove(key)
            if counts[key] > NODES:
                raise yaml.composer.ComposerError(
                    None, None, f"its aliases stand for more than {NODES:,} values", node.start_mark
                )
        return counts[key]

    try:
        count(root)
    except RecursionError:  # aliases of aliases, each a level deeper
        raise yaml.composer.ComposerError(None, None, f"it nests more than {DEPTH} levels", root.start_mark) from None


def _lines(node: yaml.Node, at: Keys = ()) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.composer.ComposerError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
            yield (*at, name), key.start_mark.line + 1
            yield from _lines(value, (*at, name))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*at, i), value.start_mark.line + 1
            yield from _lines(value, (*at, i))
