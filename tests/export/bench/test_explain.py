"""Why a pruned network is not faster: each cause told from layers that have it, and from real profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.exporters.bench.explain import Layer, explain, fitted_block, over_rounds, why
from compress.exporters.bench.local import LOCAL
from compress.report.explained import lines
from tests.export.bench.nets import conv_net


def conv(name: str, inside: int, outside: int, seconds: float, pixels: int = 1024) -> Layer:
    flops, moved = 2 * 9 * inside * outside * pixels, 4 * (inside + outside) * pixels
    return Layer(name, "Conv", seconds, flops, moved + 36 * inside * outside, (inside, outside))


def steady(*layers: Layer) -> list[Layer]:
    """As five profiles that agree."""
    return over_rounds([list(layers)] * 5)


# A layer at full speed, so that the machine's limits are known: 100 GFLOP/s; and a copy: 10 GB/s.
FULL = conv("full", 256, 256, 2 * 9 * 256 * 256 * 1024 / 100e9)
COPY = Layer("copy", "Reorder", 1e-3, 0, 10_000_000)


def causes(dense: list[Layer], pruned: list[Layer], block: int | None = None) -> dict[str, str]:
    found = explain([FULL, COPY, *dense], [FULL, COPY, *pruned], block=block)
    return {f["name"]: f["cause"] for f in found["findings"]}


def test_a_layer_that_fell_with_its_work_is_not_named() -> None:
    assert causes([conv("c", 64, 64, 4e-3)], [conv("c", 32, 32, 1e-3)]) == {}


def test_channels_that_fill_no_block_are_named_with_what_they_cost() -> None:
    found = explain(steady(conv("c", 64, 64, 4e-3)), steady(conv("c", 36, 36, 4e-3 * (48 / 64) ** 2)))
    (f,) = found["findings"]
    assert f["cause"] == "alignment" and found["block"] == 16
    assert "36 channels cost as much as 48" in f["words"] and f["fix"] == "prune with round_to: 16"
    assert f["missing"] == pytest.approx(4e-3 * ((48 / 64) ** 2 - (36 / 64) ** 2))
    assert any(line.startswith("c: 4.000 -> 2.250 ms") for line in lines(found))


def test_the_block_of_the_kernels_is_read_off_the_times() -> None:
    for block in (4, 8, 16):
        blocks = [(64, 36), (128, 70), (96, 50)]
        pairs = [
            (conv("c", a, a, 1e-3), conv("c", b, b, 1e-3 * (-(-b // block) / (a // block)) ** 2)) for a, b in blocks
        ]
        assert fitted_block(pairs) == block


def test_a_layer_with_few_flops_a_byte_follows_its_bytes() -> None:
    # A product of one row: two FLOPs a weight; half its outputs are gone, and the input it reads stays.
    dense = Layer("fc", "MatMul", 4e-3, 2 * 4096 * 1024, 4 * 10_000_000, (4096, 1024))
    pruned = Layer("fc", "MatMul", 3e-3, 2 * 4096 * 512, 4 * 7_500_000, (4096, 512))
    assert causes([dense], [pruned], block=8) == {"fc": "memory"}


def test_a_layer_that_does_next_to_nothing_is_overhead() -> None:
    tiny = [Layer(f"t{i}", "MatMul", 8e-6, 2000, 4000, (10, 100)) for i in range(3)]
    after = [Layer(t.name, "MatMul", 7e-6, 500, 1000, (10, 25)) for t in tiny]
    found = explain(steady(*tiny), steady(*after))
    assert {f["cause"] for f in found["findings"]} == {"overhead"}
    assert any("3 of 3 nodes take under 10 us" in line for line in lines(found))


def test_what_nothing_explains_is_not_explained_away() -> None:
    assert causes([conv("c", 64, 64, 4e-3)], [conv("c", 32, 32, 3e-3)], block=16) == {"c": "kernel"}


def test_enough_of_the_ideal_needs_no_explanation() -> None:
    found = explain(steady(conv("c", 64, 64, 4e-3)), steady(conv("c", 32, 32, 1.1e-3)))
    assert found["reached"] > 0.8 and len(lines(found)) == 1


def test_a_layer_that_was_slow_in_one_round_alone_is_not_named() -> None:
    dense = steady(conv("a", 64, 64, 4e-3), conv("b", 64, 64, 4e-3))
    times = {"a": (3e-3, 3e-3, 3e-3, 3e-3, 3e-3), "b": (3e-3, 3e-3, 3e-3, 0.9e-3, 3e-3)}
    pruned = over_rounds([[conv(n, 32, 32, t[i]) for n, t in times.items()] for i in range(5)])
    assert [f["name"] for f in explain(dense, pruned)["findings"]] == ["a"]


def test_one_profile_of_each_is_no_finding_nor_is_what_noise_made() -> None:
    once = explain([conv("c", 64, 64, 4e-3)], [conv("c", 32, 32, 3e-3)])
    (said,) = lines(once)
    assert said.startswith("not resolved on this machine: each model was profiled once")
    dense = over_rounds([[conv("c", 64, 64, t)] for t in (4e-3, 9e-3, 4e-3, 12e-3, 5e-3)])
    noisy = explain(dense, over_rounds([[conv("c", 36, 36, t)] for t in (4e-3, 3e-3, 6e-3, 2e-3, 3e-3)]))
    (said,) = lines(noisy)
    assert said.startswith("not resolved on this machine [") and "the FLOPs promise 3.16x" in said
    fast = explain(steady(conv("c", 64, 64, 4e-3)), steady(conv("c", 32, 32, 0.5e-3)))
    (said,) = lines(fast)
    assert "8.00x" not in said and "above the 4.00x that the work promises" in said


def test_real_profiles_have_every_layer_and_its_work(tmp_path: Path) -> None:
    dense, pruned = conv_net(tmp_path / "d", channels=32, size=32), conv_net(tmp_path / "p", channels=18, size=32)
    found = why(dense, pruned, {"threads": 1, "batch": 2, "processes": 3}, LOCAL)["model"]
    rows = {row["name"]: row for row in found["layers"]}
    for name, at in (("conv0", (3 * 32, 3 * 18)), ("conv1", (32 * 32, 18 * 18))):
        assert (rows[name]["dense_flops"], rows[name]["pruned_flops"]) == tuple(2 * 9 * n * 2 * 32 * 32 for n in at)
    assert rows["head"]["dense_flops"] == 2 * 2 * 32 * 5
    want = sum(r["dense_flops"] for r in rows.values()) / sum(r["pruned_flops"] for r in rows.values())
    assert found["ideal"] == pytest.approx(want) and found["measured"] > 0
    assert len(found["ratio"]["pairs"]) == 3 and f"the FLOPs promise {want:.2f}x" in lines(found)[0]
