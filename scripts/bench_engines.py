"""The engines and the stock libraries on one small model and the same batches, and what our balancing costs each of them.

    torchrun --nproc-per-node 2 -m scripts.bench_engines [--method sign] [--repeats 40] [--out docs/bench_engines.json]

From the repository's root; needs alf-moe[deepspeed,megatron] and scipy; on a CPU also DS_ACCELERATOR=cpu and OMP_NUM_THREADS =
cores / processes. Arms take turns in the same processes, each a whole optimizer step (forward, backward, clipping, AdamW,
balancing):

- native, deepspeed (ZeRO-1), megatron: our engines with --method, and each with balance.method = none;
- megatron_stock: the same GPTModel, optimizer and dispatcher with Megatron's TopKRouter (sigmoid) and its sign update;
- deepspeed_stock: our transformer with DeepSpeed's MoE layers under ZeRO-1. They are another function (softmax, an auxiliary
  loss, capacity 1.0: tokens are dropped): their time can be compared, their loss cannot.

Checked before anything is timed: the first loss of all others is the same to 1e-4.

Sections: seconds inside the calls of our balancing (counts and statistics in the forward, the all-reduce, the bias step,
publishing) as a share of the engine's step; the wait for the all-reduce, in which a rank also waits for slower ones, is apart.
A/B: the mean over turns of the ratio of two arms' steps within a turn, less 1, and its 95 % interval (Student's t).

On a CPU Megatron is given the device that it asks CUDA for, and its router a product without Transformer Engine, as in its tests.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe.router import TopKRouter
from scipy import stats as scipy_stats
from torch import Tensor, nn

import moe.model.router
from moe.balance import Balancer, build_balancer
from moe.balance.losses import RouterLosses
from moe.balance.stats import RouterStats, zeros
from moe.config import Config, resolve, validate
from moe.model.experts import SwiGLU
from moe.model.transformer import Transformer, fill_weights
from moe.parallel import BalanceSum, Ranks, build_ranks, join_ranks
from moe.train.about import device_name, provenance
from moe.train.data import Batch
from moe.train.engines import build_engine, megatron_core, megatron_setup
from moe.train.engines.megatron_core import MegatronEngine
from moe.train.engines.megatron_weights import from_ours, to_ours
from moe.train.optim import build_optimizer
from scripts.bench_balance_cost import SECONDS, timed

BATCH, SEQ, VOCAB, DIM, LAYERS, EXPERTS, TOP_K, HIDDEN = 8, 128, 2048, 256, 4, 16, 2, 256  # BATCH: of a rank
WARM_UP = 3  # turns that are not counted
WAIT = "all-reduce, wait"
PAIRS = [
    (a, b) for a in ("native", "deepspeed", "megatron") for b in (f"{a}_none", f"{a}_stock") if b != "native_stock"
]


def our_config(engine: str, method: str, ranks: Ranks) -> Config:
    """The model under one engine."""
    model = {
        "vocab_size": VOCAB,
        "dim": DIM,
        "num_layers": LAYERS,
        "num_heads": 4,
        "first_k_dense": 1,
        "init_std": 0.02,
    }
    model |= {"num_experts": EXPERTS, "top_k": TOP_K, "num_shared_experts": 1, "expert_hidden_dim": HIDDEN}
    cuda = ranks.device.type == "cuda"
    train = {"steps": 1, "batch_size": BATCH * ranks.world_size, "engine": engine}
    tree = {
        "model": model,
        "data": {"seq_len": SEQ},
        "parallel": {"ep": ranks.ep_mesh.size() if ranks.ep_mesh is not None else 1},
        "optim": {"lr": 1e-4},
        "train": train | {"compute_dtype": "bfloat16" if cuda else "float32", "kernels": "auto" if cuda else "torch"},
        "balance": {"method": method},
        "observe": {"regret_every": 0},
    }
    return resolve(validate(tree), ranks.world_size, cuda=True)  # Megatron is refused without a GPU


def tokens(step: int, rank: int) -> Batch:
    """Random ids, others in every step and rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


# -- the arms ----------------------------------------------------------------------------------------------------------


class Arm:
    """An engine and its balancer, stepped as the training loop does."""

    def __init__(self, name: str, method: str, ranks: Ranks):
        self.ranks, self.config = ranks, our_config(name.partition("_")[0], method, ranks)
        self.engine: Any = self.build()
        self.routers = list(self.engine.model.routers.values())
        layers = list(self.engine.model.routers)
        self.balancer = build_balancer(self.config.balance, layers, EXPERTS, TOP_K).to(ranks.device)

    def build(self) -> Any:
        return build_engine(self.config, self.ranks, 0)

    def step(self, batch: Batch) -> Tensor:
        """Cross-entropy of the global batch, nats per token."""
        out = self.engine.forward_backward([batch])
        summing = self.ranks.start_balance_sum(out.stats)
        self.engine.step()
        stats, _ = summing.wait()
        self.balancer.step(stats)
        self.balancer.publish(self.routers)
        return out.losses_3[0] / out.tokens


class StockMegatron(Arm):
    """Megatron's own router and sign update in the model, optimizer and dispatcher of our Megatron engine."""

    def build(self) -> Any:
        return _StockMegatronEngine(self.config, self.ranks, 0)

    def step(self, batch: Batch) -> Tensor:
        engine, device = self.engine, self.ranks.device
        gpt = engine.model.gpt
        gpt.zero_grad_buffer()
        tokens_BS, targets_BS = (t.to(device) for t in batch)
        ce = engine.model._run(tokens_BS, None, targets_BS).sum()
        (ce / (targets_BS.numel() * self.ranks.world_size)).backward()
        finalize_model_grads([gpt])  # moves the bias too
        for parameter in engine.trained.values():
            parameter.grad = parameter.main_grad
        engine.step()
        return ce.detach() / (targets_BS.numel() * self.ranks.world_size)


class _StockMegatronEngine(MegatronEngine):
    def init_weights(self) -> None:
        """Those of the others: the router's weight has another name."""
        weights = to_ours(self._named(), self.config.model, self.config.parallel.ep, self.ranks.ep_mesh)
        fill_weights(weights.items(), self.config.model, self.config.run.seed)
        from_ours(weights, self._named(), self.config.model, self.config.parallel.ep)

    def _named(self) -> dict[str, Tensor]:
        return {name.replace("router.weight", "router.router.weight"): p for name, p in self.model.plain_parameters()}


def stock_spec(config: Config, theirs: Any, use_te: bool, device: torch.device, core_attention: Any = None) -> Any:
    """As `megatron_setup.block_spec`, with Megatron's router."""
    theirs.moe_router_score_function, theirs.moe_router_enable_expert_bias = "sigmoid", True
    theirs.moe_router_bias_update_rate, theirs.moe_router_dtype = 1e-3, "fp32"
    spec = megatron_setup.block_spec(config, theirs, use_te, device, core_attention)
    for layer in spec.layer_specs[config.model.first_k_dense :]:
        megatron_setup.submodules_of(layer).router = STOCK_ROUTER[0]
    return spec


STOCK_ROUTER: list[type] = []


class StockDeepSpeed:
    """DeepSpeed's MoE layers in our transformer, under ZeRO-1."""

    def __init__(self, name: str, method: str, ranks: Ranks):
        config = our_config("deepspeed", method, ranks)
        self.ranks, ep = ranks, config.parallel.ep
        alone = Ranks(0, 1, ranks.device)
        with torch.device(ranks.device):
            model = Transformer(config, alone)
        model.init_weights(0)
        for block in model.blocks:
            if block.moe is not None:
                block.moe = _StockLayer(ep, block.moe.shared_experts).to(ranks.device)  # type: ignore[assignment]
        optimizer = build_optimizer(model, config.optim)
        named = [{**group, "name": f"group {i}"} for i, group in enumerate(optimizer.param_groups)]
        optimizer.param_groups[:] = split_params_into_different_moe_groups_for_optimizer(named)
        settings = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
            "steps_per_print": 2**31,
        }
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(self, batch: Batch) -> Tensor:
        tokens_BS, targets_BS = (t.to(self.ranks.device) for t in batch)
        out = self.model(tokens_BS, targets_BS, False)
        self.model.backward((out.ce + out.aux) / targets_BS.numel())
        self.model.step()
        return out.ce.detach() / (targets_BS.numel() * self.ranks.world_size)


class _StockLayer(nn.Module):
    def __init__(self, ep: int, shared: nn.Module | None):
        super().__init__()
        self.moe, self.shared_experts = MoE(DIM, SwiGLU(DIM, HIDDEN), EXPERTS, ep, k=TOP_K), shared
        for parameter in self.moe.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None, ids_T: Tensor) -> tuple[Tensor, RouterStats, RouterLosses]:
        out_TD, aux, _ = self.moe(x_TD)
        stats = RouterStats(*(field[0] for field in zeros(1, EXPERTS, x_TD.device)[:2]))
        zero = x_TD.new_zeros((), dtype=torch.float32)
        shared_TD = self.shared_experts(x_TD) if self.shared_experts is not None else 0.0
        return out_TD + shared_TD, stats, RouterLosses(0.01 * aux * len(x_TD), zero, None)


def build_arms(method: str, ranks: Ranks) -> dict[str, Any]:
    """In the order of a turn."""
    arms: dict[str, Any] = {}
    for name in ("native", "deepspeed", "megatron"):
        arms[name], arms[f"{name}_none"] = Arm(name, method, ranks), Arm(name, "none", ranks)
    arms["deepspeed_stock"] = StockDeepSpeed("deepspeed_stock", "none", ranks)
    megatron_core.block_spec, ours = stock_spec, megatron_core.block_spec
    arms["megatron_stock"] = StockMegatron("megatron_stock", "none", ranks)
    megatron_core.block_spec = ours
    return arms


# -- the measurement ---------------------------------------------------------------------------------------------------


def finished(ranks: Ranks) -> float:
    """Now, when everything that was asked of the device is done."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    arms: dict[str, Any], repeats: int, ranks: Ranks
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds of every step of every arm, and of the sections of our balancing in all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    sections: dict[str, dict[str, float]] = {name: {} for name in arms}
    for turn in range(repeats + WARM_UP):
        batch = tokens(turn, ranks.rank)
        for name in list(arms) if turn % 2 else list(reversed(arms)):
            ranks.barrier()
            SECONDS.clear()
            start = finished(ranks)
            arms[name].step(batch)
            took = finished(ranks) - start
            if turn >= WARM_UP:
                seconds[name].append(took)
                for label, value in SECONDS.items():
                    sections[name][label] = sections[name].get(label, 0.0) + value
    return seconds, sections


def interval(a: list[float], b: list[float]) -> dict[str, float]:
    """Percent by which a's steps are longer than b's: mean over turns, and its 95 % interval."""
    ratios = [100 * (x / y - 1) for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    half = float(scipy_stats.t.ppf(0.975, len(ratios) - 1)) * error
    mean = statistics.fmean(ratios)
    return {"mean": mean, "low": mean - half, "high": mean + half, "of_minima": 100 * (min(a) / min(b) - 1)}


def check_losses(arms: dict[str, Any], ranks: Ranks) -> dict[str, float]:
    """The first step of every arm, nats per token over all ranks."""
    first = {name: float(ranks.sum(arm.step(tokens(10**6, ranks.rank)))) for name, arm in arms.items()}
    for name, loss in first.items():
        same = name == "deepspeed_stock" or abs(loss - first["native"]) < 1e-4 * first["native"]
        assert same and loss == loss, f"{name} has loss {loss}, native {first['native']}: not the same model"
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--method", default="coordinate")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rank, world_size, device = join_ranks()
    ranks = build_ranks(rank, world_size, device, world_size)
    if device.type == "cuda":
        STOCK_ROUTER.append(TopKRouter)
    else:
        from tests.moe.interop.megatron_model import CpuRouter, patch

        patch()
        STOCK_ROUTER.append(CpuRouter)
    for owner, name, label in (
        (moe.model.router, "count_tokens", "counts in the forward"),
        (moe.model.router, "collect", "further statistics in the forward"),
        (Ranks, "start_balance_sum", "all-reduce, start"),
        (BalanceSum, "wait", WAIT),
        (Balancer, "step", "bias step"),
        (Balancer, "publish", "publish"),
    ):
        timed(owner, name, label)
    arms = build_arms(options.method, ranks)
    first = check_losses(arms, ranks)
    seconds, sections = take_turns(arms, options.repeats, ranks)
    if rank == 0:
        report(options, ranks, first, seconds, sections)
    ranks.barrier()
    if world_size > 1:
        torch.distributed.destroy_process_group()


def report(
    options: argparse.Namespace,
    ranks: Ranks,
    first: dict[str, float],
    seconds: dict[str, list[float]],
    sections: dict[str, dict[str, float]],
) -> None:
    """Print the tables and write them, with every repeat, as JSON."""
    shares = {}
    print(f"{'arm':<18}{'minimum ms':>12}{'median ms':>12}{'first loss':>12}{'sections %':>12}{'wait %':>10}")
    for name, times in seconds.items():
        found = {label: 100 * value / sum(times) for label, value in sections[name].items()}
        shares[name] = found
        wait = found.get(WAIT, 0.0)
        rest = f"{sum(found.values()) - wait:>12.3f}{wait:>10.3f}" if found else f"{'–':>12}{'–':>10}"
        median = statistics.median(times)
        print(f"{name:<18}{1e3 * min(times):>12.1f}{1e3 * median:>12.1f}{first[name]:>12.4f}{rest}")
    compared = {f"{a} / {b}": interval(seconds[a], seconds[b]) for a, b in PAIRS}
    for pair, x in compared.items():
        print(f"{pair:<34}{x['mean']:+8.2f} % [{x['low']:+.2f}, {x['high']:+.2f}]   of minima {x['of_minima']:+.2f} %")
    if options.out is None:
        return
    shape = {
        "batch": BATCH,
        "seq": SEQ,
        "vocab": VOCAB,
        "dim": DIM,
        "layers": LAYERS,
        "experts": EXPERTS,
        "top_k": TOP_K,
    }
    about = {
        **provenance(),
        "device": device_name(ranks.device) if ranks.device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "ranks": ranks.world_size,
        "deepspeed": version("deepspeed"),
        "megatron_core": version("megatron-core"),
        "method": options.method,
        "shape": shape | {"expert_hidden": HIDDEN},
    }
    found = {"about": about, "first_loss": first, "section_percent": shares, "percent": compared, "seconds": seconds}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
