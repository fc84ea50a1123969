"""Which channels of which layers go together: every axis of every weight is numbered, and one run says where they meet.

Of each tensor that the network makes, a *track* is kept for each dimension: the number of the channel that each of its
places belongs to. An operation carries tracks on, and joins those that it brings to the same place: a sum, a norm's
weights, the columns of the layer that reads it, the two sides of a matrix product. What a track costs is the length of
a dimension, whatever the network; what an operation does to it is asked of the operation itself, run on the numbers.

An operation that is not known ends the tracks it is given, and the reason names it: nothing is taken for something
that it resembles. A channel dimension that is viewed as several (heads, a shuffle) has to stay a grid, so that its
places are joined along all of these but one: ``Grid`` says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from compress.data.inputs import Inputs, call
from compress.networks.surgery import CHANNELWISE, LAYERS, TRANSPOSED, is_depthwise, parameter_axis, width

Grid = Literal["heads", "places"]  # units of a grid: what its last dimension but one counts, or its last
Track = np.ndarray[Any, np.dtype[np.int64]]  # the numbers of the places of one dimension; 0: of no channel
Tracks = tuple[Track | None, ...]  # of a tensor, for each dimension


@dataclass
class Found:
    """What a run said.

    ``axes``: (layer, axis) -> its channels' units, (channels,); two channels of one unit go together. ``blocked``: unit
    -> why it has to stay. ``chunked``: units of which a tensor was taken in equal parts. ``grids``: units of channels
    that were viewed as a grid. ``sites``: unit -> modules in whose code its channels were viewed or split. ``reached``:
    layers that were run.
    """

    axes: dict[tuple[str, str], Track]
    blocked: dict[int, str]
    chunked: set[int]
    grids: set[int]
    sites: dict[int, set[str]]
    reached: set[str]


def follow(model: nn.Module, x: Inputs, grid: Grid = "heads") -> Found:
    """Runs the network once on ``x`` (b, ...), in evaluation and without gradients, and follows its channels.

    Raises:
        Exception: whatever the network's own code raises.
    """
    run = _Run(model, grid)
    handles = list(run.watched())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a transformer layer in one operation shows nothing of itself
    try:
        with torch.no_grad(), run:
            outputs = call(model, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    for tensor in _tensors(outputs):
        for track in run.of(tensor):
            run.block(track, "it is an output of the network")
    return run.found()


class _Run(TorchDispatchMode):
    """One run of a network under watch."""

    def __init__(self, model: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.model, self.grid = model, grid
        self.count = 1
        self.axes: dict[tuple[str, str], Track] = {}
        self.layers: dict[int, str] = {}  # a weight -> its layer
        self.modules = dict(model.named_modules())
        self.tracks: Any = WeakIdKeyDictionary()
        self.held: list[Tensor] = []
        self.stack: list[str] = [""]
        self.pairs: list[tuple[Track, Track]] = []
        self.reasons: list[tuple[Track, str]] = []
        self.chunks: list[Track] = []
        self.grids: list[Track] = []
        self.sites: list[tuple[Track, str]] = []
        self.reached: set[str] = set()
        self._number()

    # --- before the run ---

    def _new(self, layer: str, axis: str, size: int) -> Track:
        track = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        self.axes[layer, axis] = track
        return track

    def _number(self) -> None:
        for name, module in self.modules.items():
            if not isinstance(module, LAYERS):
                continue
            out = self._new(name, "out", width(module, "out"))
            single = isinstance(module, CHANNELWISE) or is_depthwise(module)
            into = out if single else self._new(name, "in", width(module, "in"))
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or not tensor.dim():
                    continue
                if key == "weight" and not isinstance(module, CHANNELWISE):
                    self.layers.setdefault(id(tensor), name)
                    sides = (into, out) if isinstance(module, TRANSPOSED) else (out, into)
                    sizes = tensor.shape[:2]
                    # Of a grouped convolution one side is divided: what it is, `_convolution` knows.
                    self._hold(tensor, [t if len(t) == n else None for t, n in zip(sides, sizes, strict=True)])
                elif tensor.dim() == 1 and len(tensor) == len(out):
                    self._hold(tensor, [out])
        for name, module in self.modules.items():
            if isinstance(module, LAYERS):
                continue
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or not tensor.is_floating_point() or tensor in self.tracks:
                    continue
                own = f"{name}.{key}" if name else key
                self._hold(
                    tensor,
                    [self._new(own, parameter_axis(d), n) if n > 1 else None for d, n in enumerate(tensor.shape)],
                )

    def _hold(self, tensor: Tensor, tracks: Iterable[Track | None]) -> None:
        if tensor in self.tracks:
            return
        found = list(tracks)
        self.tracks[tensor] = (*found, *[None] * (tensor.dim() - len(found)))
        self.held.append(tensor)

    def watched(self) -> Iterator[Any]:
        """Hooks that say in which module the run is."""

        def begin(name: str) -> Any:
            return lambda *_: self.stack.append(name)

        def end(*_: Any) -> None:
            self.stack.pop()

        for name, module in self.modules.items():
            yield module.register_forward_pre_hook(begin(name))
            yield module.register_forward_hook(end)

    # --- tracks ---

    def of(self, tensor: Any) -> Tracks:
        if not isinstance(tensor, Tensor):
            return ()
        found: Tracks | None = self.tracks.get(tensor)
        # One that was resized in place is another one.
        return found if found is not None and len(found) == tensor.dim() else (None,) * tensor.dim()

    def _set(self, tensor: Any, tracks: Iterable[Track | None]) -> None:
        found = tuple(t if t is not None and t.any() else None for t in tracks)
        if isinstance(tensor, Tensor) and len(found) == tensor.dim():
            sizes = zip(found, tensor.shape, strict=True)
            self.tracks[tensor] = tuple(t if t is not None and len(t) == n > 1 else None for t, n in sizes)

    def join(self, *tracks: Track | None, fixed: str | None = None) -> Track | None:
        """One track for places that go together; None stands for places of no channel, which block where ``fixed`` says
        that they cannot change in number."""
        known = [t for t in tracks if t is not None]
        if not known:
            return None
        first = known[0]
        for other in known[1:]:
            both = (first != 0) & (other != 0) & (first != other)
            if both.any():
                self.pairs.append((first[both], other[both]))
            first = np.where(first != 0, first, other)
        if fixed is not None:
            for t in tracks:
                self.block(first if t is None else first[t == 0], fixed)
        return first

    def block(self, track: Track | None, reason: str) -> None:
        if track is not None:
            track = np.unique(track[track != 0])
            if len(track):
                self.reasons.append((track, reason))

    def tie(self, rows: Track) -> Track:
        """Joins along the last axis of (units, places); returns the units' numbers, (units,)."""
        for i in range(1, rows.shape[1]):
            self.join(rows[:, 0], rows[:, i], fixed="it goes with channels that cannot go")
        return np.ascontiguousarray(rows[:, 0])

    def _here(self) -> str:
        name = self.stack[-1]
        return f"{type(self.modules[name]).__name__} {name}".strip()

    # --- operations ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What is written in place keeps no old track.
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        known = [t for t in given if any(track is not None for track in self.of(t))]
        self.reached.update(self.layers[id(t)] for t in known if id(t) in self.layers)
        out = func(*args, **kwargs)
        if known:
            name = func._schema.name.removeprefix("aten::")
            with _disable_current_modes():
                self._passed(name, func, args, kwargs, out, known)
        return out

    def _passed(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, known: list[Tensor]) -> None:
        rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
        call = _Call(self, name, func, args, kwargs, out)
        if rule is not None:
            rule(call)
        elif torch.Tag.pointwise in func.tags:
            _pointwise(call)
        elif _tensors(out):
            for tensor in known:
                for track in self.of(tensor):
                    self.block(track, f"the operator {name} in {self._here()} is not followed")

    # --- behind the run ---

    def found(self) -> Found:
        parent = np.arange(self.count, dtype=np.int64)
        if self.pairs:
            a, b = (np.concatenate([p[i] for p in self.pairs]) for i in (0, 1))
            while True:
                # The lower of two units takes the higher; then every place is sent to the end of its chain.
                x, y = parent[a], parent[b]
                if (x == y).all():
                    break
                np.minimum.at(parent, np.maximum(x, y), np.minimum(x, y))
                while (parent != (further := parent[parent])).any():
                    parent = further
        blocked: dict[int, str] = {}
        for track, reason in self.reasons:
            for unit in np.unique(parent[track]).tolist():
                blocked.setdefault(unit, reason)
        sites: dict[int, set[str]] = {}
        for track, module in self.sites:
            for unit in np.unique(parent[track]).tolist():
                sites.setdefault(unit, set()).add(module)
        chunked, grids = (
            {u for track in tracks for u in np.unique(parent[track]).tolist()} for tracks in (self.chunks, self.grids)
        )
        axes = {at: parent[t] for at, t in self.axes.items()}
        return Found(axes, blocked, chunked - {0}, grids - {0}, sites, self.reached)


@dataclass
class _Call:
    """One operation: what it was given and gave."""

    run: _Run
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, argument in enumerate(self.func._schema.arguments):
            value = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name, argument.default_value)
            self.values[argument.name] = value

    @property
    def x(self) -> Any:
        return self.args[0]

    @property
    def tracks(self) -> Tracks:
        return self.run.of(self.args[0])

    @property
    def first(self) -> Tensor:
        """The first tensor that it gave."""
        return _tensors(self.out)[0]

    def dims(self, *names: str) -> set[int]:
        """The dimensions of the first argument that a keyword names; all of them where it names none."""
        value = next((self.values[n] for n in names if self.values.get(n) is not None), None)
        if value is None or value == []:
            return set(range(self.x.dim()))
        listed = [value] if isinstance(value, int) else list(value)
        return {d % max(1, self.x.dim()) for d in listed}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    found = tree_flatten(value)[0]
    if len(found) == 1 and found[0] is value:  # an object of the network's own
        found = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [t for t in found if isinstance(t, Tensor)]


def _pointwise(call: _Call) -> None:
    """Sums, products, activations: what stands at one place goes together."""
    run, out = call.run, call.first
    given = [t for t in tree_flatten((call.args, dict(call.kwargs)))[0] if isinstance(t, Tensor)]
    found: list[Track | None] = []
    for d in range(1, out.dim() + 1):  # from the last
        size = out.shape[-d]
        at = [run.of(t)[-d] for t in given if t.dim() >= d and t.shape[-d] == size]
        fixed = f"it meets channels that are not cut ({call.name} in {run._here()})"
        found.append(run.join(*at, fixed=fixed if size > 1 else None))
    for tensor in _tensors(call.out):
        run._set(tensor, reversed(found))


def _moved(call: _Call) -> None:
    """Views and copies: the operation itself is run on the numbers of each dimension."""
    run, x = call.run, call.x
    outs = _tensors(call.out)
    found: list[list[Track | None]] = [[None] * o.dim() for o in outs]
    name = "reshape" if call.name in ("view", "_unsafe_view") else call.name
    for d, track in enumerate(call.tracks):
        if track is None:
            continue
        if name in ("reshape", "slice", "expand"):
            run.sites.append((np.unique(track), run.stack[-1]))
        shape = [1] * x.dim()
        shape[d] = -1
        # Of no rows (a network with 0 registers) one stands for all: its channels go with those of what it is put to.
        numbers = torch.from_numpy(track).view(shape).expand([max(1, size) for size in x.shape])
        if name == "reshape" and not x.numel():
            continue
        if name == "reshape":
            moved = numbers.reshape(call.args[1])
        else:
            moved = call.func(numbers, *call.args[1:], **call.kwargs)
        for i, tensor in enumerate(_tensors(moved)):
            at, numbers_there = _along(run, tensor)
            if at is not None and found[i][at] is None:
                found[i][at] = numbers_there
            elif at is not None:
                found[i][at] = run.join(found[i][at], numbers_there)
    for tensor, tracks in zip(outs, found, strict=True):
        run._set(tensor, tracks)


def _along(run: _Run, numbers: Tensor) -> tuple[int | None, Track | None]:
    """The dimension along which numbers differ, and they; where they do along several, they are joined to a grid."""
    several = [d for d, n in enumerate(numbers.shape) if n > 1 and numbers.stride(d)]
    if len(several) > 1:
        several = [d for d in several if not torch.equal(numbers, numbers.narrow(d, 0, 1).expand_as(numbers))]
    if not several:
        return None, None
    for d in range(numbers.dim() - 1, -1, -1):
        if d not in several:
            numbers = numbers.select(d, 0)
    grid = numbers.numpy()
    if len(several) == 1:
        return several[0], np.ascontiguousarray(grid)
    run.grids.append(np.unique(grid))
    at = len(several) - (2 if run.grid == "heads" else 1)
    rows = np.moveaxis(grid, at, 0).reshape(grid.shape[at], -1)
    return several[at], run.tie(rows)


def _parts(call: _Call) -> None:
    """`chunk` and `split`: parts of one size stay alike, for that is what is divided by their number."""
    run, (dim,) = call.run, call.dims("dim")
    track, outs = call.tracks[dim], _tensors(call.out)
    sizes = {o.shape[dim] for o in outs}
    if track is not None:
        run.sites.append((np.unique(track), run.stack[-1]))
    if track is not None and len(outs) > 1 and len(sizes) == 1:
        rows = track.reshape(len(outs), -1)
        if not (rows == rows[0]).all():
            run.tie(rows.T)
            run.chunks.append(np.unique(track))
    _moved(call)


def _gated(call: _Call) -> None:
    """`glu`: one half times the other."""
    run, (dim,) = call.run, call.dims("dim")
    tracks = list(call.tracks)
    track = tracks[dim]
    if track is not None:
        tracks[dim] = run.tie(track.reshape(2, -1).T)
        run.chunks.append(np.unique(track))
    run._set(call.first, tracks)


def _joined(call: _Call) -> None:
    """`cat` and `stack`: tracks one behind another along one dimension, joined along the others."""
    run, out = call.run, call.first
    parts = [t for t in call.values["tensors"] if t.dim() == out.dim() or call.name == "stack"]
    dim = call.values["dim"] % out.dim()
    found: list[Track | None] = []
    fixed = f"it meets channels that are not cut ({call.name} in {run._here()})"
    for d in range(out.dim()):
        if d == dim and call.name == "stack":
            found.append(None)
        elif d == dim:
            pieces = [run.of(t)[d] for t in parts]
            zeros = [np.zeros(t.shape[d], np.int64) if p is None else p for t, p in zip(parts, pieces, strict=True)]
            found.append(np.concatenate(zeros))
        else:
            own = d - (d > dim) if call.name == "stack" else d
            found.append(run.join(*(run.of(t)[own] for t in parts), fixed=fixed if out.shape[d] > 1 else None))
    run._set(out, found)


def _same(call: _Call) -> None:
    for tensor in _tensors(call.out):
        call.run._set(tensor, call.tracks)


def _reduced(call: _Call) -> None:
    """Sums, means and norms over dimensions: a track along them ends there, as its channels do."""
    gone = call.dims("dim", "self_dim")
    kept = [t for d, t in enumerate(call.tracks) if d not in gone]
    if call.values.get("keepdim"):
        kept = [None if d in gone else t for d, t in enumerate(call.tracks)]
    for tensor in _tensors(call.out):
        call.run._set(tensor, kept)


def _along_fixed(call: _Call) -> None:
    """Operations along dimensions whose length is part of what they do: softmax, sorting, a transform."""
    gone = call.dims("dim")
    for d in gone:
        call.run.block(call.tracks[d], f"{call.name.strip('_')} runs over its channels ({call.run._here()})")
    for tensor in _tensors(call.out):
        if tensor.dim() == call.x.dim():
            call.run._set(tensor, [None if d in gone else t for d, t in enumerate(call.tracks)])


def _rolled(call: _Call) -> None:
    """Rolled or turned round along dimensions without a track: as it was."""
    if any(call.tracks[d] is not None for d in call.dims("dims")):
        _moved(call)
    else:
        _same(call)


def _spatial(call: _Call) -> None:
    """Pooling, padding, resampling: of positions, which are the last dimensions."""
    run, out = call.run, call.first
    kept = list(call.tracks[: out.dim()])
    count = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 2)
    for d in range(out.dim() - count, out.dim()):
        run.block(kept[d], f"{call.name.strip('_')} changes their number ({run._here()})")
        kept[d] = None
    for tensor in _tensors(call.out):
        run._set(tensor, kept)


def _padded(call: _Call) -> None:
    """`constant_pad_nd`: zeros before and behind, which are places of no channel."""
    dims = {call.x.dim() - 1 - i // 2 for i, n in enumerate(call.values["pad"]) if n}
    if all(call.tracks[d] is None for d in dims):
        _same(call)
    elif call.values["value"] == 0:
        _moved(call)
    else:
        for d in dims:
            call.run.block(call.tracks[d], f"they are padded with {call.values['value']:g} ({call.run._here()})")


def _shuffled(call: _Call) -> None:
    """`pixel_shuffle`: r * r channels become one; `pixel_unshuffle`: one becomes r * r."""
    run, tracks = call.run, list(call.tracks)
    track, times = tracks[-3], int(call.args[1]) ** 2
    if track is not None:
        tracks[-3] = run.tie(track.reshape(-1, times)) if call.name == "pixel_shuffle" else np.repeat(track, times)
    for d in (-1, -2):
        run.block(tracks[d], f"{call.name} changes their number ({run._here()})")
        tracks[d] = None
    run._set(call.first, tracks)


def _unfolded(call: _Call) -> None:
    """`im2col`: (b, c, h, w) -> (b, c * k * k, positions)."""
    run, tracks = call.run, call.tracks
    for d in (2, 3):
        run.block(tracks[d], f"unfold changes their number ({run._here()})")
    channels = tracks[1]
    times = math.prod(call.values["kernel_size"])
    run._set(call.first, [tracks[0], None if channels is None else np.repeat(channels, times), None])


def _indexed(call: _Call) -> None:
    """Places taken by their numbers; numbers that are themselves a layer's outputs are not followed."""
    indices = tree_flatten(call.args[1:])[0]
    if not any(t is not None for t in call.tracks) or any(t is not None for i in indices for t in call.run.of(i)):
        for value in (call.x, *indices):
            for track in call.run.of(value):
                call.run.block(track, f"places are chosen by it ({call.run._here()})")
        return
    _moved(call)


def _looked_up(call: _Call) -> None:
    """`embedding`: (words, width) at (...) -> (..., width)."""
    run = call.run
    run._set(call.first, [*run.of(call.args[1]), run.of(call.args[0])[1]])


# --- products ---------------------------------------------------------------------------------------------------------


def _product(run: _Run, one: Track | None, two: Track | None) -> None:
    """The two sides of a sum of products."""
    run.join(one, two, fixed=f"a product with what is not cut runs over it ({run._here()})")


def _matrix(call: _Call) -> None:
    """`mm`, `bmm` and those with a summand: (.., n, k) (.., k, m) -> (.., n, m)."""
    run, added = call.run, call.name in ("addmm", "baddbmm")
    a, b = (run.of(t) for t in call.args[added : added + 2])
    _product(run, a[-1], b[-2])
    batch = [
        run.join(p, q, fixed="the other side of a product is not cut") for p, q in zip(a[:-2], b[:-2], strict=True)
    ]
    found = [*batch, a[-2], b[-1]]
    if added:
        own = (None,) * len(found) + run.of(call.args[0])
        summand = call.args[0]
        for d in range(1, summand.dim() + 1):
            if summand.shape[-d] == call.first.shape[-d]:
                found[-d] = run.join(found[-d], own[-d], fixed="it is added to what is not cut")
    run._set(call.first, found)


def _attention(call: _Call) -> None:
    """Attention in one operation: (b, heads, n, d) of queries, keys and values, and a mask."""
    run = call.run
    q, k, v = (run.of(t) for t in call.args[:3])
    mask = call.values.get("attn_mask")
    sizes = {t.shape[1] for t in call.args[:3]}
    heads = "heads meet what is not cut"
    if len(sizes) > 1:
        for track in (q[1], k[1], v[1]):
            run.block(track, "queries and keys differ in the number of heads")
    shared = [run.join(q[d], k[d], v[d], fixed=heads) for d in (0, 1)] if len(sizes) == 1 else [q[0], None]
    if isinstance(mask, Tensor):
        for d in (0, 1):
            back = d - 4
            if mask.dim() >= -back and mask.shape[back] > 1:
                shared[d] = run.join(shared[d], run.of(mask)[back], fixed=heads)
    _product(run, q[3], k[3])
    for track in (k[2], v[2]):
        run.block(track, "attention runs over it")
    run._set(call.first, [*shared, q[2], v[3]])


def _convolution(call: _Call) -> None:
    run, values = call.run, call.values
    x, weight, bias, groups = call.args[0], call.args[1], call.args[2], int(values["groups"])
    tracks, name = call.tracks, run.layers.get(id(weight))
    for track in tracks[2:]:
        run.block(track, f"a convolution runs over it ({run._here()})")
    if groups == 1:
        sides = run.of(weight)
        into, out = sides[:2] if values["transposed"] else sides[1::-1]
    elif name is None:
        for track in (*tracks, *run.of(weight)):
            run.block(track, f"the weights of a grouped convolution are made by the network ({run._here()})")
        return
    else:
        out = run.axes[name, "out"]
        into = run.axes.get((name, "in"), out)
        for side in (into, out):
            if not is_depthwise(run.modules[name]):
                run.tie(side.reshape(groups, -1).T)
    if tracks[1] is not None or into is not None:
        fixed = "a convolution with what is not cut runs over it"
        run.join(tracks[1], into, fixed=fixed if x.shape[1] > 1 else None)
    if bias is not None:
        run.join(out, run.of(bias)[0], fixed="its bias is not cut")
    run._set(call.first, [tracks[0], out, *[None] * (x.dim() - 2)])


# --- norms ------------------------------------------------------------------------------------------------------------


def _own(run: _Run, kind: Any) -> Track | None:
    """The channels of the norm that is running, which may have neither weight nor bias."""
    name = run.stack[-1]
    return run.axes.get((name, "out")) if isinstance(run.modules[name], kind) else None


def _normed(call: _Call) -> None:
    """Batch norm, and instance norm, which is one."""
    run, x, tracks = call.run, call.x, list(call.tracks)
    vectors = [t for t in call.args[1:5] if isinstance(t, Tensor) and t.dim() == 1 and len(t) == x.shape[1]]
    at = [run.of(t)[0] for t in vectors]
    if vectors or tracks[1] is not None:
        own = _own(run, nn.modules.batchnorm._NormBase)
        at += [own] if own is not None and len(own) == x.shape[1] else []
        tracks[1] = run.join(tracks[1], *at, fixed="a norm of what is not cut")
    run._set(call.first, tracks)


def _layer_normed(call: _Call) -> None:
    run, tracks, shape = call.run, list(call.tracks), call.values["normalized_shape"]
    own = _own(run, nn.LayerNorm)
    for i in range(1, len(shape) + 1):
        at = [run.of(t)[-i] for t in call.args[2:4] if isinstance(t, Tensor)]
        if own is not None and i == 1 and len(own) == shape[-1]:
            at.append(own)
        if len(shape) > 1:
            run.block(tracks[-i], f"a norm runs over several dimensions ({run._here()})")
        tracks[-i] = run.join(tracks[-i], *at, fixed="a norm of what is not cut")
    run._set(call.first, tracks)


def _group_normed(call: _Call) -> None:
    run, tracks, groups = call.run, list(call.tracks), int(call.values["group"])
    own = _own(run, nn.GroupNorm)
    at = [run.of(t)[0] for t in call.args[1:3] if isinstance(t, Tensor)]
    track = run.join(tracks[1], *at, *([] if own is None else [own]), fixed="a norm of what is not cut")
    if track is not None and groups > 1:
        # As many of each group, or the groups would shift.
        run.tie(track.reshape(groups, -1).T)
    tracks[1] = track
    run._set(call.first, tracks)


def _table() -> dict[str, Any]:
    moved = (
        "view _unsafe_view permute transpose t expand slice select unsqueeze squeeze unbind repeat alias detach"
        " _reshape_alias diagonal index_select movedim unsafe_split repeat_interleave"
    )
    same = "clone contiguous _to_copy lift_fresh zeros_like ones_like empty_like full_like rand_like randn_like"
    same += " dropout native_dropout bernoulli tril triu detach_ relu6 _conj"
    reduced = "sum mean amax amin max min var var_mean std std_mean norm linalg_vector_norm prod logsumexp any all"
    fixed = (
        "_softmax _log_softmax _safe_softmax cumsum cumprod sort topk argmax argmin _fft_r2c _fft_c2c _fft_c2r argsort"
    )
    spatial = (
        "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d"
        " _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d"
        " reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d upsample_nearest1d"
        " upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d"
        " upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d"
        " max_pool1d_with_indices mkldnn_max_pool2d max_pool2d"
    )
    norms = "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm"
    attention = "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math"
    rules = {
        moved: _moved,
        same: _same,
        reduced: _reduced,
        fixed: _along_fixed,
        spatial: _spatial,
        f"{norms} _batch_norm_no_update _batch_norm_with_update": _normed,
        attention: _attention,
        "mm bmm addmm baddbmm": _matrix,
        "cat stack": _joined,
        "split split_with_sizes": _parts,
        "roll flip": _rolled,
        "constant_pad_nd": _padded,
        "pixel_shuffle pixel_unshuffle": _shuffled,
        "convolution _convolution": _convolution,
        "index": _indexed,
        "embedding": _looked_up,
        "native_layer_norm": _layer_normed,
        "native_group_norm": _group_normed,
        "glu": _gated,
        "im2col": _unfolded,
        # torch has no tag on these, or not on what they do in place.
        "copy _prelu_kernel hardswish mish threshold relu6": _pointwise,
    }
    return {name: rule for names, rule in rules.items() for name in names.split()}


_RULES = _table()
