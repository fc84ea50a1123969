"""Measures, runs or looks at one exported artefact; runs alone, in a process of its own, on the device.

`compress.exporters.bench.packed` puts it and the files it imports (`FILES` there) into one that needs
Python 3.9, numpy and the runtime. It reads a JSON object from standard input (or from the file named as its
argument) and writes one to standard output. What fails for a reason the user can mend is
``{"error": {"what", "fix"}}``.

``do``:

- ``look``: what the device is and whether ``format``'s runtime is there.
- ``measure``: figures of ``files`` (``model``, ``prefill`` and ``decode``, or ``genai``). ``format``, ``threads``,
  ``options`` (of `runtimes.load`), ``min_seconds``, ``min_runs``, ``sample_seconds``, ``seed``; of a network ``batch``
  and ``shapes`` (axes that the file leaves open, by input), or ``inputs`` (path of an .npz by input names); of a
  language model ``prompts`` and ``contexts`` (tokens) and ``vocab``.
  Every figure has ``load``, ``first`` and the steady ``samples``, in seconds.
- ``run``: ``input`` (path of an .npz by input names, or an .npy for the only one) -> ``outputs`` (path for an .npz).
- ``profile``: time per node, ONNX Runtime alone: ``calls`` inferences under its profiler.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]
clock = time.perf_counter


def look(request: Request) -> dict[str, Any]:
    import environment
    import runtimes

    found: dict[str, Any] = {"device": environment.fixed(), "state": environment.state()}
    found["free_disk"] = environment.free_disk(request["folder"])
    found["meters"] = sorted(environment.meters())
    try:
        found["runtime"] = runtimes.available(request["format"])
    except runtimes.Missing as e:
        found["missing"] = {"what": e.what, "fix": e.fix}
    return found


def timed(
    request: Request, call: Callable[[], Any], load: float, device: Any = None, watch: Callable[[], float] = clock
) -> dict[str, Any]:
    """One figure: the phases apart, and the power while it was steady where the platform tells it."""
    import environment
    import protocol

    start = watch()
    call()
    first = watch() - start
    before, start = environment.meters(), clock()
    found = protocol.steady(
        call,
        request["min_seconds"],
        request["min_runs"],
        clock=watch,
        sample_seconds=request.get("sample_seconds", protocol.SAMPLE_SECONDS),
        device=device,
    )
    power = environment.watts(before, environment.meters(), clock() - start)
    return {"load": load, "first": first, **found, **({"watts": power} if power else {})}


def _load(request: Request, part: str = "model") -> tuple[Any, float]:
    import runtimes

    runtimes.available(request["format"])  # importing the library is no part of loading a model
    if request["format"] == "executorch":
        with contextlib.suppress(ImportError):  # what is missing is told when the file is loaded
            importlib.import_module("executorch.runtime")
    options = dict(request.get("options", {}))
    if request["format"] == "executorch" and part != "model":
        options["method"] = part  # both lie in one file
    start = clock()
    runner = runtimes.load(request["format"], request["files"][part], request["threads"], **options)
    return runner, clock() - start


def _given(runner: Any, path: str) -> dict[str, Any]:
    """The arrays of an .npz file, in the types that this runtime takes them in."""
    import numpy as np
    import runtimes

    with np.load(path, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    feed = {}
    for value in runner.inputs:
        if value.name not in arrays:
            raise runtimes.CannotRun(f"there is no array for the input {value.name}; there is: {', '.join(arrays)}")
        array = arrays[value.name]
        feed[value.name] = array.astype(value.dtype)
        whole = array.dtype.kind in "iu"
        if array.dtype.kind != feed[value.name].dtype.kind or (whole and (feed[value.name] != array).any()):
            raise runtimes.CannotRun(f"the input {value.name} is {value.dtype} here, which does not hold its array")
    return feed


def _feed(runner: Any, request: Request) -> dict[str, Any]:
    """The inputs that the request names, or random values for every input; an axis that the file leaves open is as the
    request says, the first the batch."""
    import numpy as np
    import runtimes

    if request.get("inputs"):
        return _given(runner, request["inputs"])
    rng = np.random.default_rng(request["seed"])
    given = request.get("shapes") or {}
    feed = {}
    for value in runner.inputs:
        shape = list(given.get(value.name) or value.shape)
        if shape and shape[0] is None:
            shape[0] = request.get("batch", 1)
        if any(n is None for n in shape):
            raise runtimes.CannotRun(
                f"the input {value.name} has open axes {tuple(value.shape)}: give its shape (shapes.{value.name})"
                " or an array (--inputs)"
            )
        kind = np.dtype(value.dtype)
        try:
            if kind.kind == "f":
                feed[value.name] = rng.standard_normal(shape).astype(kind)
            else:
                most = (request.get("rows") or {}).get(value.name, 2)  # the places of the table it is looked up in
                feed[value.name] = rng.integers(0, most, shape).astype(kind)
        except MemoryError:
            shown = "x".join(map(str, shape))
            raise runtimes.CannotRun(f"there is no memory for the input {value.name} of {shown}") from None
    return feed


def measure_network(request: Request) -> dict[str, Any]:
    runner, load = _load(request)
    feed = _feed(runner, request)
    figure = timed(request, runner.prepare(feed), load, runner.device_seconds)
    return {
        "figures": {"latency": figure},
        "runtime": runner.version,
        "transfers": runner.device_seconds is None,  # with a device's own memory, inputs are placed once
        "shapes": {name: list(array.shape) for name, array in feed.items()},
    }


def measure_llm(request: Request) -> dict[str, Any]:
    """TTFT over prompts and TPOT over contexts; prefill is released before decode is loaded."""
    import environment
    import numpy as np

    rng = np.random.default_rng(request["seed"])

    def feed(runner: Any, count: int, total: int, past: dict[str, Any]) -> dict[str, Any]:
        given = {
            "input_ids": rng.integers(0, request["vocab"], (1, count)),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - count, total)[None],
            **past,
        }
        return {v.name: given[v.name].astype(v.dtype, copy=False) for v in runner.inputs if v.name in given}

    def past_of(runner: Any, context: int) -> dict[str, Any]:
        """A cache of random values, where prefill is fixed at another length: the time does not depend on them."""
        shapes = {v.name: list(v.shape) for v in runner.inputs if v.name.startswith("past_key_values.")}
        for shape in shapes.values():
            shape[0], shape[2] = shape[0] or 1, shape[2] or context
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def token(runner: Any, call: Callable[[], Any]) -> Callable[[], Any]:
        """What a user waits for: the whole call, the token's choice included."""
        at = [v.name for v in runner.outputs].index("logits")

        def choose() -> Any:
            logits = call()[at]
            return (logits.fetch() if hasattr(logits, "fetch") else logits)[0, -1].argmax()

        return choose

    grid: dict[str, list[dict[str, Any]]] = {"ttft": [], "tpot": []}
    runner, load = _load(request, "prefill")
    version = runner.version
    for prompt in request["prompts"]:
        call = token(runner, runner.prepare(feed(runner, prompt, prompt, {})))
        grid["ttft"].append({"prompt": prompt, **timed(request, call, load, runner.device_seconds)})
    caches: dict[int, Any] = dict.fromkeys(request["contexts"])
    length = next(v.shape[1] for v in runner.inputs if v.name == "input_ids")
    for context in caches:
        if length in (None, context):
            found = runner.run(feed(runner, context, context, {}))
            caches[context] = {"past_key_values." + k[len("present.") :]: v for k, v in found.items() if k != "logits"}
            del found
    prefill_peak = environment.host.peak_memory()
    del call, runner
    gc.collect()
    runner, load = _load(request, "decode")
    for context, past in caches.items():
        past = past or past_of(runner, context)
        call = token(runner, runner.prepare(feed(runner, 1, context + 1, past)))
        grid["tpot"].append({"context": context, **timed(request, call, load, runner.device_seconds)})
    return {
        "figures": {name: rows[0] for name, rows in grid.items()},
        "grid": grid,
        "runtime": version,
        "prefill_peak_rss": prefill_peak,
    }


# Tokens that the cache grows by before it is filled anew: GenAI 0.18 cannot cut back the cache of layers that differ.
AHEAD = 64


def measure_genai(request: Request) -> dict[str, Any]:
    """TTFT over prompts and TPOT over contexts in ONNX Runtime GenAI, its own loop around them: a fresh generator that
    takes the prompt and gives a token; one with the context in its cache that gives the next, up to `AHEAD` behind."""
    import numpy as np
    import runtimes

    runner, load = _load(request, "genai")
    og = importlib.import_module("onnxruntime_genai")
    vocab = runner.outputs[0].shape[2]
    rng = np.random.default_rng(request["seed"])

    def begun(ids: Any) -> Any:
        parameters = og.GeneratorParams(runner.native)
        most = len(ids) + AHEAD + 2
        parameters.set_search_options(do_sample=False, max_length=most, min_length=most)  # no token ends it
        generator = og.Generator(runner.native, parameters)
        generator.append_tokens(ids)
        return generator

    def drawn(count: int) -> Any:
        return rng.integers(0, vocab, count).astype(np.int32)

    def first(ids: Any) -> Callable[[], Any]:
        def call() -> Any:
            generator = begun(ids)
            generator.generate_next_token()
            return generator.get_next_tokens()[0]

        return call

    def following(ids: Any) -> tuple[Callable[[], Any], Callable[[], float]]:
        """Gives the next token; and a clock that stands still while the cache is filled anew."""
        generator: Any = None
        ahead, spent = AHEAD, 0.0

        def call() -> Any:
            nonlocal generator, ahead, spent
            if ahead == AHEAD:
                start = clock()
                generator, ahead = begun(ids), 0
                generator.generate_next_token()  # of the prompt's own logits: no step is run for it
                spent += clock() - start
            generator.generate_next_token()
            ahead += 1
            return generator.get_next_tokens()[0]

        return call, lambda: clock() - spent

    grid: dict[str, list[dict[str, Any]]] = {"ttft": [], "tpot": []}
    try:
        for prompt in request["prompts"]:
            grid["ttft"].append({"prompt": prompt, **timed(request, first(drawn(prompt)), load)})
        for context in request["contexts"]:
            call, watch = following(drawn(context))
            grid["tpot"].append({"context": context, **timed(request, call, load, watch=watch)})
    except RuntimeError as e:
        raise runtimes.CannotRun(f"{runner.version} cannot run the folder: {str(e).splitlines()[0][:300]}") from e
    return {"figures": {name: rows[0] for name, rows in grid.items()}, "grid": grid, "runtime": runner.version}


def measure(request: Request) -> dict[str, Any]:
    import environment

    start = environment.state()
    way = {"prefill": measure_llm, "genai": measure_genai}
    found = way.get(next(iter(request["files"])), measure_network)(request)
    found["peak_rss"] = environment.host.peak_memory()
    found["environment"] = {**environment.fixed(), "threads": request["threads"], "start": start}
    found["environment"]["end"] = environment.state()
    found["emulated"] = found["environment"]["emulated"]
    return found


def run(request: Request) -> dict[str, Any]:
    import numpy as np

    runner, load = _load(request)
    held = np.load(request["input"])
    feed = {runner.inputs[0].name: held} if isinstance(held, np.ndarray) else {k: held[k] for k in held.files}
    found = runner.run(feed)
    with open(request["outputs"], "wb") as file:
        np.savez(file, **found)
    return {"load": load, "runtime": runner.version, "outputs": [v.name for v in runner.outputs]}


def profile(request: Request) -> dict[str, Any]:
    """ONNX Runtime's own profile, one row a node: seconds a call, operator, shapes."""
    prefix = os.path.join(request["folder"], f"profile-{os.getpid()}")
    runner, _ = _load({**request, "options": {**request.get("options", {}), "profile": prefix}})
    call = runner.prepare(_feed(runner, request))
    for _ in range(request["calls"]):
        call()
    written = runner.native.end_profiling()
    try:
        with open(written, encoding="utf-8") as file:
            events = json.load(file)
    finally:
        os.remove(written)
    nodes: dict[str, dict[str, Any]] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        name = name[: -len("_kernel_time")]
        said = event["args"]
        node = nodes.setdefault(
            name,
            {
                "op": said.get("op_name"),
                "inputs": [next(iter(t.values())) for t in said.get("input_type_shape", [])],
                "outputs": [next(iter(t.values())) for t in said.get("output_type_shape", [])],
                "types": [next(iter(t)) for t in said.get("input_type_shape", [])],
                "seconds": [],
            },
        )
        node["seconds"].append(event["dur"] / 1e6)
    for node in nodes.values():
        # The clock ticks in microseconds: the mean of the faster half is finer than any one reading, and free of what
        # else the machine did.
        half = sorted(node["seconds"])[: (len(node["seconds"]) + 1) // 2]
        node["seconds"] = sum(half) / len(half)
    return {"runtime": runner.version, "calls": request["calls"], "nodes": nodes}


DO = {"look": look, "measure": measure, "run": run, "profile": profile}


def answer(request: Request) -> dict[str, Any]:
    import runtimes

    try:
        return DO[request["do"]](request)
    except runtimes.Missing as e:
        return {"error": {"what": e.what, "fix": f"on the device: {e.fix}", "kind": "missing"}}
    except runtimes.CannotRun as e:
        return {"error": {"what": str(e), "fix": "export it again for this target", "kind": "cannot run"}}


def main() -> None:
    # Runtimes write to standard output from C++: that goes to the error stream, the answer alone to the real one.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with open(sys.argv[1], encoding="utf-8") if len(sys.argv) > 1 else sys.stdin as file:
        request = json.load(file)
    json.dump(answer(request), out)
    out.flush()


if __name__ == "__main__":
    main()
