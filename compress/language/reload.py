"""Loads a saved model as any user would and compares it with its fingerprint. Run as a script, in a clean process.

It imports nothing of compress: what it proves must hold on a machine that has only torch and transformers. A model that
is larger than memory needs accelerate too: a second argument says how many bytes may be held, the rest stays on disk. A
third names the class of transformers that loads it.
Prints one line of JSON: {"max_abs_difference", "max_abs_logit", "parameters", "class", "offloaded"}.
"""

import json
import sys
import tempfile


def main(folder: str, memory: int | None, auto: str = "AutoModelForCausalLM") -> None:
    import torch
    import transformers
    from safetensors.torch import load_file

    kept = load_file(f"{folder}/fingerprint.safetensors")
    with tempfile.TemporaryDirectory() as disk:
        # accelerate's big-model dispatch: layers that find no room are read from disk when they are run.
        dispatch = {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": disk} if memory else {}
        load = getattr(transformers, auto).from_pretrained
        model, info = load(folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True, **dispatch)
        if info["missing_keys"]:
            raise SystemExit(f"the folder has no weight for {sorted(info['missing_keys'])[0]}")
        with torch.no_grad():
            logits = model.eval()(kept["tokens"]).logits
    print(
        json.dumps(
            {
                "max_abs_difference": float((logits - kept["logits"]).abs().max()),
                "max_abs_logit": float(kept["logits"].abs().max()),
                "parameters": sum(p.numel() for p in model.parameters()),
                "class": type(model).__name__,
                "offloaded": sorted(m for m, d in getattr(model, "hf_device_map", {}).items() if d == "disk"),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if sys.argv[2:] and sys.argv[2] else None, *sys.argv[3:])
