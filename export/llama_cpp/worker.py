"""The process in which libllama runs: a job as JSON comes in, facts as JSON go out, arrays go into files.

It may be ended by libllama at any call. What libllama says goes to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.exporters.bench import environment, protocol
from compress.exporters.llama_cpp.library import Model, Refused, find, title
from compress.exporters.llama_cpp.nats import nats
from compress.system import host


def log(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Loads ``job["gguf"]`` and answers what is asked of it, see `compress.exporters.llama_cpp.ask`."""
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


def go_on(job: Mapping[str, Any]) -> dict[str, Any]:
    """Text behind ``job["ids"]``: once the file is loaded, and then token by token, a line on standard output each."""
    ids = list(job["ids"])
    model = Model(Path(job["library"]), Path(job["gguf"]), len(ids) + job["count"], job["threads"], False, log)
    print(json.dumps({"loaded": True}), flush=True)
    made: list[int] = []
    row = model.last(ids)
    while len(made) < job["count"]:
        made.append(int(row.argmax()))
        print(json.dumps({"token": made[-1]}), flush=True)
        if model.ends(made[-1]):
            break
        if len(made) < job["count"]:
            row = model.last(made[-1:], len(ids) + len(made) - 1)
    return {"text": model.text(made)}


def losses(job: Mapping[str, Any]) -> dict[str, Any]:
    """Of each window, nats of every token but the first, as users run the file; into files."""
    windows, out = job["windows"], Path(job["out"])
    model = Model(Path(job["library"]), Path(job["gguf"]), max(map(len, windows)), job["threads"], False, log)
    for number, ids in enumerate(windows):
        model.forget()
        np.save(out / f"losses-{number}.npy", nats(model.logits(ids), ids))
    return {"vocab": model.vocab}


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a GGUF as `compress.exporters.bench.agent` measures other formats: the same request, the same answer.

    ``ttft``: a prompt of random tokens, all at once, and the choice of the token behind it; ``tpot``: one token behind
    a context. As users have it: cache in float16, llama.cpp's own choice of attention.
    """
    start = environment.state()
    rng = np.random.default_rng(request["seed"])
    (prompt,), (context,) = request["prompts"], request["contexts"]
    began = time.perf_counter()
    model = Model(find(), Path(request["files"]["model"]), max(prompt, context + 1), request["threads"], False, log)
    load = time.perf_counter() - began
    ids = rng.integers(0, model.vocab, max(prompt, context + 1)).tolist()

    def first() -> int:
        model.forget()
        return int(model.last(ids[:prompt]).argmax())

    def following() -> int:
        model.forget(context)
        return int(model.last(ids[context : context + 1], context).argmax())

    figures = {"ttft": _timed(request, first, load)}
    model.forget()
    model.last(ids[:context])
    figures["tpot"] = _timed(request, following, load)
    found = {"figures": figures, "runtime": title(), "peak_rss": host.peak_memory()}
    place = {**environment.fixed(), "threads": request["threads"], "start": start, "end": environment.state()}
    return {**found, "environment": place, "emulated": place["emulated"]}


def _timed(request: Mapping[str, Any], call: Callable[[], Any], load: float) -> dict[str, Any]:
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    return {"load": load, "first": first, **protocol.steady(call, request["min_seconds"], request["min_runs"])}


def main() -> None:
    job = json.loads(sys.stdin.read())
    try:
        found = {"measure": measure, "go on": go_on, "losses": losses}.get(job.get("do", ""), run)(job)
    except Refused as e:
        words = {"what": f"llama.cpp refuses the file: {e}", "where": "", "fix": "export it again"}
        found = {"refused": str(e), "error": words}
    except CompressError as e:
        found = {"error": {"what": e.what, "where": e.where, "fix": e.fix}}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
