"""Measures one exported network, or runs it once; runs alone, in a process of its own, on the device.

Reads a JSON object from standard input and writes one to standard output. It needs Python, numpy, onnxruntime (for
``.onnx``) or MNN (for ``.mnn``), and agent.py and protocol.py beside it.

Input: model (path), shape (of one batch), threads, min_seconds, min_runs, seed.
Output: load, first and steady times in seconds, and the peak memory of the process in bytes.
To run it once instead: model, threads, input (path of an .npy), outputs (path for an .npz), names (of the outputs).
"""

import json
import os
import sys
import time
from typing import Any


def onnx_call(spec):  # type: ignore[no-untyped-def]
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(spec["model"], options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: session.run(spec.get("names"), {name: values}), f"onnxruntime {ort.__version__}"


def mnn_call(spec):  # type: ignore[no-untyped-def]
    import MNN
    import numpy as np
    from MNN import expr, nn

    # "high": float32 on a phone as well, where the default would be float16.
    settings = {"precision": "high", "backend": "CPU", "numThread": spec["threads"]}
    manager = nn.create_runtime_manager((settings,))
    module = nn.load_module_from_file(spec["model"], [], spec.get("names", []), runtime_manager=manager)

    def call(values):  # type: ignore[no-untyped-def]
        given = expr.placeholder(list(values.shape), expr.NCHW)
        given.write(values)
        return [np.array(expr.convert(out, expr.NCHW).read()) for out in module.forward([given])]

    return call, f"MNN {MNN.version()}"


def main(spec):  # type: ignore[no-untyped-def]
    import numpy as np

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from agent import peak_memory
    from protocol import steady

    start = time.perf_counter()
    call, runtime = (mnn_call if spec["model"].endswith(".mnn") else onnx_call)(spec)
    out: dict[str, Any] = {"runtime": runtime, "load": time.perf_counter() - start}
    if "input" in spec:
        np.savez(spec["outputs"], *call(np.load(spec["input"])))
        return out
    values = np.random.default_rng(spec["seed"]).standard_normal(spec["shape"]).astype(np.float32)
    start = time.perf_counter()
    call(values)
    out["first"] = time.perf_counter() - start
    out |= steady(lambda: call(values), spec["min_seconds"], spec["min_runs"])
    out["peak_rss"] = peak_memory()
    return out


if __name__ == "__main__":
    # MNN writes to standard output from C++: that goes to the error stream, the answer alone to the real one.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(main(json.load(sys.stdin)), answer)
    answer.flush()
