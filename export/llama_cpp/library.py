"""libllama through ctypes: a GGUF's tokens and logits, and ggml's quantisers.

Any build will do whose structures are laid out as `CONTEXT` says, which is asked when it is loaded: the defaults that
it gives must stand where they are looked for. `COMPRESS_LIBLLAMA` names another than the one in the package
`xllamacpp`. Structures are passed as blocks of bytes larger than any build's, and only fields at known places are set:
fields that a newer build adds behind them do no harm. Tried: xllamacpp 2026.10.11549, node-llama-cpp 3.22.1 (llama.cpp
v0.5.0).

A file that it does not like can make it abort the process, so files are loaded in a child (`worker`). This module
imports nothing of torch: the child starts fast.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.distribution import install_line
from compress.errors import CompressError, UsageError

VARIABLE = "COMPRESS_LIBLLAMA"
PACKAGE = "xllamacpp"
ROOM = 1024  # bytes: more than any build's structure takes

# The defaults of llama_context_params from its beginning, as 32-bit words: `i` a whole number, `f` a float, `p` half a
# pointer, by the name of the field.
CONTEXT: tuple[tuple[str, str, float], ...] = (
    ("n_ctx", "i", 512), ("n_batch", "i", 2048), ("n_ubatch", "i", 512), ("n_seq_max", "i", 1), ("n_rs_seq", "i", 0),
    ("n_outputs_max", "i", 0), ("n_outputs_max_per_seq", "i", 1), ("n_threads", "i", 4), ("n_threads_batch", "i", 4),
    ("ctx_type", "i", 0), ("rope_scaling_type", "i", -1), ("pooling_type", "i", -1), ("attention_type", "i", -1),
    ("flash_attn_type", "i", -1), ("rope_freq_base", "f", 0), ("rope_freq_scale", "f", 0), ("yarn_ext_factor", "f", -1),
    ("yarn_attn_factor", "f", -1), ("yarn_beta_fast", "f", -1), ("yarn_beta_slow", "f", -1), ("yarn_orig_ctx", "i", 0),
    ("defrag_thold", "f", -1), ("cb_eval", "p", 0), ("cb_eval ", "p", 0), ("cb_eval_user_data", "p", 0),
    ("cb_eval_user_data ", "p", 0), ("type_k", "i", 1), ("type_v", "i", 1),
)  # fmt: skip
# The same of llama_model_params: two pointers, then how many layers go to a GPU (-1: all).
MODEL: tuple[tuple[str, str, float], ...] = (
    ("devices", "p", 0), ("devices ", "p", 0), ("buffers", "p", 0), ("buffers ", "p", 0), ("n_gpu_layers", "i", -1),
)  # fmt: skip
NEEDED = (
    "llama_backend_init", "llama_log_set", "llama_model_default_params", "llama_context_default_params",
    "llama_model_load_from_file", "llama_init_from_model", "llama_batch_init", "llama_decode", "llama_get_logits_ith",
    "llama_model_get_vocab", "llama_vocab_n_tokens", "llama_tokenize", "llama_detokenize", "llama_vocab_is_eog",
    "llama_get_memory", "llama_memory_clear", "llama_memory_seq_rm", "llama_set_n_threads", "ggml_backend_dev_count",
    "ggml_quantize_chunk", "ggml_type_size", "ggml_blck_size",
)  # fmt: skip
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Bytes(ctypes.Structure):
    _fields_ = (("held", ctypes.c_uint8 * ROOM),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Refused(Exception):
    """libllama does not take a file, or cannot run it; its own words lie in the log."""


def find() -> Path:
    """The library's file.

    Raises:
        UsageError: there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise UsageError(
                "there is no such file", where=f"{VARIABLE}={named}", fix="name libllama.so, with its path"
            )
        return Path(named).absolute()
    found = importlib.util.find_spec(PACKAGE)
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        for path in sorted(Path(place).glob(f"{PACKAGE}*.*")):
            if path.suffix in (".so", ".dylib", ".pyd"):
                return path
    raise UsageError(
        f"the format gguf needs {PACKAGE}, which is not installed",
        where="--format",
        fix=f"{install_line('gguf')}, or set {VARIABLE} to the path of a libllama",
    )


def title() -> str:
    """The library and its version, as a record names it."""
    path = find()
    return path.name if os.environ.get(VARIABLE) else f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


@functools.cache
def load(path: Path) -> Any:
    """The library, its functions typed.

    Raises:
        CompressError: it cannot be loaded, lacks a function, or its structures are not laid out as is known here.
    """
    try:
        lib: Any = ctypes.CDLL(str(path))
    except OSError as e:
        raise CompressError(f"libllama cannot be loaded: {e}", where=str(path), fix=install_line("gguf")) from e
    absent = [name for name in NEEDED if not hasattr(lib, name)]
    if absent:
        raise CompressError(
            f"this library has no function {absent[0]}", where=str(path), fix="name a libllama that was built as shared"
        )
    _type(lib)
    return lib


def _type(lib: Any) -> None:
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Bytes
    lib.llama_model_load_from_file.argtypes, lib.llama_model_load_from_file.restype = (text, _Bytes), pointer
    lib.llama_init_from_model.argtypes, lib.llama_init_from_model.restype = (pointer, _Bytes), pointer
    lib.llama_batch_init.argtypes, lib.llama_batch_init.restype = (integer, integer, integer), _Batch
    lib.llama_decode.argtypes, lib.llama_decode.restype = (pointer, _Batch), integer
    lib.llama_get_logits_ith.argtypes = (pointer, integer)
    lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_model_get_vocab.argtypes, lib.llama_model_get_vocab.restype = (pointer,), pointer
    lib.llama_vocab_n_tokens.argtypes, lib.llama_vocab_n_tokens.restype = (pointer,), integer
    lib.llama_vocab_is_eog.argtypes, lib.llama_vocab_is_eog.restype = (pointer, integer), ctypes.c_bool
    lib.llama_tokenize.argtypes = (pointer, text, integer, pointer, integer, ctypes.c_bool, ctypes.c_bool)
    lib.llama_detokenize.argtypes = (pointer, pointer, integer, text, integer, ctypes.c_bool, ctypes.c_bool)
    lib.llama_get_memory.argtypes, lib.llama_get_memory.restype = (pointer,), pointer
    lib.llama_memory_clear.argtypes, lib.llama_memory_clear.restype = (pointer, ctypes.c_bool), None
    lib.llama_memory_seq_rm.argtypes = (pointer, integer, integer, integer)
    lib.llama_memory_seq_rm.restype = ctypes.c_bool
    lib.llama_set_n_threads.argtypes, lib.llama_set_n_threads.restype = (pointer, integer, integer), None
    lib.llama_log_set.argtypes, lib.llama_log_set.restype = (_LOG, pointer), None
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_type_size.argtypes, lib.ggml_type_size.restype = (ctypes.c_int,), ctypes.c_size_t
    lib.ggml_blck_size.argtypes, lib.ggml_blck_size.restype = (ctypes.c_int,), ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer,
    )  # fmt: skip
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t


def with_fields(defaults: bytes, layout: Sequence[tuple[str, str, float]], fields: dict[str, int], path: Path) -> bytes:
    """A structure with ``fields`` set (whole numbers).

    Raises:
        CompressError: the defaults do not stand where the layout says.
    """
    words = {"i": "i", "f": "f", "p": "i"}
    form = "<" + "".join(words[kind] for _, kind, _ in layout)
    found = struct.unpack_from(form, defaults)
    for at, ((name, _, want), got) in enumerate(zip(layout, found, strict=True)):
        if got != want:
            raise CompressError(
                f"this llama.cpp lays its settings out in a way that is not known here ({name.strip()}, word {at},"
                f" is {got:g} where {want:g} is its default)",
                where=str(path),
                fix=f"pip install {PACKAGE} in the version that constraints.txt names, or unset {VARIABLE}",
            )
    names = [name for name, *_ in layout]
    made = bytearray(defaults)
    for name, value in fields.items():
        struct.pack_into("<i", made, 4 * names.index(name), value)
    return bytes(made)


def quantise(
    lib: Any, kind: int, rows: NDArray[np.float32], importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Rows (n, width) in float32 -> (n, bytes of a row) in ggml's type number ``kind``.

    Args:
        importance: (width,) how much each column counts; None: all alike.
    """
    n, width = rows.shape
    rows = np.ascontiguousarray(rows)
    made = np.empty((n, width // lib.ggml_blck_size(kind) * lib.ggml_type_size(kind)), np.uint8)
    weight = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data
    written = lib.ggml_quantize_chunk(kind, rows.ctypes.data, made.ctypes.data, 0, n, width, weight)
    if written != made.nbytes:
        raise CompressError(
            f"ggml wrote {written} bytes where {made.nbytes} were due", fix="another build of llama.cpp"
        )
    return made


class Model:
    """A GGUF in libllama. To be used in a process that may end at any call.

    Args:
        length: tokens of a context, all of which may be given at once.
        plain_cache: keys and values are kept in float32; otherwise in float16, as users have them.

    Raises:
        Refused: it cannot be loaded.
        CompressError: see `load`.
    """

    def __init__(
        self, path: Path, gguf: Path, length: int, threads: int, plain_cache: bool, log: Callable[[str], None]
    ) -> None:
        self._lib = lib = load(path)
        self._log = _LOG(lambda _level, text, _data: log((text or b"").decode("utf-8", "replace")))
        lib.llama_log_set(self._log, None)
        _load_backends(lib, path)
        lib.llama_backend_init()
        settings = with_fields(bytes(lib.llama_model_default_params().held), MODEL, {"n_gpu_layers": 0}, path)
        self._model = lib.llama_model_load_from_file(os.fsencode(gguf), _Bytes.from_buffer_copy(settings))
        if not self._model:
            raise Refused("the file cannot be loaded")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        fields = {"n_ctx": length, "n_batch": length, "n_outputs_max_per_seq": 0}
        if plain_cache:
            fields |= {"type_k": 0, "type_v": 0, "flash_attn_type": 0}  # GGML_TYPE_F32
        settings = with_fields(bytes(lib.llama_context_default_params().held), CONTEXT, fields, path)
        self._context = lib.llama_init_from_model(self._model, _Bytes.from_buffer_copy(settings))
        if not self._context:
            raise Refused("no context can be made of the file")
        lib.llama_set_n_threads(self._context, threads, threads)
        self._batch = lib.llama_batch_init(length, 0, 1)
        if (
            self._batch.n_tokens
            or self._batch.embd
            or not all((self._batch.token, self._batch.pos, self._batch.logits))
        ):
            raise Refused("its batches are laid out in a way that is not known here")

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, with what the file says is put around one; special tokens in it are read as such."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 16))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), room, len(room), True, True)
        if count < 0:
            raise Refused("the text cannot be tokenised")
        return list(room[:count])

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        given = (ctypes.c_int32 * max(1, len(ids)))(*ids)
        room = ctypes.create_string_buffer(256 * max(1, len(ids)))
        count = self._lib.llama_detokenize(self._vocab, given, len(ids), room, len(room), True, False)
        if count < 0:
            raise Refused("its tokens make a longer text than there is room for")
        return room.raw[:count].decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        """Whether the token ends a text."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def forget(self, since: int = 0) -> None:
        """Takes the tokens from position ``since`` on out of the cache."""
        memory = self._lib.llama_get_memory(self._context)
        if since == 0:
            self._lib.llama_memory_clear(memory, True)
        elif not self._lib.llama_memory_seq_rm(memory, 0, since, -1):
            raise Refused(f"its cache cannot forget what stands behind token {since}")

    def logits(self, ids: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """(n, vocab): the logits behind each of the tokens ``ids``, which stand at positions ``first`` and on."""
        self._decode(ids, first, every=True)
        return np.stack([self._row(i) for i in range(len(ids))])

    def last(self, ids: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """(vocab,): the logits behind the last of them alone, as text is generated; valid until the next call."""
        self._decode(ids, first, every=False)
        return self._row(len(ids) - 1)

    def _decode(self, ids: Sequence[int], first: int, every: bool) -> None:
        batch, end = self._batch, len(ids) - 1
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, first + i, 1, every or i == end
            batch.seq_id[i][0] = 0
        if self._lib.llama_decode(self._context, batch):
            raise Refused("it cannot be run")

    def _row(self, i: int) -> NDArray[np.float32]:
        found = self._lib.llama_get_logits_ith(self._context, i)
        if not found:
            raise Refused(f"there are no logits of token {i}")
        row: NDArray[np.float32] = np.ctypeslib.as_array(found, (self.vocab,))
        return row


def _load_backends(lib: Any, path: Path) -> None:
    """Some builds keep the code for each kind of CPU in files beside the library."""
    if lib.ggml_backend_dev_count():
        return
    if hasattr(lib, "ggml_backend_load_all_from_path"):
        lib.ggml_backend_load_all_from_path.argtypes, lib.ggml_backend_load_all_from_path.restype = (
            (ctypes.c_char_p,),
            None,
        )
        lib.ggml_backend_load_all_from_path(os.fsencode(path.parent))
    if not lib.ggml_backend_dev_count():
        raise Refused(f"no library for this CPU lies beside {path.name}")
