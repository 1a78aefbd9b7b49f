"""Properties 1-6 of docs/theory.md, and regret, on the project's own rules.

Drawn scores are multiples of 2**-17 and step sizes are chosen such that biases are as coarse: all sums of the two are then
exact, in the rules' float32 too, and ties are real and go to the lowest expert.
Letters: T tokens, E experts, K experts per token, S seeds, N steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels.permute import count_tokens
from moe.balance import build_balancer
from moe.balance.dual import (
    boundary_curvature,
    curvature_iid,
    dual_gradient,
    dual_value,
    lagrangian_change,
    regret_bound_constant,
    regret_bound_log,
    regret_bound_sqrt,
)
from moe.balance.stats import collect, stack
from moe.balance.streams import KINDS, stream
from moe.config import RATES, BalanceSection
from tests.moe.balance.test_rules import RULES

examples = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def batches(draw, most_experts=8):
    """Scores [T, E] >= 0 and K: fine or with many ties, experts alike or not."""
    # One seed for all numbers: drawn one by one, most of them are 0 or 1, which test little.
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    E, T = int(rng.integers(2, most_experts, endpoint=True)), int(rng.integers(1, 40))
    raw = rng.integers(0, 2**16, (T, E))
    grain = draw(st.sampled_from([1, 2**8, 2**13]))
    skew = torch.arange(E) / 8 if draw(st.booleans()) else 0.0
    return torch.from_numpy(raw // grain * grain / 2**17) + skew, int(rng.integers(1, E))


rates = st.sampled_from([2.0**-n for n in range(4, 11)])


def select(scores_TE, bias_E, top_k):
    """x [T, E] in {0, 1}."""
    ids = np.argsort(-(scores_TE + bias_E).numpy(), axis=1, kind="stable")[:, :top_k]
    return torch.zeros_like(scores_TE).scatter(1, torch.from_numpy(ids), 1.0)


def step(rule, scores_TE, top_k):
    """One batch through a rule: x [T, E] by the bias before, and the bias before and after."""
    before = rule.bias_LE[0]
    x = select(scores_TE, before, top_k)
    ids = x.nonzero()[:, 1].view(-1, top_k)
    counts = count_tokens(ids, scores_TE.shape[1])
    rule.step(stack([collect(rule.needs, scores_TE.float(), before, ids, counts)]))
    return x, before.double(), rule.bias_LE[0].double()


def sign_rule(experts, top_k, rate):
    return build_balancer(BalanceSection(method="sign", rate=rate, centre=False), [0], experts, top_k)


def common_step_rule(scores, top_k, epsilon):
    """b += epsilon (L - A): `proportional` divides by L."""
    T, E = scores.shape
    section = BalanceSection(method="proportional", rate=epsilon * T * top_k / E, centre=False)
    return build_balancer(section, [0], E, top_k)


def lagrangian(scores, x, bias):
    return float((scores * x).sum() + (bias * (x.sum(0) - x.sum() / len(bias))).sum())


# -- 1 and 2: the change of the Lagrangian -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", RULES)
@examples
@given(batch=batches(), n=st.integers(0, 3))
def test_property_1_change_of_the_lagrangian_is_benefit_minus_payment(method, batch, n):
    scores, top_k = batch
    rule = build_balancer(BalanceSection(method=method, rate=RATES[method]), [0], scores.shape[1], top_k)
    for _ in range(n):
        step(rule, scores, top_k)
    x, before, after = step(rule, scores, top_k)
    change = lagrangian_change(scores, before, after, top_k)
    assert float(change.benefit) >= 0
    difference = lagrangian(scores, select(scores, after, top_k), after) - lagrangian(scores, x, before)
    assert float(change.total) == pytest.approx(difference, abs=1e-11)
    assert float(dual_value(scores, after, top_k) - dual_value(scores, before, top_k)) == pytest.approx(
        difference, abs=1e-11
    )


@examples
@given(batch=batches(), epsilon=rates)
def test_property_1_payment_of_a_common_step_is_the_squared_load_error(batch, epsilon):
    scores, top_k = batch
    x, before, after = step(common_step_rule(scores, top_k, epsilon), scores, top_k)
    payment = lagrangian_change(scores, before, after, top_k).payment
    load = x.sum(0)
    assert float(payment) == pytest.approx(epsilon * float((load - load.mean()).square().sum()), rel=1e-6)


@pytest.mark.parametrize("method", RULES)
@examples
@given(batch=batches())
def test_property_2_change_is_at_most_the_step_against_the_next_load(method, batch):
    scores, top_k = batch
    rule = build_balancer(BalanceSection(method=method, rate=0.05), [0], scores.shape[1], top_k)
    _, before, after = step(rule, scores, top_k)
    change = lagrangian_change(scores, before, after, top_k)
    assert float(change.total) <= float(((after - before) * dual_gradient(scores, after, top_k)).sum()) + 1e-11
    rises = float(dual_value(scores, after, top_k) - dual_value(scores, before, top_k)) > 1e-11
    assert rises == (float(change.benefit - change.payment) > 1e-11)


@examples
@given(batch=batches(), rate=rates)
def test_property_2_few_swaps_by_the_sign_rule_do_not_raise_the_dual(batch, rate):
    scores, top_k = batch
    x, before, after = step(sign_rule(scores.shape[1], top_k, rate), scores, top_k)
    swaps = float((select(scores, after, top_k) - x).abs().sum()) / 2
    half = float((x.sum(0) - x.sum(0).mean()).abs().sum()) / 2
    assume(swaps <= half)
    total = float(lagrangian_change(scores, before, after, top_k).total)
    assert total <= 1e-11
    assert total < -1e-6 or swaps > half - 1e-9


def test_property_2_a_long_step_raises_the_dual():
    scores = torch.tensor([[0.5, 0.25]]).double().expand(10, 2)
    _, before, after = step(sign_rule(2, 1, 0.25), scores, 1)  # all ten go to the other expert, which gains 0.25 each
    assert [float(x) for x in lagrangian_change(scores, before, after, 1)] == [2.5, 2.5, 0.0]
    _, before, after = step(sign_rule(2, 1, 0.5), scores, 1)
    assert [float(x) for x in lagrangian_change(scores, before, after, 1)] == [7.5, 5.0, 2.5]


# -- 3: where tokens move ----------------------------------------------------------------------------------------------


def moves(before_TE, after_TE):
    """(k, j) of every token that drops k and takes j."""
    lost, won = before_TE > after_TE, after_TE > before_TE
    return [(k, j) for drop, take in zip(lost, won, strict=True) for k in drop.nonzero() for j in take.nonzero()]


@pytest.mark.parametrize("method", RULES)
@examples
@given(batch=batches())
def test_property_3_tokens_move_to_experts_whose_bias_rose_more(method, batch):
    scores, top_k = batch
    rule = build_balancer(BalanceSection(method=method, rate=0.1), [0], scores.shape[1], top_k)
    for _ in range(2):
        x, before, after = step(rule, scores, top_k)
        change = after - before
        assert all(change[j] >= change[k] for k, j in moves(x, select(scores, after, top_k)))


@examples
@given(batch=batches(), epsilon=rates)
def test_property_3_a_common_step_moves_tokens_to_strictly_less_loaded_experts(batch, epsilon):
    scores, top_k = batch
    rule = common_step_rule(scores, top_k, epsilon * scores.shape[1])  # epsilon (L - A) is then a multiple of 2**-10
    for _ in range(3):
        x, _, after = step(rule, scores, top_k)
        load = x.sum(0)
        assert all(load[j] < load[k] for k, j in moves(x, select(scores, after, top_k)))


@examples
@given(batch=batches(), rate=rates)
def test_property_3_by_the_sign_rule_no_overloaded_expert_gains_and_no_underloaded_one_loses(batch, rate):
    scores, top_k = batch
    rule = sign_rule(scores.shape[1], top_k, rate)
    for _ in range(3):
        x, _, after = step(rule, scores, top_k)
        won, load = select(scores, after, top_k) - x, x.sum(0)
        assert not (won[:, load > load.mean()] > 0).any()
        assert not (won[:, load < load.mean()] < 0).any()


# -- 4: approximate balance --------------------------------------------------------------------------------------------


def most_in_a_window(scores_TE, width):
    """m: the most tokens whose s_ij - s_ik lie in one closed window, over all ordered pairs."""
    pairs = (scores_TE[:, :, None] - scores_TE[:, None, :]).flatten(1)[
        :, ~torch.eye(scores_TE.shape[1]).bool().flatten()
    ]
    ahead = pairs[None] - pairs[:, None]
    return int(((ahead >= 0) & (ahead <= width)).sum(1).max())


def spread(scores_TE):
    """C: how far apart two experts' scores are for one token, at most."""
    return float((scores_TE.amax(1) - scores_TE.amin(1)).max())


def excesses(rule, scores, top_k, first):
    """max |A - L| step by step, for `first` steps and then until a bias comes back: the rest is repetition."""
    seen, out = set(), []
    for n in range(first + 1000):
        state = tuple((rule.bias_LE[0] - rule.bias_LE[0, 0]).tolist())
        if state in seen:
            return out
        if n >= first:
            seen.add(state)
        load = step(rule, scores, top_k)[0].sum(0)
        out.append(float((load - load.mean()).abs().max()))
    pytest.fail("no bias came back")


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_property_4_load_stays_within_e_minus_1_of_the_target(top_k):
    # i k mod 31 differ by distinct numbers for any two k: all gaps between margins are at least 1 / 31.
    scores = torch.arange(31)[:, None] * torch.arange(1, 6) % 31 / 31 + torch.arange(5) / 8
    scores, rate = scores.double(), 2.0**-6
    assert most_in_a_window(scores, 2 * rate) == 1
    steps = int(4 * (1 + spread(scores) / (2 * rate)))
    found = excesses(sign_rule(5, top_k, rate), scores, top_k, steps)
    assert max(found[steps:]) <= 4
    assert max(found) > 4  # it was out of balance at first


@settings(examples, max_examples=30)
@given(batch=batches(most_experts=4), rate=st.sampled_from([2.0**-7, 2.0**-9]))
def test_property_4_band_and_number_of_steps_for_any_scores(batch, rate):
    scores, top_k = batch
    others = scores.shape[1] - 1
    steps = int(others * (1 + spread(scores) / (2 * rate)))
    found = excesses(sign_rule(scores.shape[1], top_k, rate), scores, top_k, steps)
    assert max(found[steps:]) <= most_in_a_window(scores, 2 * rate) * others


# -- 5 and 6: fresh batches --------------------------------------------------------------------------------------------


streams = st.tuples(st.sampled_from(KINDS), st.sampled_from(["sigmoid", "softmax"]), st.integers(0, 2**20))


def coarse(kind, score, seed):
    for scores in stream(kind, 32, 8, score, 60, seed):
        yield (scores.double() * 2**16).round() / 2**16


@examples
@given(
    source=streams,
    rate=st.sampled_from([2.0**-3, 2.0**-5]),
    top_k=st.integers(1, 7),
    start=st.booleans(),
)
def test_property_5_bias_range_of_the_sign_rule(source, rate, top_k, start):
    rule, widest = sign_rule(8, top_k, rate), 0.0
    for n, scores in enumerate(coarse(*source)):
        widest = max(widest, spread(scores))
        if start and n == 0:
            rule.bias_LE[0] = (widest + 2 * rate) * torch.linspace(0, 1, 8)  # as far apart as it may be
        step(rule, scores, top_k)
        assert float(rule.bias_LE.max() - rule.bias_LE.min()) <= widest + 2 * rate + 1e-6


def test_property_5_the_range_of_the_scores_is_used_up():
    scores = torch.tensor([[0.5, 0.0, 0.0]]).double().expand(9, 3)
    rule, ranges = sign_rule(3, 1, 2.0**-5), []
    for _ in range(40):
        step(rule, scores, 1)
        ranges.append(float(rule.bias_LE.max() - rule.bias_LE.min()))
    assert max(ranges) == 0.5 + 2.0**-4


@examples
@given(source=streams, top_k=st.integers(1, 7), centre=st.booleans())
def test_property_6_mean_load_error_is_the_way_of_the_bias(source, top_k, centre):
    epsilon, load = 2.0**-7, 32 * top_k / 8
    section = BalanceSection(method="proportional", rate=epsilon * load, centre=centre)
    rule = build_balancer(section, [0], 8, top_k)
    rule.bias_LE[0] = torch.linspace(-0.25, 0.1875, 8)
    start, errors = rule.bias_LE[0].double(), []
    for scores in coarse(*source):
        errors.append(step(rule, scores, top_k)[0].sum(0) - load)
    way = (start - rule.bias_LE[0].double()) / (epsilon * len(errors))
    # Centred: the errors sum to 0 over experts, so only the start's mean of -1/32 is taken off; rounding remains.
    torch.testing.assert_close(
        torch.stack(errors).mean(0), way - way.mean() if centre else way, rtol=0, atol=1e-4 if centre else 1e-9
    )


# -- the dual function -------------------------------------------------------------------------------------------------


def biases(E, seed):
    return torch.randn(2, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@examples
@given(batch=batches(), seed=st.integers(0, 2**20), share=st.floats(0, 1), scale=st.sampled_from([0.01, 0.3, 3.0]))
def test_dual_is_convex_and_lies_above_its_tangents(batch, seed, share, scale):
    scores, top_k = batch
    a, b = scale * biases(scores.shape[1], seed)
    at_a, at_b = (float(dual_value(scores, c, top_k)) for c in (a, b))
    between = float(dual_value(scores, share * a + (1 - share) * b, top_k))
    assert between <= share * at_a + (1 - share) * at_b + 1e-9
    assert at_b >= at_a + float((dual_gradient(scores, a, top_k) * (b - a)).sum()) - 1e-9


@examples
@given(batch=batches(), seed=st.integers(0, 2**20), shift=st.sampled_from([-2.0, 0.5, 64.0]))
def test_a_common_shift_of_the_bias_changes_nothing(batch, seed, shift):
    scores, top_k = batch
    bias = (biases(scores.shape[1], seed)[0] * 2**16).round() / 2**16  # so that ties stay ties
    shifted = bias + shift
    assert float(dual_value(scores, shifted, top_k)) == pytest.approx(float(dual_value(scores, bias, top_k)), abs=1e-9)
    assert torch.equal(dual_gradient(scores, shifted, top_k), dual_gradient(scores, bias, top_k))


# -- regret of online gradient descent ---------------------------------------------------------------------------------

TOKENS, EXPERTS, TOP_K, SEEDS, STEPS = 64, 4, 2, 100, 300


def descend(rate_of, away):
    """b_n [N, S, E], the gradients there and the regret of every step [N, S], against the minimiser of the mean, which is
    `away` from the start: the experts' scores are uniform and shifted by its negative."""
    best = away * torch.linspace(-1, 1, EXPERTS, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    bias, path = torch.zeros(SEEDS, EXPERTS, dtype=torch.float64), []
    for n in range(1, STEPS + 1):
        scores = torch.rand(SEEDS, TOKENS, EXPERTS, generator=rng, dtype=torch.float64) - best
        gradient = dual_gradient(scores, bias, TOP_K)
        regret = dual_value(scores, bias, TOP_K) - dual_value(scores, best.expand(SEEDS, EXPERTS), TOP_K)
        path.append((bias - best, gradient, regret))
        bias = bias - rate_of(n) * gradient
    return [torch.stack(field) for field in zip(*path, strict=True)]


def test_regret_with_a_step_of_one_over_mu_n_is_logarithmic():
    mu = curvature_iid(TOKENS, EXPERTS) / 2
    way, gradient, regret = descend(lambda n: 1 / (mu * n), away=0.2)
    scores = torch.rand(20_000, EXPERTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for b in way[:12, :4].flatten(0, 1):  # mu holds where the bias goes: it is widest in the first steps
        assert torch.linalg.eigvalsh(boundary_curvature(scores, b, TOP_K, 0.02))[1] * TOKENS / 20_000 > mu
    G = gradient.square().sum(-1).mean(1).max().sqrt()  # sup_n E |A - L|^2, the mean over seeds
    bound = regret_bound_log(G, mu, torch.arange(1, STEPS + 1))
    assert (regret.cumsum(0).mean(1) <= bound).all()
    assert (regret.sum(0) <= bound[-1]).all()  # here every seed's too, which is not promised


def test_logarithmic_bound_is_of_the_right_size():
    mu = curvature_iid(TOKENS, EXPERTS)
    _, gradient, regret = descend(lambda n: 1 / (mu * n), away=0.05)
    G = gradient.square().sum(-1).mean(1).max().sqrt()
    # About half of the bound is used: G^2 is that of the first steps, later ones have about half of it.
    assert 0.4 < float(regret.sum(0).mean() / regret_bound_log(G, mu, STEPS)) < 0.7


def test_regret_with_a_step_of_c_over_root_n_is_under_its_bound_for_every_seed():
    way, gradient, regret = descend(lambda n: 0.02 / n**0.5, away=0.2)
    bound = regret_bound_sqrt(gradient.norm(dim=-1).amax(0), way.norm(dim=-1).amax(0), STEPS, 0.02)
    assert (regret.sum(0) <= bound).all() and regret.sum(0).mean() > 0


def test_regret_with_a_constant_step_is_under_its_bound_for_every_seed():
    way, gradient, regret = descend(lambda n: 0.003, away=0.2)
    bound = regret_bound_constant(gradient.norm(dim=-1).amax(0), way[0].norm(dim=-1), STEPS, 0.003)
    assert (regret.sum(0) <= bound).all() and regret.sum(0).mean() > 0
