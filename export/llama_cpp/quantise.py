"""Which type each tensor is written in, and the bytes of it.

A precision is named as llama.cpp names it. Its mixture is llama.cpp's own (src/llama-quant.cpp, read for the rules):
the head and the tensors that errors are dearest in (`attn_v`, `ffn_down`, both in some blocks) get more bits than the
rest. The arithmetic is ggml's (`ggml_quantize_chunk`), tensor by tensor, so that no second file is written and no model
held.

K-quants take rows in blocks of 256 numbers, the others of 32. A row that does not divide takes a type of 32 with about
as many bits, or float16 where it does not divide by 32 either; that is said, with the width that avoids it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CompressError
from compress.exporters.llama_cpp import library
from compress.exporters.llama_cpp.architectures import Part
from compress.words.wording import counted

T = GGMLQuantizationType
FLOATS = {"f32": T.F32, "f16": T.F16, "bf16": T.BF16}
# precision -> (what most tensors are, the number of the mixture in a file)
BASE = {
    "f32": (T.F32, LlamaFileType.ALL_F32), "f16": (T.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (T.BF16, LlamaFileType.MOSTLY_BF16), "q8_0": (T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (T.Q4_0, LlamaFileType.MOSTLY_Q4_0), "q5_0": (T.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q2_k": (T.Q2_K, LlamaFileType.MOSTLY_Q2_K), "q3_k_s": (T.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "q3_k_m": (T.Q3_K, LlamaFileType.MOSTLY_Q3_K_M), "q3_k_l": (T.Q3_K, LlamaFileType.MOSTLY_Q3_K_L),
    "q4_k_s": (T.Q4_K, LlamaFileType.MOSTLY_Q4_K_S), "q4_k_m": (T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_s": (T.Q5_K, LlamaFileType.MOSTLY_Q5_K_S), "q5_k_m": (T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
}  # fmt: skip
# precision -> role -> type; a pair: the first in the blocks that `dearest` names, the second in the others.
MORE: dict[str, dict[str, Any]] = {
    "q2_k": {"attn_output": T.Q3_K, "ffn_down": T.Q3_K},
    "q3_k_m": {"attn_output": T.Q4_K},
    "q3_k_l": {"attn_v": T.Q5_K, "attn_output": T.Q5_K, "ffn_down": T.Q5_K},
    "q4_k_m": {"attn_v": (T.Q6_K, T.Q4_K), "ffn_down": (T.Q6_K, T.Q4_K)},
    "q5_k_m": {"attn_v": (T.Q6_K, T.Q5_K), "ffn_down": (T.Q6_K, T.Q5_K)},
}
WIDER = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}
LARGEST_F16 = 65504.0
ROWS = 1 << 24  # numbers that are turned at a time


@dataclass(frozen=True)
class Typed:
    """A tensor and the type it is written in; ``wanted`` is another where its rows do not divide."""

    part: Part
    type: GGMLQuantizationType
    wanted: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        *rows, width = self.part.shape
        return int(np.prod(rows, dtype=np.int64)) * row_bytes(self.type, width)


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return width // block * size


def block_of(precision: str) -> int:
    """How many numbers of a row are written together."""
    return int(GGML_QUANT_SIZES[BASE[precision][0]][0])


def typed(parts: Sequence[Part], precision: str, groups: int) -> list[Typed]:
    """Every tensor with its type.

    Args:
        groups: query heads of a KV group of the model's first block; where they are many, v is small and gets more
            bits.
    """
    # The mixtures count the tensors of a role, not the blocks: some blocks have no attention.
    order = {role: [p.name for p in parts if _role(p) == role] for role in ("attn_v", "ffn_down")}
    found = []
    for part in parts:
        wanted = _wanted(part, precision, order, groups)
        kind = wanted
        if part.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = WIDER.get(kind, kind)
        if part.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = T.F16
        found.append(Typed(part, kind, wanted))
    return found


def _role(part: Part) -> str:
    """q, k and v in one tensor are as dear as v."""
    return "attn_v" if part.role == "attn_qkv" else part.role


def _wanted(part: Part, precision: str, order: dict[str, list[str]], groups: int) -> GGMLQuantizationType:
    base, role = BASE[precision][0], _role(part)
    if role == "plain":
        return T.F32
    if precision in FLOATS or precision == "q8_0":
        return base
    if role in ("output", "tied"):
        return T.Q6_K if part.shape[-1] % 256 == 0 else T.Q8_0
    at = order[role].index(part.name) if role in order else 0
    count = len(order.get(role, ()))
    if precision == "q3_k_m" and role in ("attn_v", "ffn_down"):
        first = at < 2 if role == "attn_v" else at < count // 16
        return T.Q5_K if first else T.Q4_K
    if precision == "q4_k_s" and role in ("attn_v", "ffn_down"):
        return T.Q5_K if at < (4 if role == "attn_v" else count // 8) else base
    if precision == "q2_k" and role == "attn_v":
        return T.Q4_K if groups >= 4 else T.Q3_K
    more = MORE.get(precision, {}).get(role, base)
    pair = more if isinstance(more, tuple) else (more, more)
    kind: GGMLQuantizationType = pair[0] if dearest(at, count) else pair[1]
    return kind


def dearest(at: int, count: int) -> bool:
    """Whether the ``at``-th of ``count`` tensors is one of those that get more bits: the first and the last eighth, and
    every third between."""
    eighth = count // 8
    return at < eighth or at >= 7 * count // 8 or (at - eighth) % 3 == 2


def fallbacks(tensors: Sequence[Typed]) -> list[str]:
    """What is said of rows that do not divide: one line for each kind of it."""
    found: dict[tuple[str, str, str], list[Part]] = {}
    for t in tensors:
        if t.type != t.wanted:
            block = GGML_QUANT_SIZES[t.wanted][0]
            how = {
                "ffn_down": f"round_to: {block} when the model is pruned avoids it",
                "attn_output": f"heads x head_dim in {block}s avoids it",
            }.get(t.part.role, "it is the width of the model")
            found.setdefault((t.wanted.name, t.type.name, how), []).append(t.part)
    lines = []
    for (wanted, kind, how), parts in found.items():
        widths, block = {p.shape[-1] for p in parts}, GGML_QUANT_SIZES[GGMLQuantizationType[wanted]][0]
        said = str(min(widths)) if len(widths) == 1 else f"{min(widths)} to {max(widths)}"
        lines.append(
            f"{counted(len(parts), 'tensor')} ({', '.join(sorted({p.role for p in parts}))}) as {kind}, not {wanted}:"
            f" rows of {said} numbers are not in blocks of {block}; {how}"
        )
    return lines


class Converter:
    """Turns a tensor into its bytes, by rows, on some threads. ``importance``: tensor -> (columns,), see
    `library.quantise`."""

    def __init__(self, threads: int, importance: dict[str, NDArray[np.float32]] | None = None) -> None:
        self._threads, self._importance = threads, importance or {}

    def parts(self, t: Typed, tensor: Tensor) -> Iterator[NDArray[Any]]:
        """The bytes of ``tensor``, in order.

        Raises:
            CompressError: float16 cannot hold it.
        """
        rows = tensor.reshape(-1, tensor.shape[-1])
        step = max(1, ROWS // rows.shape[1])
        for at in range(0, len(rows), step):
            yield self._turned(t, rows[at : at + step])

    def _turned(self, t: Typed, rows: Tensor) -> NDArray[Any]:
        if t.type == T.BF16:
            return rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        if t.type == T.F16:
            most = float(rows.abs().max())
            if most > LARGEST_F16:
                raise CompressError(
                    f"the weight {' + '.join(t.part.sources)} goes up to {most:.6g}, and float16 to {LARGEST_F16:g}",
                    where=t.part.name,
                    fix="--precision bf16",
                )
            return rows.to(torch.float16).contiguous().numpy()
        plain = rows.float().contiguous().numpy()
        if t.type == T.F32:
            return plain
        lib = library.load(library.find())
        importance = self._importance.get(t.part.name)
        size = -(-len(plain) // self._threads)
        with ThreadPoolExecutor(self._threads) as pool:  # ctypes lets the interpreter go on
            slices = [plain[i : i + size] for i in range(0, len(plain), size)]
            made = list(pool.map(lambda s: library.quantise(lib, int(t.type), s, importance), slices))
        return np.concatenate(made)
