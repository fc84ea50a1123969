"""compress: prune a trained model, export it, measure it, and prove what was won and lost.

>>> import compress
>>> result = compress.prune("smollm2-135m", "tyr-demo", out="runs/demo", sparsity=0.25)
>>> result.model, result.release / "README.md"
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from compress.api import Result, Swept, bench, evaluate, export, gate, generate, load, plan, prune, sweep, verify
    from compress.data.job import Job

__version__ = "0.2.0"
__all__ = [
    "CompressError", "Job", "Result", "Swept", "UsageError", "bench", "evaluate", "export", "gate", "generate", "load",
    "plan", "prune", "sweep", "verify",
]  # fmt: skip

# ONNX Runtime (from 1.29) and its GenAI send usage figures away from their start on, unless this is set before. Whoever
# wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """The verbs, when they are first asked for: `import compress` stays quick."""
    if name == "Job":
        return importlib.import_module("compress.data.job").Job
    if name in __all__:
        return getattr(importlib.import_module("compress.api"), name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
