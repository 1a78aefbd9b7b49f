"""The torch paths of the kernels against independent formulas, forward and backward."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

import kernels.router_topk as router_topk_module
from kernels import grouped_gemm_cpu
from kernels.combine import combine
from kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference
from kernels.moe_mlp import moe_mlp, moe_mlp_reference, saved_bytes_per_token
from kernels.permute import count_tokens, padded_ends, permute, regroup, sort_by_expert
from kernels.route import STATISTICS, route
from kernels.router_topk import (
    combine_weights,
    router_topk,
    selection_scores,
    sorted_topk,
    topk_lowest_index,
)
from moe.balance.stats import collect
from moe.config import ModelSection

SCORE_FUNCTIONS = get_args(ModelSection.model_fields["score_function"].annotation)  # every one that can be configured


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 2, 1), (37, 16, 2), (64, 61, 7), (5, 256, 8), (9, 8, 7), (33, 40, 21)]
)
def test_p15_topk_equals_stable_sort_also_with_ties(tokens, experts, top_k):
    for values in (rand(tokens, experts), (rand(tokens, experts) * 2).round(), torch.zeros(tokens, experts)):
        ordered, expected = values.sort(dim=-1, descending=True, stable=True)
        found, ids = sorted_topk(values, top_k)
        assert torch.equal(ids, expected[:, :top_k]) and torch.equal(found, ordered[:, :top_k])


@pytest.mark.parametrize("limit", [0, 9])
def test_p15_both_ways_to_the_top_k_agree(limit, monkeypatch):
    values = (rand(200, 24, seed=5) * 3).round()
    values[:, 20:] = float("-inf")  # out of reach
    expected = topk_lowest_index(values, 5)
    monkeypatch.setattr(router_topk_module, "REPEATED", limit)
    assert torch.equal(topk_lowest_index(values, 5), expected)
    values[7] = float("nan")  # still 5 experts of its own for every token
    assert len(topk_lowest_index(values, 5)[7].unique()) == 5


def test_places_are_the_largest_of_what_the_top_k_was_taken_of():
    logits, bias = rand(50, 16), rand(16, seed=1) * 0.1
    plain = router_topk(logits, bias, 3, "sigmoid", num_groups=4, group_top_k=2)
    found = router_topk(logits, bias, 3, "sigmoid", num_groups=4, group_top_k=2, places=True)
    biased = selection_scores(logits.sigmoid(), bias, 4, 2)
    assert plain.places_TK1 is None and torch.equal(found.topk_ids_TK, plain.topk_ids_TK)
    assert torch.equal(found.places_TK1, biased.sort(-1, descending=True).values[:, :4])


def test_p15_ties_go_to_the_lowest_index_and_minus_zero_is_zero():
    values = torch.tensor([[0.0, -0.0, 0.0, -1.0], [1.0, 2.0, 2.0, 2.0]])
    assert topk_lowest_index(values, 2).tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_p40_a_large_bias_changes_the_selection(score_function):
    logits = rand(32, 8)
    bias = torch.zeros(8)
    before = router_topk(logits, bias, 2, score_function).topk_ids_TK
    bias[3] = 10.0
    after = router_topk(logits, bias, 2, score_function).topk_ids_TK
    assert (after[:, 0] == 3).all() and not (before == 3).any(-1).all()


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_p10_bias_selects_and_never_weighs(score_function):
    logits = rand(32, 8).requires_grad_()
    bias = rand(8, seed=1) * 0.1
    out = router_topk(logits, bias, 3, score_function, renormalize=False)
    scores = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(-1)
    assert torch.equal(out.topk_weights_TK, scores.gather(1, out.topk_ids_TK))
    shifted = router_topk(logits, bias + 0.5, 3, score_function, renormalize=False)
    assert torch.equal(out.topk_ids_TK, shifted.topk_ids_TK)
    assert torch.equal(out.topk_weights_TK, shifted.topk_weights_TK)
    normed = router_topk(logits, bias, 3, score_function, renormalize=True, scaling=2.5)
    assert torch.allclose(normed.topk_weights_TK.sum(-1), torch.full((32,), 2.5))


def test_p34_renormalisation_of_scores_near_zero_is_finite():
    logits = torch.full((4, 8), -200.0, requires_grad=True)  # sigmoid underflows to 0
    out = router_topk(logits, torch.zeros(8), 2, "sigmoid")
    out.topk_weights_TK.sum().backward()
    assert torch.isfinite(out.topk_weights_TK).all() and torch.isfinite(logits.grad).all()


def test_p32_router_refuses_more_experts_than_there_are():
    with pytest.raises(ValueError, match="top_k = 9 is more than the 8 experts"):
        router_topk(rand(4, 8), torch.zeros(8), 9, "sigmoid")


def test_p16_experts_of_unchosen_groups_lose_even_to_negative_scores():
    scores, bias = rand(64, 12).sigmoid(), torch.full((12,), -3.0)  # every biased score is below 0
    ids = topk_lowest_index(selection_scores(scores, bias, 4, 2), 4)
    groups = (ids // 3).sort(-1).values
    assert all(len(set(row)) <= 2 for row in groups.tolist())
    out = router_topk(scores.logit(), bias, 4, "sigmoid", num_groups=4, group_top_k=2)
    assert torch.equal(out.topk_ids_TK, ids)


def test_p16_the_score_of_a_group_is_the_sum_of_its_two_best():
    # Group 0 has the best expert, group 1 the best pair, group 2 the largest sum of all its experts.
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.6, 0.0, 0.45, 0.45, 0.45]])
    chosen = selection_scores(scores, torch.zeros(9), 3, 1).isfinite()
    assert chosen[0].tolist() == [False] * 3 + [True] * 3 + [False] * 3
    lifted = selection_scores(scores, torch.tensor([0.3] + [0.0] * 8), 3, 1).isfinite()  # the bias counts
    assert lifted[0].tolist() == [True] * 3 + [False] * 6


def test_p16_all_groups_is_no_limit_and_ties_go_to_the_first_groups():
    scores = rand(16, 8).sigmoid()
    assert torch.equal(selection_scores(scores, torch.zeros(8), 4, 4), scores)
    tied = selection_scores(torch.full((1, 8), 0.5), torch.zeros(8), 4, 2).isfinite()
    assert tied[0].tolist() == [True] * 4 + [False] * 4


def test_combine_weights_of_no_expert_are_zero_and_the_rest_sum_to_one():
    scores, ids = rand(3, 4).sigmoid(), torch.tensor([[0, -1], [-1, -1], [2, 3]])
    weights = combine_weights(scores, ids, masked=True)
    assert weights[0].tolist() == [1.0, 0.0] and weights[1].tolist() == [0.0, 0.0]
    assert float(weights[2].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_route_is_router_topk_and_what_the_balancers_collect(score_function, groups, masked):
    bias, mask = rand(16, seed=1) * 0.1, torch.arange(50) % 3 != 1 if masked else None
    for logits in (rand(50, 16), rand(50, 16).bfloat16()):
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        found = route(ours, bias, 3, score_function, True, 2.5, mask, *groups, frozenset(STATISTICS), 0.02)
        expected = router_topk(theirs, bias, 3, score_function, True, 2.5, mask, *groups)
        assert torch.equal(found.topk_weights_TK, expected.topk_weights_TK)
        assert found.topk_ids_TK.dtype == torch.int32
        assert torch.equal(found.topk_ids_TK.long(), expected.topk_ids_TK)
        for weights in (found.topk_weights_TK, expected.topk_weights_TK):
            weights.square().sum().backward()
        assert torch.equal(ours.grad, theirs.grad)

        ids, scores = expected.topk_ids_TK, expected.scores_TE.detach()
        needs = frozenset({"dual_sum", "prob_sum", "response_histogram"})
        stats = collect(needs, scores, bias, ids, count_tokens(ids, 16), mask, *groups)
        assert torch.equal(found.tokens_per_expert_E, stats.tokens_per_expert)
        assert torch.equal(found.response_histogram_EB, stats.response_histogram)
        # Theirs are sums in float32, in the order of the machine.
        assert torch.allclose(found.dual_sum.double(), stats.dual_sum.double(), rtol=1e-7, atol=0)
        assert torch.allclose(found.prob_sum_E.double(), stats.prob_sum.double(), rtol=1e-7, atol=0)

        ordered = selection_scores(scores, bias, *groups).sort(-1, descending=True)
        near = ordered.values[:, 2] - ordered.values[:, 3] <= 0.02
        near = near if mask is None else near & mask
        counted = torch.bincount(ordered.indices[near, 2:4].flatten(), minlength=16)
        assert 0 < near.sum() < 50 and torch.equal(found.boundary_count_E, counted)


def test_route_counts_nothing_that_is_not_asked_for():
    found = route(rand(4, 8), torch.zeros(8), 2, "sigmoid")
    assert found[3:] == (None,) * 4 and int(found.tokens_per_expert_E.sum()) == 8
    with pytest.raises(ValueError, match="top_k = 9 is not within 1 and the 8 experts in reach"):
        route(rand(4, 8), torch.zeros(8), 9, "sigmoid")


def test_p11_masked_tokens_get_no_expert():
    mask = torch.tensor([True, False, True, True])
    out = router_topk(rand(4, 8), torch.zeros(8), 2, "sigmoid", token_mask_T=mask)
    assert (out.topk_ids_TK[1] == -1).all() and (out.topk_weights_TK[1] == 0).all()
    assert torch.equal(count_tokens(out.topk_ids_TK, 8), count_tokens(out.topk_ids_TK[mask], 8))
    assert int(count_tokens(out.topk_ids_TK, 8).sum()) == 6


def ids_with_holes():
    ids = torch.tensor([[2, 0], [-1, -1], [0, 1], [2, 3]])
    return ids, sort_by_expert(ids, 5, masked=True)


def test_permutation_is_stable_and_complete():
    ids, p = ids_with_holes()
    assert p.counts_E.tolist() == [2, 1, 2, 1, 0]
    assert ids.reshape(-1)[p.order_R].tolist() == [0, 0, 1, 2, 2, 3]
    assert p.order_R.tolist() == [1, 4, 5, 0, 6, 7]  # stable within an expert
    assert p.inverse_TK.tolist() == [[3, 0], [-1, -1], [1, 2], [4, 5]]


@pytest.mark.parametrize("masked", [False, True])
def test_permute_and_combine_against_a_loop_with_gradients(masked):
    ids = torch.tensor([[2, 0], [1, 3], [0, 1], [2, 3]])
    if masked:
        ids[1] = -1
    p = sort_by_expert(ids, 5, masked)
    x = rand(4, 6, dtype=torch.float64).requires_grad_()
    w = rand(4, 2, seed=1).requires_grad_()
    out = combine(permute(x, p) * 3.0, w, p)
    upstream = rand(4, 6, seed=2, dtype=torch.float64)
    out.backward(upstream)

    real = (ids >= 0).double()
    expected = (w.double() * real).sum(1, keepdim=True) * 3.0 * x
    gx, gw = torch.autograd.grad(expected, [x, w], upstream)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(x.grad, gx, atol=1e-6) and torch.allclose(w.grad, gw.float(), atol=1e-5)


def test_int32_ids_are_sorted_and_counted_like_int64():
    ids, p = ids_with_holes()
    q = sort_by_expert(ids.int(), 5, masked=True)
    assert all(torch.equal(a, b) and b.dtype == torch.int64 for a, b in zip(p[:3], q[:3], strict=True))
    assert torch.equal(count_tokens(ids.int(), 5), p.counts_E)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [2, 16])
def test_tiles_only_move_the_rows_apart_and_what_lies_between_is_zero(tile, masked):
    ids = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(t))[:3] for t in range(11)])
    if masked:
        ids[::3] = -1
    close, p = sort_by_expert(ids, 7, masked), sort_by_expert(ids, 7, masked, tile)
    real = p.order_R >= 0
    assert torch.equal(p.order_R[real], close.order_R) and torch.equal(p.counts_E, close.counts_E)
    assert len(p.order_R) == (33 + 7 * (tile - 1)) // tile * tile and p.padded and not close.padded
    assert torch.equal(p.order_R[p.inverse_TK[ids >= 0]], (ids >= 0).flatten().nonzero()[:, 0])
    ends = padded_ends(p.counts_E, tile)
    assert (ends % tile == 0).all() and torch.equal(padded_ends(p.counts_E, 1), p.counts_E.cumsum(0))
    experts_R = torch.bucketize(torch.arange(len(real)), ends, right=True)
    assert torch.equal(experts_R[real], ids.flatten()[close.order_R])
    starts = ends - ends.diff(prepend=ends.new_zeros(1))
    assert real[starts[p.counts_E > 0]].all()  # rows first, then what is left of the tile

    x, w = rand(11, 6).requires_grad_(), rand(11, 3, seed=1).requires_grad_()
    rows = permute(x, p)
    rows.retain_grad()
    out = combine(rows, w, p)
    found = torch.autograd.grad(out, [x, w, rows], rand(11, 6, seed=2))
    assert (rows[~real] == 0).all() and (found[2][~real] == 0).all()
    plain = combine(permute(x, close), w, close)
    assert torch.equal(out, plain)
    expected = torch.autograd.grad(plain, [x, w], rand(11, 6, seed=2))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("counts", [[[3, 0, 2], [1, 4, 0]], [[0, 0], [0, 0]], [[5]], [[0, 7, 0, 1], [2, 0, 0, 0]]])
def test_regroup_is_the_sort_of_the_rows_local_experts(counts):
    counts_pe = torch.tensor(counts)
    ranks, local = counts_pe.shape
    expert_of_row = torch.arange(local).repeat(ranks).repeat_interleave(counts_pe.view(-1))
    expected = sort_by_expert(expert_of_row[:, None], local)
    found = regroup(counts_pe, int(counts_pe.sum()))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))


def test_p32_permute_refuses_what_does_not_fit():
    ids, p = ids_with_holes()
    with pytest.raises(ValueError, match=r"topk_ids is torch.float32: give int32 or int64"):
        sort_by_expert(ids.float(), 5)
    with pytest.raises(ValueError, match=r"topk_ids is torch.int16: give int32 or int64"):
        count_tokens(ids.short(), 5)
    with pytest.raises(ValueError, match="num_experts = 0: give at least 1"):
        count_tokens(ids, 0)
    with pytest.raises(ValueError, match=r"topk_ids_TK is \(4, 6\): give \[T, K\] with 1 <= K <= 5 experts"):
        sort_by_expert(torch.zeros(4, 6, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"topk_ids_TK is \(4,\)"):
        sort_by_expert(ids[:, 0], 5)
    with pytest.raises(ValueError, match="tile = 0: give at least 1"):
        sort_by_expert(ids, 5, tile=0)
    with pytest.raises(ValueError, match=r"x_TD is \(3, 6\): give \[T, D\] with T = 4"):
        permute(rand(3, 6), p)
    with pytest.raises(ValueError, match="x_TD is on meta: give it on cpu"):
        permute(rand(4, 6).to("meta"), p)
    with pytest.raises(ValueError, match=r"counts_pe is torch.int64 \(3,\), rows = 6"):
        regroup(torch.tensor([1, 2, 3]), 6)
    with pytest.raises(ValueError, match=r"rows_RD is \(7, 6\): give \[R, D\] with R = 6"):
        combine(rand(7, 6), rand(4, 2), p)


def test_combine_of_bfloat16_rows_is_summed_in_float32_and_rounded_once():
    ids = torch.arange(8).repeat(64, 1)
    p = sort_by_expert(ids, 8)
    rows, weights = rand(512, 16).bfloat16(), rand(64, 8, seed=1).sigmoid()
    exact = (weights.double()[:, :, None] * rows.double()[p.inverse_TK]).sum(1)
    out = combine(rows, weights, p)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()  # half a unit in the last place


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_p18_grouped_gemm_with_empty_groups(counts, dtype):
    tokens = torch.tensor(counts)
    x = rand(sum(counts), 16, dtype=dtype).requires_grad_()
    w = rand(4, 8, 16, seed=1, dtype=dtype).requires_grad_()
    out = grouped_gemm(x, w, tokens)
    out.float().square().sum().backward()
    x2, w2 = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    expected = grouped_gemm_reference(x2, w2, tokens)
    expected.float().square().sum().backward()
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(out, expected, **close)
    assert torch.allclose(x.grad, x2.grad, **close) and torch.allclose(w.grad, w2.grad, **close)
    assert w.grad is not None and (w.grad[tokens == 0] == 0).all()


COUNTS = [
    [300, 0, 37, 129, 46],
    [0, 512, 0, 0, 0],
    [1, 2, 3, 4, 502],
    [500, 1, 1, 1, 1],
    [16, 16, 16, 16, 0],
    [0] * 5,
    [9],
]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("past", [0, 8])  # rows past the last group
def test_products_of_padded_groups_are_those_of_the_groups(counts, past, monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    used, tokens = sum(counts), torch.tensor(counts)
    rows, grad = rand(used + past, 24, dtype=torch.bfloat16), rand(used + past, 16, seed=1, dtype=torch.bfloat16)
    rows[used:] = torch.nan
    for weight in (
        rand(len(counts), 16, 24, seed=2, dtype=torch.bfloat16),
        rand(len(counts), 24, 16, seed=3, dtype=torch.bfloat16).mT,
    ):
        found = grouped_gemm_cpu.forward(rows, weight, tokens)
        exact = grouped_gemm_reference(rows.double(), weight.double(), tokens)
        assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-3) and (found[used:] == 0).all()
    found = grouped_gemm_cpu.weight_gradient(grad, rows, tokens)
    parts = zip(grad[:used].double().split(counts), rows[:used].double().split(counts), strict=True)
    exact = torch.stack([g.T @ r for g, r in parts])
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-3) and (found[tokens == 0] == 0).all()


def test_padded_groups_have_few_sizes_and_little_waste(monkeypatch):
    sizes = {grouped_gemm_cpu.padded_size(n) for n in range(1, 4097)}
    assert len(sizes) == 8 + 8 * 5 and all(grouped_gemm_cpu.padded_size(size) == size for size in sizes)
    assert all(n <= grouped_gemm_cpu.padded_size(n) <= max(n + 15, 1.125 * n) for n in range(4097))
    shapes, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: shapes.add((*a.shape, b.shape[1])) or mm(a, b, **k))
    x = rand(2048, 24, dtype=torch.bfloat16).requires_grad_()
    w = rand(8, 16, 24, seed=1, dtype=torch.bfloat16).requires_grad_()
    for seed in range(40):
        cuts = torch.randint(0, 2048, (7,), generator=torch.Generator().manual_seed(seed)).sort().values
        counts = torch.cat([cuts, cuts.new_tensor([2048])]).diff(prepend=cuts.new_zeros(1))
        grouped_gemm(x, w, counts).sum().backward()
    assert len(shapes) < 3 * 48  # three products; 40 draws of 8 groups have 300 sizes


def test_grouped_gemm_reference_writes_zeros_past_the_last_group():
    out = grouped_gemm_reference(torch.ones(5, 4), torch.ones(2, 3, 4), torch.tensor([1, 2]))
    assert out.tolist() == [[4.0] * 3] * 3 + [[0.0] * 3] * 2


def test_grouped_gemm_does_not_take_cpu_tensors_to_triton():
    with pytest.raises(ValueError, match="cannot take tensors on cpu"):
        grouped_gemm(torch.ones(5, 8), torch.ones(2, 8, 8), torch.tensor([1, 4]), backend="triton")


def moe_mlp_arguments(dtype=torch.float32, masked=False):
    """T = 40, D = 24, F = 16, e = 6, K = 2."""
    ids = topk_lowest_index(rand(40, 6), 2)
    if masked:
        ids[::3] = -1
    x, weights = rand(40, 24, seed=1, dtype=dtype), rand(40, 2, seed=2).sigmoid()
    w13, w2 = rand(6, 32, 24, seed=3, dtype=dtype) * 0.2, rand(6, 24, 16, seed=4, dtype=dtype) * 0.2
    return x, weights, sort_by_expert(ids, 6, masked), w13, w2


def moe_mlp_run(fn, arguments):
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    out = fn(*leaves)
    upstream = rand(*out.shape, seed=5).to(out.dtype)
    return out, *torch.autograd.grad(out, [a for a in leaves if isinstance(a, torch.Tensor)], upstream)


def moe_mlp_composed(x, weights, p, w13, w2):
    gate, up = grouped_gemm(permute(x, p), w13, p.counts_E).chunk(2, dim=-1)
    return combine(grouped_gemm(F.silu(gate) * up, w2, p.counts_E), weights, p)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.bfloat16, 8e-3), (torch.float64, 1e-15)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_moe_mlp_is_the_layer_s_composition(dtype, tolerance, masked):
    arguments = moe_mlp_arguments(dtype, masked)
    (out, *grads), (expected, *wanted) = (moe_mlp_run(fn, arguments) for fn in (moe_mlp, moe_mlp_composed))
    assert torch.equal(out, expected)
    for found, want in zip(grads, wanted, strict=True):  # it weights the narrow rows, the composition the wide ones
        assert (found - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_moe_mlp_equals_its_reference_with_gradients(masked):
    arguments = moe_mlp_arguments(masked=masked)
    doubled = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
    for found, exact in zip(moe_mlp_run(moe_mlp, arguments), moe_mlp_run(moe_mlp_reference, doubled), strict=True):
        assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_moe_mlp_reference_is_a_loop_over_tokens():
    x, weights, p, w13, w2 = moe_mlp_arguments(torch.float64, masked=True)
    expected = torch.zeros_like(x)
    ends = p.counts_E.cumsum(0)
    for (token, k), row in ((divmod(i, 2), int(row)) for i, row in enumerate(p.inverse_TK.flatten()) if row >= 0):
        expert = int((ends <= row).sum())
        gate, up = (w13[expert] @ x[token]).chunk(2)
        expected[token] += weights[token, k] * (w2[expert] @ (gate * gate.sigmoid() * up))
    assert torch.allclose(moe_mlp_reference(x, weights, p, w13, w2), expected, atol=1e-12)


def test_what_autograd_saves_of_the_composition_is_what_the_table_says():
    x, weights, p, w13, w2 = moe_mlp_arguments(torch.bfloat16)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_mlp(x.requires_grad_(), weights.requires_grad_(), p, w13.requires_grad_(), w2.requires_grad_())
    parameters = sum(saved.pop(w.untyped_storage().data_ptr()) for w in (w13, w2))
    counts = saved.pop(p.counts_E.untyped_storage().data_ptr())
    table = saved_bytes_per_token(24, 16, 2)
    assert counts < 100 and sum(saved.values()) == 40 * table["torch"] and parameters > 0
    assert table == {"moe_mlp": 216, "torch": 264, "permute": 424}


def test_saved_bytes_of_a_large_layer():
    table = saved_bytes_per_token(2048, 1408, 6)  # DeepSeek-V2-Lite's routed experts, in KB a token
    assert {name: value // 1000 for name, value in table.items()} == {"moe_mlp": 38, "torch": 58, "permute": 99}
