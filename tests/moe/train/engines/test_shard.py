"""FSDP2 in particular: what its hooks, policies and shards could break. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moe.balance import build_balancer
from moe.observe.scores import probe_scores
from moe.parallel import build_ranks
from moe.train import checkpoint
from moe.train.about import weights_hash
from moe.train.engines.native import NativeEngine
from moe.train.evaluate import evaluate
from tests.moe.train.engines.layouts import build, share, whole
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU

SHARDED = [(4, "shard"), (2, "shard"), (1, "shard")]


def state_of(engine: NativeEngine) -> dict[str, np.ndarray]:
    """Every parameter, buffer and moment in full."""
    state = engine.state_dict()
    return {f"{part}/{key}": whole(value) for part in state for key, value in state[part].items()}


def train(engine: NativeEngine, ranks, steps: int, micro: int | None = None) -> list[float]:
    balancer = build_balancer(engine.config.balance, list(engine.model.routers), 8, 2)
    norms = []
    for step in range(steps):
        out = engine.forward_backward(share(ranks.rank, ranks.world_size, step, micro))
        norms.append(engine.step().grad_norm)
        balancer.step(ranks.start_balance_sum(out.stats).wait()[0])
        balancer.publish(list(engine.model.routers.values()))
    return norms


def one(rank, n, ep, data, folder):
    """One rank's share of everything that is asked of a layout."""
    engine, ranks = build(rank, n, ep, data)
    found = {"hash": weights_hash(engine.weights(), ranks), "shards": shards(engine)}
    found["norms"] = train(engine, ranks, 2)
    found["saved"] = state_of(engine) if rank == 0 else len(state_of(engine))
    checkpoint.save(Path(folder) / f"{n}-{ep}-{data}", 2, engine.state_dict(), {}, ranks, 1)
    # Forward passes without backward between two steps, by either way in, leave no trace.
    batch = share(rank, n, 5)[0]
    found["scores"] = probe_scores(engine.model, [(batch.tokens_BS, None)], ranks).numpy()
    found["ce"] = evaluate(engine.model, [batch], ranks).ce
    kept = state_of(engine)
    found["kept"] = all(np.array_equal(v, kept[k]) for k, v in found["saved"].items()) if rank == 0 else None
    found["after"] = train(engine, ranks, 1)
    return found


def shards(engine: NativeEngine) -> dict[str, tuple[int, int]]:
    """Elements of each parameter: on this rank, in all."""
    pairs = [(name, p) for name, p in engine.model.named_parameters()]
    return {name: (p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel()) for name, p in pairs}


def every(rank, n, layouts, folder):
    return [one(rank, n, ep, data, folder) for ep, data in layouts]


def reload(rank, n, layouts, folder, names):
    """The state that each layout finds in each of these checkpoints of the folder."""
    found = {}
    for ep, data in layouts:
        for name in names:
            engine, ranks = build(rank, n, ep, data, run__seed=7)  # other weights
            state = engine.state_dict()
            checkpoint.load(Path(folder) / name / "step-00000002", state, ranks)
            engine.load_state_dict(state)
            loaded = state_of(engine)
            found[ep, data, name] = (loaded if rank == 0 else None, train(engine, ranks, 1))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def alone(folder):
    return every(0, 1, [(1, "replicate")], str(folder))[0]


@pytest.fixture(scope="module")
def four(folder, alone):
    return run_ranks(every, 4, [*SHARDED, (4, "replicate")], str(folder))


def test_every_parameter_is_sharded_and_none_is_held_whole(four):
    for ranks in four:
        for (ep, _), found in zip(SHARDED, ranks, strict=False):
            for name, (mine, all_of_it) in found["shards"].items():
                assert mine == all_of_it / 4, (ep, name)


def test_p22_norm_and_weights_do_not_depend_on_the_layout(four, alone):
    for ranks in four:
        for found in ranks:
            assert found["hash"] == alone["hash"]
            assert found["norms"] == pytest.approx(alone["norms"], rel=1e-5)


def test_forward_passes_between_steps_change_nothing(four, alone):
    for ranks in four:
        for found in ranks:
            assert found["ce"] == pytest.approx(alone["ce"], rel=1e-5)
            np.testing.assert_allclose(found["scores"], alone["scores"], rtol=1e-3, atol=1e-5)
            assert found["after"] == pytest.approx(alone["after"], rel=1e-4) and found["kept"] is not False


@pytest.fixture(scope="module")
def saved(four, alone):
    layouts = [*SHARDED, (4, "replicate")]
    return {"1-1-replicate": alone} | {f"4-{ep}-{data}": f for (ep, data), f in zip(layouts, four[0], strict=True)}


def check_reload(found, saved):
    for ranks in found:
        for (ep, data, name), (loaded, norm) in ranks.items():
            assert norm == pytest.approx(saved[name]["after"], rel=1e-4)
            if loaded is not None:  # bitwise, of every parameter, moment and bias
                assert loaded.keys() == saved[name]["saved"].keys(), (ep, data, name)
                for key, value in saved[name]["saved"].items():
                    assert np.array_equal(loaded[key], value), (ep, data, name, key)


def test_p07_p26_a_sharded_checkpoint_loads_in_other_layouts(saved, folder):
    for found in saved.values():  # census: all experts there, and no two alike
        for name in ("w13", "w2"):
            experts = [
                e.tobytes() for layer in (1, 2) for e in found["saved"][f"model/blocks.{layer}.moe.experts.{name}"]
            ]
            assert len(experts) == len(set(experts)) == 2 * 8
        assert np.abs(found["saved"]["model/blocks.1.moe.router.expert_bias_E"]).max() > 0
    check_reload([reload(0, 1, [(1, "replicate")], str(folder), list(saved))], saved)
    check_reload(run_ranks(reload, 2, [(2, "shard")], str(folder), ["1-1-replicate", "4-2-shard"]), saved)


@pytest.mark.slow
def test_p07_p26_a_checkpoint_of_any_layout_loads_in_any_other(saved, folder):
    for n, layouts in ((2, [(1, "shard"), (2, "replicate")]), (4, [*SHARDED, (1, "replicate"), (4, "replicate")])):
        check_reload(run_ranks(reload, n, layouts, str(folder), list(saved), timeout_s=300), saved)


def odd(rank, n):
    """Cases that are rare: recompute, dense stacks, idle experts, bfloat16, few experts a rank."""
    found = {}
    for mode in ("none", "selective", "full"):
        engine, ranks = build(rank, n, 1, "shard", train__activation_checkpointing=mode)
        out = engine.forward_backward(share(rank, n, 0, micro=2))
        counts = ranks.sum(out.stats.tokens_per_expert).tolist()
        found[mode] = counts, engine.step().grad_norm
    engine, ranks = build(rank, n, 1, "shard", model__first_k_dense=3, balance__method="none", balance__rate=None)
    found["dense"] = train(engine, ranks, 1)
    engine, ranks = build(rank, n, 2, "shard")
    for router in engine.model.routers.values():
        router.expert_bias_E[:2] = 9.0
    engine.forward_backward(share(rank, n, 0))
    grads = {name: p.grad for name, p in engine.model.named_parameters() if ".experts." in name}
    found["idle"] = {name: whole(grad) for name, grad in grads.items()}
    engine, ranks = build(rank, n, 2, "shard", train__compute_dtype="bfloat16")
    seen = []
    block, router = engine.model.blocks[1], engine.model.routers[1]
    router.register_forward_hook(lambda m, _i, out: seen.append((m.weight.dtype, out.topk_weights_TK.dtype)))
    router.expert_bias_E.fill_(0.3000001)
    block.attention.register_forward_hook(lambda m, _i, out: seen.append((m.wq.weight.dtype, out.dtype)))
    engine.forward_backward(share(rank, n, 0))
    exact = bool((router.expert_bias_E == torch.tensor(0.3000001)).all())
    found["bfloat16"] = seen, {p.dtype for p in engine.model.parameters()}, router.expert_bias_E.dtype, exact
    calls, real = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: calls.append(1) or real(*a, **k)
    ranks.start_balance_sum(engine.forward_backward(share(rank, n, 0, micro=1)).stats).wait()
    dist.all_reduce = real
    found["all_reduces"] = len(calls)
    found["units"] = sum(isinstance(m, FSDPModule) for m in engine.model.modules())
    return found


@pytest.fixture(scope="module")
def rare():
    return run_ranks(odd, 2)


def test_p03_recompute_under_sharding_counts_once_and_changes_nothing(rare):
    for found in rare:
        assert sum(found["none"][0][0]) == 8 * 16 * 2
        for mode in ("selective", "full"):
            assert found[mode][0] == found["none"][0]
            assert found[mode][1] == pytest.approx(found["none"][1], rel=1e-6)


def test_p13_a_dense_stack_trains_sharded(rare):
    engine, ranks = build(0, 1, 1, "replicate", model__first_k_dense=3, balance__method="none", balance__rate=None)
    expected = train(engine, ranks, 1)
    assert all(found["dense"] == pytest.approx(expected, rel=1e-5) for found in rare)


def test_p18_idle_experts_have_zero_gradients_and_nobody_hangs(rare):
    for found in rare:
        for name, grad in found["idle"].items():
            assert np.isfinite(grad).all() and (grad[2:] == 0).all() and np.abs(grad[:2]).sum() > 0, name


def test_p06_router_and_bias_are_float32_when_the_rest_is_gathered_in_bfloat16(rare):
    for seen, parameters, bias, exact in (found["bfloat16"] for found in rare):
        assert (torch.float32, torch.float32) in seen and (torch.bfloat16, torch.bfloat16) in seen
        assert parameters == {torch.float32} and bias == torch.float32 and exact


def test_p29_one_balancing_collective_a_step(rare):
    assert all(found["all_reduces"] == 2 for found in rare)  # tokens of the step, statistics of all layers


def test_one_rank_has_nothing_to_shard():
    engine, _ = build(0, 1, 1, "shard")
    assert not any(isinstance(module, FSDPModule) for module in engine.model.modules())
    assert build_ranks(0, 1, CPU, 1) == ALONE
