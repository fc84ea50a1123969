"""The type that forwards are computed in: what it touches, who decides it, and that a run goes on as it began."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from compress.errors import CompressError
from compress.language.computing import BATCH_TOKENS, Computing, batch_tokens, settle
from compress.models.blocks import BlockRunner
from compress.models.families import family_for
from compress.pipeline import _read_lock
from compress.processes import compute
from compress.report.build import read_report
from compress.run.seals import stamped
from compress.system import host
from tests.command import Job, compress, one_error
from tests.tiny import ARCHITECTURES, tiny, tokens

CPU = torch.device("cpu")


def has(monkeypatch: pytest.MonkeyPatch, *units: str) -> None:
    monkeypatch.setattr(compute, "units", lambda _: list(units))


def run(model: Any, ids: Tensor, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """The hidden states behind every block, and what `down_proj` reads in the first."""
    runner = BlockRunner(model, family_for(model.config), ids.shape[1], kind)
    hidden, found = runner.embed(ids), []
    middle = runner.middle(0, hidden, runner.blocks[0].self_attn.o_proj(runner.context(0, hidden)))
    read = [runner.context(0, hidden), runner.activation(0, middle)]
    for i in range(len(runner.blocks)):
        hidden = runner.run(i, hidden)
        found.append(hidden)
    return found, read


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_products_are_rounded_and_all_else_is_float32(model_type: str) -> None:
    model, ids = tiny(model_type), tokens(2, 24)
    exact, exactly_read = run(model, ids, "float32")
    fast, read = run(model, ids, "bfloat16")
    assert {t.dtype for t in (*fast, *read)} == {torch.float32}
    for a, b in zip((*fast, *read), (*exact, *exactly_read), strict=True):
        error = float((a - b).norm() / b.norm())
        assert 0 < error < 0.03  # 8 bits: 0.4 % a product
    # What products give has the bits of bfloat16; the residual stream has float32's.
    assert torch.equal(read[0], read[0].bfloat16().float())
    assert not torch.equal(fast[0], fast[0].bfloat16().float())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@torch.no_grad()
def test_a_block_that_adds_nothing_leaves_the_residual_stream_to_the_last_bit(model_type: str) -> None:
    model = tiny(model_type)
    runner = BlockRunner(model, family_for(model.config), 24, "bfloat16")
    block: Any = copy.deepcopy(runner.blocks[1])
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        layer.weight.zero_()
    hidden = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(runner.run(1, hidden, block), hidden)


def test_float32_is_computed_as_without_a_choice() -> None:
    model, ids = tiny("llama"), tokens(2, 24)
    with torch.no_grad():
        runner = BlockRunner(model, family_for(model.config), 24, "float32")
        hidden = runner.embed(ids)
        for i in range(4):
            hidden = runner.run(i, hidden)
        assert torch.equal(runner.logits(hidden), model(ids, use_cache=False).logits)


def test_tf32_is_switched_on_for_products_alone_and_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ZeroDivisionError), compute.fast(CPU, "tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_the_type_is_what_is_asked_for_and_auto_what_there_are_units_for(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    assert compute.type_for("float32", None) == compute.type_for("auto", None) == ("float32", True)
    assert compute.type_for("bfloat16", None) == ("bfloat16", False)
    has(monkeypatch, "tf32", "bfloat16")
    assert compute.type_for("auto", None) == ("bfloat16", True) and compute.type_for("tf32", None) == ("tf32", True)
    assert compute.type_for("float32", None) == ("float32", True)


def test_all_processes_have_to_have_the_units(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "tf32", "bfloat16")
    monkeypatch.setattr(compute, "gather", lambda mine: [*mine, {"bfloat16"}])
    assert compute.type_for("auto", None) == ("bfloat16", True)
    with pytest.raises(CompressError, match="not every process has one"):
        compute.type_for("tf32", None)
    monkeypatch.setattr(compute, "gather", lambda mine: [*mine, set()])
    assert compute.type_for("auto", None) == ("float32", True)


def test_a_run_goes_on_in_the_type_that_it_began_in(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "bfloat16")
    assert compute.type_for("auto", "float32") == ("float32", True)
    has(monkeypatch)
    assert compute.type_for("auto", "bfloat16") == ("bfloat16", False)
    with pytest.raises(CompressError, match="this run was begun in bfloat16, and float32 is asked for") as error:
        compute.type_for("float32", "bfloat16")
    assert "compute=bfloat16 or auto" in error.value.fix and "--fresh" in error.value.fix
    with pytest.raises(CompressError, match="tf32 is a type of NVIDIA GPUs") as error:
        compute.type_for("auto", "tf32")
    assert "--fresh" in error.value.fix


def test_how_many_tokens_run_together_is_the_lock_files(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = family_for(tiny("llama").config).geometry(tiny("llama").config)
    found = settle("float32", geometry, None, "recipe.lock.yaml")
    assert found == Computing("float32", BATCH_TOKENS) and batch_tokens(geometry, True) > BATCH_TOKENS
    locked = {"type": "float32", "batch_tokens": 16384}
    assert settle("auto", geometry, locked, "recipe.lock.yaml").batch_tokens == 16384
    for wrong in (3, {}, {"type": "float16", "batch_tokens": 4}, {**locked, "batch_tokens": 0}, {**locked, "type": 1}):
        with pytest.raises(CompressError, match="not a type and a number of tokens") as error:
            settle("auto", geometry, wrong, "recipe.lock.yaml")
        assert error.value.where == "recipe.lock.yaml"


@pytest.mark.parametrize(
    ("flags", "units"), [("fma avx2", ""), ("avx512_bf16 amx_bf16", "amx_bf16"), ("avx512_bf16", "avx512_bf16")]
)
def test_units_of_a_processor_are_those_that_its_kernel_names(flags: str, units: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags} sse\n")
    assert host.bfloat16_units(str(tmp_path / "cpuinfo")) == units
    assert host.bfloat16_units(str(tmp_path / "nothing")) == ""


def test_a_run_that_was_begun_before_there_was_a_choice_goes_on_in_float32(tmp_path: Path) -> None:
    lock = tmp_path / "recipe.lock.yaml"
    assert _read_lock(lock) == (False, None)
    for written, found in (({}, {"type": "float32", "batch_tokens": BATCH_TOKENS}), ({"compute": 5}, 5)):
        lock.write_text(stamped(yaml.safe_dump({"method": "tyr", **written})))
        assert _read_lock(lock) == (True, found)
    lock.write_text(stamped("- 1\n"))
    with pytest.raises(CompressError, match="is no map"):
        _read_lock(lock)


@pytest.mark.processes
def test_a_run_in_bfloat16_says_what_it_costs_goes_on_and_is_not_mixed(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: set[tuple[str, str]] = set()
    init = BlockRunner.__init__

    def noted(self: BlockRunner, *given: Any, **more: Any) -> None:
        init(self, *given, **more)
        made.add((sys._getframe(1).f_code.co_name, self.compute))

    monkeypatch.setattr(BlockRunner, "__init__", noted)

    def prune(*more: str) -> Any:
        words = ("--set", "layouts=[per-layer]", "--set", "export=null", "--set", "bench=null")
        return compress("prune", job.model, "--recipe", job.recipe, "--out", tmp_path / "run", *words, *more)

    emulated = not host.bfloat16_units()
    ran = prune("--set", "compute=bfloat16", "--until", "plan")
    assert ran.code == 0, ran.err
    assert ("bfloat16 is emulated on this processor" in ran.err) == emulated
    # Walk, singles, search and run-off are all the job's runner's; the metric's gradients alone are not.
    assert made == {("runner", "bfloat16"), ("metrics_of", "float32")}
    one_error(prune("--set", "compute=float32"), 1, "this run was begun in bfloat16")
    searched = json.loads((tmp_path / "run" / "plan" / "search.json").read_text())
    ran = prune("--set", "compute=auto")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "run" / "plan" / "search.json").read_text()) == searched
    assert (tmp_path / "run" / "recipe.lock.yaml").read_text().count("type: bfloat16") == 1
    assert read_report(tmp_path / "run")["quality"]["texts"][0]["pruned_ppl"] > 0
    ran = compress("verify", tmp_path / "run")
    assert ran.code == 0 and " 0 do not hold" in ran.out, ran.err
