"""Measures one exported network; runs alone, in a process of its own, on the device.

Reads a JSON object from standard input and writes one to standard output. It needs Python, numpy and onnxruntime,
and protocol.py beside it.

Input: model (path), shape (of one batch), threads, min_seconds, min_runs, seed.
Output: load, first and steady times in seconds, and the peak memory of the process in bytes.
"""

import json
import os
import sys
import time
from typing import Any


def main(spec):  # type: ignore[no-untyped-def]
    import numpy as np
    import onnxruntime as ort

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from agent import peak_memory
    from protocol import steady

    options = ort.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    start = time.perf_counter()
    session = ort.InferenceSession(spec["model"], options, providers=["CPUExecutionProvider"])
    out: dict[str, Any] = {"runtime": f"onnxruntime {ort.__version__}", "load": time.perf_counter() - start}
    values = np.random.default_rng(spec["seed"]).standard_normal(spec["shape"]).astype(np.float32)
    feed = {session.get_inputs()[0].name: values}
    start = time.perf_counter()
    session.run(None, feed)
    out["first"] = time.perf_counter() - start
    out |= steady(lambda: session.run(None, feed), spec["min_seconds"], spec["min_runs"])
    out["peak_rss"] = peak_memory()
    return out


if __name__ == "__main__":
    json.dump(main(json.load(sys.stdin)), sys.stdout)
