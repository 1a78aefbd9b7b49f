"""Our balancers on a stock Megatron-core GPTModel. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist

from moe.balance import build_balancer
from moe.balance.stats import collect, stack
from moe.config import RATES, BalanceSection, ConfigError
from moe.interop.attached import checked
from tests.ranks import run_ranks

pytest.importorskip("megatron.core", reason="needs megatron-core: pip install 'alf-moe[megatron]'")
E, K = 8, 2


@pytest.fixture(scope="module")
def megatron():
    """One rank in this process, and the model to build on it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=0, WORLD_SIZE=1).items():
            patch.setitem(os.environ, name, str(value))
        from megatron.core.tensor_parallel import random

        for module, name in (
            (torch.cuda, "current_device"),
            (random, "_get_cuda_rng_state"),
            (random, "_set_cuda_rng_state"),
        ):
            patch.setattr(module, name, getattr(module, name))  # put back what `begin` replaces
        dist.init_process_group("gloo", rank=0, world_size=1)
        from tests.moe.interop import megatron_model

        megatron_model.begin()
        yield megatron_model
        megatron_model.parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def ids(step=0, batch=4):
    return torch.randint(0, 64, (batch, 12), generator=torch.Generator().manual_seed(step))


def attach(*args, **more):
    from moe.interop.megatron import attach

    return attach(*args, **more)


def biases(megatron, model):
    return torch.stack([router.expert_bias for router in megatron.routers(model)])


def train(megatron, model, tokens, **more):
    megatron.forward(model, tokens, **more).backward()
    model.zero_grad()


@pytest.mark.parametrize("method", sorted(RATES))
def test_p05_every_rule_moves_the_bias_as_on_our_own_router(megatron, method):
    """Against the rule on statistics of the scores that reach Megatron's routers, for three steps of two micro-batches."""
    groups = {"moe_router_num_groups": 2, "moe_router_group_topk": 1} if method == "coordinate" else {}
    model = megatron.build(**groups)
    attached, rule = attach(model, method), build_balancer(checked(method), [1, 2], E, K)
    seen = {router: [] for router in megatron.routers(model)}
    for router in seen:
        router.register_forward_hook(lambda m, args, out: seen[m].append((m.gating(args[0]).detach(), out[1])))
    for step in range(3):
        before = biases(megatron, model).clone()
        assert torch.equal(before, rule.bias_LE)
        for part in ids(step).chunk(2):
            train(megatron, model, part)
        stats = []
        for bias_E, found in zip(before, seen.values(), strict=True):
            scores = torch.cat([logits.reshape(-1, E) for logits, _ in found]).sigmoid()
            chosen = torch.cat([map_TE for _, map_TE in found])
            top = chosen.nonzero()[:, 1].view(-1, K)
            stats.append(collect(rule.needs, scores, bias_E, top, chosen.sum(0), None, *((2, 1) if groups else (1, 1))))
            found.clear()
        rule.step(stack(stats))
        attached.step()
        assert torch.equal(biases(megatron, model), rule.bias_LE) and not torch.equal(rule.bias_LE, before)
    loads = torch.stack([s.tokens_per_expert for s in stats])
    assert attached.metrics()["moe/maxvio_batch/max"] == pytest.approx(float(loads.max() * E / (48 * K) - 1))


def test_sign_is_megatrons_own_update_which_it_replaces(megatron):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    theirs, ours = (megatron.build(moe_router_enable_expert_bias=True) for _ in range(2))
    wrapped = {}
    for model in (theirs, ours):
        wrapped[model] = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    attached = attach([wrapped[ours]], BalanceSection(method="sign", rate=1e-3, centre=False))
    counts = [router.local_tokens_per_expert for router in megatron.routers(ours)]
    for step in range(3):
        for model in (theirs, ours):
            megatron.forward(wrapped[model], ids(step)).backward()
            finalize_model_grads([wrapped[model]])
            wrapped[model].zero_grad_buffer()
        if step == 0:
            assert not biases(megatron, ours).any() and biases(megatron, theirs).any()  # ours moves by `step` alone
        attached.step()
        torch.testing.assert_close(biases(megatron, ours), biases(megatron, theirs), atol=1e-8, rtol=0)
    assert not torch.stack(counts).any() and not ours.config.moe_router_enable_expert_bias  # nor does Megatron count


def test_p02_p03_micro_batches_and_recomputation_count_once(megatron):
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    selective = dict(recompute_granularity="selective", recompute_modules=["moe"])
    results = []
    for settings, parts in (({}, 1), ({}, 4), (full, 1), (full, 2), (selective, 1)):
        model = megatron.build(**settings)
        attached, calls = attach(model, "quantile"), []
        for router in megatron.routers(model):
            router.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for part in ids().chunk(parts):
            train(megatron, model, part)
        attached.step()
        assert len(calls) == 2 * parts * (2 if settings else 1)  # it did recompute
        assert attached.last.tokens.tolist() == [48, 48]
        results.append((attached.last.tokens_per_expert, biases(megatron, model)))
    for counts, bias in results[1:]:
        assert torch.equal(counts, results[0][0])
        torch.testing.assert_close(bias, results[0][1], atol=1e-6, rtol=0)


def test_p04_evaluation_and_no_grad_count_nothing(megatron):
    model = megatron.build()
    attached = attach(model, "sign")
    with torch.no_grad():
        megatron.forward(model, ids())
    model.eval()
    megatron.forward(model, ids())
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        attached.step()
    assert not biases(megatron, model).any()
    model.train()
    train(megatron, model, ids())
    attached.step()
    assert attached.last.tokens.tolist() == [48, 48]


def test_p11_padding_is_no_load(megatron):
    model, seen = megatron.build(), []
    attached = attach(model, "coordinate")
    megatron.routers(model)[0].register_forward_hook(lambda _m, _a, out: seen.append(out[1]))
    padding = torch.zeros(4, 12, dtype=torch.bool)
    padding[0, 5:] = padding[2, 1:] = True
    train(megatron, model, ids(), padding_mask=padding)
    attached.step()
    real = ~padding.T.reshape(-1)  # Megatron's tokens are [S, B]
    assert attached.last.tokens.tolist() == [30, 30]
    assert attached.last.tokens_per_expert[0].tolist() == seen[0][real].sum(0).tolist()
    assert attached.last.response_histogram.sum(-1).tolist() == [[30] * E] * 2


def test_p06_p27_bias_stays_float32_in_bfloat16_and_is_in_the_state_of_the_model(megatron):
    model = megatron.build(moe_router_enable_expert_bias=True)
    for router in megatron.routers(model):
        router.expert_bias += 0.7
    attached = attach(model, BalanceSection(method="sign", rate=1e-3, centre=False))  # goes on from the model's bias
    model.bfloat16()
    train(megatron, model, ids())
    assert torch.equal(biases(megatron, model), torch.full((2, E), 0.7))  # what routed was not rounded
    attached.step()
    moved = biases(megatron, model)
    assert moved.dtype == torch.float32
    assert ((moved - 0.7).abs().sub(1e-3).abs() < 1e-6).logical_or(moved == 0.7).all() and moved.ne(0.7).any()
    assert [key for key in model.sharded_state_dict() if key.endswith("router.expert_bias")]
    again = megatron.build(moe_router_enable_expert_bias=True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(attach(again, "sign").balancer.bias_LE, moved)


def test_p07_p36_state_goes_on_where_it_was(megatron):
    models = [megatron.build(), megatron.build()]
    attached = [attach(model, "coordinate") for model in models]
    for step in range(2):
        train(megatron, models[0], ids(step))
        attached[0].step()
    attached[1].load_state_dict(copy.deepcopy(attached[0].state_dict()))
    assert torch.equal(biases(megatron, models[1]), biases(megatron, models[0]))
    for step in (2, 3):
        for model, balancing in zip(models, attached, strict=True):
            train(megatron, model, ids(step))
            balancing.step()
    assert torch.equal(biases(megatron, models[1]), biases(megatron, models[0]))
    assert attached[1].balancer.step_count == 4


def test_p13_stage_without_moe_layers_is_left_alone(megatron):
    model = megatron.build(moe_layer_freq=[0, 0, 1])
    del model.decoder.layers[2]  # as a pipeline stage sees it
    attached = attach([model], BalanceSection(method="sign", frozen_layers=[2]))
    train(megatron, model, ids())
    attached.step()
    assert attached.metrics() == {} and attached.state_dict()["bias"].shape == (0, E)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"moe_router_score_function": "softmax"}, "moe_router_score_function = 'softmax'"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type = 'sinkhorn'"),
        ({"moe_expert_capacity_factor": 1.5}, "moe_expert_capacity_factor = 1.5"),
        ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps = 0.1"),
        ({"moe_router_force_load_balancing": True}, "moe_router_force_load_balancing = True"),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, "chooses its moe_router_group_topk = 2 groups"),
    ],
)
def test_settings_under_which_no_bias_balances_are_one_sentence(megatron, settings, says):
    with pytest.raises(ConfigError) as refused:
        attach(megatron.build(**settings), "coordinate")
    assert says in str(refused.value)


def _steps(rank, n):
    from tests.moe.interop import megatron_model

    megatron_model.begin(expert_model_parallel_size=n)
    found = []
    for method in ("sign", "coordinate"):
        model = megatron_model.build(ep=n)
        attached = attach(model, method)
        for step in range(3):
            for part in ids(step).chunk(n)[rank].chunk(2):
                train(megatron_model, model, part)
            attached.step(applied=step != 1 or rank != n - 1)  # one rank skips: all do
        found.append((attached.last.tokens_per_expert.tolist(), biases(megatron_model, model).tolist()))
    return found


def test_p01_expert_parallel_ranks_agree_to_the_bit_and_with_one_process(megatron):
    alone, two = _steps(0, 1), run_ranks(_steps, 2, timeout_s=600)
    assert two[0] == two[1]
    for (counts, bias), (want_counts, want_bias) in zip(two[0], alone, strict=True):
        assert counts == want_counts
        torch.testing.assert_close(torch.tensor(bias), torch.tensor(want_bias), atol=1e-6, rtol=0)
