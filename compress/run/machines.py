"""Machines that a run is reckoned for: `8xh100`, `1x24gb`, `2x8xh100`, a YAML file, or the one this runs on."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from compress.errors import UsageError
from compress.schema.section import Section
from compress.schema.strict_yaml import read_yaml
from compress.system import host

TABLE = Path(__file__).with_name("machines.yaml")
HERE = "this-machine"


class Node(Section):
    """A machine as it is sold; GB and GB/s."""

    gpus: int = Field(1, ge=1)
    ram: float = Field(gt=0)
    disk: float = Field(gt=0)
    disk_read: float = Field(gt=0)


class Gpu(Section):
    """Published peaks: GB, TFLOP/s (dense), GB/s."""

    memory: float = Field(gt=0)
    float32: float = Field(gt=0)
    tf32: float | None = None
    bfloat16: float | None = None
    float64: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    pcie: float = Field(gt=0)
    source: str
    node: Node | None = None


class _Table(Section):
    reached: float = Field(gt=0, le=1)
    gpus: dict[str, Gpu]
    same: dict[str, str] = Field({})


class _File(Section):
    gpu: str | Gpu
    count: int = Field(1, ge=1, description="GPUs of a node")
    nodes: int = Field(1, ge=1)
    ram: float = Field(gt=0, description="GB, of a node")
    disk: float = Field(gt=0, description="GB")
    disk_read: float = Field(gt=0, description="GB/s")
    reached: float | None = Field(None, gt=0, le=1)


@dataclass(frozen=True)
class Machine:
    """``nodes`` machines with ``count`` processes each. Bytes, bytes/s, FLOP/s; what is reached, not the peak.

    ``gpu`` None: the processes compute on the CPU, whose speeds `compress.run.forecast` knows from measured runs.
    """

    title: str
    count: int
    nodes: int
    gpu: str | None
    memory: float  # of a GPU; of the RAM where there is none
    ram: float  # of a node
    disk: float
    disk_read: float | None
    float32: float
    float64: float
    bandwidth: float
    pcie: float
    words: str  # where the figures come from

    @property
    def world(self) -> int:
        return self.count * self.nodes


def _table() -> _Table:
    return _Table.model_validate(read_yaml(TABLE, "the table of machines").value)


def machine_names() -> list[str]:
    table = _table()
    return [HERE, *table.gpus, *table.same]


def find_machine(name: str, folder: Path) -> Machine:
    """The machine meant by ``--on``.

    Args:
        folder: where the run would be written, for the free disk of this machine.

    Raises:
        UsageError: no such machine, or its file is wrong.
    """
    if name == HERE:
        return _here(folder)
    if name.endswith((".yaml", ".yml")):
        return _from_file(Path(name))
    table = _table()
    parts = re.fullmatch(r"(?:([0-9]{1,6})x)?(?:([0-9]{1,6})x)?([a-z0-9][a-z0-9-]*)", name.lower())
    gpu = None if parts is None else table.same.get(parts[3], parts[3])
    if parts is None or gpu not in table.gpus:
        known = [*table.gpus, *table.same]
        close = difflib.get_close_matches((parts[3] if parts else name).lower(), [*known, HERE], n=1, cutoff=0.4)
        raise UsageError(
            f"unknown machine {name!r}",
            where="--on",
            fix=(f"did you mean {close[0]!r}? " if close else "")
            + f"COUNTxGPU or NODESxCOUNTxGPU with one of {', '.join(known)}; {HERE}; or a YAML file",
        )
    first, second = (int(n) if n else None for n in parts.group(1, 2))
    nodes, count = (first, second) if first is not None and second is not None else (1, 1 if first is None else first)
    if nodes < 1 or count < 1:
        raise UsageError("a machine has at least one GPU", where="--on", fix="for example 8xh100")
    found = table.gpus[gpu]
    node = found.node
    assert node is not None  # the table's own all have one
    ram = node.ram * min(1.0, count / node.gpus)
    return _with(
        name,
        found,
        count,
        nodes,
        gpu,
        Node(gpus=count, ram=ram, disk=node.disk, disk_read=node.disk_read),
        table.reached,
    )


def _from_file(path: Path) -> Machine:
    table = _table()
    try:
        facts = _File.model_validate(read_yaml(path, "the machine file").value)
    except ValidationError as e:
        first = f"{'.'.join(map(str, e.errors()[0]['loc']))} {e.errors()[0]['msg']}"
        raise UsageError(
            f"the machine file is wrong: {first}", where=str(path), fix="give gpu, count, ram, disk and disk_read"
        ) from e
    if isinstance(facts.gpu, str):
        gpu = table.same.get(facts.gpu, facts.gpu)
        if gpu not in table.gpus:
            raise UsageError(
                f"unknown GPU {facts.gpu!r}", where=str(path), fix=f"one of: {', '.join([*table.gpus, *table.same])}"
            )
        found = table.gpus[gpu]
    else:
        gpu, found = path.stem, facts.gpu
    node = Node(gpus=facts.count, ram=facts.ram, disk=facts.disk, disk_read=facts.disk_read)
    return _with(path.stem, found, facts.count, facts.nodes, gpu, node, facts.reached or table.reached)


def _with(name: str, gpu: Gpu, count: int, nodes: int, label: str, node: Node, reached: float) -> Machine:
    return Machine(
        title=name,
        count=count,
        nodes=nodes,
        gpu=label,
        memory=gpu.memory * 1e9,
        ram=node.ram * 1e9,
        disk=node.disk * 1e9,
        disk_read=node.disk_read * 1e9,
        float32=gpu.float32 * 1e12 * reached,
        float64=gpu.float64 * 1e12 * reached,
        bandwidth=gpu.bandwidth * 1e9 * reached,
        pcie=gpu.pcie * 1e9 * reached,
        words=f"published peaks ({gpu.source}), of which {reached:.0%} are taken to be reached; not measured",
    )


def _here(folder: Path) -> Machine:
    import torch

    from compress.processes.distributed import device

    where = device()
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    total = host.total_memory()
    if total is None:
        raise UsageError("this machine does not tell its memory", where="--on", fix="describe it in a YAML file")
    ram = float(total)
    if where.type == "cuda":
        # Its bus was not measured: what PCIe 4.0 x16 reaches in practice is half its peak.
        return Machine(
            title=HERE,
            count=torch.cuda.device_count(),
            nodes=1,
            gpu=torch.cuda.get_device_name(where),
            memory=float(torch.cuda.mem_get_info(where)[1]),
            ram=ram,
            disk=float(shutil.disk_usage(there).free),
            disk_read=None,
            float32=known(where, torch.float32),
            float64=known(where, torch.float64),
            bandwidth=known(where, torch.float32, copy=True),
            pcie=16e9,
            words="the GPU's speeds, measured now for half a second; its bus is taken to do 16 GB/s",
        )
    threads = torch.get_num_threads()

    def rate(dtype: Any, copy: bool = False) -> float:
        # In CPU time: how busy the machine is now does not matter.
        return threads * known(where, dtype, copy, time.process_time)

    copied = rate(torch.float32, copy=True)
    return Machine(
        title=HERE,
        count=1,
        nodes=1,
        gpu=None,
        memory=ram,
        ram=ram,
        disk=float(shutil.disk_usage(there).free),
        disk_read=None,
        float32=rate(torch.float32),
        float64=rate(torch.float64),
        bandwidth=copied,
        pcie=copied,
        words=f"speeds measured now for half a second, as if {threads} of {os.cpu_count()} cores were free",
    )


@lru_cache
def known(where: Any, dtype: Any, copy: bool = False, clock: Callable[[], float] = time.perf_counter) -> float:
    """`speed`, measured once in a process: forecasts that stand side by side are of one machine."""
    return speed(where, dtype, copy, clock)


def speed(where: Any, dtype: Any, copy: bool = False, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of matrix products on a device or, with ``copy``, bytes/s moved; measured for a sixth of a second."""
    import torch

    # What is copied must not lie in a cache, and a GPU's product must outlast its launch.
    side = 8192 if where.type == "cuda" else 4096 if copy else 1024
    x = torch.randn(side, side, device=where, dtype=dtype)
    out = torch.empty_like(x)

    def once() -> None:
        out.copy_(x) if copy else torch.mm(x, x, out=out)

    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize()

    once()
    wait()
    count, began = 0, clock()
    while clock() - began < 0.16:
        once()
        wait()
        count += 1
    spent = clock() - began
    return count * (2 * x.nbytes if copy else 2 * side**3) / spent
