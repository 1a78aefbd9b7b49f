"""Batch-solving routing against scipy and brute force, and every claim of METHODS against the routing itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from kernels.permute import count_tokens
from kernels.router_topk import topk_lowest_index
from moe.balance.assignment import (
    METHODS,
    base_route,
    bip_bias,
    bip_route,
    expert_choice_route,
    hash_route,
    sinkhorn_log_plan,
    sinkhorn_route,
)
from moe.balance.quantile import quantile_bias
from moe.observe.load import maxvio

torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed_scores(tokens, experts, seed=0):
    return (normal(tokens, experts, seed=seed) + normal(experts, seed=seed + 1)).sigmoid()


def load_maxvio(ids_TK, experts):
    return float(maxvio(count_tokens(ids_TK, experts)))


# -- METHODS says the truth --------------------------------------------------------------------------------------------

EXPERTS, TOP_K = 8, 2
BIAS_E = 0.2 * normal(EXPERTS, seed=9)


def route(name, logits_TE):
    """The experts of each token, as a [T, E] mask. The id of a token, for the hash, is read from its scores."""
    scores_TE = logits_TE.sigmoid()
    tokens = len(scores_TE)
    if name == "expert_choice":
        return expert_choice_route(scores_TE, max(1, tokens * TOP_K // EXPERTS)).mask_TE
    if name == "sinkhorn":
        ids = sinkhorn_route(logits_TE, TOP_K)
    elif name == "base":
        ids = base_route(scores_TE)
    elif name in ("bip", "bip_leaky"):
        ids = bip_route(scores_TE, BIAS_E, TOP_K, 4, leaky=name == "bip_leaky").topk_ids_TK
    elif name == "hash":
        ids = hash_route((scores_TE[:, 0] * 1000).long(), EXPERTS, TOP_K, seed=0)
    else:
        ids = topk_lowest_index(scores_TE + BIAS_E, TOP_K)
    return torch.zeros(tokens, EXPERTS, dtype=torch.bool).scatter(1, ids, True)


def inference(name, logits_T):
    """How one token is routed at inference, where the method has its own rule there; else the method on it alone."""
    if name in ("sinkhorn", "base"):
        ids = topk_lowest_index(logits_T, TOP_K if name == "sinkhorn" else 1)
        return torch.zeros(1, EXPERTS, dtype=torch.bool).scatter(1, ids, True)
    return route(name, logits_T)


@pytest.mark.parametrize("name", [*METHODS, "plain"])
def test_a_later_token_changes_an_earlier_ones_experts_only_where_declared(name):
    leaks = False
    for seed in range(8):
        logits_TE = normal(32, EXPERTS, seed=seed)
        changed_TE = logits_TE.clone()
        changed_TE[16:] = normal(16, EXPERTS, seed=100 + seed) + 2 * normal(EXPERTS, seed=200 + seed)
        before, after = route(name, logits_TE), route(name, changed_TE)
        assert not torch.equal(before[16:], after[16:])  # the change is one
        leaks |= not torch.equal(before[:16], after[:16])
    assert leaks == (name in METHODS and not METHODS[name].causal)


def test_expert_choice_leaks_from_the_last_token_to_the_first():
    scores_TE = torch.tensor([[0.6, 0.1], [0.5, 0.9], [0.1, 0.2]])
    before = expert_choice_route(scores_TE, 1).mask_TE
    scores_TE[2, 0] = 0.7
    after = expert_choice_route(scores_TE, 1).mask_TE
    assert before[0].tolist() == [True, False] and after[0].tolist() == [False, False]


@pytest.mark.parametrize("name", METHODS)
def test_inference_routes_as_training_only_where_declared(name):
    same = True
    for seed in range(4):
        logits_TE = normal(24, EXPERTS, seed=seed) + normal(EXPERTS, seed=50 + seed)
        alone = torch.cat([inference(name, logits_TE[i : i + 1]) for i in range(24)])
        same &= torch.equal(alone, route(name, logits_TE))
    assert same == METHODS[name].matches_inference


def test_every_leak_is_written_on_the_label():
    for method in METHODS.values():
        assert method.causal != ("future tokens" in method.label)


# -- Sinkhorn ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens,experts", [(40, 8), (7, 3), (3, 7)])
def test_sinkhorn_rows_and_columns_are_normalised(tokens, experts):
    logits_TE = 2 * normal(tokens, experts)
    plan = sinkhorn_log_plan(logits_TE, iterations=1000, tolerance=1e-6).exp()
    assert torch.allclose(plan.sum(0), torch.full((experts,), 1 / experts).double(), rtol=1e-9)
    assert torch.allclose(plan.sum(1), torch.full((tokens,), 1 / tokens).double(), rtol=2e-6)


def test_sinkhorn_plan_is_exp_logits_up_to_scaling_and_routes_by_it():
    logits_TE = normal(40, 8) + normal(8, seed=1)
    log_plan = sinkhorn_log_plan(logits_TE)
    scale = log_plan - logits_TE.double()
    scale = scale - scale[:, :1] - scale[:1] + scale[0, 0]
    assert scale.abs().max() < 1e-9  # row + column terms only
    # As published: both vectors of scales, on exp(logits) itself.
    cost, columns = logits_TE.double().exp(), torch.ones(8).double()
    for _ in range(300):
        rows = 1 / (40 * (cost * columns).sum(1, keepdim=True))
        columns = 1 / (8 * (cost * rows).sum(0))
    published = (cost * rows * columns).topk(2).indices
    assert torch.equal(sinkhorn_route(logits_TE, 2, iterations=300, tolerance=1e-7), published)


def test_sinkhorn_balances_better_than_top_k_and_stops_early():
    logits_TE = normal(512, 16) + normal(16, seed=1)
    plain = load_maxvio(topk_lowest_index(logits_TE, 2), 16)
    assert plain > 1.5
    assert load_maxvio(sinkhorn_route(logits_TE, 2), 16) < 0.25 * plain
    once, loose, tight = (sinkhorn_log_plan(logits_TE, n, t) for n, t in ((1, 0.0), (100, 10.0), (100, 1e-9)))
    assert torch.equal(once, loose) and not torch.allclose(once, tight)


def test_sinkhorn_survives_logits_that_overflow_exp():
    logits_TE = 300 * normal(64, 8)
    assert sinkhorn_log_plan(logits_TE).isfinite().all()
    ids = sinkhorn_route(logits_TE, 2)
    assert (ids[:, 0] != ids[:, 1]).all()
    assert load_maxvio(ids, 8) <= load_maxvio(topk_lowest_index(logits_TE, 2), 8)


# -- BASE --------------------------------------------------------------------------------------------------------------


def best_total(scores_TE, capacity):
    """The optimum with `capacity` places per expert, each expert's column repeated."""
    places = np.repeat(scores_TE.double().numpy(), capacity, axis=1)
    rows, columns = linear_sum_assignment(places, maximize=True)
    return places[rows, columns].sum()


@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("tokens,experts", [(48, 6), (50, 6), (5, 8), (64, 2), (9, 9)])
def test_base_is_optimal_within_eps_and_balanced(tokens, experts, eps):
    capacity = -(-tokens // experts)
    for seed in range(3):
        scores_TE = normal(tokens, experts, seed=seed) + 2 * normal(experts, seed=90 + seed)
        ids_T1 = base_route(scores_TE, eps)
        assert ids_T1.shape == (tokens, 1) and ids_T1.dtype == torch.int64
        counts = count_tokens(ids_T1, experts)
        assert int(counts.sum()) == tokens and int(counts.max()) <= capacity
        if tokens % experts == 0:
            assert counts.tolist() == [capacity] * experts
        total = float(scores_TE.double().gather(1, ids_T1).sum())
        best = best_total(scores_TE, capacity)
        assert best - eps * experts * capacity <= total <= best + 1e-9


def test_base_equals_brute_force():
    scores_TE = normal(6, 3, seed=4)
    balanced = [a for a in itertools.product(range(3), repeat=6) if sorted(a) == [0, 0, 1, 1, 2, 2]]
    best = max(balanced, key=lambda a: sum(float(scores_TE[i, k]) for i, k in enumerate(a)))
    assert base_route(scores_TE, 1e-5)[:, 0].tolist() == list(best)


@pytest.mark.parametrize("scores_TE", [torch.zeros(32, 4), torch.eye(4).repeat(8, 1), torch.ones(33, 4), normal(5, 1)])
def test_base_ends_on_ties_and_one_expert(scores_TE):
    tokens, experts = scores_TE.shape
    capacity = -(-tokens // experts)
    ids_T1 = base_route(scores_TE, eps=1e-30)  # far below the rounding of prices
    assert int(count_tokens(ids_T1, experts).max()) <= capacity
    assert float(scores_TE.gather(1, ids_T1).sum()) == pytest.approx(best_total(scores_TE, capacity), abs=1e-5)


def test_base_refuses_what_it_would_not_end_on():
    with pytest.raises(ValueError, match="eps = 0"):
        base_route(torch.rand(4, 2), eps=0)
    with pytest.raises(ValueError, match="finite scores"):
        base_route(torch.tensor([[0.1, float("nan")], [0.3, 0.2]]))


# -- expert choice -----------------------------------------------------------------------------------------------------


def test_expert_choice_is_exactly_balanced_and_takes_the_best():
    scores_TE = skewed_scores(40, 8)
    mask_TE, ids_TK = expert_choice_route(scores_TE, 10)
    assert mask_TE.sum(0).tolist() == [10] * 8
    assert ids_TK.shape == (40, 8) and ids_TK.dtype == torch.int64
    for k in range(8):
        taken = mask_TE[:, k]
        assert scores_TE[taken, k].min() > scores_TE[~taken, k].max()
    assert torch.equal(count_tokens(ids_TK, 8), torch.full((8,), 10))
    assert torch.equal(ids_TK >= 0, mask_TE)
    assert (ids_TK == torch.arange(8))[mask_TE].all()


def test_expert_choice_gives_ties_to_the_first_tokens_and_refuses_too_much():
    assert expert_choice_route(torch.zeros(5, 2), 2).mask_TE.tolist() == [[True] * 2] * 2 + [[False] * 2] * 3
    assert not expert_choice_route(torch.zeros(5, 2), 0).mask_TE.any()
    with pytest.raises(ValueError, match="capacity = 6 is not a number of the 5 tokens"):
        expert_choice_route(torch.zeros(5, 2), 6)


# -- BIP ---------------------------------------------------------------------------------------------------------------


def test_bip_against_its_formula():
    scores, q = skewed_scores(30, 6).double().numpy(), np.array([0.3, 0.0, 0.1, 0.0, 0.0, 0.2])
    bias_E = bip_bias(torch.from_numpy(scores).float(), -torch.from_numpy(q), 2, 3)
    for _ in range(3):
        p = [max(0.0, sorted(row - q)[-3]) for row in scores]  # K = 2: the third
        q = np.array([max(0.0, sorted(scores[:, k] - p)[-11]) for k in range(6)])  # K T / E = 10: the eleventh
    assert bias_E.dtype == torch.float32
    np.testing.assert_allclose(bias_E.numpy(), -q, atol=1e-6)


def test_bip_prices_are_costs_when_clipped_and_quantile_balancing_when_not():
    scores_TE, bias_E = skewed_scores(200, 8), 0.1 * normal(8)
    clipped, free = (bip_bias(scores_TE, bias_E, 2, 1, clip=clip) for clip in (True, False))
    assert (clipped <= 0).all() and (clipped < 0).any()
    assert (free > 0).any()
    assert torch.allclose(free, quantile_bias(scores_TE, bias_E, 2))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_bip_reduces_maxvio(top_k):
    scores_TE, zero_E = skewed_scores(512, 16), torch.zeros(16)
    routing = bip_route(scores_TE, zero_E, top_k, 8, leaky=True)
    plain = load_maxvio(topk_lowest_index(scores_TE, top_k), 16)
    assert load_maxvio(routing.topk_ids_TK, 16) < 0.2 * plain
    # The causal order is plain top K on the first batch; its prices serve the second, drawn from the same law.
    first = bip_route(scores_TE, zero_E, top_k, 8, leaky=False)
    assert torch.equal(first.topk_ids_TK, topk_lowest_index(scores_TE, top_k))
    assert torch.equal(first.bias_E, routing.bias_E)
    fresh_TE = (normal(512, 16, seed=7) + normal(16, seed=1)).sigmoid()
    second = bip_route(fresh_TE, first.bias_E, top_k, 8, leaky=False)
    assert load_maxvio(second.topk_ids_TK, 16) < 0.4 * load_maxvio(topk_lowest_index(fresh_TE, top_k), 16)


def test_bip_converges_to_the_optimum_of_the_linear_program():
    tokens, experts, top_k = 24, 4, 1
    scores_TE = skewed_scores(tokens, experts, seed=3)
    bias_E = bip_bias(scores_TE, torch.zeros(experts), top_k, 200)
    solution = linprog(
        -scores_TE.double().numpy().ravel(),
        A_ub=np.concatenate([np.kron(np.eye(tokens), np.ones(experts)), np.kron(np.ones(tokens), np.eye(experts))]),
        b_ub=[top_k] * tokens + [tokens * top_k / experts] * experts,
        bounds=(0, 1),
    )

    # The dual value of the prices bounds the optimum from above, and zero prices do so badly.
    def dual(b_E):
        return float((scores_TE + b_E).topk(top_k).values.clamp_min(0).sum() - tokens * top_k / experts * b_E.sum())

    assert -solution.fun - 1e-4 <= dual(bias_E) <= -solution.fun + 0.05
    assert dual(torch.zeros(experts)) > -solution.fun + 0.5


def test_bip_refuses_k_of_all_experts():
    with pytest.raises(ValueError, match="top_k = 4 of 4 experts"):
        bip_bias(torch.rand(8, 4), torch.zeros(4), 4, 1)


# -- hash --------------------------------------------------------------------------------------------------------------


def test_hash_is_a_function_of_id_and_seed_with_distinct_experts():
    ids_T = torch.randint(0, 50_000, (300,), generator=torch.Generator().manual_seed(0))
    experts_TK = hash_route(ids_T, 16, 4, seed=3)
    assert experts_TK.shape == (300, 4) and experts_TK.dtype == torch.int64
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 16 for row in experts_TK.tolist())
    assert torch.equal(hash_route(ids_T.flip(0), 16, 4, seed=3).flip(0), experts_TK)
    assert torch.equal(hash_route(ids_T[:1], 16, 4, seed=3), experts_TK[:1])
    for seed in (0, 1, 2, 4, 2**40):
        # Two independent sets of 4 of 16 share each expert with chance 1/4.
        other = hash_route(ids_T, 16, 4, seed=seed)
        shared = (experts_TK[:, :, None] == other[:, None, :]).any(-1).float().mean()
        assert 0.18 < float(shared) < 0.32
    # What a release routes, the next must route too.
    assert hash_route(torch.tensor([0, 1, 2**31]), 8, 2, seed=0).tolist() == [[1, 3], [4, 3], [1, 4]]


def test_hash_is_roughly_balanced_over_the_ids_and_over_pairs_of_experts():
    experts_TK = hash_route(torch.arange(16_384), 16, 2, seed=0)
    assert load_maxvio(experts_TK, 16) < 0.08  # 2048 an expert: about 4 standard deviations
    assert load_maxvio(experts_TK[:, :1], 16) < 0.12
    pairs = experts_TK.sort(-1).values @ torch.tensor([16, 1])
    counts = pairs.bincount(minlength=256)
    assert int((counts > 0).sum()) == 120 and int(counts.max()) < 1.5 * 16_384 / 120


def test_hash_refuses_more_experts_than_there_are():
    with pytest.raises(ValueError, match="top_k = 5 is not a number of the 4 experts"):
        hash_route(torch.arange(3), 4, 5, seed=0)
    assert sorted(hash_route(torch.arange(1), 4, 4, seed=0)[0].tolist()) == [0, 1, 2, 3]
