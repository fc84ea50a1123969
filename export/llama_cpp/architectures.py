"""Which of llama.cpp's architectures a model is written as, and every tensor of the file.

A model whose blocks are alike is written as its own family. One whose heads or FFN widths differ from block to block
needs an architecture that reads all three block by block: `deci` (Llama's block, RoPE on neighbouring channels, biases
if there are any), or `openelm` (norms on q and k, fused q, k and v, a head that is the embedding). llama.cpp is read,
not asked, for what they do: src/models/deci.cpp and openelm.cpp.

Three shapes are not written as they are, for llama.cpp does not load them or, worse, computes something else; what is
written gives the same function:

- a block of which nothing is left is left out, and the rest is numbered anew;
- attention without an FFN (`deci` then forgets the attention's output) gets an FFN of zeros;
- where attention has to be (the first block, from which the head size is read; every block of `openelm`), it is one
  head of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.models.decoder import BLOCKS, EMBEDDING, HEAD, NORM
from compress.models.families.base import Family
from compress.models.families.structure import ByStructure, written_sizes
from compress.words.wording import counted

STOCK = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma2": "gemma2",
    "gemma3": "gemma3", "ministral": "llama", "ernie4_5": "llama", "granite": "granite", "smollm3": "smollm3",
}  # fmt: skip
# Whose RoPE turns channels 2i and 2i + 1, not i and i + head_dim / 2.
NEIGHBOURS = ("llama", "deci", "granite", "smollm3")
IN_PLACE = ("ernie4_5",)  # families whose own RoPE does so, and whose rows stand as they have to
DECI = ("llama", "mistral", "qwen2", "phi3", "ministral", "ernie4_5")  # whose blocks may differ there
ANY_BIAS = ("llama", "deci")
QKV_BIAS = (*ANY_BIAS, "qwen2")
SQUARE = ("qwen2", "phi3")  # read q and o as (hidden, hidden)
GEMMA = ("gemma2", "gemma3")
ZEROS = 32  # neurons of an FFN of zeros: the shortest row that 4 and 8 bits can be written in
ACTIVATION = {"gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}  # the others: silu
# Blocks from which llama.cpp tells a Gemma whose attention is scaled by hidden / heads.
LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}
SLIDING = {"gemma2": 2, "gemma3": 6}  # of so many blocks the last is full
# Key there -> in the configuration: what a Granite multiplies by.
GRANITE = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
PADDED = (
    "prune it to a stock shape (--recipe tyr-stock), whose blocks are alike; or name a model in the padded layout"
    " (layouts: [padded])"
)


@dataclass(frozen=True)
class Block:
    """Sizes of one block as it is written; ``source`` is its number in the model. 0 heads: no attention; 0 neurons: no
    FFN. ``zero_attention``, ``zero_ffn``: there are none in the model, and zeros are written."""

    source: int
    heads: int
    kv_heads: int
    ffn: int
    zero_attention: bool = False
    zero_ffn: bool = False


@dataclass(frozen=True)
class Part:
    """A tensor of the file.

    ``make`` turns the model's tensors ``sources`` into it; without sources it is made of nothing. ``role`` is what it
    does (``attn_v``, ``ffn_down``, ``token_embd``, ``output``), by which its type is chosen; ``plain``: always float32.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    role: str
    make: Callable[..., Tensor]
    block: int = 0


@dataclass(frozen=True)
class Plan:
    """The file without its vocabulary. ``keys`` have the architecture's name in front; ``notes`` say what was
    changed."""

    arch: str
    keys: Mapping[str, Any]
    parts: tuple[Part, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]


def plan(config: Any, family: Family, where: str) -> Plan:
    """What is written of a model with this configuration.

    Raises:
        CompressError: llama.cpp has no architecture for it.
    """

    def refuse(what: str, fix: str = PADDED) -> CompressError:
        return CompressError(f"no stock llama.cpp runs this model: {what}", where=where, fix=fix)

    blocks, head_dim = _blocks(config, family, refuse)
    kept = tuple(b for b in blocks if b.heads or b.ffn)
    if not kept:
        raise refuse("nothing is left of any block")
    arch = _architecture(config, family, kept, head_dim, refuse)
    shaped = tuple(_mended(b, i, arch) for i, b in enumerate(kept))
    _check(config, family, arch, kept, head_dim, refuse)
    keys, more, notes = _keys(config, arch, shaped, head_dim, refuse)
    gone = len(blocks) - len(kept)
    notes += [f"left out, as nothing was left of them: {counted(gone, 'block')}"] if gone else []
    for what, name in (("attention", "zero_attention"), ("FFN", "zero_ffn")):
        which = [str(b.source) for b in shaped if getattr(b, name)]
        notes += [f"blocks without {what} that have one of zeros: {', '.join(which)}"] if which else []
    parts = (
        *_around(config, arch),
        *more,
        *(p for i, b in enumerate(shaped) for p in _parts(config, family, arch, i, b, head_dim)),
    )
    return Plan(arch, keys, parts, shaped, tuple(notes))


Refuse = Callable[..., CompressError]


def _blocks(config: Any, family: Family, refuse: Refuse) -> tuple[list[Block], int]:
    """The model's blocks as they are, and the size of a head."""
    found: list[Block] = []
    sizes: set[int] = set()
    ragged = getattr(config, "is_heterogeneous", False)
    for index in range(config.num_hidden_layers):
        g = family.block_geometry(config, index)
        heads, groups, ffn = g.heads, g.kv_heads, g.ffn
        if isinstance(family, ByStructure) and hasattr(config, "compress_layers"):
            heads, groups, ffn = written_sizes(family, config, index)
        skip = (getattr(config.per_layer_config[index], "skip", None) or ()) if ragged else ()
        attention = heads > 0 and "attention" not in skip
        if attention:
            sizes.add(g.head_dim)
        found.append(Block(index, heads * attention, groups * attention, ffn * ("mlp" not in skip)))
    if len(sizes) > 1:
        raise refuse(f"its heads are {', '.join(map(str, sorted(sizes)))} channels wide; all must be equally wide")
    return found, sizes.pop() if sizes else family.block_geometry(config, 0).head_dim


def _architecture(config: Any, family: Family, blocks: Sequence[Block], head_dim: int, refuse: Refuse) -> str:
    stock = STOCK.get(family.name)
    if stock is None:
        raise refuse(f"the family {family.name} is not known here", f"known: {', '.join(STOCK)}")
    first = blocks[0]
    alike = all((b.heads, b.kv_heads, b.ffn) == (first.heads, first.kv_heads, first.ffn) for b in blocks)
    square = stock not in SQUARE or first.heads * head_dim == config.hidden_size
    if alike and first.heads and first.ffn and square:
        return stock
    if family.name in DECI:
        return "deci"
    if family.name != "qwen3":
        raise refuse(f"{family.name}'s blocks must be alike there, and these differ")
    if not config.tie_word_embeddings:
        raise refuse(
            "Qwen3's blocks must be alike there, unless its head is the embedding; these differ, and the head is its"
            " own"
        )
    return "openelm"


def takes_uneven(config: Any, family: Family, where: str) -> None:
    """Raises CompressError where llama.cpp has no architecture for the family with blocks that differ."""

    def refuse(what: str, fix: str = PADDED) -> CompressError:
        return CompressError(f"llama.cpp cannot hold this model: {what}", where=where, fix=fix)

    _architecture(config, family, (Block(0, 2, 1, 32), Block(1, 1, 1, 32)), 1, refuse)


def _mended(block: Block, number: int, arch: str) -> Block:
    if not block.heads and (arch == "openelm" or number == 0):
        block = replace(block, heads=1, kv_heads=1, zero_attention=True)
    if not block.ffn:
        block = replace(block, ffn=ZEROS, zero_ffn=True)
    return block


def _check(config: Any, family: Family, arch: str, blocks: Sequence[Block], head_dim: int, refuse: Refuse) -> None:
    """What else the architecture takes for granted."""
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    want = ACTIVATION.get(family.name, "silu")
    if act != want and not (want != "silu" and act == "gelu_new"):
        raise refuse(f"its activation is {act}, and {arch} has {want}", "name another format")
    biases = family.biases(config)
    strange = (biases.qkv and arch not in QKV_BIAS) or (
        (biases.o or biases.gate_up or biases.down) and arch not in ANY_BIAS
    )
    if strange:
        raise refuse(f"its linear layers have biases, and those of {arch} have none", "name another format")
    if family.name in GEMMA:
        large = len(blocks) == LARGE_GEMMA[family.name]
        scale = config.hidden_size // blocks[0].heads if large else head_dim
        if config.query_pre_attn_scalar != scale:
            raise refuse(
                f"its attention is scaled by {config.query_pre_attn_scalar:g}, and {arch} of {len(blocks)} blocks"
                f" scales by {scale}",
                "name another format",
            )
    if arch == "smollm3":
        positions = [int(bool(config.no_rope_layers[b.source])) for b in blocks]  # 1: the block has positions
        if positions != [int((i + 1) % 4 != 0) for i in range(len(blocks))]:
            raise refuse(
                "smollm3 has no positions in every fourth block, and here they are otherwise", "keep all blocks"
            )
    if arch == "gemma2" and not (
        config.tie_word_embeddings and config.attn_logit_softcapping and config.final_logit_softcapping
    ):
        raise refuse(
            "gemma2 has a head that is the embedding, and caps on the logits; this one has not all",
            "name another format",
        )


# --- keys -------------------------------------------------------------------------------------------------------------


def _keys(
    config: Any, arch: str, blocks: Sequence[Block], head_dim: int, refuse: Refuse
) -> tuple[dict[str, Any], list[Part], list[str]]:
    """The architecture's keys, tensors of RoPE, and notes."""
    ragged = arch in ("deci", "openelm")

    def size(name: str) -> Any:
        values = [getattr(b, name) for b in blocks]
        return values if ragged else values[0]

    context, notes = config.max_position_embeddings, []
    window = _window(config)
    if window is not None and arch not in GEMMA and window < context:
        context = window
        notes.append(
            f"the context is {window:,} tokens, the model's sliding window: {arch} attends to all of its context"
        )
    keys: dict[str, Any] = {
        "block_count": len(blocks), "context_length": context, "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size, "feed_forward_length": size("ffn"), "attention.head_count": size("heads"),
        "attention.head_count_kv": size("kv_heads"), "attention.key_length": head_dim,
        "attention.value_length": head_dim, "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }  # fmt: skip
    if arch in GEMMA:
        keys["attention.sliding_window"] = int(config.sliding_window)
        sliding = [int(config.layer_types[b.source] == "sliding_attention") for b in blocks]
        every = SLIDING[arch]
        if sliding != [int((i + 1) % every != 0) for i in range(len(blocks))]:
            keys["attention.sliding_window_pattern"] = sliding
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if arch in GEMMA and getattr(config, name, None):
            keys[name] = float(getattr(config, name))
    if arch == "granite":
        keys |= {gguf: float(getattr(config, own)) for gguf, own in GRANITE.items()}
    rope, parts = _rope(config, arch, head_dim, refuse)
    return {**keys, **rope}, parts, notes


def _window(config: Any) -> int | None:
    """How far a token sees, where that is not all of the context."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)


def _rope(config: Any, arch: str, head_dim: int, refuse: Refuse) -> tuple[dict[str, Any], list[Part]]:
    """Keys and tensors of the positions. Factors are those of transformers' own function, so that nothing is told
    twice."""
    said = dict(config.rope_parameters)
    near = said.get("sliding_attention")
    rope = dict(said.get("full_attention", said))
    kind = rope.get("rope_type", "default")
    share = float(rope.get("partial_rotary_factor") or 1.0)
    turned = int(head_dim * share)
    if turned != head_dim and arch != "phi3":
        raise refuse(f"its RoPE turns {turned} of {head_dim} channels, and {arch} turns all")
    keys: dict[str, Any] = {"rope.dimension_count": turned, "rope.freq_base": float(rope["rope_theta"])}
    if near is not None:
        keys["rope.freq_base_swa"] = float(near["rope_theta"])
        if near.get("rope_type", "default") != "default":
            raise refuse(f"the RoPE of its sliding blocks is {near['rope_type']}", "name another format")
    parts: list[Part] = []
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        keys |= _yarn(rope, config, refuse)
    elif kind == "llama3":
        if arch not in NEIGHBOURS:
            raise refuse(f"its RoPE is llama3's, and {arch} has none", "name another format")
        factors = _factors(config, rope, turned)
        parts.append(Part("rope_freqs.weight", (turned // 2,), (), "plain", lambda: factors))
    elif kind == "longrope":
        if arch not in ("phi3", *NEIGHBOURS):
            raise refuse(f"its RoPE is longrope, and {arch} has none", "name another format")
        more, parts = _longrope(rope, config, turned)
        keys |= more
    elif kind != "default":
        raise refuse(f"its RoPE is {kind}, which llama.cpp has not", "name another format")
    return keys, parts


def _yarn(rope: Mapping[str, Any], config: Any, refuse: Refuse) -> dict[str, Any]:
    """YaRN's keys. llama.cpp scales attention by 0.1 ln(factor) + 1 by itself; what a model says beside that is a
    factor."""
    strange = [k for k in ("mscale", "mscale_all_dim") if rope.get(k)] + ["truncate"] * (rope.get("truncate") is False)
    if strange:
        raise refuse(f"its YaRN has {strange[0]}, which llama.cpp has not", "name another format")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = float(rope["factor"])
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    if rope.get("attention_factor"):
        keys["rope.scaling.attn_factor"] = float(rope["attention_factor"]) / (0.1 * math.log(factor) + 1.0)
    return keys


def _factors(config: Any, rope: Mapping[str, Any], turned: int) -> Tensor:
    """(turned / 2,): by what each frequency is divided."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    assert scale == 1.0, "llama3's RoPE does not scale attention"
    plain: Tensor = float(rope["rope_theta"]) ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    return (plain / found.double()).float()


def _longrope(rope: Mapping[str, Any], config: Any, turned: int) -> tuple[dict[str, Any], list[Part]]:
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = int(original or config.max_position_embeddings)
    factor = float(rope.get("factor") or config.max_position_embeddings / original)
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    keys = {
        "rope.scaling.type": "longrope", "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(scale),
    }  # fmt: skip

    def part(name: str, values: Sequence[float]) -> Part:
        made = torch.tensor(values, dtype=torch.float32)
        return Part(f"rope_factors_{name}.weight", (turned // 2,), (), "plain", lambda: made)

    return keys, [part("long", rope["long_factor"]), part("short", rope["short_factor"])]


# --- tensors ----------------------------------------------------------------------------------------------------------


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _plus_one(weight: Tensor) -> Tensor:
    """Gemma's norms multiply by 1 + weight, llama.cpp's by weight."""
    made: Tensor = weight.float() + 1.0
    return made


def _around(config: Any, arch: str) -> list[Part]:
    """The tensors beside the blocks."""
    vocab, hidden = config.vocab_size, config.hidden_size
    found = [
        Part(
            "token_embd.weight",
            (vocab, hidden),
            (EMBEDDING,),
            "tied" if config.tie_word_embeddings else "token_embd",
            _same,
        ),
        Part("output_norm.weight", (hidden,), (NORM,), "plain", _plus_one if arch in GEMMA else _same),
    ]
    if not config.tie_word_embeddings:
        found.append(Part("output.weight", (vocab, hidden), (HEAD,), "output", _same))
    return found


def _parts(config: Any, family: Family, arch: str, number: int, block: Block, head_dim: int) -> list[Part]:
    """The tensors of one block."""
    there, here = f"{BLOCKS}{block.source}.", f"blk.{number}."

    def part(name: str, shape: tuple[int, ...], source: Sequence[str], role: str, make: Any = _same) -> Part:
        return Part(here + name, shape, tuple(there + s for s in source), role, make, number)

    def norm(name: str, source: str, width: int = config.hidden_size) -> Part:
        return part(name, (width,), (source,), "plain", _plus_one if arch in GEMMA else _same)

    found: list[Part] = []
    if block.heads:
        found.append(norm("attn_norm.weight", "input_layernorm.weight"))
        found += _attention(config, family, arch, block, head_dim, part, norm)
        if arch in GEMMA:
            found.append(norm("post_attention_norm.weight", "post_attention_layernorm.weight"))
    before = "pre_feedforward_layernorm.weight" if arch in GEMMA else "post_attention_layernorm.weight"
    found.append(norm("ffn_norm.weight", before))
    found += _ffn(config, family, arch, block, part)
    if arch in GEMMA:
        found.append(norm("post_ffw_norm.weight", "post_feedforward_layernorm.weight"))
    return found


def _attention(config: Any, family: Family, arch: str, block: Block, head_dim: int, part: Any, norm: Any) -> list[Part]:
    hidden, q, k = config.hidden_size, block.heads * head_dim, block.kv_heads * head_dim
    if block.zero_attention:
        sizes = [
            ("attn_q", (q, hidden)),
            ("attn_k", (k, hidden)),
            ("attn_v", (k, hidden)),
            ("attn_output", (hidden, q)),
        ]
        if arch == "openelm":
            sizes = [("attn_qkv", (q + 2 * k, hidden)), ("attn_output", (hidden, q))]
        made = [part(f"{name}.weight", shape, (), name, _zeros(shape)) for name, shape in sizes]
        if arch == "openelm":
            one = _ones(head_dim)
            made += [part(f"attn_{n}_norm.weight", (head_dim,), (), "plain", one) for n in "qk"]
        return made
    biases, fused = family.biases(config), family.name == "phi3"
    own = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    found = []
    if arch in ("phi3", "openelm"):
        source = ("self_attn.qkv_proj.weight",) if fused else tuple(f"{s}.weight" for s in own.values())
        found.append(part("attn_qkv.weight", (q + 2 * k, hidden), source, "attn_qkv", _joined))
    else:
        starts = {"q": 0, "k": q, "v": q + k}
        for letter, heads in (("q", block.heads), ("k", block.kv_heads), ("v", block.kv_heads)):
            turn = heads if arch in NEIGHBOURS and family.name not in IN_PLACE and letter != "v" else 0
            rows = slice(starts[letter], starts[letter] + heads * head_dim) if fused else slice(None)
            for kind, shape in (("weight", (heads * head_dim, hidden)), ("bias", (heads * head_dim,))):
                if kind == "weight" or biases.qkv:
                    source = ("self_attn.qkv_proj.weight",) if fused else (f"{own[letter]}.{kind}",)
                    role = f"attn_{letter}" if kind == "weight" else "plain"
                    found.append(part(f"attn_{letter}.{kind}", shape, source, role, _turned(turn, rows)))
    found.append(part("attn_output.weight", (hidden, q), ("self_attn.o_proj.weight",), "attn_output"))
    if biases.o:
        found.append(part("attn_output.bias", (hidden,), ("self_attn.o_proj.bias",), "plain"))
    if family.name in ("qwen3", "gemma3"):
        found += [norm(f"attn_{n}_norm.weight", f"self_attn.{n}_norm.weight", head_dim) for n in "qk"]
    return found


def _ffn(config: Any, family: Family, arch: str, block: Block, part: Any) -> list[Part]:
    hidden, n, biases = config.hidden_size, block.ffn, family.biases(config)
    sizes = {"ffn_gate": (n, hidden), "ffn_up": (n, hidden), "ffn_down": (hidden, n)}
    if block.zero_ffn:
        return [part(f"{name}.weight", shape, (), name, _zeros(shape)) for name, shape in sizes.items()]
    down = part("ffn_down.weight", sizes["ffn_down"], ("mlp.down_proj.weight",), "ffn_down")
    if arch == "phi3":
        return [part("ffn_up.weight", (2 * n, hidden), ("mlp.gate_up_proj.weight",), "ffn_up"), down]
    found = [down]
    for number, name in enumerate(("gate", "up")):
        fused = family.name == "phi3"
        source = "mlp.gate_up_proj.weight" if fused else f"mlp.{name}_proj.weight"
        rows = slice(number * n, (number + 1) * n) if fused else slice(None)
        found.append(part(f"ffn_{name}.weight", (n, hidden), (source,), f"ffn_{name}", _turned(0, rows)))
        if biases.gate_up:
            found.append(part(f"ffn_{name}.bias", (n,), (f"mlp.{name}_proj.bias",), "plain"))
    if biases.down:
        found.append(part("ffn_down.bias", (hidden,), ("mlp.down_proj.bias",), "plain"))
    return found


def _zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)


def _ones(width: int) -> Callable[[], Tensor]:
    return lambda: torch.ones(width)


def _joined(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def _turned(heads: int, rows: slice) -> Callable[[Tensor], Tensor]:
    """Takes ``rows``; where ``heads`` is not 0, each head's rows i and i + head_dim / 2 become neighbours."""

    def make(tensor: Tensor) -> Tensor:
        taken: Tensor = tensor[rows]
        if not heads:
            return taken
        halves = taken.reshape(heads, 2, taken.shape[0] // heads // 2, *taken.shape[1:])
        made: Tensor = halves.swapaxes(1, 2).reshape(taken.shape)
        return made

    return make
