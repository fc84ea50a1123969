"""Which file and key of a model's folder transformers refuses, where its own words name neither.

It is found by trying: a configuration without one of its keys, a tokenizer's files one by one. This is asked only of
what was refused already.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.models.folder import CONFIG, data_files, own_file, read_config
from compress.run.strict_json import read_json, typed
from compress.system.files import read_bytes

BYTES = 1 << 28  # of a file
SECONDS = 3.0  # for the keys of a file; the folder alone is named behind that
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def config_key(folder: Path, said: str) -> str | None:
    """The key of config.json without which a model can be made of it; None where ``said`` names one, or none is it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    facts = read_config(folder)
    if any(key in said for key in facts) or str(facts.get("model_type")) not in CONFIG_MAPPING:
        return None
    kind = CONFIG_MAPPING[facts["model_type"]]

    def without(rest: Mapping[str, Any]) -> None:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(kind.from_dict(dict(rest)), trust_remote_code=False)

    return _key(facts, without)


def tokenizer_place(folder: Path, load: Callable[[Path], object]) -> tuple[str, str | None]:
    """(file, key) at fault in a tokenizer that ``load`` refuses; the folder itself where it cannot be told.

    Raises:
        CompressError: one of the files is no JSON, no object or no UTF-8.
    """
    check_files(folder)
    files = dict(data_files(folder))
    if TOKENIZER in files and not _whole(files[TOKENIZER]):
        return str(folder / TOKENIZER), None
    if SETTINGS not in files:
        return str(folder), None
    with _copied(folder) as place:

        def without(rest: Mapping[str, Any]) -> None:
            (place / SETTINGS).write_text(json.dumps(rest), encoding="utf-8")
            load(place)

        key = _key(read_json(files[SETTINGS], f"the file {SETTINGS}"), without)
    return str(folder if key is None else folder / SETTINGS), key


def check_files(folder: Path) -> None:
    """Every file of settings beside config.json is a JSON object, and every template a text.

    Raises:
        CompressError: one is not; ``where`` is the file.
    """
    for name, path in data_files(folder):
        what, fix = f"the file {name}", "fetch the model's own again"
        if name.endswith(".json"):
            typed(read_json(path, what, fix=fix, limit=BYTES), dict, "", what, str(folder / name), fix)
        elif name.endswith((".jinja", ".txt")):
            try:
                read_bytes(path, what, BYTES, fix).decode("utf-8")
            except UnicodeDecodeError as e:
                raise CompressError(f"{what} is not UTF-8 (byte {e.start})", where=str(folder / name), fix=fix) from e


def _whole(path: Path) -> bool:
    """Whether the tokenizers library reads a file at all."""
    from tokenizers import Tokenizer

    with contextlib.suppress(Exception):  # it refuses in a bare Exception
        Tokenizer.from_file(str(path))
        return True
    return False


@contextlib.contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="compress-model-") as temporary:
        place = Path(temporary)
        for name, path in [*data_files(folder), (CONFIG, own_file(folder, CONFIG))]:
            (place / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place / name)
        yield place


def _key(facts: Mapping[str, Any], without: Callable[[Mapping[str, Any]], None]) -> str | None:
    """The first key that ``without`` does not refuse the others of."""
    began = time.monotonic()
    for key in facts:
        if time.monotonic() - began > SECONDS:
            return None
        with contextlib.suppress(Exception):  # refused still, in any words: it is not this key
            without({k: v for k, v in facts.items() if k != key})
            return key
    return None
