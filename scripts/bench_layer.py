"""One sparse layer on the CPU, forward and backward: ours beside transformers', torchtitan's and a loop over the experts.

    python scripts/bench_layer.py [--repeats 20] [--out docs/bench_layer.json]       needs transformers >= 5.23, torchtitan 0.3

Router (sigmoid, renormalised), dispatch, routed experts, combine, one shared expert; the same weights, input and upstream
gradient. Outputs are compared before anything is timed. Arms take turns; minima and medians of all repeats. Ours collects the
statistics of the default balancing rule; the others count tokens at most. In bfloat16 ours and torchtitan cast float32 weights,
transformers has bfloat16 ones but for the router's. torchtitan computes its experts in bfloat16 whatever the input is, which in
float32 is less work, and is marked. Routing is that of a random router on random input; no balance is forced. "products alone": the
matrix products of the layer with the same loads and nothing else, which no implementation with the same library goes below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Products that one arm has compiled shall not push out those of another: 1,024 are kept by default.
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16384"

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cases import Shape
from kernels.grouped_gemm import grouped_gemm
from moe.config import Config, resolve, validate
from moe.model.layer import MoELayer
from moe.parallel import Ranks
from moe.train.about import provenance

SHAPES = [Shape(2048, 256, 128, 64, 6), Shape(2048, 256, 64, 32, 4), Shape(2048, 512, 512, 16, 2)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALONE = "products alone"
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}  # of the norm of the output: eager adds up in bfloat16


class Loop(nn.Module):
    """The layer as one writes it first."""

    def __init__(self, ours: MoELayer, top_k: int):
        super().__init__()
        self.ours, self.top_k = ours, top_k

    def forward(self, x_TD: Tensor) -> Tensor:
        """A product per expert on the rows it was chosen for."""
        ours, kind = self.ours, x_TD.dtype
        scores_TE = F.linear(x_TD.float(), ours.router.weight).sigmoid()
        ids_TK = scores_TE.topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(-1, ids_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, (w13, w2) in enumerate(zip(ours.experts.w13, ours.experts.w2, strict=True)):
            token, place = (ids_TK == expert).nonzero(as_tuple=True)
            gate, up = (x_TD[token] @ w13.to(kind).T).chunk(2, dim=-1)
            rows = (F.silu(gate) * up) @ w2.to(kind).T
            out_TD = out_TD.index_add(0, token, rows * weights_TK[token, place, None])
        assert ours.shared_experts is not None
        return out_TD.to(kind) + ours.shared_experts(x_TD)


def our_layer(s: Shape) -> MoELayer:
    """With normal weights."""
    model = {"vocab_size": 64, "dim": s.D, "num_layers": 1, "num_heads": 4, "first_k_dense": 0, "num_experts": s.E}
    model |= {"top_k": s.K, "num_shared_experts": 1, "expert_hidden_dim": s.F}
    tree = {"run": {"name": "bench"}, "model": model, "data": {"seq_len": 64}, "optim": {"lr": 1e-4, "warmup_steps": 0}}
    config: Config = resolve(validate(tree | {"train": {"steps": 1, "batch_size": 1}}), 1)
    layer = MoELayer(config, Ranks(0, 1, torch.device("cpu")), 0)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def transformers_layer(ours: MoELayer, s: Shape, experts: str, kind: torch.dtype) -> nn.Module:
    """Glm4MoeMoE with our weights."""
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

    config = Glm4MoeConfig(
        hidden_size=s.D, moe_intermediate_size=s.F, n_routed_experts=s.E, n_shared_experts=1, num_experts_per_tok=s.K,
        n_group=1, topk_group=1, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = experts
    layer = Glm4MoeMoE(config)
    gate, up = _shared(ours).w13.weight.chunk(2)
    weights = {"gate.weight": ours.router.weight, "experts.gate_up_proj": ours.experts.w13}
    weights |= {"experts.down_proj": ours.experts.w2, "shared_experts.gate_proj.weight": gate}
    weights |= {"shared_experts.up_proj.weight": up, "shared_experts.down_proj.weight": _shared(ours).w2.weight}
    _load(layer, weights)
    layer.to(kind).gate.float()  # rounded router weights choose other experts
    return layer


def torchtitan_layer(ours: MoELayer, s: Shape) -> nn.Module:
    """torchtitan's MoE with our weights."""
    from torchtitan.models.common import moe as titan
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    def linear(inner: int, outer: int) -> Any:
        return Linear.Config(in_features=inner, out_features=outer)

    routed = titan.RoutedExperts.Config(
        inner_experts=titan.GroupedExperts.Config(dim=s.D, hidden_dim=s.F, num_experts=s.E),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=s.E, top_k=s.K),
    )
    router = titan.TokenChoiceTopKRouter.Config(num_experts=s.E, gate=linear(s.D, s.E), top_k=s.K, route_norm=True)
    shared = FeedForward.Config(w1=linear(s.D, s.F), w2=linear(s.F, s.D), w3=linear(s.D, s.F))
    layer = titan.MoE.Config(num_experts=s.E, routed_experts=routed, router=router, shared_experts=shared).build()
    w1, w3 = ours.experts.w13.chunk(2, dim=1)
    gate, up = _shared(ours).w13.weight.chunk(2)
    inner = "routed_experts.inner_experts"
    weights = {f"{inner}.w1_EFD": w1, f"{inner}.w2_EDF": ours.experts.w2, f"{inner}.w3_EFD": w3}
    weights |= {"router.gate.weight": ours.router.weight, "shared_experts.w1.weight": gate}
    weights |= {"shared_experts.w3.weight": up, "shared_experts.w2.weight": _shared(ours).w2.weight}
    layer.tokens_per_expert_E.zero_()
    layer.expert_bias_E.zero_()
    _load(layer, weights)
    return layer


def _shared(ours: MoELayer) -> Any:
    assert ours.shared_experts is not None
    return ours.shared_experts


def _load(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    assert weights.keys() == {name for name, _ in layer.named_parameters()}, dict(layer.named_parameters()).keys()
    layer.load_state_dict({name: w.detach().clone() for name, w in weights.items()}, strict=False)


def arms(s: Shape, kind: torch.dtype) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[nn.Module]]:
    """Forward functions by name, x_TD -> out_TD, and the layers in them."""
    ours = our_layer(s)
    titan: Any = torchtitan_layer(ours, s)
    titan.router.gate.register_forward_pre_hook(lambda _, given: (given[0].float(),))  # autocast to float32 is CUDA's
    layers: list[nn.Module] = [ours, titan]
    found: dict[str, Callable[[Tensor], Tensor]] = {"ours": lambda x: ours(x)[0], "loop": Loop(ours, s.K)}
    for experts in ("eager", "grouped_mm"):
        theirs = transformers_layer(ours, s, experts, kind)
        layers.append(theirs)
        found[f"transformers {experts}"] = lambda x, theirs=theirs: theirs(x[None])[0]

    def titan_forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            return titan(x[None])[0]

    titan_name = "torchtitan" if kind == torch.bfloat16 else "torchtitan (experts in bfloat16)"
    return found | {titan_name: titan_forward}, layers


def products(s: Shape, kind: torch.dtype, tokens_E: Tensor) -> Callable[[], None]:
    """Forward and backward of the products of the router, the routed experts and the shared one."""

    def leaf(*shape: int, dtype: torch.dtype = kind) -> Tensor:
        return torch.randn(*shape).mul_(0.02).to(dtype).requires_grad_()

    def product(inner: int, outer: int, dtype: torch.dtype = kind) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        x, w = leaf(s.T, inner, dtype=dtype), leaf(outer, inner, dtype=dtype)
        return lambda: F.linear(x, w), (x, w)

    def grouped(inner: int, outer: int) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        x, w = leaf(s.T * s.K, inner), leaf(s.E, outer, inner)
        return lambda: grouped_gemm(x, w, tokens_E), (x, w)

    every = [product(s.D, s.E, torch.float32), grouped(s.D, 2 * s.F), grouped(s.F, s.D)]
    every += [product(s.D, 2 * s.F), product(s.F, s.D)]
    upstream = [torch.ones_like(run()) for run, _ in every]

    def step() -> None:
        for (run, leaves), grad in zip(every, upstream, strict=True):
            torch.autograd.grad(run(), leaves, grad)

    return step


def bench(s: Shape, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Check the outputs, then seconds of forward and backward of every arm."""
    kind = DTYPES[dtype]
    x_TD = torch.randn(s.T, s.D, generator=torch.Generator().manual_seed(1)).to(kind)
    upstream_TD = torch.randn(s.T, s.D, generator=torch.Generator().manual_seed(2)).to(kind)
    competing, layers = arms(s, kind)
    with torch.no_grad():
        expected = competing["ours"](x_TD).float()
        for name, forward in competing.items():
            off = float((forward(x_TD).float() - expected).norm() / expected.norm())
            if off > (TOLERANCE["bfloat16"] if "bfloat16" in name else TOLERANCE[dtype]):
                raise SystemExit(f"{name} is off by {off:.1e} at {s}, {dtype}: nothing is timed")
        counts_E = our_layer(s)(x_TD)[1].tokens_per_expert
    alone = products(s, kind, counts_E)
    found: dict[str, list[float]] = {name: [] for name in [*competing, ALONE]}
    for repeat in range(repeats + 2):
        for name, forward in competing.items():
            x = x_TD.clone().requires_grad_()
            for layer in layers:
                layer.zero_grad()
            start = time.perf_counter()
            forward(x).backward(upstream_TD)
            if repeat >= 2:
                found[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        alone()
        if repeat >= 2:
            found[ALONE].append(time.perf_counter() - start)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="append the result to this JSON-lines file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for s in SHAPES:
        for dtype in DTYPES:
            found = bench(s, dtype, options.repeats)
            fastest = min(
                min(v) for name, v in found.items() if name not in ("ours", "loop", ALONE) and "(" not in name
            )
            print(f"\n{s}, {dtype}: fastest rival / ours {fastest / min(found['ours']):.2f}", end="; ")
            print(f"fastest rival / products alone {fastest / min(found[ALONE]):.2f}")
            for name, values in found.items():
                print(
                    f"  {name:<34} {1e3 * min(values):8.1f} ms, median {1e3 * statistics.median(values):.1f}",
                    flush=True,
                )
            seconds = {name: [round(value, 6) for value in values] for name, values in found.items()}
            results.append({"shape": s._asdict(), "dtype": dtype, "seconds": seconds})
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps({"about": provenance() | {"threads": options.threads}, "results": results}) + "\n")


if __name__ == "__main__":
    main()
