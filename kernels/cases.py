"""Inputs, references and tolerances of every operation: the tests, the compile lane and the benchmarks read this table.

A case makes the arguments of an operation. An operation is compared with its reference in float64, outputs and the gradients
of all floating arguments, and has wrong twins: plausible mistakes, which the same comparison must refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.combine import combine, combine_reference
from kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference
from kernels.moe_mlp import moe_mlp, moe_mlp_reference
from kernels.permute import Permutation, permute, permute_reference, sort_by_expert
from kernels.route import route, route_reference
from kernels.router_topk import selection_scores

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of ||found - exact|| / ||exact||; no single value is off by more than 20 times that of the largest. bfloat16: a rounding
is off by 2**-9 at most, and by 2**-8 under Triton's interpreter, which cuts off instead."""


class Shape(NamedTuple):
    """Sizes of a layer: tokens, model dim, expert hidden dim, experts, experts per token."""

    T: int
    D: int
    F: int
    E: int
    K: int


MODELS = {  # the shapes of the benchmarks; T varies
    "1B": Shape(4096, 1024, 528, 64, 6),
    "16B": Shape(4096, 2048, 1408, 64, 6),
    "V3": Shape(4096, 7168, 2048, 32, 8),
    "fine": Shape(4096, 1024, 256, 256, 8),
}


class Case(NamedTuple):
    """make(device, dtype, seed) gives the arguments of the operation."""

    name: str
    make: Callable[[torch.device | str, torch.dtype, int], tuple[Any, ...]]


class Op(NamedTuple):
    """run: the public operation. reference: the same arguments, plain torch, keeps float64. wrong: twins that must fail."""

    run: Callable[..., Any]
    reference: Callable[..., Any]
    cases: list[Case]
    wrong: dict[str, Callable[..., Any]]


def normal(*shape: int, device: torch.device | str, dtype: torch.dtype, seed: int) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def choices(shape: Shape, kind: str, seed: int) -> Tensor:
    """topk_ids_TK int64 on the CPU, distinct in a token. kind: uniform; one (all tokens to the first K experts); gaps (only
    every third expert used, as far as K allows); masked (some tokens have none)."""
    T, _, _, E, K = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=generator)
    if kind == "one":
        scores = -torch.arange(E, dtype=torch.float32).expand(T, E)
    elif kind == "gaps":
        used = torch.arange(E) % 3 == 0
        used[:K] |= int(used.sum()) < K
        scores[:, ~used] = -1
    ids = scores.topk(K, dim=-1).indices
    if kind == "masked":
        ids[torch.rand(T, generator=generator) < 0.3] = -1
    return ids


SMALL = {  # name: shape and routing; odd everywhere
    "odd": (Shape(37, 40, 24, 7, 3), "uniform"),
    "one_expert": (Shape(33, 24, 16, 5, 1), "one"),
    "empty_experts": (Shape(50, 72, 40, 12, 2), "gaps"),
    "masked": (Shape(41, 136, 48, 9, 4), "masked"),
    "one_token": (Shape(1, 24, 16, 4, 2), "uniform"),
}


def routed(shape: Shape, kind: str, device: torch.device | str, seed: int, tile: int = 1) -> Permutation:
    """The permutation of `choices`."""
    ids_TK = choices(shape, kind, seed).to(device)
    return sort_by_expert(ids_TK, shape.E, masked=kind == "masked", tile=tile)


WIDE = (Shape(5, 1100, 16, 4, 2), "uniform")  # rows of more than one block

# -- permute -----------------------------------------------------------------------------------------------------------


def _permute_case(name: str, shape: Shape, kind: str, tile: int = 1) -> Case:
    def make(device, dtype, seed):
        x = normal(shape.T, shape.D, device=device, dtype=dtype, seed=seed)
        return x, routed(shape, kind, device, seed, tile)

    return Case(name, make)


def _permute_off_by_one(x: Tensor, p: Permutation) -> Tensor:
    return permute_reference(x, p.order_R, p.inverse_TK.shape[1] + 1)


def _permute_without_a_gradient(x: Tensor, p: Permutation) -> Tensor:
    rows, first = permute(x, p), p.order_R % p.inverse_TK.shape[1] == 0
    return torch.where(first[:, None], rows.detach(), rows)


PERMUTE = Op(
    permute,
    lambda x, p: permute_reference(x, p.order_R, p.inverse_TK.shape[1]),
    [
        *(_permute_case(name, *setting) for name, setting in SMALL.items()),
        _permute_case("wide", *WIDE),
        _permute_case("tiles", *SMALL["odd"], tile=16),
        _permute_case("masked_tiles", *SMALL["masked"], tile=8),
    ],
    {
        "order shifted by one": lambda x, p: permute_reference(x, p.order_R.roll(1), p.inverse_TK.shape[1]),
        "K off by one": _permute_off_by_one,
        "first choices without a gradient": _permute_without_a_gradient,
    },
)


# -- combine -----------------------------------------------------------------------------------------------------------


def _combine_case(name: str, shape: Shape, kind: str, tile: int = 1) -> Case:
    def make(device, dtype, seed):
        permutation = routed(shape, kind, device, seed, tile)
        rows = normal(len(permutation.order_R), shape.D, device=device, dtype=dtype, seed=seed)
        weights = normal(shape.T, shape.K, device=device, dtype=torch.float32, seed=seed + 1).sigmoid()
        return rows, weights, permutation

    return Case(name, make)


def _combine_reference(rows, weights, permutation):
    return combine_reference(rows, weights, permutation.inverse_TK)


COMBINE = Op(
    combine,
    _combine_reference,
    [
        *(_combine_case(name, *setting) for name, setting in SMALL.items()),
        _combine_case("wide", *WIDE),
        _combine_case("masked_tiles", *SMALL["masked"], tile=8),
    ],
    {
        "shifted by one row": lambda rows, weights, p: combine(rows.roll(1, 0), weights, p),
        "weights of the neighbour": lambda rows, weights, p: combine(rows, weights.roll(1, 1), p),
    },
)

# -- grouped_gemm ------------------------------------------------------------------------------------------------------

# More than a tile of rows, columns and depth, with an empty expert after full ones.
TILES = {**SMALL, "many_tiles": (Shape(150, 136, 72, 3, 2), "one")}


def _experts(shape: Shape, device, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """w13_e2FD and w2_eDF, of a size that keeps the variance of what they multiply."""
    w13 = normal(shape.E, 2 * shape.F, shape.D, device=device, dtype=torch.float32, seed=seed) * shape.D**-0.5
    w2 = normal(shape.E, shape.D, shape.F, device=device, dtype=torch.float32, seed=seed + 1) * shape.F**-0.5
    return w13.to(dtype), w2.to(dtype)


def _grouped_gemm_case(name: str, shape: Shape, kind: str) -> Case:
    def make(device, dtype, seed):
        permutation = routed(shape, kind, device, seed)
        rows = normal(len(permutation.order_R), shape.D, device=device, dtype=dtype, seed=seed)
        return rows, _experts(shape, device, dtype, seed + 1)[0], permutation.counts_E

    return Case(name, make)


GROUPED_GEMM = Op(
    grouped_gemm,
    grouped_gemm_reference,
    [_grouped_gemm_case(name, *setting) for name, setting in TILES.items()],
    {
        "weights of the neighbour": lambda rows, weight, counts: grouped_gemm(rows, weight.roll(1, 0), counts),
        "groups off by one row": lambda rows, weight, counts: grouped_gemm(rows.roll(1, 0), weight, counts),
    },
)

# -- moe_mlp -----------------------------------------------------------------------------------------------------------


def moe_mlp_case(name: str, shape: Shape, kind: str) -> Case:
    """At any shape, for benchmarks and tests on a GPU."""

    def make(device, dtype, seed):
        x = normal(shape.T, shape.D, device=device, dtype=dtype, seed=seed)
        weights = normal(shape.T, shape.K, device=device, dtype=torch.float32, seed=seed + 1).sigmoid()
        permutation = routed(shape, kind, device, seed)
        return x, weights, permutation, *_experts(shape, device, dtype, seed + 2)

    return Case(name, make)


MOE_MLP = Op(
    moe_mlp,
    moe_mlp_reference,
    [moe_mlp_case(name, *setting) for name, setting in TILES.items()],
    {
        "weights of the neighbour": lambda x, w, p, w13, w2: moe_mlp(x, w, p, w13.roll(1, 0), w2),
        "gate and up exchanged": lambda x, w, p, w13, w2: moe_mlp(x, w, p, torch.cat(w13.chunk(2, 1)[::-1], 1), w2),
        "order shifted by one": lambda x, w, p, w13, w2: moe_mlp(x, w, p._replace(order_R=p.order_R.roll(1)), w13, w2),
        "a weight left out": lambda x, w, p, w13, w2: moe_mlp(x, w * (torch.arange(w.shape[1]) > 0), p, w13, w2),
    },
)

# -- route -------------------------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """What `route` takes after the logits."""

    expert_bias_E: Tensor
    top_k: int
    score_function: str
    renormalize: bool = True
    scaling: float = 1.0
    token_mask_T: Tensor | None = None
    num_groups: int = 1
    group_top_k: int = 1


def _clear(logits: Tensor, how: Routing) -> Tensor:
    """Rows [T] where no two places of the choice are so near that float32 may exchange them. Exact ties stay ties."""

    def near(values: Tensor) -> Tensor:
        gaps = values.sort(-1, descending=True).values.diff(dim=-1).abs()
        return ((gaps > 0) & (gaps < 2e-6)).any(-1)

    scores = logits.double().sigmoid() if how.score_function == "sigmoid" else logits.double().softmax(-1)
    biased = selection_scores(scores, how.expert_bias_E, how.num_groups, how.group_top_k)
    by_group = (scores + how.expert_bias_E).unflatten(-1, (how.num_groups, -1))
    return ~near(biased.topk(how.top_k + 1).values) & ~near(by_group.topk(2).values.sum(-1))


def _route_case(name: str, experts: int, ties: bool = False, masked: bool = False, **how: Any) -> Case:
    tokens = 41

    def make(device, dtype, seed):
        logits = normal(8 * tokens, experts, device="cpu", dtype=torch.float32, seed=seed)
        bias = 0.05 * normal(experts, device="cpu", dtype=torch.float32, seed=seed + 1)
        logits, bias = (logits.round().to(dtype), bias.round()) if ties else (logits.to(dtype), bias)
        logits = logits[_clear(logits, Routing(bias, **how))][:tokens]
        assert len(logits) == tokens, "too few rows without near-ties"
        mask = (torch.arange(tokens) % 3 != 1).to(device) if masked else None
        return logits.to(device), Routing(bias.to(device), **how, token_mask_T=mask)

    return Case(name, make)


def _route_with_biased_weights(logits: Tensor, how: Routing) -> Any:
    out = route(logits, *how)
    return out._replace(topk_weights_TK=out.topk_weights_TK + how.expert_bias_E[out.topk_ids_TK.long()])


def _route_shifted(logits: Tensor, how: Routing) -> Any:
    out = route(logits, *how)
    return out._replace(topk_ids_TK=(out.topk_ids_TK + 1) % logits.shape[1])


ROUTE = Op(
    lambda logits, how: route(logits, *how),
    lambda logits, how: route_reference(logits, *how),
    [  # K = 1 without renormalisation: with it the weight is 1 and the gradient 0
        _route_case("groups", 160, top_k=6, score_function="sigmoid", scaling=2.5, num_groups=8, group_top_k=3),
        _route_case("groups_masked", 60, masked=True, top_k=8, score_function="softmax", num_groups=5, group_top_k=2),
        _route_case("sigmoid_one", 7, top_k=1, score_function="sigmoid", renormalize=False),
        _route_case("softmax_all_but_one", 7, top_k=6, score_function="softmax"),
        _route_case("sigmoid_masked", 61, masked=True, top_k=8, score_function="sigmoid"),
        _route_case("softmax_scaled", 61, top_k=6, score_function="softmax", renormalize=False, scaling=2.5),
        _route_case("softmax_wide", 160, top_k=8, score_function="softmax"),
        _route_case("ties", 61, ties=True, top_k=6, score_function="sigmoid"),
    ],
    {
        "bias added to the weights": _route_with_biased_weights,
        "ids shifted by one": _route_shifted,
        "group limit ignored": lambda logits, how: route(logits, *how._replace(num_groups=1, group_top_k=1)),
    },
)

OPS = {"route": ROUTE, "permute": PERMUTE, "combine": COMBINE, "grouped_gemm": GROUPED_GEMM, "moe_mlp": MOE_MLP}
