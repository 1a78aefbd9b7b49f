"""The native engine over layouts and micro-batches. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from moe.balance import build_balancer
from moe.model.loss import IGNORED
from moe.observe.load import maxvio
from moe.parallel import build_ranks
from moe.train.data import Batch
from moe.train.engines.native import NativeEngine
from moe.train.evaluate import evaluate
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, random_tokens, tiny_config


def micro_batches(rank, n, micro, step, padded):
    x, y = random_tokens(seed=step)
    if padded:  # unequal padding: some micro-batches and ranks have far fewer real tokens
        y[1, 5:] = IGNORED
        y[6:, 2:] = IGNORED
    per_rank = 8 // n
    first = rank * per_rank
    return [Batch(x[i : i + micro], y[i : i + micro]) for i in range(first, first + per_rank, micro)]


def steps(rank, n, ep, micro, padded, mode, count=4):
    config = tiny_config(n, parallel__ep=ep, balance__z_loss=1e-3, train__activation_checkpointing=mode)
    ranks = build_ranks(rank, n, CPU, ep)
    if ranks.ep_group is not None:  # p33: neighbours share the experts, in every group
        assert dist.get_process_group_ranks(ranks.ep_group) == [rank // ep * ep + i for i in range(ep)]
    engine = NativeEngine(config, ranks, 0)
    balancer = build_balancer(config.balance, list(engine.model.routers), 8, config.model.top_k)
    collectives = []
    rows = []
    for step in range(count):
        out = engine.forward_backward(micro_batches(rank, n, micro, step, padded))
        done = engine.step()
        if n > 1:
            real = dist.all_reduce
            dist.all_reduce = lambda *a, real=real, **k: collectives.append(1) or real(*a, **k)
            stats, _ = ranks.start_balance_sum(out.stats).wait()
            dist.all_reduce = real
        else:
            stats, _ = ranks.start_balance_sum(out.stats).wait()
        balancer.step(stats)
        balancer.publish(list(engine.model.routers.values()))
        losses = (ranks.sum(out.losses_3) / out.tokens).tolist()
        rows.append((losses, done.grad_norm, stats.tokens_per_expert.tolist(), balancer.bias_LE.tolist()))
    return rows, len(collectives)


@pytest.fixture(scope="module", params=[False, True], ids=["full", "padded"])
def reference(request):
    return request.param, run_ranks(steps, 1, 1, 8, request.param, "none")[0][0]


@pytest.mark.parametrize(
    ("n", "ep", "micro", "mode"), [(1, 1, 2, "none"), (2, 1, 4, "none"), (2, 2, 2, "full"), (4, 2, 1, "selective")]
)
def test_p01_p02_p22_p25_p29_layouts_and_micro_batches_agree(reference, n, ep, micro, mode):
    padded, expected = reference
    results = run_ranks(steps, n, ep, micro, padded, mode)
    for rows, collectives in results:
        assert collectives == (4 if n > 1 else 0)  # p29: one balancing collective a step
        for row, want in zip(rows, expected, strict=True):
            assert row[2] == want[2] and row[3] == want[3]  # counts and bias to the bit
            assert row[0] == pytest.approx(want[0], rel=1e-5)
            assert row[1] == pytest.approx(want[1], rel=1e-4)
    if padded:
        assert sum(expected[0][2][0]) < 8 * 16 * 2  # padding is no load


def padded(rank, n):
    """Three steps with exact dispatch, with room for everything, and with hardly any: losses, norms, counts, dropped pairs."""
    found = []
    for dispatch, factor in (("exact", 1.5), ("padded", 2.0), ("padded", 1.0)):
        config = tiny_config(n, parallel__ep=2, parallel__dispatch=dispatch, parallel__capacity_factor=factor)
        ranks, rows = build_ranks(rank, n, CPU, 2), []
        engine = NativeEngine(config, ranks, 0)
        for step in range(3):
            out = engine.forward_backward(micro_batches(rank, n, 2, step, True))
            assert out.stats.dropped is None  # nothing of it travels with the balancing statistics
            losses = (ranks.sum(out.losses_3) / out.tokens).tolist()
            rows.append((losses, engine.step().grad_norm, out.stats.tokens_per_expert.tolist(), out.dropped))
        val = evaluate(engine.model, micro_batches(rank, n, 4, 9, False), ranks).ce
        found.append((rows, val))
    return found


def test_p38_padded_dispatch_trains_to_the_bit_as_exact_with_and_without_room():
    for exact, roomy, tight in run_ranks(padded, 2):
        for found in (roomy, tight):
            assert [row[:3] for row in found[0]] == [row[:3] for row in exact[0]] and found[1] == exact[1]
        assert all(row[3] == 0 for row in roomy[0]) and all(row[3] > 0 for row in tight[0])


def test_p25_loss_is_a_mean_over_real_tokens_of_the_step_not_of_the_micro_batch():
    config = tiny_config(optim__grad_clip=1e9)
    engine = NativeEngine(config, ALONE, 0)
    x, y = random_tokens()
    y[4:, 1:] = IGNORED
    out = engine.forward_backward([Batch(x[:4], y[:4]), Batch(x[4:], y[4:])])
    assert int(out.tokens) == 4 * 16 + 4
    whole = engine.model(x, y, True)
    assert (out.losses_3[0] / out.tokens).item() == pytest.approx(whole.ce.item() / 68, rel=1e-6)


def _opposite_skew(rank, n):
    counts = torch.tensor([[8, 0], [4, 4]]) if rank == 0 else torch.tensor([[0, 8], [4, 4]])
    from moe.balance.stats import RouterStats

    total, _ = build_ranks(rank, n, CPU, 1).start_balance_sum(RouterStats(counts.sum(-1), counts)).wait()
    return maxvio(counts).tolist(), maxvio(total.tokens_per_expert).tolist()


def test_p24_maxvio_is_of_global_counts():
    for local, joint in run_ranks(_opposite_skew, 2):
        assert local[0] == 1.0 and joint[0] == 0.0


def test_p12_step_that_is_not_finite_changes_nothing():
    engine = NativeEngine(tiny_config(), ALONE, 0)
    engine.forward_backward(micro_batches(0, 1, 8, 0, False))
    engine.step()
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in engine.optimizer.state.values()]
    engine.forward_backward(micro_batches(0, 1, 8, 1, False))
    engine.model.blocks[2].moe.experts.w2.grad[3, 0, 0] = math.nan
    done = engine.step()
    assert not done.applied and math.isnan(done.grad_norm)
    assert all(torch.equal(v, before[k]) for k, v in engine.model.state_dict().items())
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, engine.optimizer.state.values(), strict=True))
    assert all(p.grad is None for p in engine.model.parameters())


def test_p41_every_used_expert_and_every_other_parameter_trains():
    engine = NativeEngine(tiny_config(), ALONE, 0)
    before = {k: v.clone() for k, v in engine.model.named_parameters()}
    used = torch.zeros(2, 8, dtype=torch.bool)
    for step in range(5):
        out = engine.forward_backward(micro_batches(0, 1, 8, step, False))
        used |= out.stats.tokens_per_expert > 0
        engine.step()
    for name, parameter in engine.model.named_parameters():
        if ".experts." in name:
            layer = int(name.split(".")[1]) - 1
            moved = (parameter != before[name]).flatten(1).any(1)
            assert torch.equal(moved & used[layer], used[layer]), name
        else:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_uses_the_true_norm_and_never_scales_up(limit):
    engine = NativeEngine(tiny_config(optim__grad_clip=limit), ALONE, 0)
    engine.forward_backward(micro_batches(0, 1, 8, 0, False))
    expected = torch.cat([p.grad.flatten() for p in engine.model.parameters()]).norm().item()
    seen = []
    engine.optimizer.step = lambda: seen.append(
        torch.cat([p.grad.flatten() for p in engine.model.parameters()]).norm().item()
    )
    assert engine.step().grad_norm == pytest.approx(expected, rel=1e-5)
    assert seen[0] == pytest.approx(min(limit, expected), rel=1e-4) and 1e-3 < expected < 1e3


def test_p04_evaluation_counts_nothing_for_the_balancer_and_changes_nothing():
    engine = NativeEngine(tiny_config(), ALONE, 0)
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    batch = micro_batches(0, 1, 8, 0, True)[0]
    found = evaluate(engine.model, [batch, batch], ALONE)
    assert engine.model.training
    assert all(torch.equal(v, before[k]) for k, v in engine.model.state_dict().items())
    real = int((batch.targets_BS != IGNORED).sum())
    assert found.tokens == 2 * real and found.tokens_per_expert_LE.sum(-1).tolist() == [4 * real] * 2
    out = engine.forward_backward([batch])
    assert int(out.stats.tokens[0]) == real  # a step after it counts its own tokens only
    assert found.ce == pytest.approx((out.losses_3[0] / out.tokens).item(), rel=1e-6)


def test_evaluation_is_a_mean_over_tokens_in_evaluation_mode_and_without_gradients():
    engine, seen = NativeEngine(tiny_config(), ALONE, 0), []
    engine.model.register_forward_hook(lambda m, _args, out: seen.append((out.ce, m.training)))
    full, padded = micro_batches(0, 1, 8, 0, False)[0], micro_batches(0, 1, 8, 1, True)[0]
    found = evaluate(engine.model, [full, padded], ALONE)
    tokens = sum(int((b.targets_BS != IGNORED).sum()) for b in (full, padded))
    assert found.tokens == tokens < 2 * 8 * 16
    assert found.ce == pytest.approx(sum(ce.item() for ce, _ in seen) / tokens, rel=1e-6)
    assert not any(ce.requires_grad or training for ce, training in seen)


def test_p38_target_is_from_counts_before_any_drop():
    out = NativeEngine(tiny_config(), ALONE, 0).forward_backward(micro_batches(0, 1, 8, 0, False))
    assert out.stats.tokens_per_expert.sum(-1).tolist() == [8 * 16 * 2] * 2
    assert out.stats.tokens.tolist() == [8 * 16] * 2
