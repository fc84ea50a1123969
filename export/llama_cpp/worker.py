"""The process in which libllama runs: a job as JSON comes in, facts as JSON go out, arrays go into files.

It may be ended by libllama at any call. What libllama says goes to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.exporters.llama_cpp.library import Model, Refused


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Loads ``job["gguf"]`` and answers what is asked of it, see `compress.exporters.llama_cpp.ask`."""

    def log(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    began = time.monotonic()
    model = Model(Path(job["library"]), Path(job["gguf"]), job["length"], job["threads"], job["plain_cache"], log)
    found: dict[str, Any] = {"vocab": model.vocab, "load": time.monotonic() - began}
    found["tokens"] = [model.tokens(text) for text in job["texts"]]
    found["ends"] = [token for token in job["ends"] if model.ends(token)]
    out = Path(job["out"])
    for number, ids in enumerate(job["windows"]):
        model.forget()
        np.save(out / f"window-{number}.npy", model.logits(ids))
    if job["stepped"]:
        ids, begin = job["stepped"], max(1, len(job["stepped"]) - job["steps"])
        model.forget()
        parts = [model.logits(ids[:begin])]
        parts += [model.logits(ids[i : i + 1], i) for i in range(begin, len(ids))]
        np.save(out / "stepped.npy", np.concatenate(parts))
    if job["prompt"]:
        found["greedy"] = greedy(model, job["prompt"], job["greedy"])
    return found


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """The ``count`` tokens that follow, each the likeliest."""
    model.forget()
    row, made = model.logits(prompt)[-1], []
    for i in range(count):
        made.append(int(row.argmax()))
        if i + 1 < count:
            row = model.logits(made[-1:], len(prompt) + i)[-1]
    return made


def main() -> None:
    try:
        found = run(json.loads(sys.stdin.read()))
    except Refused as e:
        found = {"refused": str(e)}
    except CompressError as e:
        found = {"error": [e.what, e.where, e.fix]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
