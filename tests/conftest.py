"""Every test: no network, one thread. Set here so that the processes which tests start have it too."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it brings
os.environ["HF_HUB_OFFLINE"] = "1"

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from compress.exporters.onnx import Exported
from compress.run.cache import sha256_of
from tests.command import Job, compress
from tests.tiny import tiny_job
from tests.warm import WARM, warm


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` of this session, filled by the first of its processes that asks for it."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    folder, made = shared / name, shared / f"{name}.made"
    with FileLock(shared / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny model, its recipe and its text; tests must not change them."""
    folder = once(tmp_path_factory, "job", tiny_job)
    return Job(folder / "model", folder / "tiny.yaml", folder)


@contextmanager
def remembered(factory: pytest.TempPathFactory) -> Iterator[None]:
    """While it is open, the same bytes are loaded in a clean process, and the same model is exported, once in a
    session; the second time the first one's answer is given."""
    from compress.exporters import check
    from compress.language import checkpoint

    load, export = checkpoint.verify_clean, check.export_llm
    if load.__module__ == __name__:  # it is open
        yield
        return

    def verify_clean(folder: Path, memory: int | None = None) -> dict[str, Any]:
        held = hashlib.sha256(f"{memory}".encode())
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".py", ".jinja")):
            if path.name not in ("report.json", "seal.json", "verified.json"):
                held.update(f"{path.name} {sha256_of(path)} ".encode())

        def make(place: Path) -> None:
            (place / "found.json").write_text(json.dumps(load(folder, memory)))

        return dict(json.loads((once(factory, f"load-{held.hexdigest()}", make) / "found.json").read_text()))

    def export_llm(model: Any, folder: Path, each: bool = False) -> Exported:
        held = hashlib.sha256(f"{type(model)} {model.config.to_json_string()} {each}".encode())
        for name, tensor in model.state_dict().items():
            held.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        made = once(factory, f"export-{held.hexdigest()}", lambda place: export(model, place, each))
        shutil.copytree(made, folder, dirs_exist_ok=True)
        return Exported(folder, {p.name: p.stat().st_size for p in made.iterdir()}, 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "verify_clean", verify_clean)
        patch.setattr(check, "export_llm", export_llm)
        yield


@pytest.fixture(scope="module")
def done_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For modules whose subject is neither to load what was saved nor to export it, see `remembered`."""
    with remembered(tmp_path_factory):
        yield


@pytest.fixture(scope="session")
def finished(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole `compress prune`; tests must not change it."""

    def make(folder: Path) -> None:
        with remembered(tmp_path_factory):  # other modules' runs have the same dense model, and some the same plan
            ran = compress("prune", job.model, "--recipe", job.recipe, "--out", folder / "run")
        assert ran.code == 0, ran.err

    return once(tmp_path_factory, "finished", make) / "run"


@pytest.fixture(scope="session", autouse=True)
def warm_loads() -> Iterator[None]:
    """What a run saved is loaded again in a fork of a clean interpreter, see `tests.warm`."""
    with warm():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    WARM.cold = item.get_closest_marker("cold") is not None or item.get_closest_marker("slow") is not None
    try:
        return (yield)
    finally:
        WARM.cold = False


STARTERS = ("subprocess", "multiprocessing", "forks", "ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts processes or makes whole runs: it is told by what a module imports and a test asks for."""
    whole = {Path(__file__).parent / name for name in ("compress", "docs")}
    for item in items:
        starts = any(name in vars(getattr(item, "module", None) or object) for name in STARTERS)
        if starts or item.path.parent in whole or "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.processes)
    # Files of long tests first: the short ones then fill what is left of every worker's time.
    long = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in long)
