"""A report of every method, from whole runs of tiny models: what renderers are tested with, without a run each."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

NAMES = ("tyr", "global-mp-text", "global-mp-network", "pagcp")


@cache
def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text())
    return found


def sample(name: str) -> dict[str, Any]:
    """The report of that name, to be changed at will."""
    return copy.deepcopy(_read(name))
