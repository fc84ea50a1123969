"""A plan: which units stay, and the refitted weights. It can be read, saved, applied, and compared.

`plan.json` is for people and holds every kept index; `plan.safetensors` holds the refitted projections.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.models import decoder
from compress.run.strict_json import member, read_json, typed
from compress.run.tensor_files import load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.models.families.base import Costs, Family, Geometry


@dataclass(frozen=True)
class BlockPlan:
    """Original indices, sorted, of the query heads and the FFN neurons that stay in one block."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What stays of every block. ``weights`` maps ``blocks.{i}.o`` (hidden, heads * head_dim) and
    ``blocks.{i}.down`` (hidden, neurons) to refitted projections, and ``norm`` (hidden,) to the last norm's weight.
    Any other parameter of a sliced block may stand beside them under its name in the block, in the shape it has there:
    ``blocks.{i}.self_attn.q_proj.weight``. What ``weights`` does not hold stays as it was."""

    blocks: tuple[BlockPlan, ...]
    weights: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes plan.json and plan.safetensors into ``folder`` (which exists)."""
        from safetensors.torch import save_file

        save_file({k: w.contiguous() for k, w in self.weights.items()}, folder / "plan.safetensors")
        head = json.dumps({"schema_version": 1, "meta": self.meta}, indent=1)[:-2]
        rows = ",\n".join(
            f'  {{"block": {i}, "kept_heads": {len(b.heads)}, "kept_neurons": {len(b.neurons)},'
            f' "heads": {list(b.heads)}, "neurons": {list(b.neurons)}}}'
            for i, b in enumerate(self.blocks)
        )
        (folder / "plan.json").write_text(f'{head},\n "blocks": [\n{rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Reads a plan.

        Raises:
            CompressError: a file is missing or is no plan.
        """
        path, fix = folder / "plan.json", "make it again with `compress prune`"
        what, where = "the plan", str(path)
        data = typed(read_json(path, what, constants=True, fix=fix), dict, "", what, where, fix)
        blocks = []
        for i, row in enumerate(member(data, "blocks", list, what, where, fix=fix)):
            at = f"blocks.{i}"
            row = typed(row, dict, at, what, where, fix)
            kept = (member(row, key, list, what, where, at, fix) for key in ("heads", "neurons"))
            blocks.append(BlockPlan(*(tuple(typed(n, int, at, what, where, fix) for n in one) for one in kept)))
        meta = member(data, "meta", dict, what, where, fix=fix)
        return cls(tuple(blocks), load_tensors(folder / "plan.safetensors", "the plan's weights", fix), meta)

    def check(self, geometry: Geometry) -> None:
        """Raises CompressError where the plan does not fit a model of this geometry."""

        def refuse(what: str, where: str) -> None:
            raise CompressError(what, where=where, fix="apply the plan to the model it was made for")

        if len(self.blocks) != geometry.layers:
            refuse(f"the plan has {len(self.blocks)} blocks, the model {geometry.layers}", "plan.json")
        for i, (block, dense) in enumerate(zip(self.blocks, geometry.blocks, strict=True)):
            for kind, kept, limit in (("head", block.heads, dense.heads), ("neuron", block.neurons, dense.ffn)):
                if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < limit):
                    refuse(f"{kind} indices must be distinct, sorted and below {limit}", f"block {i}")
            if len(set(Counter(h // dense.group for h in block.heads).values())) > 1:
                refuse("every kept KV group must keep equally many query heads", f"block {i}")
            for what, whole, kept in (
                ("attention", dense.attention_whole, block.heads),
                ("the FFN", dense.ffn_whole, block.neurons),
            ):
                if whole and not kept:
                    refuse(f"{what} of this block is never cut", f"block {i}")
            for key, columns in (("o", len(block.heads) * dense.head_dim), ("down", len(block.neurons))):
                weight = self.weights.get(f"blocks.{i}.{key}")
                if weight is not None and tuple(weight.shape) != (dense.hidden, columns):
                    refuse(
                        f"the refitted weight is {tuple(weight.shape)}, not {(dense.hidden, columns)}",
                        f"block {i}, {key}",
                    )

        norm = self.weights.get("norm")
        if norm is not None and tuple(norm.shape) != (geometry.hidden,):
            refuse(f"the weight of the last norm is {tuple(norm.shape)}, not {(geometry.hidden,)}", "norm")

    def counts(self, geometry: Geometry) -> list[tuple[int, int, int]]:
        """(query heads, KV groups, neurons) of every block."""
        return [
            (len(b.heads), len({h // dense.group for h in b.heads}), len(b.neurons))
            for b, dense in zip(self.blocks, geometry.blocks, strict=True)
        ]

    def removed(self, costs: Costs) -> int:
        """Backbone parameters that the plan removes, exactly."""
        kept = 0
        for (heads, groups, neurons), block in zip(self.counts(costs.geometry), costs.blocks, strict=True):
            kept += block.attention(groups, heads // groups if groups else 0) + block.ffn(neurons)
        return costs.backbone - kept

    def apply(self, model: Any, family: Family) -> None:
        """Slices ``model`` in place: after it the removed weights are gone."""
        self._replace(model, family, family.sliced)

    def mask(self, model: Any, family: Family) -> None:
        """The same function at full shape: removed units' columns are zero."""
        self._replace(model, family, family.masked)

    def _replace(self, model: Any, family: Family, make: Callable[..., nn.Module]) -> None:
        from compress.models.streaming import StreamedBlocks

        self.check(family.geometry(model.config))
        blocks = decoder.blocks(model)
        if isinstance(blocks, StreamedBlocks):
            # Each when it is read.
            decoder.put_blocks(model, blocks.changed(lambda i, block: self.block(i, family, block, make)))
        else:
            for i in range(len(self.blocks)):
                blocks[i] = self.block(i, family, blocks[i], make)
        if "norm" in self.weights:
            family.replace_norm(model, self.weights["norm"])

    def block(self, i: int, family: Family, dense: nn.Module, make: Callable[..., nn.Module]) -> nn.Module:
        """Block ``i`` made from the ``dense`` one by ``make``: the family's `sliced` or `masked`."""
        import torch

        plan = self.blocks[i]
        geometry = family.geometry_of(dense, i)
        return make(
            dense,
            heads=None if len(plan.heads) == geometry.heads else torch.tensor(plan.heads, dtype=torch.int64),
            neurons=None if len(plan.neurons) == geometry.ffn else torch.tensor(plan.neurons, dtype=torch.int64),
            o_weight=self.weights.get(f"blocks.{i}.o"),
            down_weight=self.weights.get(f"blocks.{i}.down"),
            others={k: w for k, w in self._of_block(i).items() if k not in ("o", "down")},
        )

    def _of_block(self, i: int) -> dict[str, Tensor]:
        prefix = f"blocks.{i}."
        return {k.removeprefix(prefix): w for k, w in self.weights.items() if k.startswith(prefix)}

    def compare(self, other: Plan) -> str:
        """The blocks in which two plans differ, a line each; empty where they are the same."""
        import torch

        lines = []
        if len(self.blocks) != len(other.blocks):
            return f"{len(self.blocks)} blocks against {len(other.blocks)}"
        for i, (a, b) in enumerate(zip(self.blocks, other.blocks, strict=True)):
            parts = []
            for kind, x, y in (("heads", a.heads, b.heads), ("neurons", a.neurons, b.neurons)):
                if x != y:
                    parts.append(f"{kind} {len(x)} -> {len(y)} (+{len(set(y) - set(x))} -{len(set(x) - set(y))})")
            mine, theirs = self._of_block(i), other._of_block(i)
            for key in sorted({*mine, *theirs}, key=lambda k: (k not in ("o", "down"), k)):
                w, v = mine.get(key), theirs.get(key)
                same = (w is None and v is None) or (w is not None and v is not None and torch.equal(w, v))
                if not same and not parts:
                    parts.append(f"{key.removesuffix('.weight')} weights")
            if parts:
                lines.append(f"block {i}: {', '.join(parts)}")
        n, m = self.weights.get("norm"), other.weights.get("norm")
        if (n is None) != (m is None) or (n is not None and m is not None and not torch.equal(n, m)):
            lines.append("the last norm")
        return "\n".join(lines)
