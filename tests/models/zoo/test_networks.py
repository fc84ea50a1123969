"""The zoo's networks: parameter counts of the papers, shapes, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.errors import CompressError, UsageError
from compress.models.zoo import build, load_weights


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The count that the paper prints, in millions, and how it rounds; the exact counts follow from the papers' tables.
PUBLISHED = {
    "ResNet-20": ("resnet", {"depth": 20}, 0.27, 2),
    "ResNet-32": ("resnet", {"depth": 32}, 0.46, 2),
    "ResNet-56": ("resnet", {"depth": 56}, 0.85, 2),
    "ResNet-110": ("resnet", {"depth": 110}, 1.7, 1),
    "WRN-28-8": ("wrn", {"depth": 28, "widen": 8}, 23.4, 1),
    "WRN-22-8": ("wrn", {"depth": 22, "widen": 8}, 17.2, 1),
    "WRN-28-10": ("wrn", {"depth": 28, "widen": 10}, 36.5, 1),
    "MobileNet-V1": ("mobilenet-v1", {}, 4.2, 1),
    "MobileNet-V1 x 0.5": ("mobilenet-v1", {"width": 0.5}, 1.3, 1),
    "MobileNet-V2": ("mobilenet-v2", {}, 3.5, 1),
    "ResNet-50": ("resnet50", {}, 25.6, 1),
}


@pytest.mark.parametrize("title", PUBLISHED)
def test_a_network_has_the_published_number_of_parameters(title: str) -> None:
    name, arguments, millions, digits = PUBLISHED[title]
    with torch.device("meta"):
        model = build(name, arguments)
    assert round(parameters(model) / 1e6, digits) == millions


def test_mobilenet_v2_has_the_exact_count_of_its_table() -> None:
    # Table 2 of the paper, by hand: every convolution, two parameters a norm channel, the classifier with its bias.
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    total, inside = 3 * 32 * 9 + 2 * 32, 32
    for expansion, outside, blocks in stages:
        for _ in range(blocks):
            middle = inside * expansion
            total += (inside * middle + 2 * middle) * (expansion > 1) + 9 * middle + 2 * middle
            total += middle * outside + 2 * outside
            inside = outside
    total += 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert parameters(build("mobilenet-v2", {})) == total


def test_fastgrnn_at_the_papers_ranks_counts_factors_biases_and_gates() -> None:
    for r_W, r_U in ((9, 80), (9, 8), (8, 7)):
        model = build("fastgrnn", {"channels": 9, "hidden": 80, "classes": 2, "r_W": r_W, "r_U": r_U})
        assert parameters(model) == (9 + 80) * r_W + 160 * r_U + 2 * 80 + 2 + 80 * 2 + 2
        assert model.ranks == (r_W, r_U)


@torch.no_grad()
def test_fastgrnn_steps_as_the_papers_equations() -> None:
    model = build("fastgrnn", {"channels": 3, "hidden": 5, "classes": 2, "r_W": 2, "r_U": 4}, seed=1).double()
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    W = model.W.left.weight @ model.W.right.weight  # (5, 3)
    U = model.U.left.weight @ model.U.right.weight  # (5, 5)
    zeta, nu = 1 / (1 + torch.exp(-model.zeta)), 1 / (1 + torch.exp(-model.nu))
    h = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(7):
        s = x[:, :, t] @ W.T + h @ U.T
        z = 1 / (1 + torch.exp(-s - model.b_z))
        h = (zeta * (1 - z) + nu) * torch.tanh(s + model.b_h) + z * h
    torch.testing.assert_close(model(x), h @ model.classifier.weight.T + model.classifier.bias)


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("resnet", {"depth": 8, "classes": 7}, (3, 32, 32)),
        ("resnet", {"depth": 8, "classes": 7, "shortcut": "conv", "channels": 1}, (1, 24, 24)),
        ("wrn", {"depth": 10, "widen": 1, "classes": 7}, (3, 32, 32)),
        ("mobilenet-v1", {"width": 0.25, "classes": 7, "stem": "cifar"}, (3, 32, 32)),
        ("mobilenet-v2", {"width": 0.25, "classes": 7, "stem": "cifar"}, (3, 32, 32)),
        ("mobilenet-v2", {"width": 0.25, "classes": 7}, (3, 64, 64)),
    ],
)
def test_a_network_gives_logits_and_every_parameter_gets_a_gradient(
    name: str, arguments: dict[str, object], shape: tuple[int, ...]
) -> None:
    model = build(name, arguments)
    out = model(torch.randn(4, *shape))
    assert out.shape == (4, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (build("resnet", {"depth": 8}, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["stem.weight"], other["stem.weight"])


def test_any_module_by_file_and_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\n\ndef small(classes=3):\n    return nn.Linear(4, classes)\n\nn = 3\n")
    assert build(f"{file}:small", {"classes": 5}).out_features == 5
    for spec, part in ((f"{file}:nothing", "no function"), (f"{file}:n", "no function"), ("no.py:f", "no such file")):
        with pytest.raises(UsageError, match=part):
            build(spec, {})
    with pytest.raises(UsageError, match="cannot be called"):
        build(f"{file}:small", {"depth": 5})
    file.write_text("raise OSError('disk')")
    with pytest.raises(UsageError, match="OSError: disk"):
        build(f"{file}:small", {})


def test_a_wrong_network_or_argument_is_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match="unknown network") as caught:
        build("alexnet", {})
    assert "mobilenet-v2" in caught.value.fix
    with pytest.raises(UsageError, match="6n"):
        build("resnet", {"depth": 33})
    with pytest.raises(UsageError, match="layers"):
        build("resnet", {"layers": 33})


def test_weights_that_do_not_fit_are_refused_and_a_pickle_is_never_opened(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = build("resnet", {"depth": 8})
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(part: str, path: Path) -> None:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CompressError, match=part):
            load_weights(model, path)
        assert part == "NaN" or all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Bomb()}, tmp_path / "zip.pt")
    torch.save({"a": Bomb()}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    refused("pickle", tmp_path / "zip.pt")
    refused("pickle", tmp_path / "old.safetensors")
    assert not (tmp_path / "ran").exists()
    save_file({k: v for k, v in state.items() if k != "stem.weight"}, tmp_path / "a")
    refused("1 missing", tmp_path / "a")
    save_file({**state, "stem.weight": torch.zeros(1)}, tmp_path / "b")
    refused("in the network", tmp_path / "b")
    save_file({**state, "stem.weight": torch.full_like(state["stem.weight"], torch.nan)}, tmp_path / "c")
    refused("NaN", tmp_path / "c")
    (tmp_path / "d").write_bytes(b"not weights")
    refused("cannot be read", tmp_path / "d")
    save_file(state, tmp_path / "e")
    other = build("resnet", {"depth": 8}, seed=9)
    load_weights(other, tmp_path / "e")
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_weights_whose_header_begins_like_a_pickle_are_read(tmp_path: Path) -> None:
    """The first byte of a safetensors file is its header's length: of one in 32 files it is that of a pickle."""
    model = build("resnet", {"depth": 8, "width": 4, "classes": 3})
    path = tmp_path / "w.safetensors"
    for more in range(0, 256, 8):
        save_file(model.state_dict(), path, {"note": "x" * more})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    load_weights(build("resnet", {"depth": 8, "width": 4, "classes": 3}, seed=1), path)
