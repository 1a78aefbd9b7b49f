"""What only hardware shows: waits of the host, 64-bit addresses, torch.compile, NCCL, a step of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.cases import TOLERANCE, Shape, normal
from kernels.combine import combine
from kernels.moe_mlp import moe_mlp
from kernels.permute import count_tokens, permute, sort_by_expert
from kernels.route import STATISTICS, route

pytestmark = pytest.mark.gpu


def routed_experts(s: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """x_TD, logits_TE, w13, w2 in bfloat16, expert_bias_E."""
    x, logits = (normal(s.T, n, device=device, dtype=torch.bfloat16, seed=i) for i, n in enumerate((s.D, s.E)))
    w13 = normal(s.E, 2 * s.F, s.D, device=device, dtype=torch.bfloat16, seed=2) * s.D**-0.5
    w2 = normal(s.E, s.D, s.F, device=device, dtype=torch.bfloat16, seed=3) * s.F**-0.5
    leaves = (tensor.requires_grad_() for tensor in (x, logits, w13, w2))
    return *leaves, normal(s.E, device=device, dtype=torch.float32, seed=4).mul_(0.01)


def layer(
    x: Tensor, logits: Tensor, w13: Tensor, w2: Tensor, bias: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Everything between the gate projection and the residual stream, twice: fused, and with permute and combine."""
    found = route(logits, bias, 2, "sigmoid", token_mask_T=mask, statistics=frozenset(STATISTICS), boundary_width=0.1)
    permutation = sort_by_expert(found.topk_ids_TK, len(bias), masked=mask is not None)
    out = moe_mlp(x, found.topk_weights_TK, permutation, w13, w2)
    out = out + combine(permute(x, permutation), found.topk_weights_TK, permutation)
    return out, found.tokens_per_expert_E + count_tokens(found.topk_ids_TK, len(bias))


SMALL = Shape(96, 64, 32, 8, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_p28_the_host_never_waits(masked: bool, device: torch.device):
    arguments = routed_experts(SMALL, device)
    mask = torch.arange(SMALL.T, device=device) % 3 != 0 if masked else None
    upstream = torch.ones_like(arguments[0])
    for mode in ("default", "error"):  # first compile
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            out, _ = layer(*arguments, mask)
            gradients = torch.autograd.grad(out, arguments[:4], upstream)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_compiled_block_is_one_graph_and_the_same_numbers(device: torch.device):
    arguments = routed_experts(SMALL, device)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    results = []
    for fn in (layer, compiled):
        out, counts = fn(*arguments)
        results.append((out, counts, *torch.autograd.grad(out, arguments[:4], torch.ones_like(out))))
    for eager, fused in zip(*results, strict=True):
        error = (eager.double() - fused.double()).norm() / eager.double().norm()
        assert error <= TOLERANCE[torch.bfloat16]


def test_p19_addresses_beyond_32_bits(device: torch.device, large: bool):
    # 65,537 tokens of a V3-like layer: T K D = 3.8e9 and R 2F = 2**31 + 2**15 values. Some 35 GiB by count.
    s = Shape(65_537, 7168, 2048, 32, 8) if large else Shape(41, 72, 24, 9, 4)
    generator = torch.Generator(device).manual_seed(0)

    def made(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(scale)

    x, w13, w2 = made(s.T, s.D), made(s.E, 2 * s.F, s.D, scale=s.D**-0.5), made(s.E, s.D, s.F, scale=s.F**-0.5)
    ids = torch.rand(s.T, s.E, generator=generator, device=device).topk(s.K).indices
    weights = torch.rand(s.T, s.K, generator=generator, device=device)
    p = sort_by_expert(ids, s.E)
    rows = permute(x, p)
    some = torch.cat([torch.arange(2, device=device), torch.arange(s.T - 2, s.T, device=device)])
    assert torch.equal(rows[p.inverse_TK[some]], x[some][:, None].expand(-1, s.K, -1))
    out = combine(rows, weights, p)
    exact = weights[some].double().sum(1, keepdim=True) * x[some].double()
    assert _error(out[some], exact) <= TOLERANCE[torch.bfloat16]
    del rows, out

    leaves = [tensor.requires_grad_() for tensor in (x, weights, w13, w2)]
    out = moe_mlp(x, weights, p, w13, w2)
    upstream = out.detach().clone()  # so that the gradient of a weight is no difference of large numbers
    found = torch.autograd.grad(out, leaves[:2], upstream)
    few = [x.detach()[some].double().requires_grad_(), weights.detach()[some].double().requires_grad_()]
    gate, up = torch.einsum("td,tkfd->tkf", few[0], w13.detach()[ids[some]].double()).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up
    expected = torch.einsum("tk,tkf,tkdf->td", few[1], hidden, w2.detach()[ids[some]].double())
    exact = torch.autograd.grad(expected, few, upstream[some].double())
    assert _error(out[some], expected) <= TOLERANCE[torch.bfloat16]
    errors = [_error(f[some], e) for f, e in zip(found, exact, strict=True)]
    assert max(errors) <= TOLERANCE[torch.bfloat16], errors


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def test_one_rank_of_the_gpu_s_collectives(device: torch.device, tmp_path: Path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        counts, received = torch.arange(8, device=device), torch.zeros(8, dtype=torch.int64, device=device)
        dist.all_reduce(counts)
        dist.all_to_all_single(received, counts, [8], [8])
        assert received.tolist() == list(range(8))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("document_mask", [False, True])
def test_steps_of_training_in_bfloat16(document_mask: bool, device: torch.device, large: bool):
    pytest.importorskip("pydantic")
    from moe.balance import build_balancer
    from moe.config import load, resolve
    from moe.parallel import Ranks
    from moe.train.data import Batch
    from moe.train.engines.native import NativeEngine

    losses = {}
    for kernels in ("auto", "torch"):
        words = ["--parallel.ep", "1", "--train.compute_dtype", "bfloat16", "--train.kernels", kernels]
        words += ["--data.document_mask", str(document_mask).lower(), "--model.vocab_size", "512"]
        words += [] if large else ["--data.seq_len", "32", "--model.num_layers", "1", "--model.expert_hidden_dim", "32"]
        config = resolve(load(["configs/tiny.toml"], words), 1, device.type == "cuda")
        engine = NativeEngine(config, Ranks(0, 1, device), 0)
        balancer = build_balancer(
            config.balance, list(engine.model.routers), config.model.num_experts, config.model.top_k
        )
        ids = torch.randint(0, 512, (2, config.data.seq_len + 1), generator=torch.Generator().manual_seed(0))
        ids[:, 10::70] = 0  # ends of documents
        losses[kernels] = []
        for _ in range(3):
            engine.set_lr(1e-3)
            out = engine.forward_backward([Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())])
            assert engine.step().applied
            balancer.step(out.stats)
            balancer.publish(list(engine.model.routers.values()))
            losses[kernels].append(float(out.losses_3[0]) / (2 * config.data.seq_len))
    assert losses["auto"][2] < losses["auto"][0] - 0.1
    assert losses["auto"] == pytest.approx(losses["torch"], rel=1e-2)
