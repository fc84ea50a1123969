"""Networks are measured as everything is, see `local`; the name is kept for those who know it from here."""

from __future__ import annotations

from compress.export.bench.local import compare_modules

__all__ = ["compare_modules"]
