"""The losses on the router against numpy, their gradients against closed forms, and that how a step is split changes
nothing. Each test named pNN excludes pitfall NN (CONTRIBUTING.md says where the list comes from)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.permute import count_tokens
from kernels.router_topk import topk_lowest_index
from moe.balance.losses import (
    aux_loss,
    group_aux_loss,
    phi_loss,
    sequence_aux_loss,
    simbal_loss,
    token_shares,
    update_share,
    z_loss,
)
from moe.balance.stats import FIXED_POINT, collect
from moe.observe.load import maxvio

torch.set_num_threads(1)

T, S, D, E, K, G = 48, 6, 10, 8, 2, 4
LINEAR = ["aux", "sequence", "group", "phi"]  # sum_ik c_k p_ik with some c that has no gradient
LOSSES = [*LINEAR, "z"]
ALL = slice(None)


class Case:
    """One optimizer step: tokens, router, padding, selection. Rows 30 to 35 are a sequence without a real token."""

    def __init__(self, score="sigmoid", seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.x_TD = torch.randn(T, D, generator=rng)
        self.weight_ED = (torch.randn(E, D, generator=rng) * 0.5).requires_grad_()
        self.mask_T = torch.rand(T, generator=rng) < 0.7
        self.mask_T[30:36] = False
        self.score = score
        scores_TE = self.scores().detach()
        self.ids_TK = topk_lowest_index(scores_TE, K).masked_fill(~self.mask_T[:, None], -1)
        self.counts_E = count_tokens(self.ids_TK, E)
        self.ema_E = torch.rand(E, generator=rng).softmax(0)

    def logits(self, rows=ALL):
        return self.x_TD[rows] @ self.weight_ED.T

    def scores(self, rows=ALL):
        return self.logits(rows).sigmoid() if self.score == "sigmoid" else self.logits(rows).softmax(-1)

    def loss(self, name, rows=ALL):
        """The sum over the real tokens of these rows, the counts those of the whole step."""
        mask_T = self.mask_T[rows]
        if name == "z":
            return z_loss(self.logits(rows), mask_T)
        return linear_loss(name, self.scores(rows), self.ids_TK[rows], self.counts_E, self.ema_E, mask_T)

    def prices(self, name):
        """c_k of each token [T, E] float64, such that the loss is sum_ik c_ik p_ik; written again."""
        counts, ids = self.counts_E.numpy(), self.ids_TK.numpy()
        if name == "aux":
            row = E * counts / counts.sum()
        elif name == "group":
            row = np.repeat(G * counts.reshape(G, -1).sum(1) / counts.sum(), E // G)
        elif name == "phi":
            row = 1 + np.log(self.ema_E.numpy().astype(np.float64))
        else:
            out = np.zeros((T, E))
            for begin in range(0, T, S):
                chosen = [k for k in ids[begin : begin + S].ravel() if k >= 0]
                for k in chosen:
                    out[begin : begin + S, k] += E / len(chosen)
            return out
        return np.tile(row, (T, 1))

    def closed_form(self, name):
        """The loss and its gradient with respect to the router weight, float64, not divided by the tokens."""
        x, z = self.x_TD.double().numpy(), self.logits().detach().double().numpy()
        mask = self.mask_T.numpy()[:, None]
        soft = np.exp(z - z.max(1, keepdims=True))
        soft /= soft.sum(1, keepdims=True)
        if name == "z":
            lse = np.log(np.exp(z).sum(1, keepdims=True))
            return (mask * lse**2).sum(), (mask * 2 * lse * soft).T @ x
        s = 1 / (1 + np.exp(-z)) if self.score == "sigmoid" else soft
        c, total = self.prices(name), s.sum(1, keepdims=True)
        p = s / total
        mean = (c * p).sum(1, keepdims=True)
        # d/ds_ik = (c_k - sum_j c_j p_ij) / sum_j s_ij, then through the score function.
        by_logit = (c - mean) / total * s * (1 - s) if self.score == "sigmoid" else p * (c - mean)
        return (mask * mean).sum(), (mask * by_logit).T @ x


def linear_loss(name, scores_TE, ids_TK, counts_E, ema_E, mask_T, seq_len=S):
    if name == "aux":
        return aux_loss(scores_TE, counts_E, mask_T)
    if name == "sequence":
        return sequence_aux_loss(scores_TE, ids_TK, seq_len, mask_T)
    if name == "group":
        return group_aux_loss(scores_TE, counts_E, G, mask_T)
    return phi_loss(scores_TE, ema_E, mask_T)


# -- value and gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_is_that_of_the_formula(name, score):
    case = Case(score)
    loss = case.loss(name)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss.detach()) == pytest.approx(case.closed_form(name)[0], rel=1e-5)


@pytest.mark.parametrize("ranks,accumulation", [(1, 1), (1, 4), (2, 2), (4, 1), (1, 8)])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", LOSSES)
def test_p23_gradient_is_the_closed_form_in_every_layout(name, score, ranks, accumulation):
    case = Case(score)
    tokens = int(case.mask_T.sum())
    expected = case.closed_form(name)[1] / tokens
    size, values, grads = T // (ranks * accumulation), [], []
    for rank in range(ranks):
        case.weight_ED.grad = None
        for n in range(accumulation):
            begin = (rank * accumulation + n) * size
            part = case.loss(name, slice(begin, begin + size))
            (part / tokens).backward()
            values.append(float(part.detach()))
        grads.append(case.weight_ED.grad)
    grad = torch.stack(grads).sum(0).numpy()  # what the ranks' all-reduce gives
    assert np.abs(expected).max() > 1e-3  # computed without a gradient is what happened to others
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)
    assert sum(values) == pytest.approx(case.closed_form(name)[0], rel=1e-5)


def test_p23_micro_batch_scope_does_not_scale_with_the_number_of_micro_batches():
    case = Case()
    once = torch.autograd.grad(case.loss("aux") / case.mask_T.sum(), case.weight_ED)[0]
    copies = 5
    for _ in range(copies):  # as many times the same tokens, each micro-batch with its own counts
        (case.loss("aux") / (copies * case.mask_T.sum())).backward()
    assert once.abs().max() > 1e-3
    assert torch.allclose(case.weight_ED.grad, once, rtol=1e-5, atol=1e-9)


def test_global_scope_lets_unequal_micro_batches_cancel():
    # Two micro-batches, each on one half of the experts: together balanced, so that the global scope has no gradient.
    logits = torch.tensor([[3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]]).requires_grad_()
    own, total = torch.tensor([[5, 5, 0, 0], [0, 0, 5, 5]]), torch.tensor([5, 5, 5, 5])
    micro, whole = (
        torch.autograd.grad(sum(aux_loss(logits[n : n + 1].sigmoid(), c[n], None) for n in (0, 1)), logits)[0]
        for c in (own, total.expand(2, 4))
    )
    assert micro.abs().max() > 0.01
    assert whole.abs().max() < 1e-7


@pytest.mark.parametrize("name", LOSSES)
def test_p11_padding_counts_for_nothing_even_when_it_is_nan(name):
    case = Case()
    expected = case.closed_form(name)
    values = (case.logits() if name == "z" else case.scores()).detach()
    values[~case.mask_T] = float("nan")
    values.requires_grad_()
    if name == "z":
        loss = z_loss(values, case.mask_T)
    else:
        loss = linear_loss(name, values, case.ids_TK, case.counts_E, case.ema_E, case.mask_T)
    assert float(loss.detach()) == pytest.approx(expected[0], rel=1e-5)
    (grad,) = torch.autograd.grad(loss, values)
    assert not grad[~case.mask_T].any() and grad[case.mask_T].isfinite().all() and grad.any()


def test_p11_sequence_scope_does_not_count_the_selection_of_padding():
    case = Case()
    everywhere = case.ids_TK.masked_fill(~case.mask_T[:, None], 3)  # a caller that has not masked its ids
    loss = sequence_aux_loss(case.scores(), everywhere, S, case.mask_T)
    assert float(loss.detach()) == pytest.approx(case.closed_form("sequence")[0], rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_mask_every_token_is_real(name):
    case = Case()
    case.mask_T[:] = True
    case.ids_TK = topk_lowest_index(case.scores().detach(), K)
    loss = (
        z_loss(case.logits(), None)
        if name == "z"
        else linear_loss(name, case.scores(), case.ids_TK, case.counts_E, case.ema_E, None)
    )
    assert float(loss.detach()) == pytest.approx(case.closed_form(name)[0], rel=1e-5)


# -- corners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
def test_p35_exact_balance_has_the_least_value_and_no_gradient(name):
    ids_TK = (
        torch.arange(T)[:, None] * K + torch.arange(K)
    ) % E  # balanced in the batch and, with S = 4, in a sequence
    scores_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(3)).requires_grad_()
    counts_E, ema_E = torch.full((E,), T * K // E), torch.full((E,), 1 / E)
    if name == "sequence":
        loss, least = sequence_aux_loss(scores_TE, ids_TK, 4), T
    else:
        loss = linear_loss(name, scores_TE, ids_TK, counts_E, ema_E, None)
        least = T * (1 + np.log(1 / E)) if name == "phi" else T
    assert float(loss.detach()) == pytest.approx(least, rel=1e-5)
    assert torch.autograd.grad(loss, scores_TE)[0].abs().max() < 1e-6


@pytest.mark.parametrize("experts", [8, 256])
@pytest.mark.parametrize("logit", [0.0, -60.0, -95.0, -200.0])  # sigmoid: 0.5, tiny, denormal, 0
@pytest.mark.parametrize("name", LINEAR)
def test_p35_zero_router_and_underflown_scores_are_finite(name, logit, experts):
    logits_TE = torch.full((T, experts), logit).requires_grad_()
    ids_TK = torch.zeros(T, 1, dtype=torch.int64)  # all to one expert: the largest f
    counts_E, ema_E = count_tokens(ids_TK, experts), torch.zeros(experts)
    loss = linear_loss(name, logits_TE.sigmoid(), ids_TK, counts_E, ema_E, None)
    (grad,) = torch.autograd.grad(loss, logits_TE)
    assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() < 1e3


@pytest.mark.parametrize("name", LINEAR)
def test_all_zero_scores_and_a_batch_of_padding_are_finite(name):
    ids_TK = torch.full((T, K), -1)
    for scores_TE, mask_T in (
        (torch.zeros(T, E), None),
        (torch.full((T, E), 0.5), torch.zeros(T, dtype=torch.bool)),
    ):
        scores_TE.requires_grad_()
        loss = linear_loss(name, scores_TE, ids_TK, torch.zeros(E, dtype=torch.int64), torch.zeros(E), mask_T)
        assert float(loss.detach()) == 0.0
        assert torch.autograd.grad(loss, scores_TE)[0].isfinite().all()


def test_wrong_divisors_are_refused():
    scores_TE, ids_TK = torch.rand(10, 6), torch.zeros(10, 2, dtype=torch.int64)
    for seq_len in (3, 0, 20):
        with pytest.raises(ValueError, match=f"seq_len = {seq_len} does not divide the 10 tokens"):
            sequence_aux_loss(scores_TE, ids_TK, seq_len)
    for groups in (4, 0, 12):
        with pytest.raises(ValueError, match=f"num_groups = {groups} does not divide the 6 experts"):
            group_aux_loss(scores_TE, torch.ones(6, dtype=torch.int64), groups)


def test_group_loss_sees_blocks_of_neighbours_and_nothing_inside_them():
    scores_TE = torch.tensor([[0.8, 0.0, 0.1, 0.1]])
    balanced, skewed = torch.tensor([6, 2, 8, 0]), torch.tensor([6, 8, 2, 0])
    assert float(group_aux_loss(scores_TE, balanced, 2)) == pytest.approx(1.0)
    assert float(group_aux_loss(scores_TE, skewed, 2)) == pytest.approx(2 * (14 / 16 * 0.8 + 2 / 16 * 0.2))
    assert torch.equal(group_aux_loss(scores_TE, skewed, 4), aux_loss(scores_TE, skewed, None))


# -- phi-balancing and SimBal ------------------------------------------------------------------------------------------


def test_update_share_is_an_exponential_mean_that_skips_empty_batches():
    ema_E = torch.tensor([0.5, 0.25, 0.25])
    new_E = update_share(ema_E, torch.tensor([1.0, 3.0, 6.0]), 10, 0.1)
    assert torch.allclose(new_E, torch.tensor([0.46, 0.255, 0.285])) and new_E.dtype == torch.float32
    assert torch.equal(update_share(ema_E, torch.zeros(3), 0, 0.1), ema_E)
    both_LE = update_share(ema_E.expand(2, 3), torch.tensor([[1, 3, 6], [0, 0, 0]]), torch.tensor([10, 0]), 0.1)
    assert torch.equal(both_LE, torch.stack([new_E, ema_E]))


def test_update_share_takes_the_routers_statistics():
    case = Case()
    scores_TE = case.scores().detach()
    stats = collect({"prob_sum"}, scores_TE, torch.zeros(E), case.ids_TK, case.counts_E, case.mask_T)
    mean_E = token_shares(scores_TE, case.mask_T).sum(0) / case.mask_T.sum()
    assert torch.allclose(
        update_share(torch.zeros(E), stats.prob_sum / FIXED_POINT, stats.tokens, 1.0), mean_E, atol=1e-6
    )


def test_phi_loss_pushes_from_the_often_to_the_rarely_used():
    scores_TE = torch.full((1, 3), 0.5).requires_grad_()
    (grad,) = torch.autograd.grad(phi_loss(scores_TE, torch.tensor([0.6, 0.3, 0.1])), scores_TE)
    assert grad[0, 0] > grad[0, 1] > grad[0, 2] and grad[0, 0] > 0 > grad[0, 2]


def test_simbal_value_gradient_and_orientation():
    weight_ED = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    R = weight_ED.detach().double().numpy().T  # [D, E], as in the paper
    excess = R.T @ R - np.eye(3)
    loss = simbal_loss(weight_ED)
    assert float(loss.detach()) == pytest.approx(sum(abs(v) for v in excess.ravel()), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, weight_ED)
    np.testing.assert_allclose(grad.numpy(), (2 * R @ np.sign(excess)).T, rtol=1e-5)


def test_simbal_rests_at_orthonormal_experts():
    weight_ED = torch.eye(4, 6).requires_grad_()
    loss = simbal_loss(weight_ED)
    assert float(loss.detach()) == 0.0
    assert torch.autograd.grad(loss, weight_ED)[0].isfinite().all()
    assert simbal_loss(torch.eye(4, 6).bfloat16()).dtype == torch.float32


# -- what the losses are for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", LINEAR)
def test_sgd_on_the_loss_alone_balances_a_skewed_router(name, score):
    tokens = 384
    rng = torch.Generator().manual_seed(5)
    x_TD = torch.randn(tokens, D, generator=rng)
    x_TD[:, 0] = 1.0  # a constant feature: the router can learn a preference for experts, and unlearn it
    weight_ED = 0.5 * torch.randn(E, D, generator=rng)
    weight_ED[:, 0] = torch.linspace(-1.5, 1.5, E)
    weight_ED.requires_grad_()
    ema_E, history = torch.full((E,), 1 / E), []
    for _ in range(60):
        logits_TE = x_TD @ weight_ED.T
        scores_TE = logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)
        ids_TK = topk_lowest_index(scores_TE.detach(), K)
        counts_E = count_tokens(ids_TK, E)
        # The group loss balances groups and nothing inside them.
        history.append(float(maxvio(counts_E.view(G, -1).sum(-1) if name == "group" else counts_E)))
        ema_E = update_share(ema_E, token_shares(scores_TE.detach(), None).sum(0), tokens, 0.5)
        # Sequences of 6 tokens would do harm: a token's own choice is a sixth of f, and pushes its scores to ties.
        loss = linear_loss(name, scores_TE, ids_TK, counts_E, ema_E, None, seq_len=96) / tokens
        (grad,) = torch.autograd.grad(loss, weight_ED)
        with torch.no_grad():
            weight_ED -= grad
    assert history[0] > 1.0
    assert history[-1] < 0.5 * history[0]
