"""Measures one exported language model; runs alone, in a process of its own, on the device.

Reads a JSON object from standard input and writes one to standard output. It needs Python, numpy and onnxruntime,
and protocol.py beside it.

Input: prefill, decode (paths), prompt, context (tokens), vocab, threads, min_seconds, min_runs, seed.
Output: load, first and steady times of both graphs in seconds, and the peak memory of the process in bytes. The two
graphs are measured one after the other, the first is released before the second is loaded.
"""

import gc
import json
import os
import resource
import sys
import time
from typing import Any


def peak_memory() -> int:
    """The most memory this process has held, in bytes.

    Linux's ru_maxrss survives exec: a child of a large process would report its parent's size.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except OSError:  # no Linux: ru_maxrss is the process's own there, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(spec):  # type: ignore[no-untyped-def]
    import numpy as np
    import onnxruntime as ort

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from protocol import steady

    def load(path):  # type: ignore[no-untyped-def]
        options = ort.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        start = time.perf_counter()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return session, time.perf_counter() - start

    def first_then_steady(call):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        return {"first": first, **steady(call, spec["min_seconds"], spec["min_runs"])}

    rng = np.random.default_rng(spec["seed"])

    def tokens(count):  # type: ignore[no-untyped-def]
        return rng.integers(0, spec["vocab"], (1, count))

    def feed(session, ids, total, past):  # type: ignore[no-untyped-def]
        wanted = {i.name for i in session.get_inputs()}
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - ids.shape[1], total)[None],
            **past,
        }
        return {k: v for k, v in given.items() if k in wanted}

    out: dict[str, Any] = {"runtime": f"onnxruntime {ort.__version__}"}
    session, seconds = load(spec["prefill"])
    prompt = feed(session, tokens(spec["prompt"]), spec["prompt"], {})
    # TTFT is what a user waits for: the whole call, the token's choice included.
    out["ttft"] = {"load": seconds, **first_then_steady(lambda: session.run(["logits"], prompt)[0][0, -1].argmax())}
    context = feed(session, tokens(spec["context"]), spec["context"], {})
    names = [o.name for o in session.get_outputs()]
    cache = dict(zip(names, session.run(names, context), strict=True))
    out["prefill_peak_rss"] = peak_memory()
    del session
    gc.collect()
    session, seconds = load(spec["decode"])
    past = {"past_key_values." + k[len("present.") :]: v for k, v in cache.items() if k != "logits"}
    step = feed(session, tokens(1), spec["context"] + 1, past)
    names = [o.name for o in session.get_outputs()]
    out["tpot"] = {"load": seconds, **first_then_steady(lambda: session.run(names, step)[0][0, -1].argmax())}
    out["peak_rss"] = peak_memory()
    return out


if __name__ == "__main__":
    json.dump(main(json.load(sys.stdin)), sys.stdout)
