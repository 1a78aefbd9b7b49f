"""The Megatron-core engine against the native one, on two ranks that share the experts. Each test named pNN excludes
pitfall NN. On the CPU `tests.moe.interop.megatron_model.patch` gives Megatron the device it asks CUDA for."""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.balance import build_balancer
from moe.config import RATES, Config, resolve, validate
from moe.model.loss import IGNORED
from moe.observe.scores import probe_scores
from moe.observe.sinks import read_metrics
from moe.parallel import Ranks, build_ranks
from moe.train import checkpoint
from moe.train.about import weights_hash
from moe.train.data import Batch
from moe.train.engines import Engine, build_engine
from moe.train.engines.megatron_weights import from_ours, plain, rows, to_ours
from moe.train.evaluate import evaluate
from moe.train.loop import train
from tests.corpus import make_token_folder
from tests.moe.train.engines.layouts import share, whole
from tests.ranks import run_ranks
from tests.tiny import CPU, tiny_config, tiny_tree

needs_megatron = pytest.mark.skipif(
    find_spec("megatron") is None, reason="needs megatron-core: pip install 'alf-moe[megatron]'"
)
STEPS = 4


def config(n: int, engine: str, ep: int = 2, **settings: Any) -> Config:
    """The tiny configuration as on a GPU, in what a CPU can do: Megatron is refused without one."""
    tree = tiny_tree()
    tree["parallel"] = {"ep": ep}
    tree["train"] |= {"engine": engine, "compute_dtype": "float32", "kernels": "torch"}
    tree["balance"] |= {"aux_loss": 0.01, "aux_scope": "sequence", "z_loss": 1e-3}
    for path, value in settings.items():
        section, key = path.split("__")
        tree.setdefault(section, {})[key] = value
    return resolve(validate(tree), n, cuda=True)


def batches(rank: int, n: int, step: int) -> list[Batch]:
    """Micro-batches of two sequences; in odd steps every fourth sequence is padded."""
    found = share(rank, n, step, 2)
    if step % 2:
        for batch in found[::2]:
            batch.targets_BS[0, 5:] = IGNORED
    return found


class Pair:
    """An engine and its balancer."""

    def __init__(self, config: Config, ranks: Ranks):
        self.engine: Engine = build_engine(config, ranks, 0)
        self.routers = self.engine.model.routers
        self.balancer = build_balancer(config.balance, list(self.routers), 8, config.model.top_k)
        self.ranks = ranks

    def step(self, number: int) -> dict[str, Any]:
        ids: dict[int, list[np.ndarray]] = {layer: [] for layer in self.routers}
        off: list[float] = []

        def note(router, inputs, out):
            ids[router.layer].append(out.topk_ids_TK.numpy().copy())
            with torch.autocast("cpu", enabled=False):
                exact_TE = torch.nn.functional.linear(inputs[0].float(), router.weight).sigmoid()
            off.append(float((out.scores_TE - exact_TE).abs().max()))

        hooks = [router.register_forward_hook(note) for router in self.routers.values()]
        out = self.engine.forward_backward(batches(self.ranks.data_rank, self.ranks.data_size, number))
        for hook in hooks:
            hook.remove()
        done = self.engine.step()
        stats, _ = self.ranks.start_balance_sum(out.stats).wait()
        if done.applied:
            self.balancer.step(stats)
            self.balancer.publish(list(self.routers.values()))
        return {
            "losses": (self.ranks.sum(out.losses_3) / out.tokens).tolist(),
            "norm": done.grad_norm,
            "counts": stats.tokens_per_expert.tolist(),
            "tokens": stats.tokens.tolist(),
            "bias": torch.stack([router.expert_bias_E for router in self.routers.values()]).tolist(),
            "off": max(off, default=0.0),
            "ids": [np.sort(np.concatenate(each), -1).tolist() for each in ids.values() if each],
        }

    def state(self) -> dict[str, np.ndarray]:
        """All of it, in full; a collective."""
        state = self.engine.state_dict()
        return {f"{part}/{name}": whole(value) for part in state for name, value in state[part].items()}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(value, b[name]) for name, value in a.items())


def load(found: checkpoint.Found, pair: Pair) -> None:
    state = {"engine": pair.engine.state_dict(), "balancer": pair.balancer.state_dict()}
    checkpoint.load(found, state, pair.ranks)
    pair.engine.load_state_dict(state["engine"])
    pair.balancer.load_state_dict(state["balancer"])


def facts(rank: int, n: int, folder: str) -> dict[str, Any]:
    """Everything that is asked, on one rank."""
    warnings.simplefilter("ignore")
    from tests.moe.interop.megatron_model import patch

    patch()
    ranks, found = build_ranks(rank, n, CPU, n), {}
    pairs = {name: Pair(config(n, name), ranks) for name in ("megatron", "native")}
    for name, pair in pairs.items():
        found[name] = {"hash": weights_hash(pair.engine.weights(), ranks)}
        found[name]["steps"] = [pair.step(number) for number in range(STEPS)]
        found[name]["state"] = pair.state()
        val = batches(rank, n, 9)
        found[name]["val"] = evaluate(pair.engine.model, val, ranks)[:2]
        found[name]["scores"] = probe_scores(pair.engine.model, [(val[0].tokens_BS, None)], ranks).numpy()
        found[name]["kept"] = equal(pair.state(), found[name]["state"])
        state = {"engine": pair.engine.state_dict(), "balancer": pair.balancer.state_dict()}
        checkpoint.save(Path(folder) / name, STEPS, state, {}, ranks, 1)
    for name, pair in pairs.items():
        for other in pairs:  # its own checkpoint, and the other engine's
            saved = next(checkpoint.whole(Path(folder) / other, ranks, print))
            fresh = Pair(config(n, name), ranks)
            load(saved, fresh)
            found[name][f"loaded {other}"] = equal(fresh.state(), found[other]["state"])
            found[name][f"after {other}"] = fresh.step(STEPS)
        found[name]["after"] = pair.step(STEPS)
    broken = pairs["megatron"]
    before, weight = broken.state(), broken.engine.model.plain_parameters()[0][1]
    broken.engine.forward_backward(batches(rank, n, 5))
    weight.grad[0, 0] = math.nan
    found["bad"] = broken.engine.step().applied, equal(broken.state(), before)
    broken.engine.forward_backward(batches(rank, n, 5))
    broken.engine.discard()
    found["discarded"] = equal(broken.state(), before)
    broken.step(6)
    fresh = Pair(config(n, "megatron"), ranks)
    load(next(checkpoint.whole(Path(folder) / "megatron", ranks, print)), fresh)
    fresh.step(STEPS)
    fresh.step(6)
    found["nothing left"] = equal(fresh.state(), broken.state())
    for mode in ("none", "selective", "full"):
        pair = Pair(config(n, "megatron", train__activation_checkpointing=mode), ranks)
        found[mode] = pair.step(1)
    found["bfloat16"] = {}
    for name in ("megatron", "native"):
        pair = Pair(config(n, name, train__compute_dtype="bfloat16"), ranks)
        # On CUDA Megatron's linear layers take autocast into their backward pass by themselves.
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "megatron"):
            found["bfloat16"][name] = pair.step(0)
    found["methods"] = {}
    for method in RATES:
        settings = {"balance__method": method, "balance__rate": RATES[method], "balance__aux_loss": 0.0}
        bias = [Pair(config(n, name, **settings), ranks).step(0)["bias"] for name in ("megatron", "native")]
        found["methods"][method] = bias
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(facts, 2, str(tmp_path_factory.mktemp("megatron")), timeout_s=600)


@needs_megatron
def test_it_trains_as_the_native_engine_from_the_same_weights(two):
    theirs, ours = two[0]["megatron"], two[0]["native"]
    assert theirs["hash"] == ours["hash"]
    first, want = theirs["steps"][0], ours["steps"][0]
    assert first["ids"] == want["ids"] and first["counts"] == want["counts"] and first["bias"] == want["bias"]
    for step, want in zip(theirs["steps"], ours["steps"], strict=True):
        assert step["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert step["norm"] == pytest.approx(want["norm"], rel=1e-4)
        assert (
            step["tokens"] == want["tokens"] and sum(step["counts"][0]) == 2 * step["tokens"][0]
        )  # p11: padding is none
    assert theirs["steps"][1]["tokens"][0] < theirs["steps"][0]["tokens"][0]
    assert theirs["steps"][0]["losses"][1] > 0 and theirs["steps"][0]["losses"][2] > 0
    for name, value in ours["state"].items():
        off = np.linalg.norm(theirs["state"][name] - value) / max(1e-12, np.linalg.norm(value))
        assert off < 5e-3, (name, off)
    moved = [name for name, value in theirs["state"].items() if name.endswith("exp_avg") and not np.any(value)]
    assert not moved


@needs_megatron
def test_p01_bias_is_the_same_on_both_ranks_and_moves(two):
    for step, other in zip(two[0]["megatron"]["steps"], two[1]["megatron"]["steps"], strict=True):
        assert step["bias"] == other["bias"] and step["counts"] == other["counts"]
    assert np.abs(two[0]["megatron"]["steps"][-1]["bias"]).min(axis=1).max() > 0


@needs_megatron
def test_p05_every_rule_moves_the_bias_as_in_the_native_engine(two):
    for method, (theirs, ours) in two[0]["methods"].items():
        assert np.abs(theirs).max(axis=1).min() > 0, method
        np.testing.assert_allclose(theirs, ours, atol=1e-5, err_msg=method)


@needs_megatron
def test_p04_evaluation_and_probe_are_the_native_ones_and_change_nothing(two):
    theirs, ours = two[0]["megatron"], two[0]["native"]
    assert theirs["val"] == pytest.approx(ours["val"], rel=1e-5)
    np.testing.assert_allclose(theirs["scores"], ours["scores"], atol=1e-4)
    assert theirs["kept"]


@needs_megatron
def test_p07_p26_checkpoints_are_those_of_the_native_engine(two):
    for name in ("megatron", "native"):
        for other in ("megatron", "native"):
            assert two[0][name][f"loaded {other}"], (name, other)
        assert two[0][name][f"after {name}"] == two[0][name]["after"]  # to the bit, on the same engine
    theirs, ours = (two[0][name]["after native"] for name in ("megatron", "native"))
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5) and theirs["counts"] == ours["counts"]
    assert theirs["norm"] == pytest.approx(ours["norm"], rel=1e-5)


@needs_megatron
def test_p12_skipped_steps_leave_nothing(two):
    assert two[0]["bad"] == (False, True) and two[0]["discarded"] and two[0]["nothing left"]


@needs_megatron
def test_p03_p23_recomputation_counts_once_and_keeps_the_losses_gradients(two):
    for mode in ("selective", "full"):
        assert two[0][mode]["counts"] == two[0]["none"]["counts"]
        assert two[0][mode]["losses"] == two[0]["none"]["losses"]
        assert two[0][mode]["norm"] == pytest.approx(two[0]["none"]["norm"], rel=1e-6)


@needs_megatron
def test_p06_bfloat16_is_in_the_products_and_not_in_the_router(two):
    theirs, ours = (two[0]["bfloat16"][name] for name in ("megatron", "native"))
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)  # 1e-4 seen
    assert theirs["norm"] == pytest.approx(ours["norm"], rel=1e-2)  # 1e-3 seen
    assert theirs["losses"] != pytest.approx(two[0]["megatron"]["steps"][0]["losses"], rel=1e-6)
    assert theirs["off"] < 1e-6


def two_steps(rank: int, n: int, ep: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    from tests.moe.interop.megatron_model import patch

    patch()  # the engine starts Megatron itself
    ranks = build_ranks(rank, n, CPU, ep)
    found = {}
    for name in ("megatron", "native"):
        pair = Pair(config(n, name, ep), ranks)
        found[name] = [pair.step(0), pair.step(1)]
    return found


@needs_megatron
@pytest.mark.parametrize(("n", "ep"), [(1, 1), (2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_p22_other_layouts_train_as_the_native_engine(n, ep):
    for found in run_ranks(two_steps, n, ep, timeout_s=600):
        for step, want in zip(found["megatron"], found["native"], strict=True):
            assert step["losses"] == pytest.approx(want["losses"], rel=1e-5)
            assert step["norm"] == pytest.approx(want["norm"], rel=1e-4)
            assert step["counts"] == want["counts"] and step["bias"] == want["bias"]


def run_both(rank: int, n: int, folder: str) -> list[dict[str, float]]:
    """Six steps at once, and three and three, through the loop with all that it does."""
    warnings.simplefilter("ignore")
    from tests.moe.interop.megatron_model import patch

    patch()
    ranks = build_ranks(rank, n, CPU, n)
    data = Path(folder) / "data"
    if rank == 0:
        make_token_folder(data)
    ranks.barrier()
    settings = {
        "data__path": str(data), "observe__wandb": "offline", "observe__log_every": 1, "observe__regret_every": 2,
        "observe__regret_reservoir": 64, "observe__record_scores": 2, "observe__peak_tflops": 1.0,
        "optim__schedule": "wsd", "optim__decay_share": 0.0,
    }  # fmt: skip
    for name, steps, resume in (("whole", 6, False), ("parts", 3, False), ("parts", 6, True)):
        c = config(n, "megatron", train__steps=steps, **settings)
        assert train(c, ranks, Path(folder) / name, resume).code == 0
    return [read_metrics(Path(folder) / name / "metrics.jsonl") for name in ("whole", "parts")]


@needs_megatron
def test_p07_a_run_through_the_loop_resumes_to_the_bit(tmp_path):
    whole, parts = run_ranks(run_both, 2, str(tmp_path), timeout_s=600)[0]
    losses = {name: {row["train/step"]: row.get("loss/ce") for row in rows if "loss/ce" in row} for name, rows in
              (("whole", whole), ("parts", parts))}  # fmt: skip
    assert losses["whole"] == losses["parts"] and len(losses["whole"]) == 6
    assert losses["whole"][6] < losses["whole"][1]
    assert max(row.get("regret/probes", 0) for row in whole) == 3 and whole[-2]["moe/bias_range/max"] > 0
    assert list((tmp_path / "whole" / "scores").glob("*.npz")) and list((tmp_path / "whole" / "wandb").glob("*"))


def test_weights_go_over_and_back_for_every_shape_of_attention():
    for settings in ({"model__num_kv_heads": 1}, {"model__tie_embeddings": True, "model__head_dim": 12}):
        m = tiny_config(**settings).model
        ours = {}
        generator = torch.Generator().manual_seed(0)
        sizes = {"wq": m.num_heads * m.head_dim, "wk": m.num_kv_heads * m.head_dim, "wv": m.num_kv_heads * m.head_dim}
        theirs = {}
        for kind, names, parts in rows(m, m.num_experts):
            for name in names:
                shape = (8, 6, 4) if kind == "stack" else (sizes[name.split(".")[-2]], 4) if kind == "qkv" else (3,)
                ours[name] = torch.randn(shape, generator=generator)
            for part in parts:
                theirs[part] = torch.zeros(
                    (6, 4) if kind == "stack" else (sum(sizes.values()), 4) if kind == "qkv" else 3
                )
        from_ours(ours, theirs, m, 1)
        back = to_ours(theirs, m, 1, None)
        assert back.keys() == ours.keys() and all(torch.equal(value, ours[name]) for name, value in back.items())
        assert ("head.weight" in ours) != m.tie_embeddings
        theirs["decoder.layers.0.mistake.weight"] = torch.zeros(1)
        with pytest.raises(AssertionError, match="mistake"):
            to_ours(theirs, m, 1, None)


def test_names_with_transformer_engine_are_those_without():
    for fused, apart in (
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.1.input_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
        ("decoder.layers.2.mlp.experts.linear_fc2.weight11",
         "decoder.layers.2.mlp.experts.local_experts.11.linear_fc2.weight"),
        ("decoder.layers.2.mlp.shared_experts.linear_fc1.weight", "decoder.layers.2.mlp.shared_experts.linear_fc1.weight"),
    ):  # fmt: skip
        assert plain(fused) == apart
