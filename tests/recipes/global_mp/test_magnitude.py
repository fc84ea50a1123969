"""The global threshold against a plain sort, on one process and on several, from memory and from files."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import CompressError
from compress.recipes.global_mp import magnitude
from compress.recipes.global_mp.magnitude import find_cuts, global_masks, safetensors_source

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def by_sorting(weights: Mapping[str, Tensor], prune: int, floors: Mapping[str, int]) -> dict[str, Tensor]:
    """The rule as it is stated, in float64: sort all unprotected weights, take the first ``prune``."""
    rows = []
    for name, weight in weights.items():
        sizes = weight.reshape(-1).double().abs().tolist()
        order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
        rows += [(sizes[i], name, i) for i in order[: len(order) - min(floors.get(name, 0), len(order))]]
    masks = {name: torch.ones(weight.numel(), dtype=torch.bool) for name, weight in weights.items()}
    for _, name, i in sorted(rows)[:prune]:
        masks[name][i] = False
    return {name: mask.view(weights[name].shape) for name, mask in masks.items()}


def assert_same(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name in want:
        assert found[name].dtype == torch.bool and torch.equal(found[name], want[name]), name


def random_case(seed: int) -> tuple[dict[str, Tensor], int, dict[str, int]]:
    """Layers of mixed types with ties, zeros of both signs, denormals, and floors; and a feasible target."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    weights = {}
    for _ in range(draw.randint(1, 5)):
        shape = draw.choice([(), (1,), (3, 5), (30,), (2, 3, 4, 4)])
        w = torch.randn(shape, generator=generator) * draw.choice([1.0, 1e-3, 3e-6, 1e-40])
        if draw.random() < 0.5:
            w = (w * 3).round() / 3
        if draw.random() < 0.2:
            w = w * 0  # -0.0 and 0.0
        weights[f"l{draw.randint(0, 99)}"] = w.to(draw.choice(DTYPES))
    floors = {name: draw.randint(0, w.numel()) for name, w in weights.items() if draw.random() < 0.4}
    free = sum(w.numel() - floors.get(name, 0) for name, w in weights.items())
    return weights, draw.randint(0, free), floors


def test_thousands_of_random_cases_are_as_sorted() -> None:
    for seed in range(3000):
        weights, prune, floors = random_case(seed)
        found = global_masks(weights, prune, floors)
        assert_same(found, by_sorting(weights, prune, floors))
        assert sum(int((~mask).sum()) for mask in found.values()) == prune


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_finite_floats_are_as_sorted(data: st.DataObject) -> None:
    floats = {
        torch.float32: st.floats(width=32, allow_nan=False, allow_infinity=False),
        torch.float16: st.floats(width=16, allow_nan=False, allow_infinity=False),
    }
    weights = {}
    for name in data.draw(st.sets(st.text("abc.", min_size=1, max_size=4), min_size=1, max_size=4)):
        dtype = data.draw(st.sampled_from(list(floats)))
        values = data.draw(st.lists(floats[dtype], min_size=1, max_size=12))
        weights[name] = torch.tensor(values, dtype=dtype)
    floors = {name: data.draw(st.integers(0, 14)) for name in weights}
    free = sum(w.numel() - min(floors[name], w.numel()) for name, w in weights.items())
    prune = data.draw(st.integers(0, free))
    assert_same(global_masks(weights, prune, floors), by_sorting(weights, prune, floors))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_pattern_of_a_16_bit_type_is_put_in_order(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        patterns = torch.randint(-(2**31), 2**31, (60_000,), generator=torch.Generator().manual_seed(0)).int()
    else:
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    weight = patterns.view(dtype)
    weight = weight[weight.float().isfinite()]
    for prune in (1, len(weight) // 3, len(weight) - 1):
        assert_same(global_masks({"w": weight}, prune), by_sorting({"w": weight}, prune, {}))


def test_more_than_one_chunk_and_a_tie_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitude, "CHUNK", 7)
    for seed in range(300):
        weights, prune, floors = random_case(seed)
        assert_same(global_masks(weights, prune, floors), by_sorting(weights, prune, floors))


def test_equal_weights_go_by_name_and_then_by_place() -> None:
    weights = {"b": torch.tensor([1.0, -1.0, 2.0]), "a": torch.tensor([3.0, -1.0, 1.0])}
    masks = global_masks(weights, 3)
    assert masks["a"].tolist() == [True, False, False]
    assert masks["b"].tolist() == [False, True, True]


def test_a_floor_gives_back_exactly_what_it_takes() -> None:
    weights = {"small": torch.full((10,), 0.01), "large": torch.arange(1.0, 91.0)}
    plain, floored = global_masks(weights, 50), global_masks(weights, 50, {"small": 4})
    assert int(plain["small"].sum()) == 0 and int(plain["large"].sum()) == 50  # the layer has collapsed
    assert int(floored["small"].sum()) == 4 and int(floored["large"].sum()) == 46
    assert floored["large"].tolist() == [w > 44 for w in range(1, 91)]


def test_nothing_pruned_is_all_kept() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    assert all(bool(mask.all()) for mask in global_masks(weights, 0).values())
    assert not any(bool(mask.any()) for mask in global_masks(weights, 7).values())


def test_the_mask_has_the_layers_shape_whatever_its_strides() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(6, 4, 3, 3, generator=generator)
    for other in (plain.to(memory_format=torch.channels_last), plain.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_same(global_masks({"w": other}, 100), global_masks({"w": plain}, 100))


def test_tied_weights_count_once_and_share_a_mask() -> None:
    shared = torch.tensor([0.1, 5.0, 0.2, 6.0])
    weights = {"head": shared, "other": torch.tensor([0.15, 7.0]), "embed": shared}
    masks = global_masks(weights, 2)
    assert masks["head"] is masks["embed"]
    assert masks["embed"].tolist() == [False, True, True, True] and masks["other"].tolist() == [False, True]
    # The larger of the two names' floors holds.
    assert global_masks(weights, 1, {"head": 4, "embed": 1})["embed"].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_names_its_layer(bad: float, dtype: torch.dtype) -> None:
    weights = {"fine": torch.ones(4), "broken.weight": torch.tensor([1.0, bad, bad], dtype=dtype)}
    with pytest.raises(CompressError, match=r"broken\.weight holds 2 NaN or infinite values"):
        global_masks(weights, 1)


def test_what_cannot_be_pruned_is_refused() -> None:
    for nothing in ({}, {"empty": torch.zeros(0, 3)}):
        with pytest.raises(CompressError, match="no prunable weight"):
            global_masks(nothing, 0)
    for dtype in (torch.float64, torch.int8, torch.complex64):
        with pytest.raises(CompressError, match="the weight w is not of a type"):
            global_masks({"w": torch.ones(3).to(dtype)}, 1)
    with pytest.raises(CompressError, match="4 cannot be pruned"):
        global_masks({"w": torch.ones(3)}, 4)
    with pytest.raises(CompressError, match="hold 2 of 3 weights"):
        global_masks({"w": torch.ones(3)}, 2, {"w": 2})
    with pytest.raises(ValueError, match="-1"):
        global_masks({"w": torch.ones(3)}, -1)


def test_a_gradient_is_no_hindrance() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
    assert global_masks({"w": weight}, 1)["w"].tolist() == [True, False]


def test_shards_on_disk_give_the_cuts_of_memory(tmp_path: Path) -> None:
    weights, prune, floors = random_case(11)
    names = sorted(weights)
    save_file({n: weights[n].contiguous() for n in names[::2]} | {"norm": torch.ones(3)}, tmp_path / "1.safetensors")
    save_file({n: weights[n].contiguous() for n in names[1::2]}, tmp_path / "2.safetensors")
    source = safetensors_source([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], names)
    cuts = find_cuts(source, prune, floors)
    assert_same({n: cuts[n].mask(weights[n]) for n in names}, by_sorting(weights, prune, floors))
    assert sum(cut.pruned for cut in cuts.values()) == prune
    assert [n for n, _ in safetensors_source([tmp_path / "1.safetensors"], lambda n: n == "norm")()] == ["norm"]


class Code:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise AssertionError('code in the file was run')",)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.pkl", "model.safetensors"])
def test_a_pickle_is_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Code()))
    with pytest.raises(CompressError, match=r"only safetensors|cannot be read"):
        find_cuts(safetensors_source([tmp_path / name], lambda _: True), 1)


def test_a_shard_cut_short_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CompressError) as error:
        find_cuts(safetensors_source([path], ["w"]), 1)
    assert str(path) in error.value.where


def test_a_layer_that_comes_twice_is_refused() -> None:
    def twice() -> Iterator[tuple[str, Tensor]]:
        yield from [("w", torch.ones(2)), ("w", torch.ones(2))]

    with pytest.raises(CompressError, match="the layer w is there twice"):
        find_cuts(twice, 1)


# Each rank holds an uneven part of every case and writes the masks of its own layers.
RANK = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from safetensors.torch import save_file
from compress.errors import CompressError
from compress.recipes.global_mp.magnitude import find_cuts, global_masks, safetensors_source
from tests.recipes.global_mp.test_magnitude import part_of, random_case

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)

def all_reduce(counts):
    dist.all_reduce(counts)
    return counts

for seed in range(60):
    weights, prune, floors = random_case(seed)
    mine = {n: weights[n] for n in part_of(weights, rank, ranks)}
    masks = global_masks(mine, prune, floors, all_reduce, sorted(weights))
    save_file({n: m.contiguous() for n, m in masks.items()}, f"{folder}/{seed}-{rank}.safetensors")

for what in ("nan", "twice", "missing", "stranger", "infeasible"):
    name = f"l{rank}"
    held = {name: torch.full((3,), float("nan") if what == "nan" and rank == 1 else 1.0)}
    if what == "twice":
        held["l0"] = torch.ones(3)
    if what == "missing" and rank == 1:
        held = {}
    if what == "stranger" and rank == 1:
        held["who"] = torch.ones(3)
    try:
        global_masks(held, 3 * ranks if what == "infeasible" else 1, {"l1": 1}, all_reduce,
                     [f"l{r}" for r in range(ranks)])
        print(what, "nothing raised")
    except CompressError as e:
        print(what, e.what)

# What only a rank itself can tell: its own error there, and one on every other rank.
whole, short = folder / f"whole-{rank}.safetensors", folder / f"short-{rank}.safetensors"
save_file({f"l{rank}": torch.ones(100)}, whole)
short.write_bytes(whole.read_bytes()[:-50])
reads = 0

def vanishing(at):  # a file that is there until it is read for that time
    global reads
    reads += 1
    path = whole if rank != 1 or reads < at else folder / "gone.safetensors"
    yield from safetensors_source([path], lambda name: True)()

def twice():
    yield f"l{rank}", torch.ones(3)
    if rank == 1:
        yield f"l{rank}", torch.ones(3)

def faulty():
    if rank == 1:
        raise ValueError("of the source's own")
    yield f"l{rank}", torch.ones(3)

for what, source in (
    ("alone-twice", twice),
    ("alone-short", safetensors_source([short if rank == 1 else whole], lambda name: True)),
    ("alone-pickle", safetensors_source([folder / "w.pt" if rank == 1 else whole], lambda name: True)),
    ("alone-gone-1", lambda: vanishing(1)),
    ("alone-gone-2", lambda: vanishing(2)),
    ("alone-gone-3", lambda: vanishing(3)),
    ("alone-faulty", faulty),
):
    reads = 0
    try:
        find_cuts(source, 1, {}, all_reduce, [f"l{r}" for r in range(ranks)])
        print(what, "nothing raised")
    except (CompressError, ValueError) as e:
        print(what, str(e).splitlines()[0])
# The ranks are still in step.
global_masks({f"l{rank}": torch.ones(3)}, 1, {}, all_reduce, [f"l{r}" for r in range(ranks)])
dist.destroy_process_group()
"""


def part_of(weights: Mapping[str, Tensor], rank: int, ranks: int) -> list[str]:
    """Rank 0 holds every layer but the last ones, of which every other rank holds one (or none)."""
    names = sorted(weights, key=lambda name: weights[name].numel())
    cut = max(0, len(names) - (ranks - 1))
    return names[:cut] if rank == 0 else names[cut + rank - 1 : cut + rank]


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_give_the_masks_of_one(tmp_path: Path, ranks: int) -> None:
    from safetensors.torch import load_file

    command = [sys.executable, "-c", RANK]
    children = [
        subprocess.Popen([*command, str(r), str(ranks), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for r in range(ranks)
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0] * ranks
    for seed in range(60):
        weights, prune, floors = random_case(seed)
        found: dict[str, Tensor] = {}
        for rank in range(ranks):
            found |= load_file(tmp_path / f"{seed}-{rank}.safetensors")
        assert_same(found, global_masks(weights, prune, floors))
    # A fault on one rank is an error on all: none waits for ever. What the counts tell is the same error everywhere.
    told = [dict(line.split(" ", 1) for line in words.splitlines()) for words in said]
    alone = [{k: v for k, v in t.items() if k.startswith("alone")} for t in told]
    assert len({tuple((k, v) for k, v in t.items() if k not in alone[0]) for t in told}) == 1, said
    lines = told[0]
    assert "the weight l1 holds 3 NaN" in lines["nan"]
    assert f"l0 is held by {ranks} ranks" in lines["twice"]
    assert "l1 is held by 0 ranks" in lines["missing"]
    assert "not in the order of all layers: 1" in lines["stranger"]
    assert f"hold 1 of {3 * ranks} weights" in lines["infeasible"]
    own = {
        "alone-twice": "the layer l1 is there twice",
        "alone-short": "the weight file cannot be read",
        "alone-pickle": "only safetensors files are read",
        **{f"alone-gone-{n}": "the weight file cannot be read" for n in (1, 2, 3)},
        "alone-faulty": "of the source's own",
    }
    for rank, lines in enumerate(alone):
        assert lines.keys() == own.keys()
        for what, part in own.items():
            elsewhere = part if what == "alone-twice" else "layers could not be read on 1 of the other ranks"
            assert (part if rank == 1 else elsewhere) in lines[what], (rank, what, lines[what])
