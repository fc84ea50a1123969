"""Channel groups: which channels of which layers must go together, found by tracing and proven by numbers.

torch-pruning's dependency graph says what is tied. It takes an operation it does not know for an element-wise one, and
does not know that a `chunk` keeps its parts alike or that the groups of a convolution stay equal. So what it says is a
proposal: ties are added, and each group is admitted only when cutting half of it out of a copy with random weights
gives, in float64, what zeros in those places give. What is not admitted stays dense and is named with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.networks.surgery import CHANNELWISE, CONV, LAYERS, TRANSPOSED, cut, is_depthwise, width, zeroed
from compress.networks.ties import held, tied

TOLERANCE = 1e-8  # of masked against sliced outputs in float64, relative to the largest


@dataclass(frozen=True)
class Member:
    """One axis of a layer: which of its channels belong to each unit of the group."""

    layer: str
    axis: str  # "out" or "in"
    index: tuple[tuple[int, ...], ...]  # a tuple of channels for every unit; a unit may have none here


@dataclass(frozen=True)
class Group:
    """Channels that can be removed unit by unit.

    ``channels`` is how many of the root layer's channels a unit takes (more than one where a chunk or a grouped
    convolution ties them), ``step`` how many units a rounded width goes by.
    """

    name: str  # the root layer
    units: int
    channels: int
    step: int
    members: tuple[Member, ...]

    def removed(self, units: Iterable[int]) -> dict[tuple[str, str], list[int]]:
        """The channels that go with these units, by layer and axis."""
        gone = sorted(set(units))
        return {
            (m.layer, m.axis): sorted({i for u in gone for i in m.index[u]})
            for m in self.members
            if any(m.index[u] for u in gone)
        }

    def levels(self, keep: float = 0.0) -> tuple[int, ...]:
        """Units that may be kept, falling: all of them, then every multiple of ``step`` down to ``keep`` of them."""
        least = max(1, int(-(-self.units * keep // 1)))
        rest = [n for n in range(self.step, self.units, self.step) if n >= least]
        return (self.units, *reversed(rest))

    def __str__(self) -> str:
        layers = ", ".join(f"{m.layer}.{m.axis}" for m in self.members)
        return f"{self.name}: {self.units} units of {self.channels}, in steps of {self.step}: {layers}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Left:
    """Layers whose outputs stay as they are, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Groups:
    """What can be pruned, and what stays dense."""

    groups: tuple[Group, ...]
    left: tuple[Left, ...]


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in the outputs, however they are nested, in a fixed order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = [getattr(outputs, f.name) for f in fields(outputs)]
    elif isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [t for item in outputs for t in tensors(item)] if isinstance(outputs, list | tuple) else []


def find_groups(model: nn.Module, sample: Tensor, round_to: int = 8, skip: Sequence[str] = ()) -> Groups:
    """The groups of a network.

    Args:
        sample: (b, ...) float32 that the network takes, b of 2 or more.
        skip: patterns (`fnmatch`) of layers whose groups stay dense.

    Raises:
        CompressError: the network cannot be traced at all.
    """
    from fnmatch import fnmatch

    found: list[Group] = []
    left: dict[str, str] = {}
    trial = _trial(model)
    x = sample.detach().cpu().double()
    with torch.no_grad():
        before = _outputs(trial, x)
    taken: set[tuple[str, str, int]] = set()
    proposals, failed = _propose(model, sample.detach().cpu(), round_to)
    shared = _shared(model)
    left |= failed | shared
    # The widest first: a group that holds another one's channels stands for it.
    for group in sorted(proposals, key=lambda g: -sum(len(i) for m in g.members for i in m.index)):
        atoms = {(m.layer, m.axis, i) for m in group.members if m.axis == "out" for u in m.index for i in u}
        if atoms & taken:
            continue
        skipped = next((p for p in skip for m in group.members if m.axis == "out" and fnmatch(m.layer, p)), None)
        bound = next((m.layer for m in group.members if m.layer in shared), None)
        if skipped is not None:
            reason: str | None = f"left out by the recipe ({skipped})"
        elif bound is not None:
            reason = f"{bound} is tied to it, and {shared[bound]}"
        else:
            reason = _disprove(trial, group, x, before)
        if reason is None:
            taken |= atoms
            found.append(group)
        else:
            left.setdefault(group.name, reason)
    covered = {layer for layer, _, _ in taken}
    for name, reason in _others(model).items():
        left.setdefault(name, reason)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return Groups(
        tuple(sorted(found, key=lambda g: order[g.name])),
        tuple(Left(n, r) for n, r in sorted(left.items(), key=lambda v: order.get(v[0], 0)) if n not in covered),
    )


def _shared(model: nn.Module) -> dict[str, str]:
    """Layers with a parameter that another one holds too: cut alone they would come apart, and the network grow."""
    found: dict[str, str] = {}
    for name, others in tied(model).items():
        layer, _, key = name.rpartition(".")
        if isinstance(model.get_submodule(layer), LAYERS):
            found.setdefault(layer, f"its {key} is also {', '.join(others)}")
    return found


def _others(model: nn.Module) -> dict[str, str]:
    """Layers that never root a group, and weights of no layer that is cut, so that none is passed over in silence."""
    kinds = (*CONV, *TRANSPOSED, nn.Linear)
    found = {n: "nothing that was traced ends in it" for n, m in model.named_modules() if isinstance(m, kinds)}
    for one in held(model):
        module = model.get_submodule(one.module)
        if one.tensor.dim() > 1 and isinstance(one.tensor, nn.Parameter) and not isinstance(module, LAYERS):
            # A module of the network's own (or the network itself) may hold anything: its parameter is what is named.
            known = type(module).__module__.startswith("torch.nn")
            found.setdefault(one.module if known else one.name, f"{_kind(module, known)} is not cut")
    return found


def _kind(module: nn.Module, known: bool) -> str:
    return type(module).__name__ if known else f"a parameter of {type(module).__name__}"


# --- proposals --------------------------------------------------------------------------------------------------------


def _propose(model: nn.Module, sample: Tensor, round_to: int) -> tuple[list[Group], dict[str, str]]:
    """Groups as torch-pruning sees them, with the ties it misses; and layers for which it has none, with the reason."""
    import copy

    import torch_pruning as tp

    traced = copy.deepcopy(model).cpu().eval()
    for parameter in traced.parameters():
        parameter.requires_grad_(True)
    names = {m: n for n, m in traced.named_modules()}
    graph: Any = tp.DependencyGraph()
    seen = _Traced()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph.build_dependency(traced, sample, forward_fn=seen.forward, output_transform=_traceable, verbose=False)
            seen.tell(graph)
    except (
        Exception
    ) as e:  # whatever the network's own code or the tracer says, it is the network that cannot be traced
        raise CompressError(
            f"the network cannot be traced: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}",
            where="channel groups",
            fix="its outputs must depend on its weights by differentiable operations; prune it with another recipe",
        ) from e
    found: list[Group] = []
    failed: dict[str, str] = {}
    for name, module in traced.named_modules():
        if not isinstance(module, (*CONV, *TRANSPOSED, nn.Linear)) or module not in graph.module2node:
            continue
        if is_depthwise(module):
            continue  # goes with the layer in front of it
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruner = graph.get_pruner_of_module(module)
                items = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(width(module, "out"))))
            found.append(_group(name, module, items, graph, names, round_to))
        except _Unfit as e:
            failed[name] = str(e)
        except Exception as e:  # a gap of the tracer: this layer stays dense, and it is said
            failed[name] = f"the tracer fails on it ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"
    return found, failed


def _traceable(outputs: Any) -> list[Tensor]:
    found = [t for t in tensors(outputs) if t.grad_fn is not None]
    if not found:
        raise CompressError("no output depends on a weight by a differentiable operation")
    return found


class _Traced(torch.overrides.TorchFunctionMode):
    """What the tracer does not see for itself, seen while the network runs.

    `chunk` and `split` give slices: the tracer takes the parts of a split in the order in which it meets them on the
    way back, while a slice says itself where it begins. And it cannot tell how many channels a slice brings to a `cat`.
    """

    SPLITS = (torch.chunk, torch.Tensor.chunk, torch.split, torch.Tensor.split, torch.Tensor.split_with_sizes)
    CATS = (torch.cat, torch.concat, torch.concatenate)

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[Any, list[int]] = {}  # what a `cat` along the channels was made of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in self.CATS and out.grad_fn is not None:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim in (1, 1 - out.dim()):
                self.sizes[out.grad_fn] = [t.shape[1] for t in (args[0] if args else kwargs["tensors"])]
        if func not in self.SPLITS:
            return out
        x, dim = args[0], kwargs.get("dim", args[2] if len(args) > 2 else 0)
        sizes = [part.shape[dim] for part in out]
        return tuple(x.narrow(dim, sum(sizes[:i]), n) for i, n in enumerate(sizes))

    def forward(self, model: nn.Module, x: Tensor) -> Any:
        # Times one: the tracer drops a leaf, and with it the place that the input takes in a `cat`.
        x = x.clone().requires_grad_() * 1.0
        with self:
            return model(x)

    def tell(self, graph: Any) -> None:
        """Lets the graph know how long the parts of every `cat` are."""
        for node in graph.module2node.values():
            sizes = self.sizes.get(node.grad_fn)
            if sizes is not None and len(sizes) == len(node.inputs):
                node.module.concat_sizes = sizes


class _Unfit(Exception):
    """Why a layer makes no group."""


def _group(name: str, root: nn.Module, items: Any, graph: Any, names: Mapping[Any, str], round_to: int) -> Group:
    import torch_pruning as tp

    count = width(root, "out")
    if count == 1:
        raise _Unfit("it has one channel")
    ties = _Ties(count)
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    parts: dict[Any, list[tuple[int, int, list[int], list[int]]]] = {}
    divided = 1
    for item in items:
        dep, plain, roots = item.dep, list(item.idxs), list(item.root_idxs)
        module, kind = dep.target.module, dep.target.type
        if kind == tp.ops.OPTYPE.SLICE:
            node = dep.target
            if graph.is_out_channel_pruning_fn(dep.handler) and node.inputs:
                # Channels of the part itself, counted from where it begins.
                parts.setdefault(node.inputs[0], []).append((node.module.start, node.module.end, plain, roots))
            continue
        if isinstance(module, nn.Parameter):
            raise _Unfit("a bare parameter is tied to it")
        if isinstance(module, tp.ops.DummyMHA) or module not in names:
            continue  # an operation without weights
        if isinstance(module, tp.ops._ElementWiseOp) or not isinstance(module, nn.Module):
            continue
        if not any(True for _ in module.parameters(recurse=False)) and not isinstance(module, CHANNELWISE):
            continue
        if not isinstance(module, LAYERS):
            raise _Unfit(f"{type(module).__name__} ({names[module]}) is tied to it")
        both = isinstance(module, CHANNELWISE) or is_depthwise(module)
        axis = "out" if both or graph.is_out_channel_pruning_fn(dep.handler) else "in"
        if max(plain, default=0) >= width(module, axis):
            raise _Unfit(f"the tracer does not see how its channels become those of {names[module]} (padded, perhaps)")
        pairs.setdefault((names[module], axis), []).extend(zip(plain, roots, strict=True))
        blocks = int(module.groups) if isinstance(module, CONV + TRANSPOSED) and not both else 1  # type: ignore[arg-type]
        if blocks > 1:
            # The same place in every group of the convolution goes at once, so that they stay alike.
            per = width(module, axis) // blocks
            ties.alike([(i % per, r) for i, r in zip(plain, roots, strict=True)])
            divided = max(divided, blocks)
    chunked = any([_tie_parts(ties, found) for found in parts.values()])
    units = ties.units()
    if len(units) < 2:
        raise _Unfit("all its channels are tied to one another")
    members = []
    for (layer, axis), found in pairs.items():
        by_root: dict[int, list[int]] = {}
        for i, r in found:
            by_root.setdefault(r, []).append(i)
        index = tuple(tuple(sorted({i for r in unit for i in by_root.get(r, ())})) for unit in units)
        members.append(Member(layer, axis, index))
    # Rounded are the channels of a part that a runtime sees: a chunk's part, or all groups of a convolution together.
    step = round_to if chunked else round_to // _common(round_to, divided)
    return Group(name, len(units), len(units[0]), step, tuple(members))


def _common(a: int, b: int) -> int:
    import math

    return math.gcd(a, b)


class _Ties:
    """Channels of the root that must go together (union-find)."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def alike(self, keyed: Iterable[tuple[int, int]]) -> None:
        """Ties all channels that have one key."""
        first: dict[int, int] = {}
        for key, i in keyed:
            a, b = self.root(first.setdefault(key, i)), self.root(i)
            self.parent[max(a, b)] = min(a, b)

    def units(self) -> list[tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        for i in range(len(self.parent)):
            found.setdefault(self.root(i), []).append(i)
        return [tuple(v) for _, v in sorted(found.items())]


def _tie_parts(ties: _Ties, parts: Sequence[tuple[int, int, list[int], list[int]]]) -> bool:
    """A chunk divides by the number of its parts, so the same place of every part goes at once.

    Args:
        parts: of one tensor: where a part begins and ends, its places, and the root's channels there.
    """
    if len({end - start for start, end, _, _ in parts}) > 1 or len({start for start, *_ in parts}) < 2:
        return False  # sizes written into the code: the proof will tell
    ties.alike((i, r) for _, _, places, roots in parts for i, r in zip(places, roots, strict=True))
    return True


# --- proof ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _trial(model: nn.Module) -> nn.Module:
    """A float64 copy with random weights and statistics: no zero, no dead channel hides a fault."""
    import copy

    trial = copy.deepcopy(model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    for module in trial.modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point() or not tensor.numel():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if key in ("running_var",) or (isinstance(module, CHANNELWISE) and key == "weight"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.dim() > 1:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            elif isinstance(module, LAYERS):
                tensor.copy_(0.3 * noise)
    return trial


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return tensors(model(x))


@torch.no_grad()
def _disprove(trial: nn.Module, group: Group, x: Tensor, before: Sequence[Tensor]) -> str | None:
    """Why a group may not be pruned; None where masked and sliced are the same."""
    generator = torch.Generator().manual_seed(group.units)
    half = torch.randperm(group.units, generator=generator)[: max(1, group.units // 2)].tolist()
    removed = group.removed(half)
    masked = _outputs(zeroed(trial, removed), x)
    try:
        sliced = _outputs(cut(trial, removed), x)
    except CompressError as e:
        return f"{e.what} ({e.where})"
    except Exception as e:  # the network's own code, run at a width it was not written for
        return f"the network cannot run without them ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"
    if len(sliced) != len(before) or any(a.shape != b.shape for a, b in zip(sliced, before, strict=True)):
        return "it is an output of the network"
    scale = max(float(t.abs().max()) for t in before if t.numel())
    off = max(float((a - b).abs().max()) for a, b in zip(masked, sliced, strict=True) if a.numel())
    if not off <= TOLERANCE * scale:
        return f"sliced is not masked: outputs up to {scale:.3g} differ by {off:.2g}"
    if all(torch.equal(a, b) for a, b in zip(masked, before, strict=True)):
        return "no output depends on it"
    return None
