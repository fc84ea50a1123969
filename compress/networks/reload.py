"""Loads a saved network and compares it with its fingerprint. Run as a module, it does so in a clean process.

It then prints one line of JSON: {"max_abs_difference", "max_abs_output", "parameters", "class"}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Reloaded:
    """A network in evaluation mode, on the CPU; what its folder says of it; the held-out samples that lie there."""

    model: nn.Module
    facts: dict[str, Any]
    inputs: Tensor  # (n, ...) float32, prepared
    found: dict[str, Any]


def read_facts(folder: Path) -> dict[str, Any]:
    """What a folder says of its network: how it is built, its input, its tasks.

    Raises:
        CompressError: it cannot be read.
    """
    path = folder / "network.json"
    try:
        facts = json.loads(path.read_text("utf-8"))
        complete = {"network", "arguments", "input", "mean", "std", "tasks"} <= facts.keys()
    except (OSError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise CompressError(
            "the facts of the network cannot be read", where=str(path), fix="make the model again, or copy it whole"
        )
    return dict(facts)


def check_named(folder: Path, network: str | None) -> None:
    """Code is run only where a person has named its file: a folder that was fetched from somewhere must not choose it.

    Raises:
        UsageError: the network is a file's, and ``network`` does not name it; or it is none, and one is named.
    """
    own = str(read_facts(folder)["network"])
    if ".py:" in own and network is None:
        raise UsageError(
            f"the network is code of a file: {own}",
            where=str(folder),
            fix=f"if you trust that file, name it: --network {own}",
        )
    if ".py:" not in own and network is not None:
        raise UsageError(f"the network is {own}, not a file's", where=str(folder), fix="leave out --network")
    if network is not None and ".py:" not in network:
        raise UsageError(f"{network!r} is not FILE.py:FUNCTION", where="--network", fix=f"such as --network {own}")


def reload(folder: Path, network: str | None = None) -> Reloaded:
    """The network of a folder; ``network`` is built in place of the one that the folder names.

    Raises:
        CompressError: a file is missing or not whole, or the weights do not fit.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from compress.data.tasks import named
    from compress.models.zoo import build, load_weights
    from compress.networks.surgery import resize

    facts = read_facts(folder)
    try:
        kept = load_file(folder / "fingerprint.safetensors")
    except (OSError, SafetensorError) as e:
        raise CompressError(
            f"the fingerprint cannot be read: {e}", where=str(folder), fix="make the model again, or copy it whole"
        ) from e
    model = resize(build(network or facts["network"], facts["arguments"]).eval(), facts.get("widths", {}))
    load_weights(model, folder / "model.safetensors")
    with torch.no_grad():
        out = model(kept["input"])
    names = [task["name"] for task in facts["tasks"]]
    outputs = named(out, names)
    differences = [float((outputs[name] - kept[f"output.{name}"]).abs().max()) for name in names]
    found = {
        "max_abs_difference": max(differences),
        "max_abs_output": max(float(kept[f"output.{name}"].abs().max()) for name in names),
        "parameters": sum(p.numel() for p in model.parameters()),
        "class": type(model).__name__,
    }
    return Reloaded(model, facts, kept["input"], found)


if __name__ == "__main__":
    try:
        print(json.dumps(reload(Path(sys.argv[1]), *sys.argv[2:3]).found))
    except CompressError as e:
        sys.exit(f"{e.what} ({e.where})")
