"""`train.compile`: the same training, and whoever looks into the model still sees it. With a backend that compiles nothing but
goes through the same graphs; Inductor itself once."""

from __future__ import annotations

import shutil

import pytest
import torch

from moe.balance import build_balancer
from moe.observe.scores import probe_scores
from moe.parallel import build_ranks
from moe.train.data import Batch
from moe.train.engines.native import NativeEngine
from tests.ranks import run_ranks
from tests.tiny import CPU, random_tokens, tiny_config


def trained(rank: int, n: int, backend: str | None, settings: dict) -> dict:
    """Three steps: losses, bias, and the scores that a probe reads after it."""
    config = tiny_config(n, parallel__ep=n, train__compile=backend is not None, **settings)
    ranks = build_ranks(rank, n, CPU, n)
    compile_block = torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        if backend not in (None, "inductor"):
            patch.setattr(torch.nn.Module, "compile", lambda module: compile_block(module, backend=backend))
        torch._dynamo.reset()
        engine = NativeEngine(config, ranks, 0)
    assert [block._compiled_call_impl is not None for block in engine.model.blocks] == [backend is not None] * 3
    balancer = build_balancer(config.balance, list(engine.model.routers), 8, 2)
    x, y = random_tokens()
    share = slice(rank * 8 // n, (rank + 1) * 8 // n)
    losses = []
    for _ in range(3):
        out = engine.forward_backward([Batch(x[share], y[share])])
        engine.step()
        stats, _ = ranks.start_balance_sum(out.stats).wait()
        balancer.step(stats)
        balancer.publish(list(engine.model.routers.values()))
        losses.append((ranks.sum(out.losses_3) / out.tokens).tolist())
    seen = probe_scores(engine.model, [(x[share], None)], ranks).tolist()
    return {"losses": losses, "bias": balancer.bias_LE.tolist(), "scores": seen}


def same(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"train__activation_checkpointing": "full", "balance__method": "coordinate", "balance__rate": "auto"}],
    ids=str,
)
def test_compiled_blocks_train_alike_and_a_probe_sees_their_scores(settings):
    same(trained(0, 1, "aot_eager", settings), trained(0, 1, None, settings))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_trains_alike():
    same(trained(0, 1, "inductor", {}), trained(0, 1, None, {}))


@pytest.mark.slow
@pytest.mark.parametrize("data", ["replicate", "shard"])
def test_over_two_ranks_with_their_experts_apart(data):
    settings = {"parallel__data": data}
    (plain, _), (compiled, other) = (run_ranks(trained, 2, backend, settings) for backend in (None, "aot_eager"))
    same(compiled, plain)
    assert compiled == other
