"""Processes that are started: nothing that lies where the user stands is imported by them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress.processes.children import python
from tests.command import Job

ROOT = Path(__file__).parents[2]
PLANTED = ("numpy", "safetensors", "torch", "json", "compress", "onnxruntime", "sitecustomize", "_tools", "pip")


def planted(folder: Path) -> Path:
    """A folder in which every module that a child may import has a stranger's double."""
    folder.mkdir(exist_ok=True)
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'PWNED')!r}, 'a').write({name!r})\n")
    return folder


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_no_python_is_started_without_safe_path() -> None:
    """`compress/distribution.py` stands alone before anything is installed, and says -P itself."""
    started = [
        (path.relative_to(ROOT).as_posix(), line.strip())
        for folder in ("compress", "export", "models", "recipes")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r"[\[(]\s*(sys\.executable|[\"']python3?[\"']\s*,)", line)
    ]
    assert {place for place, _ in started} == {"compress/processes/children.py", "compress/distribution.py"}
    assert all('sys.executable, "-P"' in line or "{sys.executable}" in line for _, line in started)


@pytest.mark.parametrize(
    "words", [("-c", "import numpy, json"), ("-m", "compress", "list", "recipes"), ("-m", "pip", "--version")]
)
def test_a_child_does_not_import_from_the_current_folder(tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = planted(tmp_path / "downloaded")
    done = run(python(*words), folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "PWNED").exists()


def test_python_m_compress_does_not_either_once_it_runs(tmp_path: Path) -> None:
    """Python itself puts the current folder in front before a line of ours is run; what is imported later is ours."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "typer.py").write_text("open('PWNED', 'w')\n")
    done = run([sys.executable, "-m", "compress", "list", "recipes"], folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "PWNED").exists()


def test_two_processes_started_in_a_downloaded_folder_import_nothing_of_it(job: Job, tmp_path: Path) -> None:
    folder = planted(tmp_path / "model")
    shutil.copytree(job.model, folder, dirs_exist_ok=True)
    words = ["prune", ".", "-r", str(job.recipe), "--out", "../run", "--until", "plan", "--processes", "2"]
    done = run(python("-m", "compress", *words), folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "PWNED").exists()


def test_a_network_is_reloaded_without_the_current_folder(tmp_path: Path) -> None:
    import json

    import torch
    from safetensors.torch import save_file

    from compress.models.zoo import build

    folder = planted(tmp_path / "net")
    arguments = {"classes": 3, "depth": 8, "width": 4}
    model = build("resnet", arguments).eval()
    x = torch.randn(2, 3, 12, 12)
    save_file(model.state_dict(), folder / "model.safetensors")
    save_file({"input": x, "output.class": model(x).detach()}, folder / "fingerprint.safetensors")
    facts = {"network": "resnet", "arguments": arguments, "input": [3, 12, 12], "mean": [0, 0, 0], "std": [1, 1, 1]}
    task = {"name": "class", "kind": "classes", "classes": ["a", "b", "c"]}
    (folder / "network.json").write_text(json.dumps({**facts, "tasks": [task]}))
    done = run(python("-m", "compress", "verify", "."), folder)
    assert done.returncode == 1 and "did not write" in done.stderr, "code lies beside the network"
    assert not (folder / "PWNED").exists()
    for name in PLANTED:
        (folder / f"{name}.py").unlink()
    elsewhere = planted(tmp_path / "elsewhere")
    done = run(python("-m", "compress", "verify", "../net"), elsewhere)
    assert done.returncode == 0, done.stderr
    assert not (elsewhere / "PWNED").exists()
