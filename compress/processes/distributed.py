"""Several processes: how they are started, who they are, and what they tell each other.

The only file that knows accelerate. Every process runs the same program; the main one (rank 0) alone writes and speaks.
With one process every function here does nothing, and torch.distributed is not touched.

What is added up over processes must not depend on how many there are: float sums do, so sums go through `ExactSum`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import CompressError, UsageError
from compress.processes.children import python
from compress.system import host
from compress.system.files import write_whole
from compress.words.escape import terminal_lines

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

REPORTS = "COMPRESS_RANK_REPORTS"  # folder where the processes of `launch` leave what ended them
PATIENCE = timedelta(minutes=30)  # how long the others wait for a process that does not come
FOREVER = timedelta(days=30)  # work that the main process does alone may take long

_timeout = PATIENCE
_group: Any = None  # a gloo group for what is said between the processes, whatever carries the tensors
_alone = False  # within `alone`


class Aborted(BaseException):
    """Another process has failed and says so itself; this one ends without a word."""


class RankLost(CompressError):
    """The connection to another process broke, or one did not answer in time."""


# --- who am I ------------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's number; 0 is the main one."""
    return int(os.environ.get("RANK", "0")) if started() > 1 and not _alone else 0


def started() -> int:
    """How many processes were started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def world() -> int:
    """How many processes work together: 1 until they have joined."""
    return 1 if _group is None or _alone else started()


def is_main() -> bool:
    return rank() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While it is open, this process works as if there were no other: all that it calls gives what one process would,
    and each process may do something else."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def share(count: int, of: int | None = None) -> range:
    """The contiguous part of ``count`` items that is this process's (or process ``of``'s); sizes differ by one at
    most."""
    mine, n = rank() if of is None else of, world()
    return range(count * mine // n, count * (mine + 1) // n)


def device() -> Any:
    """The torch device this process computes on."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Products are in float32 as torch has it, but convolutions are not: masked and sliced would differ by 1e-4.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _processes_per_gpu() -> int:
    """1, or more where more processes were started on this machine than it has GPUs."""
    import torch

    return -(-int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // torch.cuda.device_count())


def leave_no_gaps() -> None:
    """Room that is freed on a GPU joins up again: a 70B block's matrices are gigabytes in one piece.

    Called before anything lies on a GPU, since torch looks then; what the environment says already stands.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def shares_device() -> bool:
    """Whether another process computes on this one's GPU."""
    return device().type == "cuda" and _processes_per_gpu() > 1


def stay_alone() -> None:
    """This process does all the work, whatever the environment says of others."""
    os.environ.pop("RANK", None)


def available_bytes() -> int:
    """Memory that this process can have: its share of the machine's (or the container's) free RAM."""
    free = host.free_memory()
    if free is None:
        raise CompressError(
            "this system does not tell how much memory is free", where="memory", fix="pip install psutil"
        )
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_bytes() -> int:
    """Free memory of what this process computes on; of the machine where that is the CPU."""
    import torch

    if device().type != "cuda":
        return available_bytes()
    return int(torch.cuda.mem_get_info(device())[0]) // _processes_per_gpu()


# --- joining -------------------------------------------------------------------------------------------------------


def join(timeout: timedelta = PATIENCE) -> None:
    """Joins the group of processes that the environment speaks of; does nothing where there is one process.

    Args:
        timeout: how long a process may stay away from a meeting before it is named and all end.
    """
    global _group, _timeout
    _timeout = timeout
    if started() == 1 or _group is not None:
        return
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_gloo_available():
        raise CompressError("torch was built without gloo", where="distributed", fix="install a build with it")
    how: dict[str, Any] = {}
    if shares_device():
        # NCCL wants a GPU for every process; accelerate would take the GPU of the process's number.
        how["backend"] = "gloo"
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device())
    with contact("joining"):
        PartialState(cpu=device().type == "cpu", timeout=timeout, **how)
        _group = dist.new_group(backend="gloo", timeout=FOREVER)


def leave() -> None:
    """Leaves the group; called when all work is done."""
    global _group
    if _group is None:
        return
    import torch.distributed as dist
    from accelerate import PartialState

    dist.destroy_process_group()
    PartialState._reset_state()
    _group = None


@contextlib.contextmanager
def contact(what: str) -> Iterator[None]:
    """Words with other processes are had within it: one that is gone is said so, with ``what`` was being done."""
    began = time.monotonic()
    try:
        yield
    except (RuntimeError, ConnectionError) as e:
        late = re.search(r"[Rr]anks? ([\d, ]+)[^\d]*failed to pass monitoredBarrier", str(e))
        # gloo says the same, at once, of a process that is gone.
        if late and time.monotonic() - began >= _timeout.total_seconds():
            raise RankLost(
                f"rank {late[1].strip(' ,')} has not answered for {_timeout.total_seconds():g} s",
                where=what,
                fix="look at that process's machine; the same command goes on behind the last whole stage",
            ) from e
        raise RankLost(
            f"the connection to another process broke: {str(e).splitlines()[0][:200]}",
            where=what,
            fix="the same command goes on behind the last whole stage",
        ) from e


def empty_weights() -> contextlib.AbstractContextManager[Any]:
    """Modules made within have no weights (meta device); their buffers are real."""
    from accelerate import init_empty_weights

    made: contextlib.AbstractContextManager[Any] = init_empty_weights(include_buffers=False)
    return made


# --- saying and adding up ------------------------------------------------------------------------------------------


def meet(what: str) -> None:
    """Waits until every process is here.

    Raises:
        RankLost: one did not come in time; it is named.
    """
    if world() == 1:
        return
    import torch.distributed as dist

    with contact(what):
        dist.monitored_barrier(_group, timeout=_timeout, wait_all_ranks=True)


def main_says(work: Callable[[], T]) -> T:
    """Runs ``work`` in the main process and gives its result to all; if it fails there, the others end silently."""
    if world() == 1:
        return work()
    said: list[Any] = [None, True]
    if is_main():
        try:
            said = [work(), False]
        except BaseException:
            _broadcast([None, True])
            raise
    said = _broadcast(said)
    if said[1]:
        raise Aborted
    value: T = said[0]
    return value


def _broadcast(said: list[Any]) -> list[Any]:
    import torch.distributed as dist

    with contact("waiting for the main process"):
        dist.broadcast_object_list(said, src=0, group=_group)
    return said


def gather(mine: Sequence[T]) -> list[T]:
    """The items of all processes, in the order of their ranks, in every process."""
    if world() == 1:
        return list(mine)
    import torch.distributed as dist

    parts: list[Any] = [None] * world()
    meet("gathering results")
    with contact("gathering results"):
        dist.all_gather_object(parts, list(mine), group=_group)
    return [item for part in parts for item in part]


def add_up(tensor: Tensor) -> None:
    """Adds an int64 tensor over all processes, in place. Integers alone: their sum knows no order."""
    if tensor.is_floating_point():
        raise TypeError("float sums depend on the number of processes: use ExactSum")
    if world() == 1:
        return
    import torch.distributed as dist

    meet("adding up statistics")
    with contact("adding up statistics"):
        dist.all_reduce(tensor, group=_group if tensor.device.type == "cpu" else None)


def sum_floats(tensor: Tensor) -> Tensor:
    """The sum of a float tensor over all processes, in place: for gradients, where its last bits may differ."""
    if world() > 1:
        import torch.distributed as dist

        with contact("adding up gradients"):
            dist.all_reduce(tensor)
    return tensor


def from_main(tensor: Tensor) -> None:
    """Fills ``tensor`` (the same shape and type everywhere) with the main process's, in place."""
    if world() == 1:
        return
    import torch.distributed as dist

    with contact("waiting for the main process"):
        dist.broadcast(tensor, src=0, group=_group if tensor.device.type == "cpu" else None)


def stack(mine: Tensor, counts: Sequence[int]) -> Tensor:
    """Tensors that differ in their first size alone, joined in the order of the ranks.

    Args:
        mine: (counts[rank], ...).
        counts: every process's first size.
    """
    if world() == 1:
        return mine
    import torch
    import torch.distributed as dist

    # Padded to one size: collectives want equal shapes.
    most = max(counts)
    padded = mine.new_zeros(most, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    meet("joining activations")
    with contact("joining activations"):
        dist.all_gather(parts, padded, group=_group if mine.device.type == "cpu" else None)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class ExactSum:
    """A sum of float tensors that comes out the same whatever the order, and however it is split over processes.

    Every addend is rounded to one grid, 2^-44 of the size of a typical addend, and added as int64. The sum may grow to
    2^18 times that size.
    """

    FINE, COARSE = 44, 62
    ROWS = 1024  # rows of the total that are made at once

    def __init__(self, *shape: int, device: Any = None) -> None:
        import torch

        self._sum = torch.zeros(*shape, dtype=torch.int64, device=device)
        self._grid: float | None = None
        self._reach = 0.0  # no entry of the sum is larger, in grid steps

    def set_grid(self, size: float) -> None:
        """Fixes the grid by the size of a typical addend, the same in all processes (`agree`)."""
        import math

        exponent = math.frexp(size)[1] if math.isfinite(size) and size > 0 else 0
        self._grid = 2.0 ** (exponent - self.FINE)

    @property
    def has_grid(self) -> bool:
        return self._grid is not None

    def add(self, part: Tensor, rows: slice = slice(None)) -> None:
        """Adds ``part`` (any float type) to the ``rows``.

        Raises:
            OverflowError: the sum could grow beyond its range, or the addend is not finite.
        """
        import torch

        assert self._grid is not None, "set_grid comes first"
        scaled = part.double() / self._grid
        if scaled.numel():
            self._reach += float(scaled.abs().max())
        if not self._reach < 2.0**self.COARSE / world():
            raise OverflowError
        self._sum[rows] += scaled.round_().to(torch.int64)

    def total(self) -> Tensor:
        """The sum over all processes, float64, in the place of the integers: nothing can be added any more."""
        import torch

        assert self._grid is not None, "nothing was added, or the total was taken"
        add_up(self._sum)
        made = self._sum.view(torch.float64)
        for first in range(0, len(made), self.ROWS):
            rows = slice(first, first + self.ROWS)
            made[rows] = self._sum[rows].double() * self._grid
        self._grid = None
        return made


def agree(sizes: Sequence[float]) -> list[float]:
    """The main process's ``sizes``, in every process: the grids of several `ExactSum`s."""
    return main_says(lambda: list(sizes))


# --- training ------------------------------------------------------------------------------------------------------


class Trainer:
    """A model that accelerate has made ready to be trained by all processes together. Use `trainer`."""

    def __init__(self, accelerator: Any, model: Any, sharded: bool) -> None:
        self.model, self.sharded, self._accelerator = model, sharded, accelerator

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward."""
        with _training():
            return self.model(**inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of ``loss``; with the ``last`` part of a step it is averaged over the processes."""
        # Sharded gradients are summed part by part: unsharded ones would need the room of all weights.
        wait = contextlib.nullcontext() if last or self.sharded else self._accelerator.no_sync(self.model)
        if last:
            meet("training")
        with _training(), wait:
            self._accelerator.backward(loss)

    def clip(self, most: float) -> float:
        """Scales the gradients down to the norm ``most``; returns the norm they had."""
        with _training():
            return float(whole(self._accelerator.clip_grad_norm_(self.model.parameters(), most)))


@contextlib.contextmanager
def _training() -> Iterator[None]:
    import torch

    try:
        with contact("training") if world() > 1 else contextlib.nullcontext():
            yield
    except (RankLost, torch.OutOfMemoryError) as e:
        if not isinstance(e, torch.OutOfMemoryError) and not isinstance(e.__cause__, torch.OutOfMemoryError):
            raise
        raise CompressError(
            "the device's memory is full",
            where="training",
            fix="set recover.micro=1 and recover.save_memory=true, or recover.shard=fsdp with more processes",
        ) from e


@contextlib.contextmanager
def trainer(model: Any, shard: bool, bfloat16: bool) -> Iterator[Trainer]:
    """Makes ``model`` ready: DDP, or FSDP2 where ``shard`` is set and there are several processes.

    With FSDP2 the main process's weights count; the others' may be on the meta device.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    if shares_device():
        raise CompressError(
            f"training needs a GPU for every process; {_processes_per_gpu()} share one",
            where="recover",
            fix="start as many processes as there are GPUs: the stages that are whole stay",
        )
    shard = shard and world() > 1
    plugin = None
    kept = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    if shard:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=True,
            reshard_after_forward=True,
        )
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        cpu=device().type == "cpu",
        mixed_precision="bf16" if bfloat16 else "no",
        fsdp_plugin=plugin,
        # Buckets that are never put in another order: a run that is resumed adds up as one that was not.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if plugin is not None and accelerator.distributed_type != DistributedType.FSDP:
        # On CPUs accelerate leaves the plugin aside without a word; all that follows works there too.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        if bfloat16:
            plugin.set_mixed_precision("bf16")
    try:
        with contact("preparing the training"):
            if shard:
                # It wants an optimiser, and finds its parameters by their addresses, which meta tensors have not:
                # this one is never used.
                unused = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
                model, _ = accelerator.prepare(model, unused)
            else:
                model = accelerator.prepare(model)
        yield Trainer(accelerator, model, shard)
    finally:
        accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=world() == 1)
        if kept is None:
            os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
        else:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = kept


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, in every process; any other as it is."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def like_shard(tensor: Tensor, sharded: Tensor) -> Tensor:
    """A ``tensor`` that every process has, cut as ``sharded`` is."""
    if not hasattr(sharded, "full_tensor"):
        return tensor.to(sharded.device)
    from torch.distributed.tensor import distribute_tensor

    there = tensor.to(sharded.device_mesh.device_type)  # type: ignore[attr-defined]
    cut: Tensor = distribute_tensor(there, sharded.device_mesh, sharded.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return cut


def dispatched(folder: Path, config: Any, memory: int | None, offload: Path) -> Any:
    """A causal LM in float32, spread by accelerate over this process's device, memory and disk.

    Args:
        folder: its weights, in safetensors.
        memory: bytes of main memory it may take; what is over is read from disk when it is needed.
        offload: a folder for what stays on disk and does not lie in ``folder`` as it is.
    """
    import torch
    from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
    from accelerate.utils import get_max_memory
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    room: dict[Any, Any] = {"cpu": get_max_memory()["cpu"] // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))}
    if memory is not None:
        room["cpu"] = memory
    if device().type != "cpu":
        # Half of what is free: the student is to have its place too.
        room[device().index or 0] = torch.cuda.mem_get_info(device())[0] // 2
    places = infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
    if set(places.values()) == {"disk"}:
        raise CompressError(
            f"{room['cpu']:,} bytes hold no part of the dense model and the largest block beside it",
            where="recover.teacher_memory",
            fix="raise it",
        )
    model = load_checkpoint_and_dispatch(
        model, str(folder), device_map=places, offload_folder=str(offload), offload_buffers=False, dtype=torch.float32
    )
    return model.requires_grad_(False).eval()


# --- starting ------------------------------------------------------------------------------------------------------


def wanted(asked: int | None) -> int:
    """How many processes this command is to start: 1 where it is itself one of a group.

    ``asked`` on the command line, or what an `accelerate launch` above it was asked for but did not start, or one per
    accelerator.

    Raises:
        UsageError: another number is asked for than runs.
    """
    if "RANK" in os.environ:
        if asked is not None and asked != started():
            raise UsageError(
                f"{asked} processes are asked for, {started()} were started from outside",
                where="--processes",
                fix="leave it out under torchrun and accelerate launch",
            )
        return 1
    silent = _silently_dropped()
    if asked is not None:
        if asked < 1:
            raise UsageError("at least one process is needed", where="--processes", fix="give 1 or more")
        return asked
    if silent is not None:
        return silent
    if host.has_nvidia_driver() or os.environ.get("CUDA_VISIBLE_DEVICES"):
        import torch

        return max(1, torch.cuda.device_count())
    return 1


def _silently_dropped() -> int | None:
    """`accelerate launch --cpu --num_processes N` runs one process; what it was asked for stands in its command."""
    if "ACCELERATE_USE_CPU" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    words = host.command_of(os.getppid())
    if "launch" not in words:
        return None
    for at, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.replace("-", "_") in ("__num_processes", "_n"):
            number = value or (words[at + 1] if at + 1 < len(words) else "")
            return int(number) if number.isdigit() else None
    return None


def launch(count: int, words: Sequence[str]) -> int:
    """Runs ``compress *words`` in ``count`` processes of one group and waits for them.

    The first one that fails ends all; what ended it is printed, once, with its rank. Ctrl-C ends all.

    Returns:
        The exit code of the command: 0, or that of the process that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = []
        threads = max(1, host.processors() // count)
        surroundings = {
            "OMP_NUM_THREADS": str(threads),
            # What gloo logs of a lost process we say ourselves.
            "TORCH_CPP_LOG_LEVEL": "FATAL",
            **os.environ,
            REPORTS: folder,
        }
        for number, place in enumerate(places(count)):
            environment = {**surroundings, **place}
            with (Path(folder) / f"{number}.stderr").open("w", encoding="utf-8") as err:
                children.append(
                    subprocess.Popen(
                        python("-m", "compress", *words),
                        env=environment,
                        stdout=None if number == 0 else subprocess.DEVNULL,
                        stderr=None if number == 0 else err,
                        **host.ends_with_parent(),
                    )
                )
        try:
            while any(c.poll() is None for c in children) and not any(c.poll() for c in children):
                time.sleep(0.05)
        except BaseException:
            _end(children, host.interrupt(), 10.0)
            raise
        if not any(c.returncode for c in children):
            return 0
        # A moment for the others to say what they saw; they can't go on without it anyway.
        late = time.monotonic() + 1.0
        while any(c.poll() is None for c in children) and time.monotonic() < late:
            time.sleep(0.05)
        before = [c.poll() for c in children]
        _end(children, signal.SIGTERM, 3.0)
        return _explain(Path(folder), before)


def places(count: int) -> list[dict[str, str]]:
    """The environment of each of ``count`` processes on this machine, by which they find one another."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for number in range(count)
    ]


def _end(children: Sequence[subprocess.Popen[bytes]], how: signal.Signals, patience: float) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(how)
    late = time.monotonic() + patience
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, late - time.monotonic()))
        if child.poll() is None:
            child.kill()
            child.wait()


def _explain(folder: Path, codes: Sequence[int | None]) -> int:
    """Prints what ended the group: a killed process first, then the earliest error that is one's own."""
    reports = sorted(
        (json.loads(p.read_text("utf-8")) for p in folder.glob("*.report")), key=lambda r: (r["lost"], r["time"])
    )
    killed = [(i, -code) for i, code in enumerate(codes) if code is not None and code < 0]
    own = [r for r in reports if not r["lost"]]
    if killed and not own:
        number, signal_number = killed[0]
        name = signal.Signals(signal_number).name
        hint = "; the machine may be out of memory" if host.was_killed(signal_number) else ""
        print(
            f"error: rank {number} was ended by {name}{hint}\n  where: process {number} of {len(codes)}\n"
            "  fix:   the same command goes on behind the last whole stage",
            file=sys.stderr,
        )
        return 1
    if reports:
        first = reports[0]
        if first["trace"]:
            print(terminal_lines(first["trace"]), file=sys.stderr)
        # What all would have said alike needs no rank.
        who = f"rank {first['rank']}: " if first["rank"] else ""
        if first["text"]:
            print(terminal_lines(f"error: {who}{first['text']}"), file=sys.stderr)
        return int(first["code"])
    number = next(i for i, code in enumerate(codes) if code)
    tail = (folder / f"{number}.stderr").read_text("utf-8")[-2000:]
    print(f"{terminal_lines(tail)}\nerror: rank {number} ended with exit code {codes[number]}", file=sys.stderr)
    return codes[number] or 1


def report(error: BaseException, code: int, debug: bool = False) -> bool:
    """Leaves what ended this process to `launch`; false where it was not started by it."""
    folder = os.environ.get(REPORTS)
    if folder is None or "RANK" not in os.environ:
        return False
    if isinstance(error, Aborted):
        return True
    known = isinstance(error, CompressError)
    left = {
        "rank": rank(),
        "time": time.time(),
        "lost": isinstance(error, RankLost) and "has not answered" not in str(error),
        "text": str(error) if known else f"{type(error).__name__}: {error}",
        "trace": "" if known and not debug else "".join(traceback.format_exception(error)),
        "code": code,
    }
    write_whole(Path(folder) / f"{rank()}.report", json.dumps(left))
    return True
