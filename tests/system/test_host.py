"""What only Linux has is asked in one file, and the tool plans, verifies, draws cards and gates without it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from compress.system import host
from tests.command import Job, compress
from tests.test_rooms import MODULES, ROOT
from tools.ci.models import chain

# Put before everything else in every Python that the test starts, the measuring ones among them. psutil, which has
# means of its own on each system, stays as it is.
ELSEWHERE = """
import builtins, io, os, sys
import psutil
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.sched_getaffinity, os.getloadavg, os.pread, os.pwrite, os.O_NONBLOCK, os.O_NOFOLLOW, os.O_CLOEXEC
opened, exists = io.open, os.path.exists

def kernels(path):
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc", "/sys"))

def elsewhere(path, *given, **more):
    if kernels(path) and not sys._getframe(1).f_globals["__name__"].startswith("psutil"):
        raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
    return opened(path, *given, **more)

builtins.open = io.open = elsewhere
os.path.exists = lambda path: not kernels(path) and exists(path)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has nothing which only Linux has."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ELSEWHERE)
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"}


def ran(environment: dict[str, str], *words: object) -> str:
    command = [sys.executable, "-m", "compress", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_what_only_linux_has_it_plans_verifies_and_draws_cards(
    finished: Path, job: Job, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    model, recipe = job.model, job.recipe
    planned = json.loads(ran(elsewhere, "plan", model, "-r", recipe, "--json"))
    here = json.loads(compress("plan", model, "-r", recipe, "--json").out)
    assert planned.keys() == here.keys()
    assert all(planned[key] == here[key] for key in ("remove", "after", "total_parameters", "disk_bytes_peak"))
    assert " 0 do not hold" in ran(elsewhere, "verify", finished)
    ran(elsewhere, "card", finished, "--out", tmp_path / "card")
    assert compress("card", finished, "--out", tmp_path / "card-here").code == 0
    for name in ("README.md", "report.html"):
        assert (tmp_path / "card" / name).read_bytes() == (tmp_path / "card-here" / name).read_bytes()


@pytest.mark.slow  # most of a minute of measuring
def test_without_what_only_linux_has_it_gates(elsewhere: dict[str, str], tmp_path: Path) -> None:
    net = tmp_path / "net.onnx"
    chain(net, 2)
    budgets = ("-b", "latency<=99x", "-b", "size<=1x")
    ran(elsewhere, "gate", net, net, *budgets, "--samples", 1, "--out", tmp_path / "gate")
    record = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert all(row["verdict"] == "pass" for row in record["budgets"])


def test_without_what_only_linux_has_memory_is_not_gated(elsewhere: dict[str, str], tmp_path: Path) -> None:
    net = tmp_path / "net.onnx"
    chain(net, 2)
    words = [sys.executable, "-m", "compress", "gate", net, net, "-b", "memory<=9x", "--samples", "1"]
    refused = subprocess.run(words, env=elsewhere, capture_output=True, text=True)
    assert refused.returncode == 2 and "does not tell how much memory a process has held at most" in refused.stderr


def test_what_is_told_otherwise_is_what_linux_tells(elsewhere: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import json, os, sys; from pathlib import Path; from compress.system import host\n"
        "from compress.run.lock import Lock\n"
        "held = bytearray(50_000_000)\n"
        "lock = Lock.take(Path(sys.argv[1]))\n"
        "print(json.dumps([host.total_memory(), host.free_memory(), host.processors(), host.peak_memory(),"
        " host.load_average(), host.governor(), host.command_of(os.getpid())[1:2], host.started(os.getpid()),"
        " host.started(2**22 + 1)]))"
    )  # fmt: skip
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    found = json.loads(subprocess.run(command, env=elsewhere, capture_output=True, text=True, check=True).stdout)
    total, free, processors, peak, load, governor, words, started, nobody = found
    assert total == host.total_memory() == psutil.virtual_memory().total and 0 < free <= total
    assert processors == os.cpu_count() and load is governor is None and words == ["-c"]
    assert float(started) > 1e9 and nobody == ""
    assert peak is None, "what is held now is not told as the most that was held"


def test_who_holds_a_folder_is_seen_without_the_kernels_lock(elsewhere: dict[str, str], tmp_path: Path) -> None:
    """By the process table: a holder that lives is named, one that is gone holds nothing."""
    take = "import sys; from pathlib import Path; from compress.run.lock import Lock; Lock.take(Path(sys.argv[1]))\n"
    wait = [sys.executable, "-c", take + "print('held', flush=True); sys.stdin.read()", str(tmp_path / "run" / ".lock")]
    first = subprocess.Popen(wait, env=elsewhere, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    again = [sys.executable, "-c", take, wait[-1]]
    done = subprocess.run(again, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 1 and f"another run holds this folder (process {first.pid} on " in done.stderr
    first.kill()
    first.wait()
    assert subprocess.run(again, env=elsewhere, capture_output=True, text=True).returncode == 0


# --- one file ---------------------------------------------------------------------------------------------------------

ONLY_LINUX = {"fcntl", "resource", "msvcrt", "psutil"}
ATTRIBUTES = {
    "sched_getaffinity", "getloadavg", "prctl", "pread", "pwrite", "O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC",
    "SIGKILL", "SIGHUP", "SIGUSR1", "killpg", "setsid", "fork", "geteuid", "getuid", "preexec_fn",
}  # fmt: skip


def linux(path: Path) -> Iterator[str]:
    """What a file uses that only Linux, or only one system, has."""
    tree = ast.parse(path.read_text())
    said = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.split(".")[0] in ONLY_LINUX)
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg in ATTRIBUTES:
            yield str(node.arg)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield from [node.value] * (node.value.startswith(("/proc", "/sys/")) or node.value in ATTRIBUTES)


def test_one_file_knows_what_only_one_system_has() -> None:
    found = {name: sorted(set(linux(path))) for name, path in MODULES.items()}
    own = found.pop("compress.system.host")
    assert {"fcntl", "resource", "msvcrt", "psutil", "prctl", "sched_getaffinity"} <= set(own)
    assert {name: what for name, what in found.items() if what} == {}


def test_no_tool_asks_for_itself_either() -> None:
    tools = {p.name: set(linux(p)) & {*ONLY_LINUX, "sched_getaffinity"} for p in (ROOT / "tools").rglob("*.py")}
    assert {name: what for name, what in tools.items() if what} == {}


def test_it_runs_alone_on_a_device() -> None:
    tree: Any = ast.parse(MODULES["compress.system.host"].read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in top if isinstance(n, ast.ImportFrom)
    }
    assert names <= {*sys.stdlib_module_names}
