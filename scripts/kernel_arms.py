"""What scripts/bench_kernels.py measures: inputs, our operations, rivals, and the bytes and FLOPs that each must move or do.

Everything runs on any device; how time is taken is up to the caller: measure(functions by name) -> seconds by name.
Letters: T tokens, D model dim, F expert hidden dim, E experts, K experts per token, R = T K rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kernels.backend import Backend, fused
from kernels.cases import Shape
from kernels.combine import combine
from kernels.grouped_gemm import grouped_gemm
from kernels.moe_mlp import moe_mlp
from kernels.permute import Permutation, permute, sort_by_expert
from kernels.route import STATISTICS, route

Measure = Callable[[dict[str, Callable[[], Any]]], dict[str, float]]
ROUTINGS = ("skewed", "balanced", "recorded")
DTYPE = torch.bfloat16
FOUND_OFF = 3e-2  # of the norm: a rival that is further away does not compute the same thing


class Batch(NamedTuple):
    """x_TD, logits_TE, w13_EFD and w2_EDF in bfloat16, with gradients; expert_bias_E is 0. maxvio: of the routing, measured."""

    shape: Shape
    x_TD: Tensor
    logits_TE: Tensor
    bias_E: Tensor
    w13: Tensor
    w2: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    permutation: Permutation
    maxvio: float


def logits_of(kind: str, s: Shape, generator: torch.Generator, recorded: Tensor | None = None) -> Tensor:
    """logits_TE float32 on the CPU. balanced: forced, every expert has T K / E tokens to within one; skewed: Zipf, the chances
    of expert e are those of 1 / (e + 1); recorded: the first T tokens of recorded sigmoid scores [N, T, E] or [T, E]."""
    if kind == "recorded":
        assert recorded is not None
        scores = recorded.reshape(-1, recorded.shape[-1])
        if scores.shape[1] != s.E or len(scores) < s.T:
            raise ValueError(f"recorded scores are {tuple(scores.shape)}: give at least {s.T} tokens of {s.E} experts")
        return scores[: s.T].float().logit(eps=1e-6)
    noise = torch.rand(s.T, s.E, generator=generator)
    if kind == "balanced":
        ids = torch.arange(s.T * s.K).remainder(s.E).view(s.T, s.K)
        return noise.scatter_add_(1, ids, torch.full(ids.shape, 4.0))
    assert kind == "skewed", kind
    gumbel = -(-noise.clamp_(1e-9, 1 - 1e-7).log()).log()
    return gumbel - torch.arange(1, s.E + 1).float().log()


def make_batch(kind: str, s: Shape, device: torch.device, recorded: Tensor | None = None) -> Batch:
    """Inputs of one routing and shape, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    logits = logits_of(kind, s, generator, recorded).to(device, DTYPE).requires_grad_()
    on_device = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=on_device, device=device, dtype=DTYPE)
        return made.mul_(scale).requires_grad_()

    bias = torch.zeros(s.E, device=device)
    found = route(logits.detach(), bias, s.K, "sigmoid")
    permutation = sort_by_expert(found.topk_ids_TK, s.E)
    counts = found.tokens_per_expert_E.double()
    weights = found.topk_weights_TK.requires_grad_()
    w13, w2 = normal(s.E, 2 * s.F, s.D, scale=s.D**-0.5), normal(s.E, s.D, s.F, scale=s.F**-0.5)
    x, maxvio = normal(s.T, s.D), float(counts.max() / counts.mean() - 1)
    return Batch(s, x, logits, bias, w13, w2, weights, found.topk_ids_TK, permutation, maxvio)


def with_backward(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    """Forward and the gradients of the leaves, for an upstream gradient that is made here once."""
    upstream = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


class Work(NamedTuple):
    """forward() gives a tensor; leaves get gradients; bytes_fwd and bytes_both that must be read and written at least once."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    bytes_fwd: int
    bytes_both: int


def moving(b: Batch) -> dict[str, Work]:
    """The operations whose limit is memory. A row that K pairs share is counted once."""
    s, element = b.shape, b.x_TD.element_size()
    pairs = s.T * s.K
    tokens, rows, index = s.T * s.D * element, pairs * s.D * element, 8 * pairs
    rows_RD = permute(b.x_TD, b.permutation).detach().requires_grad_()
    logits = s.T * s.E * element
    return {
        # Logits in, float32 weights and int32 ids out; back: gradient and ids in, logits in, their gradient out.
        "route": Work(
            lambda: route(b.logits_TE, b.bias_E, s.K, "sigmoid").topk_weights_TK,
            [b.logits_TE],
            logits + 8 * pairs,
            3 * logits + 16 * pairs,
        ),
        # Tokens in, rows out, order and inverse in; back: rows in, tokens out, inverse in.
        "permute": Work(
            lambda: permute(b.x_TD, b.permutation), [b.x_TD], tokens + rows + 2 * index, 2 * (tokens + rows) + 3 * index
        ),
        # Rows, weights and inverse in, tokens out; back: tokens and rows in, rows out, weights, inverse and order in.
        "combine": Work(
            lambda: combine(rows_RD, b.weights_TK, b.permutation),
            [rows_RD, b.weights_TK],
            rows + tokens + index + 4 * pairs,
            3 * rows + 2 * tokens + 3 * index + 12 * pairs,
        ),
    }


def sort_of(b: Batch) -> Callable[[], Any]:
    """The order of the pairs; it has no gradient."""
    return lambda: sort_by_expert(b.ids_TK, b.shape.E)


def counting(b: Batch) -> Callable[[], Any]:
    """The router with every statistic."""
    names = frozenset(STATISTICS)
    return lambda: route(b.logits_TE, b.bias_E, b.shape.K, "sigmoid", statistics=names, boundary_width=0.01)


def flops(s: Shape) -> int:
    """Of the routed experts, forward; three times that forward and backward."""
    return 2 * s.T * s.K * s.D * 3 * s.F


# -- the experts: ours and the rivals ----------------------------------------------------------------------------------

Experts = Callable[[], Tensor]


def _ours(b: Batch, backend: Backend) -> Experts:
    return lambda: moe_mlp(b.x_TD, b.weights_TK, b.permutation, b.w13, b.w2, backend)


def _grouped_mm(b: Batch) -> Experts:
    """What one writes on F.grouped_mm: our permute and combine, torch's products."""

    def forward() -> Tensor:
        counts_E = b.permutation.counts_E
        gate_RF, up_RF = grouped_gemm(permute(b.x_TD, b.permutation), b.w13, counts_E, "torch").chunk(2, -1)
        rows_RD = grouped_gemm(F.silu(gate_RF) * up_RF, b.w2, counts_E, "torch")
        return combine(rows_RD, b.weights_TK, b.permutation)

    return forward


def _transformers(b: Batch) -> Experts:
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe import modeling_glm4_moe as module

    s = b.shape
    config = Glm4MoeConfig(hidden_size=s.D, moe_intermediate_size=s.F, n_routed_experts=s.E, num_experts_per_tok=s.K)
    config._experts_implementation = "grouped_mm"
    kind = getattr(module, "Glm4MoeExperts", None) or module.Glm4MoeNaiveMoe
    with torch.device("meta"):
        experts = kind(config)
    experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(w.detach()) for w in (b.w13, b.w2))
    ids_TK = b.ids_TK.long()
    forward = lambda: experts(b.x_TD, ids_TK, b.weights_TK).to(b.x_TD.dtype)  # noqa: E731
    forward.leaves = [b.x_TD, b.weights_TK, experts.gate_up_proj, experts.down_proj]  # type: ignore[attr-defined]
    return forward


def _scattermoe(b: Batch) -> Experts:
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    s = b.shape
    experts = GLUMLP(s.D, s.F, s.E, s.K, activation=torch.nn.SiLU()).to(b.x_TD)
    with torch.no_grad():
        experts.experts.weight.copy_(torch.cat(b.w13.chunk(2, 1)[::-1], 1))  # up before gate
        experts.output_experts.weight.copy_(b.w2)
    ids_TK = b.ids_TK.long()
    forward = lambda: experts(b.x_TD, b.weights_TK.to(b.x_TD.dtype), ids_TK)  # noqa: E731
    weights = [experts.experts.weight, experts.output_experts.weight]
    forward.leaves = [b.x_TD, b.weights_TK, *weights]  # type: ignore[attr-defined]
    return forward


RIVALS: dict[str, Callable[[Batch], Experts] | None] = {
    "transformers": _transformers,
    "scattermoe": _scattermoe,
    "megablocks": None,
    "sonicmoe": None,
}
"""By the package that must be importable; None: there is no adapter yet."""


def expert_arms(b: Batch, say: Callable[[str], None]) -> dict[str, tuple[Experts, list[Tensor]]]:
    """Forward and leaves by name. A rival that is missing, fails or computes something else is left out, with the reason."""
    leaves = [b.x_TD, b.weights_TK, b.w13, b.w2]
    # On a CPU ours is torch's composition; asked for by name on a GPU, so that the table has no say.
    found = {
        "ours": (_ours(b, "triton" if fused(b.x_TD) else "auto"), leaves),
        "F.grouped_mm": (_grouped_mm(b), leaves),
    }
    with torch.no_grad():
        exact = found["ours"][0]().float()
    for name, build in {"F.grouped_mm": None, **RIVALS}.items():
        if name != "F.grouped_mm":
            if importlib.util.find_spec(name) is None:
                say(f"{name} skipped: it is not installed")
                continue
            if build is None:
                say(f"{name} skipped: there is no adapter for it yet")
                continue
            try:
                forward = build(b)
            except Exception as error:  # another version, another API
                say(f"{name} skipped: {type(error).__name__}: {error}")
                continue
            found[name] = forward, forward.leaves  # type: ignore[attr-defined]
        try:
            with torch.no_grad():
                off = float((found[name][0]().float() - exact).norm() / exact.norm())
        except Exception as error:
            off, reason = float("nan"), f"{type(error).__name__}: {error}"
        else:
            reason = f"its output is off by {off:.1e} of the norm, more than {FOUND_OFF:.0e}"
        if not off <= FOUND_OFF:
            say(f"{name} skipped: {reason}")
            del found[name]
    return found


def saved_bytes(forward: Experts, weights: list[Tensor]) -> int:
    """Of the tensors that autograd keeps for the backward pass, each storage once, without the weights."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for weight in weights:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values())
