"""What every decoder family has in common: units, integer costs, and how a block is sliced or masked.

A family file says only where it differs. Units of attention are query heads, kept in equal number for every kept
KV group (group of head h = h // (heads / kv_heads)); units of the FFN are neurons.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models.families.ragged import NoAttention, NoFFN, Ragged
from compress.models.families.within import ragged_blocks


@dataclass(frozen=True)
class BlockGeometry:
    """Sizes of one dense block. A sublayer that stays whole counts as one unit: a head as wide as the residual stream,
    or a neuron."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    attention_whole: bool = False
    ffn_whole: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV group."""
        return self.heads // self.kv_heads

    @property
    def inputs(self) -> int:
        """Channels that `o_proj` reads."""
        return self.heads * self.head_dim

    @property
    def widths(self) -> tuple[int, int]:
        """Channels that the two projections read whose inputs are pruned: `o_proj` and `down_proj`."""
        return self.inputs, self.ffn


@dataclass(frozen=True)
class Geometry:
    """A dense decoder: the sizes of each of its blocks, and what stands around them."""

    blocks: tuple[BlockGeometry, ...]
    vocab: int
    tied: bool

    def __post_init__(self) -> None:
        widths = sorted({block.hidden for block in self.blocks})
        if len(widths) != 1:
            raise CompressError(
                f"the blocks are {widths} channels wide; they add to one residual stream, so they must be equally wide",
                where="config.json",
                fix="only what is inside a block may differ from block to block: heads, head size, FFN width",
            )

    @classmethod
    def alike(cls, layers: int, block: BlockGeometry, vocab: int, tied: bool) -> Geometry:
        """A decoder of equal blocks."""
        return cls((block,) * layers, vocab, tied)

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.blocks[0].hidden

    def facts(self) -> dict[str, Any]:
        """Everything by name; of what differs from block to block a list of all blocks' values."""
        own = {name: one_or_all([getattr(block, name) for block in self.blocks]) for name in vars(self.blocks[0])}
        for name in ("attention_whole", "ffn_whole"):
            if own[name] is False:
                del own[name]
        return {"layers": self.layers, **own, "vocab": self.vocab, "tied": self.tied}


@dataclass(frozen=True)
class Whole:
    """A sublayer that is never cut, and why: ``sublayer`` is ``attention`` or ``ffn``."""

    block: int
    sublayer: str
    reason: str


def one_or_all(values: Sequence[int]) -> int | list[int]:
    """The value that all blocks have, or every block's own."""
    return values[0] if len(set(values)) == 1 else list(values)


@dataclass(frozen=True)
class Biases:
    """Which linear layers carry a bias."""

    qkv: bool = False
    o: bool = False
    gate_up: bool = False
    down: bool = False


@dataclass(frozen=True)
class BlockCosts:
    """Exact parameter counts (integers) of one block's linear layers, biases included; of a sublayer that stays whole
    all that it holds but norms.

    Args:
        query: what a query head takes.
        keys: what a KV group takes beside its query heads.
        attention_rest: what attention takes beside its heads, as long as there are any.
        neuron: what a neuron takes.
        ffn_rest: what the FFN takes beside its neurons, as long as there are any.
    """

    geometry: BlockGeometry
    query: int
    keys: int
    attention_rest: int
    neuron: int
    ffn_rest: int

    @classmethod
    def plain(cls, g: BlockGeometry, biases: Biases) -> BlockCosts:
        """Of separate q, k, v, o, gate, up and down (or of layers that hold the same rows)."""
        row = g.hidden + int(biases.qkv)
        return cls(
            g,
            query=g.head_dim * (row + g.hidden),
            keys=2 * g.head_dim * row,
            attention_rest=int(biases.o) * g.hidden,
            neuron=2 * (g.hidden + int(biases.gate_up)) + g.hidden,
            ffn_rest=int(biases.down) * g.hidden,
        )

    def attention(self, groups: int, per_group: int) -> int:
        """Parameters of q, k, v and o with ``groups`` KV groups of ``per_group`` query heads each."""
        if groups == 0 or per_group == 0:
            return 0
        return groups * per_group * self.query + groups * self.keys + self.attention_rest

    def ffn(self, neurons: int) -> int:
        """Parameters of the FFN with ``neurons`` neurons."""
        return neurons * self.neuron + self.ffn_rest if neurons else 0

    @property
    def attention_dense(self) -> int:
        return self.attention(self.geometry.kv_heads, self.geometry.group)

    @property
    def ffn_dense(self) -> int:
        return self.ffn(self.geometry.ffn)

    @property
    def dense(self) -> int:
        return self.attention_dense + self.ffn_dense


@dataclass(frozen=True)
class Costs:
    """Exact parameter counts (integers). The *backbone* is all linear layers of the blocks, biases included;
    embeddings, head and norms are not part of it."""

    geometry: Geometry
    biases: Biases
    total: int  # all parameters of the model, tied ones once
    counted: tuple[BlockCosts, ...] | None = None  # where the biases do not say it all

    @cached_property
    def blocks(self) -> tuple[BlockCosts, ...]:
        if self.counted is not None:
            return self.counted
        return tuple(BlockCosts.plain(block, self.biases) for block in self.geometry.blocks)

    @property
    def neuron(self) -> int:
        """Parameters that a neuron takes, in every block whose FFN is cut: what it is joined to is the residual stream.
        0 where none is."""
        return next((block.neuron for block in self.blocks if not block.geometry.ffn_whole), 0)

    @cached_property
    def backbone(self) -> int:
        return sum(block.dense for block in self.blocks)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear layer that holds just these tensors: ``weight`` (out, in), ``bias`` (out,) or None."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return made


def take_rows(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    """The same layer with only the output ``rows`` (int64)."""
    return linear(layer.weight[rows], None if layer.bias is None else layer.bias[rows])


def spans(indices: Tensor, width: int) -> Tensor:
    """Channel indices of blocks of ``width`` channels: (n,) -> (n * width,)."""
    return (indices[:, None] * width + torch.arange(width)).reshape(-1)


class _Stop(Exception):
    """Ends a forward where a hook has seen what it wanted."""


def alone(given: Any) -> Tensor:
    """What a module gives, or the first of what it gives."""
    found: Tensor = given[0] if isinstance(given, tuple) else given
    return found


def caught(module: nn.Module, run: Callable[[], Any], *, output: bool = False) -> Tensor:
    """The first thing that ``module`` is given in ``run`` (its output instead, with ``output``); what would come behind
    is not computed."""
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    def behind(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen.append(alone(out))
        raise _Stop

    if output:
        handle = module.register_forward_hook(behind)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        run()
    except _Stop:
        pass  # the hook has what it came for
    finally:
        handle.remove()
    return seen[0]


def twin(module: nn.Module) -> nn.Module:
    """A shallow copy: its own table of children, the same parameters."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    made._parameters = dict(module._parameters)
    return made


class Family:
    """Adapter of the plain pre-norm decoder with separate q, k, v, gate and up (Llama and its like)."""

    name: str
    model_types: tuple[str, ...]
    # True: what a sublayer gives is not simply added to the residual stream: a norm stands in between, or both
    # sublayers read the same stream.
    post_norm = False
    residual_scale = 1.0  # what a sublayer's output is multiplied by before it is added
    parallel = False  # True: attention and FFN read the same stream
    block_values = 0  # how many values a block gives; 0: the stream alone
    decoder_layer: str  # class of a block, for the generated modelling file
    causal_lm: str  # class of the model, for the generated modelling file
    module: str  # transformers.models.<module>

    # --- sizes -----------------------------------------------------------------------------------------------

    def geometry(self, config: Any) -> Geometry:
        blocks = tuple(self.block_geometry(config, index) for index in range(config.num_hidden_layers))
        return Geometry(blocks, config.vocab_size, bool(config.tie_word_embeddings))

    def block_geometry(self, config: Any, index: int) -> BlockGeometry:
        """Sizes of dense block ``index``: as the configuration has them for all blocks, or in the block's own entry."""
        own = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config
        return BlockGeometry(
            hidden=own.hidden_size,
            heads=own.num_attention_heads,
            kv_heads=getattr(own, "num_key_value_heads", None) or own.num_attention_heads,
            head_dim=getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads,
            ffn=own.intermediate_size,
        )

    def geometry_of(self, block: Any, index: int) -> BlockGeometry:
        """Sizes of the dense ``block``, which is block ``index`` of its model."""
        return self.block_geometry(block.self_attn.config, index)

    def biases(self, config: Any) -> Biases:
        attention, mlp = bool(getattr(config, "attention_bias", False)), bool(getattr(config, "mlp_bias", False))
        return Biases(qkv=attention, o=attention, gate_up=mlp, down=mlp)

    def costs(self, config: Any) -> Costs:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return Costs(self.geometry(config), self.biases(config), sum(p.numel() for p in model.parameters()))

    def keeps_attention(self, config: Any) -> frozenset[int]:
        """Blocks whose attention must not vanish: the first of each kind, where the KV cache reads the length."""
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return frozenset(kinds.index(kind) for kind in set(kinds))

    def whole(self, config: Any) -> tuple[Whole, ...]:
        """The sublayers that are never cut, in the order of their blocks."""
        return ()

    # --- where things are ------------------------------------------------------------------------------------

    def embedding_device(self, model: Any) -> torch.device:
        """Where the model's activations are."""
        device: torch.device = model.get_input_embeddings().weight.device
        return device

    def o_proj(self, block: Any) -> nn.Linear:
        layer: nn.Linear = block.self_attn.o_proj
        return layer

    def down_proj(self, block: Any) -> nn.Linear:
        layer: nn.Linear = block.mlp.down_proj
        return layer

    def ffn_norm(self, block: Any) -> nn.Module:
        norm: nn.Module = block.post_attention_layernorm
        return norm

    def after_attention(self, block: Any, attention: Tensor) -> Tensor:
        """What is done to attention's output before it is added to the residual stream."""
        return attention

    def after_ffn(self, block: Any, ffn: Tensor) -> Tensor:
        """What is done to the FFN's output before it is added to the residual stream."""
        return ffn

    # --- a block in the pieces where pruning cuts ----------------------------------------------------------------
    # ``kwargs`` are what the model gives its block beside the stream: masks, positions.

    def context(self, block: Any, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What `o_proj` reads: (b, length, heads * head_dim)."""
        return caught(self.o_proj(block), lambda: block(hidden, **kwargs))

    def middle(self, block: Any, hidden: Tensor, attention: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The residual stream between attention and FFN, given `o_proj`'s output (b, length, hidden)."""
        return hidden + self.after_attention(block, attention)

    def activation(self, block: Any, middle: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What `down_proj` reads: (b, length, ffn)."""
        return caught(self.down_proj(block), lambda: block.mlp(self.ffn_norm(block)(middle)))

    def output(self, block: Any, middle: Tensor, ffn: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The residual stream behind the block, given `down_proj`'s output (b, length, hidden)."""
        return middle + self.after_ffn(block, ffn)

    def pruned_layers(self, block: Any) -> dict[str, nn.Linear]:
        """The projections whose inputs are pruned, by sublayer (``attention``, ``ffn``) that is cut."""
        return {"attention": self.o_proj(block), "ffn": self.down_proj(block)}

    # The names in a block of the weights that a plan calls ``o`` and ``down``.
    short_names: Mapping[str, str] = MappingProxyType({"self_attn.o_proj.weight": "o", "mlp.down_proj.weight": "down"})

    def scaled_norm(self, model: Any, scale: float) -> Tensor | None:
        """The last norm's weight (hidden,) with which its output is ``scale`` times what it was; None where no weight
        does that (a norm with a bias, or without a weight)."""
        weight: Tensor = model.model.norm.weight * scale
        return weight

    def replace_norm(self, model: Any, weight: Tensor) -> None:
        """Gives ``model`` a last norm with this weight; a model that shares the old one keeps it."""
        old = model.model.norm.weight
        model.model.norm = twin(model.model.norm)
        model.model.norm.weight = nn.Parameter(weight.to(old), requires_grad=False)

    # --- surgery ---------------------------------------------------------------------------------------------

    def slice_queries(self, attention: Any, heads: Tensor, groups: Tensor, dense: BlockGeometry) -> None:
        """Replaces q, k and v in ``attention`` (a shallow copy) by the rows of ``heads`` and KV ``groups``."""
        attention.q_proj = take_rows(attention.q_proj, spans(heads, dense.head_dim))
        attention.k_proj = take_rows(attention.k_proj, spans(groups, dense.head_dim))
        attention.v_proj = take_rows(attention.v_proj, spans(groups, dense.head_dim))

    def slice_gate_up(self, mlp: Any, neurons: Tensor) -> None:
        """Replaces gate and up in ``mlp`` (a shallow copy) by the rows of ``neurons``."""
        mlp.gate_proj = take_rows(mlp.gate_proj, neurons)
        mlp.up_proj = take_rows(mlp.up_proj, neurons)

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
        """A really smaller copy of ``block``; what is not touched is shared with it, ``block`` stays as it is.

        Args:
            heads: original indices of the query heads that stay, sorted, equally many in every kept KV group;
                None leaves them all; empty removes attention.
            neurons: original indices of the FFN neurons that stay, sorted; None leaves all; empty removes the FFN.
            o_weight: (hidden, len(heads) * head_dim), the refitted `o_proj`; its own columns where None.
            down_weight: (hidden, len(neurons)), likewise `down_proj`.
            others: any other parameters of the smaller block, by their names in it and in the shapes they have there.
        """
        made: Any = twin(block)
        old: Any = block
        config = old.self_attn.config
        g = self.block_geometry(config, old.self_attn.layer_idx)
        if heads is not None and len(heads) == 0:
            made.self_attn = NoAttention()
        elif heads is not None or o_weight is not None:
            heads = torch.arange(g.heads) if heads is None else heads
            groups = torch.unique(heads // g.group)
            attention: Any = twin(old.self_attn)
            if len(heads) < g.heads:
                self.slice_queries(attention, heads, groups, g)
                # Some families read their head counts from the config while they run.
                attention.config = copy.copy(config)
                attention.config.num_attention_heads, attention.config.num_key_value_heads = len(heads), len(groups)
                attention.num_key_value_groups = len(heads) // len(groups)
                if hasattr(attention, "num_key_value_heads"):
                    attention.num_key_value_heads = len(groups)
            o = self.o_proj(old)
            weight = o.weight[:, spans(heads, g.head_dim)] if o_weight is None else o_weight.to(o.weight)
            attention.o_proj = linear(weight, o.bias)
            made.self_attn = attention
        if neurons is not None and len(neurons) == 0:
            made.mlp = NoFFN()
        elif neurons is not None or down_weight is not None:
            neurons = torch.arange(g.ffn) if neurons is None else neurons
            mlp: Any = twin(old.mlp)
            if len(neurons) < g.ffn:
                self.slice_gate_up(mlp, neurons)
            down = self.down_proj(old)
            weight = down.weight[:, neurons] if down_weight is None else down_weight.to(down.weight)
            mlp.down_proj = linear(weight, down.bias)
            made.mlp = mlp
        put_others(made, others)
        pruned: nn.Module = made
        return pruned

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
        """The same function as `sliced`, at full shape: columns that read removed units are zero."""
        made: Any = twin(block)
        old: Any = block
        g = self.block_geometry(old.self_attn.config, old.self_attn.layer_idx)
        if heads is not None or o_weight is not None:
            heads = torch.arange(g.heads) if heads is None else heads
            made.self_attn = twin(old.self_attn)
            made.self_attn.o_proj = masked_columns(self.o_proj(old), spans(heads, g.head_dim), o_weight)
        if neurons is not None or down_weight is not None:
            neurons = torch.arange(g.ffn) if neurons is None else neurons
            made.mlp = twin(old.mlp)
            made.mlp.down_proj = masked_columns(self.down_proj(old), neurons, down_weight)
        if others:
            put_masked(made, others, self.kept_rows(block, heads, neurons))
        full: nn.Module = made
        return full

    def kept_rows(self, block: nn.Module, heads: Tensor | None, neurons: Tensor | None) -> dict[str, Tensor]:
        """Which rows (int64) of the dense block each parameter of the sliced one holds, by the parameter's name.

        The weights that `o_weight` and `down_weight` give, whose columns are sliced instead, are not among them.
        """
        # The family's own slicing, done to row numbers: what it does to fused layers needs no second telling.
        numbered: Any = row_numbers(block)
        one = torch.zeros(1, 1)
        made = self.sliced(numbered, heads=heads, neurons=neurons, o_weight=one, down_weight=one)
        columns = set()
        if not isinstance(made.self_attn, NoAttention):  # type: ignore[attr-defined]
            columns.add(id(self.o_proj(made).weight))
        if not isinstance(made.mlp, NoFFN):  # type: ignore[attr-defined]
            columns.add(id(self.down_proj(made).weight))
        return {n: p.detach().reshape(-1) for n, p in made.named_parameters() if id(p) not in columns}

    # --- models whose layers differ ------------------------------------------------------------------------------

    def ragged_class(self) -> type:
        """The class that builds and loads a model with `per_layer_config`."""
        transformers = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        base, layer = getattr(transformers, self.causal_lm), getattr(transformers, self.decoder_layer)
        return type(f"Compressed{self.causal_lm}", (Ragged, base), {"layer_class": layer, "__module__": __name__})

    def ragged_source(self) -> str:
        """The same class as a file to be saved beside the weights."""
        source = inspect.getsource(sys.modules[Ragged.__module__])
        module = f"transformers.models.{self.module}.modeling_{self.module}"
        imports = f"from {module} import {self.causal_lm}, {self.decoder_layer}"
        return (
            source.replace("from torch import nn\n", f"from torch import nn\n{imports}\n", 1)
            + f"\n\nclass Compressed{self.causal_lm}(Ragged, {self.causal_lm}):\n"
            + f"    layer_class = {self.decoder_layer}\n"
        )

    def within_source(self, title: str, module: str) -> str:
        """Code to be saved beside a checkpoint of transformers' class ``title`` in ``module``, of which a language
        model of this family is a part."""
        return within_source(self.ragged_source(), ragged_blocks, title, module)

    def write_layers(self, config: dict[str, Any], layers: Sequence[tuple[int, int, int]], dense: Geometry) -> None:
        """Says in ``config``, which is to be config.json, how large every block is.

        Args:
            layers: (query heads, KV groups, neurons) of every block.
        """
        entries = config.pop("per_layer_config", {})  # a dense model's own, where its blocks differ
        for i, (layer, block) in enumerate(zip(layers, dense.blocks, strict=True)):
            if layer != (block.heads, block.kv_heads, block.ffn):
                entries[str(i)] = {**entries.get(str(i), {}), **self.layer_overrides(*layer)}
        config["per_layer_config"] = entries
        # Without it some families take hidden / heads, which a layer with fewer heads gets wrong.
        if all(block.head_dim == dense.blocks[0].head_dim for block in dense.blocks):
            config["head_dim"] = dense.blocks[0].head_dim
        config["allow_global_per_layer_attribute_access"] = True

    def layer_overrides(self, heads: int, groups: int, neurons: int) -> dict[str, Any]:
        """A block's entry in `per_layer_config`."""
        overrides: dict[str, Any] = {}
        skip = []
        if heads:
            overrides.update(num_attention_heads=heads, num_key_value_heads=groups)
        else:
            skip.append("attention")
        if neurons:
            overrides["intermediate_size"] = neurons
        else:
            skip.append("mlp")
        return {**overrides, "skip": skip} if skip else overrides


def within_source(alone: str, blocks: Callable[..., None], title: str, module: str) -> str:
    """``alone``, the code of a language model by itself, and behind it a class of the checkpoint it is a part of."""
    return (
        alone.replace("from torch import nn\n", f"from torch import nn\nfrom {module} import {title}\n", 1)
        + f"\n\n{inspect.getsource(blocks)}"
        + f"\n\nclass Compressed{title}({title}):\n"
        "    def __init__(self, config):  # type: ignore[no-untyped-def]\n"
        "        super().__init__(config)\n"
        "        own = self.get_decoder()\n"
        '        layers = next(getattr(own, name) for name in ("layers", "h", "blocks") if hasattr(own, name))\n'
        f"        {blocks.__name__}(layers, config.text_config)\n"
        "        self.post_init()\n\n"
        "    # Its weights are called as those of the class above are, which transformers renames when it loads them.\n"
        "    @classmethod\n"
        "    def is_custom_code(cls):  # type: ignore[no-untyped-def]\n"
        "        return False\n"
    )


def masked_columns(layer: nn.Linear, columns: Tensor, weight: Tensor | None) -> nn.Linear:
    """The same layer with zeros in all but ``columns`` (int64), which hold their own or ``weight`` (out, columns);
    without any of them there is no bias either."""
    full = torch.zeros_like(layer.weight)
    full[:, columns] = layer.weight[:, columns] if weight is None else weight.to(layer.weight)
    bias = layer.bias if len(columns) or layer.bias is None else torch.zeros_like(layer.bias)
    return linear(full, bias)


def put_others(made: nn.Module, others: Mapping[str, Tensor] | None) -> None:
    """Replaces parameters of a sliced block (a twin), by their names and in the shapes they have in it.

    Raises:
        CompressError: there is no such parameter, or it has another shape.
    """
    for name, tensor in (others or {}).items():
        had = _parameter(made, name)
        if tensor.shape != had.shape:
            _refuse(name, f"is {tuple(tensor.shape)}, not {tuple(had.shape)}")
        _put(made, name, tensor.to(had))


def put_masked(made: nn.Module, others: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
    """The same at full shape: ``rows`` are those of the dense block that the sliced one's parameters hold."""
    for name, tensor in others.items():
        if name not in rows:
            _refuse(name, "has no place in the block")
        dense = _parameter(made, name)
        if tensor.shape != (len(rows[name]), *dense.shape[1:]):
            _refuse(name, f"is {tuple(tensor.shape)}, not {(len(rows[name]), *dense.shape[1:])}")
        whole = dense.detach().clone()
        whole[rows[name]] = tensor.to(whole)
        _put(made, name, whole)


def row_numbers(block: nn.Module) -> nn.Module:
    """A copy of ``block`` whose parameters hold their rows' numbers."""
    return copy.deepcopy(block, {id(p): _numbers(p) for p in block.parameters()})


def _numbers(parameter: nn.Parameter) -> nn.Parameter:
    """A stand-in that holds its row numbers: (rows, 1) int64 for a matrix, (rows,) for a vector."""
    rows = torch.arange(len(parameter))
    return nn.Parameter(rows[:, None] if parameter.dim() > 1 else rows, requires_grad=False)


def _parameter(block: nn.Module, name: str) -> Tensor:
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, nn.Parameter):
        _refuse(name, "has no place in the block")
    return found  # type: ignore[no-any-return]


def _put(block: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter of ``block`` (a twin); modules on the way are copied, so that no other block sees it."""
    *path, last = name.split(".")
    module = block
    for part in path:
        module._modules[part] = twin(module._modules[part])  # type: ignore[arg-type]
        module = module._modules[part]  # type: ignore[assignment]
    module._parameters[last] = nn.Parameter(tensor.contiguous(), requires_grad=False)


def _refuse(name: str, what: str) -> None:
    raise CompressError(
        f"the weight {name} {what}", where="plan.safetensors", fix="apply the plan to the model it was made for"
    )
