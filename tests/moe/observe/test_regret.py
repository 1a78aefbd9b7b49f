"""Regret: the meter against definitions, its reservoir, ranks and state; the probe and the recorder beside training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe.balance.dual import dual_value, solve_dual
from moe.balance.streams import open_stream, stream
from moe.config import BalanceSection
from moe.observe import regret
from moe.observe.regret import (
    NO_BOUND,
    RegretMeter,
    balance_tax,
    curvature,
    hindsight_gap,
    layers_of_probe,
    regret_bound,
)
from moe.observe.scores import ScoreRecorder, probe_scores, tapped
from moe.parallel import build_ranks
from moe.train.engines.native import NativeEngine
from tests.moe.observe.test_load import documented_patterns
from tests.moe.train.engines.test_methods import batches
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, tiny_config

E, K, T = 8, 2, 200
PROPORTIONAL = BalanceSection(method="proportional", rate=1e-2)


def meter(section=PROPORTIONAL, reservoir=1000, layers=(0, 3)):
    return RegretMeter(section, layers, E, K, T, reservoir, seed=0, probe_tokens=T)


def probes(count=4, layers=2):
    kinds = [stream("skewed", T, E, "sigmoid", count, seed) for seed in range(layers)]
    return [torch.stack(batch) for batch in zip(*kinds, strict=True)]


def biases(count=4, layers=2):
    return 0.1 * torch.randn(count, layers, E, generator=torch.Generator().manual_seed(0))


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_dynamic_regret_is_the_distance_to_the_optimum_and_zero_there():
    m, scores = meter(), probes(1)[0]
    m.observe(scores, torch.zeros(2, E), ALONE)
    found = m.metrics()
    expected = [float(dual_value(s, torch.zeros(E), K) - solve_dual(s, K).value) / T for s in scores]
    assert found["regret/dynamic/layer_00"] == pytest.approx(expected[0])
    assert found["regret/dynamic/layer_03"] == pytest.approx(expected[1]) and min(expected) > 1e-3
    assert found["regret/dynamic/max"] == pytest.approx(max(expected))
    m.observe(scores, solve_dual(scores, K).bias.float(), ALONE)
    assert 0 <= m.metrics()["regret/dynamic/max"] < 1e-6
    assert m.metrics() == {}  # once


def test_static_regret_is_exact_with_room_for_every_token():
    m, own = meter(reservoir=4 * T), np.zeros(2)
    seen = probes()
    for scores, bias in zip(seen, biases(), strict=True):
        own += dual_value(scores, bias, K).numpy() / (4 * T)
        m.observe(scores, bias, ALONE)
        m.count(torch.tensor([[60, 40, *[50] * 6], [50] * 8]))
    best = solve_dual(torch.cat(seen, dim=1), K).value.numpy() / (4 * T)
    found = m.metrics()
    assert found["regret/static/layer_00"] == pytest.approx(own[0] - best[0], abs=1e-6)
    assert found["regret/static/layer_03"] == pytest.approx(own[1] - best[1], abs=1e-6)
    assert found["regret/static_sum/mean"] == pytest.approx(4 * found["regret/static/mean"])


def test_reservoir_is_a_uniform_sample_and_its_static_regret_is_near():
    small, exact = meter(reservoir=300), meter(reservoir=20 * T)
    for number, (scores, bias) in enumerate(zip(probes(20), biases(20), strict=True)):
        small.observe(scores + 0 * number, bias, ALONE)
        exact.observe(scores, bias, ALONE)
    assert int(small.state["keys_R"].isfinite().sum()) == 300
    assert small.state["keys_R"].max() == pytest.approx(
        300 / (20 * T), rel=0.2
    )  # uniform keys: the smallest 300 of 4000
    a, b = (m.metrics()["regret/static/mean"] for m in (small, exact))
    assert a == pytest.approx(b, abs=0.25 * b)


def test_large_layers_are_measured_in_turn_and_keep_their_values(monkeypatch):
    scores, bias = probes(4, layers=3), biases(4, layers=3)
    whole, m = meter(layers=(0, 1, 2)), meter(layers=(0, 1, 2))
    per_layer = (T + 1000) * E
    seen = []
    for n in range(4):
        whole.observe(scores[n], bias[n], ALONE)
        monkeypatch.setattr(regret, "SCORES_PER_PROBE", per_layer)
        m.observe(scores[n], bias[n], ALONE)
        monkeypatch.undo()
        expected, found = whole.metrics(), m.metrics()
        seen.append([key for key in found if key.startswith("regret/dynamic/layer")])
        layer = n % 3
        for name in ("dynamic", "static"):
            key = f"regret/{name}/layer_{layer:02d}"
            assert found[key] == pytest.approx(expected[key], abs=1e-6)
    assert [len(keys) for keys in seen] == [1, 2, 3, 3]
    assert m.state["probes_L"].tolist() == [2, 1, 1] and found["regret/probes"] == 4
    assert torch.equal(m.state["scores_LRE"], whole.state["scores_LRE"])  # the reservoir has the tokens of all probes


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (1.0, [[0], [1], [2], [0], [1]]),
        (0.5, [[0], [], [1], [], [2]]),
        (1.5, [[0, 1], [2], [0, 1], [2], [0, 1]]),
        (3.0, [[0, 1, 2]] * 5),
        (50.0, [[0, 1, 2]] * 5),
    ],
)
def test_turns(monkeypatch, rate, expected):
    for world_size in (1, 2):
        monkeypatch.setattr(regret, "SCORES_PER_PROBE", int(1000 * rate) // world_size)
        turns = [[i % 3 for i in layers_of_probe(n, 3, 1000, world_size)] for n in range(5)]
        assert turns == expected


def test_the_reservoir_is_that_of_the_smallest_keys_whatever_its_order():
    m, seen = meter(reservoir=300), probes(5)
    for n, scores in enumerate(seen):
        m.observe(scores, torch.zeros(2, E), ALONE)
        filled = min(300, (n + 1) * T)
        assert m.state["keys_R"].isfinite().tolist() == [True] * filled + [False] * (300 - filled)
    generators = [regret.keys_of_probe(0, n, T) for n in range(5)]
    order = torch.cat(generators).argsort()[:300]
    expected = torch.cat(seen, dim=1)[:, order]
    placed = m.state["keys_R"].argsort()
    assert torch.equal(m.state["scores_LRE"][:, placed], expected)
    best = expected.double().topk(K, dim=-1).values.sum(-1)
    assert torch.allclose(m.state["gained_LR"][:, placed], best)


def test_the_margin_is_the_median_distance_of_the_first_expert_out():
    m, scores, bias = meter(), probes(1)[0], biases(1)[0]
    m.observe(scores, bias, ALONE)
    ordered = (scores + bias[:, None]).sort(-1, descending=True).values
    expected = (ordered[..., K - 1] - ordered[..., K]).median(-1).values
    found = m.metrics()
    assert found["moe/topk_margin/min"] == pytest.approx(float(expected.min()), abs=1e-6)
    assert found["moe/topk_margin/mean"] == pytest.approx(float(expected.mean()), abs=1e-6)


def test_balance_tax_is_the_score_given_up():
    scores = probes(1)[0][0]
    assert float(balance_tax(scores, torch.zeros(E), K)) == 0.0
    bias = torch.tensor([2.0] + [0.0] * 7)  # everyone takes expert 0 and the best other one
    others = scores[:, 1:].amax(-1)
    expected = scores.topk(K).values.sum(-1) - scores[:, 0] - others
    assert float(balance_tax(scores, bias, K)) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_bounds_name_the_row_that_covers_the_rule_or_say_that_none_does():
    def bound(mu=1.0, **settings):
        section = BalanceSection(**{"method": "proportional", "rate": 1.0} | settings)
        return regret_bound(section, 50.0, 100, gradient=10.0, mu=mu, start=1.0, widest=2.0)

    assert bound().value == pytest.approx(1 / (2 / 50) + 100 / 50 * 100 / 2)
    assert bound(schedule="inverse_sqrt").value == pytest.approx(4 * 10 / (2 / 50) + 100 / 50 * 9.5)
    assert bound(schedule="inverse", mu=60.0).value == pytest.approx(100 / 50 / 2 * (1 + np.log(100)))
    too_slow = bound(schedule="inverse", mu=40.0)
    assert too_slow.value is None and "below 1/mu = 0.025" in too_slow.which
    for settings in ({"method": "sign"}, {"rate": "auto"}, {"clip": 1.0}, {"warmup_steps": 3}, {"freeze_step": 9}):
        assert bound(**settings) == (None, NO_BOUND)


def test_the_meters_bound_is_that_of_its_measured_constants():
    m = meter()
    for scores, bias in zip(probes(), biases(), strict=True):
        m.observe(scores, bias, ALONE)
        m.count(torch.tensor([[70, 30, *[50] * 6], [50] * 8]))
    best = m.state["best_LE"]
    start, mu = float((biases()[0, 0].double() - best[0]).norm()), float(m.state["sums_3L"][2, 0]) / 4 * T
    expected = regret_bound(PROPORTIONAL, 50.0, 4, 800**0.5, mu, start, 0.0).value / T
    gap = hindsight_gap(T, E, K, mu) / (4 * T)  # the reservoir holds all 4 T tokens
    assert m.bound(0).value == pytest.approx(expected + 4 * gap)
    assert m.metrics()["regret/bound_covers"] == 1.0
    frozen = meter(BalanceSection(method="proportional", rate=1e-2, frozen_layers=[3]))
    frozen.observe(probes(1)[0], biases(1)[0], ALONE)
    assert frozen.metrics()["regret/bound_covers"] == 0.0
    silent = meter(BalanceSection(method="sign", rate=1e-3))
    silent.observe(probes(1)[0], biases(1)[0], ALONE)
    found = silent.metrics()
    assert found["regret/bound_covers"] == 0.0 and not any(key.startswith("regret/bound/") for key in found)


def test_curvature_is_zero_for_ties_and_that_of_iid_scores_otherwise():
    assert curvature(torch.full((64, 4), 0.5), torch.zeros(4), 2) == 0.0
    scores = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0))
    # mu / T = E / (E - 1) for uniform scores; the quartile window reads 10 to 12 % low (docs/theory.md)
    assert 0.8 < curvature(scores, torch.zeros(4), 2) / 200_000 / (4 / 3) < 1.0


def test_scores_that_are_not_finite_are_no_probe_and_large_seeds_fit():
    m = RegretMeter(PROPORTIONAL, (0, 3), E, K, T, 100, seed=20260101123456789, probe_tokens=T)
    bad = probes(1)[0].clone()
    bad[1, 5, 2] = torch.nan
    m.observe(bad, torch.zeros(2, E), ALONE)
    assert m.metrics() == {} and int(m.state["probes"]) == 0 and bool(m.state["scores_LRE"].eq(0).all())
    m.observe(probes(1)[0], torch.zeros(2, E), ALONE)
    assert m.metrics()["regret/probes"] == 1


def test_many_probes_keep_the_list_of_biases_short_and_its_ends():
    m = meter(reservoir=8, layers=(0,))
    for n in range(3 * RegretMeter.MAX_BIASES):
        m._keep(torch.rand(1, 4, E), torch.full((1, E), float(n)))
        m.state["probes"] += 1
    every = int(m.state["bias_every"])
    assert every == 4
    stored = m.state["biases_PLE"][: 3 * RegretMeter.MAX_BIASES // every, 0, 0].tolist()
    assert stored == [float(n) for n in range(0, 3 * RegretMeter.MAX_BIASES, every)]


# -- state and ranks ---------------------------------------------------------------------------------------------------


def _observe(rank, n):
    m, ranks = meter(layers=(0, 1, 2)), build_ranks(rank, n, CPU, 1)
    for scores, bias in zip(probes(3, layers=3), biases(3, layers=3), strict=True):
        m.observe(scores, bias, ranks)
        m.count(torch.full((3, E), 50))
    return {k: v.numpy() for k, v in m.state_dict().items()}, m.metrics()


def test_two_ranks_hold_the_state_of_one():
    state, metrics = run_ranks(_observe, 1)[0]
    for found, same in run_ranks(_observe, 2):
        assert all(np.array_equal(state[key], found[key]) for key in state) and same == metrics


def test_p07_saved_state_continues_bit_for_bit():
    a, seen = meter(), list(zip(probes(), biases(), strict=True))
    for scores, bias in seen[:2]:
        a.observe(scores, bias, ALONE)
    b = meter()
    b.load_state_dict(a.state_dict())
    for m in (a, b):
        for scores, bias in seen[2:]:
            m.observe(scores, bias, ALONE)
    assert a.metrics() == b.metrics()
    assert all(torch.equal(value, b.state[name]) for name, value in a.state.items())


def test_every_emitted_key_is_documented_and_every_documented_one_emitted():
    m = meter()
    m.observe(torch.rand(2, T, E, generator=torch.Generator().manual_seed(0)), biases(1)[0], ALONE)
    emitted, patterns = set(m.metrics()), documented_patterns()
    for key in emitted:
        assert sum(bool(pattern.fullmatch(key)) for pattern in patterns.values()) == 1, key
    for name, pattern in patterns.items():
        if name.startswith(("regret/", "moe/topk_margin")):
            assert any(pattern.fullmatch(key) for key in emitted), name


# -- beside training ---------------------------------------------------------------------------------------------------


def _scores_of_a_step(rank, n, mode):
    config = tiny_config(n, train__activation_checkpointing=mode)
    engine = NativeEngine(config, ranks := build_ranks(rank, n, CPU, 1), 0)
    share = batches(rank, n, 8 // n, 0, padded=True)
    mask_T = (share[0].targets_BS >= 0).flatten()
    probe = probe_scores(engine.model, [(share[0].tokens_BS, mask_T)], ranks)
    assert engine.model.training
    with tapped(engine.model.routers) as found:
        engine.forward_backward(batches(rank, n, 4, 0, padded=True))
    trained = torch.stack([ranks.gather_rows(torch.cat(scores)) for scores in found.values()])
    return probe.numpy(), trained.numpy()


@pytest.mark.parametrize("mode", ["none", "full"])
def test_p03_p11_scores_are_those_of_every_real_token_once(mode):
    probe, trained = run_ranks(_scores_of_a_step, 1, mode)[0]
    real = sum(int((b.targets_BS >= 0).sum()) for b in batches(0, 1, 8, 0, padded=True))
    assert probe.shape == (2, real, 8)
    np.testing.assert_allclose(probe, trained, rtol=1e-5)
    for probe_2, trained_2 in run_ranks(_scores_of_a_step, 2, mode):
        np.testing.assert_allclose(probe_2, probe, rtol=1e-5)
        np.testing.assert_allclose(trained_2, probe, rtol=1e-5)


def test_recorded_scores_are_a_stream_of_the_laboratory(tmp_path):
    engine = NativeEngine(tiny_config(), ALONE, 0)
    recorder, seen = ScoreRecorder(engine.model.routers, 2, 2, 3, tmp_path / "scores"), []
    for step in range(1, 6):
        micro = batches(0, 1, 4, step, padded=False)
        expected = probe_scores(engine.model, [(b.tokens_BS, None) for b in micro], ALONE)
        with recorder.step(step, ALONE):
            engine.forward_backward(micro)
        engine.step()
        seen.append(expected[1])
    with np.load(tmp_path / "scores" / "layer_02_steps_2-4.npz") as file:
        assert file["steps"].tolist() == [2, 3, 4] and int(file["top_k"]) == 2
        np.testing.assert_allclose(file["scores"], torch.stack(seen[1:4]).numpy(), rtol=1e-5)

    path = tmp_path / "scores" / "layer_02_steps_2-4.npz"
    found, top_k = open_stream(f"recorded={path}", 0, 0, 0, "", steps=2, seed=0)
    for scores, want in zip(found, seen[1:3], strict=True):
        torch.testing.assert_close(scores, want)
    assert top_k == 2


def test_a_run_that_ends_early_writes_what_it_recorded(tmp_path):
    engine = NativeEngine(tiny_config(), ALONE, 0)
    recorder = ScoreRecorder(engine.model.routers, 2, 1, 50, tmp_path / "scores")
    with recorder.step(1, ALONE):
        engine.forward_backward(batches(0, 1, 8, 0, padded=False))
    recorder.write(ALONE)
    with np.load(tmp_path / "scores" / "layer_01_steps_1-1.npz") as file:
        assert file["scores"].shape == (1, 128, 8)
