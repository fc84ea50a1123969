"""Writes docs/reference/recipe-keys.md and docs/reference/api.md from the schemas and the docstrings.

    PYTHONPATH=. python tools/reference.py

tests/docs/test_reference.py asks that the committed pages are what this writes.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
BY_HAND = "<!-- tools/reference.py writes this page: change the schemas or the docstrings, and run it -->\n"
PLAIN = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", Any: "anything"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "not shorter than"}


def main() -> None:
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name -> what is to stand in it."""
    return {"recipe-keys.md": recipe_keys(), "api.md": api()}


# --- keys -------------------------------------------------------------------------------------------------------------


def recipe_keys() -> str:
    from compress.exporters.target import Target
    from compress.pipeline import METHODS
    from compress.schema.recipe import Recipe, TextRecipe
    from compress.schema.sections import NetworkRecipe
    from compress.verbs.gate import GateFile

    takers = {kind: [name for name, tasks in METHODS.items() if kind in tasks] for kind in ("text", "network")}
    for_tyr = ", ".join(f"`{k}`" for k in Recipe.model_fields if k not in TextRecipe.model_fields)
    text = [
        "# Keys of recipes, targets and gate files\n",
        BY_HAND,
        "All keys that a YAML file may hold, with their types, limits and defaults. An unknown key is refused, with"
        " file, line and the nearest valid name. `extends: NAME` lays a file over another, key by key; a list is taken"
        " whole."
        ' `--set train.epochs=5` on the command line and `settings={"train.epochs": 5}` in Python change one value.\n',
        *_file("Language models", Recipe, f"Recipes without `task`; methods: {_listed(takers['text'])}. What the method"
               f" itself takes stands under its name, see below. Of `tyr` alone: {for_tyr}."),
        *_file("Networks", NetworkRecipe, f"Recipes with `task: network`; methods: {_listed(takers['network'])}."),
    ]  # fmt: skip
    for method, tasks in METHODS.items():
        for kind, task in tasks.items():
            of = "" if len(tasks) == 1 else f" on {'language models' if kind == 'text' else 'networks'}"
            text += _file(f"Method {method}{of}", task.options, f"Under the key `{method}`.", f"{method}.")
    text += _file("Targets", Target, "A target file; see [build for a device](../guide/targets.md).")
    text += _file("Gate files", GateFile, "A gate file; see [gate latency in CI](../guide/gate-in-ci.md).")
    return "\n".join(text).rstrip() + "\n"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _file(title: str, model: type[BaseModel], said: str, prefix: str = "") -> Iterator[str]:
    """A heading for a file or a method, its table, and a section for each map of keys inside it."""
    sections: dict[type[BaseModel], str] = {}
    todo = [(prefix, model)]
    found: list[tuple[str, type[BaseModel]]] = []
    while todo:
        path, section = todo.pop(0)
        for key, field in section.model_fields.items():
            for inner, many in _models(field.annotation):
                if inner not in sections:
                    sections[inner] = f"{title}: `{path}{key}`"
                    found.append((sections[inner], inner))
                    todo.append((f"{path}{key}{many}.", inner))
    yield f"## {title}\n\n{said}\n\n{_table(model, sections)}"
    for heading, section in found:
        yield f"### {heading}\n\n{_about(section)}{_table(section, sections)}"


def _about(model: type[BaseModel]) -> str:
    doc = inspect.cleandoc(model.__dict__.get("__doc__") or "")
    return f"{_prose(doc)}\n\n" if doc else ""


def _table(model: type[BaseModel], sections: dict[type[BaseModel], str]) -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name == "options" and field.annotation is Any:
            continue  # what stands under the method's own name
        cells = (f"`{name}`", _type(field, sections), _default(field), _prose(field.description or ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _models(annotation: Any, many: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The sections in a type, each with what stands between its key and those in it."""
    if isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation, many
    inside = {list: "[]", dict: ".NAME"}.get(typing.get_origin(annotation), "")
    for inner in typing.get_args(annotation):
        yield from _models(inner, many + inside)


def _type(field: FieldInfo, sections: dict[type[BaseModel], str]) -> str:
    return _words(field.annotation, sections) + _limits(field.metadata)


def _words(annotation: Any, sections: dict[type[BaseModel], str]) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        limits = [m for part in inner[1:] for m in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _words(inner[0], sections) + _limits(limits)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(v) if not isinstance(v, str) else v}`" for v in inner)
    if origin in (Union, types.UnionType):
        given = [a for a in inner if a is not type(None) and not (a is int and float in inner)]
        return " or ".join([*(_words(a, sections) for a in given), *(["`null`"] if type(None) in inner else [])])
    if origin is list:
        return f"list of: {_words(inner[0], sections)}"
    if origin is dict:
        return f"map from {_words(inner[0], sections)} to {_words(inner[1], sections)}"
    if annotation in sections:
        heading = sections[annotation]
        return f"[keys](#{_anchor(heading)})"
    if annotation in PLAIN:
        return PLAIN[annotation]
    raise TypeError(f"no words for {annotation!r}")


def _limits(metadata: list[Any]) -> str:
    found = []
    for limit in metadata:
        for key, words in LIMITS.items():
            value = getattr(limit, key, None)
            if value is not None and (key, value) != ("min_length", 1):
                found.append(f"{words} {value:g}")
        if getattr(limit, "min_length", None) == 1:
            found.append("not empty")
        if (pattern := getattr(limit, "pattern", None)) is not None:
            found.append(f"of the form `{pattern}`")
    return "".join(f", {words}" for words in found)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    if isinstance(field.default, BaseModel):
        return "its keys' own"
    value = field.get_default()
    if isinstance(value, list) and any(isinstance(v, BaseModel) for v in value):
        value = [v.model_dump(mode="json", exclude_unset=True) for v in value]
    return f"`{json.dumps(value)}`" if value != "" else "empty"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- the API ----------------------------------------------------------------------------------------------------------


def api() -> str:
    import compress

    functions = [n for n in compress.__all__ if inspect.isfunction(getattr(compress, n))]
    classes = [n for n in compress.__all__ if inspect.isclass(getattr(compress, n))]
    order = list(inspect.getmodule(compress.prune).__dict__)  # as they stand in the file
    text = [
        "# The Python API\n",
        BY_HAND,
        f"{_prose(inspect.getdoc(inspect.getmodule(compress.prune)) or '')}\n",
    ]
    for name in sorted(functions, key=order.index):
        function = getattr(compress, name)
        text.append(f"## {name}\n\n```python\n{_signature(name, function)}\n```\n\n{_docstring(function)}")
    for name in sorted(classes):
        text.append(f"## {name}\n\n{_docstring(getattr(compress, name))}")
        for key, member in getattr(compress, name).__dict__.items():
            doc = None if key.startswith("_") else _property_doc(member)
            if doc is not None:
                text.append(f"- `{key}`: {_prose(doc)}")
        text.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text)).rstrip() + "\n"


def _property_doc(member: Any) -> str | None:
    return inspect.getdoc(member) if isinstance(member, property) or hasattr(member, "attrname") else None


def _signature(name: str, function: Any) -> str:
    words, named_only = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not named_only:
            named_only = True
            words.append("*")
        star = "**" if p.kind is p.VAR_KEYWORD else ""
        words.append(f"{star}{p.name}: {p.annotation}" + (f" = {p.default!r}" if p.default is not p.empty else ""))
    returned = inspect.signature(function).return_annotation
    return "\n".join([f"def {name}(", *(f"    {word}," for word in words), f") -> {returned}: ..."]).replace(
        "options: Any,\n)", "options: Any\n)"
    )


def _docstring(thing: Any) -> str:
    """A docstring as Markdown; what stands under Args and the like becomes a list."""
    said: list[str] = []
    # A part begins with its title and ends where a line stands at the margin again.
    for part in re.split(r"\n+(?=(?:Args|Attributes|Returns|Raises):\n)|\n\n(?=\S)", inspect.getdoc(thing) or ""):
        title, _, rest = part.partition("\n")
        if title in ("Args:", "Attributes:", "Raises:"):
            items = re.split(r"\n(?=\S)", inspect.cleandoc(rest))
            pairs = [item.partition(": ") for item in items]
            names = [", ".join(f"`{n}`" for n in name.split(", ")) for name, _, _ in pairs]
            listed = [f"- {n}: {_prose(said)}" for n, (_, _, said) in zip(names, pairs, strict=True)]
            said.append(f"**{title.removesuffix(':')}**\n\n" + "\n".join(listed))
        elif title == "Returns:":
            said.append(f"**Returns**: {_prose(inspect.cleandoc(rest))}")
        else:
            said.append("\n\n".join(_prose(paragraph) for paragraph in part.strip().split("\n\n")))
    return "\n\n".join(said) + "\n"


def _prose(text: str) -> str:
    """One line; code in single backticks, as Markdown has it."""
    return " ".join(text.split()).replace("``", "`")


if __name__ == "__main__":
    main()
