"""The state by which a recovery that was killed goes on: trained weights, the optimiser's moments, the steps done."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.models import decoder
from compress.processes.distributed import is_main, like_shard, main_says, whole
from compress.run.cache import sha256_of
from compress.run.folder import fingerprint
from compress.run.strict_json import read_json, typed
from compress.system.files import settle

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoints:
    """The state behind the last noted step, in a folder of its own that is whole or not there.

    It does not depend on the number of processes, nor on how the weights were divided among them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> int:
        """Steps done at the latest checkpoint; 0 where there is none."""
        return max((int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*")), default=0)

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, weights: Mapping[str, Any], optimizer: Any, log: list[dict[str, Any]]) -> None:
        """All processes come here: sharded tensors are put together by all, and written by the main one, block by
        block, so that it never holds more than one."""
        partial = self.folder / f".{self._at(step).name}.partial"
        if is_main():
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        for file, names in _files(weights).items():
            tensors: dict[str, Tensor] = {}
            for name in names:
                state = optimizer.state.get(weights[name], {})
                # A weight that nothing reads (the norm of a sublayer that is gone) has no moments.
                moments = {kind: state[kind] for kind in MOMENTS if kind in state}
                for kind, tensor in {"weight": weights[name].detach(), **moments}.items():
                    put_together = whole(tensor)
                    if is_main():
                        tensors[f"{kind}:{name}"] = put_together.cpu().contiguous()
            main_says(functools.partial(_write_file, partial / file, tensors))
        main_says(lambda: self._finish(step, partial, log))

    def _finish(self, step: int, partial: Path, log: list[dict[str, Any]]) -> None:
        files = {p.name: sha256_of(p) for p in sorted(partial.glob("*.safetensors"))}
        facts = {"step": step, "log": log, "files": files}
        (partial / "state.json").write_text(json.dumps({**facts, "sha256": fingerprint(facts)}), encoding="utf-8")
        settle(partial, self._at(step))
        for older in self.folder.glob("step-*"):
            if older != self._at(step):
                shutil.rmtree(older)

    def load(self, weights: Mapping[str, Any], optimizer: Any) -> tuple[int, list[dict[str, Any]]]:
        """Fills weights and optimiser from the latest checkpoint; (0, []) and nothing done where there is none."""
        import torch
        from safetensors import safe_open

        step = main_says(self.latest)
        if step == 0:
            return 0, []
        log = main_says(lambda: self.checked(step)["log"])
        for path, names in _files(weights).items():
            with safe_open(self._at(step) / path, "pt") as file, torch.no_grad():
                there = set(file.keys())
                for name in names:
                    parameter = weights[name]
                    parameter.copy_(like_shard(file.get_tensor(f"weight:{name}"), parameter))
                    if f"{MOMENTS[0]}:{name}" in there:
                        optimizer.state[parameter] = {
                            "step": torch.tensor(float(step)),
                            **{kind: like_shard(file.get_tensor(f"{kind}:{name}"), parameter) for kind in MOMENTS},
                        }
        return step, log

    def weights(self, step: int) -> dict[str, Tensor]:
        """The trained weights by name."""
        from safetensors import safe_open

        found = {}
        for path in self._at(step).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it has keys() alone)
                    if name.startswith("weight:"):
                        found[name.removeprefix("weight:")] = file.get_tensor(name)
        return found

    def checked(self, step: int) -> dict[str, Any]:
        """The state behind a step: ``log`` has a row for every step so far.

        Raises:
            CompressError: a file is missing, or is not as it was written.
        """
        folder, fix = self._at(step), f"delete {self._at(step)}: training then starts over"
        facts = typed(
            read_json(folder / "state.json", "the state", constants=True, fix=fix), dict, "", "the state", str(folder)
        )
        if facts.pop("sha256", None) != fingerprint(facts):
            raise CompressError("the state was changed since it was written", where=str(folder), fix=fix)
        for name, sha256 in facts["files"].items():
            if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
                raise CompressError(
                    "the checkpoint is not as it was written: a file was changed or is missing",
                    where=str(folder / name),
                    fix=fix,
                )
        return facts


MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a weight, beside the number of steps


def _files(names: Iterable[str]) -> dict[str, list[str]]:
    """The weights' names by the file of the checkpoint that holds them: one a block, one for what is beside."""
    found: dict[str, list[str]] = {}
    for name in names:
        place = decoder.block_of(name)
        found.setdefault(f"block-{place[0]:03d}.safetensors" if place else "beside.safetensors", []).append(name)
    return found


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)
