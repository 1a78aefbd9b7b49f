"""Every bias rule against a few lines that share nothing with it; schedules, options, state, ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.permute import count_tokens
from kernels.router_topk import topk_lowest_index
from moe.balance import BALANCERS, Balancer, build_balancer
from moe.balance.bias import Gain, schedule
from moe.balance.stats import RouterStats, add, collect, stack
from moe.config import RATES, BalanceSection
from moe.parallel import build_ranks
from tests.ranks import run_ranks
from tests.tiny import CPU

RULES = sorted(name for name, kind in BALANCERS.items() if kind is not Balancer)


def balancer(method="proportional", layers=(3,), experts=4, top_k=2, **settings):
    settings = {"rate": RATES.get(method)} | settings
    return build_balancer(BalanceSection(method=method, **settings), list(layers), experts, top_k)


def loads(*rows):
    counts = torch.tensor(rows, dtype=torch.int64)
    return RouterStats(counts.sum(-1) // 2, counts)


def routed(scores_TE, bias_E, top_k, needs, mask_T=None):
    """What a router returns about these scores."""
    ids = topk_lowest_index(scores_TE + bias_E, top_k)
    if mask_T is not None:
        ids = ids.masked_fill(~mask_T[:, None], -1)
    return collect(needs, scores_TE, bias_E, ids, count_tokens(ids, scores_TE.shape[1]), mask_T)


# -- formulas ----------------------------------------------------------------------------------------------------------


def numpy_move(method, a, state):
    """x of one layer from its loads, written again."""
    e = (a.mean() - a) / a.mean()
    if method == "sign":
        return np.sign(e)
    if method == "proportional":
        return e
    if method == "rms":
        return e / np.sqrt((e**2).mean())
    d = np.tanh(2.0 * e)
    state["m"] = 0.5 * state.get("m", 0.0) + 0.5 * (d - d.mean())
    return state["m"]


@pytest.mark.parametrize("method", ["sign", "proportional", "rms", "smebu"])
def test_simple_rules_against_their_formulas(method):
    rng = np.random.default_rng(0)
    b = balancer(method, layers=(1, 2), rate=0.03, centre=False)
    expected, states = np.zeros((2, 4)), [{}, {}]
    for _ in range(5):
        a = rng.integers(1, 40, size=(2, 4)).astype(float)
        b.step(loads(*a.astype(int).tolist()))
        expected += 0.03 * np.stack([numpy_move(method, a[i], states[i]) for i in range(2)])
    np.testing.assert_allclose(b.bias_LE.numpy(), expected, atol=1e-6)
    assert abs(expected).max() > 0.05


@pytest.mark.parametrize("method", ["sign", "proportional", "rms"])
def test_p37_exact_balance_moves_nothing(method):
    b = balancer(method)
    b.step(loads([5, 5, 5, 5]))
    assert b.bias_LE.tolist() == [[0, 0, 0, 0]]


def test_wrong_sign_would_be_seen():
    for method in ("sign", "proportional", "rms", "smebu"):
        b = balancer(method)
        b.step(loads([9, 1, 5, 5]))
        assert b.bias_LE[0, 0] < 0 < b.bias_LE[0, 1], method


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [1, 1, 1, 1]),
        ({"schedule": "inverse_sqrt"}, [1, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5]),
        ({"schedule": "inverse"}, [1, 1 / 2, 1 / 3, 1 / 4]),
        ({"schedule": "inverse", "schedule_offset": 3.0}, [1 / 4, 1 / 5, 1 / 6, 1 / 7]),
        ({"schedule": "linear", "freeze_step": 4}, [0.75, 0.5, 0.25, 0]),
        ({"freeze_step": 3}, [1, 1, 0, 0]),
        ({"warmup_steps": 3}, [1 / 3, 2 / 3, 1, 1]),
        ({"warmup_steps": 2, "schedule": "inverse"}, [1 / 2, 1 / 2, 1 / 3, 1 / 4]),
    ],
)
def test_schedules(settings, factors):
    section = BalanceSection(method="proportional", rate=0.1, **settings)
    assert [schedule(section, n) for n in (1, 2, 3, 4)] == pytest.approx(factors)
    b = build_balancer(section, [0], 4, 2)
    for n, factor in enumerate(factors, 1):
        before = b.bias_LE.clone()
        b.step(loads([2, 0, 1, 1]))
        assert b.step_count == n
        torch.testing.assert_close(b.bias_LE - before, 0.1 * factor * torch.tensor([[-1.0, 1.0, 0, 0]]))


def test_clip_limits_the_error():
    free, clipped = balancer(rate=1.0, centre=False), balancer(rate=1.0, centre=False, clip=0.5)
    for b in (free, clipped):
        b.step(loads([16, 0, 0, 0]))
    assert free.bias_LE.tolist() == [[-3, 1, 1, 1]]
    assert clipped.bias_LE.tolist() == [[-0.5, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize("method", RULES)
def test_p14_frozen_layer_and_layer_without_tokens_keep_all_state(method):
    b = balancer(method, layers=(3, 5, 7), experts=8, frozen_layers=[5])
    scores = torch.rand(32, 8, generator=torch.Generator().manual_seed(1)) + torch.linspace(0, 0.3, 8)
    full = routed(scores, torch.zeros(8), 2, b.needs)
    empty = routed(scores, torch.zeros(8), 2, b.needs, torch.zeros(32, dtype=torch.bool))
    before = {name: value.clone() for name, value in b.state.items()}
    b.step(stack([full, full, empty]))
    for name, value in b.state.items():
        assert torch.equal(value[1:], before[name][1:]), name
    assert b.bias_LE[0].abs().max() > 0


# -- the gain ----------------------------------------------------------------------------------------------------------


def gains(errors, load=100):
    """The gain after each batch, from loads with these errors (tokens away from the target)."""
    state, out = Gain.initial_state(1, 4) | {"gain": torch.tensor([[0.5]])}, []
    for e in errors:
        rate, state = Gain.step(state, loads([load - e, load + e, load, load]))
        out.append(rate.item())
    return out


def test_gain_begins_at_its_upper_end():
    assert Gain.initial_state(2, 4)["gain"].tolist() == [[Gain.HIGH]] * 2


def test_gain_rises_while_errors_agree_and_falls_while_they_alternate():
    agree, alternate = gains([5] * 4), gains([5, -5, 5, -5])
    assert agree == pytest.approx([0.5, 0.5 * math.exp(0.3), 0.5 * math.exp(0.6), 1.0])
    assert alternate == pytest.approx([0.5 * math.exp(-0.3 * n) for n in range(4)])
    assert gains([5, -5] * 40)[-1] == pytest.approx(Gain.LOW)


CALM = [5, -5] * 10


def test_gain_is_reset_by_a_jump_whose_second_batch_agrees():
    # The first batch after a jump may point anywhere; the second, 40 % nearer, points where the first did. The first must
    # not raise the mean so far that the second is no longer far above it.
    after = gains([*CALM, 60, 36])
    assert after[-2] < 0.1 and after[-1] == Gain.HIGH


def test_gain_is_not_reset_by_bursts_noise_or_small_errors():
    assert gains([*CALM, 60, -5, 60, -5])[-1] < 0.1  # bursts that do not last
    assert gains([*CALM, 60, -48])[-1] < 0.1  # as far, but to the other side: noise
    # Two alike, far above the mean but within what sampling gives: |z|^2 = 2 * 150^2 / 10,000 = 4.5, E - K = 2 expected.
    assert gains([*[1, -1] * 10, 150, 150], load=10_000)[-1] < 0.1
    assert gains([*[0, 0] * 10, 60, 60])[-1] == Gain.HIGH  # exact balance before it: still seen


@pytest.mark.parametrize(("before", "after"), [(1, 100), (100, 1)])
def test_gain_takes_the_size_of_the_batch_for_what_it_is(before, after):
    # A hundred times the tokens have ten times the sampling error in tokens and a tenth of it relatively: no jump.
    state, last = Gain.initial_state(1, 4), None
    for n in range(22):
        scale = before if n < 21 else after
        error = (5 if n in (20, 21) or n % 2 else -5) * round(scale**0.5)
        last, state = Gain.step(state, loads([100 * scale - error, 100 * scale + error, 100 * scale, 100 * scale]))
    assert last is not None and last.item() < 0.1


# -- state -------------------------------------------------------------------------------------------------------------


def run(b, steps, seed=0, experts=8):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        scores = torch.rand(64, experts, generator=generator) + torch.linspace(0, 0.3, experts)
        b.step(stack([routed(scores, row, 2, b.needs) for row in b.bias_LE]))
    return generator


@pytest.mark.parametrize("method", RULES)
def test_p36_saved_state_continues_bit_for_bit(method):
    settings = {"schedule": "inverse"} if method != "coordinate" else {}
    a, b = (balancer(method, layers=(1, 2), experts=8, **settings) for _ in range(2))
    run(a, 5)
    b.load_state_dict({name: value.clone() for name, value in a.state_dict().items()})
    run(a, 3, seed=1)
    run(b, 3, seed=1)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    assert a.bias_LE.dtype == torch.float32


def test_another_methods_state_is_refused_untouched():
    a, b = balancer("smebu"), balancer("coordinate")
    a.step(loads([9, 1, 5, 5]))
    before = {name: value.clone() for name, value in a.state_dict().items()}
    with pytest.raises(ValueError, match=r"is not that of balance\.method = 'smebu'"):
        a.load_state_dict(b.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in a.state_dict().items())


def test_missing_statistics_are_named_and_change_nothing():
    b = balancer("coordinate")
    with pytest.raises(ValueError, match=r"'coordinate' needs the router statistics \['response_histogram'\]"):
        b.step(loads([9, 1, 5, 5]))
    assert b.step_count == 0 and b.bias_LE.abs().max() == 0


# -- ranks and micro-batches -------------------------------------------------------------------------------------------


def _one_step(rank, n, method):
    ranks, experts = build_ranks(rank, n, CPU, 1), 8
    b = balancer(method, layers=(0, 4), experts=experts)
    for seed in range(3):
        scores = torch.rand(2, 64, experts, generator=torch.Generator().manual_seed(seed)) ** 2
        scores += torch.linspace(0, 0.3, experts)
        mask = torch.arange(64) % 5 > 0
        share = slice(rank * 64 // n, (rank + 1) * 64 // n)
        local = stack(
            [routed(s[share], row, 2, b.needs, mask[share]) for s, row in zip(scores, b.bias_LE, strict=True)]
        )
        total, _ = ranks.start_balance_sum(local).wait()
        b.step(total)
    return {name: value.numpy() for name, value in b.state_dict().items()}


def _all_methods(rank, n):
    return {method: _one_step(rank, n, method) for method in RULES}


def test_p01_every_method_is_bit_identical_on_1_2_and_4_ranks():
    alone = run_ranks(_all_methods, 1)[0]
    for n in (2, 4):
        for found in run_ranks(_all_methods, n):
            for method, state in alone.items():
                for name, value in state.items():
                    assert np.array_equal(value, found[method][name]), (method, name, n)
    assert all(np.abs(state["bias"]).max() > 1e-4 for state in alone.values())


@pytest.mark.parametrize("method", RULES)
def test_p11_padding_equals_removal_in_every_statistic(method):
    b = balancer(method, experts=8)
    scores = torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(60) % 3 > 0
    needs = {*b.needs, "dual_sum", "prob_sum"}
    for x, y in zip(
        routed(scores, torch.zeros(8), 2, needs, mask), routed(scores[mask], torch.zeros(8), 2, needs), strict=True
    ):
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("method", RULES)
def test_p02_micro_batches_add_up_to_the_batch(method):
    b = balancer(method, experts=8)
    scores = torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    whole = routed(scores, torch.zeros(8), 2, b.needs)
    parts = [routed(part, torch.zeros(8), 2, b.needs) for part in scores.split(20)]
    total = add(add(parts[0], parts[1]), parts[2])
    for x, y in zip(whole, total, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)
