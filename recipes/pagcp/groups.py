"""Channel groups: which channels of which layers must go together, found by tracing and proven by numbers.

`compress.networks.tracks` says which channels meet. That is a proposal: groups are admitted only when cutting half of
each of them out of a copy with random weights gives, in float64, what zeros in those places give; all together, and
where that fails, in ever smaller parts. Where a network's code has a number of channels or heads written into it, the
number goes down with them, if that is what makes it run. What is not admitted stays dense and is named with the reason.
"""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.data.inputs import Inputs, call, floats, mapped
from compress.data.outputs import tensors
from compress.errors import CompressError
from compress.networks.surgery import (
    CHANNELWISE,
    CONV,
    LAYERS,
    TRANSPOSED,
    cut,
    is_depthwise,
    number_axis,
    width,
    zeroed,
)
from compress.networks.ties import held, tied
from compress.networks.tracks import Found, follow

TRIES = 12  # sets of numbers in a network's code that are tried for a group
TOLERANCE = 1e-8  # of masked against sliced outputs in float64, relative to the largest


@dataclass(frozen=True)
class Member:
    """One axis of a layer: which of its channels belong to each unit of the group."""

    layer: str
    axis: str  # "out" or "in"; of a bare parameter or of a number in the code as `compress.networks.surgery` names it
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

    @property
    def atoms(self) -> set[tuple[str, str, int]]:
        """All channels that layers give in it."""
        return {(m.layer, m.axis, i) for m in self.members if m.axis == "out" for u in m.index for i in u}

    @property
    def roots(self) -> list[str]:
        """The layers whose outputs are cut."""
        return [m.layer for m in self.members if m.axis == "out"]

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


def find_groups(model: nn.Module, sample: Inputs, round_to: int = 8, skip: Sequence[str] = ()) -> Groups:
    """The groups of a network.

    Args:
        sample: (b, ...) that the network takes, b of 2 or more.
        skip: patterns (`fnmatch`) of layers whose groups stay dense.

    Raises:
        CompressError: the network cannot be traced at all.
    """
    x = mapped(sample, lambda t: t.detach().cpu())
    live = _live(_traced(model), x)  # before there is a copy in float64: gradients take room of their own
    trial = _trial(model)
    shared, left = _shared(model), dict[str, str]()
    found: list[Group] = []
    taken: set[tuple[str, str, int]] = set()
    prover = _Prover(trial, floats(x))

    def rooted(group: Group) -> list[str]:
        return [n for n in group.roots if isinstance(prover.modules[n], ROOTS)]

    for candidates, failed, numbers in _proposals(model, x, round_to):
        for name, reason in failed.items():
            left.setdefault(name, reason)
        able = []
        for group in candidates:
            if group.atoms & taken:
                continue
            refused = _refused(group, shared, skip, live)
            if refused is None:
                able.append(group)
            else:
                left |= {n: refused for n in rooted(group) if n not in left}
        proven, reasons = prover.prove(able, found, numbers)
        found += proven
        taken |= {atom for group in proven for atom in group.atoms}
        for group in able:
            if group.name in reasons:
                left |= {n: reasons[group.name] for n in rooted(group) if n not in left}
    left |= shared
    covered = {layer for layer, _, _ in taken}
    for name, reason in _others(model).items():
        left.setdefault(name, reason)
    covered |= {m.layer for g in found for m in g.members if m.axis.startswith("dim:")}
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return Groups(
        tuple(sorted(found, key=lambda g: order[g.name])),
        tuple(Left(n, r) for n, r in sorted(left.items(), key=lambda v: order.get(v[0], 0)) if n not in covered),
    )


def _refused(group: Group, shared: Mapping[str, str], skip: Sequence[str], live: set[str]) -> str | None:
    """Why a group is not even tried."""
    from fnmatch import fnmatch

    skipped = next((p for p in skip for m in group.members if m.axis == "out" and fnmatch(m.layer, p)), None)
    if skipped is not None:
        return f"left out by the recipe ({skipped})"
    bound = next((m.layer for m in group.members if m.layer in shared), None)
    if bound is not None:
        return f"{bound} is tied to it, and {shared[bound]}"
    return None if any(name in live for name in group.roots) else "no output depends on it"


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

ROOTS = (*CONV, *TRANSPOSED, nn.Linear)
Numbers = dict[str, tuple[str, ...]]  # a group -> modules with a grid of its channels, whose numbers may have to follow


def _proposals(
    model: nn.Module, sample: Inputs, round_to: int
) -> Iterable[tuple[list[Group], dict[str, str], Numbers]]:
    """Groups, the widest first; layers that are in none, with the reason; and `Numbers`. Where channels are viewed as a
    grid twice: by heads, then by the places of a head.

    Raises:
        CompressError: the network's code fails under watch.
    """
    traced = _traced(model)
    for grid in ("heads", "places"):
        try:
            found = follow(traced, sample, grid)  # type: ignore[arg-type]
        except Exception as e:  # whatever the network's own code says, it is the network that cannot be traced
            raise _untraced(e) from e
        yield _grouped(traced, found, round_to, grid)
        if not found.grids:
            return


def _traced(model: nn.Module) -> nn.Module:
    """A copy on the CPU to be run and watched, which shares parameters: a run writes to buffers alone."""
    shared = {id(p): p for p in model.parameters() if p.device.type == "cpu"}
    return copy.deepcopy(model, shared).cpu().eval()  # type: ignore[arg-type]


def _untraced(e: Exception) -> CompressError:
    return CompressError(
        f"the network cannot be traced: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}",
        where="channel groups",
        fix="its outputs must depend on its weights by differentiable operations; prune it with another recipe",
    )


def _grouped(model: nn.Module, found: Found, round_to: int, grid: str) -> tuple[list[Group], dict[str, str], Numbers]:
    """What was followed, as groups: units that share a layer's outputs are of one group."""
    modules = dict(model.named_modules())
    outs = {layer: units for (layer, axis), units in found.axes.items() if axis == "out"}
    first: dict[int, str] = {}  # a unit -> the layer where it was first seen
    parent = {layer: layer for layer in outs}

    def root(layer: str) -> str:
        while parent[layer] != layer:
            parent[layer] = parent[parent[layer]]
            layer = parent[layer]
        return layer

    for layer, units in outs.items():
        for unit in np.unique(units).tolist():
            parent[root(layer)] = root(first.setdefault(unit, layer))
    together: dict[str, list[str]] = {}
    for layer in outs:
        together.setdefault(root(layer), []).append(layer)
    places: dict[int, list[tuple[str, str]]] = {}
    for at, units in found.axes.items():
        for unit in np.unique(units).tolist():
            places.setdefault(unit, []).append(at)
    order = {name: i for i, name in enumerate(modules)}
    groups: list[Group] = []
    failed: dict[str, str] = {}
    numbers: Numbers = {}
    for layers in together.values():
        roots = [n for n in layers if n in found.reached and isinstance(modules[n], ROOTS)]
        roots = [n for n in roots if not is_depthwise(modules[n])]
        if not roots:
            continue
        of = {n: list(dict.fromkeys(u for u in outs[n].tolist() if u not in found.blocked)) for n in layers}
        free = set().union(*of.values())
        if len(free) < 2:
            for name in roots:
                failed[name] = _stuck(outs[name], width(modules[name], "out"), found, [outs[n] for n in layers])
            continue
        # The layer with most of the units stands for all.
        name = max(roots, key=lambda n: (len(of[n]), -order[n]))
        own = list(dict.fromkeys(u for n in (name, *roots, *layers) for u in of[n]))
        group = _group(name, own, places, found, modules, round_to, grid)
        groups.append(group)
        numbers[name] = tuple(sorted({m for u in own for m in found.sites.get(u, ())}))
    groups.sort(key=lambda g: -sum(len(i) for m in g.members for i in m.index))
    return groups, failed, numbers


def _stuck(units: Any, channels: int, found: Found, together: Sequence[Any]) -> str:
    """Why no unit of a layer's outputs can go."""
    if channels == 1:
        return "it has one channel"
    own = next((found.blocked[u] for u in units.tolist() if u in found.blocked), None)
    other = next((found.blocked[u] for t in together for u in t.tolist() if u in found.blocked), None)
    if own is None and other is not None:
        return f"it goes with channels that stay: {other}"
    return own or "all its channels are tied to one another"


def _group(
    name: str,
    units: list[int],
    places: Mapping[int, list[tuple[str, str]]],
    found: Found,
    modules: Mapping[str, nn.Module],
    round_to: int,
    grid: str,
) -> Group:
    number = {unit: i for i, unit in enumerate(units)}
    order = {at: i for i, at in enumerate(found.axes)}
    members = []
    divided = 1
    for at in sorted({at for unit in units for at in places[unit]}, key=lambda at: (at[0] != name, order[at])):
        index: list[list[int]] = [[] for _ in units]
        for channel, unit in enumerate(found.axes[at].tolist()):
            if unit in number:
                index[number[unit]].append(channel)
        members.append(Member(*at, tuple(tuple(i) for i in index)))
        module = modules.get(at[0])
        if isinstance(module, CONV + TRANSPOSED) and not is_depthwise(module):
            divided = max(divided, int(module.groups))
    own = members[0].index
    if grid == "heads" and any(u in found.grids for u in units):
        divided = max(divided, len(own[0]))
    # Rounded are the channels of a part that a runtime sees: a chunk's part, or all groups of a convolution together.
    chunked = any(u in found.chunked for u in units)
    step = round_to if chunked else round_to // math.gcd(round_to, divided)
    return Group(name, len(units), len(own[0]), step, tuple(members))


# --- proof ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _trial(model: nn.Module) -> nn.Module:
    """A float64 copy with random weights and statistics: no zero, no dead channel hides a fault."""
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
            elif isinstance(tensor, nn.Parameter) and tensor.numel() > 1:
                tensor.copy_(0.5 + 0.3 * noise.abs())
    return trial


def _live(model: nn.Module, x: Inputs) -> set[str]:
    """Layers on which an output depends, by the gradients of all outputs together, which reach their outputs.

    Raises:
        CompressError: no output depends on a layer by a differentiable operation.
    """
    generator = torch.Generator().manual_seed(1)
    found: set[str] = set()

    def watch(name: str) -> Any:
        def reached(gradient: Tensor) -> None:
            found.add(name)  # also where it is 0: a sigmoid far out has no slope

        def hook(module: nn.Module, inputs: Any, out: Any) -> Any:
            if not isinstance(out, Tensor) or not out.is_floating_point():
                return None
            if not out.requires_grad:
                out = out.requires_grad_().clone()
            out.register_hook(reached)
            return out

        return hook

    was = [(p, p.requires_grad) for p in model.parameters()]
    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, LAYERS)]
    try:
        for parameter, _ in was:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            outputs = [t for t in tensors(call(model, x)) if t.grad_fn is not None]
            if not outputs:
                raise CompressError("no output depends on a weight by a differentiable operation")
            weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
            torch.autograd.backward(outputs, weights)  # type: ignore[arg-type]
    except Exception as e:  # the network's own code
        raise _untraced(e) from e
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed in was:
            parameter.requires_grad_(needed)
    return found


class _Prover:
    """Compares zeros with cuts, on a copy with random weights."""

    def __init__(self, trial: nn.Module, x: Inputs) -> None:
        self.trial, self.x = trial, x
        self.modules = dict(trial.named_modules())
        self.learned: dict[tuple[type, ...], tuple[str, ...]] = {}  # classes of modules -> their numbers that followed
        self.before, _ = self.run(trial)
        self.scale = max(float(t.abs().max()) for t in self.before if t.numel())

    def prove(
        self, groups: Sequence[Group], admitted: Sequence[Group], numbers: Numbers
    ) -> tuple[list[Group], dict[str, str]]:
        """The groups that can go beside each other and beside what was ``admitted`` before; of the others why not."""
        kept = list(admitted)
        reasons: dict[str, str] = {}

        def admit(part: Sequence[Group]) -> None:
            if not part:
                return
            tried = [self._told(g, numbers.get(g.name, ())) for g in part]
            reason = self.disproof([*kept, *tried])
            changed = [g for g, was in zip(tried, part, strict=True) if g is not was]
            if reason is None and all(self.disproof([g], 1) is None for g in changed):
                kept.extend(tried)
            elif len(part) > 1:
                middle = len(part) // 2
                admit(part[:middle])
                admit(part[middle:])
            else:
                group = self._followed(part[0], kept, numbers.get(part[0].name, ()))
                if group is not None:
                    kept.append(group)
                else:
                    reasons[part[0].name] = reason or "a number in the code does not follow its channels"

        admit(groups)
        return kept[len(admitted) :], reasons

    def _kinds(self, modules: Sequence[str]) -> tuple[type, ...]:
        return tuple(type(self.modules[name]) for name in modules)

    def _told(self, group: Group, modules: Sequence[str]) -> Group:
        """The group with the numbers that had to follow in modules of the same classes."""
        return self._with(group, modules, self.learned.get(self._kinds(modules), ()))

    def _with(self, group: Group, modules: Sequence[str], keys: Sequence[str]) -> Group:
        """The group with what modules call by these names, where that is its number of units or of channels."""
        wanted = (group.units, group.units * group.channels)
        more = [
            Member(name, number_axis(key), _shares(vars(self.modules[name])[key], group.units))
            for name in modules
            for key in keys
            if type(value := vars(self.modules[name]).get(key)) is int and value in wanted
        ]
        return replace(group, members=(*group.members, *more)) if more else group

    def _followed(self, group: Group, admitted: Sequence[Group], modules: Sequence[str]) -> Group | None:
        """The group with those numbers in the code of ``modules`` that have to go down with it."""
        wanted = (group.units, group.units * group.channels)
        named = [m for n in modules if not isinstance(m := self.modules[n], LAYERS)]
        keys = list(dict.fromkeys(k for m in named for k, v in vars(m).items() if type(v) is int and v in wanted))
        sets = [c for count in (1, 2) for c in itertools.combinations(keys, count)]
        if len(keys) > 2:
            sets.append(tuple(keys))
        for chosen in sets[:TRIES]:
            tried = self._with(group, modules, chosen)
            # At one width a view may fit by chance (half of a head's places taken for two heads).
            if all(self.disproof([*admitted, tried], count) is None for count in (None, 1)):
                self.learned[self._kinds(modules)] = chosen
                return tried
        return None

    @torch.no_grad()
    def disproof(self, groups: Sequence[Group], last: int | None = None) -> str | None:
        """Why groups may not be pruned together; None where masked and sliced are the same. Of the ``last`` group so
        many units go, of others half or a third."""
        removed: dict[tuple[str, str], list[int]] = {}
        told: set[tuple[str, str]] = set()
        for i, group in enumerate(groups):
            numbers = {(m.layer, m.axis) for m in group.members if m.axis.startswith("int:")}
            if told & numbers:
                return f"a number in the code counts channels of two groups ({', '.join(sorted(told & numbers)[0])})"
            told |= numbers
            # Of each other units and of every second another share, so that groups do not fit each other by chance.
            generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
            count = max(1, group.units // (2 + i % 2))
            count = last if last is not None and group is groups[-1] else count
            half = torch.randperm(group.units, generator=generator)[:count].tolist()
            for at, gone in group.removed(half).items():
                removed[at] = sorted({*removed.get(at, ()), *gone})
        try:
            sliced, sums = self.run(cut(self.trial, removed))
        except CompressError as e:
            return f"{e.what} ({e.where})"
        except Exception as e:  # the network's own code, run at a width it was not written for
            return f"the network cannot run without them ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"
        before = self.before
        if len(sliced) != len(before) or any(a.shape != b.shape for a, b in zip(sliced, before, strict=True)):
            return "it is an output of the network"
        masked, heard = self.run(zeroed(self.trial, removed, held=False))
        off = max(float((a - b).abs().max()) for a, b in zip(masked, sliced, strict=True) if a.numel())
        if not off <= TOLERANCE * self.scale:
            return f"sliced is not masked: outputs up to {self.scale:.3g} differ by {off:.2g}"
        # An output may be blind (a sigmoid far out): what every layer gives has to be the same too.
        for (layer, total, scale), (other, again, _) in zip(heard, sums, strict=True):
            if layer != other or not abs(total - again) <= TOLERANCE * scale:
                return f"sliced is not masked: the outputs of {layer} differ"
        return None

    @torch.no_grad()
    def run(self, model: nn.Module) -> tuple[list[Tensor], list[tuple[str, float, float]]]:
        """The outputs; and of every call of a layer its name, the sum of what it gave, and of the sizes of that. What
        is zero adds nothing, so the sums are the same at full shape."""
        said: list[tuple[str, float, float]] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, out: Any) -> None:
                said.append((name, float(out.sum()), float(out.abs().sum())))

            return hook

        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ROOTS)]
        handles = [module.register_forward_hook(watch(name)) for name, module in layers]
        try:
            return tensors(call(model, self.x)), said
        finally:
            for handle in handles:
                handle.remove()


def _shares(value: int, units: int) -> tuple[tuple[int, ...], ...]:
    """The places of a number that each of the units takes."""
    each = value // units
    return tuple(tuple(range(i * each, (i + 1) * each)) for i in range(units))
