"""Which decoders of transformers can be pruned, and how far: the table of docs/measured/decoders.md.

    PYTHONPATH=. python tools/decoders.py [--onnx] [--write] [TYPE ...]

Each is a tiny random model of its architecture. The columns: what of it is cut (the rest stays whole, for the reason
that is named), whether the units cut are those that the costs count and leave what zeros in their place leave
(``units``), whether a model whose layers all differ is saved and read again, held and streamed, with the same logits
(``ragged``), whether it decodes with a cache in transformers alone, in a clean process (``reload``), whether one with a
block gone and all others alike is transformers' own class, with the logits it had (``stock``), whether llama.cpp has an
architecture for it here, ragged or stock (``GGUF``), and, with --onnx, whether ONNX Runtime gives the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.models import decoder

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 6, "head_dim": 8,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
# Type -> (name, what makes it itself). None leaves a key of `SHAPE` out.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "ministral": ("Ministral", {"sliding_window": 16}),
    "ministral3": ("Ministral 3", {}),
    "qwen2": ("Qwen2, Qwen2.5", {"head_dim": None}),
    "qwen3": ("Qwen3", {}),
    "qwen3_5_text": ("Qwen3.5", LINEAR),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma 2", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma 3", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma4_text": ("Gemma 4 with per-layer inputs (E2B, E4B)", {"vocab_size_per_layer_input": 300}),
    "gemma4_unified_text": ("Gemma 4", {"sliding_window": 16}),
    "vaultgemma": ("VaultGemma", {"sliding_window": 16}),
    "recurrent_gemma": ("RecurrentGemma", {"attention_window_size": 16}),
    "phi": ("Phi-1, Phi-2", {}),
    "phi3": ("Phi-3, Phi-4", {}),
    "smollm3": ("SmolLM3", {}),
    "olmo": ("OLMo", {}),
    "olmo2": ("OLMo 2", {}),
    "olmo3": ("OLMo 3", {"sliding_window": 16}),
    "olmo_hybrid": ("OLMo Hybrid", LINEAR),
    "granite": ("Granite 3", {"residual_multiplier": 0.22, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "granite_swa": ("Granite with windows", {"sliding_window": 16}),
    "granitemoehybrid": (
        "Granite 4 (dense hybrid)",
        {**MAMBA, "num_local_experts": 0, "shared_intermediate_size": 56, "residual_multiplier": 0.22,
         "layer_types": ["mamba", "mamba", "attention", "mamba"]},
    ),
    "glm": ("GLM-4 (9B)", {"attention_bias": True}),
    "glm4": ("GLM-4 (0414)", {"attention_bias": True}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere 2", {"sliding_window": 16}),
    "stablelm": ("StableLM", {"head_dim": None}),
    "internlm3": ("InternLM 3", {}),
    "iquestcoder": ("IQuest-Coder", {}),
    "exaone4": ("EXAONE 4", {"sliding_window": 16}),
    "nemotron": ("Nemotron", {}),
    "starcoder2": ("StarCoder2", {"sliding_window": None, "head_dim": None}),
    "hunyuan_v1_dense": ("Hunyuan", {}),
    "apertus": ("Apertus", {}),
    "seed_oss": ("Seed-OSS", {"attention_out_bias": True}),
    "ernie4_5": ("ERNIE 4.5", {}),
    "helium": ("Helium", {}),
    "arcee": ("Arcee", {}),
    "cwm": ("CWM", {"sliding_window": 16}),
    "hyperclovax": ("HyperCLOVA X", {}),
    "jais2": ("Jais 2", {}),
    "nanochat": ("nanochat", {}),
    "persimmon": ("Persimmon", {"hidden_size": 96, "head_dim": None}),
    "gpt_neox": ("GPT-NeoX, Pythia", {"head_dim": None, "rotary_pct": 1.0}),
    "gptj": ("GPT-J", {"head_dim": None, "rotary_dim": 4}),
    "codegen": ("CodeGen", {"head_dim": None, "num_attention_heads": 8, "hidden_size": 64, "rotary_dim": 4}),
    "falcon": ("Falcon", {"head_dim": None, "multi_query": True}),
    "gpt_bigcode": ("StarCoder (GPT-BigCode)", {"head_dim": None}),
    "diffllama": ("DiffLlama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "lfm2": ("LFM2", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "lfm3": ("LFM3", {}),
    "minicpm3": ("MiniCPM3", LATENT),
    "youtu": ("Youtu", LATENT),
    "bitnet": ("BitNet", {}),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen3_moe": ("Qwen3 MoE", EXPERTS),
    "bloom": ("BLOOM", {"head_dim": None}),
    "mpt": ("MPT", {"head_dim": None, "d_model": 48, "n_heads": 6}),
    "doge": ("Doge", {}),
    "falcon_h1": ("Falcon-H1", {**MAMBA, "mamba_d_ssm": 96}),
    "opt": ("OPT", {"head_dim": None}),
    "gpt2": ("GPT-2", {"head_dim": None}),
}  # fmt: skip


def tiny(model_type: str, seed: int = 0) -> Any:
    """A random model in float32; norms and biases are random too, so that forgetting one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in {**SHAPE, **DECODERS[model_type][1]}.items() if v is not None or k not in SHAPE}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    saved = set(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.dim() > 1 else 0.3)).requires_grad_(False)
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(torch.randn(buffer.shape) * 0.1)
    return model


def ragged(model: Any, family: Any) -> Any:
    """A plan in which the blocks differ: heads and neurons are cut where they can be, all in the third block."""
    from compress.language.plan import BlockPlan, Plan

    geometry = family.geometry(model.config)
    keeps, blocks = family.keeps_attention(model.config), []
    for i, g in enumerate(geometry.blocks):
        heads, neurons = tuple(range(g.heads)), tuple(range(g.ffn))
        if not g.attention_whole:
            if i == 2 and i not in keeps:
                heads = ()
            elif i % 2 and g.kv_heads > 1:
                heads = heads[g.group :]
            elif g.group > 1:
                heads = tuple(h for h in heads if h % g.group != i % g.group)
        if not g.ffn_whole:
            neurons = () if i == 2 else neurons[i % 2 :: 2]
        blocks.append(BlockPlan(heads, neurons))
    return Plan(tuple(blocks))


@dataclass(frozen=True)
class Row:
    """One decoder. ``cut``, ``units`` and so on are ``yes``, ``no`` or what is whole; ``note`` says why."""

    title: str
    model_type: str
    attention: str
    ffn: str
    units: str
    ragged: str
    reload: str
    stock: str
    gguf: str
    onnx: str
    seconds: float
    note: str


def row(model_type: str, onnx: bool, clean: Path | None = None) -> Row:
    """Proves one architecture, and does with it what a run does; a saved one is left in the folder ``clean``.

    Raises:
        Exception: what is not a refusal is a fault of compress, and ends the table.
    """
    from compress.language.checkpoint import save_model
    from compress.models.families import family_for
    from compress.models.reading import load_model
    from compress.models.streaming import stream_model
    from tests.tiny import word_tokenizer

    title = DECODERS[model_type][0]
    began = time.monotonic()
    model = tiny(model_type)
    try:
        family = family_for(model.config)
    except CompressError as e:
        why = e.what.partition("not supported: ")[2]
        return Row(title, model_type, *["no"] * 8, time.monotonic() - began, why)
    took = time.monotonic() - began
    ids = torch.randint(3, 300, (1, 16), generator=torch.Generator().manual_seed(1))
    plan, costs = ragged(model, family), family.costs(model.config)
    masked, dense = tiny(model_type), linear_parameters(model)
    counts = plan.counts(family.geometry(model.config))
    plan.apply(model, family)
    plan.mask(masked, family)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        units = close(want, masked(ids, use_cache=False).logits) and linear_parameters(model) == dense - plan.removed(
            costs
        )
    exported = "not tried"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        save_model(model, family, counts, folder, tokenizer=word_tokenizer(folder), dtype=torch.float32, tokens=ids)
        streamed = stream_model(folder, family, 1, torch.device("cpu"))
        with torch.no_grad():
            again = [m(ids, use_cache=False).logits for m in (load_model(folder, family), streamed)]
        if clean is not None:
            shutil.copytree(folder, clean / model_type)
        if onnx:
            exported = export_of(model, Path(name))
    whole, stock = family.whole(model.config), stock_of(model_type, family, ids)
    reasons = {
        (w.sublayer, w.reason): [v.block for v in whole if (v.sublayer, v.reason) == (w.sublayer, w.reason)]
        for w in whole
    }
    notes = [f"{kind} of {blocks_of(at, len(counts))} whole: {why}" for (kind, why), at in reasons.items()]
    return Row(
        title,
        model_type,
        cut_of(whole, "attention", len(counts)),
        cut_of(whole, "ffn", len(counts)),
        "yes" if units else "no",
        "yes" if all(close(a, want) for a in again) else "no",
        "not tried",
        stock if stock == "yes" else "no",
        gguf_of(tiny(model_type).config, family),
        exported if exported in ("yes", "not tried") else "no",
        took,
        "; ".join([*notes, *(found for found in (stock, exported) if found not in ("", "yes", "not tried"))]),
    )


def stock_of(model_type: str, family: Any, ids: torch.Tensor) -> str:
    """``yes``, or why a model with one block gone and the others alike is not saved as transformers' own class."""
    from transformers import AutoModelForCausalLM

    from compress.language.checkpoint import check_stock, save_model
    from compress.language.plan import BlockPlan, Plan
    from tests.tiny import word_tokenizer

    model = tiny(model_type)
    every = family.geometry(model.config).blocks
    if any(b.attention_whole or b.ffn_whole for b in every):
        return ""  # said by what is whole
    if len(set(every)) > 1:
        return "stock: the dense blocks differ"
    try:
        check_stock(model.config, family)
    except CompressError as e:
        return f"stock: {e.what}"
    block = every[0]
    each = block.group - 1 if block.group > 1 else 1  # query heads that every KV group keeps
    heads = tuple(h for h in range(block.heads) if h % block.group < each) if block.group > 1 else tuple(range(1, 2))
    gone = next(i for i in range(len(every) - 1, -1, -1) if i not in family.keeps_attention(model.config))
    alike = BlockPlan(heads, tuple(range(0, block.ffn, 2)))
    plan = Plan(tuple(BlockPlan((), ()) if i == gone else alike for i in range(len(every))))
    counts = plan.counts(family.geometry(model.config))
    plan.apply(model, family)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), word_tokenizer(Path(name))
        try:
            save_model(model, family, counts, folder, tokenizer=tokenizer, dtype=torch.float32, tokens=ids, stock=True)
            cls: Any = AutoModelForCausalLM
            own, info = cls.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
        except (CompressError, ValueError, RuntimeError) as e:
            return f"stock: {' '.join(str(e).split())[:120]}"
        with torch.no_grad():
            same = not info["missing_keys"] and close(own.eval()(ids, use_cache=False).logits, want)
    return "yes" if same else "stock: other logits"


def gguf_of(config: Any, family: Any) -> str:
    from compress.exporters.llama_cpp import architectures

    try:
        architectures.plan(config, family, "")
    except CompressError:
        return "no"
    try:
        architectures.takes_uneven(config, family, "")
    except CompressError:
        return "stock"
    return "ragged"


def reloaded(folder: Path) -> dict[str, str]:
    """Loads every saved model below ``folder`` in one clean process that knows nothing of compress, as `verify_clean`
    does: ``yes`` by its name where the logits are those of its fingerprint, else what was found."""
    from compress.language.checkpoint import TOLERANCE

    script = Path(__file__).parents[1] / "compress" / "language" / "reload.py"
    code = (
        "import json, pathlib, runpy, sys\n"
        f"main = runpy.run_path({str(script)!r})['main']\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    print(path.name, end=' ', flush=True)\n"
        "    try: main(str(path), None)\n"
        "    except Exception as e: print(json.dumps({'failed': f'{type(e).__name__}: {e}'[:200]}))\n"
    )
    with tempfile.TemporaryDirectory() as modules:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "PYTHONPATH": ""}
        command = [sys.executable, "-P", "-c", code, str(folder)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=True)
    found = {}
    for line in done.stdout.splitlines():
        name, _, facts = line.partition(" ")
        said = json.loads(facts)
        good = "failed" not in said and said["max_abs_difference"] <= TOLERANCE * said["max_abs_logit"]
        found[name] = "yes" if good else str(said)
    return found


def blocks_of(at: list[int], layers: int) -> str:
    return "every block" if len(at) == layers else f"{len(at)} of {layers} blocks"


def cut_of(whole: Any, kind: str, layers: int) -> str:
    kept = sum(w.sublayer == kind for w in whole)
    return "yes" if not kept else "whole" if kept == layers else "in part"


def export_of(model: Any, folder: Path) -> str:
    """``yes``, or why ONNX Runtime does not give what torch gives."""
    from compress.exporters.onnx import export_llm
    from compress.exporters.parity import check_llm

    out = folder / "onnx"
    out.mkdir()
    try:
        export_llm(model, out)
        found = check_llm(model, out, tolerance=1e-3, vocab=300)
    except CompressError as e:
        return f"ONNX: {e.what.splitlines()[0][:120]}"
    return "yes" if max(found["outputs"].values()) < 1e-3 else "ONNX: other logits"


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


def linear_parameters(model: Any) -> int:
    """Parameters of all linear layers in the blocks, counted from the modules."""
    linear = (m for m in decoder.blocks(model).modules() if isinstance(m, torch.nn.Linear))
    return sum(p.numel() for m in linear for p in m.parameters(recurse=False))


HEAD = ("decoder", "type", "attention", "FFN", "units", "ragged", "reload", "stock", "GGUF", "ONNX", "why")


def table(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for r in rows:
        note = r.note.replace("|", "\\|").replace("\n", " ")
        kinds = (r.attention, r.ffn, r.units, r.ragged, r.reload, r.stock, r.gguf, r.onnx)
        cells = (r.title, f"`{r.model_type}`", *kinds, note)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(types: Sequence[str], onnx: bool, folder: Path) -> list[Row]:
    rows = []
    for model_type in types:
        rows.append(row(model_type, onnx, folder))
        r = rows[-1]
        print(
            f"{r.title}: {r.attention}, {r.ffn}, {r.units}, {r.ragged}, {r.stock}, {r.gguf}, {r.onnx}"
            f" ({r.seconds:.1f} s) {r.note}",
            file=sys.stderr,
            flush=True,
        )
    clean = reloaded(folder)
    return [
        replace(r, reload="yes" if clean[r.model_type] == "yes" else "no", note=_with(r.note, clean[r.model_type]))
        if r.model_type in clean
        else r
        for r in rows
    ]


def _with(note: str, found: str) -> str:
    return note if found == "yes" else "; ".join(filter(None, (note, f"reload: {found}")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; all of the table by default")
    parser.add_argument("--onnx", action="store_true", help="export each to ONNX as well (some seconds a model)")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the table into this page, behind its marker")
    options = parser.parse_args()
    from compress.language.setup import quiet

    quiet()
    with tempfile.TemporaryDirectory() as name:
        rows = _rows(options.types or list(DECODERS), options.onnx, Path(name))
    print(table(rows))
    if options.write:
        page = options.write.read_text("utf-8")
        marker = "<!-- the table: tools/decoders.py -->\n"
        options.write.write_text(page.partition(marker)[0] + marker + "\n" + table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
