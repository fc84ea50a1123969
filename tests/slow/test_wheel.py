"""The wheel alone: what it holds, and that a clean environment with it lists, prunes, reports and verifies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from compress.distribution import DISTRIBUTION, HERE
from tests import tied_nets
from tests.networks import write_class_folders

pytestmark = pytest.mark.slow
ROOT = HERE.parent
RECIPE = """\
extends: global-mp-demo
description: a recipe that stands on one of the wheel's
arguments: {}
data: {folder: FOLDER/data, size: 12}
train: {epochs: 1, batch: 32, lr: 0.02, warmup_epochs: 0}
finetune: null
export: {samples: 4}
bench: null
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what a build leaves behind would be in the next wheel."""
    place = tmp_path_factory.mktemp("wheel")
    own = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "site", "*.egg-info", "__pycache__", "tests", "recipe.lock.yaml"
    )
    shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=own)
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(place),
        str(place / "tree"),
    ]
    subprocess.run(command, check=True, cwd=place, timeout=600)
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`compress` of a new environment, in which this project is the wheel; what it needs is taken from ours."""
    place = tmp_path_factory.mktemp("env")
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    subprocess.run([python, "-P", "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, timeout=600)
    site = next((place / "lib").glob("python*/site-packages"))
    # A path alone: no .pth file there is read, so our own editable install is not seen.
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "compress"


def run(command: Path, folder: Path, *words: object) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [command, *map(str, words)], cwd=folder, env=clean, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_licence_and_every_file_that_is_no_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        names = set(held.namelist())
        licence = next(n for n in names if n.endswith("/licenses/LICENSE"))
        assert held.read(licence) == (ROOT / "LICENSE").read_bytes()
        facts = held.read(licence.replace("licenses/LICENSE", "METADATA")).decode()
    assert f"\nName: {DISTRIBUTION}\n" in facts and "\nLicense-Expression: Apache-2.0\n" in facts
    for folder, _, files in os.walk(HERE, followlinks=True):
        for path in (Path(folder, f) for f in files if f.endswith((".py", ".yaml", ".css", ".js"))):
            assert str(path.relative_to(ROOT)) in names
    assert not any(n.startswith(("tests/", "tools/", "docs/")) or n.endswith(".pyc") for n in names)


def test_a_clean_environment_lists_what_the_tree_does(command: Path, tmp_path: Path) -> None:
    here = Path(sys.executable).parent / "compress"
    for what in ("recipes", "models", "targets"):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        own = subprocess.run([here, "list", what], env=env, capture_output=True, text=True, check=True).stdout
        assert run(command, tmp_path, "list", what) == own
    where = "import compress; print(compress.__file__)"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    python = command.with_name("python")
    said = subprocess.run([python, "-c", where], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert str(command.parent.parent) in said.stdout
    assert (
        f"ok       {DISTRIBUTION}"
        in subprocess.run([command, "doctor"], cwd=tmp_path, env=clean, capture_output=True, text=True).stdout
    )


def test_a_clean_environment_prunes_reports_and_verifies(command: Path, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "data", 90, 40)
    (tmp_path / "net.py").write_text(Path(tied_nets.__file__).read_text())
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    words = ("--recipe", "mine.yaml", "--sparsity", 0.5, "--out", "run")
    assert "pruned" in run(command, tmp_path, "prune", "net.py:twins", *words)
    run(command, tmp_path, "report", "run", "--out", "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<style>" in text and "<script>" in text
    assert "holds" in run(command, tmp_path, "verify", "run", "--network", "net.py:twins")
