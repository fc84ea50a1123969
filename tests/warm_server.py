"""Runs scripts in forks of one interpreter that has torch and transformers loaded, and nothing of compress.

Started by `tests.warm`. A line of JSON on standard input says what is run: ``words`` (those behind the interpreter's
own: a script's path, or -m and a module, then its arguments), ``environment``, and the files ``out`` and ``err``. A
line on standard output gives the exit code, as `subprocess` has it.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback
from typing import Any

PRELOADED = (
    "torch",
    "safetensors.torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)


def serve() -> None:
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # a fork then copies no page for a mere count of references
    for line in sys.stdin:
        child = os.fork()
        if not child:
            work(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def work(asked: dict[str, Any]) -> None:
    """What the interpreter does with ``words``; it does not come back."""
    for path, flags, place in (
        (os.devnull, os.O_RDONLY, 0),
        (asked["out"], os.O_WRONLY | os.O_CREAT, 1),
        (asked["err"], os.O_WRONLY | os.O_CREAT, 2),
    ):
        os.dup2(os.open(path, flags), place)
    os.environ.clear()
    os.environ.update(asked["environment"])
    for name, module in list(sys.modules.items()):  # read from the environment when they were imported
        if name.startswith("transformers") and "HF_MODULES_CACHE" in vars(module) and "HF_MODULES_CACHE" in os.environ:
            vars(module)["HF_MODULES_CACHE"] = os.environ["HF_MODULES_CACHE"]
    code = 0
    try:
        first, *rest = asked["words"]
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
