"""The output metric against gradients taken another way: through a bias of zeros added to each sublayer's output."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.models.blocks import BlockRunner
from compress.models.decoder import blocks
from compress.models.families import family_for
from compress.recipes.tyr import sensitivity
from compress.recipes.tyr.sensitivity import RIDGE, output_metrics
from tests.tiny import tiny, tokens

LAYERS = 2
NAMES = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("attention", "ffn")]
kinds = pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2"])


def metrics_of(model: Any, ids: Tensor, seed: int, skip: int = 0) -> dict[str, Tensor]:
    """All sublayers' metrics by "<block>.<kind>"."""
    runner = BlockRunner(model, family_for(model.config), ids.shape[1])
    found: dict[str, Tensor] = {}

    def write(block: int, metrics: dict[str, Tensor], _: float) -> None:
        found.update({f"{block}.{kind}": metric for kind, metric in metrics.items()})

    with tempfile.TemporaryDirectory() as scratch:
        output_metrics(runner, ids, seed, Path(scratch), len(runner.blocks), write, skip)
    return found


def made(model_type: str) -> Any:
    return tiny(model_type, num_hidden_layers=LAYERS)


def jacobians(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (length, vocab) and, for every sublayer, their derivative (length, vocab, length, hidden) by what is
    added to its output."""
    family = family_for(model.config)
    zeros = {name: torch.zeros(ids.shape[1], 40, requires_grad=True) for name in NAMES}
    handles = []
    for i, block in enumerate(blocks(model)):
        for kind, layer in (("attention", family.o_proj(block)), ("ffn", family.down_proj(block))):
            zero = zeros[f"{i}.{kind}"]
            handles.append(layer.register_forward_hook(lambda _, __, out, zero=zero: out + zero))
    logits = model(ids, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    basis = torch.eye(logits.numel()).reshape(-1, *logits.shape)
    found = torch.autograd.grad(logits, list(zeros.values()), basis, is_grads_batched=True)
    shape = (*logits.shape, ids.shape[1], 40)
    return logits.detach(), {name: j.reshape(shape) for name, j in zip(NAMES, found, strict=True)}


def fisher(logits: Tensor, jacobian: Tensor, labels: list[int], skip: int = 0) -> Tensor:
    """sum over tokens of g g^T (hidden, hidden) float64; g from the derivative of the labels' log-likelihood."""
    by_logits = logits.double().softmax(-1)
    by_logits[range(len(labels)), labels] -= 1
    by_logits[:skip] = 0
    g = torch.einsum("tv,tvsh->sh", by_logits, jacobian.double())  # (length, hidden)
    return sum((torch.outer(row, row) for row in g), torch.zeros(40, 40, dtype=torch.float64))


def scaled(total: Tensor) -> Tensor:
    return (total / (total.trace() / 40) + RIDGE * torch.eye(40, dtype=torch.float64)).float()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The labels of every window, in the order they were drawn."""
    labels: list[list[int]] = []
    plain = torch.multinomial

    def watched(*arguments: Any, **named: Any) -> Tensor:
        found = plain(*arguments, **named)
        labels.append(found[:, 0].tolist())
        return found

    monkeypatch.setattr(torch, "multinomial", watched)
    yield labels


@kinds
def test_for_one_token_the_metric_is_the_outer_product_of_its_gradient(model_type: str) -> None:
    model = made(model_type)
    ids = tokens(1, 1, seed=4)
    logits, jacobian = jacobians(model, ids)
    found = metrics_of(model, ids, seed=0)
    assert sorted(found) == sorted(NAMES)

    def distance(label: int, name: str) -> float:
        return float((scaled(fisher(logits, jacobian[name], [label])) - found[name]).abs().max())

    # One label, whichever was drawn, explains all sublayers; for the first, no other does.
    far = [distance(label, NAMES[0]) for label in range(300)]
    label = min(range(300), key=far.__getitem__)
    assert sum(d < 1e-3 for d in far) == 1
    for name in NAMES:
        torch.testing.assert_close(found[name], scaled(fisher(logits, jacobian[name], [label])), rtol=1e-3, atol=1e-4)


@kinds
def test_for_several_tokens_and_windows_the_outer_products_add_up(model_type: str, drawn: list[list[int]]) -> None:
    model = made(model_type)
    ids = tokens(2, 4, seed=5)
    found = metrics_of(model, ids, seed=1)
    assert [len(labels) for labels in drawn] == [4, 4]
    totals: dict[str, Tensor] = {}
    for window, labels in zip(ids, drawn, strict=True):
        logits, jacobian = jacobians(model, window[None])
        for name in NAMES:
            totals[name] = totals.get(name, 0) + fisher(logits, jacobian[name], labels)
    for name in NAMES:
        torch.testing.assert_close(found[name], scaled(totals[name]), rtol=1e-3, atol=1e-3)


def test_a_position_whose_next_token_begins_every_text_has_no_label(drawn: list[list[int]]) -> None:
    model, ids = made("llama"), tokens(1, 5, seed=6)
    found = metrics_of(model, ids, seed=1, skip=2)
    logits, jacobian = jacobians(model, ids)
    for name in NAMES:
        want = scaled(fisher(logits, jacobian[name], drawn[0], skip=2))
        torch.testing.assert_close(found[name], want, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found[name], scaled(fisher(logits, jacobian[name], drawn[0])), rtol=1e-2, atol=1e-2)


def test_the_mean_diagonal_is_one_and_no_direction_is_without_weight() -> None:
    model = made("llama")
    for metric in metrics_of(model, tokens(1, 3), seed=0).values():
        assert metric.dtype == torch.float32 and metric.shape == (40, 40)
        assert torch.equal(metric, metric.T)
        assert float(metric.diagonal().mean()) == pytest.approx(1 + RIDGE, rel=1e-5)
        values = torch.linalg.eigvalsh(metric.double())
        assert float(values[0]) == pytest.approx(RIDGE, rel=0.05)  # three tokens reach three directions
        assert float(values[-4]) == pytest.approx(RIDGE, rel=0.05) and float(values[-3]) > 10 * RIDGE


def test_one_window_may_dwarf_the_first_by_any_measure() -> None:
    model = made("llama")
    runner = BlockRunner(model, family_for(model.config), 5)
    stream = runner.embed(tokens(2, 5))
    gradient = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))

    def metrics(*sizes: float) -> dict[str, Tensor]:
        return sensitivity._backward(
            runner, 0, stream.split(1), [g * size for g, size in zip(gradient.split(1), sizes, strict=True)]
        )[0]

    for kind, alone in metrics(0.0, 1.0).items():
        torch.testing.assert_close(metrics(1e-9, 1.0)[kind], alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(CompressError, match="the gradients hold NaN"):
        metrics(1.0, math.inf)


def test_labels_are_drawn_from_the_predictions_of_the_model(drawn: list[list[int]]) -> None:
    model = tiny("llama", num_hidden_layers=1, tie_word_embeddings=False)
    model.lm_head.weight.mul_(4)  # a few tokens likely, most of them not
    ids = tokens(1, 200)
    metrics_of(model, ids, seed=0)
    p = model(ids, use_cache=False).logits[0].double().softmax(-1)
    (labels,) = drawn
    hit = float(p[range(200), labels].mean())
    expected = float((p**2).sum(-1).mean())
    assert expected > 20 / 300  # a uniform draw would hit 1 / 300
    assert hit == pytest.approx(expected, rel=0.2)
    likeliest = p.argmax(-1).tolist()
    assert 0 < sum(a == b for a, b in zip(labels, likeliest, strict=True)) < 200


def test_the_same_seed_gives_the_same_metric_and_another_one_does_not() -> None:
    model = made("llama")
    ids = tokens(1, 6)
    torch.manual_seed(1)
    first = metrics_of(model, ids, seed=0)
    torch.manual_seed(2)
    again, other = metrics_of(model, ids, seed=0), metrics_of(model, ids, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in NAMES)
    assert not any(torch.equal(first[name], other[name]) for name in NAMES)


@kinds
def test_the_model_is_left_as_it_was(model_type: str) -> None:
    model = made(model_type)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = tokens(1, 5)
    with torch.no_grad():  # whatever the caller set
        logits = model(ids).logits
        metrics_of(model, ids, seed=0)
        assert not torch.is_grad_enabled() and torch.equal(model(ids).logits, logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_sublayer_without_any_gradient_gets_the_plain_metric() -> None:
    model = made("llama")
    model.lm_head.weight.zero_()  # tied: the embeddings too; every token is as likely as any other
    found = metrics_of(model, tokens(1, 3), seed=0)
    assert all(torch.equal(metric, torch.eye(40)) for metric in found.values())
