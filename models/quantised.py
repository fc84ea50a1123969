"""fp8 checkpoints and GGUF files as the plain weights that all else reads: made once, kept in the cache.

The arithmetic is transformers' own. An fp8 checkpoint (``quant_method: fp8``, a scale for every block of a weight) is
turned tensor by tensor, so no more than one of its files is held; a GGUF is loaded whole, in float32. What is quantised
otherwise is refused, see `compress.models.folder.read_config`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import CompressError, UsageError
from compress.models.composite import find as find_composite
from compress.models.composite import language_of
from compress.models.folder import (
    CONFIG,
    INDEX,
    QUANTISED,
    data_files,
    has_weights,
    own_file,
    refuse_adapter,
    weights_of,
)
from compress.models.kept import Files, kept
from compress.models.reading import NO_CODE, check_weights, load_config, refuse_ragged, rejected
from compress.models.sizes import check_sizes
from compress.run.cache import cache_dir, sha256_of
from compress.run.progress import say
from compress.run.strict_json import read_json
from compress.system.files import check_regular

if TYPE_CHECKING:
    from torch import Tensor

FP8, GGUF = "fp8", ".gguf"
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SCALE = "_scale_inv"  # behind the name of the weight that it belongs to
# What a layer that computes in fp8 multiplies its input by: plain weights have no use for it.
OF_INPUTS = (".activation_scale", ".input_scale")
PLAIN = ("F32", "F16", "BF16")  # types of a GGUF's tensors that are no quantisation
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.I)


@dataclass(frozen=True)
class Quantised:
    """A model that has to be dequantised before it is read.

    ``path`` is the folder of an fp8 checkpoint, or the GGUF itself. ``block`` (rows, columns) of a weight share a
    scale; None: the grid of scales says it. ``dtype`` is the type of the weights that are made; ``words`` say what
    that changes.
    """

    kind: Literal["fp8", "gguf"]
    path: Path
    dtype: str
    words: str
    block: tuple[int, int] | None = None

    @property
    def home(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def is_gguf(path: Path) -> bool:
    """Whether this is a file that calls itself a GGUF."""
    return path.suffix.lower() == GGUF and path.is_file()


def find(path: Path) -> Quantised | None:
    """What is quantised there in a way that is undone here; None where the weights are plain, or there is no model.

    Raises:
        UsageError: the folder holds several GGUF files.
        CompressError: it cannot be read, is a part of a GGUF, or is fp8 of a kind that is not known.
    """
    if not path.is_dir():
        return _gguf(path.parent, path.name) if is_gguf(path) else None
    refuse_adapter(path)
    names = sorted(p.name for p in path.iterdir() if p.suffix.lower() == GGUF)
    if names and not has_weights(path):
        if len(names) > 1 and not all(_PART.search(n) for n in names):
            raise UsageError(
                f"the folder holds {len(names)} GGUF files: {', '.join(names)}",
                where=str(path),
                fix=f"name the one that is meant: {path / names[0]}",
            )
        return _gguf(path, names[0])
    if not (path / CONFIG).exists():
        return None
    config = read_json(own_file(path, CONFIG), "the configuration")
    facts = config.get(QUANTISED) if isinstance(config, dict) else None
    if not isinstance(facts, dict) or facts.get("quant_method") != FP8:
        return None
    return _fp8(path, config, facts)


def _fp8(folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Quantised:
    def refuse(what: str) -> CompressError:
        return CompressError(
            f"{QUANTISED} {what}", where=str(folder / CONFIG), fix="name the unquantised model, or fetch this one again"
        )

    block = facts.get("weight_block_size", [128, 128])
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise refuse(f"says that weight_block_size is {block!r:.60}, not two whole numbers")
    if facts.get("expert_dtype", FP8) != FP8 or facts.get("scale_fmt", "float") not in ("float", "ue8m0"):
        raise refuse("is of a kind of fp8 that is not known here")
    inner = config.get("text_config")
    said = [c.get(key) for c in (inner, config) if isinstance(c, dict) for key in ("dtype", "torch_dtype")]
    dtype = next((str(d).removeprefix("torch.") for d in said if d is not None), "bfloat16")
    words = f"weights dequantised from fp8 to {dtype}"
    return Quantised("fp8", folder, dtype, words, None if block is None else (block[0], block[1]))


def _gguf(folder: Path, name: str) -> Quantised:
    own_file(folder, name)
    path = folder / name
    if _PART.search(name):
        raise CompressError(
            f"{name} is one part of a GGUF that is cut into several",
            where=str(folder),
            fix="join them first (llama.cpp's llama-gguf-split --merge), and name the whole file",
        )
    types = _types(path)
    verb = "taken" if set(types) <= set(PLAIN) else "dequantised"
    return Quantised("gguf", path, "float32", f"weights {verb} from GGUF ({', '.join(types)}) to float32")


def _types(path: Path) -> list[str]:
    """The types of a GGUF's tensors, those of the most values first."""
    sizes: dict[str, int] = {}
    for kind, count in _tensors(path).values():
        sizes[kind] = sizes.get(kind, 0) + count
    if not sizes:
        raise CompressError("the GGUF file holds no tensor", where=str(path), fix="fetch or copy it again")
    return sorted(sizes, key=lambda kind: (-sizes[kind], kind))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a GGUF, from its head: name -> shape, as torch has it.

    Raises:
        CompressError: it is no whole GGUF.
    """
    from gguf import GGUFReader

    with _rejected_gguf(path, "this is no whole GGUF file"):
        return {t.name: tuple(int(d) for d in reversed(t.shape)) for t in GGUFReader(path).tensors}


def _tensors(path: Path) -> dict[str, tuple[str, int]]:
    """Of every tensor of a GGUF, from its head: name -> (type, number of values)."""
    from gguf import GGUFReader

    with _rejected_gguf(path, "this is no whole GGUF file"):
        return {t.name: (t.tensor_type.name, int(t.n_elements)) for t in GGUFReader(path).tensors}


@contextmanager
def _rejected_gguf(path: Path, what: str) -> Iterator[None]:
    """What the readers of a GGUF make of one that is damaged, as one error."""
    check_regular(path, "the GGUF file", "fetch or copy it again")
    try:
        with rejected(path.parent, path.name, what):
            yield
    except (struct.error, LookupError, AssertionError, NotImplementedError, ArithmeticError, MemoryError) as e:
        said = " ".join(str(e).split()) or type(e).__name__
        raise CompressError(f"{what}: {said[:200]}", where=str(path), fix="fetch or copy it again") from e


def config_of(model: Quantised) -> Any:
    """The transformers configuration of the plain model; no weight is read.

    Raises:
        CompressError: as `compress.models.reading.load_config`; its layers differ in size already.
    """
    with tempfile.TemporaryDirectory(prefix="compress-config-") as temporary:
        view = Path(temporary)
        if model.kind == "gguf":
            return _gguf_config(model.path, view)
        try:
            _write_config(model, view)
            refuse_ragged(view)
            config = load_config(view)
            if find_composite(view) is not None:
                config = language_of(config)
        except CompressError as e:
            e.rename(view, model.path)
            raise
    config._name_or_path = str(model.path)
    return config


def _write_config(model: Quantised, made: Path) -> None:
    config = read_json(own_file(model.path, CONFIG), "the configuration")
    kept = {k: v for k, v in config.items() if k not in (QUANTISED, "torch_dtype")}
    (made / CONFIG).write_text(json.dumps({**kept, "dtype": model.dtype}, indent=2) + "\n", encoding="utf-8")


def _gguf_config(path: Path, view: Path) -> Any:
    from transformers import AutoConfig

    link = view / "model.gguf"
    link.symlink_to(path.resolve())
    with _rejected_gguf(path, "the configuration in the GGUF cannot be read"):
        config = AutoConfig.from_pretrained(view, gguf_file=link.name, **NO_CODE)
        check_sizes(config.to_dict(), path)
    blocks = 1 + max((int(m[1]) for name in _tensors(path) if (m := _BLOCK.match(name))), default=-1)
    if blocks != config.num_hidden_layers:  # transformers takes its class's own number where a file says none
        raise CompressError(
            f"the GGUF holds {blocks} blocks, and says that it has {config.num_hidden_layers}",
            where=str(path),
            fix="fetch or copy it again",
        )
    config.dtype, config._name_or_path = "float32", str(path)
    return config


def plain(model: Quantised) -> Path:
    """The folder with the plain weights, made where the cache does not hold them.

    Raises:
        CompressError: a weight has no scale, or one that does not fit it, or is no number; a file is damaged; the
            family is not known; the disk is full.
    """
    from compress.models.families import family_for

    files = [model.path] if model.kind == "gguf" else [*weights_of(model.path).files, model.path / CONFIG]
    beside = [] if model.kind == "gguf" else [path for _, path in data_files(model.path)]
    key = hashlib.sha256("\n".join(f"{p.name}:{sha256_of(p)}" for p in (*files, *beside)).encode()).hexdigest()

    # What is wrong with it is said before any weight is read.
    family_for(config_of(model))

    def make(made: Path) -> None:
        say(f"{model.path.name}: {model.words}")
        if model.kind == "gguf":
            from_gguf(model.path, made)
        else:
            _from_fp8(model, made)
        try:
            check_weights(made)
        except CompressError as e:
            e.where = str(model.path)  # not the copy's, which is gone
            raise

    return kept(cache_dir() / "models" / f"dequantised-{key[:16]}", model.words, make)


def _from_fp8(model: Quantised, made: Path) -> None:
    """Every file of the checkpoint with its fp8 weights multiplied by their scales; all else as it is."""
    from safetensors import safe_open

    folder, found = model.path, weights_of(model.path)
    made.mkdir()
    files = Files(made)
    for path in found.files:
        tensors: dict[str, Tensor] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it has keys() alone)
                if name.endswith(SCALE) and name.removesuffix(SCALE) in found.places:
                    continue
                if name.endswith(OF_INPUTS):
                    continue
                tensor = file.get_tensor(name)
                if str(tensor.dtype).removeprefix("torch.") in FLOAT8:
                    tensor = _dequantised(model, name, tensor, _scale(found.places, name, folder))
                tensors[name] = tensor
        files.add(path.name, tensors)
    if len(found.files) > 1 or (folder / INDEX).exists():
        files.index()
    for name, path in data_files(folder):
        (made / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, made / name)
    _write_config(model, made)


def _scale(places: Mapping[str, Path], name: str, folder: Path) -> Tensor:
    from safetensors import safe_open

    place = places.get(name + SCALE)
    if place is None:
        raise CompressError(
            f"the fp8 weight {name} has no scale ({name}{SCALE})",
            where=str(folder),
            fix="fetch the model again, or name the unquantised one",
        )
    with safe_open(place, "pt") as file:
        found: Tensor = file.get_tensor(name + SCALE)
    return found


def _dequantised(model: Quantised, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """``weight`` (out, in) in fp8 times its scale, in the model's type.

    transformers reckons the block from the grid of scales. Where the last block is not whole that grid does not say it,
    so the weight is first filled up to whole blocks.
    """
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def refuse(what: str) -> CompressError:
        return CompressError(what, where=str(model.path), fix="fetch the model again, or name the unquantised one")

    grid = tuple(scale.shape) if scale.dim() == 2 else (1, 1)
    if weight.dim() != 2 or (scale.dim() != 2 and scale.numel() != 1):
        raise refuse(f"the fp8 weight {name} is {_by(weight)}, and its scale {_by(scale)}")
    rows, columns = weight.shape
    # One scale for all, or one for every row, needs no block.
    block = model.block if grid not in ((1, 1), (rows, 1)) else (rows // grid[0], columns)
    if block is None or grid != (-(-rows // block[0]), -(-columns // block[1])):
        said = f", in blocks of {block[0]} x {block[1]}" if block else ""
        raise refuse(f"the scale of the fp8 weight {name} ({_by(weight)}{said}) is {_by(scale)}")
    if scale.is_floating_point() and not torch.isfinite(scale.float()).all():
        raise refuse(f"the scale of the fp8 weight {name} holds NaN or infinity")
    whole = torch.zeros(grid[0] * block[0], grid[1] * block[1], dtype=torch.uint8)
    whole[:rows, :columns] = weight.view(torch.uint8)
    # Exponents that are kept as bytes, transformers reads itself.
    scale = scale if scale.dtype == torch.uint8 else scale.float()
    op = Fp8Dequantize(None)
    done: Any = op.convert({"weight": whole.view(weight.dtype), f"weight{SCALE}": scale})["weight"]
    made: Tensor = done[:rows, :columns].to(getattr(torch, model.dtype)).contiguous()
    return made


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def from_gguf(gguf: Path, made: Path) -> None:
    """Writes the model and the tokenizer in a GGUF into ``made``, in float32.

    Raises:
        CompressError: it is damaged, or lacks weights.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="compress-gguf-") as temporary:
        view = Path(temporary)
        _gguf_config(gguf, view)
        given: dict[str, Any] = {"gguf_file": "model.gguf", **NO_CODE}
        with _rejected_gguf(gguf, "the tokenizer in the GGUF cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(view, **given)
        if hasattr(transformers, "GgufConfig"):  # without it, packages that are installed may leave weights packed
            given["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with _rejected_gguf(gguf, "the model in the GGUF cannot be loaded"):
            cls: Any = AutoModelForCausalLM
            loaded, info = cls.from_pretrained(view, dtype=torch.float32, output_loading_info=True, **given)
    missing = sorted(info["missing_keys"])
    if missing:
        raise CompressError(
            f"{len(missing)} weights are missing in the GGUF, the first is {missing[0]}",
            where=str(gguf),
            fix="fetch it again",
        )
    config = loaded.config
    # transformers leaves the mark of quantisation behind, and would refuse to save.
    if hasattr(config, QUANTISED):
        del config.quantization_config
    with torch.device("meta"):
        held = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    held.load_state_dict(loaded.state_dict(), assign=True)
    held.tie_weights()
    held.save_pretrained(made)
    tokenizer.save_pretrained(made)
