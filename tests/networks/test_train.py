"""Training: masks hold exactly, a killed run ends with the same bytes, and two processes do what one does."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.data.images import Splits
from compress.data.tasks import Weights, loss_sum
from compress.errors import CompressError
from compress.models.zoo import build
from compress.networks import train as module
from compress.networks.train import Moment, apply_masks, evaluate, rate, train
from compress.processes import distributed
from compress.schema.sections import TrainSpec
from tests import forks, ranks
from tests.networks import shape_data

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0},
    "momentum": {"weight_decay": 1e-2},
    "nesterov": {"nesterov": True, "weight_decay": 1e-2},
    "adam": {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-2},
}


def small(classes: int = 3, seed: int = 0) -> nn.Module:
    return build("resnet", {"depth": 8, "width": 4, "classes": classes}, seed)


class TwoHeads(nn.Module):
    """A class and a matte from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.shape, self.matte = nn.Linear(8, 3), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.trunk(x)
        return {"matte": self.matte(y), "shape": self.shape(y.mean((2, 3)))}


def in_double(data: Splits) -> Splits:
    """The same samples, prepared in float64."""
    return dataclasses.replace(data, mean=data.mean.double(), std=data.std.double())


def half_masks(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters() if p.dim() > 1}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_training_learns_what_it_is_shown() -> None:
    data, model = shape_data(), small()
    before = evaluate(model, data, data.test)["shape"]["accuracy"]
    _, rows = train(model, data, TrainSpec(epochs=12, batch=16, lr=0.1, warmup_epochs=1))
    after = evaluate(model, data, data.test)["shape"]
    assert after["accuracy"] > 0.9 > 0.7 > before, (before, after)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and len(rows) == 12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_gradients_and_momentum_are_exactly_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = shape_data(), small()
    masks = half_masks(model)
    seen: list[int] = []
    made: list[torch.optim.Optimizer] = []
    make = module._optimizer

    def watched(model: nn.Module, spec: TrainSpec, weights: Weights) -> torch.optim.Optimizer:
        optimizer = make(model, spec, weights)
        step = optimizer.step

        def checked(*args: Any) -> Any:
            out = step(*args)
            parameters = dict(model.named_parameters())
            for n, mask in masks.items():
                p = parameters[n]
                for tensor in (
                    p,
                    p.grad,
                    *(v for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.dim()),
                ):
                    assert not torch.count_nonzero(tensor[~mask])
                    assert not torch.signbit(tensor[~mask]).any()  # nor -0.0
            seen.append(1)
            return out

        optimizer.step = checked  # type: ignore[method-assign]
        made.append(optimizer)
        return optimizer

    monkeypatch.setattr(module, "_optimizer", watched)
    train(model, data, TrainSpec(epochs=2, batch=32, ema=0.9, **OPTIMIZERS[name]), masks=masks)
    assert len(seen) == 2 * math.ceil(203 / 32)
    parameters = dict(model.named_parameters())
    assert all(not torch.count_nonzero(parameters[n][~m]) for n, m in masks.items())
    # And the others did move: the mask is not simply everything.
    fresh = dict(small().named_parameters())
    assert all(not torch.equal(parameters[n][m], fresh[n][m]) for n, m in masks.items())


def test_a_mask_that_grows_in_training_clears_what_the_optimiser_and_the_average_remember() -> None:
    data, model = shape_data(), small()
    masks = half_masks(model)

    def remask(moment: Moment, model: nn.Module) -> dict[str, Tensor] | None:
        return masks if moment.step == 9 else None

    held, rows = train(model, data, TrainSpec(epochs=2, batch=32, ema=0.9), remask=remask)
    parameters = dict(model.named_parameters())
    assert all(not torch.count_nonzero(parameters[n][~m]) for n, m in held.items())
    assert [r["pruned"] for r in rows] == [0, sum(int((~m).sum()) for m in masks.values())]


def test_a_nan_under_the_mask_is_removed_not_kept() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 0] = False
    apply_masks(model, {"weight": mask})
    assert bool(torch.isfinite(model.weight).all())


def test_one_step_is_torchs_own_step_on_the_same_batch() -> None:
    """Nesterov, decay, smoothing and a mask against a hand-written loop in float64."""
    data, model = shape_data(), small().double()
    other = copy.deepcopy(model)
    masks = half_masks(model)
    spec = TrainSpec(epochs=1, batch=64, lr=0.05, nesterov=True, weight_decay=1e-2, label_smoothing=0.1)
    train(model, in_double(data), spec, seed=4, masks=masks)
    order = torch.randperm(203, generator=torch.Generator().manual_seed(4 * 1_000_003))
    velocity = {n: torch.zeros_like(p) for n, p in other.named_parameters()}
    other.train()
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for n, m in masks.items():
            parameters[n] *= m
    for step in range(4):
        at = order[64 * step : 64 * step + 64]
        logits = other(in_double(data).prepare(data.train.inputs[at]))
        target = torch.full((len(at), 3), 0.1 / 3, dtype=torch.float64)
        target[torch.arange(len(at)), data.train.targets["shape"][at]] += 0.9
        loss = -(target * torch.log_softmax(logits, 1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        lr = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 4))
        with torch.no_grad():
            for (n, p), g in zip(parameters.items(), gradients, strict=True):
                g = (g + 1e-2 * p) * masks.get(n, torch.ones_like(p))
                velocity[n] = 0.9 * velocity[n] + g
                p -= lr * (g + 0.9 * velocity[n])
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, parameters[n], rtol=1e-9, atol=1e-12)


def test_the_rate_warms_up_linearly_and_ends_near_zero() -> None:
    spec = TrainSpec(epochs=10, lr=0.4, warmup_epochs=2)
    rates = [rate(spec, s, 5) for s in range(50)]
    assert rates[0] == pytest.approx(0.04) and rates[9] == pytest.approx(0.4) and rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx(0.2) and rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_average_is_the_moving_mean_of_all_steps() -> None:
    data, model = shape_data(train=64), small()
    seen: list[dict[str, Tensor]] = []

    def watch(moment: Moment, model: nn.Module) -> None:
        seen.append(state(model))

    train(model, data, TrainSpec(epochs=3, batch=32, lr=0.05, ema=0.8), remask=watch)
    plain = small()
    train(plain, data, TrainSpec(epochs=3, batch=32, lr=0.05))
    want = seen[0]["stem.weight"]
    for step in (*seen[1:], state(plain)):
        want = 0.8 * want + 0.2 * step["stem.weight"]
    torch.testing.assert_close(model.state_dict()["stem.weight"], want)
    assert not torch.equal(plain.state_dict()["stem.weight"], want)


def test_two_heads_are_trained_and_measured_each_by_its_own_measure() -> None:
    data = shape_data(multitask=True)
    torch.manual_seed(0)
    model = TwoHeads()
    train(model, data, TrainSpec(epochs=6, batch=16, lr=0.1, flip=True, shift=1))
    found = evaluate(model, data, data.test)
    assert set(found) == {"shape", "matte"} and found["matte"]["iou"] > 0.8
    # IoU by hand, over all pixels together.
    with torch.no_grad():
        out = model.eval()(data.prepare(data.test.inputs))  # type: ignore[arg-type]
    said, is_in = out["matte"][:, 0] > 0, data.test.targets["matte"] > 127
    assert found["matte"]["iou"] == pytest.approx(float((said & is_in).sum() / (said | is_in).sum()))
    with pytest.raises(CompressError, match="one output"):
        evaluate(small(), data, data.test)


def test_mirrored_and_moved_images_keep_their_mask_with_them() -> None:
    data = shape_data(multitask=True)
    at = torch.arange(50)
    spec = TrainSpec(epochs=1, flip=True, shift=3)
    x, targets = module._moved(
        data.train.inputs[at], {n: t[at] for n, t in data.train.targets.items()}, data.tasks, at, 203, spec, 0, 0
    )
    front = x.amax(1) >= 128  # what is drawn is bright, what is behind it dark, what came in is zero
    assert torch.equal(front, targets["matte"] > 127)
    assert not torch.equal(x, data.train.inputs[at])
    flat = x.flatten(1)
    assert len({r.numpy().tobytes() for r in flat}) == 50


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    data = shape_data()
    spec = TrainSpec(epochs=3, batch=32, ema=0.9, flip=True, shift=1, checkpoint_steps=4, **OPTIMIZERS[name])

    class Stop(Exception):
        pass

    def remask(last: int) -> Any:
        def ask(moment: Moment, model: nn.Module) -> dict[str, Tensor] | None:
            if moment.step == last:
                raise Stop
            return half_masks(model, 1) if moment.step == 6 else None

        return ask

    whole = nn.Sequential(small(), nn.Dropout(0.2))  # its noise comes from the generator that is saved
    stopped = copy.deepcopy(whole)
    _, rows = train(whole, data, spec, remask=remask(-1), checkpoint=tmp_path / "whole")
    for last in (6, 7, 13, 18):
        with pytest.raises(Stop):
            train(copy.deepcopy(stopped), data, spec, remask=remask(last), checkpoint=tmp_path / "stopped")
    held, again = train(stopped, data, spec, remask=remask(-1), checkpoint=tmp_path / "stopped")
    assert same(state(whole), state(stopped)) and again == rows and held
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "stopped").read_bytes()


def test_stopped_and_resumed_with_learnt_weights_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    data, start = shape_data(multitask=True), TwoHeads()
    spec = TrainSpec(epochs=3, batch=32, ema=0.9, weights="uncertainty", checkpoint_steps=4)

    class Stop(Exception):
        pass

    def remask(last: int) -> Any:
        def ask(moment: Moment, model: nn.Module) -> None:
            if moment.step == last:
                raise Stop

        return ask

    whole = copy.deepcopy(start)
    _, rows = train(whole, data, spec, checkpoint=tmp_path / "whole")
    for last in (6, 13):
        with pytest.raises(Stop):
            train(copy.deepcopy(start), data, spec, remask=remask(last), checkpoint=tmp_path / "stopped")
    resumed = copy.deepcopy(start)
    _, again = train(resumed, data, spec, checkpoint=tmp_path / "stopped")
    assert same(state(whole), state(resumed)) and again == rows
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "stopped").read_bytes()
    # They did move, and are said.
    assert rows[-1]["weight shape"] != rows[0]["weight shape"] != 1 and rows[-1]["weight matte"] != 1
    with pytest.raises(CompressError, match="other settings"):
        train(resumed, data, spec.model_copy(update={"weights": {"shape": 2.0}}), checkpoint=tmp_path / "whole")


def test_a_task_of_weight_zero_trains_nothing() -> None:
    data, model = shape_data(multitask=True), TwoHeads()
    before = state(model)
    train(model, data, TrainSpec(epochs=1, batch=32, weights={"matte": 0}))
    assert torch.equal(model.matte.weight, before["matte.weight"])
    assert not torch.equal(model.shape.weight, before["shape.weight"])


def test_one_sample_a_batch_is_refused_under_a_batch_norm_and_evaluation_takes_it() -> None:
    data, model = shape_data(train=21), small()
    with pytest.raises(CompressError, match=r"a batch of one sample.*bn") as caught:
        train(model, data, TrainSpec(epochs=1, batch=1))
    assert "16" in caught.value.fix
    end = (nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), *end)
    with pytest.raises(CompressError, match="last batch"):
        train(pooled, data, TrainSpec(epochs=1, batch=20))
    figures = evaluate(model, data, data.test, batch=1)["shape"], evaluate(model, data, data.test)["shape"]
    assert figures[0]["accuracy"] == figures[1]["accuracy"]
    train(nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), data, TrainSpec(epochs=1, batch=1, lr=1e-3))


def strided(channels: int, stride: tuple[int, int]) -> nn.Module:
    """A network with the shortcut of a pruned block: 1x1, strided, few channels in."""
    torch.manual_seed(0)
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(30, 3))
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 30, 1, stride), *ends)


def strided_gradients(out: Path) -> None:
    for channels in (1, 3, 4, 7, 8, 15, 17):
        for stride in ((2, 2), (1, 2), (2, 1)):
            model, x = strided(channels, stride), torch.randn(8, 3, 12, 12)
            x = x.contiguous(memory_format=torch.channels_last)
            with module.sound_gradients(model):
                model(x).square().sum().backward()
            exact = strided(channels, stride).double()
            exact(x.double()).square().sum().backward()
            for one, two in zip(model.parameters(), exact.parameters(), strict=True):
                torch.testing.assert_close(one.grad, two.grad.float(), rtol=1e-3, atol=1e-3)
            assert not any(m._forward_pre_hooks for m in model.modules())
    out.touch()


def test_a_pruned_shortcut_trains_with_sound_gradients(tmp_path: Path) -> None:
    """In a process of its own: where oneDNN overwrites its heap, it dies."""
    process = in_its_own_process(1, strided_gradients, tmp_path / "done")
    process.join()
    assert process.exitcode == 0 and (tmp_path / "done").exists()


def test_training_lays_a_pruned_shortcut_out_soundly() -> None:
    seen: list[bool] = []

    class Watched(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous())
            return super().forward(x)

    model = strided(4, (2, 2))
    model[1] = Watched(4, 30, 1, 2)
    train(model, shape_data(), TrainSpec(epochs=1, batch=16))
    assert seen and all(seen)


def in_its_own_process(threads: int, target: Callable[..., None], *words: object) -> Any:
    process = forks.server.Process(target=alone, args=(threads, target, *words))
    process.start()
    return process


def alone(threads: int, target: Callable[..., None], *words: object) -> None:
    torch.set_num_threads(threads)
    target(*words)


def long_training(checkpoint: Path, out: Path) -> None:
    model = small()
    spec = TrainSpec(epochs=8, batch=32, ema=0.9, weight_decay=1e-3, flip=True, checkpoint_steps=3)
    train(model, shape_data(), spec, masks=half_masks(model), checkpoint=checkpoint)
    save_file(model.state_dict(), out)


def test_killed_in_training_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def start(name: str) -> Any:
        return in_its_own_process(1, long_training, tmp_path / f"{name}.ckpt", tmp_path / name)

    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0
    checkpoint = tmp_path / "killed.ckpt"
    for _ in range(2):
        process = start("killed")
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        written = 0
        while written < 3:  # so many checkpoints further, and somewhere between two
            assert process.exitcode is None, "it ended before it could be killed"
            now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            written += now != before
            before = now
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    last = start("killed")
    last.join()
    assert last.exitcode == 0
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


def shared_training(out: str, batch: int) -> None:
    rank = distributed.rank()
    model = small(seed=rank).double()  # each starts elsewhere: the first one's weights must win
    data = in_double(shape_data())
    spec = TrainSpec(
        epochs=3, batch=batch, lr=0.05, nesterov=True, weight_decay=1e-3, flip=True, shift=1, ema=0.9, clip=2.0
    )
    _, rows = train(model, data, spec, masks=half_masks(model))
    found = evaluate(model, data, data.test)["shape"]
    figures = torch.tensor([r["loss"] for r in rows] + [found["loss"], found["accuracy"]], dtype=torch.float64)
    save_file({**state(model), "figures": figures}, f"{out}-{rank}")


# 203 = 5 * 34 + 33: uneven shares; 203 = 2 * 101 + 1: the last batch leaves all but one process without a sample.
@pytest.mark.parametrize(
    ("batch", "world"),
    [pytest.param(34, 2, marks=pytest.mark.slow), (34, 3), pytest.param(101, 2, marks=pytest.mark.slow)],
)
def test_processes_train_as_one_does_also_where_the_last_batch_leaves_some_empty(
    batch: int, world: int, tmp_path: Path
) -> None:
    def run(count: int) -> list[dict[str, Tensor]]:
        out = str(tmp_path / str(count))
        ranks.run(count, shared_training, out, batch)
        return [load_file(f"{out}-{r}") for r in range(count)]

    (one,), several = run(1), run(world)
    for found in several:
        assert same(found, several[0])  # bit for bit the same on every process
        for name, tensor in one.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def two_heads_training(out: str) -> None:
    rank = distributed.rank()
    torch.manual_seed(rank)
    model, data = TwoHeads().double(), in_double(shape_data(multitask=True))
    spec = TrainSpec(epochs=3, batch=101, lr=0.05, weights="uncertainty", ema=0.9)
    _, rows = train(model, data, spec)
    weights = torch.tensor([[r["weight shape"], r["weight matte"]] for r in rows], dtype=torch.float64)
    found = evaluate(model, data, data.test, batch=16)
    # Of one fixed network, to show what the number of processes does to figures, and nothing else.
    torch.manual_seed(7)
    fixed = evaluate(TwoHeads(), shape_data(multitask=True), data.test, batch=16)
    figures = [v for of in (found, fixed) for task in of.values() for v in task.values()]
    said = {"weights": weights, "figures": torch.tensor(figures, dtype=torch.float64)}
    save_file({**state(model), **said}, f"{out}-{rank}")


def test_processes_learn_the_same_weights_and_figures_are_equal_to_the_bit(tmp_path: Path) -> None:
    def run(count: int) -> list[dict[str, Tensor]]:
        ranks.run(count, two_heads_training, str(tmp_path / str(count)))
        return [load_file(f"{tmp_path / str(count)}-{r}") for r in range(count)]

    (one,), two = run(1), run(2)
    assert same(two[0], two[1])
    for name, tensor in one.items():
        torch.testing.assert_close(two[0][name], tensor, rtol=1e-9, atol=1e-11, msg=name)
    assert torch.equal(one["figures"][6:], two[0]["figures"][6:])


def test_bfloat16_trains_with_weights_in_float32() -> None:
    data, model = shape_data(train=64), small()
    plain = copy.deepcopy(model)
    train(model, data, TrainSpec(epochs=2, batch=32, lr=0.05, precision="bfloat16"))
    train(plain, data, TrainSpec(epochs=2, batch=32, lr=0.05))
    one, other = model.state_dict()["stem.weight"], plain.state_dict()["stem.weight"]
    assert one.dtype == torch.float32 and not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0.2, atol=0.03)


def test_what_cannot_go_on_is_told(tmp_path: Path) -> None:
    data, model = shape_data(train=64), small()
    with pytest.raises(CompressError, match="the loss is"):
        train(small(), data, TrainSpec(epochs=9, batch=32, lr=1e15))
    with pytest.raises(CompressError, match="does not have"):
        train(model, data, TrainSpec(epochs=1), masks={"nothing": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(CompressError, match="the mask of"):
        train(model, data, TrainSpec(epochs=1), masks={"stem.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(CompressError, match="3 are needed"):
        train(small(classes=4), data, TrainSpec(epochs=1))
    there = tmp_path / "c"
    train(small(), data, TrainSpec(epochs=1, batch=32), checkpoint=there)
    with pytest.raises(CompressError, match="other settings"):
        train(small(), data, TrainSpec(epochs=1, batch=16), checkpoint=there)
    there.write_bytes(there.read_bytes()[:-9])
    with pytest.raises(CompressError, match="cannot be read"):
        train(small(), data, TrainSpec(epochs=1, batch=32), checkpoint=there)
    whole = there.read_bytes()
    train(small(), data, TrainSpec(epochs=1, batch=32), checkpoint=tmp_path / "d")
    whole = (tmp_path / "d").read_bytes()
    for at in range(0, len(whole), len(whole) // 60):
        there.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(CompressError, match=r"cannot be read|was changed since it was written"):
            train(small(), data, TrainSpec(epochs=1, batch=32), checkpoint=there)
    torch.save({}, there)
    with pytest.raises(CompressError, match="cannot be read"):
        train(small(), data, TrainSpec(epochs=1, batch=32), checkpoint=there)


def test_the_loss_is_summed_over_samples_and_tasks() -> None:
    data = shape_data(multitask=True)
    torch.manual_seed(0)
    model = TwoHeads().eval()
    at = torch.arange(20)
    x, targets = data.prepare(data.train.inputs[at]), {n: t[at] for n, t in data.train.targets.items()}
    whole = loss_sum(model, x, targets, data.tasks)
    parts = [
        loss_sum(model, x[i : i + 1], {n: t[i : i + 1] for n, t in targets.items()}, data.tasks) for i in range(20)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum())
