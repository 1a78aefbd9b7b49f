"""The Megatron-core engine against the native one, on two ranks that share the experts. Each test named pNN excludes
pitfall NN. On the CPU `tests.moe.interop.megatron_model.patch` gives Megatron the device it asks CUDA for."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.balance import build_balancer
from moe.config import RATES, Config
from moe.interop.hf import write_checkpoint
from moe.model.loss import IGNORED
from moe.model.transformer import Transformer
from moe.observe.sinks import read_metrics
from moe.parallel import Ranks, build_ranks
from moe.train.data import Batch
from moe.train.engines import Engine
from moe.train.engines.megatron_weights import from_ours, plain, rows, to_ours
from moe.train.loop import Run, train
from tests.corpus import make_token_folder
from tests.moe.train.engines.layouts import share, whole
from tests.moe.train.engines.shared_attention import build_shared
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, tiny_config

needs_megatron = pytest.mark.skipif(
    find_spec("megatron") is None, reason="needs megatron-core: pip install 'alf-moe[megatron]'"
)
STEPS = 4


def config(n: int, engine: str, ep: int = 2, **settings: Any) -> Config:
    """With losses on the router where the layout allows them."""
    losses = {"balance__z_loss": 1e-3} | (
        {}
        if settings.get("balance__aux_loss") == 0.0
        else {"balance__aux_loss": 0.01, "balance__aux_scope": "sequence"}
    )
    base = {"train__engine": engine, "parallel__ep": ep, "train__kernels": "torch"}
    return tiny_config(n, **base | losses | settings)


def batches(rank: int, n: int, step: int) -> list[Batch]:
    """Micro-batches of two sequences; in odd steps every fourth sequence of the global batch is padded."""
    found = share(rank, n, step, 2)
    for number, batch in enumerate(found, start=rank * len(found)):
        if step % 2 and number % 2 == 0:
            batch.targets_BS[0, 5:] = IGNORED
    return found


class Pair:
    """An engine and its balancer."""

    def __init__(self, config: Config, ranks: Ranks):
        self.engine: Engine = build_shared(config, ranks, 0)
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


def facts(rank: int, n: int) -> dict[str, Any]:
    """Everything that is asked, on one rank."""
    warnings.simplefilter("ignore")
    from tests.moe.interop.megatron_model import patch

    patch()
    ranks, found = build_ranks(rank, n, CPU, n), {}
    for name in ("megatron", "native"):
        pair = Pair(config(n, name), ranks)
        found[name] = {"steps": [pair.step(number) for number in range(STEPS)], "state": pair.state()}
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
def two():
    return run_ranks(facts, 2, timeout_s=600)


@needs_megatron
def test_it_trains_as_the_native_engine_from_the_same_weights(two):
    theirs, ours = two[0]["megatron"], two[0]["native"]
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
def test_p06_bfloat16_is_in_the_products_and_not_in_the_router(two):
    theirs, ours = (two[0]["bfloat16"][name] for name in ("megatron", "native"))
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)  # 1e-4 seen
    assert theirs["norm"] == pytest.approx(ours["norm"], rel=1e-2)  # 1e-3 seen
    assert theirs["losses"] != pytest.approx(two[0]["megatron"]["steps"][0]["losses"], rel=1e-6)
    assert theirs["off"] < 1e-6


def two_steps(rank: int, n: int, ep: int, tp: int, pp: int, cp: int, data: str) -> tuple[list[dict[str, Any]], int]:
    """Of Megatron in a layout, with its own routing; and the numbers that AdamW keeps here."""
    warnings.simplefilter("ignore")
    from tests.moe.interop.megatron_model import patch

    patch()  # the engine starts Megatron itself
    settings = {"parallel__tp": tp, "parallel__pp": pp, "parallel__cp": cp, "parallel__data": data}
    c = config(n, "megatron", ep, model__num_layers=4, balance__aux_loss=0.0, **settings)
    pair = Pair(c, build_ranks(rank, n, CPU, ep, tp, pp, cp))
    steps = [pair.step(0), pair.step(1)]
    kept = sum(state["exp_avg"].numel() for state in pair.engine.optimizer.state.values())
    return steps, kept


LAYOUTS = [
    (1, 1, 1, 1, 1, "replicate"),
    (2, 1, 2, 1, 1, "replicate"),
    (2, 1, 1, 1, 1, "shard"),
    (2, 1, 1, 1, 2, "shard"),
]
LONG = [
    (2, 1, 1, 1, 1, "replicate"),
    (4, 2, 1, 1, 1, "replicate"),
    (4, 1, 2, 2, 1, "replicate"),
    (4, 2, 2, 2, 1, "replicate"),
]
LONG += [(4, 2, 1, 2, 1, "shard"), (4, 2, 2, 1, 1, "shard"), (4, 4, 2, 1, 1, "replicate")]
LONG += [
    (4, 2, 1, 1, 2, "replicate"),
    (4, 4, 1, 1, 2, "shard"),
    (4, 2, 2, 1, 2, "replicate"),
    (4, 2, 1, 2, 2, "replicate"),
]
LONG += [(4, 1, 1, 1, 4, "replicate")]


@needs_megatron
@pytest.mark.parametrize(
    ("n", "ep", "tp", "pp", "cp", "data"), LAYOUTS + [pytest.param(*layout, marks=pytest.mark.slow) for layout in LONG]
)
def test_p22_other_layouts_train_as_the_native_engine(n, ep, tp, pp, cp, data):
    """Two-way tensor parallelism with whole experts among them: there the copies of experts and of dense matrices are on
    different ranks. With shared sequences the padding is on one rank more than on the other."""
    alone = Pair(config(1, "native", 1, model__num_layers=4, balance__aux_loss=0.0), ALONE)
    wanted = [alone.step(0), alone.step(1)]
    found = run_ranks(two_steps, n, ep, tp, pp, cp, data, timeout_s=600)
    for steps, _ in found:
        for step, want in zip(steps, wanted, strict=True):
            assert step["losses"] == pytest.approx(want["losses"], rel=1e-5)
            assert step["norm"] == pytest.approx(want["norm"], rel=1e-4)
            assert step["counts"] == want["counts"] and step["bias"] == want["bias"]
    if data == "shard":  # every moment on one rank; matrices that tp does not divide are on all of its ranks
        shared = sum(p.numel() for name, p in alone.engine.model.named_parameters() if tp == 1 or "norm" not in name)
        kept = sum(kept for _, kept in found)
        assert kept == shared if tp == 1 else shared <= kept < 1.05 * shared


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


def started(rank: int, n: int, data: str, hf: str, folder: str, parallel: dict[str, int]) -> dict[str, np.ndarray]:
    """The state at step 0 of a run that starts from a checkpoint."""
    warnings.simplefilter("ignore")
    from tests.moe.interop.megatron_model import patch

    patch()
    ranks = build_ranks(rank, n, CPU, parallel.get("ep", 1), parallel.get("tp", 1))
    layout = {f"parallel__{name}": size for name, size in parallel.items()}
    settings = {"data__path": data, "observe__wandb": "off", "observe__peak_tflops": 1.0, "run__start_from": hf}
    (out := Path(folder)).mkdir(exist_ok=True)
    run = Run(tiny_config(n, train__engine="megatron", **settings, **layout), ranks, out, False)
    found = {name: whole(value) for name, value in run.state()["engine"]["model"].items()}
    return found | {"bias": run.balancer.bias_LE.numpy()}


@needs_megatron
@pytest.mark.parametrize("parallel", [{"ep": 2}, {"tp": 2}], ids=str)
def test_p07_a_run_starts_from_a_hugging_face_checkpoint(parallel, tmp_path):
    model = Transformer(tiny_config(), ALONE)
    model.init_weights(7)
    for layer, router in model.routers.items():
        router.expert_bias_E.normal_(0, 0.2, generator=torch.Generator().manual_seed(layer))
    saved = model.state_dict()
    (tmp_path / "hf").mkdir()
    write_checkpoint(tmp_path / "hf", model.config.model, lambda names: {n: saved[n] for n in names}, 0, 16)
    data = make_token_folder(tmp_path / "data")
    for found in run_ranks(started, 2, str(data), str(tmp_path / "hf"), str(tmp_path / "run"), parallel):
        bias = found.pop("bias")
        assert found.keys() == saved.keys()
        assert [name for name, value in saved.items() if not np.array_equal(found[name], value.numpy())] == []
        assert np.array_equal(bias, torch.stack([r.expert_bias_E for r in model.routers.values()]).numpy())


def test_weights_go_over_and_back_for_every_shape_of_attention():
    for settings in ({"model__num_kv_heads": 1}, {"model__tie_embeddings": True, "model__head_dim": 12}):
        m = tiny_config(**settings).model
        ours = {}
        generator = torch.Generator().manual_seed(0)
        sizes = {"wq": m.num_heads * m.head_dim, "wk": m.num_kv_heads * m.head_dim, "wv": m.num_kv_heads * m.head_dim}
        theirs = {}
        for kind, names, parts, _ in rows(m, m.num_experts):
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
