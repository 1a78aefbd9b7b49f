"""Every loss and every balancing method through the native engine: layouts, micro-batches, checkpoints of their state."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe.balance import BALANCERS, build_balancer
from moe.balance.losses import router_losses, sequence_aux_loss
from moe.config import ASSIGNMENTS
from moe.model.loss import IGNORED
from moe.parallel import build_ranks
from moe.train.data import Batch
from moe.train.engines.native import NativeEngine
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, random_tokens, tiny_config

LOSSES = {
    "sequence": {"balance__aux_loss": 0.1, "balance__aux_scope": "sequence"},
    "sequence, unbiased": {
        "balance__aux_loss": 0.1,
        "balance__aux_scope": "sequence",
        "balance__aux_selection": "unbiased",
    },
    "phi": {"balance__phi_loss": 0.1, "balance__phi_rate": 0.5},
    "simbal": {"balance__simbal_loss": 0.01},
    "global": {"balance__aux_loss": 0.1, "balance__aux_scope": "global"},
}


def batches(rank, n, micro, step, padded=True):
    x, y = random_tokens(seed=step)
    if padded:
        y[1, 5:] = IGNORED
        y[6:, 2:] = IGNORED
    per_rank = 8 // n
    return [Batch(x[i : i + micro], y[i : i + micro]) for i in range(rank * per_rank, (rank + 1) * per_rank, micro)]


def steps(rank, n, ep, micro, settings, count=3):
    config = tiny_config(n, parallel__ep=ep, **settings)
    ranks = build_ranks(rank, n, CPU, ep)
    engine = NativeEngine(config, ranks, 0)
    balancer = build_balancer(config.balance, list(engine.model.routers), 8, config.model.top_k)
    rows = []
    for step in range(count):
        out = engine.forward_backward(batches(rank, n, micro, step))
        done = engine.step()
        balancer.step(ranks.start_balance_sum(out.stats).wait()[0])
        balancer.publish(list(engine.model.routers.values()))
        losses = (ranks.sum(out.losses_3) / out.tokens).tolist()
        rows.append((losses, done.grad_norm, {k: v.tolist() for k, v in balancer.state_dict().items()}))
    return rows


def cases(rank, n, ep, micro, names):
    return {name: steps(rank, n, ep, micro, LOSSES[name]) for name in names}


@pytest.fixture(scope="module")
def reference():
    return cases(0, 1, 1, 8, LOSSES)


# The global scope counts the micro-batches so far, so it depends on how many there are, and on nothing else.
@pytest.mark.parametrize(
    ("n", "ep", "micro", "names"),
    [(1, 1, 2, set(LOSSES) - {"global"}), (2, 1, 2, set(LOSSES) - {"global"}), (2, 2, 4, set(LOSSES))],
)
def test_p23_losses_do_not_depend_on_ranks_and_micro_batches(reference, n, ep, micro, names):
    for found in run_ranks(cases, n, ep, micro, sorted(names)):
        for name, rows in found.items():
            for (losses, norm, state), (losses_1, norm_1, state_1) in zip(rows, reference[name], strict=True):
                assert losses == pytest.approx(losses_1, rel=1e-4), name
                assert norm == pytest.approx(norm_1, rel=1e-3), name
                assert losses[1] > 1e-3 or name == "phi", name  # phi's value may have either sign
                for key in state:
                    torch.testing.assert_close(torch.tensor(state[key]), torch.tensor(state_1[key]))


@pytest.mark.parametrize("name", [*LOSSES, "z"])
def test_p23_the_gradient_of_the_loss_reaches_the_router(name):
    grads = []
    for settings in ((LOSSES | {"z": {"balance__z_loss": 0.01}})[name], {}):
        engine = NativeEngine(tiny_config(**settings), ALONE, 0)
        for router in engine.model.routers.values():
            if router.ema_share_E is not None:
                router.ema_share_E.copy_(torch.arange(1.0, 9) / 36)  # at uniform shares phi has no gradient
        engine.forward_backward(batches(0, 1, 8, 0))
        grads.append(next(iter(engine.model.routers.values())).weight.grad.clone())
    assert (grads[0] - grads[1]).norm() > 1e-3 * grads[1].norm()


def collectives(rank, n, scope):
    config = tiny_config(n, balance__aux_loss=0.1, balance__aux_scope=scope)
    ranks = build_ranks(rank, n, CPU, 1)
    engine, calls, real = NativeEngine(config, ranks, 0), [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: calls.append(1) or real(*a, **k)
    engine.forward_backward(batches(rank, n, 2, 0))
    dist.all_reduce = real
    return len(calls)


def test_p29_the_global_scope_costs_one_collective_a_micro_batch_for_all_layers():
    assert {
        a - b for a, b in zip(run_ranks(collectives, 2, "global"), run_ranks(collectives, 2, "sequence"), strict=True)
    } == {2}


def test_global_scope_uses_the_counts_of_the_micro_batches_so_far():
    settings = {"balance__aux_loss": 0.1, "balance__aux_scope": "global", "train__micro_batch_size": 4}
    config = tiny_config(**settings)
    engine = NativeEngine(config, ALONE, 0)
    found = engine.forward_backward(batches(0, 1, 4, 0)).losses_3[1]
    seen, expected = 0, 0.0
    with torch.no_grad():
        for batch in batches(0, 1, 4, 0):
            out = engine.model(*batch, padded=True)
            seen = seen + out.stats.tokens_per_expert.double()
            share_LE = seen / seen.sum(-1, keepdim=True)
            expected += 0.1 * 8 * float((share_LE * out.prob_sum_LE.double()).sum())
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_deepseek_v3_recipe_has_both_a_moving_bias_and_a_loss():
    rows = steps(0, 1, 1, 8, {"balance__aux_loss": 1e-4, "balance__aux_scope": "sequence"})
    losses, _, state = rows[-1]
    assert losses[1] > 0 and torch.tensor(state["bias"]).abs().max() > 0


def test_frozen_router_keeps_its_weights_and_is_balanced_by_its_bias():
    config = tiny_config(model__train_router=False)
    engine = NativeEngine(config, ALONE, 0)
    balancer = build_balancer(config.balance, list(engine.model.routers), 8, 2)
    before = [router.weight.clone() for router in engine.model.routers.values()]
    expert = engine.expert_parameters[0].clone()
    for step in range(2):
        out = engine.forward_backward(batches(0, 1, 8, step))
        engine.step()
        balancer.step(out.stats)
    assert all(torch.equal(a, r.weight) for a, r in zip(before, engine.model.routers.values(), strict=True))
    assert not torch.equal(expert, engine.expert_parameters[0]) and balancer.bias_LE.abs().max() > 0
    engine.load_state_dict(engine.state_dict())


@pytest.mark.parametrize("method", sorted(BALANCERS))
def test_p11_every_method_trains_with_padding_and_counts_only_real_tokens(method):
    settings = {"balance__rate": None, "balance__method": method}
    if method == "base":
        settings["model__top_k"] = 1
    config = tiny_config(**settings)
    engine = NativeEngine(config, ALONE, 0)
    balancer = build_balancer(config.balance, list(engine.model.routers), 8, config.model.top_k)
    for step in range(3):
        out = engine.forward_backward(batches(0, 1, 8, step))
        assert engine.step().applied and bool(out.stats.tokens.eq(out.tokens).all())
        pairs = config.model.top_k * int(out.tokens)
        assert (out.stats.tokens_per_expert.sum(-1) - pairs).abs().max() <= (8 if method == "expert_choice" else 0)
        balancer.step(out.stats)
        balancer.publish(list(engine.model.routers.values()))
    moved = balancer.bias_LE.abs().max() > 0
    assert moved == (method not in ("none", *ASSIGNMENTS))


@pytest.mark.parametrize("method", ["sinkhorn", "base", "expert_choice", "bip_leaky"])
def test_assignments_balance_training_and_leave_evaluation_to_top_k(method):
    settings = {"balance__rate": None, "balance__method": method, "model__top_k": 1, "model__init_std": 0.5}
    engine = NativeEngine(tiny_config(**settings), ALONE, 0)
    plain = NativeEngine(tiny_config(**settings | {"balance__method": "none"}), ALONE, 0)
    x, y = random_tokens()
    with torch.no_grad():
        train, free = (e.model(x, y).stats.tokens_per_expert for e in (engine, plain))
        assert train.double().std(-1).max() < 0.6 * free.double().std(-1).max()
        engine.model.eval()
        first_layer = engine.model(x, y).stats.tokens_per_expert[0]
    assert torch.equal(first_layer, free[0])


def test_hash_routes_a_token_id_always_the_same_way_and_layers_differently():
    engine = NativeEngine(tiny_config(balance__method="hash", balance__rate=None), ALONE, 0)
    routers = list(engine.model.routers.values())
    ids = torch.tensor([5, 9, 5, 7])
    found = [router(torch.randn(4, 32), None, ids).topk_ids_TK for router in routers]
    assert all(torch.equal(f[0], f[2]) for f in found)
    assert not torch.equal(found[0], found[1])


def test_zero_coefficients_give_zero_losses_and_no_gradient_path():
    section = tiny_config().balance
    logits = torch.randn(4, 8, requires_grad=True)
    ids = torch.zeros(4, 2, dtype=torch.int64)
    out = router_losses(
        section, logits, logits.sigmoid(), ids, torch.ones(8).long(), None, torch.zeros(8, 3), None, 4, 2
    )
    assert float(out.aux) == float(out.z) == 0.0 and out.prob_sum_E is None


def test_the_unbiased_sequence_loss_counts_the_router_s_own_k_when_the_method_assigns_another_number():
    section = tiny_config(
        balance__aux_loss=1.0, balance__aux_scope="sequence", balance__aux_selection="unbiased"
    ).balance
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    assigned = torch.arange(6).expand(8, 6)  # as wide as expert choice gives them
    out = router_losses(section, logits, logits.sigmoid(), assigned, torch.ones(6).long(), None, logits, None, 4, 2)
    expected = sequence_aux_loss(logits.sigmoid(), logits.topk(2, -1).indices, 4)
    torch.testing.assert_close(out.aux, expected)


@pytest.mark.parametrize("method", sorted(BALANCERS))
def test_p12_nan_scores_are_a_skipped_step_and_no_crash(method):
    top_k = 1 if method == "base" else 2
    engine = NativeEngine(tiny_config(balance__method=method, balance__rate=None, model__top_k=top_k), ALONE, 0)
    with torch.no_grad():
        next(iter(engine.model.routers.values())).weight[0] = torch.nan
    engine.forward_backward(batches(0, 1, 8, 0))
    assert not engine.step().applied
