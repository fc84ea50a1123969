"""Layer-wise pruning against lstsq, explicit inverses and brute force."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.recipes.tyr.local import (
    Eliminator,
    Moments,
    Problem,
    Score,
    channels,
    damp,
    neuron_levels,
    prune_heads,
    prune_neurons,
)

with_and_without_metric = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "metric"])


def correlated(n: int, out: int, seed: int, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """X (tokens, n) with strongly correlated columns of unequal size, and W (n, out), float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64)
    size = torch.rand(n, generator=g, dtype=torch.float64) + 0.3
    X = torch.randn(tokens, n, generator=g, dtype=torch.float64) @ (mix * size)
    return X, torch.randn(n, out, generator=g, dtype=torch.float64)


def problem(n: int, out: int, seed: int, damping: float = 0.01) -> tuple[Problem, Tensor]:
    """A damped problem whose target is X W plus something W cannot reach, and W."""
    X, W = correlated(n, out, seed)
    moments = Moments(n, out)
    g = torch.Generator().manual_seed(1000 + seed)
    moments.add(X, X @ W + torch.randn(len(X), out, generator=g, dtype=torch.float64))
    return damp(moments, W, damping), W


def metric_of(out: int, seed: int, weighted: bool) -> Tensor | None:
    """A positive definite (out, out) far from the identity, or None."""
    if not weighted:
        return None
    root = torch.randn(out, out, generator=torch.Generator().manual_seed(77 + seed), dtype=torch.float64)
    return root @ root.T + 0.05 * torch.eye(out, dtype=torch.float64)


def best_rows(p: Problem, keep: list[int]) -> Tensor:
    """W (n, out), zero outside ``keep``, that minimises the quadratic; by lstsq on a square root of H."""
    root = torch.linalg.cholesky(p.H).T  # H = root^T root
    optimum = torch.linalg.solve(p.H, p.G)
    W = torch.zeros_like(p.G)
    if keep:
        W[keep] = torch.linalg.lstsq(root[:, keep], root @ optimum).solution
    return W


def true_loss(p: Problem, keep: list[int], metric: Tensor | None = None) -> float:
    """tr(F (W - W*)^T H (W - W*)) of the best W on ``keep``."""
    E = best_rows(p, keep) - torch.linalg.solve(p.H, p.G)
    F = torch.eye(p.G.shape[1], dtype=torch.float64) if metric is None else metric
    return float(torch.trace(F @ E.T @ p.H @ E))


def cheapest(p: Problem, alive: list[int], units: list[list[int]], metric: Tensor | None) -> list[int]:
    """The unit whose removal from ``alive`` costs least."""
    return min(units, key=lambda unit: true_loss(p, [i for i in alive if i not in unit], metric))


# --- statistics, damping, refit -------------------------------------------------------------------------------


def test_moments_over_uneven_batches_are_the_products_of_all_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    moments = Moments(6, 3)
    xs, ts = [], []
    for shape in ((2, 5), (1, 1), (3, 7)):
        x, t = torch.randn(*shape, 6, generator=g), torch.randn(*shape, 3, generator=g)
        moments.add(x, t)
        xs.append(x.reshape(-1, 6).double())
        ts.append(t.reshape(-1, 3).double())
    X, T = torch.cat(xs), torch.cat(ts)
    H, G = moments.sums()
    assert H.dtype == G.dtype == torch.float64
    torch.testing.assert_close(H, X.T @ X, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(G, X.T @ T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [[0, 1, 2, 3, 4, 5, 6, 7], [1, 4, 6], [5], []])
def test_refit_is_the_ridge_regression_on_the_kept_rows(keep: list[int]) -> None:
    X, W = correlated(8, 4, seed=3)
    T = X @ W + 0.5
    moments = Moments(8, 4)
    moments.add(X, T)
    # The ridge as more tokens: lambda ||W' - W||^2 are rows sqrt(lambda) I aimed at sqrt(lambda) W.
    root = math.sqrt(0.02 * float((X**2).sum(0).mean()))
    rows = torch.cat([X, root * torch.eye(8, dtype=torch.float64)])
    aims = torch.cat([T, root * W])
    expected = torch.linalg.lstsq(rows[:, keep], aims).solution if keep else torch.zeros(0, 4, dtype=torch.float64)
    torch.testing.assert_close(damp(moments, W, 0.02).refit(torch.tensor(keep, dtype=torch.int64)), expected)


def test_the_reported_loss_differs_from_the_true_one_by_one_constant() -> None:
    p, _ = problem(7, 3, seed=1)
    subsets = [[0, 1, 2, 3, 4, 5, 6], [0, 2, 5], [6], []]
    gaps = []
    for subset in subsets:
        keep = torch.tensor(subset, dtype=torch.int64)
        gaps.append(true_loss(p, subset) - p.loss(keep, p.refit(keep)))
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-9)


def test_huge_damping_gives_the_dense_rows_back() -> None:
    p, W = problem(8, 4, seed=2, damping=1e9)
    keep = torch.tensor([0, 3, 7])
    torch.testing.assert_close(p.refit(keep), W[keep], rtol=1e-5, atol=1e-5)


def test_damping_adds_a_ridge_that_is_aimed_at_the_dense_weights() -> None:
    X, W = correlated(5, 2, seed=0)
    moments = Moments(5, 2)
    moments.add(X, X @ W)
    H, G = (m.clone() for m in moments.sums())
    p = damp(moments, W, 0.1)
    ridge = 0.1 * float(H.diagonal().mean())
    assert torch.equal(p.H, H + ridge * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(p.G, G + ridge * W, rtol=1e-15, atol=0)


@pytest.mark.parametrize("score", ["obs", "tyr"])
@pytest.mark.parametrize("weighted", [False, True])
def test_levels_made_in_the_place_of_the_matrix_are_the_same(score: Score, weighted: bool) -> None:
    made = []
    for last in (False, True):
        p, _ = problem(40, 6, seed=5)
        made.append(list(neuron_levels(p, (40, 30, 12, 3), 4, score, metric_of(6, 1, weighted), last)))
        assert len(p.H) == (0 if last else 40)
    for (count, keep, w), (again, keep_last, w_last) in zip(*made, strict=True):
        assert count == again and torch.equal(keep, keep_last)
        torch.testing.assert_close(w, w_last, rtol=1e-9, atol=1e-11)


def test_a_channel_that_never_fires_is_no_obstacle() -> None:
    moments = Moments(4, 2)
    moments.add(torch.zeros(3, 4), torch.zeros(3, 2))
    W = torch.arange(8.0).reshape(4, 2)
    keep = torch.tensor([1, 2])
    torch.testing.assert_close(damp(moments, W, 0.01).refit(keep), W[keep].double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["inputs", "target"])
@pytest.mark.parametrize("batch", [0, 1])
def test_broken_statistics_are_refused_with_the_name_of_the_sublayer(bad: float, which: str, batch: int) -> None:
    moments = Moments(3, 2, "block 7, down_proj")
    with pytest.raises(CompressError, match="NaN or infinity") as error:
        for i in range(2):
            x, t = torch.ones(4, 3), torch.ones(4, 2)
            if i == batch:
                (x if which == "inputs" else t)[1, 1] = bad
            moments.add(x, t)
    assert error.value.where == "block 7, down_proj"


def test_a_batch_beyond_the_range_of_the_sums_is_refused_not_wrapped() -> None:
    moments = Moments(3, 2, "block 7, down_proj")
    moments.add(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(CompressError, match=r"2\^18 times"):
        moments.add(torch.full((4, 3), 2.0**12), torch.ones(4, 2))


# --- elimination ----------------------------------------------------------------------------------------------


@with_and_without_metric
def test_weights_after_many_removals_are_the_exact_refit(weighted: bool) -> None:
    p, _ = problem(20, 5, seed=4)
    eliminator = Eliminator(p, metric=metric_of(5, 4, weighted))
    torch.testing.assert_close(eliminator.weights, p.refit(torch.arange(20)))
    draw = torch.Generator().manual_seed(9)
    alive = list(range(20))
    for size in (1, 3, 1, 4, 2, 1, 5, 1):  # crosses the shrinking of the matrices more than once
        positions = torch.randperm(len(alive), generator=draw)[:size].sort().values
        eliminator.remove(positions)
        alive = [a for i, a in enumerate(alive) if i not in positions.tolist()]
        assert eliminator.alive.tolist() == alive
        torch.testing.assert_close(eliminator.weights, p.refit(torch.tensor(alive)), rtol=1e-7, atol=1e-9)
    eliminator.remove(torch.arange(len(alive)))
    assert eliminator.weights.shape == (0, 5)


@with_and_without_metric
def test_an_obs_score_is_what_the_loss_rises_by(weighted: bool) -> None:
    p, _ = problem(12, 4, seed=5)
    metric = metric_of(4, 5, weighted)
    eliminator = Eliminator(p, metric=metric)
    eliminator.remove(torch.tensor([2, 9]))
    alive = eliminator.alive.tolist()
    for size in (1, 2):
        units = torch.arange(10).reshape(-1, size)
        now = true_loss(p, alive, metric)
        rises = [
            true_loss(p, [a for i, a in enumerate(alive) if i not in unit], metric) - now for unit in units.tolist()
        ]
        assert eliminator.scores(units).tolist() == pytest.approx(rises, rel=1e-6)


def test_the_tyr_score_is_the_formula_of_the_paper() -> None:
    p, _ = problem(12, 4, seed=6)
    eliminator = Eliminator(p, score="tyr")
    for gone in ([], [0, 5], [3]):
        eliminator.remove(torch.tensor(gone, dtype=torch.int64))
        alive = eliminator.alive
        inverse = torch.linalg.inv(p.H[alive][:, alive])
        W = inverse @ p.G[alive]
        channel = [
            abs(float(p.G[a] @ W[i])) + float(W[i] @ W[i]) / (2 * float(inverse[i, i])) for i, a in enumerate(alive)
        ]
        assert eliminator.scores(torch.arange(len(alive))[:, None]).tolist() == pytest.approx(channel)
        head = [sum(channel[i : i + 3]) / 3 for i in range(0, 9, 3)]
        assert eliminator.scores(torch.arange(9).reshape(3, 3)).tolist() == pytest.approx(head)


def test_a_copy_goes_its_own_way() -> None:
    p, _ = problem(9, 3, seed=7)
    first = Eliminator(p)
    first.remove(torch.tensor([4]))
    second = first.copy()
    second.remove(torch.tensor([0, 1]))
    torch.testing.assert_close(first.weights, p.refit(torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])))
    torch.testing.assert_close(second.weights, p.refit(torch.tensor([2, 3, 5, 6, 7, 8])))


# --- neurons --------------------------------------------------------------------------------------------------


@with_and_without_metric
@pytest.mark.parametrize("seed", range(4))
def test_each_greedy_step_removes_the_neuron_that_costs_least(seed: int, weighted: bool) -> None:
    p, _ = problem(9, 4, seed)
    metric = metric_of(4, seed, weighted)
    levels = prune_neurons(p, range(10), 1, metric=metric)
    for count in range(9, 0, -1):
        alive = levels[count][0].tolist()
        (removed,) = set(alive) - set(levels[count - 1][0].tolist())
        assert [removed] == cheapest(p, alive, [[a] for a in alive], metric)


def test_the_metric_changes_which_neurons_stay() -> None:
    different = 0
    for seed in range(10):
        p, _ = problem(9, 4, seed)
        plain, weighted = prune_neurons(p, [4], 1), prune_neurons(p, [4], 1, metric=metric_of(4, seed, True))
        different += plain[4][0].tolist() != weighted[4][0].tolist()
    assert different >= 3


def test_a_step_removes_the_lowest_scores_of_one_state_together() -> None:
    p, _ = problem(8, 3, seed=11)
    now = true_loss(p, list(range(8)))
    rises = {i: true_loss(p, [j for j in range(8) if j != i]) - now for i in range(8)}
    expected = sorted(sorted(rises, key=lambda i: rises[i])[4:])
    assert prune_neurons(p, [4], 4)[4][0].tolist() == expected


def test_greedy_is_close_to_the_best_of_all_subsets_and_never_below_it() -> None:
    ratios = []
    for seed in range(40):
        p, _ = problem(8, 4, seed)
        zero = true_loss(p, list(range(8)))
        best = min(true_loss(p, list(keep)) for keep in combinations(range(8), 4)) - zero
        keep, refitted = prune_neurons(p, [4], 1)[4]
        greedy = true_loss(p, keep.tolist()) - zero
        # The weights handed out have the loss that is claimed for them.
        W = torch.zeros_like(p.G)
        W[keep] = refitted
        E = W - torch.linalg.solve(p.H, p.G)
        assert float((E * (p.H @ E)).sum()) == pytest.approx(greedy + zero, rel=1e-6)
        ratios.append(greedy / best)
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.15
    assert sum(r < 1 + 1e-9 for r in ratios) >= 15


@pytest.mark.parametrize("n", [16, 18])
@pytest.mark.parametrize("score", ["obs", "tyr"])
def test_levels_of_one_nested_pass_are_those_of_separate_passes(n: int, score: str) -> None:
    p, _ = problem(n, 4, seed=n)
    counts = [n, 12, 8, 4, 0]
    nested = prune_neurons(p, counts, 4, score)  # type: ignore[arg-type]
    assert list(nested) == counts
    for above, below in pairwise(counts):
        assert set(nested[below][0].tolist()) < set(nested[above][0].tolist())
    for count in counts:
        keep, refitted = prune_neurons(p, [count], 4, score)[count]  # type: ignore[arg-type]
        assert keep.tolist() == nested[count][0].tolist() == sorted(keep.tolist()) and len(keep) == count
        torch.testing.assert_close(refitted, p.refit(keep), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(nested[count][1], refitted)


def test_a_step_ends_on_multiples_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = Eliminator.remove

    def watched(self: Eliminator, positions: Tensor) -> None:
        plain(self, positions)
        seen.append(len(self.alive))

    monkeypatch.setattr(Eliminator, "remove", watched)
    p, _ = problem(11, 3, seed=0)
    prune_neurons(p, [0], 4)
    assert seen == [8, 4, 0]
    seen.clear()
    prune_neurons(p, [11, 7, 4], 4)  # a level between two multiples cuts a step in two
    assert seen == [8, 7, 4]


@pytest.mark.parametrize("count", [-1, 9])
def test_a_level_outside_the_layer_is_refused(count: int) -> None:
    p, _ = problem(8, 2, seed=0)
    with pytest.raises(ValueError, match=f"{count} neurons in a layer of 8"):
        prune_neurons(p, [count], 1)


# --- heads ----------------------------------------------------------------------------------------------------

HEADS, KV, DIM = 6, 3, 2


def brute_heads(p: Problem, metric: Tensor | None) -> dict[tuple[int, int], list[int]]:
    """All (groups, per_group) choices by the rule in the docstring, every loss from lstsq."""

    def rows(heads: list[int]) -> list[int]:
        return channels(heads, DIM).tolist()

    def least(heads: list[int], units: list[list[int]]) -> list[int]:
        return min(units, key=lambda unit: true_loss(p, rows([h for h in heads if h not in unit]), metric))

    found = {}
    group = HEADS // KV
    kept = list(range(HEADS))
    for groups in range(KV, 0, -1):
        if groups < KV:
            units = [[h for h in kept if h // group == g] for g in sorted({h // group for h in kept})]
            kept = [h for h in kept if h not in least(kept, units)]
        trimmed = kept
        found[groups, group] = trimmed
        for per_group in range(group - 1, 0, -1):
            for g in sorted({h // group for h in trimmed}):
                gone = least(trimmed, [[h] for h in trimmed if h // group == g])
                trimmed = [h for h in trimmed if h not in gone]
            found[groups, per_group] = trimmed
    found[0, 0] = []
    return found


@with_and_without_metric
@pytest.mark.parametrize("seed", range(5))
def test_heads_are_chosen_as_brute_force_chooses_them(seed: int, weighted: bool) -> None:
    p, _ = problem(HEADS * DIM, 5, seed)
    metric = metric_of(5, seed, weighted)
    found = prune_heads(p, HEADS, KV, DIM, trim=True, metric=metric)
    assert {(h.groups, h.per_group): list(h.heads) for h in found} == brute_heads(p, metric)


@pytest.mark.parametrize("score", ["obs", "tyr"])
@pytest.mark.parametrize(("heads", "kv"), [(6, 3), (9, 3), (8, 2), (4, 4), (4, 1)])
def test_every_choice_keeps_whole_groups_of_equally_many_heads(heads: int, kv: int, score: str) -> None:
    p, _ = problem(heads * 2, 3, seed=heads + kv)
    group = heads // kv
    found = prune_heads(p, heads, kv, 2, trim=True, score=score)  # type: ignore[arg-type]
    assert found[0].heads == tuple(range(heads))
    assert [len(h.heads) for h in found] == sorted((len(h.heads) for h in found), reverse=True)
    everything = {(g, q) for g in range(1, kv + 1) for q in range(1, group + 1)} | {(0, 0)}
    assert sorted((h.groups, h.per_group) for h in found) == sorted(everything)
    for choice in found:
        sizes = [sum(h // group == g for h in choice.heads) for g in range(kv)]
        assert sorted(sizes) == [0] * (kv - choice.groups) + [choice.per_group] * choice.groups
        assert list(choice.heads) == sorted(set(choice.heads))


def test_without_trim_only_whole_groups_go_and_each_choice_is_part_of_the_one_before() -> None:
    p, _ = problem(12, 3, seed=1)
    found = prune_heads(p, 6, 3, 2, trim=False)
    assert [(h.groups, h.per_group) for h in found] == [(3, 2), (2, 2), (1, 2), (0, 0)]
    for above, below in pairwise(found):
        assert set(below.heads) < set(above.heads)


def test_channels_of_heads_stand_together() -> None:
    assert channels((0, 3), 4).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert channels((), 4).tolist() == []
