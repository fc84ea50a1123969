"""Recovery: what is learned from, what is trained, by how many processes, and behind which checkpoint."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.language import recover
from compress.language.plan import Plan
from compress.language.recover import parts_of, rate, windows_of
from compress.language.recover_checkpoints import Checkpoints
from compress.language.recover_lesson import lesson, losses
from compress.language.recover_student import merged, student
from compress.models.families import family_for
from compress.pipeline import METHODS
from compress.processes import distributed
from compress.schema.recipe import RecoverSection, load_recipe
from tests.language.recovery import FULL, LORA, distance, read, setup_of, start_of, train
from tests.models.families.test_families import ragged_plan
from tests.tiny import tiny, tokens


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery") / "job"
    setup_of(folder, steps=1)
    return folder


def spec(**changes: Any) -> RecoverSection:
    return RecoverSection.model_validate({"steps": 1, **changes})


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "temperature"), [(4, 1.0), (4, 2.5), (10_000, 1.0)])
def test_the_kl_is_that_of_the_likeliest_tokens_and_one_bucket(top_k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    dense, own = (torch.randn(2, 5, 11, generator=generator) * 3 for _ in range(2))
    kl, error = losses(own, [], lesson(dense, [], spec(top_k=top_k, temperature=temperature)), temperature)
    p, q = ((z.double() / temperature).softmax(-1) for z in (dense, own))
    want = torch.zeros(2, 5, dtype=torch.float64)
    for b in range(2):
        for t in range(5):
            kept = p[b, t].argsort(descending=True)[: min(top_k, 10)]
            others = [i for i in range(11) if i not in kept]
            for group in ([i] for i in kept.tolist()):
                want[b, t] += p[b, t, group].sum() * (p[b, t, group].sum() / q[b, t, group].sum()).log()
            want[b, t] += p[b, t, others].sum() * (p[b, t, others].sum() / q[b, t, others].sum()).log()
    torch.testing.assert_close(kl.double(), want.mean(1) * temperature**2, atol=1e-5, rtol=1e-5)
    assert error.tolist() == [0.0, 0.0]


def test_the_gradient_of_the_kl_is_right_where_the_model_is_sure() -> None:
    dense = torch.tensor([[[9.0, 2.0, 1.0, 0.0, -1.0]]])
    own = torch.tensor([[[40.0, 1.0, 0.0, 2.0, 1.0]]], requires_grad=True)
    kl, _ = losses(own, [], lesson(dense, [], spec(top_k=2)), 1.0)
    kl.sum().backward()
    exact = own.detach().double().requires_grad_()
    p, q = dense.double().softmax(-1)[0, 0], exact.softmax(-1)[0, 0]
    groups = ([0], [1], [2, 3, 4])
    sum(p[g].sum() * (p[g].sum() / q[g].sum()).log() for g in groups).backward()  # type: ignore[union-attr]
    assert own.grad is not None and exact.grad is not None
    torch.testing.assert_close(own.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)


def test_an_error_of_the_stream_counts_relative_to_its_size() -> None:
    theirs = [torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])]
    own = [torch.tensor([[[3.0, 2.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])]
    logits = torch.zeros(1, 2, 3)
    _, error = losses(logits, own, lesson(logits, theirs, spec()), 1.0)
    assert error.item() == pytest.approx((4 / 25 + 0 + 0 + 4 / 4) / 4)


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_the_rate_rises_in_a_line_and_falls_with_a_cosine() -> None:
    rates = [rate(s, 20, 0.2) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and 0 < rates[-1] < 0.02
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[12] == pytest.approx(0.5)
    assert [rate(0, 1, 0.0), rate(0, 1, 0.9)] == [1.0, 1.0]


def test_every_window_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    seen = [w for step in range(7) for w in windows_of(step, 3, 7, seed=0)]
    epochs = [seen[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    assert seen != [w for step in range(7) for w in windows_of(step, 3, 7, seed=1)]


@pytest.mark.parametrize(("processes", "micro"), [(1, 2), (2, 1), (2, 2), (3, 2), (4, 1), (8, 3)])
def test_no_window_of_a_step_is_lost_or_counted_twice(
    processes: int, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, counted, numbers = [11, 12, 13, 14, 15], [], set()
    monkeypatch.setattr(distributed, "world", lambda: processes)
    monkeypatch.setattr(recover, "world", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts = parts_of(batch, micro)
        numbers.add(len(parts))
        assert all(0 < len(part) <= micro for part, _ in parts)
        counted += [w for part, counts in parts for w in part if counts]
    assert counted == batch
    assert len(numbers) == 1, "sharded weights are gathered by all processes equally often"


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen2", "gemma2"])
def test_low_rank_updates_begin_at_nothing_and_are_merged_into_the_plan(model_type: str, tmp_path: Path) -> None:
    setup = setup_of(tmp_path / "job", model_type, **LORA)
    plan, ids = ragged_plan(setup.model), tokens(2, 16)
    model = student(setup, plan)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, setup.pruned(plan)[0](ids).logits)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        want = model(ids).logits
        assert not torch.allclose(want, setup.pruned(plan)[0](ids).logits, atol=1e-2)
        found = Plan(plan.blocks, {**plan.weights, **merged(model, setup.recipe.recover, setup.family)})  # type: ignore[arg-type]
        torch.testing.assert_close(setup.pruned(found)[0](ids).logits, want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(setup.masked(found)(ids).logits, want, atol=1e-4, rtol=1e-4)
    assert "norm" not in found.weights and not any("lora" in name for name in found.weights)


def test_only_the_named_layers_get_an_update(job: Path) -> None:
    setup = setup_of(job, **LORA, targets=["q_proj", "down_proj"])
    names = [n for n, p in student(setup, ragged_plan(setup.model)).named_parameters() if p.requires_grad]
    # Attention is gone from block 2, the FFN from 2 and 3.
    assert {n.split(".lora_")[0].removeprefix("model.layers.") for n in names} == {
        *(f"{i}.self_attn.q_proj" for i in (0, 1, 3)),
        *(f"{i}.mlp.down_proj" for i in (0, 1)),
    }


def test_full_recovery_is_adamw_on_the_mean_kl(job: Path, tmp_path: Path) -> None:
    """The same by hand: no accelerate, no parts, the whole distribution in float64."""
    settings = {**FULL, "hidden": 0.0, "top_k": 299, "warmup": 0.5, "clip": 0.5}
    train(job, tmp_path / "run", settings)
    found = read(tmp_path / "run")
    setup = setup_of(job, **settings)
    dense, windows = setup.model, tokens(8, 24, seed=3)
    model = copy.deepcopy(setup.pruned(ragged_plan(dense))[0])
    mine = {n: p for n, p in model.named_parameters() if ".layers." in n or n == "model.norm.weight"}
    for parameter in mine.values():
        parameter.requires_grad_(True)
    matrices, vectors = ([p for p in mine.values() if (p.dim() > 1) == flag] for flag in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.002 * (0.5, 1.0, 1.0, 0.5)[step]
        ids = windows[windows_of(step, 5, 8, setup.recipe.seed)]
        with torch.no_grad():
            p = dense(ids).logits.double().log_softmax(-1)
        q = model(ids).logits.double().log_softmax(-1)
        loss = (p.exp() * (p - q)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(w.grad.double().square().sum()) for w in mine.values() if w.grad is not None))
        for w in mine.values():
            if w.grad is not None:
                w.grad *= min(1.0, 0.5 / norm)
        optimizer.step()
        assert found.facts["log"][step]["kl"] == pytest.approx(loss.item(), rel=1e-4)
        assert found.facts["log"][step]["norm"] == pytest.approx(norm, rel=1e-3)
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(
            setup.pruned(found.plan)[0](windows).logits, model(windows).logits, atol=2e-3, rtol=1e-3
        )


@pytest.mark.parametrize(("begin", "skip"), [(1, 0), (3, 2)])
def test_that_one_token_of_a_beginning_follows_on_another_is_not_learned(
    begin: int, skip: int, job: Path, tmp_path: Path
) -> None:
    settings = {**FULL, "steps": 1, "hidden": 0.0, "top_k": 299}
    train(job, tmp_path / "run", settings, begin=begin)
    setup = setup_of(job, **settings)
    dense, windows = setup.model, tokens(8, 24, seed=3)
    ids = windows[windows_of(0, 5, 8, setup.recipe.seed)]
    with torch.no_grad():
        models: Any = (dense, setup.pruned(ragged_plan(dense))[0])
        p, q = (m(ids).logits[:, skip:].double().log_softmax(-1) for m in models)
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert read(tmp_path / "run").facts["log"][0]["kl"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("settings", [LORA, FULL])
def test_training_brings_the_model_nearer_to_the_dense_one(settings: dict[str, Any], job: Path, tmp_path: Path) -> None:
    train(job, tmp_path / "run", {**settings, "steps": 30, "batch": 8})
    log = read(tmp_path / "run").facts["log"]
    assert log[-1]["kl"] < 0.8 * log[0]["kl"]
    if settings["method"] == "full":
        assert log[-1]["hidden"] < log[0]["hidden"]
    assert [row["step"] for row in log] == list(range(1, 31))


def test_recomputed_activations_and_smaller_parts_give_the_same_weights(job: Path, tmp_path: Path) -> None:
    train(job, tmp_path / "plain", {**FULL, "micro": 5})
    start = start_of(job)
    for name, changes in (("again", {"save_memory": True, "micro": 5}), ("parts", {"micro": 2})):
        train(job, tmp_path / name, {**FULL, **changes})
        assert distance(read(tmp_path / "plain").plan, read(tmp_path / name).plan, start) < 1e-3


def test_bfloat16_stays_near_float32(job: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        train(job, tmp_path / dtype, {**FULL, "dtype": dtype})
    a, b = (read(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert a.bytes != b.bytes
    assert all(w.dtype == torch.float32 for w in b.plan.weights.values())
    assert [r["kl"] for r in b.facts["log"]] == pytest.approx([r["kl"] for r in a.facts["log"]], rel=0.1)


def test_a_dispatched_teacher_and_a_streamed_model_give_the_same(job: Path, tmp_path: Path) -> None:
    setup = setup_of(job, steps=1)
    folder, ids = setup.resolved.folder, tokens(2, 16)
    teacher = distributed.dispatched(folder, setup.config, 200_000, tmp_path / "offload")
    assert set(teacher.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(teacher(ids).logits, setup.model(ids).logits)
    with pytest.raises(CompressError, match="1,000 bytes hold no part"):
        distributed.dispatched(folder, setup.config, 1000, tmp_path / "offload")
    settings = {**FULL, "teacher": "dispatch", "teacher_memory": 200_000}
    train(job, tmp_path / "dispatched", settings)
    train(job, tmp_path / "resident", FULL)
    train(job, tmp_path / "streamed", FULL, stream=True)
    assert read(tmp_path / "dispatched").bytes == read(tmp_path / "resident").bytes
    assert read(tmp_path / "streamed").bytes == read(tmp_path / "resident").bytes


# --- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("{steps: 3, rank: 0}", ("rank", "greater than or equal to 1")),
        ("{steps: 0}", ("steps", "greater than or equal to 1")),
        ("{}", ("neither steps nor tokens",)),
        ("{steps: 3, tokens: 100}", ("both steps and tokens",)),
        ("{steps: 3, kl: 0}", ("nothing to learn from",)),
        ("{steps: 3, method: full, targets: [q_proj]}", ("targets belong to method lora",)),
        ("{steps: 3, lerning_rate: 1}", ("lerning_rate", "did you mean 'learning_rate'?")),
        ("{steps: 3, targets: [q_prj]}", ("q_prj", "recover.targets", "did you mean 'q_proj'?")),
        ("{steps: 3, batch: 9}", ("takes 9 windows, there are 8", "recover.batch")),
        ("{steps: 3, batch: 4, windows: 3}", ("takes 4 windows, there are 3", "recover.batch")),
        ("{steps: 3, hidden: 1, hidden_layers: [1, 4]}", ("no block 4", "from 0 to 3")),
    ],
)
def test_a_wrong_section_is_refused_before_any_weight_is_read(override: str, parts: tuple[str, ...], job: Path) -> None:
    from compress.language.setup import prepare

    with pytest.raises(UsageError) as error:
        prepare(str(job / "model"), load_recipe(str(job / "tiny.yaml"), METHODS, [f"recover={override}"]))
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_without_peft_it_says_what_to_install(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="need the package 'peft'") as error:
        setup_of(job, **LORA)
    assert "compress-toolchain[recover]" in error.value.fix
    setup_of(job, **FULL)


def test_a_loss_that_is_not_finite_stops_it_and_keeps_the_last_checkpoint(job: Path, tmp_path: Path) -> None:
    settings = {**FULL, "learning_rate": 1e14, "weight_decay": 1e10, "warmup": 0.0, "steps": 6, "checkpoint_every": 1}
    with pytest.raises(CompressError, match="is not finite in step 2") as error:
        train(job, tmp_path / "run", settings)
    assert "lower recover.learning_rate (it is 1e+14)" in error.value.fix and "behind step 1 is kept" in error.value.fix
    (kept,) = (tmp_path / "run" / ".scratch" / "recover").iterdir()
    assert [p.name for p in kept.iterdir()] == ["step-00000001"]
    assert not (tmp_path / "run" / "recover").exists()


def test_a_checkpoint_that_was_changed_is_not_gone_on_from(tmp_path: Path) -> None:
    weights = {name: torch.nn.Parameter(torch.randn(3, 2)) for name in ("model.layers.0.mlp.w", "model.norm.weight")}
    optimizer = torch.optim.AdamW(weights.values())
    sum(w.square().sum() for w in weights.values()).backward()
    optimizer.step()
    kept = Checkpoints(tmp_path)
    kept.save(7, weights, optimizer, [{"step": 7, "kl": 0.25}])
    assert kept.load(weights, torch.optim.AdamW(weights.values())) == (7, [{"step": 7, "kl": 0.25}])
    draw = random.Random(0)
    files = sorted((tmp_path / "step-00000007").iterdir())
    assert [p.suffix for p in files] == [".safetensors", ".safetensors", ".json"]
    for path in files:
        whole = path.read_bytes()
        for _ in range(40):
            at = draw.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(CompressError) as said:
                kept.load(weights, torch.optim.AdamW(weights.values()))
            assert "step-00000007" in said.value.where and "training then starts over" in said.value.fix
        path.unlink()
        with pytest.raises(CompressError, match="missing"):
            kept.load(weights, torch.optim.AdamW(weights.values()))
        path.write_bytes(whole)
    assert kept.load(weights, torch.optim.AdamW(weights.values()))[0] == 7


def test_a_full_device_is_one_clear_error() -> None:
    def full(**_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(CompressError, match="memory is full") as error:
        distributed.Trainer(None, full, False)(input_ids=None)
    assert "recover.micro=1" in error.value.fix


def test_a_plan_that_leaves_nothing_to_train_is_refused(job: Path) -> None:
    setup = setup_of(job, **LORA, targets=["down_proj"])
    whole = ragged_plan(tiny("llama")).blocks[3]  # its FFN is gone
    with pytest.raises(CompressError, match="leaves none of the layers"):
        student(setup, Plan((whole,) * 4))


def test_family_names_of_linear_layers() -> None:
    for model_type, names in (
        ("llama", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    ):
        config = tiny(model_type).config
        assert recover.linear_names(family_for(config), config) == names
