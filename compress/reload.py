"""Loads a saved model as any user would and compares it with its fingerprint. Run as a script, in a clean process.

It imports nothing of compress: what it proves must hold on a machine that has only torch and transformers.
Prints one line of JSON: {"max_abs_difference", "max_abs_logit", "parameters", "class"}.
"""

import json
import sys


def main(folder: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    kept = load_file(f"{folder}/fingerprint.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(kept["tokens"]).logits
    print(
        json.dumps(
            {
                "max_abs_difference": float((logits - kept["logits"]).abs().max()),
                "max_abs_logit": float(kept["logits"].abs().max()),
                "parameters": sum(p.numel() for p in model.parameters()),
                "class": type(model).__name__,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
