"""Blocks of which every process holds a part (FSDP2): the same weights, read once by all together."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.models.families import family_for
from compress.models.shards import Shards
from compress.models.streaming import StreamedBlocks, in_step, stream_model
from compress.processes.distributed import device
from tests import ranks
from tests.command import Job, compress, one_error
from tests.tiny import tiny


def blocks_of(folder: Path, shard: bool) -> StreamedBlocks:
    from transformers import AutoConfig

    model = stream_model(folder, family_for(AutoConfig.from_pretrained(folder)), 1, device(), shard)
    found: StreamedBlocks = model.model.layers
    return found


def held(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in block.named_parameters()}


def gathered(folder: Path) -> dict[str, Any]:
    """Goes over the blocks out of order, and twice, in step and by itself."""
    from transformers import AutoConfig

    model = stream_model(folder, family_for(AutoConfig.from_pretrained(folder)), 1, device(), shard=True)
    blocks: StreamedBlocks = model.model.layers
    first = blocks[0]  # held from before: not to be taken for one that all have
    with in_step(model):
        read = blocks.bytes_read
        within = [held(blocks[i]) for i in (0, 2, 1, 3, 0)]
        again = blocks.bytes_read - read
    outside = held(blocks[1])
    return {
        "within": [{k: v.numpy() for k, v in block.items()} for block in within],
        "outside": {k: v.numpy() for k, v in outside.items()},
        "read": read - sum(p.numel() for p in first.parameters()) * itemsize(folder),
        "again": again,
    }


def itemsize(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).dtype.itemsize)


# 40, 48, 80 and 16 rows: neither 3 nor 5 divides them; of 5 processes one has nothing of 16.
@pytest.mark.parametrize(
    ("processes", "kind"),
    [
        pytest.param(2, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(3, torch.float32, marks=pytest.mark.slow),
        (5, torch.bfloat16),
    ],
)
def test_a_block_put_together_is_the_block_that_was_saved(processes: int, kind: torch.dtype, tmp_path: Path) -> None:
    model = tiny("qwen3").to(kind)
    model.save_pretrained(tmp_path)
    expected = [held(block.float()) for block in model.model.layers]
    found = ranks.run(processes, gathered, tmp_path)
    for answer in found:
        for block, i in zip(answer["within"], (0, 2, 1, 3, 0), strict=True):
            assert block.keys() == expected[i].keys()
            assert all(torch.equal(torch.from_numpy(v), expected[i][k]) for k, v in block.items())
        assert all(torch.equal(torch.from_numpy(v), expected[1][k]) for k, v in answer["outside"].items())
        assert answer["again"] == 0  # nothing is read but each one's part, once
    whole = sum(v.numel() for block in expected for v in block.values()) * kind.itemsize
    assert sum(answer["read"] for answer in found) == whole
    assert max(answer["read"] for answer in found) <= whole / processes * 1.2


def mixed(folder: Path) -> list[dict[str, Any]]:
    from transformers import AutoConfig

    model = stream_model(folder, family_for(AutoConfig.from_pretrained(folder)), 1, device(), shard=True)
    with in_step(model):
        return [{k: v.numpy() for k, v in held(block).items()} for block in model.model.layers]


def test_weights_of_two_types_keep_every_bit(tmp_path: Path) -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.mlp.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for answer in ranks.run(2, mixed, tmp_path):
        for block, there in zip(answer, model.model.layers, strict=True):
            assert all(torch.equal(torch.from_numpy(v), there.get_parameter(k).float()) for k, v in block.items())


def test_one_process_has_nobody_to_share_with(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    streamed = stream_model(tmp_path, family_for(model.config), 1, device(), shard=True)
    with in_step(streamed):
        read = streamed.model.layers.bytes_read
        assert torch.equal(streamed.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
        assert streamed.model.layers.bytes_read > read


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_of_processes_that_share_the_model_ends_with_the_bytes_of_one(
    job: Job, finished: Path, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "run"
    done = ranks.command(
        "prune", job.model, "--recipe", job.recipe, "--out", out, "--until", "model",
        "--processes", processes, "--set", "memory={shard: true, cache_blocks: 1}",
    )  # fmt: skip
    assert done.code == 0, done.err
    for name in ("plan/plan.safetensors", "plan/plan.json", "plan/search.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_sharing_what_every_process_holds_is_refused(job: Job, tmp_path: Path) -> None:
    words = ("--set", "memory={shard: true, stream: false}")
    one_error(compress("prune", job.model, "--recipe", job.recipe, "--out", tmp_path / "run", *words), 2, "shard")


# Behind a metric's block, in the supernet, in a search: where blocks are put together the 3rd, 12th and 30th time.
@pytest.mark.parametrize(
    "call", [pytest.param(3, marks=pytest.mark.slow), 12, pytest.param(30, marks=pytest.mark.slow)]
)
def test_a_process_killed_while_blocks_are_put_together_costs_no_bytes(
    job: Job, finished: Path, tmp_path: Path, call: int
) -> None:
    words = (
        "prune", job.model, "--recipe", job.recipe, "--out", tmp_path / "run", "--until", "plan",
        "--processes", 2, "--set", "memory.shard=true",
    )  # fmt: skip
    done = ranks.command(*words, before=partial(die_at, call))
    assert done.code == 1 and done.err.count("error: ") == 1, done.err
    assert "error: rank 1 was ended by SIGKILL" in done.err
    again = ranks.command(*words)
    assert again.code == 0, again.err
    for name in ("plan/plan.safetensors", "plan/plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def die_at(call: int) -> None:
    """Has one process of a group be killed when blocks are put together for the ``call``-th time."""
    plain, calls = Shards.tensors, []

    def tensors(self: Shards, number: int) -> Any:
        calls.append(number)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, number)

    if os.environ.get("RANK") == "1":
        Shards.tensors = tensors  # type: ignore[method-assign]  # of this process alone
