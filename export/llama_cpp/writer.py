"""A GGUF file, tensor by tensor: no more than one of the model's tensors is held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from compress.errors import CompressError
from compress.exporters.llama_cpp.quantise import Converter, Typed
from compress.models.folder import weights_of
from compress.run.progress import Progress
from compress.run.tensor_files import open_tensors
from compress.system.files import disk_errors


def write(
    path: Path, arch: str, keys: Mapping[str, Any], tensors: Sequence[Typed], folder: Path, converter: Converter
) -> None:
    """Writes ``path``.

    Args:
        keys: whole names; a value is a string, a truth, a whole number, a float or a list of one of these.
        folder: the saved model.

    Raises:
        CompressError: a tensor of the model is missing or of another shape, or the disk is full.
    """
    places = weights_of(folder).places
    writer = GGUFWriter(path, arch)
    for key, value in keys.items():
        _put(writer, key, value)
    for t in tensors:
        writer.add_tensor_info(t.part.name, t.part.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.type)
    with disk_errors(path):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None  # the header was written to it
        file = writer.fout[0]
        try:
            writer.write_padding(file, file.tell())
            with Progress(len(tensors), f"writing {path.name}, tensor") as progress:
                for t in tensors:
                    count = 0
                    for data in converter.parts(t, _read(t, places, folder)):
                        file.write(data.tobytes())
                        count += data.nbytes
                    assert count == t.nbytes, f"{t.part.name}: {count} bytes for {t.nbytes}"
                    writer.write_padding(file, count)
                    progress.update(1)
        finally:
            writer.close()


def _put(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _read(t: Typed, places: Mapping[str, Path], folder: Path) -> Any:
    """The tensor, made of the model's.

    Raises:
        CompressError: one is missing, or does not have the shape that config.json says.
    """
    held = []
    for name in t.part.sources:
        if name not in places:
            raise CompressError(
                f"the weight {name} is missing", where=str(folder), fix="weights and config.json must belong together"
            )
        with open_tensors(places[name], "the weight file") as file:
            held.append(file.get_tensor(name))
    made = t.part.make(*held)
    if tuple(made.shape) != t.part.shape:
        raise CompressError(
            f"the weight {' + '.join(t.part.sources)} gives {tuple(made.shape)}, not {t.part.shape}",
            where=str(folder),
            fix="weights and config.json must belong together",
        )
    return made
