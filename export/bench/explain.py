"""Why a pruned network is not as much faster as it has less to do: named layer by layer, from two profiles.

ONNX Runtime tells the time of every node; the ONNX file tells how much work each is. A layer that did as much work a
second as before takes ``dense time x pruned work / dense work``; what it takes above that is missing from the speed-up,
and falls to one of four causes, each told from the layer's own numbers:

- *alignment*: kernels compute channels in blocks; 12 channels in blocks of 8 cost as much as 16;
- *overhead*: starting a node costs the same whatever it does, and the node does too little by now;
- *memory*: too few FLOPs per byte moved, so that its time follows the bytes, which fell by less;
- *kernel*: none of these; the runtime chose or tuned another kernel for the new shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from compress.exporters.bench.local import brought
from compress.exporters.bench.transport import Transport, answered, artefact
from compress.exporters.tensors import read
from compress.report.explained import MATTERS, OVERHEAD_SECONDS, lines, said_of
from compress.report.stats import FEWEST, paired_ratio

BLOCKS = (1, 4, 8, 16, 32)  # channels a kernel computes at a time: a NEON, AVX2, AVX-512 register of float32, or two
CALLS, FEW_CALLS = 30, 6  # of a model in all its processes, and of one at least
ITEMSIZE = {
    "float": 4,
    "float16": 2,
    "bfloat16": 2,
    "double": 8,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
COMPUTE = ("Conv", "Gemm", "MatMul", "ConvTranspose")


@dataclass(frozen=True)
class Layer:
    """One node of the network as it was written, and what became of it in the runtime.

    ``seconds`` a call; ``flops`` 0 where it only moves values; ``bytes`` read and written; ``channels`` that go in and
    come out (a product's or convolution's; ``groups`` of a convolution). ``rounds``: the seconds of each process that
    they are the median of; none where there was one.
    """

    name: str
    op: str
    seconds: float
    flops: int
    bytes: int
    channels: tuple[int, int] | None = None
    groups: int = 1
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A layer whose time fell by less than its work, in every round. ``missing``: seconds above the ideal."""

    name: str
    dense_seconds: float
    pruned_seconds: float
    ideal_seconds: float
    missing: float
    cause: str
    words: str
    fix: str


def profile(
    where: Path, spec: Mapping[str, Any], transport: Transport, calls: int = CALLS
) -> dict[str, dict[str, Any]]:
    """ONNX Runtime's profile of every part (``model``, or ``prefill`` and ``decode``), each in a process of its own.

    Raises:
        CompressError: there is no ONNX or .ort file, or it cannot be run.
    """
    made = artefact(where, spec.get("format"))
    there = transport.push(made.files)
    found = {}
    for part, file in made.parts.items():
        request = {
            "do": "profile",
            "format": made.format,
            "files": {"model": there[file.name]},
            "folder": transport.room(),
            "calls": calls,
            "seed": 0,
            **{k: spec[k] for k in ("threads", "options", "batch", "shapes") if k in spec},
        }
        if spec.get("inputs"):
            request["inputs"] = brought(Path(spec["inputs"]), transport)
        if part != "model":
            request["shapes"] = _llm_shapes(artefact(where, "onnx").parts[part], part, spec)
        found[part] = answered(transport.run(request), transport.title)
    return found


def _llm_shapes(graph: Path, part: str, spec: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of every input for one prompt, or for one token behind a cache."""
    inputs = read(graph).graph.input
    now, before = (spec["prompt"], 0) if part == "prefill" else (1, spec["context"])
    shapes = {}
    for value in inputs:
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.name.startswith("past_key_values."):
            shapes[value.name] = [1, sizes[1], before, sizes[3]]
        else:
            shapes[value.name] = [1, before + now if value.name == "attention_mask" else now]
    return shapes


def layers(found: Mapping[str, Any], graph: Path) -> list[Layer]:
    """The nodes of a profile, under the names and with the work they have in the ONNX file, in their order."""
    known, shapes, groups = _written(graph)
    rows: dict[str, dict[str, Any]] = {}
    for name, node in found["nodes"].items():
        written = known.get(_plain(name))
        key = written or (re.sub(r"_?\d+$", "", name) if node["op"].startswith("Reorder") else name)
        row = rows.setdefault(
            key, {"op": node["op"], "seconds": 0.0, "flops": 0, "bytes": 0, "channels": None, "groups": 1}
        )
        row["seconds"] += node["seconds"]
        sizes = [ITEMSIZE.get(t, 4) for t in node["types"]]
        moved = zip(node["inputs"], sizes, strict=False)
        row["bytes"] += (
            sum(math.prod(s) * b for s, b in moved) + sum(math.prod(s) for s in node["outputs"]) * (sizes or [4])[0]
        )
        if not any(op in node["op"] for op in COMPUTE) or not node["outputs"]:
            continue
        out = node["outputs"][0]
        if "Conv" in node["op"]:
            weight = shapes.get(key) or node["inputs"][1]  # (out, in / groups, k, k)
            group = groups.get(key, 1)
            row["channels"], row["groups"] = (weight[1] * group, weight[0]), group
            row["flops"] += 2 * math.prod(weight) * out[0] * math.prod(out[2:])
        else:
            inner = (shapes.get(key) or node["inputs"][0])[0 if key in shapes else -1]
            row["flops"] += 2 * math.prod(out) * inner
            row["channels"] = (inner, out[-1])
    return [Layer(name=name, **row) for name, row in rows.items()]


def _plain(name: str) -> str:
    """A node's name without what ONNX Runtime's optimisers add."""
    return re.sub(r"(_nchwc|_token_\d+|_quant|/MatMulScaleFusion/?)$", "", name.removeprefix("fused "))


def _written(graph: Path) -> tuple[dict[str, str], dict[str, list[int]], dict[str, int]]:
    """(name of a node or of what it gives -> the layer it belongs to, weights' shapes, groups) of an ONNX file.

    An activation or a sum that stands alone behind a layer is part of it: that is how runtimes fuse them.
    """
    model = read(graph).graph
    weights = {i.name: list(i.dims) for i in model.initializer}
    readers: dict[str, int] = {}
    for node in model.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    known: dict[str, str] = {}
    shapes: dict[str, list[int]] = {}
    groups: dict[str, int] = {}
    owner: dict[str, str] = {}
    for node in model.node:
        name = node.name or node.output[0]
        before = [owner[i] for i in node.input if i in owner and readers[i] == 1]
        if (
            node.op_type in ("Relu", "Clip", "Add", "BatchNormalization", "HardSigmoid", "LeakyRelu", "Sigmoid")
            and before
        ):
            name = before[-1]
        if node.op_type in COMPUTE:
            held = [weights[i] for i in node.input[1:2] if i in weights]
            if held:
                shapes[name] = held[0]
                attributes = {a.name: a for a in node.attribute}
                groups[name] = attributes["group"].i if "group" in attributes else 1
                if node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i:
                    shapes[name] = held[0][::-1]
        for out in node.output:
            known[out] = owner[out] = name
        if node.name:
            known[node.name] = name
    return known, shapes, groups


def explain(dense: Sequence[Layer], pruned: Sequence[Layer], *, block: int | None = None) -> dict[str, Any]:
    """Which layers keep the pruned network from the speed-up that its FLOPs promise, and why.

    Args:
        block: channels that the target's kernels compute at a time; by default the one of `BLOCKS` that tells the
            times of the pruned layers best.

    Returns:
        ``ideal``, ``ideal_bytes`` and ``measured`` speed-up (by FLOPs; by bytes moved; by the sum over nodes) with its
        ``ratio`` over the rounds (None without), ``findings`` (worst first), ``layers`` for a plot, and ``block``. What
        is said of it is `lines`.
    """
    after = {layer.name: layer for layer in pruned}
    pairs = [(d, after[d.name]) for d in dense if d.name in after]
    totals = [sum(layer.seconds for layer in side) for side in (dense, pruned)]
    flops, moved = ([sum(getattr(layer, k) for layer in side) for side in (dense, pruned)] for k in ("flops", "bytes"))
    fastest = max(
        (x.flops / x.seconds for x in (*dense, *pruned) if x.flops and x.seconds > OVERHEAD_SECONDS), default=0.0
    )
    widest = max((x.bytes / x.seconds for x in (*dense, *pruned) if x.seconds > OVERHEAD_SECONDS), default=math.inf)
    block = block or fitted_block(pairs)
    findings = []
    for d, p in pairs:
        share = p.flops / d.flops if d.flops else p.bytes / max(d.bytes, 1)
        ideal = d.seconds * min(share, 1.0)
        missing = p.seconds - ideal
        always = all(after > before * min(share, 1.0) for before, after in zip(d.rounds, p.rounds, strict=True))
        if missing > MATTERS * totals[1] and always:
            cause, words, fix = _cause(d, p, ideal, block, fastest / widest)
            findings.append(Finding(d.name, d.seconds, p.seconds, ideal, missing, cause, words, fix))
    findings.sort(key=lambda f: -f.missing)
    new = [layer for layer in pruned if layer.name not in {d.name for d in dense}]
    extra = sum(layer.seconds for layer in new)
    found: dict[str, Any] = {
        "ideal": flops[0] / flops[1] if flops[1] else 1.0,
        "ideal_bytes": moved[0] / moved[1] if moved[1] else 1.0,
        "measured": totals[0] / totals[1],
        "ratio": _over_rounds(dense, pruned),
        "block": block,
        "dense_seconds": totals[0],
        "pruned_seconds": totals[1],
        "findings": [asdict(f) for f in findings],
        "added": [layer.name for layer in new],
        "added_seconds": extra,
        "layers": [
            {"name": d.name, "op": d.op, "dense_seconds": d.seconds, "pruned_seconds": p.seconds,
             "dense_flops": d.flops, "pruned_flops": p.flops}
            for d, p in pairs
        ],
    }  # fmt: skip
    small = [layer for layer in pruned if layer.seconds < OVERHEAD_SECONDS]
    found["small"] = {"nodes": len(small), "of": len(pruned), "share": sum(x.seconds for x in small) / totals[1]}
    found["reached"] = found["measured"] / found["ideal"]
    return found


def _over_rounds(dense: Sequence[Layer], pruned: Sequence[Layer]) -> dict[str, Any] | None:
    """The speed-up by the sums over nodes, a pair a round."""
    totals = [[sum(times) for times in zip(*(layer.rounds for layer in side), strict=True)] for side in (dense, pruned)]
    return paired_ratio(totals[0], totals[1]) if totals[0] and totals[1] else None


def fitted_block(pairs: Sequence[tuple[Layer, Layer]]) -> int:
    """The channels at a time that tell the pruned layers' times from the dense ones' with the least error."""
    told = [
        (d, p) for d, p in pairs if d.channels is not None and p.channels is not None and d.seconds > OVERHEAD_SECONDS
    ]
    return min(BLOCKS, key=lambda b: sum(abs(d.seconds * _padded(d, p, b) - p.seconds) for d, p in told))


def _padded(d: Layer, p: Layer, block: int) -> float:
    """The pruned layer's work relative to the dense one's, channels rounded up to whole blocks."""
    assert d.channels is not None and p.channels is not None
    blocks = [math.ceil(a / block) / math.ceil(b / block) for a, b in zip(p.channels, d.channels, strict=True)]
    return blocks[1] if p.groups > 1 else math.prod(blocks)  # grouped: what goes in and comes out is one channel


def _cause(d: Layer, p: Layer, ideal: float, block: int, balance: float) -> tuple[str, str, str]:
    """(cause, what is seen, what to change)."""
    batch = "measure a larger batch if that is how it is used; remove whole layers rather than channels of this one"
    if p.seconds < OVERHEAD_SECONDS:
        return ("overhead", f"takes {1e6 * p.seconds:.0f} us, most of it for being started at all", batch)
    if p.channels is not None and d.channels is not None and d.flops:
        ragged = [n for n, before in zip(p.channels, d.channels, strict=True) if n % block and n != before]
        if ragged and d.seconds * _padded(d, p, block) - ideal > 0.5 * (p.seconds - ideal):
            where = " and ".join(
                f"{n} channels cost as much as {block * math.ceil(n / block)}" for n in dict.fromkeys(ragged)
            )
            return ("alignment", f"{where} (kernels compute {block} at a time here)", f"prune with round_to: {block}")
    if d.bytes and p.flops / max(p.bytes, 1) < balance:
        by_bytes, share = d.seconds * p.bytes / d.bytes, p.flops / max(d.flops, 1)
        if by_bytes > ideal and p.seconds - by_bytes < 0.5 * (p.seconds - ideal):
            return (
                "memory",
                f"does {p.flops / max(p.bytes, 1):.1f} FLOPs a byte, so its time follows the bytes"
                f" ({100 * p.bytes / d.bytes:.0f} % of before), not the FLOPs ({100 * share:.0f} %)",
                "a target with more bandwidth, int8, or pruning of the layers before it, whose outputs it moves",
            )
        if not d.flops:
            return ("memory", "moves values and computes nothing", "prune the layers before it, whose outputs it moves")
    rate = (p.flops / p.seconds) / (d.flops / d.seconds) if d.flops and p.flops else 0.0
    return (
        "kernel",
        f"does {100 * rate:.0f} % of the FLOPs a second it did; neither alignment nor bytes nor overhead tells why",
        f"try round_to: {max(16, 2 * block)}, or another target: the runtime's kernel for this shape is slower",
    )


def why(
    dense: Path,
    pruned: Path,
    spec: Mapping[str, Any],
    transport: Transport,
    *,
    block: int | None = None,
    calls: int = CALLS,
) -> dict[str, dict[str, Any]]:
    """Profiles two models on the device and explains the speed-up of every part; see `explain` and `profile`.

    As many times each as a bench measures them (``spec["processes"]``), in turn, for the spread; the ``calls`` are
    shared out.
    """
    rounds = spec.get("processes", FEWEST)
    each = max(FEW_CALLS, math.ceil(calls / rounds))
    found: list[list[dict[str, list[Layer]]]] = [[], []]
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            where = (dense, pruned)[side]
            graphs = artefact(where, "onnx").parts
            profiles = profile(where, spec, transport, each)
            found[side].append({part: layers(p, graphs[part]) for part, p in profiles.items()})
    parts = [{part: over_rounds([one[part] for one in side]) for part in side[0]} for side in found]
    return {part: explain(rows, parts[1][part], block=block) for part, rows in parts[0].items()}


def over_rounds(rounds: Sequence[Sequence[Layer]]) -> list[Layer]:
    """The layers of several profiles of one model as one: median seconds, and those of each."""
    times = [{layer.name: layer.seconds for layer in one} for one in rounds]
    merged = []
    for layer in rounds[0]:
        of = tuple(one.get(layer.name, 0.0) for one in times)
        merged.append(replace(layer, seconds=median(of), rounds=of))
    return merged


__all__ = ["Finding", "Layer", "explain", "layers", "lines", "over_rounds", "profile", "said_of", "why"]
