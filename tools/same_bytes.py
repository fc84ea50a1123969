"""Tiny runs of every method with an older commit and with this one: are plans and weights the same, byte for byte?

    python tools/same_bytes.py COMMIT [RUN ...]

Both use this environment. On a processor without AVX-512 an older commit may crash in PAGCP's training (oneDNN writes
past its memory in layers that this version gives their images plane by plane): ONEDNN_MAX_CPU_ISA=SSE41 takes other
kernels in both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

from tests.compress.test_channels import MINE  # noqa: E402
from tests.compress.test_channels import RECIPE as CHANNELS  # noqa: E402
from tests.compress.test_network import RECIPE as NETWORK  # noqa: E402
from tests.networks import write_class_folders  # noqa: E402
from tests.recipes.global_mp.test_llm import RECIPE as MAGNITUDE  # noqa: E402
from tests.tiny import tiny_job  # noqa: E402


def jobs(folder: Path) -> dict[str, tuple[str, Path]]:
    """(model, recipe) of a run by its name."""
    model, tyr = tiny_job(folder / "text")
    write_class_folders(folder / "data", 90, 40)
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    found = {"tyr": (str(model), tyr)}
    for name, text, place in (
        ("global-mp, text", MAGNITUDE, folder / "text"),
        ("global-mp, network", NETWORK, folder),
        ("pagcp", CHANNELS, folder),
    ):
        recipe = folder / f"{name.replace(', ', '-')}.yaml"
        recipe.write_text(text.replace("FOLDER", str(place)), encoding="utf-8")
        found[name] = (str(model) if "text" in name else f"{folder}/mine.py:small", recipe)
    return found


def run(source: Path, model: str, recipe: Path, out: Path) -> None:
    words = ["prune", model, "-r", str(recipe), "--out", str(out), "--set", "export=null", "--set", "bench=null"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "compress", *words],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        cwd=source,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        sys.exit(f"{source}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def weights(out: Path) -> dict[str, bytes]:
    """Every tensor of plan, masks and model, as its bytes."""
    found = {}
    for path in sorted(out.rglob("*.safetensors")):
        place = path.relative_to(out)
        if place.parts[0] in ("release", "text"):
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name).contiguous()
                found[f"{place}: {name}"] = f"{tensor.dtype}{tuple(tensor.shape)}".encode() + bytes(
                    tensor.flatten().view(dtype=torch.uint8).numpy()
                )
    return found


def main() -> None:
    commit = sys.argv[1]
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        old = folder / "old"
        old.mkdir()
        archive = subprocess.run(["git", "-C", str(TOP), "archive", commit], capture_output=True, check=True)
        subprocess.run(["tar", "x", "-C", str(old)], input=archive.stdout, check=True)
        wanted = sys.argv[2:]
        for name, (model, recipe) in jobs(folder).items():
            if wanted and name not in wanted:
                continue
            outs = [folder / f"{name}-{which}" for which in ("old", "new")]
            for source, out in zip((old, TOP), outs, strict=True):
                run(source, model, recipe, out)
            before, after = map(weights, outs)
            both = before.keys() & after.keys()
            differ = sorted(k for k in both if before[k] != after[k])
            same = len(both) - len(differ)
            size = sum(len(before[k]) for k in both)
            only = ", ".join(sorted(before.keys() ^ after.keys())) or "none"
            failed |= same < len(both) or not both
            print(
                f"{name}: {same} of {len(both)} tensors ({size:,} bytes) are the same; in one alone: {only or 'none'}"
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
