"""Loads a saved network in a clean process and compares it with its fingerprint. Run as a module.

Prints one line of JSON: {"max_abs_difference", "max_abs_output", "parameters", "class"}.
"""

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from compress.models.zoo import build, load_weights

    facts = json.loads((folder / "network.json").read_text())
    kept = load_file(folder / "fingerprint.safetensors")
    model = build(facts["network"], facts["arguments"]).eval()
    load_weights(model, folder / "model.safetensors")
    with torch.no_grad():
        out = model(kept["input"])
    outputs = {facts["tasks"][0]["name"]: out} if isinstance(out, torch.Tensor) else out
    differences = [float((outputs[t["name"]] - kept[f"output.{t['name']}"]).abs().max()) for t in facts["tasks"]]
    found = {
        "max_abs_difference": max(differences),
        "max_abs_output": max(float(kept[f"output.{t['name']}"].abs().max()) for t in facts["tasks"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "class": type(model).__name__,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
