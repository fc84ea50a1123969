"""A torch module to LiteRT (.tflite), for phones: by litert-torch, at fixed sizes.

litert-torch brings an environment of 2 GB, so it is an extra of its own. It names inputs and outputs by their place
(``args_0``, ``output_0``); their real names lie beside the file in ``signature.json``.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UsageError
from compress.exporters import formats, parity, runtimes
from compress.exporters.refused import refusal, still
from compress.run.progress import say

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner

FILE, SIGNATURE = "model.tflite", "signature.json"


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``model.tflite`` and the names of its inputs and outputs.

    Raises:
        UsageError: it is a language model.
        CompressError: litert-torch cannot convert the module.
    """
    import litert_torch

    from compress.exporters.onnx_module import _Outputs

    began = time.monotonic()
    files = formats.components(source.path)
    if list(files) != ["model"]:
        raise UsageError(
            "a language model is not exported to LiteRT", where=str(source.path), fix="name another --format, as ort"
        )
    graph = formats.read_graph(files["model"])
    axes = {a: s[1] for a, s in formats.profiles_of(options, "model", graph)[0].items()}
    feed = formats.random_feed(graph, axes)
    say("litert: converting the network")
    try:
        with warnings.catch_warnings(), still():
            warnings.simplefilter("ignore")  # deprecations inside the exporter, nothing a user can act on
            module = _Outputs(source.model, [p.name for p in graph.outputs]).eval()
            made = litert_torch.convert(module, tuple(torch.from_numpy(feed[p.name]) for p in graph.inputs))
            made.export(str(folder / FILE))
    except Exception as e:  # torch.export and the lowering each have their own types
        raise refusal(e, "LiteRT", source.model) from e
    names = {"inputs": [p.name for p in graph.inputs], "outputs": [p.name for p in graph.outputs]}
    (folder / SIGNATURE).write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    return {
        "components": {"model": {"shapes": {p.name: p.at(axes) for p in graph.inputs}}},
        "versions": {"litert_torch": str(getattr(litert_torch, "__version__", "")), "torch": torch.__version__},
        "seconds": round(time.monotonic() - began, 1),
    }


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    return parity.check_built(source, folder, options, load)


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    return runtimes.load("litert", str(folder / FILE), options.threads)
