"""Every test: no network, one thread. Set here so that the processes which tests start have it too."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it brings
os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.command import Job, compress
from tests.tiny import tiny_job


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


@pytest.fixture(scope="session")
def finished(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole `compress prune`; tests must not change it."""

    def make(folder: Path) -> None:
        ran = compress("prune", job.model, "--recipe", job.recipe, "--out", folder / "run")
        assert ran.code == 0, ran.err

    return once(tmp_path_factory, "finished", make) / "run"


STARTERS = ("subprocess", "multiprocessing", "ranks")


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
