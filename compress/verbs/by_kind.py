"""A verb as the module of the model's kind does it."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from compress.errors import UsageError
from compress.models.saved import KINDS


def call(kind: str, verb: str, *places: Path | None, **options: Any) -> dict[str, Any]:
    """``verb`` as the kind's module does it; an option that was not given is None or empty.

    Raises:
        UsageError: an option was given that is for another kind.
    """
    function = getattr(importlib.import_module(KINDS[kind].verbs), verb)
    given = {name: value for name, value in options.items() if value is not None and value != []}
    strange = [name for name in given if name not in inspect.signature(function).parameters]
    if strange:
        raise UsageError(f"--{strange[0]} is not for {KINDS[kind].title}", where="the command line", fix="leave it out")
    return {"kind": kind, **function(*places, **given)}


def lines(verb: str, facts: dict[str, Any]) -> list[str]:
    """What the command line says of the facts that `call` returned."""
    if facts["kind"] == "onnx":  # a file from anywhere: there is no model of ours behind it
        from compress.exporters.command import lines as of_formats

        return of_formats(facts)
    module = importlib.import_module(KINDS[facts["kind"]].verbs)
    found: list[str] = getattr(module, f"{verb}_lines")(facts)
    return found
