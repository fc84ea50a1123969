"""Proves on the model at hand that its parts are what `parts` takes them for, before anything of it is pruned.

What is proven, in float64, with every parameter and saved buffer random (norms of one and biases of zero would hide
what they do): a block of each kind with units cut out gives what it gives with zeros in their place, and holds as many
parameters fewer as the costs say; the pieces a block is run in are the model; decoding with a cache is the whole text;
and what is saved is the same when it is read again.

It is the configuration's own class and every setting of it that is not a size, but not the weights: the layers up to
the first block of every kind, and where these are more than `MOST` parameters, narrower ones. Then the heads of a group
are at most 3, the groups 2, a head is as wide as it is, and the residual stream, the FFN and the vocabulary follow;
what is named by other keys (experts, state spaces) is made smaller only where it has to be.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models import decoder
from compress.models.families.parts import FFN, Attention, Parts, Stays, parts_of
from compress.models.families.structure import ByStructure, block_costs, geometry_of

MOST = 48_000_000  # parameters of what is run: 0.4 GB in float64, several times over
LAYERS = 16  # the first block of every kind has to be among so many
VOCABULARY = 96
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative to the largest logit; norms compute in float32
BLIND = 1e-5  # what is cut must change the logits by more than this


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike: the first of them, and what tells them from others."""

    first: int
    signature: tuple[Any, ...]


class Differs(CompressError):
    """What was run gives another number than it should: no coarser arithmetic makes that right."""


def refused(config: Any, what: str, kind: type[CompressError] = CompressError) -> CompressError:
    return kind(
        f"the architecture {config.model_type!r} is not supported: {what}",
        where="config.json: model_type",
        fix="prune a model whose blocks are made of attention and a FFN; to teach compress another, see"
        " docs/guide/add-a-family.md and models/families/ in the source",
    )


def by_structure(config: Any) -> ByStructure:
    """The adapter of a configuration that no family is written for, proven.

    Raises:
        CompressError: it cannot be built, or what its blocks are made of cannot be told, or cannot be proven.
    """
    key = config.to_json_string()
    if key not in _PROVEN:
        if len(_PROVEN) >= 16:
            _PROVEN.pop(next(iter(_PROVEN)))
        threads = torch.get_num_threads()
        try:
            # Matrices of a few hundred channels: threads that wait for one another cost more than they share.
            torch.set_num_threads(1)
            with torch.random.fork_rng(devices=[]):
                _PROVEN[key] = _by_structure(config)
        finally:
            torch.set_num_threads(threads)
    return _PROVEN[key]


_PROVEN: dict[str, ByStructure] = {}


def _by_structure(config: Any) -> ByStructure:
    whole = _built(config, torch.device("meta"), torch.float32, narrowed=False)
    _check_body(config, whole)
    every = decoder.blocks(whole)
    hidden = decoder.norm_width(whole, config)
    told = [parts_of(block, config, hidden) for block in every]
    for one in told:
        if isinstance(one, str):
            raise refused(config, one)
    parts = [p for p in told if isinstance(p, Parts)]
    signatures = [_signature(config, i, block, p) for i, (block, p) in enumerate(zip(every, parts, strict=True))]
    kinds = [Kind(signatures.index(s), s) for s in dict.fromkeys(signatures)]
    if kinds[-1].first >= LAYERS:
        raise refused(
            config, f"block {kinds[-1].first} is the first of its kind; of the first {LAYERS} one is asked for"
        )
    total = sum(p.numel() for p in whole.parameters())
    failure: CompressError | None = None
    for dtype in TOLERANCE:
        small, own = _small(config, kinds[-1].first + 1, dtype)
        try:
            found = _Trial(config, own, small, hidden, kinds, parts, dtype).run()
        except Differs:
            raise
        except CompressError as e:  # some modules mix float32 in, and do not run in float64
            failure = failure or e
            continue
        # What a block of each kind was found to be, for all blocks of the kind.
        of = {kind.signature: found.parts[kind.first] for kind in kinds}
        settled = tuple(_as_large(of[signature], one) for signature, one in zip(signatures, parts, strict=True))
        keeps = _keeps(config, settled)
        counted = tuple(block_costs(block, one, geometry_of(one)) for block, one in zip(every, settled, strict=True))
        if all(isinstance(p.attention, Stays) and isinstance(p.ffn, Stays) for p in settled):
            one = settled[0]
            raise refused(
                config,
                "nothing of it can be cut: attention stays whole for"
                f" {one.attention.reason}, the FFN for {one.ffn.reason}",  # type: ignore[union-attr]
            )
        return replace(
            found, parts=settled, counted=counted, names=_names(whole), keeps=keeps, total=total,
            vocab=config.vocab_size,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )  # fmt: skip
    assert failure is not None
    raise failure


def _built(config: Any, device: torch.device, dtype: torch.dtype, *, narrowed: bool = True) -> Any:
    """An untrained model of a configuration, ``narrowed`` by us or as it was read; what transformers finds wrong with
    it, it says in any type.

    Raises:
        CompressError: transformers has no causal language model of this kind, or none of this configuration.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    try:
        with device:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    except Exception as e:
        said = " ".join(str(e).split())[:200] or type(e).__name__
        if narrowed or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise refused(config, f"no causal language model can be made of it ({said})") from e
        raise CompressError(
            f"no model can be made of the configuration: {said}",
            where=str(Path(config._name_or_path) / "config.json"),
            fix="correct it, or fetch the model's own config.json again",
        ) from e
    return model.eval().requires_grad_(False)


def _names(model: Any) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(name for name, _ in block.named_parameters()) for block in decoder.blocks(model))


def _check_body(config: Any, model: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise refused(config, "it has an encoder beside its decoder")
    name = decoder.layers_name(model)
    if not name or not len(decoder.blocks(model)) or decoder.block_of(f"{decoder.prefix(model)}0.") is None:
        raise refused(config, f"{type(model).__name__} does not hold its blocks in a list where decoders have theirs")
    if not decoder.norm_name(model):
        raise refused(config, f"{type(model).__name__} has no last norm behind its blocks")
    if not decoder.head_name(model):
        raise refused(config, f"{type(model).__name__} has no head that is one linear layer")


def _signature(config: Any, index: int, block: nn.Module, parts: Parts) -> tuple[Any, ...]:
    kinds = getattr(config, "layer_types", None)
    shapes = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
    buffers = tuple(n for n, _ in block.named_buffers())
    classes = tuple(type(m).__name__ for m in block.modules())
    return kinds[index] if kinds else "", parts, shapes, buffers, classes


def _as_large(found: Parts, told: Parts) -> Parts:
    """What was found of a narrower block, at the sizes that the real one was told to have."""

    def one(small: Any, large: Any) -> Any:
        if isinstance(small, Stays):
            return small
        if isinstance(small, Attention):
            numbers, rows = small.numbers, small.rows
            return replace(large, numbers=numbers, rows=rows)
        return large

    return replace(
        found, hidden=told.hidden, attention=one(found.attention, told.attention), ffn=one(found.ffn, told.ffn)
    )


def _keeps(config: Any, parts: Sequence[Parts]) -> frozenset[int]:
    """Blocks whose attention must not vanish: the first of each kind, where the KV cache reads the length."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(parts)
    return frozenset(kinds.index(kind) for kind in set(kinds))


# --- a small model of the same kind ----------------------------------------------------------------------------------


def _small(config: Any, layers: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """(a random model, its configuration) of the first ``layers`` layers, as narrow as it has to be."""
    own = small_config(config, layers)
    model = _built(own, torch.device("cpu"), dtype)
    randomise(model)
    return model, own


def small_config(config: Any, layers: int, plain: Callable[[Any], Any] = lambda own: own, most: int = MOST) -> Any:
    """The same configuration with ``layers`` layers, as narrow as it has to be for a trial.

    Args:
        plain: makes of it what a causal language model is built of.
        most: parameters that it may have.

    Raises:
        CompressError: transformers takes none that is small enough.
    """
    tried: list[str] = []
    for narrow in (0, 1, 2):
        own = shrunk(config, layers, narrow)
        if isinstance(own, str):
            tried.append(own)
            continue
        try:
            size = sum(p.numel() for p in _built(plain(own), torch.device("meta"), torch.float32).parameters())
        except CompressError as e:
            tried.append(e.what)
            continue
        if size <= most:
            return own
        tried.append(f"{size:,} parameters")
    raise refused(config, f"it cannot be made small enough to be proven ({'; '.join(tried)})")


def shrunk(config: Any, layers: int, narrow: int) -> Any:
    """The same configuration with fewer layers and tokens; ``narrow`` of 1 with narrower ones, of 2 with fewer experts
    as well. In words what transformers has against it."""
    facts = config.to_dict()
    for key in (
        "transformers_version",
        "architectures",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "auto_map",
        "model_type",
    ):
        facts.pop(key, None)
    facts.pop("compress_layers", None)
    depth = config.num_hidden_layers
    for key, value in facts.items():
        if isinstance(value, list) and len(value) == depth and depth > layers:
            facts[key] = value[:layers]
    facts["num_hidden_layers"] = layers
    facts["vocab_size"] = min(VOCABULARY, config.vocab_size)
    if "vocab_size_per_layer_input" in facts:
        facts["vocab_size_per_layer_input"] = facts["vocab_size"]
    for key, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        if facts.get(key) is not None:
            facts[key] = token
    if narrow:
        _narrow(config, facts, narrow)
    try:
        return type(config)(**facts)
    except Exception as e:  # it is asked whether it can be, and transformers says no in any type
        return " ".join(str(e).split())[:120]


def _narrow(config: Any, facts: dict[str, Any], narrow: int) -> None:
    names = getattr(config, "attribute_map", {})

    def key(name: str) -> str:
        return name if name in facts else names.get(name, name)

    heads, hidden = facts[key("num_attention_heads")], facts[key("hidden_size")]
    groups = facts.get(key("num_key_value_heads")) or heads
    head_dim = facts.get("head_dim") or hidden // heads
    free = facts.get("head_dim") is not None and hidden != heads * head_dim
    fewer = min(2, groups) if groups < heads else min(4, heads)
    per_group = min(3 if free or heads // groups % 3 == 0 else 2, heads // groups)
    width = fewer * per_group * head_dim + (head_dim if free else 0)
    facts[key("num_attention_heads")] = fewer * per_group
    if key("num_key_value_heads") in facts and facts[key("num_key_value_heads")] is not None:
        facts[key("num_key_value_heads")] = fewer
    if isinstance(facts.get("mamba_n_heads"), int) and "mamba_d_head" in facts:
        facts["mamba_n_heads"] = max(1, facts.get("mamba_expand", 2) * width // facts["mamba_d_head"])
    facts[key("hidden_size")] = width
    ffn = facts.get(key("intermediate_size"))
    if ffn is not None:
        facts[key("intermediate_size")] = [width + 24 for _ in ffn] if isinstance(ffn, list) else width + 24
    fewer = max(1, (facts.get("linear_num_key_heads") or 1) // 2)
    for name in ("linear_num_key_heads", "linear_num_value_heads"):  # the second is a multiple of the first
        if isinstance(facts.get(name), int):
            facts[name] = max(1, facts[name] // fewer)
    for name in ("shared_intermediate_size", "moe_intermediate_size"):
        if isinstance(facts.get(name), int):
            facts[name] = min(facts[name], width + 40)
    if narrow > 1:
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            if isinstance(facts.get(name), int):
                facts[name] = min(facts[name], max(8, 2 * int(getattr(config, "num_experts_per_tok", 4) or 4)))


def randomise(model: nn.Module) -> None:
    """Random weights, of a size that leaves every layer's output about as large as its input; norms about what they
    were, biases not zero; buffers that are saved too. What is computed from the configuration stays."""
    generator = torch.Generator().manual_seed(17)

    def drawn(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    saved = set(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(drawn(parameter) / parameter.shape[-1] ** 0.5)
            elif parameter.is_floating_point():
                parameter.add_(drawn(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(drawn(buffer) * 0.1)


# --- the trial -------------------------------------------------------------------------------------------------------


class _Trial:
    """Runs a small model of a configuration whole, in pieces, masked and sliced, until what is not true is whole."""

    LENGTH = 12

    def __init__(
        self, config: Any, own: Any, model: Any, hidden: int, kinds: list[Kind], told: list[Parts], dtype: torch.dtype
    ) -> None:
        self.config, self.own, self.model, self.dtype = config, own, model, dtype
        self.kinds = kinds
        self.ids = torch.randint(1, own.vocab_size, (2, self.LENGTH), generator=torch.Generator().manual_seed(3))
        width = decoder.norm_width(model, own)
        self.parts: list[Parts] = []
        for i, block in enumerate(decoder.blocks(model)):
            one = parts_of(block, own, width)
            if isinstance(one, str) or _shape_of(one) != _shape_of(told[i]):
                raise refused(config, f"a narrower block {i} is not made as the real one is")
            self.parts.append(one)
        with self._said("it does not run"), torch.no_grad():
            self.logits = model(self.ids, use_cache=False).logits
        if not torch.isfinite(self.logits).all():
            raise refused(config, "a random model of it gives no finite numbers")

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """What a stranger's architecture raises, as one refusal."""
        try:
            yield
        except (CompressError, MemoryError):
            raise
        except Exception as e:  # the modules are transformers' own, of any age and kind
            raise refused(self.config, f"{what} ({type(e).__name__}: {' '.join(str(e).split())[:160]})") from e

    def family(self) -> ByStructure:
        costs = tuple(
            block_costs(block, one, geometry_of(one))
            for block, one in zip(decoder.blocks(self.model), self.parts, strict=True)
        )
        model, block = type(self.model), type(decoder.blocks(self.model)[0])
        return ByStructure(
            name=self.config.model_type,
            module=model.__module__.rpartition(".modeling_")[2],
            causal_lm=model.__name__,
            decoder_layer=block.__name__,
            parts=tuple(self.parts),
            counted=costs,
            names=_names(self.model),
            total=sum(p.numel() for p in self.model.parameters()),
            vocab=self.own.vocab_size,
            tied=bool(getattr(self.own, "tie_word_embeddings", False)),
            keeps=_keeps(self.own, self.parts),
            parallel=self.parallel,
            block_values=self.block_values,
        )

    def run(self) -> ByStructure:
        module = type(self.model).__module__
        if not module.startswith("transformers.models.") or ".modeling_" not in module:
            raise refused(self.config, f"{module} is not one of transformers' own modules")
        self.parallel, self.block_values = False, 0
        with self._said("its blocks cannot be watched"), torch.no_grad():
            self._trace()
        for kind in self.kinds:
            self._settle_attention(kind.first)
            self._settle_ffn(kind.first)
        # All blocks of a kind are as the first.
        self._spread()
        with self._said("it cannot be run in pieces"), torch.no_grad():
            family = self._pieces()
            self._ragged(family)
        return family

    def _spread(self) -> None:
        for i, one in enumerate(self.parts):
            first = next(k.first for k in self.kinds if self._kind(i) == k.first)
            if first != i:
                self.parts[i] = _as_large(self.parts[first], one)

    def _kind(self, index: int) -> int:
        """The first block of the kind that block ``index`` is of."""
        blocks = decoder.blocks(self.model)
        signatures = [_signature(self.own, i, blocks[i], replace(self.parts[i])) for i in range(len(blocks))]
        plain = [(s[0], *s[2:]) for s in signatures]
        return plain.index(plain[index])

    # --- how a block is put together ---------------------------------------------------------------------------------

    def _trace(self) -> None:
        """Watches every block: which norm the FFN reads, from what; and how many values its sublayers give."""
        together = []
        for i, block in enumerate(decoder.blocks(self.model)):
            one = self.parts[i]
            seen = self._watched(block)
            attention, ffn = seen[one.attention.place], seen[one.ffn.place]
            reads, norm = ffn.given, ""
            for name, other in seen.items():
                if name in ("", one.attention.place, one.ffn.place) or "." in name:
                    continue
                if _same(other.gave, reads) and other.given is not None:
                    reads, norm = other.given, name
                    break
            self.block_values = seen[""].values
            together.append(_same(reads, seen[""].given))
            self.parts[i] = replace(one, ffn_norm=norm, attention_values=attention.values, ffn_values=ffn.values)
        if len(set(together)) > 1:
            raise refused(
                self.config, "in some blocks attention and FFN read the same stream, in others one follows the other"
            )
        self.parallel = together[0]

    def _watched(self, block: nn.Module) -> dict[str, _Seen]:
        seen: dict[str, _Seen] = {}
        handles = []
        for name, module in [("", block), *block.named_children()]:

            def hook(_: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                given = args[0] if args else kwargs.get("hidden_states")
                gave = out[0] if isinstance(out, tuple) else out
                seen.setdefault(name, _Seen(_copied(given), _copied(gave), len(out) if isinstance(out, tuple) else 0))

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            self.model(self.ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    # --- units -------------------------------------------------------------------------------------------------------

    def _with(self, index: int, block: nn.Module) -> Tensor:
        """Logits with another block in the place of one."""
        blocks = decoder.blocks(self.model)
        old = blocks[index]
        blocks[index] = block
        try:
            with torch.no_grad():
                logits: Tensor = self.model(self.ids, use_cache=False).logits
        finally:
            blocks[index] = old
        return logits

    def _differs(self, index: int, **units: Tensor | None) -> str:
        """In words, how block ``index`` with units cut differs from itself with zeros there; empty: not at all."""
        family, block = self.family(), decoder.blocks(self.model)[index]
        asked: dict[str, Any] = {"heads": None, "neurons": None, **units}
        try:
            with torch.no_grad():
                sliced = family.sliced(block, **asked)
                got, want = self._with(index, sliced), self._with(index, family.masked(block, **asked))
        except CompressError:
            raise
        except Exception as e:  # that it does not run with fewer units is what was asked
            return f"it does not run with fewer of them ({type(e).__name__}: {' '.join(str(e).split())[:100]})"
        found = _relative(got, want)
        if not found <= TOLERANCE[self.dtype]:
            return f"cut out they leave something else than zeros in their place ({found:.1e})"
        if _relative(want, self.logits) < BLIND:
            return "zeros in their place change nothing"
        costs, g = family.counted[index], geometry_of(family.parts[index])
        less = _linear(block) - _linear(sliced)
        heads, neurons = asked["heads"], asked["neurons"]
        expected = 0
        if heads is not None:
            groups = len(torch.unique(heads // g.group))
            expected += costs.attention_dense - costs.attention(groups, len(heads) // groups if groups else 0)
        if neurons is not None:
            expected += costs.ffn_dense - costs.ffn(len(neurons))
        return "" if less == expected else f"{less:,} parameters go, where {expected:,} are counted"

    def _settle_attention(self, index: int) -> None:
        one = self.parts[index].attention
        if not isinstance(one, Attention):
            return
        failed = ""
        for candidate in _ways(one):
            self.parts[index] = replace(self.parts[index], attention=candidate)
            failed = next(filter(None, (self._differs(index, heads=h) for h in head_sets(candidate))), "")
            if not failed and index not in _keeps(self.own, self.parts):
                failed = self._differs(index, heads=torch.arange(0))
            if not failed:
                return
        self.parts[index] = replace(self.parts[index], attention=Stays(one.place, f"heads: {failed}"))

    def _settle_ffn(self, index: int) -> None:
        one = self.parts[index].ffn
        if not isinstance(one, FFN):
            return
        some = torch.arange(one.width)
        failed = next(
            filter(None, (self._differs(index, neurons=n) for n in (some[some % 3 != 1], some[:1], some[:0]))), ""
        )
        if failed:
            self.parts[index] = replace(self.parts[index], ffn=Stays(one.place, f"neurons: {failed}"))

    # --- pieces, and the saved model ---------------------------------------------------------------------------------

    def _pieces(self) -> ByStructure:
        """That the pieces, put together, are the model; and whether a sublayer's output is simply added."""
        from compress.models.blocks import BlockRunner

        family = self.family()
        runner = BlockRunner(self.model, family, self.LENGTH)
        stream = runner.stream(self.ids)
        scales = []
        for i in range(len(runner.blocks)):
            before = stream
            attention = self._given(runner, family, i, "attention", before)
            middle = runner.middle(i, before, attention)
            ffn = self._given(runner, family, i, "ffn", middle)
            stream = runner.output(i, middle, ffn)
            if not family.parallel:
                scales += [
                    _scale(lambda x, i=i, s=before: runner.middle(i, s, x), before, attention),  # type: ignore[misc]
                    _scale(lambda x, i=i, s=middle: runner.output(i, s, x), middle, ffn),  # type: ignore[misc]
                ]
        hidden = stream[..., : stream.shape[-1] // 2] if family.parallel else stream
        found = _relative(runner.logits(hidden), self.logits)
        if not found <= 10 * TOLERANCE[self.dtype]:
            raise refused(
                self.config,
                f"put together, the pieces its blocks are run in give something else than the model does ({found:.1e}):"
                " a block reads or adds more than attention and a FFN",
                Differs,
            )
        added = [s for s in scales if s is not None]
        if len(added) == len(scales) and added and max(added) - min(added) < 1e-4:
            family.post_norm, family.residual_scale = False, _tidy(added[0])
        family.unit_offset = self._offset(family)
        return family

    def _given(self, runner: Any, family: ByStructure, index: int, kind: str, stream: Tensor) -> Tensor:
        reads = runner.context(index, stream) if kind == "attention" else runner.activation(index, stream)
        layer = family.pruned_layers(runner.blocks[index]).get(kind)
        given: Tensor = reads if layer is None else layer(reads)
        return given

    def _offset(self, family: ByStructure) -> float | None:
        """How the last norm's weight is to be changed so that its output is larger by a factor."""
        norm: Any = decoder.norm_of(self.model)
        if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is not None:
            return None
        x = torch.randn(3, norm.weight.numel(), dtype=self.dtype)
        body = decoder.beside(self.model)
        for offset in (0.0, 1.0):
            family.unit_offset = offset
            weight = family.scaled_norm(body, 1.5)
            assert weight is not None  # an offset was given
            family.replace_norm(body, weight)
            good = _relative(decoder.norm_of(body)(x), 1.5 * norm(x)) < 1e-5
            decoder.body(body)._modules[decoder.norm_name(self.model)] = norm
            if good:
                return offset
        return None

    def _ragged(self, family: ByStructure) -> None:
        """A model whose blocks all differ: decodes with a cache as without, and is the same when it is read again."""
        layers, made, model = [], [], decoder.beside(self.model)
        for i, block in enumerate(decoder.blocks(self.model)):
            one = family.parts[i]
            heads = head_sets(one.attention)[-1] if isinstance(one.attention, Attention) else None
            width = one.ffn.width if isinstance(one.ffn, FFN) else 1
            neurons = torch.arange(i % 2, width, 2) if isinstance(one.ffn, FFN) else None
            made.append(family.sliced(block, heads=heads, neurons=neurons))
            g = geometry_of(one)
            kept = torch.arange(g.heads) if heads is None else heads
            layers.append((len(kept), len(torch.unique(kept // g.group)), width if neurons is None else len(neurons)))
        decoder.put_blocks(model, nn.ModuleList(made))
        want = model(self.ids, use_cache=False).logits
        dense = self._decoded(self.model)
        if dense is not None and _relative(dense, self.logits) < 1e-3:  # where the dense model itself does that
            halves = self._decoded(model)
            found = float("inf") if halves is None else _relative(halves, want)
            if not found <= 10 * TOLERANCE[self.dtype]:
                raise refused(
                    self.config, f"with fewer heads it decodes something else with a cache ({found:.1e})", Differs
                )
        found = self._read_again(family, model, layers, want)
        if not found <= 1e-4:
            raise refused(
                self.config, f"saved and read again, the pruned model gives something else ({found:.1e})", Differs
            )

    def _decoded(self, model: Any) -> Tensor | None:
        """Logits of the text read in two halves; None where the model keeps no cache."""
        half = self.LENGTH // 2
        first = model(self.ids[:, :half], use_cache=True)
        if getattr(first, "past_key_values", None) is None:
            return None
        rest = model(self.ids[:, half:], past_key_values=first.past_key_values, use_cache=True)
        return torch.cat([first.logits, rest.logits], 1)

    def _read_again(
        self, family: ByStructure, model: Any, layers: Sequence[tuple[int, int, int]], want: Tensor
    ) -> float:
        from safetensors.torch import save_file

        from compress.models.reading import load_model

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            head = f"{decoder.head_name(model)}.weight"
            state = {n: t.contiguous() for n, t in model.state_dict().items() if n != head or not family.tied}
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            self.own.save_pretrained(folder)
            facts: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
            family.write_layers(facts, layers, family.geometry(self.own))
            (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
            again = load_model(folder, family)
            return _relative(again(self.ids, use_cache=False).logits.to(want), want)


@dataclass(frozen=True)
class _Seen:
    given: Tensor | None
    gave: Tensor | None
    values: int


def _copied(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) and value.is_floating_point() else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _relative(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where there is no number."""
    if got.shape != want.shape:
        return float("inf")
    found = float((got - want).abs().max() / want.abs().max())
    return found if found == found else float("inf")


def _tidy(scale: float) -> float:
    return 1.0 if abs(scale - 1) < 1e-5 else scale


def _scale(add: Callable[[Tensor], Tensor], stream: Tensor, value: Tensor) -> float | None:
    """m where ``add`` gives stream + m * value, for any value; None where it does something else."""
    nothing, once, other = add(torch.zeros_like(value)), add(value), add(-2.0 * value.flip(1))
    if _relative(nothing, stream) > 1e-5:
        return None
    m = float(((once - stream) * value).sum() / value.pow(2).sum())
    fits = _relative(once - stream, m * value) < 1e-4 and _relative(other - stream, -2 * m * value.flip(1)) < 1e-4
    return m if fits and m else None


def _shape_of(parts: Parts) -> tuple[str, str]:
    return type(parts.attention).__name__, type(parts.ffn).__name__


def _linear(block: nn.Module) -> int:
    """Parameters of a block's linear layers, counted from the modules."""
    return sum(p.numel() for m in block.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False))


def _ways(attention: Attention) -> Iterator[Attention]:
    """The ways in which attention's layers may hold its heads, the likeliest first."""
    yield attention
    if any(what == "qkv" for _, what in attention.rows):
        yield replace(attention, rows=tuple((name, "by group") for name, _ in attention.rows))


def head_sets(attention: Attention) -> list[Tensor]:
    """Choices of query heads, equally many of every group: fewer groups, fewer heads of each, and both."""
    every = torch.arange(attention.heads)
    group = every // attention.group
    found = []
    if attention.kv_heads > 1:
        found.append(every[group > 0])
    if attention.group > 1:
        thin = every[every % attention.group != group % attention.group]
        found.append(thin)
        if attention.kv_heads > 1:
            found.append(thin[thin // attention.group != attention.kv_heads - 1])
    return found or [every]
