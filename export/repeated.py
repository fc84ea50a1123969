"""A decoder is traced with one block of each kind, and the graph gets copies of its nodes for the others.

Tracing takes seconds a block, whatever its size, and the blocks of a decoder differ in their weights, or in a width
that no constant of their graph speaks of. So a model is traced with every further block of a kind passed over, and the
nodes between a block's input and its output are copied in the graph for each of those, over their own weights and
caches. It is asked of the graph and of one pass of the whole model, not of an architecture: where blocks are called
with other things, share weights, or hand on more than one hidden state, each is a kind of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.models.decoder import blocks, prefix

PLAIN = (bool, int, float, str, type(None), torch.dtype)
MINE = ("layer_idx", "training", "_is_hf_initialized")  # what differs between blocks and is in no graph

Pairs = frozenset[tuple[int, int]]


class _Facts(NamedTuple):
    """What a block's graph follows from, its weights aside: values by name, and (name, shape, type) of every tensor."""

    values: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    called: Any


def kinds(model: Any, run: Callable[[], object], caches: dict[int, Any], widths: bool) -> list[int]:
    """For every block the first block whose graph it shares.

    Args:
        run: runs the whole model once.
        caches: layer -> what is known of its cache's shape.
        widths: blocks that differ in one width are of one kind: to be held against the graph by `speaks_of`.
    """
    stack = blocks(model)
    alone = list(range(len(stack)))
    calls = _calls(stack, run)
    if calls is None or _share(model, stack):
        return alone
    facts = [_facts(block, call) for block, call in zip(stack, calls, strict=True)]
    found: list[int] = []
    for i, fact in enumerate(facts):
        alike = (j for j in sorted(set(found)) if caches.get(j) == caches.get(i) and _match(facts[j], fact, widths))
        found.append(next(alike, i))
    return found


def widths_of(model: Any, kind: Sequence[int]) -> set[int]:
    """Every number that a block's tensors have in the place of another of its kind."""
    facts = [_facts(block, None) for block in blocks(model)]
    return {a for i, j in enumerate(kind) for a, _ in _differ(facts[j], facts[i]) or ()}


def _calls(stack: nn.ModuleList, run: Callable[[], object]) -> list[Any] | None:
    """What each block was called with beside the hidden states, tensors as numbers in order of their first use; None
    where the blocks are not one chain of hidden states, each called once."""
    seen: dict[int, int] = {}
    kept: list[Any] = []  # held, so that no tensor takes the place of another
    calls: list[tuple[int, Any, Any]] = []
    gave: list[Any] = []

    def note(value: Any) -> Any:
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, list | tuple):
            return [note(item) for item in value]
        if isinstance(value, dict):
            return {key: note(item) for key, item in value.items()}
        kept.append(value)
        return ("object", seen.setdefault(id(value), len(seen)))

    with ExitStack() as hooks:
        for i, block in enumerate(stack):

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i) -> None:
                hidden = hidden_of(args, kwargs)
                rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                calls.append((i, hidden, note([args[1:], rest])))

            def behind(_: nn.Module, __: tuple[Any, ...], out: Any) -> None:
                gave.append(out)

            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(behind).remove)
        run()
    chain = [i for i, *_ in calls] == list(range(len(stack))) and all(isinstance(out, Tensor) for out in gave)
    if not chain or any(hidden is not out for (_, hidden, _), out in zip(calls[1:], gave, strict=False)):
        return None
    return [call for *_, call in calls]


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs.get("hidden_states")


def _share(model: Any, stack: nn.ModuleList) -> bool:
    """Whether a tensor of a block is another block's too, or is used outside."""
    named = model.named_parameters(remove_duplicate=False)
    all_of = [id(p) for _, p in named] + [id(b) for _, b in model.named_buffers(remove_duplicate=False)]
    mine = [id(t) for block in stack for t in (*block.parameters(), *block.buffers())]
    return any(all_of.count(one) > 1 for one in mine)


def _facts(block: nn.Module, called: Any) -> _Facts:
    values: dict[str, Any] = {}
    for name, module in block.named_modules():
        values[f"{name} is"] = type(module)
        for key, value in vars(module).items():
            if key not in MINE and not key.startswith("__"):
                values |= _plain(f"{name}.{key}", value)
    tensors = {
        name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
    }
    return _Facts(values, tensors, called)


def _plain(name: str, value: Any) -> dict[str, Any]:
    """What can be compared of a module's attribute; of a configuration its own values."""
    if isinstance(value, PLAIN):
        return {name: value}
    if isinstance(value, list | tuple) and all(isinstance(v, PLAIN) for v in value):
        return {name: tuple(value)}
    if hasattr(value, "to_diff_dict"):  # a configuration of transformers
        return {f"{name}.{k}": v for k, v in vars(value).items() if isinstance(v, PLAIN) and k not in MINE}
    return {}


def _match(a: _Facts, b: _Facts, widths: bool) -> bool:
    pairs = _differ(a, b)
    return a.called == b.called and pairs is not None and (not pairs or (widths and _one_width(pairs)))


def _differ(a: _Facts, b: _Facts) -> Pairs | None:
    """The sizes in which the tensors differ; None where something else does."""
    if a.tensors.keys() != b.tensors.keys() or a.values.keys() != b.values.keys():
        return None
    pairs: set[tuple[int, int]] = set()
    for name, (shape, dtype) in a.tensors.items():
        other, other_dtype = b.tensors[name]
        if dtype != other_dtype or len(shape) != len(other):
            return None
        pairs.update((x, y) for x, y in zip(shape, other, strict=True) if x != y)
    for name, value in a.values.items():
        if value != b.values[name] and (value, b.values[name]) not in pairs:
            return None
    return frozenset(pairs)


def _one_width(pairs: Pairs) -> bool:
    """Whether all are one width, or whole multiples of one (gate and up as one matrix)."""
    x, y = min(pairs)
    return all(a * y == b * x for a, b in pairs)


class _Passed(nn.Module):
    """Stands in the place of a block and hands its hidden states on; anything else it answers as the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no module of this one: its weights are not of the graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return hidden_of(args, kwargs)


@contextmanager
def one_of_each(model: Any, kind: Sequence[int]) -> Iterator[list[Any]]:
    """While it is open, every block that is not the first of its kind is passed over; gives the list that holds, after
    each run, the hidden states before each block that is run, and behind the last."""
    stack = blocks(model)
    dense = list(stack)
    hidden: list[Any] = []
    with ExitStack() as back:
        for i, j in enumerate(kind):
            if i != j:
                stack[i] = _Passed(dense[i])
                back.callback(stack.__setitem__, i, dense[i])
        first, last = min(kind), max(kind)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(hidden_of(args, kwargs))

        def at_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.clear()
            before(module, args, kwargs)

        for i in sorted(set(kind)):
            hook = at_first if i == first else before
            back.callback(dense[i].register_forward_pre_hook(hook, with_kwargs=True).remove)
        back.callback(dense[last].register_forward_hook(lambda _m, _a, out: hidden.append(out)).remove)
        yield hidden


# --- in the graph ---------------------------------------------------------------------------------------------------


def speaks_of(graph: Any, numbers: set[int]) -> bool:
    """Whether a constant, whole or within an attribute, of ``graph`` is one of ``numbers``."""
    whole = (v.const_value.numpy() for v in graph.initializers.values())
    constants = [value.reshape(-1).tolist() for value in whole if value.dtype.kind in "iu"]
    for node in graph:
        for attribute in node.attributes.values():
            value = attribute.value
            held = value.numpy().reshape(-1).tolist() if hasattr(value, "numpy") else value
            constants.append(held if isinstance(held, list | tuple) else [held])
    return any(not numbers.isdisjoint(v for v in held if isinstance(v, int | float)) for held in constants)


def name_nodes(graph: Any) -> None:
    """Calls every node by its module and operator, such as ``model.layers.3.mlp.up_proj/MatMul``: two models whose
    layers are called alike have nodes that are called alike, whatever else one of them has not."""
    seen: dict[str, int] = {}
    for node in graph:
        told = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        path = next((scope for scope in reversed(told[:-1]) if scope and not scope.startswith("_")), "model")
        name = f"{path.removeprefix('model.') or 'model'}/{node.op_type}"
        seen[name] = seen.get(name, -1) + 1
        node.name = f"{name}_{seen[name]}" if seen[name] else name


def repeat(model_: Any, model: Any, kind: Sequence[int], hidden: Sequence[str], caches: Sequence[int]) -> None:
    """Gives the graph of one block of each kind the others.

    Args:
        model_: the graph (onnx_ir); it is changed.
        model: what was traced, with all its blocks; its parameters are called ``model.`` and their names in the graph.
        kind: block -> the first of its kind.
        hidden: the outputs that hold the hidden states before each block of the graph, and behind the last; they are
            outputs no more.
        caches: the blocks that have a cache.
    """
    graph = model_.graph
    names = {v.name: v for v in (*graph.inputs, *graph.outputs)}
    firsts = sorted(set(kind))
    edges = [names[name] for name in hidden]
    own = {j: _nodes_of(graph, names, f"model.{prefix(model)}{j}.", (edges[n], edges[n + 1]), j) for n, j in
           enumerate(firsts)}  # fmt: skip
    behind = [use for use in edges[-1].uses() if use.node not in own[firsts[-1]]]
    # What reads the hidden states before a block, in the block.
    readers = {j: [use for use in edges[n].uses() if use.node in own[j]] for n, j in enumerate(firsts)}
    held = {f"model.{name}": t for name, t in (*model.named_parameters(), *model.named_buffers())}
    facts = [_facts(block, None) for block in blocks(model)]
    sizes = [dict(_differ(facts[j], facts[i]) or ()) for i, j in enumerate(kind)]
    made = _Copies(graph, names, held, f"model.{prefix(model)}")
    at, reads = edges[0], []
    for i, j in enumerate(kind):
        n = firsts.index(j)
        if i == j:
            reads += [(use, at) for use in readers[j]]
            at = edges[n + 1]
        else:
            at = made.copy(own[j], j, i, {edges[n]: at}, sizes[i])[edges[n + 1]]
    # Only now: until then the blocks of the graph are what copies are made of.
    for use, value in (*reads, *((use, at) for use in behind)):
        use.node.replace_input_with(use.idx, value)
    _put_in_order(graph, names, made.made, caches)
    graph.sort()


def _nodes_of(graph: Any, names: dict[str, Any], weights: str, edges: tuple[Any, Any], block: int) -> list[Any]:
    """A block's nodes, in the graph's order: what its input, caches and weights lead to, and its outputs come from.
    Sizes of its input and caches are the whole model's."""
    pasts = [names[n] for kind in ("key", "value") if (n := f"past_key_values.{block}.{kind}") in names]
    sized = {edges[0], *pasts}
    starts = [*sized, *(v for name, v in graph.initializers.items() if name.startswith(weights))]
    ends = [edges[1], *(names[n] for kind in ("key", "value") if (n := f"present.{block}.{kind}") in names)]
    led: set[Any] = set()
    todo = list(starts)
    while todo:
        value = todo.pop()
        for use in value.uses():
            if use.node not in led and not (use.node.op_type == "Shape" and value in sized):
                led.add(use.node)
                todo.extend(use.node.outputs)
    needed: set[Any] = set()
    todo = [v for v in ends if v is not edges[0]]
    while todo:
        node = todo.pop().producer()
        if node is not None and node in led and node not in needed:
            needed.add(node)
            todo.extend(v for v in node.inputs if v is not None and v is not edges[0])
    return [node for node in graph if node in needed]


class _Copies:
    """Copies of a block's nodes over another block's weights and caches."""

    def __init__(self, graph: Any, names: dict[str, Any], held: dict[str, Tensor], blocks_: str) -> None:
        self.graph, self.names, self.held, self.blocks = graph, names, held, blocks_
        self.made: dict[str, Any] = {}  # inputs and outputs of the graph

    def copy(
        self, nodes: Iterable[Any], of: int, to: int, values: dict[Any, Any], sizes: dict[int, int]
    ) -> dict[Any, Any]:
        """Copies the nodes of block ``of`` for block ``to``.

        Args:
            values: what stands for another.
            sizes: sizes of the one's tensors, and the other's for them.

        Returns:
            What stands for every value of the nodes.
        """
        import onnx_ir as ir

        for node in nodes:
            inputs = [None if v is None else values.get(v) or self._other(v, of, to, values) for v in node.inputs]
            made = ir.Node(
                node.domain, node.op_type, inputs, list(node.attributes.values()),
                overload=node.overload, num_outputs=len(node.outputs), version=node.version,
                name=node.name.replace(f".{of}.", f".{to}.", 1).replace(f".{of}/", f".{to}/", 1),
            )  # fmt: skip
            for old, new in zip(node.outputs, made.outputs, strict=True):
                kept = old.name.startswith("present.") and self.names.get(old.name) is old
                new.name = old.name.replace(f".{of}.", f".{to}.") if kept else f"{old.name}.{to}"
                new.type, new.shape = old.type, None if old.shape is None else ir.Shape(self._shape(old.shape, sizes))
                values[old] = new
                if kept:
                    self.made[new.name] = new
            self.graph.append(made)
        return values

    @staticmethod
    def _shape(shape: Any, sizes: dict[int, int]) -> list[Any]:
        return [sizes.get(size, size) if isinstance(size, int) else size for size in shape]

    def _other(self, value: Any, of: int, to: int, values: dict[Any, Any]) -> Any:
        """What stands for an input of the graph or a weight; anything else is shared."""
        import onnx_ir as ir

        name = value.name
        mine = f"{self.blocks}{of}."
        if value.is_initializer() and name.startswith(mine):
            other = f"{self.blocks}{to}.{name.removeprefix(mine)}"
            tensor = ir.tensor_adapters.TorchTensor(self.held[other].detach(), name=other)
            made = ir.Value(name=other, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(made)
        elif value.is_graph_input() and name.startswith(f"past_key_values.{of}."):
            other = name.replace(f".{of}.", f".{to}.")
            made = ir.Value(name=other, shape=value.shape.copy(), type=value.type)
            self.made[other] = made
        else:
            return value
        values[value] = made
        return made


def _put_in_order(graph: Any, names: dict[str, Any], made: dict[str, Any], caches: Sequence[int]) -> None:
    """Inputs and outputs in the order of the blocks, without the hidden states."""
    known = {**names, **made}
    each = [f"{i}.{kind}" for i in caches for kind in ("key", "value")]
    inputs = [v for v in graph.inputs if not v.name.startswith("past_key_values.")]
    inputs += [known[f"past_key_values.{n}"] for n in each]
    outputs = [known["logits"], *(known[f"present.{n}"] for n in each)]
    for listed, wanted in ((graph.inputs, inputs), (graph.outputs, outputs)):
        listed.clear()
        listed.extend(wanted)
