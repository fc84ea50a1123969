"""Names the first node of an ONNX graph behind which something built from it gives other values.

The graph is cut behind a node, the cut graph is built and run like the whole one, and a binary search over the nodes
before the wrong output finds one whose inputs still agree. Where both files are ONNX with the same tensors, all of them
are compared in one run instead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.exporters import formats, runtimes
from compress.exporters.formats import BuildOptions, Source
from compress.exporters.ort import Arrays
from compress.exporters.tensors import read, walk


def largest_difference(want: Any, got: Any) -> float:
    """The largest difference relative to the largest finite value of ``want``; inf for another shape, NaN stays NaN,
    and infinities that are the same (masks have some) do not differ."""
    if want.shape != got.shape:
        return float("inf")
    if not want.size:
        return 0.0
    one, other = want.astype(np.float64), got.astype(np.float64)
    scale = float(np.abs(one).max(where=np.isfinite(one), initial=0.0)) or 1.0
    difference = np.zeros(one.shape)
    np.subtract(one, other, out=difference, where=one != other)
    return float(np.abs(difference).max() / scale)


class _Whole:
    """An ONNX file in memory, weights and all, with its types, and what leads to what."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.path = path
        self.model = onnx.shape_inference.infer_shapes(read(path, weights=True))
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.made_by = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}

    def before(self, name: str) -> list[int]:
        """The nodes that the tensor ``name`` depends on, its own among them, in their order in the file."""
        found: set[int] = set()
        todo = [name]
        while todo:
            i = self.made_by.get(todo.pop())
            if i is not None and i not in found:
                found.add(i)
                todo += _reads(self.nodes[i])
        return sorted(found)

    def cut(self, name: str, target: Path) -> None:
        """Writes the graph that ends with the tensor ``name``."""
        import onnx

        kept = [self.nodes[i] for i in self.before(name)]
        used = {n for node in kept for n in _reads(node)}
        graph = self.model.graph
        output = onnx.helper.make_tensor_value_info(name, self.types.get(name, onnx.TensorProto.FLOAT), None)
        known = next((v for v in (*graph.output, *graph.value_info) if v.name == name), None)
        made = onnx.helper.make_graph(
            kept,
            "cut",
            [v for v in graph.input if v.name in used],
            [known if known is not None else output],
            [i for i in graph.initializer if i.name in used],
            sparse_initializer=[i for i in graph.sparse_initializer if i.values.name in used],
            value_info=[v for v in graph.value_info if v.name in {o for node in kept for o in node.output} - {name}],
        )
        model = onnx.helper.make_model(made, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        if len(self.model.functions):
            model.functions.extend(self.model.functions)
        _save(model, target)

    def floats(self) -> list[str]:
        """The float tensors that nodes make, in their order."""
        import onnx

        wanted = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        return [n for node in self.nodes for n in node.output if self.types.get(n) in wanted]

    def with_all(self, names: Sequence[str], target: Path) -> None:
        """Writes the graph with every tensor of ``names`` as an output."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        have = {v.name for v in model.graph.output}
        for name in names:
            if name not in have:
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, self.types[name], None))
        _save(model, target)

    def name_of(self, i: int) -> str:
        node = self.nodes[i]
        return f"the node {node.name or node.output[0]!r} ({node.op_type})"


def _reads(node: Any) -> list[str]:
    """What a node takes, and what the graphs that it holds take from around it (and from themselves)."""
    inner = [graph for a in node.attribute for graph in (*([a.g] if a.HasField("g") else []), *a.graphs)]
    return [n for n in node.input if n] + [n for graph in inner for one in graph.node for n in _reads(one)]


def _save(model: Any, target: Path) -> None:
    """A large model with its weights beside it: protobuf holds 2 GiB."""
    import onnx

    large = sum(len(held.tensor.raw_data) for held in walk(model)) > 1 << 30
    onnx.save(model, target, save_as_external_data=large)


def tensors(path: Path, feed: Arrays) -> Arrays:
    """Every float tensor that the nodes of an ONNX file make, by name."""
    whole = _Whole(path)
    with tempfile.TemporaryDirectory() as beside:
        target = Path(beside) / "all.onnx"
        whole.with_all(whole.floats(), target)
        return runtimes.load("onnx", str(target), optimisation="none").run(feed)


def between_onnx(before: Path, after: Path, feed: Arrays, tolerance: float) -> str:
    """Names the first node of ``before`` whose output has another value in ``after``, by the tensors both have."""
    want, got = tensors(before, feed), tensors(after, feed)
    whole = _Whole(before)
    for i, node in enumerate(whole.nodes):
        for name in node.output:
            if name in want and name in got and not largest_difference(want[name], got[name]) <= tolerance:
                return f"first at {whole.name_of(i)}, by {largest_difference(want[name], got[name]):.2e}"
    return "no tensor that both files have differs"


def first_node(path: Path, output: str, feed: Arrays, tolerance: float, run: Callable[[Path, Arrays], Any]) -> str:
    """Names the node behind which ``run`` gives other values than ONNX Runtime, among those before ``output``.

    Args:
        run: builds an ONNX file with one output, runs it on the inputs that it has, and returns the output.
    """
    whole = _Whole(path)
    want = tensors(path, feed)
    chain = [i for i in whole.before(output) if any(n in want for n in whole.nodes[i].output)]
    seen: dict[int, bool] = {}

    def differs(i: int) -> bool:
        if i not in seen:
            name = next(n for n in whole.nodes[i].output if n in want)
            with tempfile.TemporaryDirectory() as beside:
                target = Path(beside) / "cut.onnx"
                whole.cut(name, target)
                asked = {p.name for p in formats.read_graph(target).inputs}
                if not asked:
                    return seen.setdefault(i, False)  # a constant
                got = run(target, {k: v for k, v in feed.items() if k in asked})
                seen[i] = not largest_difference(want[name], got) <= tolerance
        return seen[i]

    try:
        if not chain or not differs(chain[-1]):
            return "the graph up to this output agrees when it stands alone"
        low, high = -1, len(chain) - 1  # chain[high] differs, chain[low] agrees
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if differs(chain[middle]) else (middle, high)
        # In a graph with branches the node before it in the file need not be the one that feeds it.
        at = chain[high]
        while True:
            feeding = [whole.made_by[n] for n in whole.nodes[at].input if n in whole.made_by and n in want]
            wrong = [i for i in sorted(feeding) if differs(i)]
            if not wrong:
                break
            at = wrong[0]
    except CompressError as e:
        return f"which node cannot be told: a part of the graph is refused ({e.what})"
    return f"first at {whole.name_of(at)}, whose inputs agree"


def first_built(
    source: Path, component: str, output: str, feed: Arrays, tolerance: float, options: BuildOptions
) -> str:
    """`first_node` for a format that is made of ONNX."""
    module: Any = formats.module_of(formats.FORMATS[options.format])
    axes = formats.profiles_of(options, component, formats.read_graph(source))

    def run(cut: Path, given: Arrays) -> Any:
        known = {a for p in formats.read_graph(cut).inputs for a in p.shape if isinstance(a, str)}
        profiles = {"model": [{a: s for a, s in one.items() if a in known} for one in axes]}
        changed = replace(options, profiles=profiles)
        with tempfile.TemporaryDirectory() as beside:
            made = Source(cut, calibration={"model": [given]})
            module.build(made, Path(beside), changed)
            return next(iter(module.load(Path(beside), "model", changed).run(given).values()))

    return first_node(source, output, feed, tolerance, run)
