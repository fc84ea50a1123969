"""The plan: which channels of which layers go, as data. plan.json for people, plan.safetensors with the indices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.networks.surgery import cut, size, width, widths, zeroed
from compress.run.strict_json import member, read_json, typed
from compress.run.tensor_files import load_tensors

FILE, INDICES = "plan.json", "plan.safetensors"


@dataclass(frozen=True)
class Plan:
    """``removed``: (layer, axis) -> rising channel indices; ``dense``: channels on every axis of its network's layers,
    and of what else is cut."""

    removed: Mapping[tuple[str, str], tuple[int, ...]]
    dense: Mapping[tuple[str, str], int]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, removed: Mapping[tuple[str, str], list[int]], meta: Mapping[str, Any] | None = None
    ) -> Plan:
        gone = {k: tuple(v) for k, v in sorted(removed.items()) if v}
        return cls(gone, axes(model, gone), dict(meta or {}))

    def check(self, model: nn.Module) -> None:
        """Raises CompressError where the plan is for another network, or was applied to this one already."""
        have = axes(model, self.dense)
        for at, count in self.dense.items():
            if have.get(at) != count:
                raise CompressError(
                    f"the plan is for a network with {count} channels at {'.'.join(at)}, this one has {have.get(at)}",
                    where=FILE,
                    fix="apply it once, to the network that it was made for",
                )
        for at, gone in self.removed.items():
            if list(gone) != sorted(set(gone)) or not 0 <= gone[0] <= gone[-1] < self.dense.get(at, 0):
                raise CompressError("indices must be distinct, rising and within the layer", where=".".join(at), fix="")

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of the network without the channels."""
        self.check(model)
        return cut(model, self.removed)

    def mask(self, model: nn.Module) -> nn.Module:
        """A copy at full shape with zeros in their place: the same function."""
        self.check(model)
        return zeroed(model, self.removed)

    def then(self, later: Plan) -> Plan:
        """Both plans as one; ``later`` is for the network that this one leaves."""
        removed: dict[tuple[str, str], list[int]] = {k: list(v) for k, v in self.removed.items()}
        dense = dict(self.dense)
        for at, gone in later.removed.items():
            # What was no layer's and is first cut by the second plan, the first left whole.
            dense.setdefault(at, later.dense[at])
            left = [i for i in range(dense[at]) if i not in set(self.removed.get(at, ()))]
            if len(left) != later.dense[at]:
                raise CompressError(
                    "the second plan is not for what the first leaves", where=".".join(at), fix="name them in order"
                )
            removed.setdefault(at, []).extend(left[i] for i in gone)
        return Plan({k: tuple(sorted(v)) for k, v in sorted(removed.items())}, dense, later.meta)

    def compare(self, other: Plan) -> str:
        """The layers in which two plans differ, a line each; empty where they are the same."""
        lines = []
        for at in sorted({*self.removed, *other.removed}):
            a, b = set(self.removed.get(at, ())), set(other.removed.get(at, ()))
            if a != b:
                lines.append(f"{'.'.join(at)}: removes {len(a)} -> {len(b)} (+{len(b - a)} -{len(a - b)})")
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(
            {" ".join(at): torch.tensor(gone) for at, gone in self.removed.items()} or _nothing(), folder / INDICES
        )
        layers = [
            {"layer": name, "axis": axis, "channels": count, "kept": count - len(self.removed.get((name, axis), ()))}
            for (name, axis), count in self.dense.items()
        ]
        rows = ",\n".join("  " + json.dumps(row) for row in layers)
        (folder / FILE).write_text(
            f'{{\n "meta": {json.dumps(dict(self.meta))},\n "layers": [\n{rows}\n ]\n}}\n', encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Reads a plan.

        Raises:
            CompressError: a file is missing or is no plan.
        """
        path, fix = folder / FILE, "make it again with `compress prune`"
        what, where = "the plan", str(path)
        data = typed(read_json(path, what, constants=True, fix=fix), dict, "", what, where, fix)
        dense = {}
        for i, row in enumerate(member(data, "layers", list, what, where, fix=fix)):
            at = f"layers.{i}"
            row = typed(row, dict, at, what, where, fix)
            layer, axis = (member(row, key, str, what, where, at, fix) for key in ("layer", "axis"))
            dense[layer, axis] = member(row, "channels", int, what, where, at, fix)
        removed = {}
        for name, indices in load_tensors(folder / INDICES, "the plan's channels", fix).items():
            layer, space, axis = name.partition(" ")
            if name == "none":
                continue
            if not space or indices.dim() != 1 or indices.is_floating_point():
                raise CompressError(f"the plan's channels {name!r} are none", where=str(folder / INDICES), fix=fix)
            removed[layer, axis] = tuple(indices.tolist())
        return cls(dict(sorted(removed.items())), dense, member(data, "meta", dict, what, where, fix=fix))


def _nothing() -> dict[str, torch.Tensor]:
    """safetensors keeps no empty file."""
    return {"none": torch.zeros(1, dtype=torch.int64)}


def axes(model: nn.Module, more: Iterable[tuple[str, str]] = ()) -> dict[tuple[str, str], int]:
    """Channels on every axis of every layer that can be cut, and on ``more``, of parameters and of numbers in the code
    (as `compress.networks.surgery` names them) that are there."""
    modules = dict(model.named_modules())
    found = {
        (name, axis): width(modules[name], axis)
        for name, shape in widths(model).items()
        for axis in ("out", "in")
        if axis in shape
    }
    sizes = {at: size(model, *at) for at in more if at not in found}
    return found | {at: count for at, count in sizes.items() if count is not None}
