"""Processes that work together: real ones, of a real gloo group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.processes import distributed
from compress.processes.distributed import ExactSum, share
from tests import ranks
from tests.command import Job, Ran, one_error
from tests.command import compress as in_process

# --- sums -----------------------------------------------------------------------------------------------------


def parts(seed: int, count: int = 37) -> list[torch.Tensor]:
    """Addends over ten orders of magnitude, whose float sum depends on the order."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, generator=g) * 10.0 ** float(torch.randint(-6, 4, (), generator=g)) for _ in range(count)]


def exact(addends: list[torch.Tensor], size: float = 1.0) -> torch.Tensor:
    found = ExactSum(5, 3)
    found.set_grid(size)
    for part in addends:
        found.add(part)
    return found.total()


def test_an_exact_sum_does_not_depend_on_the_order_where_a_float_sum_does() -> None:
    addends = parts(0)
    other = [addends[i] for i in torch.randperm(len(addends), generator=torch.Generator().manual_seed(1))]
    float_sums = [sum(p.double() for p in order) for order in (addends, other)]
    assert not torch.equal(*float_sums)  # type: ignore[arg-type]
    assert torch.equal(exact(addends), exact(other))
    torch.testing.assert_close(exact(addends), float_sums[0], rtol=1e-9, atol=1e-11)


def test_an_exact_sum_is_as_near_as_its_grid() -> None:
    addends = parts(2)
    true = sum((p.double() for p in addends), torch.zeros(5, 3, dtype=torch.float64))
    for size in (0.1, 1.0, 1e3):
        assert float((exact(addends, size) - true).abs().max()) <= len(addends) * (2 * size * 2.0**-44 + 1e-16 * 1e4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**19])
def test_an_addend_that_would_overflow_is_refused(bad: float) -> None:
    found = ExactSum(1)
    found.set_grid(1.0)
    found.add(torch.tensor([2.0**16]))
    with pytest.raises(OverflowError):
        found.add(torch.tensor([bad]))


def test_float_tensors_are_not_added_up() -> None:
    with pytest.raises(TypeError, match="ExactSum"):
        distributed.add_up(torch.zeros(2))


def all_at_once(count: int) -> dict[str, object]:
    mine = distributed.share(count)
    found = ExactSum(5, 3)
    (size,) = distributed.agree([1.0 if distributed.is_main() else 77.0])
    found.set_grid(size)
    for i in mine:
        found.add(parts(0, count)[i])
    rows = torch.arange(count, dtype=torch.float32)[mine.start : mine.stop, None]
    given = torch.full((2,), float(distributed.rank()))
    distributed.from_main(given)
    return {
        "sum": found.total().tolist(),
        "gathered": distributed.gather([i * i for i in mine]),
        "stacked": distributed.stack(rows, [len(share(count, r)) for r in range(distributed.world())])[:, 0].tolist(),
        "said": distributed.main_says(lambda: distributed.rank() + 5),
        "given": given.tolist(),
        "rank": distributed.rank(),
    }


@pytest.mark.parametrize(("processes", "count"), [(2, 37), (3, 37), (3, 2)])
def test_what_processes_tell_each_other(processes: int, count: int) -> None:
    found = ranks.run(processes, all_at_once, count)
    for rank, answer in enumerate(found):
        assert answer["rank"] == rank
        assert answer["sum"] == exact(parts(0, count)).tolist()
        assert answer["gathered"] == [i * i for i in range(count)]
        assert answer["stacked"] == list(range(count))
        assert answer["said"] == 5 and answer["given"] == [0.0, 0.0]


def _by_itself() -> tuple[object, ...]:
    x = torch.tensor([1.0 + distributed.rank()])
    with distributed.alone():
        within = distributed.world(), distributed.rank(), distributed.gather([x.item()])
        # The other one is not waited for: it says this once less.
        if x.item() == 1.0:
            distributed.meet("nowhere")
        alone = float(distributed.sum_floats(x.clone()))
    return within, alone, float(distributed.sum_floats(x)), distributed.rank()


def test_a_process_that_works_alone_is_one_of_one_until_it_is_back() -> None:
    assert ranks.run(2, _by_itself) == [((1, 0, [1.0]), 1.0, 3.0, 0), ((1, 0, [2.0]), 2.0, 3.0, 1)]


@pytest.mark.parametrize(("count", "processes"), [(7, 3), (2, 5), (0, 2), (12, 4)])
def test_shares_are_contiguous_whole_and_even(count: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: processes)
    each = [share(count, r) for r in range(processes)]
    assert [i for part in each for i in part] == list(range(count))
    assert max(map(len, each)) - min(map(len, each)) <= 1


# --- how many -------------------------------------------------------------------------------------------------


def test_a_number_that_is_not_the_number_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.wanted(None) == distributed.wanted(2) == 1  # they run already
    with pytest.raises(UsageError, match="3 processes are asked for, 2 were started"):
        distributed.wanted(3)


def test_no_process_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one"):
        distributed.wanted(0)


@pytest.mark.parametrize("said", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_what_the_environment_says_of_the_gpus_memory_stands(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if said:
        monkeypatch.setenv(said, "max_split_size_mb:512")
    distributed.leave_no_gaps()
    found = {k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")}
    expected = {said: "max_split_size_mb:512"} if said else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert found == expected


# --- whole runs -----------------------------------------------------------------------------------------------

RESULTS = ("plan/plan.safetensors", "plan/plan.json", "plan/search.json", "model/model.safetensors")


def command(job: Job, out: Path, *words: str) -> list[str]:
    return [
        "prune", str(job.model), "--recipe", str(job.recipe), "--out", str(out), "--set", "layouts=[per-layer]",
        "--set", "export=null", "--set", "bench=null", *words,
    ]  # fmt: skip


def ran(*words: str, **environment: str) -> Ran:
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    return Ran(done.returncode, done.stdout, done.stderr)


def compress(*words: str) -> list[str]:
    return [sys.executable, "-m", "compress", *words]


@pytest.fixture(scope="module")
def alone(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = in_process(*command(job, out))
    assert done.code == 0, done.err
    return out


def same(out: Path, alone: Path) -> None:
    for name in RESULTS:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_process_and_several_give_the_same_bytes(job: Job, alone: Path, tmp_path: Path, processes: int) -> None:
    out = tmp_path / "run"
    done = ranks.command(*command(job, out, "--processes", str(processes)))
    assert done.code == 0, done.err
    same(out, alone)
    for name in ("evaluation-dense", "evaluation-pruned"):
        assert (out / name / "evaluation.json").read_bytes() == (alone / name / "evaluation.json").read_bytes()
    assert done.out.count("removed ") == 1 and done.out.count(f"run      {out}") == 1  # one process speaks


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "accelerate"])
def test_other_launchers_work_the_same(job: Job, alone: Path, tmp_path: Path, launcher: str) -> None:
    here = Path(sys.executable).parent
    launch = {
        "torchrun": [str(here / "torchrun"), "--nproc_per_node", "2", "-m"],
        # It starts one process here, whatever it is asked for; ours starts what was asked for.
        "accelerate": [str(here / "accelerate"), "launch", "--cpu", "--num_processes", "2", "-m"],
    }[launcher]
    out = tmp_path / "run"
    done = ran(*launch, "compress", *command(job, out, "--until", "plan"))
    assert done.code == 0, done.err
    for name in RESULTS[:3]:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    assert done.out.count("removed ") == 1


def test_two_nodes_with_a_launcher_each_work_as_one(job: Job, alone: Path, tmp_path: Path) -> None:
    """Two launchers on this machine, as two nodes have them; what joins them is the address they are given."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    out = tmp_path / "run"
    launchers = [
        subprocess.Popen(
            [str(Path(sys.executable).parent / "torchrun"), "--nnodes", "2", "--node_rank", str(node),
             "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port, "-m", "compress",
             *command(job, out, "--until", "plan")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [launcher.communicate(timeout=300) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    for name in RESULTS[:3]:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    assert said[0][0].count("removed ") == 1 and said[1][0] == ""


def test_an_error_of_all_is_said_once(job: Job, tmp_path: Path) -> None:
    words = command(job, tmp_path / "run", "--set", "sparsity=1.2", "--processes", "2")
    one_error(ranks.command(*words), 2, "sparsity")


def test_an_error_in_one_process_ends_all_with_its_message_within_seconds(job: Job, tmp_path: Path) -> None:
    began = time.monotonic()
    words = command(job, tmp_path / "run", "--processes", "3")
    done = ranks.command(*words, before=partial(break_down, 1, "error"))
    assert done.code == 1
    assert done.err.count("error: ") == 1 and "error: rank 1: the test broke it" in done.err
    assert time.monotonic() - began < 100  # the processes' own start included


def test_a_killed_process_is_named_and_ends_all(job: Job, tmp_path: Path) -> None:
    words = command(job, tmp_path / "run", "--processes", "3")
    done = ranks.command(*words, before=partial(break_down, 2, "kill"))
    assert done.code == 1
    assert done.err.count("error: ") == 1 and "error: rank 2 was ended by SIGKILL" in done.err


def test_a_hung_process_is_named_after_the_timeout(job: Job, tmp_path: Path) -> None:
    words = command(job, tmp_path / "run", "--processes", "3", "--rank-timeout", "5")
    began = time.monotonic()
    done = ranks.command(*words, before=partial(break_down, 1, "hang"))
    assert done.code == 1
    assert done.err.count("error: ") == 1 and "rank 1 has not answered for 5 s" in done.err, done.err
    assert time.monotonic() - began < 100


def break_down(rank: int, how: str) -> None:
    """Has one process of a group come to grief when it first adds up statistics."""

    def add_up(tensor: torch.Tensor) -> None:
        if how == "error":
            raise CompressError("the test broke it", "here", "none")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)

    if os.environ.get("RANK") == str(rank):
        distributed.add_up = add_up  # of this process alone


def test_when_the_command_is_killed_its_processes_go_with_it(job: Job, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        compress(*command(job, tmp_path / "run", "--processes", "2")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    late = time.monotonic() + 60
    while len(children(parent.pid)) < 2 and time.monotonic() < late:
        time.sleep(0.05)
    mine = children(parent.pid)
    assert len(mine) == 2
    time.sleep(3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    late = time.monotonic() + 10
    while any(Path(f"/proc/{p}").exists() and state(p) != "Z" for p in mine) and time.monotonic() < late:
        time.sleep(0.05)
    assert all(not Path(f"/proc/{p}").exists() or state(p) == "Z" for p in mine)


def children(parent: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
