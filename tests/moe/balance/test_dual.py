"""The dual function, its curvature, bounds and optimum: against brute force, linear programs and planted optima.

Letters: T tokens, E experts, K experts per token, S seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linprog

from moe.balance import dual
from moe.balance.dual import (
    all_finite,
    boundary_counts,
    boundary_curvature,
    curvature_diagonal,
    curvature_iid,
    dual_gradient,
    dual_value,
    gradient_bound,
    lagrangian_change,
    regret_bound_constant,
    regret_bound_log,
    regret_bound_sqrt,
    solve_dual,
)

SHAPES = [(40, 8, 2), (41, 6, 5), (7, 5, 1), (30, 2, 1), (1, 9, 4)]


def draw(*shape, seed=0, ties=False):
    """Scores and biases; with ties both are multiples of 1/8, whose sums are exact."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(*shape, generator=rng, dtype=torch.float64)
    biases = [0.3 * torch.randn(*shape[:-2], shape[-1], generator=rng, dtype=torch.float64) for _ in range(2)]
    return [(8 * x).round() / 8 if ties else x for x in (scores, *biases)]


def chosen(scores_TE, bias_E, top_k):
    """The experts of every token, ties to the lowest index."""
    biased = (scores_TE + bias_E).tolist()
    return [sorted(range(len(row)), key=lambda k: (-row[k], k))[:top_k] for row in biased]


# -- the dual function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_value_and_gradient_by_brute_force(tokens, experts, top_k, ties):
    scores, bias, _ = draw(tokens, experts, ties=ties)
    load = tokens * top_k / experts
    x = chosen(scores, bias, top_k)
    value = sum(float(scores[i, k] + bias[k]) for i in range(tokens) for k in x[i]) - load * float(bias.sum())
    assert float(dual_value(scores, bias, top_k)) == pytest.approx(value, abs=1e-11)
    counts = [sum(k in row for row in x) for k in range(experts)]
    torch.testing.assert_close(dual_gradient(scores, bias, top_k), torch.tensor(counts).double() - load)


def test_gradient_is_what_autograd_says_of_the_value():
    scores, bias, _ = draw(50, 8)
    value = dual_value(scores, bias.requires_grad_(), 3)
    torch.testing.assert_close(torch.autograd.grad(value, bias)[0], dual_gradient(scores, bias, 3))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_change_of_the_lagrangian_by_brute_force(tokens, experts, top_k, ties):
    scores, before, after = draw(tokens, experts, ties=ties)
    old, new = (chosen(scores, bias, top_k) for bias in (before, after))
    biased = scores + after
    benefit = sum(float(biased[i, new[i]].sum() - biased[i, old[i]].sum()) for i in range(tokens))
    payment = sum(
        float(after[k] - before[k]) * (tokens * top_k / experts - sum(k in row for row in old)) for k in range(experts)
    )
    change = lagrangian_change(scores, before, after, top_k)
    assert [float(x) for x in change] == pytest.approx([benefit, payment, benefit - payment], abs=1e-11)


# -- curvature ---------------------------------------------------------------------------------------------------------


def skewed(tokens, experts, seed=0):
    """Uniform scores of unequal experts: every pair ties with another density."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores + torch.linspace(0, 0.4, experts, dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_curvature_is_the_jacobian_of_the_load(top_k):
    width, scores, bias = 0.004, skewed(200_000, 5), torch.tensor([0.1, -0.1, 0.0, 0.05, -0.05]).double()
    steps = width * torch.eye(5, dtype=torch.float64)
    jacobian = torch.stack(
        [(dual_gradient(scores, bias + d, top_k) - dual_gradient(scores, bias - d, top_k)) / (2 * width) for d in steps]
    )
    # On the same tokens they differ only where three experts lie within the width: about E * width = 2 % of a row.
    curvature = boundary_curvature(scores, bias, top_k, width)
    assert (curvature - jacobian).abs().max() < 0.02 * jacobian.diagonal().max()
    pairs = jacobian[~torch.eye(5, dtype=torch.bool)]
    assert pairs.abs().max() > 1.5 * pairs.abs().min()  # pairs mixed up would be seen


def test_curvature_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.4, 0.0], [0.9, 0.5, 0.3, 0.0], [0.5, 0.9, 0.0, 0.875], [0.4, 0.7, 0.6, 0.65]])
    bias = torch.tensor([0.0, 0.0, 0.0, 0.125])
    # K = 2: the second and third are 1, 2 at 0.1; 1, 2 at 0.2; 1, 0 at 0.4; 1, 2 at 0.1 (expert 3 is first there).
    found = boundary_curvature(scores, bias, 2, width=0.15)
    expected = torch.tensor([[0, 0, 0, 0], [0, 2, -2, 0], [0, -2, 2, 0], [0, 0, 0, 0]]).double() / 0.3
    torch.testing.assert_close(found, expected)
    assert boundary_counts(scores, bias, 2, width=0.15).tolist() == [0, 2, 2, 0]
    assert boundary_counts(scores, bias, 2, width=0.5).tolist() == [1, 4, 3, 0]


def test_a_margin_of_exactly_the_width_counts():
    scores = torch.tensor([[1.0, 0.75, 0.0]])
    assert boundary_counts(scores, torch.zeros(3), 1, width=0.25).tolist() == [1, 1, 0]
    assert boundary_counts(scores, torch.zeros(3), 1, width=0.2499).tolist() == [0, 0, 0]


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_curvature_is_a_laplacian(top_k):
    curvature = boundary_curvature(skewed(500, 6), torch.zeros(6), top_k, width=0.05)
    assert curvature.sum(-1).abs().max() < 1e-9 and torch.equal(curvature, curvature.mT)
    assert (curvature - curvature.diagonal().diag()).max() <= 0
    assert torch.linalg.eigvalsh(curvature)[0] > -1e-9 < torch.linalg.eigvalsh(curvature)[1]


def test_counts_give_the_diagonal_and_add_over_micro_batches():
    scores, bias, _ = draw(300, 7)
    counts = boundary_counts(scores, bias, 3, width=0.04)
    assert counts.dtype == torch.int64 and counts.sum() > 0
    diagonal = boundary_curvature(scores, bias, 3, width=0.04).diagonal()
    torch.testing.assert_close(curvature_diagonal(counts, width=0.04), diagonal)
    assert torch.equal(sum(boundary_counts(part, bias, 3, width=0.04) for part in scores.split(70)), counts)


@pytest.mark.parametrize(
    ("score", "experts", "top_k", "phi"),
    [
        ("uniform", 8, 2, 1.0),
        ("uniform", 6, 5, 1.0),
        ("sigmoid", 8, 2, 1.3134),
        ("sigmoid", 16, 4, 1.3666),
    ],
)
def test_iid_scores_have_the_curvature_of_the_theory(score, experts, top_k, phi):
    tokens, width, rng = 2**19, 0.001, torch.Generator().manual_seed(3)
    uniform = torch.rand(tokens, experts, generator=rng, dtype=torch.float64)
    scores = uniform if score == "uniform" else torch.special.ndtri(uniform).sigmoid()
    curvature = boundary_curvature(scores, torch.zeros(experts), top_k, width)
    # All E - 1 eigenvalues beyond 0 are equal in expectation, so their mean is the estimate of mu with least noise. It
    # rests on about width * E * T * phi = 3,100 to 11,500 tokens: standard error 1 to 1.8 %. The window costs up to 1 %.
    mean = float(curvature.trace()) / (experts - 1)
    near = width * experts * tokens * phi
    assert mean == pytest.approx(curvature_iid(tokens, experts, phi), rel=3 / math.sqrt(near) + 0.01)


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_gradient_bound_is_never_exceeded_and_is_reached(tokens, experts, top_k):
    bound = gradient_bound(tokens, experts, top_k)
    for seed in range(20):
        scores, bias, _ = draw(tokens, experts, seed=seed)
        assert dual_gradient(scores, 10 * bias, top_k).norm() <= bound * (1 + 1e-12)
    same = torch.linspace(0, 1, experts).expand(tokens, experts)  # everyone wants the same K experts
    assert float(dual_gradient(same, torch.zeros(experts), top_k).norm()) == pytest.approx(bound)


def test_load_of_independent_tokens_has_its_expected_square():
    scores = torch.rand(4000, 64, 8, generator=torch.Generator().manual_seed(0))
    squares = dual_gradient(scores, torch.zeros(4000, 8), 3).square().sum(-1)
    # T K (E - K) / E = 120; 4,000 batches of about chi2 with 7 degrees have a standard error of 0.8 %.
    assert float(squares.mean()) == pytest.approx(64 * 3 * 5 / 8, rel=0.03)


def test_regret_bounds_are_their_formulas_in_numbers_and_tensors():
    assert regret_bound_log(6.0, 4.0, 10) == pytest.approx(36 / 8 * (1 + math.log(10)))
    assert regret_bound_log(6.0, 4.0, 10, c=0.5) == pytest.approx(9 * (1 + math.log(10)))
    assert regret_bound_sqrt(6.0, 2.0, 16, c=0.1) == pytest.approx(4 * 4 / 0.2 + 0.1 * 36 * 3.5)
    assert regret_bound_constant(6.0, 2.0, 16, rate=0.1) == pytest.approx(4 / 0.2 + 0.05 * 36 * 16)
    N = torch.tensor([1.0, 10.0])
    torch.testing.assert_close(regret_bound_log(6.0, 4.0, N), torch.tensor([4.5, 4.5 * (1 + math.log(10))]))
    torch.testing.assert_close(regret_bound_sqrt(6.0, 2.0, N, 0.1)[0], torch.tensor(20 + 1.8))


def test_log_bound_refuses_a_step_below_one_over_mu():
    assert regret_bound_log(1.0, 3.0, 10, c=1 / 3) == regret_bound_log(1.0, 3.0, 10)
    with pytest.raises(ValueError, match=r"c = 0\.33 is below 1 / mu = 0\.333"):
        regret_bound_log(1.0, 3.0, 10, c=0.33)
    with pytest.raises(ValueError, match="below 1 / mu"):
        regret_bound_log(1.0, torch.tensor([4.0, 2.0]), 10, c=0.3)  # one layer of two


# -- the optimum -------------------------------------------------------------------------------------------------------


def linear_program(scores_TE, top_k):
    """The optimum of the assignment problem by HiGHS."""
    tokens, experts = scores_TE.shape
    rows, columns = np.ones((1, experts)), np.ones((1, tokens))
    sums = sparse.vstack([sparse.kron(sparse.eye(tokens), rows), sparse.kron(columns, sparse.eye(experts))])
    wanted = np.r_[np.full(tokens, top_k), np.full(experts, tokens * top_k / experts)]
    found = linprog(-scores_TE.numpy().ravel(), A_eq=sums, b_eq=wanted, bounds=(0, 1), method="highs")
    assert found.status == 0, found.message
    return -found.fun


def check(solution, scores_TE, top_k, tol, optimum):
    """Within the tolerance, by an honest gap, at the bias it names."""
    value, gap, bias = float(solution.value), float(solution.gap), solution.bias
    rounding = 1e-11 * max(1.0, abs(optimum))
    assert optimum - rounding <= value <= optimum + tol * max(1.0, abs(optimum))
    assert 0 <= gap <= tol * max(1.0, abs(value)) and value - gap <= optimum + rounding
    assert float(dual_value(scores_TE, bias, top_k)) == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert abs(float(bias.sum())) < 1e-9


MAKE = {
    "sigmoid": lambda x: x.sigmoid(),
    "softmax": lambda x: x.softmax(-1),
    "saturated": lambda x: (30 * x).softmax(-1),
    "ties": lambda x: (4 * x.sigmoid()).round() / 4,
    "negative": lambda x: 100 * x - 300,
}


@pytest.mark.parametrize("score", MAKE)
def test_optimum_is_that_of_the_linear_program(score):
    rng = np.random.default_rng(7)
    for seed in range(14):
        experts = int(rng.integers(2, 9))
        top_k = (1, experts - 1, int(rng.integers(1, experts)))[seed % 3]
        tokens = int(rng.integers(1, 50))  # L = K T / E is seldom an integer
        scores = MAKE[score](torch.from_numpy(rng.normal(size=(tokens, experts)) + rng.normal(size=experts)))
        optimum = linear_program(scores, top_k)
        # A loose tolerance leaves a gap that is no rounding: is it honest?
        for tol in (1e-6, 1e-2, 0.5):
            check(solve_dual(scores, top_k, tol), scores, top_k, tol, optimum)


@pytest.mark.parametrize("score", MAKE)
def test_optimum_from_the_tokens_in_doubt_is_that_of_the_linear_program(score, monkeypatch):
    monkeypatch.setattr(dual, "_POOL", 8)  # so that 90 tokens are many
    rng = np.random.default_rng(8)
    for experts, top_k in [(3, 1), (4, 3), (6, 2), (8, 2)]:
        scores = MAKE[score](torch.from_numpy(rng.normal(size=(90, experts)) + rng.normal(size=experts)))
        check(solve_dual(scores, top_k), scores, top_k, 1e-6, linear_program(scores, top_k))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(24_000, 8, 2), (32_768, 16, 1), (20_000, 4, 3), (640, 64, 6)]
)
def test_planted_optimum_is_found(tokens, experts, top_k):
    # A balanced assignment and prices under which no token wants another one: both are optimal (complementary slackness).
    rng = torch.Generator().manual_seed(0)
    ids = ((torch.arange(tokens)[:, None] + torch.arange(top_k)) % experts)[torch.randperm(tokens, generator=rng)]
    taken = torch.zeros(tokens, experts, dtype=torch.float64).scatter(1, ids, 1.0)
    away = torch.rand(tokens, experts, generator=rng, dtype=torch.float64) * (2 * taken - 1)
    price = torch.randn(experts, generator=rng, dtype=torch.float64)
    scores = torch.rand(tokens, 1, generator=rng, dtype=torch.float64) - price + 0.1 * away
    optimum = float((scores * taken).sum())
    assert float(dual_value(scores, price, top_k)) == pytest.approx(optimum, rel=1e-12)
    check(solve_dual(scores, top_k), scores, top_k, 1e-6, optimum)


@pytest.mark.parametrize("tokens", [17_000, 50_001])
def test_two_experts_share_the_tokens_at_the_median(tokens):
    scores = MAKE["sigmoid"](
        torch.randn(tokens, 2, generator=torch.Generator().manual_seed(1)).double() + torch.eye(2)[0]
    )
    first, half = (scores[:, 0] - scores[:, 1]).sort(descending=True).values, tokens // 2
    optimum = float(scores[:, 1].sum() + first[:half].sum() + (tokens % 2) * first[half] / 2)
    check(solve_dual(scores, 1), scores, 1, 1e-6, optimum)


def test_only_tokens_in_doubt_take_part(monkeypatch):
    found, interior_point = [], dual._interior_point
    monkeypatch.setattr(dual, "_interior_point", lambda *a: found.append(interior_point(*a)) or found[-1])
    solution = solve_dual(skewed(40_000, 8), 2)
    assert float(solution.gap) <= 1e-6 * float(solution.value)
    assert len(found) == 2 and max(len(x.x_PE) for x in found) < 5000  # a sample, then those of smallest margin, once
    assert sum(x.steps for x in found) <= int(solution.iterations) <= sum(x.steps for x in found) + 6


def test_newton_steps_leave_few_tokens_to_move():
    scores = skewed(20_000, 8)
    rough = dual._look(scores, torch.linspace(0, -0.36, 8, dtype=torch.float64), 2)
    found, _ = dual._newton(scores, rough, 2)
    assert rough.excess_E.abs().sum() > 1000 and found.excess_E.abs().sum() <= 4 * 8 and found.value < rough.value


def test_few_steps_are_enough():
    assert 5 < int(solve_dual(skewed(2000, 16), 2).iterations) <= 15


def test_many_tokens_with_ties_end_within_the_tolerance():
    # Far more tokens than the first pool are in doubt at the optimum: the pool has to grow.
    scores = MAKE["ties"](torch.randn(20_000, 8, generator=torch.Generator().manual_seed(2)).double())
    solution = solve_dual(scores, 2)
    assert float(solution.gap) <= 1e-6 * float(solution.value)
    assert float(dual_value(scores, solution.bias, 2)) == pytest.approx(float(solution.value), rel=1e-12)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = solution.bias + 0.2 * torch.randn(8, generator=rng, dtype=torch.float64)
        assert float(dual_value(scores, other, 2)) >= float(solution.value - solution.gap)


def test_optimum_is_balanced_where_a_token_is_split_at_most():
    # Distinct scores and L = 25: at the optimum at most E - 1 tokens are between two experts.
    scores, _, _ = draw(100, 8)
    excess = dual_gradient(scores, solve_dual(scores, 2, tol=1e-12).bias, 2)
    assert excess.abs().sum() <= 2 * 7 and dual_gradient(scores, torch.zeros(8), 2).abs().sum() > 2 * 7


def test_a_good_start_saves_work_and_no_start_changes_the_optimum(monkeypatch):
    first, scores = skewed(2048, 16, seed=1), skewed(2048, 16, seed=2)
    cold = solve_dual(scores, 3)
    sizes = []
    solve = dual._solve_pool
    monkeypatch.setattr(dual, "_solve_pool", lambda *a: sizes.append(a[3]) or solve(*a))
    near = solve_dual(scores, 3, start=solve_dual(first, 3).bias)
    assert sizes[0] == 2048 and sizes[-1] < 1024  # `first` has no start: all its tokens take part
    far = torch.arange(16.0)  # the further, the higher G is there, and the looser a gap relative to that
    starts = [cold.bias + 7.0, torch.zeros(16), 10 * far, 1e3 * far, 1e5 * far, torch.full((16,), torch.nan)]
    for solution in (near, *(solve_dual(scores, 3, start=start) for start in starts)):
        assert float(solution.value) == pytest.approx(float(cold.value), abs=1e-6 * abs(float(cold.value)))
        assert float(solution.gap) <= 1e-6 * abs(float(cold.value)) and abs(float(solution.bias.sum())) < 1e-9


def test_some_tokens_that_found_nothing_better_are_not_solved_again(monkeypatch):
    scores, sizes = skewed(4096, 16), []
    start = solve_dual(scores, 3).bias
    solve = dual._solve_pool

    def none_at_first(scores_TE, point, top_k, pool, tol):
        sizes.append(pool)
        return (point.bias_E, 0.0, 1) if len(sizes) == 1 else solve(scores_TE, point, top_k, pool, tol)

    monkeypatch.setattr(dual, "_solve_pool", none_at_first)
    found = solve_dual(scores, 3, start=start)
    assert sizes == [sizes[0], 4 * sizes[0]] and float(found.gap) <= 1e-6 * float(found.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 23])
def test_all_finite_is_isfinite_of_all(bad, place):
    values = torch.linspace(-1, 1, 24).view(2, 3, 4)
    assert all_finite(values) and all_finite(values[:0])
    values.view(-1)[place] = bad
    assert not all_finite(values) and not all_finite(values.double())


def test_a_point_near_the_optimum_saves_steps_and_one_that_is_not_is_no_start(monkeypatch):
    scores = skewed(512, 16).double()
    bias = solve_dual(scores, 3, tol=1e-9).bias
    load = torch.full((16,), 512 * 3 / 16, dtype=torch.float64)
    limit = 1e-6 * float((scores + bias).abs().sum())
    start = dual._near_start(scores + bias, load, 3, limit)
    assert start is not None
    x, u, z, w = start
    assert ((x + u - 1).abs().max() < 1e-12) and float(torch.stack([x, u, z, w]).min()) > 0
    slack = z - w + scores + bias  # t, one a row: dual feasible
    torch.testing.assert_close(slack, slack[:, :1].expand_as(slack), rtol=0, atol=1e-12)
    torch.testing.assert_close(x * z, u * w)
    near = dual._interior_point(scores + bias, load, 3, limit)
    assert dual._near_start(scores, load, 3, limit) is None
    monkeypatch.setattr(dual, "_near_start", lambda *a: None)
    far = dual._interior_point(scores + bias, load, 3, limit)
    assert near.steps <= 0.7 * far.steps
    for found in (near, far):
        assert dual._loss_of_sums(scores, found.x_PE, load, 3) <= limit
        assert float((found.x_PE * scores).sum()) == pytest.approx(float(solve_dual(scores, 3).value), rel=1e-5)


def test_a_gap_is_not_enough_while_the_sums_are_off():
    # All but indifferent to four experts: the gap of a near start is 1e-4 at once, but its loads are two tokens off.
    scores = torch.zeros(64, 5, dtype=torch.float64)
    scores[torch.arange(64), torch.arange(64) % 4] = 1e-6
    scores[:, 4] = -1
    load = torch.tensor([17.0, 15.0, 15.9, 15.9, 0.2], dtype=torch.float64)
    start = dual._near_start(scores, load, 1, 1e-3)
    assert start is not None
    x, u, z, w = start
    assert float((x * z + u * w).sum()) < 1e-3 < dual._loss_of_sums(scores, x, load, 1)
    assert dual._loss_of_sums(scores, dual._interior_point(scores, load, 1, 1e-3).x_PE, load, 1) <= 1e-3


def test_a_bad_start_of_many_tokens_falls_back_on_a_sample(monkeypatch):
    monkeypatch.setattr(dual, "_POOL", 256)
    scores, samples = skewed(8192, 16), []
    solve = dual._interior_point
    monkeypatch.setattr(dual, "_interior_point", lambda s, *a: samples.append(len(s)) or solve(s, *a))
    found = solve_dual(scores, 3, start=torch.arange(16.0))
    assert samples[0] == 256 and float(found.gap) <= 1e-6 * abs(float(found.value))


def test_a_start_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"start has shape \[3\]: give one bias per expert, \[2, 4\]"):
        solve_dual(torch.rand(2, 5, 4), 2, start=torch.zeros(3))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_equal_scores_need_no_bias(top_k):
    solution = solve_dual(torch.full((32, 6), 0.3), top_k)
    assert solution.bias.abs().max() < 1e-12 and solution.gap < 1e-12
    assert float(solution.value) == pytest.approx(32 * top_k * 0.3, rel=1e-6)


def test_leading_dimensions_are_independent_problems():
    scores = torch.stack([skewed(30, 5, seed) for seed in range(6)]).view(2, 3, 30, 5)
    solution = solve_dual(scores, 2)
    assert [tuple(field.shape) for field in solution] == [(2, 3, 5), (2, 3), (2, 3), (2, 3)]
    for layer in range(6):
        alone = solve_dual(scores[layer // 3, layer % 3], 2)
        for found, expected in zip(solution, alone, strict=True):
            assert torch.equal(found[layer // 3, layer % 3], expected)


def test_no_tokens_cost_nothing():
    solution = solve_dual(torch.zeros(2, 0, 4), 2)
    assert solution.bias.tolist() == [[0] * 4] * 2 and solution.value.tolist() == solution.gap.tolist() == [0, 0]


# -- all of them -------------------------------------------------------------------------------------------------------


CALLS = {
    "value": lambda s, b, c: (dual_value(s, b, 2),),
    "gradient": lambda s, b, c: (dual_gradient(s, b, 2),),
    "lagrangian": lambda s, b, c: lagrangian_change(s, b, c, 2),
    "curvature": lambda s, b, c: (boundary_curvature(s, b, 2, 0.03),),
    "counts": lambda s, b, c: (boundary_counts(s, b, 2, 0.03),),
    "optimum": lambda s, b, c: solve_dual(s, 2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_batch_of_layers_is_layer_by_layer(call):
    inputs = draw(2, 3, 60, 6)
    together = CALLS[call](*inputs)
    for i, j in [(0, 0), (0, 2), (1, 1)]:
        for found, alone in zip(together, CALLS[call](*(x[i, j] for x in inputs)), strict=True):
            torch.testing.assert_close(found[i, j], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("call", CALLS)
def test_any_float_type_is_computed_in_float64_and_left_as_it_is(call, dtype):
    inputs = [x.to(dtype) for x in draw(300, 6)]
    copies = [x.clone() for x in inputs]
    for found, expected in zip(CALLS[call](*inputs), CALLS[call](*(x.double() for x in inputs)), strict=True):
        assert found.dtype in (torch.float64, torch.int64) and torch.equal(found, expected)
    assert all(torch.equal(x, copy) and x.dtype == dtype for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_float64_inputs_are_not_written_to(call):
    inputs = draw(300, 6)  # .double() makes no copy of these
    copies = [x.clone() for x in inputs]
    CALLS[call](*inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_a_top_k_that_leaves_no_choice_is_refused(call):
    scores, *biases = draw(10, 2)
    with pytest.raises(ValueError, match="top_k = 2 of 2 experts leaves nothing to balance: choose 1 to 1"):
        CALLS[call](scores, *biases)


def test_no_expert_per_token_is_refused():
    with pytest.raises(ValueError, match="top_k = 0 of 4 experts"):
        dual_value(torch.zeros(3, 4), torch.zeros(4), 0)


@pytest.mark.parametrize("width", [0.0, -0.1, math.nan])
@pytest.mark.parametrize("function", [boundary_counts, boundary_curvature])
def test_a_width_that_is_not_positive_is_refused(function, width):
    with pytest.raises(ValueError, match="is not positive: choose a small margin"):
        function(torch.rand(3, 4), torch.zeros(4), 2, width)


@pytest.mark.parametrize("tol", [0.0, -1e-6, math.nan])
def test_a_tolerance_that_is_not_positive_is_refused(tol):
    with pytest.raises(ValueError, match="is not positive: choose a relative accuracy"):
        solve_dual(torch.rand(3, 4), 2, tol)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = torch.linspace(1, 0, 6).repeat(20, 1)
    scores[3, 5] = bad  # -inf there leaves the dual value finite
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve_dual(scores, 2)
