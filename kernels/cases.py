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
from kernels.permute import Permutation, sort_by_expert

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of ||found - exact|| / ||exact||; no single value is off by more than 20 times that of the largest. bfloat16: one rounding
of the result and one of an intermediate, each 2**-9 relative at most."""


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


def routed(shape: Shape, kind: str, device: torch.device | str, seed: int) -> Permutation:
    """The permutation of `choices`."""
    ids_TK = choices(shape, kind, seed).to(device)
    return sort_by_expert(ids_TK, shape.E, masked=kind == "masked")


# -- combine -----------------------------------------------------------------------------------------------------------


def _combine_case(name: str, shape: Shape, kind: str) -> Case:
    def make(device, dtype, seed):
        permutation = routed(shape, kind, device, seed)
        rows = normal(len(permutation.order_R), shape.D, device=device, dtype=dtype, seed=seed)
        weights = normal(shape.T, shape.K, device=device, dtype=torch.float32, seed=seed + 1).sigmoid()
        return rows, weights, permutation

    return Case(name, make)


def _combine_reference(rows, weights, permutation):
    return combine_reference(rows, weights, permutation.inverse_TK)


COMBINE = Op(
    combine,
    _combine_reference,
    [_combine_case(name, *setting) for name, setting in SMALL.items()],
    {
        "shifted by one row": lambda rows, weights, p: combine(rows.roll(1, 0), weights, p),
        "weights of the neighbour": lambda rows, weights, p: combine(rows, weights.roll(1, 1), p),
    },
)

OPS = {"combine": COMBINE}
