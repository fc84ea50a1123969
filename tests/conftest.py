"""Every test: no network, one thread. Set here so that the processes which tests start have it too."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it brings
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest

from tests.command import Job, compress
from tests.tiny import tiny_job


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny model, its recipe and its text; tests must not change them."""
    folder = tmp_path_factory.mktemp("job")
    model, recipe = tiny_job(folder)
    return Job(model, recipe, folder)


@pytest.fixture(scope="session")
def finished(job: Job) -> Path:
    """The run folder of a whole `compress prune`; tests must not change it."""
    out = job.folder / "run"
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out)
    assert ran.code == 0, ran.err
    return out


STARTERS = ("subprocess", "multiprocessing", "ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts processes or makes whole runs: it is told by what a module imports and a test asks for."""
    whole = {Path(__file__).parent / name for name in ("compress", "docs")}
    for item in items:
        starts = any(name in vars(getattr(item, "module", None) or object) for name in STARTERS)
        if starts or item.path.parent in whole or "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.processes)
