"""Modules of which every process holds a part: FSDP2's sharding, for work that all processes do in step.

A module is put together when it is asked for and let go again, so the weights of a model that fits no single device lie
on all of them once, and no disk is read again. FSDP2's own forward hooks are not used: Týr runs a block in pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.processes.distributed import contact, device, device_bytes, meet, rank, shares_device, world
from compress.system import host

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

SHARE = 0.25  # of a device's free memory that the parts may take; larger ones lie in main memory


class Shards:
    """The parts of ``modules`` that are this process's. Every process makes it, and asks for the same modules in the
    same order.

    Args:
        modules: on the meta device; not changed.
        read: (number of the module, name of its parameter, rows) -> those rows of the parameter, in the type they are
            stored in. Asked for this process's rows alone.
    """

    def __init__(self, modules: Sequence[nn.Module], read: Callable[[int, str, slice], Tensor]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        # gloo, which processes on one GPU speak, gathers in main memory.
        where = torch.device("cpu") if shares_device() else device()
        self.bytes_held = 0
        with contact("sharding the model"):
            mesh = init_device_mesh(where.type, (world(),))
            self._modules = [self._shard(i, copy.deepcopy(m), read, mesh, where) for i, m in enumerate(modules)]

    def _shard(
        self, number: int, module: nn.Module, read: Callable[[int, str, slice], Tensor], mesh: Any, where: torch.device
    ) -> FSDPModule:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        rows: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            # As torch.chunk cuts: the last processes may have less, or nothing.
            size = -(-len(parameter) // world())
            rows[name] = read(number, name, slice(min(rank() * size, len(parameter)), (rank() + 1) * size))
        kinds = {part.dtype for part in rows.values()}
        kind = kinds.pop() if len(kinds) == 1 else torch.float32  # what is gathered together is of one type
        held = sum(part.numel() for part in rows.values()) * kind.itemsize
        near = where.type == "cpu" or self.bytes_held + held <= SHARE * (device_bytes() + self.bytes_held)
        self.bytes_held += held
        module.to(kind).requires_grad_(False)
        offload = OffloadPolicy() if near else CPUOffloadPolicy()
        made: FSDPModule = fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=offload)
        module.to_empty(device=where if near else "cpu")
        for name, parameter in module.named_parameters():
            parameter.to_local().copy_(rows[name])  # type: ignore[attr-defined]
        return made

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Module ``number``'s parameters, whole, float32, on this process's device. All processes ask for it together.

        Raises:
            RankLost: another process did not come.
        """
        module = self._modules[number]
        meet(f"gathering block {number}")
        with contact(f"gathering block {number}"), torch.no_grad():
            module.unshard()
            made = {
                name: parameter.detach().to(device(), torch.float32, copy=True)
                for name, parameter in module.named_parameters()  # type: ignore[attr-defined]
            }
            module.reshard()
        # The C library keeps tensors of up to 32 MB: after a pass, as much as the model.
        host.give_back_memory()
        return made
