"""Candidates and streams against sliced blocks that are really run, in every kind of family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import CompressError
from compress.models.blocks import BlockRunner
from compress.models.families.base import BlockGeometry, Geometry
from compress.recipes.tyr import supernet
from compress.recipes.tyr.choice import Job
from compress.recipes.tyr.local import Moments, channels, damp, prune_heads, prune_neurons
from compress.recipes.tyr.supernet import (
    Level,
    Menu,
    Streams,
    Supernet,
    neuron_counts,
    predicted_bytes,
    write_block,
)
from tests.recipes.tyr.small import pruned_block, small_job

# Pre-norm; biases on q, k, v; biases everywhere; norms behind the sublayers.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gemma2": ("gemma2", {}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class World:
    """Two blocks of a tiny model, and both streams in front of the second, where they already differ."""

    def __init__(self, kind: str, accumulation: Any = "expectation") -> None:
        model_type, changes = KINDS[kind]
        self.job = small_job(model_type, num_hidden_layers=2, windows=(6, 1, 24), **changes)
        self.runner = BlockRunner(self.job.model, self.job.family, 24)
        self.menu = Menu((48, 24, 12, 0), ((2, 5), (2, 2), (1, 3), (0, 0)))
        with torch.no_grad():
            self.streams = Streams.start(self.runner, self.job.calibration, accumulation)
        first = Menu((24,), ((1, 5),))
        pruned_block(self.runner, self.job, 0, self.streams, first, accumulation=accumulation)

    def sublayer_outputs(self, levels: Sequence[Level], hidden: Tensor, ffn: bool) -> list[Tensor]:
        """What `o_proj` (or `down_proj`) of block 1 gives at each level, from sliced blocks that are run."""
        block = self.runner.blocks[1]
        outs = []
        for level in levels:
            units = torch.tensor(level.units, dtype=torch.int64)
            if ffn:
                made: Any = self.job.family.sliced(block, heads=None, neurons=units, down_weight=level.weight)
                outs.append(made.mlp(self.job.family.ffn_norm(block)(hidden)))
                continue
            made = self.job.family.sliced(block, heads=units, neurons=None, o_weight=level.weight)
            seen: list[Tensor] = []
            handle = made.self_attn.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0]))
            self.runner.run(1, hidden, made)
            handle.remove()
            outs.append(seen[0])
        return outs


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two windows a batch, so that every loop over batches runs more than once."""
    monkeypatch.setattr(supernet, "BATCH_TOKENS", 50)
    monkeypatch.setattr(supernet, "BATCHES", 1)
    with torch.no_grad():
        yield


def mean_of(outs: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = sum(share * out.double() for share, out in zip(shares, outs, strict=True))
    assert isinstance(total, Tensor)
    return (total / sum(shares)).float()


# --- counts and sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((64, 32, 8, 9, 8), (64, 56, 48, 40, 32, 24, 16, 8, 0)),
        ((64, 32, 8, 5, 8), (64, 48, 40, 32, 24, 16)),  # the dense one beside five around the centre
        ((64, 56, 8, 5, 8), (64, 56, 48, 40)),  # clipped above
        ((64, 8, 8, 5, 8), (64, 24, 16, 8, 0)),  # clipped below
        ((64, 32, 8, 4, 8), (64, 40, 32, 24, 16)),  # an even number leans down
        ((50, 25, 16, 5, 16), (50, 48, 32, 16, 0)),  # a dense width that is no multiple stays
    ],
)
def test_neuron_counts_by_hand(arguments: tuple[int, int, int, int, int], expected: tuple[int, ...]) -> None:
    assert neuron_counts(*arguments) == expected


def smollm2_block(seed: int) -> tuple[BlockGeometry, Menu, list[Level], list[Level]]:
    """Random levels at the size of a SmolLM2-135M block."""
    geometry = BlockGeometry(576, 9, 3, 64, 1536)
    menu = Menu(
        neuron_counts(1536, 768, 192, 9, 16),
        ((3, 3), (3, 2), (2, 3), (3, 1), (2, 2), (1, 3), (2, 1), (1, 2), (1, 1), (0, 0)),
    )
    g = torch.Generator().manual_seed(seed)

    def level(kept: int, of: int, width: int) -> Level:
        units = tuple(torch.randperm(of, generator=g)[:kept].sort().values.tolist())
        if kept == of:
            return Level(units, 0, 0.0, -123.456789012345, None)
        weight = torch.randn(576, kept * width, generator=g)
        return Level(units, (of - kept) * 1728, 1 - kept / of, -123.456789012345 * kept, weight)

    attention = [level(groups * each, 9, 64) for groups, each in menu.heads]
    return geometry, menu, attention, [level(n, 1536, 1) for n in menu.neurons]


def test_the_predicted_size_is_within_5_percent_of_the_file(tmp_path: Path) -> None:
    geometry, menu, attention, ffn = smollm2_block(0)
    write_block(tmp_path / "block.safetensors", attention, ffn, torch.bfloat16)
    size = (tmp_path / "block.safetensors").stat().st_size
    assert predicted_bytes(menu, geometry) == pytest.approx(size, rel=0.05)
    # Tighter where the weights do not drown the rest: indices and header within a fifth.
    weights = sum(level.weight.numel() * 2 for level in (*attention, *ffn) if level.weight is not None)
    assert predicted_bytes(menu, geometry) - weights == pytest.approx(size - weights, rel=0.2)


def test_a_supernet_takes_less_than_half_of_full_shape_storage(tmp_path: Path) -> None:
    _, _, attention, ffn = smollm2_block(1)
    write_block(tmp_path / "block.safetensors", attention, ffn, torch.bfloat16)
    full = 4 * sum(
        576 * columns
        for levels, columns in ((attention, 576), (ffn, 1536))
        for level in levels
        if level.weight is not None
    )
    assert (tmp_path / "block.safetensors").stat().st_size < full / 2


# --- written and read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    geometry, _, attention, ffn = smollm2_block(2)
    for name, a, f in (("0", attention, ffn), ("1", attention[3:], ffn[2:])):
        write_block(tmp_path / name, a, f, dtype)
    read = Supernet([tmp_path / "0", tmp_path / "1"], Geometry.alike(2, geometry, 49152, True))
    assert read.bytes == sum((tmp_path / name).stat().st_size for name in "01")
    for block, kind, levels in ((0, "attention", attention), (0, "ffn", ffn), (1, "attention", attention[3:])):
        assert len(read.facts[block][kind]) == len(levels)
        for e, level in enumerate(levels):
            again = read.level(block, kind, e)  # type: ignore[arg-type]
            assert (again.units, again.saving, again.sparsity, again.loss) == (
                level.units,
                level.saving,
                level.sparsity,
                level.loss,
            )
            assert read.facts[block][kind][e]["kept"] == len(level.units)
            if level.weight is None:
                assert again.weight is None
            else:
                assert again.weight is not None
                torch.testing.assert_close(again.weight, level.weight.to(dtype).float(), rtol=0, atol=0)


def test_another_file_is_no_supernet(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CompressError, match="not a supernet") as error:
        Supernet([tmp_path / "other"], smollm2_block(0)[0])
    assert error.value.where == str(tmp_path / "other")


def test_streams_survive_saving(tmp_path: Path) -> None:
    dense, pruned = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    Streams(dense, pruned).save(tmp_path / "two")
    again = Streams.load(tmp_path / "two", ids)
    assert torch.equal(again.dense, dense) and torch.equal(again.pruned, pruned) and not again.alone
    Streams(dense).save(tmp_path / "one")
    again = Streams.load(tmp_path / "one", ids)
    assert torch.equal(again.dense, dense) and again.pruned is again.dense and again.alone


def test_batches_cover_every_window_once() -> None:
    windows = torch.arange(7)[:, None].expand(7, 24)
    parts = [windows[s] for s in supernet.batches(windows)]
    assert [len(p) for p in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(parts), windows)
    assert [len(windows[s]) for s in supernet.batches(torch.zeros(3, 999))] == [1, 1, 1]  # longer than a batch


# Where no unit stays, slicing removes the sublayer with its bias; the pruned stream still adds that bias.
NOTHING_LEFT = (Menu((0,), ((2, 5),)), Menu((48,), ((0, 0),)))

# --- the streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "accumulation"),
    [
        *((kind, "expectation") for kind in KINDS),
        *((kind, "uniform") for kind in KINDS if kind != "llama with biases"),
        ("llama with biases", "uniform"),
    ],
)
def test_the_pruned_stream_is_the_mean_of_all_candidates_really_run(kind: str, accumulation: str) -> None:
    world = World(kind)
    family, block = world.job.family, world.runner.blocks[1]
    dense, pruned = world.streams.dense.clone(), world.streams.pruned.clone()
    assert not torch.allclose(dense, pruned, atol=1e-2)
    attention, ffn = pruned_block(world.runner, world.job, 1, world.streams, world.menu, accumulation=accumulation)
    costs = world.job.costs.blocks[0]

    def shares(kept: Sequence[int], dense: int) -> list[float]:
        return [1.0] * len(kept) if accumulation == "uniform" else [k / dense for k in kept]

    # The shares from the costs of what is kept, not from what the levels claim.
    sizes = [costs.attention(g, q) for g, q in world.menu.heads]
    outs = world.sublayer_outputs(attention, pruned, ffn=False)
    middle = pruned + family.after_attention(block, mean_of(outs, shares(sizes, costs.attention_dense)))
    sizes = [costs.ffn(n) for n in world.menu.neurons]
    outs = world.sublayer_outputs(ffn, middle, ffn=True)
    expected = middle + family.after_ffn(block, mean_of(outs, shares(sizes, costs.ffn(48))))
    torch.testing.assert_close(world.streams.pruned, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(world.streams.dense, world.runner.run(1, dense), rtol=1e-4, atol=1e-4)


@kinds
def test_around_a_solution_the_pruned_stream_is_the_solutions(kind: str) -> None:
    menu = Menu((48, 32, 16), ((2, 5), (1, 4), (1, 3)), ((1, 4), 16))
    around, alone = World(kind), World(kind)
    attention, ffn = pruned_block(around.runner, around.job, 1, around.streams, menu)
    assert len(attention) == len(ffn) == 3  # the others are made, on that stream, and have no part in it
    (chosen,), (width,) = pruned_block(alone.runner, alone.job, 1, alone.streams, Menu((16,), ((1, 4),)))
    assert chosen.units == attention[1].units and width.units == ffn[2].units
    torch.testing.assert_close(around.streams.pruned, alone.streams.pruned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "menu"),
    [
        *((kind, Menu((12,), ((1, 3),))) for kind in KINDS),
        *((kind, menu) for kind in KINDS for menu in NOTHING_LEFT if kind != "llama with biases"),
        *(("llama with biases", menu) for menu in NOTHING_LEFT),
    ],
)
def test_behind_a_single_level_the_pruned_stream_is_the_sliced_block(kind: str, menu: Menu) -> None:
    world = World(kind)
    pruned = world.streams.pruned.clone()
    (attention,), (ffn,) = pruned_block(world.runner, world.job, 1, world.streams, menu)
    sliced = world.job.family.sliced(
        world.runner.blocks[1],
        heads=torch.tensor(attention.units, dtype=torch.int64),
        neurons=torch.tensor(ffn.units, dtype=torch.int64),
        o_weight=attention.weight,
        down_weight=ffn.weight,
    )
    torch.testing.assert_close(world.streams.pruned, world.runner.run(1, pruned, sliced), rtol=1e-4, atol=1e-4)


@kinds
def test_without_accumulation_there_is_one_stream_and_it_is_the_dense_one(kind: str) -> None:
    world = World(kind, "none")
    pruned_block(world.runner, world.job, 1, world.streams, world.menu, accumulation="none")
    assert world.streams.pruned is world.streams.dense and world.streams.alone
    hidden = world.job.model.model(world.job.calibration, output_hidden_states=True).hidden_states
    torch.testing.assert_close(world.job.model.model.norm(world.streams.dense), hidden[-1], rtol=1e-4, atol=1e-4)


# --- the levels -----------------------------------------------------------------------------------------------


def explicit_levels(
    world: World, dense: Tensor, pruned: Tensor, *, target: str, token_weight: str, dense_attention: bool = False
) -> tuple[Any, Any]:
    """(heads, neuron levels) of block 1 from statistics gathered here, in one batch and float64."""
    family, block, runner = world.job.family, world.runner.blocks[1], world.runner
    g = world.job.geometry.blocks[0]
    o, down = family.o_proj(block), family.down_proj(block)

    def solve(inputs: Tensor, layer: Any, dense_out: Tensor, behind: Tensor, stream: Tensor) -> Any:
        bias = torch.zeros(()) if layer.bias is None else layer.bias
        aim = {
            "own": inputs @ layer.weight.T,
            "output": dense_out - bias,
            "residual": dense_out - bias if family.post_norm else behind - stream - bias,
        }[target].double()
        x = inputs.double()
        if token_weight == "norm":
            size = (dense_out if family.post_norm else behind).double().pow(2).mean(-1, keepdim=True).sqrt()
            x, aim = x / size, aim / size
        moments = Moments(inputs.shape[-1], g.hidden)
        moments.add(x, aim)
        return damp(moments, layer.weight.T, 0.01)

    attention_out = o(runner.context(1, dense))
    dense_middle = dense + family.after_attention(block, attention_out)
    problem = solve(runner.context(1, pruned), o, attention_out, dense_middle, pruned)
    heads = prune_heads(problem, g.heads, g.kv_heads, g.head_dim, trim=True)
    heads = [h for h in heads if (h.groups, h.per_group) in world.menu.heads]
    weights = [problem.refit(channels(h.heads, g.head_dim)).T.float() for h in heads]
    levels = [
        Level(h.heads, 0, 0.0, 0.0, None if len(h.heads) == g.heads else w) for h, w in zip(heads, weights, strict=True)
    ]
    kept = [world.job.costs.blocks[0].attention(h.groups, h.per_group) for h in heads]
    mean = mean_of(world.sublayer_outputs(levels, pruned, ffn=False), kept)
    middle = pruned + family.after_attention(block, attention_out if dense_attention else mean)
    ffn_out = down(runner.activation(1, dense_middle))
    behind = dense_middle + family.after_ffn(block, ffn_out)
    problem = solve(runner.activation(1, middle), down, ffn_out, behind, middle)
    return levels, prune_neurons(problem, world.menu.neurons, 4)


@kinds
@pytest.mark.parametrize(
    ("target", "token_weight"), [("residual", "norm"), ("residual", "none"), ("output", "none"), ("own", "norm")]
)
def test_levels_are_fitted_to_the_target_on_inputs_from_the_pruned_attention(
    kind: str, target: str, token_weight: str
) -> None:
    world = World(kind)
    dense, pruned = world.streams.dense.clone(), world.streams.pruned.clone()
    attention, ffn = pruned_block(
        world.runner, world.job, 1, world.streams, world.menu, target=target, token_weight=token_weight
    )
    heads, neurons = explicit_levels(world, dense, pruned, target=target, token_weight=token_weight)
    assert [a.units for a in attention] == [h.units for h in heads]
    for made, wanted in zip(attention[1:], heads[1:], strict=True):
        torch.testing.assert_close(made.weight, wanted.weight, rtol=1e-3, atol=1e-3)
    assert attention[0].weight is None and ffn[0].weight is None
    for level in ffn:
        keep, refitted = neurons[len(level.units)]
        assert level.units == tuple(keep.tolist())
        if level.weight is not None:
            torch.testing.assert_close(level.weight, refitted.T.float(), rtol=1e-3, atol=1e-3)
    # With the dense attention in front they would be others.
    _, wrong = explicit_levels(world, dense, pruned, target=target, token_weight=token_weight, dense_attention=True)
    assert not torch.allclose(ffn[1].weight, wrong[24][1].T.float(), rtol=1e-2, atol=1e-2)


def test_inputs_made_again_are_those_that_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for room in (supernet.KEEP_BYTES, 0):
        monkeypatch.setattr(supernet, "KEEP_BYTES", room)
        world = World("llama")
        calls: list[int] = []
        plain = world.runner.activation

        def counted(index: int, middle: Tensor, plain: Any = plain, calls: list[int] = calls) -> Tensor:
            calls.append(index)
            made: Tensor = plain(index, middle)
            return made

        monkeypatch.setattr(world.runner, "activation", counted)
        attention, ffn = pruned_block(world.runner, world.job, 1, world.streams, world.menu)
        found.append((attention, ffn, world.streams, len(calls)))
    (a, f, streams, few), (b, g, again, many) = found
    assert torch.equal(streams.pruned, again.pruned) and torch.equal(streams.dense, again.dense)
    for one, other in zip((*a, *f), (*b, *g), strict=True):
        assert one.units == other.units
        assert one.weight is other.weight is None or torch.equal(one.weight, other.weight)
    assert many == few * 3 // 2  # the pruned stream's once more


def test_savings_and_sparsities_are_the_costs_of_what_is_kept() -> None:
    world = World("llama with biases")
    attention, ffn = pruned_block(world.runner, world.job, 1, world.streams, world.menu)
    costs = world.job.costs.blocks[0]
    for levels, kept, whole in (
        (attention, [costs.attention(*h) for h in world.menu.heads], costs.attention_dense),
        (ffn, [costs.ffn(n) for n in world.menu.neurons], costs.ffn(48)),
    ):
        assert [level.saving for level in levels] == [whole - k for k in kept]
        assert [level.sparsity for level in levels] == pytest.approx([1 - k / whole for k in kept])
        assert [len(level.units) for level in levels][-1] == 0


def test_a_metric_decides_which_units_stay_and_each_sublayer_has_its_own() -> None:
    def kept(metrics: tuple[Tensor | None, Tensor | None]) -> tuple[Any, Any]:
        world = World("llama")
        attention, ffn = pruned_block(world.runner, world.job, 1, world.streams, world.menu, metrics=metrics)
        return [a.units for a in attention], [f.units for f in ffn]

    metric = torch.diag(torch.logspace(-4, 4, 40))
    plain, both = kept((None, None)), kept((metric, metric))
    assert plain[0] != both[0] and plain[1] != both[1]
    assert kept((metric, None))[0] == both[0]
    alone = kept((None, metric))
    assert alone[0] == plain[0] and alone[1] != plain[1]


def test_a_sublayer_that_stays_whole_is_left_alone() -> None:
    world = World("qwen2")
    pruned = world.streams.pruned.clone()
    attention, ffn = pruned_block(world.runner, world.job, 1, world.streams, Menu((48,), ((2, 5),)))
    assert attention == [Level(tuple(range(10)), 0, 0.0, 0.0, None)]
    assert ffn == [Level(tuple(range(48)), 0, 0.0, 0.0, None)]
    torch.testing.assert_close(world.streams.pruned, world.runner.run(1, pruned), rtol=1e-4, atol=1e-4)


def test_broken_activations_are_refused_with_the_sublayer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, where in (("context", "block 1, o_proj"), ("activation", "block 1, down_proj")):
        world = World("llama")
        plain = getattr(world.runner, name)
        monkeypatch.setattr(world.runner, name, lambda i, h, plain=plain: plain(i, h) * float("nan"))
        with pytest.raises(CompressError, match="NaN") as error:
            pruned_block(world.runner, world.job, 1, world.streams, world.menu)
        assert error.value.where == where


def test_the_model_is_read_and_never_changed() -> None:
    job: Job = small_job(num_hidden_layers=2, windows=(2, 1, 24))
    before = {k: v.clone() for k, v in job.model.state_dict().items()}
    runner = BlockRunner(job.model, job.family, 24)
    streams = Streams.start(runner, job.calibration, "expectation")
    for index in range(2):
        pruned_block(runner, job, index, streams, Menu((48, 24), ((2, 5), (1, 5))))
    assert all(torch.equal(v, before[k]) for k, v in job.model.state_dict().items())
