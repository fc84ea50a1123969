"""What a decoder's blocks are made of, told by names, shapes and order alone: no family is named here.

Two sublayers are looked for in every block: what mixes tokens, and what follows it, each a module with matrices of its
own. One that is made of parts that pruning knows how to cut is an `Attention` or a `FFN`; another `Stays`, for a
reason.
What is found here is a guess until `compress.models.families.proof` has run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.families.base import spans

MIXERS = (
    "self_attn", "attention", "attn", "self_attention", "linear_attn", "mamba", "temporal_block", "conv", "mixer",
)  # fmt: skip
FFNS = ("mlp", "feed_forward", "ffn", "shared_mlp", "mlp_block", "block_sparse_moe", "moe")
QUERIES, KEYS, VALUES = ("q_proj",), ("k_proj",), ("v_proj",)
FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")
OUTPUTS = ("o_proj", "out_proj", "dense", "Wo", "c_proj")
# Sizes that attention modules keep for themselves, and what they count.
NUMBERS = {
    "num_heads": "heads", "num_attention_heads": "heads", "n_heads": "heads", "n_head": "heads",
    "num_key_value_heads": "kv_heads", "num_kv_heads": "kv_heads", "n_kv_heads": "kv_heads",
    "num_key_value_groups": "group", "num_kv_groups": "group", "n_rep": "group",
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """Attention whose heads can be cut. Names are those in the block.

    Args:
        out: the projection whose inputs are the heads' outputs.
        rows: the layers whose rows are heads, with what they are: ``q``, ``kv``, or of fused ones ``qkv`` (all queries,
            all keys, all values) or ``by group`` (each KV group's queries, key and value together).
        numbers: sizes that modules keep for themselves, with what they count.
    """

    place: str
    out: str
    rows: tuple[tuple[str, str], ...]
    heads: int
    kv_heads: int
    head_dim: int
    numbers: tuple[tuple[str, str], ...]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def kept(self, what: str, heads: Tensor) -> Tensor:
        """The rows (int64) of a layer of ``what`` that belong to the query heads ``heads``."""
        groups = torch.unique(heads // self.group)
        d = self.head_dim
        if what == "q":
            return spans(heads, d)
        if what == "kv":
            return spans(groups, d)
        if what == "qkv":
            keys = self.heads * d + spans(groups, d)
            return torch.cat([spans(heads, d), keys, self.kv_heads * d + keys])
        units = [
            g * (self.group + 2)
            + torch.cat([heads[heads // self.group == g] % self.group, self.group + torch.arange(2)])
            for g in groups
        ]
        return spans(torch.cat(units), d)

    def count(self, what: str, heads: int, groups: int) -> int:
        return {"heads": heads, "kv_heads": groups, "group": heads // groups}[what]


@dataclass(frozen=True)
class FFN:
    """A FFN whose neurons can be cut: ``rows`` are the layers whose rows are neurons, with how often each has them:
    twice where gate and up are one layer, one behind the other."""

    place: str
    down: str
    rows: tuple[tuple[str, int], ...]
    width: int

    def kept(self, copies: int, neurons: Tensor) -> Tensor:
        return torch.cat([n * self.width + neurons for n in range(copies)])


@dataclass(frozen=True)
class Stays:
    """A sublayer that is not cut."""

    place: str
    reason: str


@dataclass(frozen=True)
class Parts:
    """One block. What `proof.trace` sees when the block runs: the norm in front of the FFN (empty: there is none), and
    how many values the two sublayers give (0: a tensor)."""

    hidden: int
    attention: Attention | Stays
    ffn: FFN | Stays
    ffn_norm: str = ""
    attention_values: int = 0
    ffn_values: int = 0


def parts_of(block: nn.Module, config: Any, hidden: int) -> Parts | str:
    """The parts of ``block``, or in words why they are not to be told."""
    children = [name for name, child in block.named_children() if any(p.dim() > 1 for p in child.parameters())]
    mixers = [name for name in children if name in MIXERS]
    ffns = [name for name in children if name in FFNS]
    if len(mixers) != 1 or len(ffns) != 1:
        return (
            f"a block ({type(block).__name__}) holds {', '.join(children) or 'no matrix'}:"
            f" {'nothing' if not mixers else ' and '.join(mixers)} to mix tokens and"
            f" {'nothing' if not ffns else ' and '.join(ffns)} behind it, where one of each is known how to be run"
        )
    attention, ffn = block.get_submodule(mixers[0]), block.get_submodule(ffns[0])
    return Parts(hidden, _attention(attention, mixers[0], config, hidden), _ffn(ffn, ffns[0], hidden))


def _only(module: nn.Module, names: tuple[str, ...]) -> str:
    """Which of ``names`` is a linear layer of ``module``; empty where none or several are."""
    found = [name for name in names if isinstance(getattr(module, name, None), nn.Linear)]
    return found[0] if len(found) == 1 else ""


def _attention(module: Any, place: str, config: Any, hidden: int) -> Attention | Stays:
    if any(isinstance(m, nn.Conv1d) for m in module.modules()) or any(
        "A_log" in n for n, _ in module.named_parameters()
    ):
        return Stays(
            place, f"a convolution or a linear attention, whose channels are not separate heads ({_class(module)})"
        )
    q, k, v, fused = (_only(module, names) for names in (QUERIES, KEYS, VALUES, FUSED))
    out = _only(module, OUTPUTS)
    if out and q and not k and not v and not fused:
        linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        if len(linear) == 2:
            return Stays(place, "its keys and values are another block's")
    if not out or not (fused or (q and k and v)):
        latent = next((n for n, _ in module.named_children() if n.startswith("kv_a")), "")
        if latent:
            return Stays(place, f"keys and values of all heads come from one latent ({latent})")
        return Stays(place, f"its parts are not those of an attention of separate heads ({_class(module)})")
    # Modules that keep no head size of their own have that of the configuration, or an even share of the stream.
    head_dim = getattr(module, "head_dim", None) or config.to_dict().get("head_dim")
    head_dim = head_dim or hidden // (getattr(module, "num_heads", None) or config.num_attention_heads)
    inputs = getattr(module, out).in_features
    heads, uneven = divmod(inputs, head_dim)
    if uneven or not heads or getattr(module, out).out_features != hidden:
        return Stays(place, f"{out} reads {inputs} channels, which are no heads of {head_dim}")
    if fused:
        rows = getattr(module, fused).out_features
        kv_heads, uneven = divmod(rows - inputs, 2 * head_dim)
        layers: tuple[tuple[str, str], ...] = ((fused, "qkv"),)
    else:
        rows = getattr(module, q).out_features
        if rows == 2 * inputs:
            return Stays(place, f"its queries carry a gate ({q} gives {rows} channels for {inputs})")
        kv_heads, uneven = divmod(getattr(module, k).out_features, head_dim)
        if rows != inputs or getattr(module, k).out_features != getattr(module, v).out_features:
            return Stays(place, f"queries, keys and values are not of one size ({rows} channels for {inputs})")
        layers = ((q, "q"), (k, "kv"), (v, "kv"))
    if uneven or kv_heads < 1 or heads % kv_heads:
        return Stays(place, f"its {heads} query heads do not divide among the KV heads")
    known = {out, *(name for name, _ in layers)}
    for name, parameter in module.named_parameters():
        holder = name.rpartition(".")[0]
        per_channel = parameter.dim() == 1 and parameter.numel() == head_dim and (head_dim != heads or "norm" in name)
        if holder in known or per_channel or parameter.numel() == 1:
            continue  # of all heads alike, so that each can go
        return Stays(place, _shared(name, parameter, heads, kv_heads, head_dim))
    numbers = {name: what for name, what in NUMBERS.items() if type(getattr(module, name, None)) is int}
    return Attention(
        place,
        f"{place}.{out}",
        tuple((f"{place}.{name}", what) for name, what in layers),
        heads,
        kv_heads,
        head_dim,
        tuple((f"{place}.{name}", what) for name, what in numbers.items()),
    )


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _shared(name: str, parameter: Tensor, heads: int, kv_heads: int, head_dim: int) -> str:
    """Why attention with this parameter beside its projections stays whole."""
    shape = " x ".join(map(str, parameter.shape))
    if "sink" in name:
        return f"attention sinks ({name})"
    if parameter.dim() == 1 and parameter.numel() in (heads * head_dim, kv_heads * head_dim):
        return f"one norm over all heads together ({name.rpartition('.')[0]})"
    if "gate" in name:
        return f"its heads are gated ({name}, {shape})"
    return f"{name} ({shape}) belongs to all heads"


def _ffn(module: nn.Module, place: str, hidden: int) -> FFN | Stays:
    linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    expert = next((n for n, m in module.named_modules() if "expert" in n.lower() or "Expert" in type(m).__name__), None)
    if expert is not None or "block_sparse_moe" in place:
        return Stays(place, f"experts ({type(module).__name__})")
    downs = [n for n, m in linear.items() if m.out_features == hidden and _is_last(n)]
    if len(downs) != 1 or len(linear) not in (2, 3):
        held = ", ".join(linear) or "it has none"
        return Stays(place, f"{type(module).__name__} is no pair or triple of linear layers ({held})")
    width = linear[downs[0]].in_features
    ups = {n: divmod(m.out_features, width) for n, m in linear.items() if n != downs[0]}
    if any(rest or copies not in (1, 2) for copies, rest in ups.values()) or any(
        linear[n].in_features != hidden for n in ups
    ):
        return Stays(place, f"{', '.join(ups)} do not give the {width} channels that {downs[0]} reads")
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[0] not in linear and parameter.numel() > 1:
            what = "one norm over all neurons together" if parameter.numel() == width else "a part of all neurons"
            return Stays(place, f"{what} ({name})")
    return FFN(place, f"{place}.{downs[0]}", tuple((f"{place}.{n}", copies) for n, (copies, _) in ups.items()), width)


def _is_last(name: str) -> bool:
    """Whether a layer of a FFN is called as those are that give its output."""
    last = name.rpartition(".")[2]
    return last in ("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h", "wo", "Wo", "output_linear", "fc_out")
