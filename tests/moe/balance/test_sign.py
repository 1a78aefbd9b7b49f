"""The bias update. Each test named pNN excludes pitfall NN (CONTRIBUTING.md says where the list comes from)."""

from __future__ import annotations

import pytest
import torch

from moe.balance import build_balancer
from moe.balance.bias import sign_direction
from moe.balance.losses import aux_loss, z_loss
from moe.balance.stats import RouterStats, add, flatten, unflatten, zeros
from moe.config import BalanceSection


def balancer(layers=(1, 2), experts=4, **settings):
    return build_balancer(BalanceSection(**{"method": "sign", "rate": 0.01, **settings}), layers, experts, 2)


def stats(*loads):
    counts = torch.tensor(loads, dtype=torch.int64)
    return RouterStats(counts.sum(-1) // 2, counts)


def test_sign_rule_against_its_formula():
    b = balancer(centre=False)
    b.step(stats([10, 6, 8, 8], [0, 20, 5, 7]))
    expected = torch.tensor([[-0.01, 0.01, 0.0, 0.0], [0.01, -0.01, 0.01, 0.01]])
    assert torch.equal(b.bias_LE, expected)


def test_p37_balanced_expert_does_not_move():
    assert sign_direction(torch.tensor([[8, 8, 10, 6]])).tolist() == [[0.0, 0.0, -1.0, 1.0]]
    # a target that is no integer: nobody is balanced
    assert sign_direction(torch.tensor([[3, 3, 2, 2]])).tolist() == [[-1.0, -1.0, 1.0, 1.0]]


def test_p17_counts_are_exact_above_2_to_24():
    big = 2**24
    # In float32 both counts would round to the target and nothing would move.
    assert sign_direction(torch.tensor([[big + 1, big - 1]])).tolist() == [[-1.0, 1.0]]
    total = add(stats([big, 1]), stats([1, big]))
    assert total.tokens_per_expert.dtype == torch.int64
    assert total.tokens_per_expert.tolist() == [[big + 1, big + 1]]


def test_p09_mean_does_not_drift():
    b = balancer(layers=(0,))
    for step in range(10_000):  # the loaded expert rotates: the bias stays of the size that scores have
        b.step(stats([5 if k == step % 4 else 1 for k in range(4)]))
    assert b.bias_LE.mean().abs() < 1e-6
    drifting = balancer(layers=(0,), centre=False)
    for _ in range(100):
        drifting.step(stats([5, 1, 1, 1]))
    assert drifting.bias_LE.mean() > 0.4  # the test can see drift


def test_layer_without_tokens_is_not_updated():
    b = balancer(centre=False)
    b.bias_LE[1] = 0.25
    b.step(stats([5, 1, 1, 1], [0, 0, 0, 0]))
    assert b.bias_LE[1].tolist() == [0.25] * 4


def test_p36_step_counter_is_saved_and_restored():
    b = balancer()
    for _ in range(3):
        b.step(stats([5, 1, 1, 1], [1, 1, 1, 5]))
    other = balancer()
    other.load_state_dict({k: v.clone() for k, v in b.state_dict().items()})
    assert int(other.step_count) == 3
    b.step(stats([1, 5, 1, 1], [1, 5, 1, 1]))
    other.step(stats([1, 5, 1, 1], [1, 5, 1, 1]))
    assert torch.equal(b.bias_LE, other.bias_LE) and b.step_count == other.step_count


def test_state_that_does_not_fit_is_refused_and_changes_nothing():
    b = balancer()
    b.step(stats([5, 1, 1, 1], [1, 1, 1, 5]))
    before = b.bias_LE.clone()
    with pytest.raises(ValueError, match=r"balance\.method = 'sign'"):
        b.load_state_dict(balancer(experts=8).state_dict())
    assert torch.equal(b.bias_LE, before)


def test_none_never_moves():
    b = build_balancer(BalanceSection(method="none"), [0], 4, 2)
    b.step(stats([5, 1, 1, 1]))
    assert b.bias_LE.abs().sum() == 0


def test_flatten_is_one_vector_and_inverts():
    s = RouterStats(torch.tensor([3, 4]), torch.arange(8).view(2, 4))
    flat = flatten(s)
    assert flat.shape == (10,) and flat.dtype == torch.int64
    back = unflatten(flat, zeros(2, 4))
    assert torch.equal(back.tokens, s.tokens) and torch.equal(back.tokens_per_expert, s.tokens_per_expert)
    full = s._replace(dual_sum=torch.tensor([7, 9]), response_histogram=torch.arange(24).view(2, 4, 3))
    back = unflatten(flatten(full), full)
    assert all(torch.equal(a, b) if b is not None else a is None for a, b in zip(back, full, strict=True))


def test_aux_loss_against_its_formula_and_its_minimum():
    scores = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([40, 20, 20, 20])
    p = scores / scores.sum(-1, keepdim=True)
    expected = 50 * 4 * sum((counts[k] / 100) * p[:, k].mean() for k in range(4))
    assert torch.allclose(aux_loss(scores, counts, None), expected)
    uniform = aux_loss(torch.full((50, 4), 0.3), torch.full((4,), 25), None)
    assert torch.allclose(uniform, torch.tensor(50.0))  # value 1 per token at balance


def test_p11_losses_ignore_masked_tokens():
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(10) < 6
    counts = torch.tensor([3, 3, 3, 3])
    assert torch.allclose(z_loss(logits, mask), z_loss(logits[:6], None))
    assert torch.allclose(aux_loss(logits.sigmoid(), counts, mask), aux_loss(logits[:6].sigmoid(), counts, None))


def test_p35_losses_are_finite_at_exact_balance_and_at_zero_scores():
    scores = torch.zeros(8, 4, requires_grad=True)
    loss = aux_loss(scores, torch.full((4,), 4), None)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()
