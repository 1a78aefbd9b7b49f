"""What every engine must do, on two ranks that share the experts. Each test named pNN excludes pitfall NN.

The native engine on one process is the measure. Letters: L MoE layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moe.balance import BALANCERS, build_balancer
from moe.config import ASSIGNMENTS
from moe.observe.scores import probe_scores
from moe.parallel import Ranks, build_ranks
from moe.train import checkpoint
from moe.train.about import weights_hash
from moe.train.contents import verify_all
from moe.train.engines import Engine, build_engine
from moe.train.evaluate import evaluate
from tests.moe.train.engines.layouts import LR, Step, build, replay, share, whole
from tests.moe.train.engines.shared_attention import part_of
from tests.ranks import run_ranks
from tests.tiny import CPU, tiny_config

CLIP = 0.3  # below the norm of every step: clipping is at work, and shows in the moments
MICRO = 2
MODEL = {"model__num_layers": 4, "model__first_k_dense": 2}  # as two stages of a pipeline, one has no MoE layer
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
NATIVE = {"train__engine": "native"}
ZERO = {f"zero_{stage}": {"train__engine": "deepspeed", "deepspeed__zero_stage": stage} for stage in range(4)}
MEGATRON: dict[str, dict[str, Any]] = {
    "megatron": {"train__engine": "megatron"},
    "megatron_shard": {"train__engine": "megatron", "parallel__data": "shard"},
    "megatron_tp": {"train__engine": "megatron", "parallel__tp": 2},
    "megatron_cp": {"train__engine": "megatron", "parallel__cp": 2},
    "megatron_pp": {"train__engine": "megatron", "parallel__pp": 2, "parallel__ep": 1},
}
ENGINES = {"native": NATIVE} | ZERO | MEGATRON
VENDORS = {"native": ()} | dict.fromkeys(ZERO, (needs_deepspeed,)) | dict.fromkeys(MEGATRON, (needs_megatron,))
engines = pytest.mark.parametrize("name", [pytest.param(name, marks=VENDORS[name]) for name in ENGINES])
THOROUGH = ("native", "zero_1", "zero_3", *MEGATRON)  # stages 0 and 2 differ from these in gradients alone
BY_METHOD = ("native", "zero_1", *MEGATRON)
METHODS = sorted(set(BALANCERS) - {"none", *ASSIGNMENTS})
State = dict[str, np.ndarray]


class Pair(NamedTuple):
    """An engine and what it is trained with."""

    engine: Engine
    balancer: Any
    ranks: Ranks


def start(rank: int, n: int, ep: int, settings: dict[str, Any]) -> Pair:
    base = {"optim__lr": LR, "optim__grad_clip": CLIP, "train__micro_batch_size": MICRO} | MODEL
    engine, ranks = build(rank, n, ep, "replicate", **base | settings)
    config = engine.config
    return Pair(engine, build_balancer(config.balance, list(engine.model.routers), 8, config.model.top_k), ranks)


def train(pair: Pair, step: int, recorded: list[Step] | None = None) -> Step:
    """One step, as the loop takes it; recorded: the steps of one process, whose routing is replayed."""
    engine, balancer, ranks = pair
    routers = list(engine.model.routers.values())
    ids: dict[int, list[np.ndarray]] = {router.layer: [] for router in routers}

    def note(router, _inputs, routing):
        ids[router.layer].append(routing.topk_ids_TK.numpy().copy())

    hooks = [router.register_forward_hook(note) for router in routers]
    if recorded is not None:
        for router, ids_TK in zip(routers, recorded[step].ids, strict=True):
            own = torch.from_numpy(ids_TK).chunk(ranks.data_size)[ranks.data_rank].unflatten(0, (-1, 16))
            own = part_of(own, ranks.rank // ranks.tp % ranks.cp, ranks.cp)
            own = own.chunk(ranks.tp, dim=1)[ranks.rank % ranks.tp]  # a part of every sequence
            parts = iter([part.flatten(0, 1) for part in own.split(MICRO)])
            hooks.append(router.register_forward_pre_hook(lambda r, _i, parts=parts: replay(r, next(parts))))
    engine.set_lr(LR * (1 + step))
    out = engine.forward_backward(share(ranks.data_rank, ranks.data_size, step, MICRO))
    for hook in hooks:
        hook.remove()
    for router in routers if recorded is not None else []:
        router.__dict__.pop("_route", None)  # those of another stage routed nothing
    done = engine.step()
    stats, _ = ranks.start_balance_sum(out.stats).wait()
    if done.applied:
        balancer.step(stats)
        balancer.publish(routers)
    bias = [router.expert_bias_E.tolist() for router in routers]
    loss = float((ranks.sum(out.losses_3) / out.tokens).sum())
    chosen = [np.concatenate(ids[router.layer]) for router in routers if ids[router.layer]]
    return Step(loss, done.grad_norm if done.applied else math.nan, stats.tokens_per_expert.tolist(), bias, chosen, [])


def state_of(engine: Engine) -> State:
    """Every parameter, buffer and moment in full; a collective."""
    state = engine.state_dict()
    return {f"{part}/{key}": whole(value) for part in state for key, value in state[part].items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(v, b[k]) for k, v in a.items())


def facts(rank: int, n: int, ep: int, settings: dict[str, Any], recorded: list[Step], folder: str, name: str) -> dict:
    """Everything that is asked of one engine, on one rank."""
    pair, found = start(rank, n, ep, settings), {}
    engine, ranks = pair.engine, pair.ranks
    found["hash"] = weights_hash(engine.weights(), ranks)
    found["steps"] = [train(pair, step, recorded) for step in range(4)]
    found["state"] = state_of(engine)
    checkpoint.save(
        Path(folder) / name, 4, {"engine": engine.state_dict(), "balancer": pair.balancer.state_dict()}, {}, ranks, 1
    )
    found["damage"] = verify_all(Path(folder) / name / "step-00000004") if rank == 0 else None
    batch = share(ranks.data_rank, ranks.data_size, 9)[0]
    found["ce"] = evaluate(engine.model, [batch], ranks).ce
    if ranks.pp == 1:
        real_T = torch.arange(batch.tokens_BS.numel()) % 16 < 5  # of every sequence the first five are real
        parts = [(batch.tokens_BS, None), (batch.tokens_BS, real_T)]
        found["scores"] = probe_scores(engine.model, parts, ranks).numpy()
    found["evaluation kept"] = same(state_of(engine), found["state"])
    # A step whose gradient is not finite on one rank, and one that the loop refuses.
    factor = math.nan if rank == n - 1 else 1.0
    broken = list(engine.model.routers.values())[-1].register_forward_hook(
        lambda m, i, out: out._replace(topk_weights_TK=out.topk_weights_TK * factor)
    )
    found["bad"] = train(pair, 1)
    broken.remove()
    found["bad kept"] = same(state_of(engine), found["state"])
    engine.forward_backward(share(ranks.data_rank, ranks.data_size, 2, MICRO))
    engine.discard()
    found["discard kept"] = same(state_of(engine), found["state"])
    found["after"] = [train(pair, step) for step in (4, 5)]
    found["end"] = state_of(engine)
    return found


def resumed(
    rank: int, n: int, ep: int, settings: dict[str, Any], folder: str, name: str
) -> tuple[State, list[Step], State]:
    """A fresh engine of other weights, the checkpoint of `name` taken in, two more steps."""
    pair = start(rank, n, ep, settings | {"run__seed": 7})
    state = {"engine": pair.engine.state_dict(), "balancer": pair.balancer.state_dict()}
    path = Path(folder) / name / "step-00000004"
    checkpoint.load(checkpoint.Found(path, {}, checkpoint.manifest.read_census(path)), state, pair.ranks)
    pair.engine.load_state_dict(state["engine"])
    pair.balancer.load_state_dict(state["balancer"])
    pair.balancer.publish(list(pair.engine.model.routers.values()))
    loaded = state_of(pair.engine)
    steps = [train(pair, step) for step in (4, 5)]
    return loaded, steps, state_of(pair.engine)


def methods(rank: int, n: int, settings: dict[str, Any]) -> dict[str, float]:
    """How far the bias of each method is after a step."""
    moved = {}
    for method in METHODS:
        pair = start(rank, n, 2, settings | {"balance__method": method, "balance__rate": None})
        train(pair, 0)
        moved[method] = float(pair.balancer.bias_LE.abs().max())
    return moved


def variants(rank: int, n: int, settings: dict[str, Any]) -> dict[str, Step]:
    """A step each of what changes how the model runs."""
    changes = {
        "full": {"train__activation_checkpointing": "full"},
        "selective": {"train__activation_checkpointing": "selective"},
        "bfloat16": {"train__compute_dtype": "bfloat16"},
        "tied": {"model__tie_embeddings": True},
        "frozen router": {"model__train_router": False},
        "global loss": {"balance__aux_loss": 0.1, "balance__aux_scope": "global"},
    }
    if settings["train__engine"] == "megatron":  # its bfloat16: test_megatron.py
        refused = {"bfloat16", "global loss"} | ({"tied"} if "parallel__pp" in settings else set())
        changes = {what: change for what, change in changes.items() if what not in refused}
    found = {}
    for what, change in changes.items():
        pair = start(rank, n, 2, settings | change)
        seen: set[tuple] = set()
        for router in pair.engine.model.routers.values():
            router.register_forward_hook(
                lambda r, i, out, seen=seen: seen.add((r.weight.dtype, out.topk_weights_TK.dtype))
            )
        first, second = train(pair, 0), train(pair, 1)
        bias = next(iter(pair.engine.model.routers.values())).expert_bias_E.dtype
        seen = seen or {(torch.float32, torch.float32)}  # a stage without routers
        found[what] = first, second, seen == {(torch.float32, torch.float32)} and bias == torch.float32
    return found


def everything(rank: int, n: int, names: list[str], recorded: list[Step], folder: str) -> dict[str, Any]:
    if names[0] in MEGATRON:
        from tests.moe.interop.megatron_model import patch

        warnings.simplefilter("ignore")
        patch()
    found: dict[str, Any] = {name: facts(rank, n, 2, ENGINES[name], recorded, folder, name) for name in names}
    for name in names:
        for source in {name: 0, "native": 0} | (
            {"zero_3": 0} if name in THOROUGH and (Path(folder) / "zero_3").is_dir() else {}
        ):
            found[f"{name} from {source}"] = resumed(rank, n, 2, ENGINES[name], folder, source)
        if name in THOROUGH:
            found[f"variants of {name}"] = variants(rank, n, ENGINES[name])
        if name in BY_METHOD:
            found[f"methods of {name}"] = methods(rank, n, ENGINES[name])
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The measure: its steps, and its state after four of them."""
    pair = start(0, 1, 1, NATIVE)
    first = weights_hash(pair.engine.weights(), pair.ranks)
    steps = [train(pair, step) for step in range(4)]
    return {"hash": first, "steps": steps, "state": state_of(pair.engine)}


@pytest.fixture(scope="module")
def found(alone, tmp_path_factory) -> list[dict[str, Any]]:
    names = ["native", *(ZERO if find_spec("deepspeed") else ())]
    runs = [names, *([name] for name in MEGATRON if find_spec("megatron"))]  # Megatron has one layout a process
    folder, found = str(tmp_path_factory.mktemp("saved")), [{}, {}]
    for names in runs:
        for rank, part in enumerate(run_ranks(everything, 2, names, alone["steps"], folder, timeout_s=400)):
            found[rank] |= part
    return found


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b))


@engines
def test_p01_p22_an_engine_trains_as_one_process_does(name, found, alone):
    assert all(step.norm > CLIP for step in alone["steps"])
    for rank in found:
        assert rank[name]["hash"] == alone["hash"]
        for step, expected in zip(rank[name]["steps"], alone["steps"], strict=True):
            assert step.loss == pytest.approx(expected.loss, rel=1e-5)
            assert step.norm == pytest.approx(expected.norm, rel=1e-5)
            assert step.counts == expected.counts and step.bias == expected.bias
        off = [key for key, value in rank[name]["state"].items() if not close(value, alone["state"][key], 1e-5)]
        assert not off, off
    parts = [rank[name]["state"].keys() for rank in found]  # a stage has its own layers
    assert set().union(*parts) == alone["state"].keys() and all(parts)


@engines
def test_p01_every_rank_has_the_same_bias_to_the_bit(name, found):
    one, other = (rank[name]["after"] for rank in found)
    assert [step.bias for step in one] == [step.bias for step in other] and np.abs(one[-1].bias).max() > 0


@engines
def test_p12_a_skipped_step_and_a_discarded_one_leave_everything_as_it_was(name, found):
    for rank in found:
        assert math.isnan(rank[name]["bad"].norm)
        assert rank[name]["bad kept"] and rank[name]["discard kept"]


@engines
def test_p04_evaluation_and_probes_agree_and_change_nothing(name, found):
    for rank in found:
        assert rank[name]["ce"] == pytest.approx(rank["native"]["ce"], rel=1e-5)
        if "scores" in rank[name]:
            theirs, ours = (
                np.sort(rank[engine]["scores"], axis=1) for engine in (name, "native")
            )  # any order of tokens
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-6)
        assert rank[name]["evaluation kept"]


@engines
def test_p07_p36_a_resumed_run_is_the_run_that_went_on(name, found):
    """To the bit: so what came between, evaluation and steps that were not taken, has left nothing behind either."""
    for rank in found:
        assert rank[name]["damage"] is None
        loaded, steps, end = rank[f"{name} from {name}"]
        assert same(loaded, rank[name]["state"]) and same(end, rank[name]["end"])
        for step, expected in zip(steps, rank[name]["after"], strict=True):
            assert (step.loss, step.norm, step.bias) == (expected.loss, expected.norm, expected.bias)


@pytest.mark.parametrize(
    ("source", "name"),
    [pytest.param("native", name, marks=VENDORS[name]) for name in ENGINES]
    + [pytest.param("zero_3", name, marks=needs_deepspeed) for name in THOROUGH],
)
def test_p26_a_run_may_change_engines(name, source, found):
    saved = {key: value for rank in found for key, value in rank[source]["state"].items()}
    for rank in found:
        loaded, steps, _ = rank[f"{name} from {source}"]
        assert loaded and same(loaded, {key: saved[key] for key in loaded})
        for step, expected in zip(steps, rank[source]["after"], strict=True):
            assert step.loss == pytest.approx(expected.loss, rel=1e-5)
            assert step.norm == pytest.approx(expected.norm, rel=1e-4)


@pytest.mark.parametrize("name", [pytest.param(name, marks=VENDORS[name]) for name in THOROUGH])
def test_p03_p06_p23_checkpointing_bfloat16_and_losses_are_the_model_s_own(name, found):
    for rank in found:
        assert rank[f"variants of {name}"].keys() >= {"full", "selective", "frozen router"}
        for what, (first, second, exact) in rank[f"variants of {name}"].items():
            one, two, _ = rank["variants of native"][what]
            assert exact, f"{what}: router weights, combine weights and bias must be float32"
            assert first.loss == pytest.approx(one.loss, rel=1e-6), what
            assert first.norm == pytest.approx(one.norm, rel=1e-5), what
            assert first.counts == one.counts and first.bias == one.bias, what
            assert second.loss == pytest.approx(two.loss, rel=1e-4), what


@pytest.mark.parametrize("name", [pytest.param(name, marks=VENDORS[name]) for name in BY_METHOD])
def test_p05_every_method_moves_the_bias(name, found):
    for rank in found:
        assert {method for method, moved in rank[f"methods of {name}"].items() if moved > 0} == set(METHODS)


def single(rank: int, n: int, names: list[str]) -> list[list[Step]]:
    found = []
    for name in names:
        pair = start(rank, n, 1, ENGINES[name])
        found.append([train(pair, step) for step in range(3)])
    return found


@needs_deepspeed
def test_one_process_needs_no_launcher(alone):
    for steps in run_ranks(single, 1, ["zero_0", "zero_1", "zero_3"])[0]:
        for step, expected in zip(steps, alone["steps"], strict=False):
            assert step.loss == pytest.approx(expected.loss, rel=1e-5) and step.counts == expected.counts


def offloaded(rank: int, n: int, stages: list[int]) -> list[tuple]:
    """Steps and state without and with offload, which `resolve` allows on a GPU alone."""
    found = []
    for stage in stages:
        parts = []
        for offload in (False, True):
            base = {"optim__lr": LR, "optim__grad_clip": CLIP, "train__micro_batch_size": MICRO, "parallel__ep": 2}
            config = tiny_config(n, **base | ZERO[f"zero_{stage}"])
            section = config.deepspeed.model_copy(update={"offload_optimizer": offload})
            ranks = build_ranks(rank, n, CPU, 2)
            engine = build_engine(config.model_copy(update={"deepspeed": section}), ranks, 0)
            balancer = build_balancer(config.balance, list(engine.model.routers), 8, config.model.top_k)
            pair = Pair(engine, balancer, ranks)
            steps = [train(pair, step) for step in range(3)]
            parts.append(([(step.loss, step.norm, step.bias) for step in steps], state_of(engine)))
        found.append(parts)
    return found


@needs_deepspeed
def test_an_optimizer_on_the_host_trains_the_same():
    """To the bit in stage 1; in stage 3 the norm is summed in another order, by which gradients are clipped: from the second
    step on weights and loss may be a rounding apart."""
    for one, three in run_ranks(offloaded, 2, [1, 3], timeout_s=300):
        assert one[0][0] == one[1][0] and same(one[0][1], one[1][1])
        assert three[0][0][0][0] == three[1][0][0][0]
        for (loss, norm, bias), (other_loss, other_norm, other_bias) in zip(three[0][0], three[1][0], strict=True):
            assert (loss, norm) == pytest.approx((other_loss, other_norm), rel=1e-6) and bias == other_bias
        assert all(close(value, three[0][1][key], 1e-5) for key, value in three[1][1].items())
