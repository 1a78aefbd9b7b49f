"""Every launch of every operation at the shapes of the models, on meta tensors: nothing here can read a value."""

from __future__ import annotations

import functools

import torch

from kernels.cases import MODELS, Shape
from kernels.combine import combine_backward, combine_forward
from kernels.grouped_gemm import (
    gemm_blocks,
    grouped_forward,
    grouped_weight_gradient,
    row_tiles,
)
from kernels.moe_mlp import moe_mlp_backward, moe_mlp_forward
from kernels.permute_triton import count_tokens_forward, permute_backward, permute_forward, sort_forward
from kernels.route_triton import route_backward, route_forward
from kernels.router_topk import RESPONSE_BINS
from tests.kernels.compiled.lane import Build, Recorder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_permute(s: Shape, dtype: torch.dtype) -> None:
    s = s._replace(T=65_536)
    x, rows = meta(s.T, s.D, dtype=dtype), meta(s.T * s.K, s.D, dtype=dtype)
    for index in (torch.int32, torch.int64):
        ids = meta(s.T, s.K, dtype=index)
        sort_forward(ids, s.E, 1)
        count_tokens_forward(ids.view(-1), s.E)
    order, inverse = meta(s.T * s.K, dtype=torch.int64), meta(s.T, s.K, dtype=torch.int64)
    permute_forward(x, order, inverse)
    permute_backward(rows, inverse)


def launch_combine(s: Shape, dtype: torch.dtype) -> None:
    rows, out = meta(s.T * s.K, s.D, dtype=dtype), meta(s.T, s.D, dtype=dtype)
    weights, inverse = meta(s.T, s.K, dtype=torch.float32), meta(s.T, s.K, dtype=torch.int64)
    order = meta(s.T * s.K, dtype=torch.int64)
    combine_forward(rows, weights, inverse)
    combine_backward(out, rows, weights, inverse, order)


def launch_route(s: Shape, dtype: torch.dtype) -> None:
    s = s._replace(T=65_536)
    logits, bias = meta(s.T, s.E, dtype=dtype), meta(s.E, dtype=torch.float32)
    grad, ids = meta(s.T, s.K, dtype=torch.float32), meta(s.T, s.K, dtype=torch.int32)
    none, every = [s.E, 0, 0, 0, 0], [s.E, 1, s.E, s.E, s.E * RESPONSE_BINS]
    for score in ("sigmoid", "softmax"):
        for mask, sizes, groups in ((None, none, (1, 1)), (meta(s.T, dtype=torch.bool), every, (8, 4))):
            route_forward(logits, bias, mask, s.K, score, True, 2.5, *groups, 0.1, sizes)
        route_backward(grad, logits, ids, score, True, 2.5)


SMALL_FLOAT32 = Shape(512, 256, 128, 8, 2)
"""The one shape of the products in float32, which tests use and training does not."""


def launch_grouped_gemm(s: Shape, dtype: torch.dtype) -> None:
    s = SMALL_FLOAT32 if dtype == torch.float32 else s
    rows, weight = meta(s.T * s.K, s.D, dtype=dtype), meta(s.E, 2 * s.F, s.D, dtype=dtype)
    blocks = gemm_blocks(dtype, s.T * s.K, s.E)
    tiles = row_tiles(meta(s.E, dtype=torch.int64), s.T * s.K, blocks.rows)
    out = grouped_forward(rows, weight, tiles, blocks)
    grouped_forward(out, weight.transpose(1, 2), tiles, blocks)
    grouped_weight_gradient(out, rows, tiles.row_ends_e)


def launch_moe_mlp(s: Shape, dtype: torch.dtype) -> None:
    s = SMALL_FLOAT32 if dtype == torch.float32 else s
    x, weights = meta(s.T, s.D, dtype=dtype), meta(s.T, s.K, dtype=torch.float32)
    order, inverse = meta(s.T * s.K, dtype=torch.int64), meta(s.T, s.K, dtype=torch.int64)
    experts = meta(s.E, 2 * s.F, s.D, dtype=dtype), meta(s.E, s.D, s.F, dtype=dtype)
    arguments = (x, weights, order, inverse, meta(s.E, dtype=torch.int64), *experts)
    out, gu = moe_mlp_forward(*arguments, save=True)
    moe_mlp_backward(out, *arguments, gu)
    moe_mlp_forward(*arguments, save=False)


LAUNCHES = {
    "route": launch_route,
    "permute": launch_permute,
    "combine": launch_combine,
    "grouped_gemm": launch_grouped_gemm,
    "moe_mlp": launch_moe_mlp,
}


@functools.cache
def builds_of(op: str, capability: int) -> dict[str, list[Build]]:
    """By shape and dtype."""
    with Recorder(capability) as recorder:
        found = {}
        for name, shape in MODELS.items():
            for short, dtype in DTYPES.items():
                recorder.builds = []
                LAUNCHES[op](shape, dtype)
                found[f"{name} {short}"] = recorder.builds
    return found
