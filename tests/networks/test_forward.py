"""What cannot be pruned as it is called is known before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models.zoo import NETWORKS, build
from compress.networks.forward import check_branches, check_training_alone
from tests.command import compress, one_error
from tests.compress.test_channels import RECIPE as CHANNELS
from tests.compress.test_network import RECIPE as WEIGHTS
from tests.networks import write_class_folders

pytestmark = pytest.mark.processes

MINE = """\
import torch
from torch import nn
import torch.nn.functional as F

class Normed(nn.Module):
    def __init__(self, classes, norm):
        super().__init__()
        self.a, self.b = norm(nn.Conv2d(3, 16, 3, 1, 1)), nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, classes)
    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))

def old(classes=3): return Normed(classes, nn.utils.weight_norm)
def new(classes=3): return Normed(classes, nn.utils.parametrizations.weight_norm)
def spectral(classes=3): return Normed(classes, nn.utils.parametrizations.spectral_norm)
def older(classes=3): return Normed(classes, nn.utils.spectral_norm)

class Aux(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.aux, self.head = nn.Linear(16, classes), nn.Linear(16, classes)
    def forward(self, x):
        a = F.relu(self.a(x))
        out = {"class": self.head(F.relu(self.b(a)).mean((2, 3)))}
        if self.training:
            out["aux"] = self.aux(a.mean((2, 3)))
        return out

class Early(Aux):
    def forward(self, x):
        y = F.relu(self.a(x))
        if x.mean() > 0.1:
            y = F.relu(self.b(y))
        return self.head(y.mean((2, 3)))

def aux(classes=3): return Aux(classes)
def early(classes=3): return Early(classes)
def fails(classes=3): raise KeyError("nothing")
def leaves(classes=3): raise SystemExit(7)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forward")
    write_class_folders(folder / "data", 24, 16)
    (folder / "net.py").write_text(MINE)
    (folder / "channels.yaml").write_text(CHANNELS.replace("FOLDER", str(folder)))
    (folder / "weights.yaml").write_text(WEIGHTS.replace("FOLDER", str(folder)))
    return folder


@pytest.mark.parametrize("recipe", ["channels", "weights"])
@pytest.mark.parametrize(
    ("network", "parts"),
    [
        ("old", ("a.weight is computed at every call (WeightNorm)", "remove_weight_norm(a)")),
        ("new", ("a.weight is computed at every call (WeightNorm)", "remove_parametrizations(a, 'weight')")),
        ("spectral", ("a.weight is computed at every call (SpectralNorm)", "remove_parametrizations(a, 'weight')")),
        ("older", ("a.weight is computed at every call (SpectralNorm)", "remove_spectral_norm(a)")),
        ("fails", ("KeyError: 'nothing'", "net.py:fails")),
        ("leaves", ("it exits (7)", "net.py:leaves")),
    ],
)
def test_computed_weights_are_known_in_plan_and_before_training(
    recipe: str, network: str, parts: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    words = (f"{place}/net.py:{network}", "--recipe", place / f"{recipe}.yaml")
    one_error(compress("plan", *words), 2, *parts)
    one_error(compress("prune", *words, "--out", tmp_path / "run"), 2, *parts)


def test_branches_and_heads_for_training_alone_are_known_before_training(place: Path, tmp_path: Path) -> None:
    for network, recipe, part in (
        ("aux", "channels", "the layer aux is run in training alone"),
        ("early", "channels", "the layer b is run for some inputs and not for others"),
        ("early", "weights", "the layer b is run for some inputs and not for others"),
    ):
        words = (f"{place}/net.py:{network}", "--recipe", place / f"{recipe}.yaml")
        if recipe == "channels":
            one_error(compress("plan", *words), 1, part)
        one_error(compress("prune", *words, "--out", tmp_path / "run"), 1, part)
        assert not (tmp_path / "run" / "dense").exists()


OF_OTHERS = ("timm", "transformers-image")  # what they are, their arguments say


@pytest.mark.parametrize("name", [n for n in sorted(NETWORKS) if n not in ("fastgrnn", *OF_OTHERS)])
def test_the_zoos_own_networks_pass(name: str) -> None:
    model = build(name, {"labels": {"class": 3}} if name.startswith("multitask") else {}, 0)
    x = torch.randn(2, 3, 64, 64)
    check_branches(model, x)
    check_training_alone(model, x)


class Dropped(nn.Module):
    """Layers that training leaves out at random are there in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.training else self.b(self.a(x))


def test_layers_left_out_in_training_are_no_fault_and_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), Dropped())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_branches(model, torch.randn(2, 4))
    check_training_alone(model, torch.randn(2, 4))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(CompressError, match="some inputs"):
        check_branches(_Branch(), torch.rand(2, 4) + 1)


class _Particular(nn.Module):
    """Takes values from 0 to 1 and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert float(x.min()) >= 0 and float(x.max()) <= 1
        return self.a(x)


def test_made_up_inputs_that_a_network_refuses_say_nothing() -> None:
    check_branches(_Particular(), torch.rand(2, 4))


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if bool(x.sum() > 0) else self.b(x)
