"""Networks that cannot be pruned are told before any training, and a fault of their own code is told as theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as masks

from compress.errors import CompressError, UsageError
from compress.models.plain import refuse_odd
from compress.networks.forward import (
    answer,
    check_branches,
    check_steady,
    check_trainable,
    depends_on_values,
)
from tests.command import compress, one_error
from tests.networks import write_class_folders

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.body(x)).mean((2, 3)))

    def out(self, y: Tensor) -> Tensor:
        return self.head(y)  # type: ignore[no-any-return]


def masked() -> nn.Module:
    net = Net()
    masks.l1_unstructured(net.body, "weight", 0.5)
    return net


def filled(value: float) -> nn.Module:
    net = Net()
    with torch.no_grad():
        net.head.bias[1] = value
    return net


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "what", "fix"),
    [
        (masked, r"body.weight is computed at every call \(L1Unstructured\)", "prune.remove"),
        (lambda: torch.jit.trace(Net(), X), "the network is TorchScript", "plain module"),
        (lambda: nn.DataParallel(Net()), "the network is in DataParallel", ".module"),
        (lambda: nn.Sequential(torch.compile(Net(), backend="eager")), "0 is compiled", "torch.compile"),
        (quantised, r"head is quantised \(Linear\)", "float32"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "the weight 0.weight has no shape yet", "call the network once"),
        (lambda: Net().to("meta"), "the weight body.weight is on the meta device", "CPU"),
        (lambda: Net().half(), "the weight body.weight is float16", "float32"),
        (lambda: filled(float("nan")), "the weight head.bias holds NaN or infinity", "finite"),
        (lambda: filled(float("-inf")), "the weight head.bias holds NaN or infinity", "finite"),
        (nn.Identity, "the network has no weights", "layers"),
    ],
)  # fmt: skip
def test_what_is_no_plain_module_of_weights_is_named(make: Callable[[], nn.Module], what: str, fix: str) -> None:
    with pytest.raises(UsageError, match=what) as e:
        refuse_odd(make(), "net.py:f")
    assert e.value.where == "net.py:f" and fix in e.value.fix


def test_a_plain_network_passes_every_question() -> None:
    net = Net()
    refuse_odd(net, "net.py:f")
    with torch.device("meta"):  # how shapes are asked for
        refuse_odd(Net(), "net.py:f")
    check_steady(net, X)
    check_trainable(net, X)
    check_branches(net, X)
    assert not depends_on_values(net, X) and net.training and all(p.grad is None for p in net.parameters())


class Raises(Net):
    def out(self, y: Tensor) -> Tensor:
        raise KeyError("mine\nand more")


class RaisesInTraining(Net):
    def out(self, y: Tensor) -> Tensor:
        if self.training:
            raise ValueError("only in training")
        return super().out(y)


@pytest.mark.parametrize(("ask", "kind"), [(answer, Raises), (check_trainable, RaisesInTraining)])
def test_a_fault_of_its_own_code_is_told_with_its_line(ask: Callable[..., object], kind: type[Net]) -> None:
    with pytest.raises(CompressError, match=r"cannot be run: (KeyError: 'mine|ValueError: only in training)") as e:
        ask(kind(), X)
    assert e.value.where.startswith(f"{__file__}, line ")
    with pytest.raises(CompressError, match="does not take the data") as e:
        answer(Net(), X[:, :2])
    assert e.value.where.startswith("input (2, 2, 8, 8), ")


class Asks(Net):
    def out(self, y: Tensor) -> Tensor:
        return super().out(y) if y.mean() > 0 else -super().out(y)


def test_a_forward_that_asks_for_a_number_is_known() -> None:
    assert depends_on_values(Asks(), X) and not depends_on_values(nn.Sequential(Net(), nn.BatchNorm1d(3)), X)


class Counts(Net):
    calls = 0

    def out(self, y: Tensor) -> Tensor:
        self.calls += 1
        return super().out(y) * self.calls


class Draws(Net):
    def out(self, y: Tensor) -> Tensor:
        return super().out(y + torch.randn_like(y))


@pytest.mark.parametrize("kind", [Counts, Draws])
def test_another_answer_the_second_time_is_refused(kind: type[Net]) -> None:
    with pytest.raises(CompressError, match="another answer to the same samples the second time"):
        check_steady(kind(), X)
    check_steady(nn.Sequential(Net(), nn.Dropout(0.5)), X)  # random in training alone
    check_steady(nn.Sequential(Net(), nn.Threshold(9, float("nan"))), X)  # another fault, told elsewhere


class NoGradient(Net):
    def out(self, y: Tensor) -> Tensor:
        return super().out(y).detach()


@pytest.mark.parametrize("net", [NoGradient(), Net().requires_grad_(False)])
def test_what_leads_back_to_no_weight_cannot_be_trained(net: nn.Module) -> None:
    with pytest.raises(CompressError, match="nothing of the network can be trained"):
        check_trainable(net, X)


ITEM = """\
import torch
from compress.models.zoo.resnet32 import resnet

class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = resnet(8, 3, 4)

    def forward(self, x):
        return self.inner(x) * float(x.abs().max().item())
"""
RECIPE = """\
method: {method}
task: network
description: small
{more}
data: {{folder: {folder}/data, size: 8}}
train: {{epochs: 1, batch: 16}}
finetune: {{epochs: 1, batch: 16}}
export: {{samples: 4}}
bench: null
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("global-mp", "sparsity: 0.8"),
        ("pagcp", "pagcp: {flops: 0.1, rounds: 1, between: 0, round_to: 1, batch: 16}"),
    ],
)
def test_what_cannot_be_traced_is_told_with_its_line_before_training(method: str, more: str, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "data", 40, 20, 8)
    (tmp_path / "net.py").write_text(ITEM)
    (tmp_path / "r.yaml").write_text(RECIPE.format(method=method, more=more, folder=tmp_path))
    ran = compress("prune", f"{tmp_path / 'net.py'}:Scaled", "-r", tmp_path / "r.yaml", "--out", tmp_path / "run")
    one_error(
        ran, 1, "depends on values that are known only when it runs", ".item()", f"{tmp_path / 'net.py'}, line 10"
    )
    assert not (tmp_path / "run").exists()
