"""The same numbers as public code: Megatron-core's bias update, losses, group-limited selection and Sinkhorn plan."""

from __future__ import annotations

import pytest
import torch

from kernels.permute import count_tokens
from kernels.router_topk import selection_scores, topk_lowest_index
from moe.balance import build_balancer
from moe.balance.assignment import sinkhorn_log_plan
from moe.balance.losses import aux_loss, z_loss
from moe.balance.stats import RouterStats
from moe.config import BalanceSection
from moe.parallel import build_ranks
from tests.ranks import run_ranks
from tests.tiny import CPU

moe_utils = pytest.importorskip(
    "megatron.core.transformer.moe.moe_utils", reason="needs megatron-core: pip install 'alf-moe[megatron]'"
)
T, E, K = 120, 8, 3


def logits(seed=0):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) + torch.linspace(0, 1, E)


def _three_updates(rank, n):
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    ranks, theirs_E = build_ranks(rank, n, CPU, 1), torch.zeros(E)
    ours = build_balancer(BalanceSection(method="sign", rate=1e-3, centre=False), [0], E, K)
    for step in range(3):
        counts_E = torch.randint(0, 50, (E,), generator=torch.Generator().manual_seed(10 * step + rank))
        # In place and over the data-parallel group; it wants float counts.
        theirs_E = moe_utils.get_updated_expert_bias(counts_E.float(), theirs_E, 1e-3)
        stats = RouterStats(counts_E.sum()[None] // K, counts_E[None])
        ours.step(ranks.start_balance_sum(stats).wait()[0])
    return theirs_E.tolist(), ours.bias_LE[0].tolist()


def test_sign_rule_is_get_updated_expert_bias_over_two_ranks():
    for theirs, ours in run_ranks(_three_updates, 2):
        assert theirs == pytest.approx(ours, abs=1e-9) and max(map(abs, ours)) > 1e-3


def test_aux_loss_is_switch_load_balancing_loss():
    scores = logits().softmax(-1)
    counts = count_tokens(topk_lowest_index(scores, K), E)
    theirs = moe_utils.switch_load_balancing_loss_func(
        scores, counts, total_num_tokens=T, topk=K, num_experts=E, moe_aux_loss_coeff=0.01
    )
    assert float(0.01 * aux_loss(scores, counts, None) / T) == pytest.approx(float(theirs), rel=1e-5)


def test_z_loss_is_theirs():
    z = logits()
    mask = torch.arange(T) % 3 > 0
    theirs = moe_utils.z_loss_func(z, 0.01, padding_mask=~mask)
    assert float(0.01 * z_loss(z, mask) / mask.sum()) == pytest.approx(float(theirs), rel=1e-5)


def test_group_limited_selection_is_theirs():
    # Theirs sums the K / G' best of a group; that is the published sum of two for K = 2 G'.
    scores = torch.cat([logits(0), logits(1)], dim=1).sigmoid()
    _, theirs = moe_utils.group_limited_topk(scores, 4, T, 2 * E, num_groups=4, group_topk=2)
    ours = topk_lowest_index(selection_scores(scores, torch.zeros(2 * E), 4, 2), 4)
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


def test_sinkhorn_plan_is_theirs():
    theirs = moe_utils.sinkhorn(logits(), tol=1e-7)
    ours = sinkhorn_log_plan(logits(), iterations=1000, tolerance=1e-7).exp()
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-3, atol=1e-7)
