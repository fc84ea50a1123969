"""The package's name: the same wherever it is said, never the stranger's, and a stranger in its place is noticed."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import compress as package
from compress import distribution
from compress.distribution import DISTRIBUTION, HERE, install_line
from tests.command import compress

ROOT = HERE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = "[console_scripts]\ncompress = compress.cli:main\n"
# What installs the stranger: the bare name as a requirement, whatever the tool and its options, and its extras.
STRANGERS = re.compile(
    r"\b(?:pip3?|pipx|uvx?|poetry|conda)\s+(?:pip\s+)?(?:install|add|run|inject|tool\s+\w+)?\s*"
    r"(?:-{1,2}[\w-]+(?:[ =]\S+)?\s+)*[\"']?compress(?![-\w./])"
    r"|(?<![\w.-])compress\[[a-z]"
)


def tree() -> Iterator[tuple[Path, str]]:
    """Every text file of the project but this one."""
    own = {".git", ".venv", "build", "dist", "runs", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in own | {".hypothesis"} and not f.endswith(".egg-info")]
        for name in files:
            path = Path(folder, name)
            if path != Path(__file__) and path.suffix not in (".png", ".safetensors", ".onnx") and path.is_file():
                try:
                    yield path, path.read_text()
                except UnicodeDecodeError:
                    continue  # no text


def write_distribution(site: Path, name: str, version: str = "3.1", **files: str) -> Path:
    """The facts of an installed package, as pip leaves them."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    return folder


def parts() -> dict[str, dict[str, str]]:
    return {row["part"]: row for row in distribution.examine()}


def record(site: Path) -> str:
    """RECORD of everything below ``site``."""
    lines = []
    for path in sorted(p for p in site.rglob("*.py")):
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        lines.append(f"{path.relative_to(site)},sha256={digest},{path.stat().st_size}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that alone is searched."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.setattr(sys, "path", [str(place), *(p for p in sys.path if "site-packages" not in p)])
    return place


@pytest.mark.parametrize(
    "text",
    [
        "pip install compress",
        "pip install 'compress[hub]'",
        "python -m pip install --quiet -U compress",
        'uv add "compress"',
        "uv pip install compress==1.0",
        "uvx compress list",
        "pipx run compress",
        "needs 'compress[recover]'",
    ],
)
def test_the_search_finds_every_way_of_naming_the_stranger(text: str) -> None:
    assert STRANGERS.search(text)
    assert not STRANGERS.search(text.replace("compress", DISTRIBUTION))


def test_no_file_of_the_tree_installs_the_strangers_package() -> None:
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p, text in tree() for m in STRANGERS.finditer(text)]
    assert not found and len(list(tree())) > 200


def test_project_constant_and_version_agree() -> None:
    assert PROJECT["name"] == DISTRIBUTION and DISTRIBUTION != distribution.STRANGER
    assert PROJECT["version"] == package.__version__
    assert PROJECT["scripts"] == {"compress": "compress.cli:main"}


def test_every_install_hint_names_an_extra_that_exists() -> None:
    from compress.exporters.formats import FORMATS

    extras = set(PROJECT["optional-dependencies"])
    said = {form.extra for form in FORMATS.values() if form.extra}
    for path, text in tree():
        for names in re.findall(rf"{DISTRIBUTION}\[([\w, ]+)\]", text):
            said |= {name.strip() for name in names.split(",")}
        if path.suffix == ".py" and "install_line" in text:
            calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
            hints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "install_line"]
            said |= {c.args[0].value for c in hints if isinstance(c.args[0], ast.Constant)}
    assert {"hub", "eval", "recover", "mnn"} <= said <= extras
    assert install_line("hub") == f"pip install '{DISTRIBUTION}[hub]'"


@pytest.mark.parametrize("name", ["compress", "Compress", "COMPRESS"])
def test_doctor_notices_another_projects_package_of_that_name(site: Path, name: str) -> None:
    write_distribution(site, name, entry_points__txt="[console_scripts]\ncompress = compress.main:run\n")
    row = parts()["compress"]
    assert row["state"] == "wrong" and "another project's" in row["for"] and "pip uninstall compress" in row["detail"]


def test_a_stranger_is_a_fault_that_doctor_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "compress")
    monkeypatch.syspath_prepend(tmp_path)
    ran = compress("doctor")
    assert ran.code == 1 and "another project's package" in ran.out


def test_doctor_tells_its_own_old_name_from_a_stranger(site: Path) -> None:
    write_distribution(site, "compress", "0.1.0", entry_points__txt=OURS)
    assert parts()["compress"]["state"] == "old"
    assert parts()[DISTRIBUTION]["state"] == "absent"


def test_what_a_build_left_in_a_source_tree_is_no_install(site: Path) -> None:
    (site / "compress.egg-info").mkdir()
    (site / "compress.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: compress\nVersion: 1\n")
    assert parts()["compress"]["state"] == "wrong"
    (site / "pyproject.toml").touch()
    assert "compress" not in parts()


def test_doctor_is_content_with_the_tree_that_runs_and_not_with_another(site: Path, tmp_path: Path) -> None:
    def editable(folder: Path) -> str:
        return json.dumps({"dir_info": {"editable": True}, "url": folder.as_uri()})

    url = write_distribution(site, DISTRIBUTION, "0.2.0", entry_points__txt=OURS) / "direct_url.json"
    url.write_text(editable(ROOT))
    assert parts()[DISTRIBUTION]["state"] == "ok" and "compress" not in parts()
    url.write_text(editable(tmp_path / "a folder, else where"))
    row = parts()[DISTRIBUTION]
    assert row["state"] == "wrong" and str(HERE) in row["detail"] and "a folder, else where" in row["detail"]


def test_doctor_notices_files_that_another_package_wrote_over(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = site / "compress"
    place.mkdir()
    for name in ("__init__.py", "cli.py", "errors.py"):
        (place / name).write_bytes((HERE / name).read_bytes())
    write_distribution(site, DISTRIBUTION, "0.2.0", entry_points__txt=OURS, RECORD=record(site))
    monkeypatch.setattr(distribution, "HERE", place)
    assert parts()[DISTRIBUTION]["state"] == "ok"
    (place / "__init__.py").write_text("def compress(data): ...\n")
    (place / "errors.py").unlink()
    row = parts()[DISTRIBUTION]
    assert row["state"] == "wrong" and "compress/__init__.py and 1 more" in row["detail"]


def test_the_version_is_that_of_the_code_and_not_of_the_namesake(site: Path) -> None:
    from compress.run.doctor import versions

    write_distribution(site, "compress", "99.0")
    assert versions()["compress"] == package.__version__


def test_a_first_file_of_another_project_ends_the_command_in_one_error(tmp_path: Path) -> None:
    place = tmp_path / "compress"
    place.mkdir()
    for path in HERE.iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            (place / path.name).symlink_to(path)
    (place / "__init__.py").write_text("def compress(data):\n    return data\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "compress", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "another project's" in done.stderr and f"--force-reinstall {DISTRIBUTION}" in done.stderr


def wheel(folder: Path, entry: str) -> Path:
    """A package named `compress` with one module and a command."""
    info = "compress-0.2.0.dist-info"
    path = folder / "compress-0.2.0-py3-none-any.whl"
    texts = {
        "compress/__init__.py": "",
        "compress/cli.py": "def main(): ...\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: compress\nVersion: 0.2.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry,
    }
    texts[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*texts, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as held:
        for name, text in texts.items():
            held.writestr(name, text)
    return path


def test_set_up_takes_out_the_install_under_the_old_name_and_no_strangers(tmp_path: Path) -> None:
    env = tmp_path / "env"
    venv.create(env, with_pip=True)
    python = str(env / "bin" / "python")
    site = next((env / "lib").glob("python*/site-packages"))

    def install(entry: str) -> None:
        options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
        path = wheel(tmp_path, entry)
        subprocess.run([python, "-P", "-m", "pip", "install", *options, str(path)], check=True, timeout=300)

    def set_up() -> subprocess.CompletedProcess[str]:
        # The project's root is where make stands: what a build left there is not to be taken for the install.
        command = [python, "-P", str(HERE / "distribution.py")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert set_up().returncode == 0, "nothing is there to be taken out"
    install(OURS)
    assert (env / "bin" / "compress").exists()
    done = set_up()
    assert done.returncode == 0, done.stderr
    assert not (env / "bin" / "compress").exists() and not list(site.glob("compress*"))
    install("[console_scripts]\ncompress = compress.cli:other\n")
    done = set_up()
    assert done.returncode == 1 and "another project's package" in done.stderr
    assert (site / "compress" / "cli.py").exists(), "what is not ours is left to its owner"
