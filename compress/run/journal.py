"""What a long stage notes on its way, a line at a time; it outlives a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.run.seals import fingerprint
from compress.run.strict_json import parse_json, typed


class Journal:
    """An append-only file of JSON lines, each with a hash of itself. A last line that a kill cut short is dropped when
    it is opened again.

    Raises:
        CompressError: another line is not as it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                os.truncate(path, whole)
            # Not splitlines: a damaged byte may be one of the others that it takes for an end.
            lines = data[:whole].split(b"\n")[:-1]
            self._rows = [self._row(number, line) for number, line in enumerate(lines, 1)]
        self._file = path.open("ab")

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        what, fix = f"line {number}", "delete the file: what it notes is then measured again"
        row = typed(
            parse_json(line, what, str(self.path), constants=True, fix=fix), dict, "", what, str(self.path), fix
        )
        row.pop("check", None)
        if _line(row) != line:
            raise CompressError(f"{what} was changed since it was written", where=str(self.path), fix=fix)
        return row

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(_line(row) + b"\n")
        self._file.flush()
        self._rows.append(row)

    def rows(self) -> list[dict[str, Any]]:
        return self._rows


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps({**row, "check": fingerprint(row)[:16]}).encode()


class Notes:
    """The rows of another process's `Journal`, and what was added since; nothing is written."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def rows(self) -> list[dict[str, Any]]:
        return self._rows
