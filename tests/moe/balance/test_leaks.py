"""Causality: on fresh uniform random tokens nothing can beat ln V before the update, unless routing tells of the future.

Tokens x_1 ... x_S are i.i.d. uniform and never repeated; position i predicts x_{i+1}. A model whose experts for position i
depend on later tokens can learn to read them off the choice. Expert choice is the positive control: the test has power.
"""

from __future__ import annotations

import math

import pytest
import torch

from kernels.permute import count_tokens
from kernels.router_topk import topk_lowest_index
from moe.balance import BALANCERS, Balancer, build_balancer
from moe.balance.assignment import ROUTES, expert_choice_route
from moe.balance.stats import collect, stack
from moe.balance.streams import stream
from moe.config import RATES, BalanceSection
from moe.train.data import Batch
from moe.train.engines.native import NativeEngine
from tests.tiny import ALONE, tiny_config

RULES = sorted(name for name, kind in BALANCERS.items() if kind is not Balancer)
VOCABULARY, SEQ, BATCH, STEPS, WINDOW = 4, 4, 64, 300, 100  # the window is the last WINDOW steps, declared here


def excess(method):
    """Cross-entropy over the window minus ln V, in standard errors, taken before each update."""
    config = tiny_config(
        model__vocab_size=VOCABULARY,
        model__num_layers=2,
        model__num_experts=4,
        model__top_k=1,
        model__num_shared_experts=0,
        model__renormalize=False,
        model__init_std=0.3,
        data__seq_len=SEQ,
        train__batch_size=BATCH,
        train__steps=STEPS,
        optim__lr=3e-3,
        balance__method=method,
        balance__rate=RATES.get(method),
    )
    engine = NativeEngine(config, ALONE, 0)
    balancer = build_balancer(config.balance, list(engine.model.routers), 4, 1)
    rng, found = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        ids = torch.randint(0, VOCABULARY, (BATCH, SEQ + 1), generator=rng)
        out = engine.forward_backward([Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())])
        if step >= STEPS - WINDOW:
            found.append(float(out.losses_3[0] / out.tokens))
        engine.step()
        balancer.step(out.stats)
        balancer.publish(list(engine.model.routers.values()))
    loss = torch.tensor(found)
    return float((loss.mean() - math.log(VOCABULARY)) / (loss.std() / len(loss) ** 0.5))


def chunked_expert_choice(batch):
    """Every sequence of SEQ tokens on its own: what is chosen among few tokens tells more about each of them."""
    chunks = batch.scores_TE.split(SEQ)
    return torch.cat([expert_choice_route(chunk, SEQ // chunk.shape[1]).topk_ids_TK for chunk in chunks])


def test_expert_choice_leaks_and_the_test_sees_it(monkeypatch):
    monkeypatch.setitem(ROUTES, "expert_choice", chunked_expert_choice)
    assert excess("expert_choice") < -10


@pytest.mark.parametrize("method", [*RULES, "hash"])
def test_no_bias_rule_leaks(method):
    assert excess(method) > -3


# -- routing itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RULES)
def test_routing_in_training_does_not_depend_on_later_tokens_or_other_sequences(method):
    config = tiny_config(balance__method=method, balance__rate=RATES[method])
    engine, rng = NativeEngine(config, ALONE, 0), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (8, 17), generator=rng)
    changed = ids.clone()
    changed[:, 9:] = torch.randint(0, 128, (8, 8), generator=rng)
    changed[4:] = torch.randint(0, 128, (4, 17), generator=rng)
    before, after = (routes(engine, batch) for batch in (ids, changed))
    for a, b in zip(before, after, strict=True):
        a, b = a.view(8, 16, 2), b.view(8, 16, 2)
        assert torch.equal(a[:4, :9], b[:4, :9]) and not torch.equal(a[:4, 9:], b[:4, 9:])


def test_expert_choice_routes_an_earlier_token_by_later_ones():
    config = tiny_config(balance__method="expert_choice", balance__rate=None)
    engine, rng = NativeEngine(config, ALONE, 0), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (8, 17), generator=rng)
    changed = ids.clone()
    changed[:, 9:] = torch.randint(0, 128, (8, 8), generator=rng)
    a, b = (routes(engine, batch)[0].view(8, 16, 8) for batch in (ids, changed))
    assert not torch.equal(a[:, :9], b[:, :9])


def routes(engine, ids):
    found = []
    hooks = [
        router.register_forward_hook(lambda _m, _i, routing: found.append(routing.topk_ids_TK))
        for router in engine.model.routers.values()
    ]
    with torch.no_grad():
        engine.model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("method", RULES)
def test_the_order_test_sees_a_bias_that_is_used_one_batch_too_early(method):
    section = BalanceSection(method=method, rate=0.5 if method in ("sign", "rms", "smebu") else RATES[method])
    rule = build_balancer(section, [0], 8, 2)
    scores = next(stream("skewed", 200, 8, "sigmoid", 1, seed=0))

    def routed(bias_E):
        return topk_lowest_index(scores + bias_E, 2)

    right = routed(rule.bias_LE[0])
    rule.step(stack([collect(rule.needs, scores, rule.bias_LE[0], right, count_tokens(right, 8))]))
    assert not torch.equal(right, routed(rule.bias_LE[0]))
