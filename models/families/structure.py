"""A family that nobody has written down: a decoder whose parts are found by `parts` and proven by `proof`.

It runs a block in pieces without knowing what is between them (norms, scales, sums): the block's own forward is run
with its sublayers replaced by modules that give what they are told to.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models import decoder
from compress.models.families.base import (
    Biases,
    BlockCosts,
    BlockGeometry,
    Costs,
    Family,
    Geometry,
    Whole,
    alone,
    caught,
    linear,
    masked_columns,
    put_masked,
    put_others,
    row_numbers,
    spans,
    take_rows,
    twin,
    within_source,
)
from compress.models.families.parts import FFN, Attention, Parts, Stays
from compress.models.families.resized import Nothing, Resized
from compress.models.families.within import resized_blocks


class _Gives(nn.Module):
    """Stands for a sublayer and gives what it was told to, as one of so many values (0: alone)."""

    def __init__(self, value: Tensor, values: int) -> None:
        super().__init__()
        self._value, self._values = value, values

    def forward(self, *_: Any, **__: Any) -> Any:
        return (self._value, *[None] * (self._values - 1)) if self._values else self._value


def put(block: nn.Module, path: str, made: nn.Module) -> None:
    """Replaces a module of ``block`` (a twin); those on the way are copied, so that no other block sees it."""
    *way, last = path.split(".")
    holder = block
    for part in way:
        holder._modules[part] = twin(holder._modules[part])  # type: ignore[arg-type]
        holder = holder._modules[part]  # type: ignore[assignment]
    holder._modules[last] = made


def block_costs(block: nn.Module, parts: Parts, geometry: BlockGeometry) -> BlockCosts:
    """Counted from the modules of ``block`` (whose weights need not be there)."""
    attention, ffn = parts.attention, parts.ffn
    layer = dict(block.named_modules())
    if isinstance(attention, Attention):
        out: Any = layer[attention.out]
        query = attention.head_dim * out.out_features
        keys, rest = 0, _bias(out)
        for name, what in attention.rows:
            one: Any = layer[name]
            row = attention.head_dim * (one.in_features + int(one.bias is not None))
            query += row if what != "kv" else 0
            keys += {"q": 0, "kv": row}.get(what, 2 * row)
    else:
        query, keys, rest = 0, 0, held(layer[attention.place])
    if isinstance(ffn, FFN):
        down: Any = layer[ffn.down]
        ups: list[tuple[Any, int]] = [(layer[name], copies) for name, copies in ffn.rows]
        neuron = down.out_features + sum(n * (m.in_features + int(m.bias is not None)) for m, n in ups)
        return BlockCosts(geometry, query, keys, rest, neuron, _bias(down))
    return BlockCosts(geometry, query, keys, rest, 0, held(layer[ffn.place]))


def _bias(layer: nn.Linear) -> int:
    return 0 if layer.bias is None else layer.bias.numel()


def held(module: nn.Module) -> int:
    """Parameters of a sublayer that stays whole: all its matrices, and the biases of its linear layers."""
    matrices = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    return matrices + sum(_bias(m) for m in module.modules() if isinstance(m, nn.Linear))


def geometry_of(parts: Parts) -> BlockGeometry:
    attention, ffn = parts.attention, parts.ffn
    known = isinstance(attention, Attention)
    return BlockGeometry(
        hidden=parts.hidden,
        heads=attention.heads if known else 1,  # type: ignore[union-attr]
        kv_heads=attention.kv_heads if known else 1,  # type: ignore[union-attr]
        head_dim=attention.head_dim if known else parts.hidden,  # type: ignore[union-attr]
        ffn=ffn.width if isinstance(ffn, FFN) else 1,
        attention_whole=not known,
        ffn_whole=isinstance(ffn, Stays),
    )


@dataclass(eq=False)
class ByStructure(Family):
    """The adapter of one configuration.

    Args:
        parts: of every block.
        counted: what its sublayers take, of every block.
        unit_offset: of the last norm: 0 where its output is its weight times something, 1 where 1 + its weight; None
            where it has a bias, or no weight.
        keeps: blocks whose attention must not vanish.
        names: of the parameters of every block.
    """

    name: str
    module: str
    causal_lm: str
    decoder_layer: str
    parts: tuple[Parts, ...]
    counted: tuple[BlockCosts, ...]
    names: tuple[frozenset[str], ...]
    total: int
    vocab: int
    tied: bool
    keeps: frozenset[int] = frozenset()
    post_norm: bool = True
    residual_scale: float = 1.0
    parallel: bool = False
    unit_offset: float | None = None
    block_values: int = 0
    model_types: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.model_types = (self.name,)
        names = {}
        for one in self.parts:
            if isinstance(one.attention, Attention):
                names[f"{one.attention.out}.weight"] = "o"
            if isinstance(one.ffn, FFN):
                names[f"{one.ffn.down}.weight"] = "down"
        self.short_names = names

    # --- sizes -----------------------------------------------------------------------------------------------

    def geometry(self, config: Any) -> Geometry:
        return Geometry(tuple(geometry_of(p) for p in self.parts), self.vocab, self.tied)

    def geometry_of(self, block: Any, index: int) -> BlockGeometry:
        return geometry_of(self.parts[index])

    def block_geometry(self, config: Any, index: int) -> BlockGeometry:
        return geometry_of(self.parts[index])

    def costs(self, config: Any) -> Costs:
        return Costs(self.geometry(config), Biases(), self.total, self.counted)

    def keeps_attention(self, config: Any) -> frozenset[int]:
        return self.keeps

    def whole(self, config: Any) -> tuple[Whole, ...]:
        return tuple(
            Whole(i, kind, one.reason)
            for i, parts in enumerate(self.parts)
            for kind, one in (("attention", parts.attention), ("ffn", parts.ffn))
            if isinstance(one, Stays)
        )

    # --- where things are ------------------------------------------------------------------------------------

    def of(self, block: nn.Module) -> Parts:
        """The parts of ``block``, told by its own number or by the names of its parameters.

        Raises:
            CompressError: neither tells them.
        """
        index = index_of(block)
        if index is not None:
            return self.parts[index]
        names = frozenset(name for name, _ in block.named_parameters())
        alike = {one for one, mine in zip(self.parts, self.names, strict=True) if mine == names}
        if len(alike) != 1:
            raise CompressError(
                f"a block ({type(block).__name__}) does not know which one it is",
                where=f"{self.name}: layer_idx",
                fix="its blocks differ, so this must be known; prune another model",
            )
        return alike.pop()

    def pruned_layers(self, block: Any) -> dict[str, nn.Linear]:
        parts, found = self.of(block), {}
        if isinstance(parts.attention, Attention):
            found["attention"] = block.get_submodule(parts.attention.out)
        if isinstance(parts.ffn, FFN):
            found["ffn"] = block.get_submodule(parts.ffn.down)
        return found

    def o_proj(self, block: Any) -> nn.Linear:
        return self.pruned_layers(block)["attention"]

    def down_proj(self, block: Any) -> nn.Linear:
        return self.pruned_layers(block)["ffn"]

    # --- a block in pieces ---------------------------------------------------------------------------------------

    def _stream(self, hidden: Tensor) -> Tensor:
        """The residual stream of what the pieces hand on: all of it, or its first half."""
        return hidden[..., : hidden.shape[-1] // 2] if self.parallel else hidden

    def context(self, block: Any, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        attention = self.of(block).attention
        if isinstance(attention, Attention):
            return caught(block.get_submodule(attention.out), lambda: block(self._stream(hidden), **kwargs))
        return caught(block.get_submodule(attention.place), lambda: block(self._stream(hidden), **kwargs), output=True)

    def middle(self, block: Any, hidden: Tensor, attention: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        if self.parallel:
            return torch.cat([self._stream(hidden), attention], -1)
        parts = self.of(block)
        made = twin(block)
        made._modules[parts.attention.place] = _Gives(attention, parts.attention_values)
        behind = made.get_submodule(parts.ffn_norm or parts.ffn.place)
        return caught(behind, lambda: made(hidden, **kwargs))

    def activation(self, block: Any, middle: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        parts = self.of(block)
        read = self._stream(middle)
        read = block.get_submodule(parts.ffn_norm)(read) if parts.ffn_norm else read
        ffn = block.get_submodule(parts.ffn.place)
        if isinstance(parts.ffn, FFN):
            return caught(block.get_submodule(parts.ffn.down), lambda: ffn(read))
        return alone(ffn(read))

    def output(self, block: Any, middle: Tensor, ffn: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        parts = self.of(block)
        stream = self._stream(middle)
        # In sequence the middle is where the block starts from, and attention has nothing more to add.
        attention = middle[..., stream.shape[-1] :] if self.parallel else torch.zeros_like(middle)
        made = twin(block)
        made._modules[parts.attention.place] = _Gives(attention, parts.attention_values)
        made._modules[parts.ffn.place] = _Gives(ffn, parts.ffn_values)
        out = alone(made(stream, **kwargs))
        return torch.cat([out, torch.zeros_like(out)], -1) if self.parallel else out

    # --- the last norm -------------------------------------------------------------------------------------------

    def scaled_norm(self, model: Any, scale: float) -> Tensor | None:
        if self.unit_offset is None:
            return None
        weight: Any = decoder.norm_of(model).weight
        scaled: Tensor = (weight + self.unit_offset) * scale - self.unit_offset
        return scaled

    def replace_norm(self, model: Any, weight: Tensor) -> None:
        name = decoder.norm_name(model)
        made: Any = twin(decoder.norm_of(model))
        made.weight = nn.Parameter(weight.to(made.weight), requires_grad=False)
        decoder.body(model)._modules[name] = made

    # --- surgery -------------------------------------------------------------------------------------------------

    def _refuse_whole(self, one: Any, units: Tensor | None, what: str) -> None:
        if isinstance(one, Stays) and units is not None:
            raise CompressError(
                f"{one.place} stays whole: {one.reason}",
                where=f"{self.name}: {what}",
                fix="take a plan that leaves it as it is",
            )

    def sliced(
        self,
        block: nn.Module,
        *,
        heads: Tensor | None,
        neurons: Tensor | None,
        o_weight: Tensor | None = None,
        down_weight: Tensor | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        parts, made = self.of(block), twin(block)
        self._refuse_whole(parts.attention, heads, "attention")
        self._refuse_whole(parts.ffn, neurons, "ffn")
        if isinstance(parts.attention, Attention):
            self._slice_attention(made, block, parts, heads, o_weight)
        if isinstance(parts.ffn, FFN):
            self._slice_ffn(made, block, parts, neurons, down_weight)
        put_others(made, others)
        return made

    def _slice_attention(
        self, made: nn.Module, block: nn.Module, parts: Parts, heads: Tensor | None, o_weight: Tensor | None
    ) -> None:
        one = parts.attention
        assert isinstance(one, Attention)  # asked by the caller
        if heads is not None and not len(heads):
            put(made, one.place, Nothing(parts.attention_values))
            return
        if heads is None and o_weight is None:
            return
        heads = torch.arange(one.heads) if heads is None else heads
        if len(heads) < one.heads:
            groups = len(torch.unique(heads // one.group))
            for name, what in one.rows:
                put(made, name, take_rows(block.get_submodule(name), one.kept(what, heads)))  # type: ignore[arg-type]
            put(made, one.place, twin(made.get_submodule(one.place)))
            for name, what in one.numbers:
                holder, _, last = name.rpartition(".")
                setattr(made.get_submodule(holder), last, one.count(what, len(heads), groups))
            attention: Any = made.get_submodule(one.place)
            if hasattr(attention, "config"):
                # Some families read their head counts from the config while they run.
                attention.config = copy.copy(attention.config)
                attention.config.num_attention_heads, attention.config.num_key_value_heads = len(heads), groups
        out: Any = block.get_submodule(one.out)
        weight = out.weight[:, spans(heads, one.head_dim)] if o_weight is None else o_weight.to(out.weight)
        put(made, one.out, linear(weight, out.bias))

    def _slice_ffn(
        self, made: nn.Module, block: nn.Module, parts: Parts, neurons: Tensor | None, down_weight: Tensor | None
    ) -> None:
        one = parts.ffn
        assert isinstance(one, FFN)  # asked by the caller
        if neurons is not None and not len(neurons):
            put(made, one.place, Nothing(parts.ffn_values))
            return
        if neurons is None and down_weight is None:
            return
        neurons = torch.arange(one.width) if neurons is None else neurons
        if len(neurons) < one.width:
            for name, copies in one.rows:
                layer: Any = block.get_submodule(name)
                put(made, name, take_rows(layer, one.kept(copies, neurons)))
        down: Any = block.get_submodule(one.down)
        weight = down.weight[:, neurons] if down_weight is None else down_weight.to(down.weight)
        put(made, one.down, linear(weight, down.bias))

    def masked(
        self,
        block: nn.Module,
        *,
        heads: Tensor | None,
        neurons: Tensor | None,
        o_weight: Tensor | None = None,
        down_weight: Tensor | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        parts, made = self.of(block), twin(block)
        self._refuse_whole(parts.attention, heads, "attention")
        self._refuse_whole(parts.ffn, neurons, "ffn")
        if isinstance(parts.attention, Attention) and (heads is not None or o_weight is not None):
            one = parts.attention
            heads = torch.arange(one.heads) if heads is None else heads
            out: Any = block.get_submodule(one.out)
            put(made, one.out, masked_columns(out, spans(heads, one.head_dim), o_weight))
        if isinstance(parts.ffn, FFN) and (neurons is not None or down_weight is not None):
            neurons = torch.arange(parts.ffn.width) if neurons is None else neurons
            down: Any = block.get_submodule(parts.ffn.down)
            put(made, parts.ffn.down, masked_columns(down, neurons, down_weight))
        if others:
            put_masked(made, others, self.kept_rows(block, heads, neurons))
        return made

    def kept_rows(self, block: nn.Module, heads: Tensor | None, neurons: Tensor | None) -> dict[str, Tensor]:
        parts, one = self.of(block), torch.zeros(1, 1)
        numbered = row_numbers(block)
        made = self.sliced(
            numbered,
            heads=heads,
            neurons=neurons,
            o_weight=one if isinstance(parts.attention, Attention) else None,
            down_weight=one if isinstance(parts.ffn, FFN) else None,
        )
        columns = {name for name, short in self.short_names.items() if short in ("o", "down")}
        return {n: p.detach().reshape(-1) for n, p in made.named_parameters() if n not in columns}

    # --- models whose layers differ ------------------------------------------------------------------------------

    def ragged_class(self) -> type:
        base = getattr(sys.modules[self._modelling()], self.causal_lm)
        return type(f"Compressed{self.causal_lm}", (Resized, base), {"__module__": __name__})

    def _modelling(self) -> str:
        return f"transformers.models.{self.module}.modeling_{self.module}"

    def ragged_source(self) -> str:
        source = inspect.getsource(sys.modules[Resized.__module__])
        imports = f"from {self._modelling()} import {self.causal_lm}"
        return (
            source.replace("from torch import nn\n", f"from torch import nn\n{imports}\n", 1)
            + f"\n\nclass Compressed{self.causal_lm}(Resized, {self.causal_lm}):\n    pass\n"
        )

    def within_source(self, title: str, module: str) -> str:
        return within_source(self.ragged_source(), resized_blocks, title, module)

    def write_layers(self, config: dict[str, Any], layers: Sequence[tuple[int, int, int]], dense: Geometry) -> None:
        entries = {}
        for i, ((heads, groups, neurons), parts) in enumerate(zip(layers, self.parts, strict=True)):
            entry = _entry(parts, heads, groups, neurons)
            if entry:
                entries[str(i)] = entry
        config["compress_layers"] = entries


def written_sizes(family: ByStructure, config: Any, index: int) -> tuple[int, int, int]:
    """(query heads, KV groups, neurons) of a block by its entry in `compress_layers`; 0 of what is not there at all."""
    entry, parts = config.compress_layers.get(str(index), {}), family.parts[index]
    block = family.block_geometry(config, index)
    heads, groups, neurons = block.heads, block.kv_heads, block.ffn
    gone = entry.get("gone", {})
    if isinstance(parts.attention, Attention):
        heads, groups = entry.get("heads", {}).get(parts.attention.place, (heads, groups))
        heads, groups = (0, 0) if parts.attention.place in gone else (heads, groups)
    if isinstance(parts.ffn, FFN):
        neurons = 0 if parts.ffn.place in gone else entry.get("linear", {}).get(parts.ffn.down, (0, neurons))[1]
    return heads, groups, neurons


def index_of(block: nn.Module) -> int | None:
    """The number that a block, or a module in it, was given; None where it was given none."""
    found: list[Any] = [getattr(module, "layer_idx", None) for module in block.modules()]
    return next((index for index in found if type(index) is int), None)


def _entry(parts: Parts, heads: int, groups: int, neurons: int) -> dict[str, Any]:
    """A block's entry in `compress_layers`: nothing of what is as the dense block has it."""
    sizes: dict[str, list[int]] = {}
    numbers: dict[str, int] = {}
    gone: dict[str, int] = {}
    entry: dict[str, Any] = {}
    attention, ffn = parts.attention, parts.ffn
    if isinstance(attention, Attention) and not heads:
        gone[attention.place] = parts.attention_values
    elif isinstance(attention, Attention) and heads < attention.heads:
        d = attention.head_dim
        rows = {"q": heads, "kv": groups}
        for name, what in attention.rows:
            sizes[name] = [d * rows.get(what, heads + 2 * groups), parts.hidden]
        sizes[attention.out] = [parts.hidden, heads * d]
        numbers = {name: attention.count(what, heads, groups) for name, what in attention.numbers}
        entry["heads"] = {attention.place: [heads, groups]}
    if isinstance(ffn, FFN) and not neurons:
        gone[ffn.place] = parts.ffn_values
    elif isinstance(ffn, FFN) and neurons < ffn.width:
        sizes.update({name: [copies * neurons, parts.hidden] for name, copies in ffn.rows})
        sizes[ffn.down] = [parts.hidden, neurons]
    for key, value in (("linear", sizes), ("numbers", numbers), ("gone", gone)):
        if value:
            entry[key] = value
    return entry
