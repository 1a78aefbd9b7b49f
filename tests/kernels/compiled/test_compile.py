"""Every kernel, at the shapes of the models, compiles for three generations without spills and within shared memory."""

from __future__ import annotations

import re

import pytest
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
from tests.kernels.compiled.lane import SHARED_LIMIT, Build, Recorder

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


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("op", LAUNCHES)
def test_compiles_without_spills_within_shared_memory(op: str, capability: int):
    builds = [(setting, build) for setting, some in builds_of(op, capability).items() for build in some]
    assert len({build.kernel for _, build in builds}) >= 2
    for setting, build in builds:
        print(f"sm_{capability} {setting} {build.kernel}: {build.registers} registers, {build.shared} B shared")
        assert build.spilled == 0, (setting, build.kernel)
        assert build.shared <= SHARED_LIMIT[capability], (setting, build.kernel)
        assert f".target sm_{capability}" in build.ptx, (setting, build.kernel)


@pytest.mark.parametrize("op", ["permute", "combine"])
def test_p19_rows_are_addressed_in_64_bits(op: str):
    """T * K * D is beyond 32 bits for 65,536 tokens of V3: no product may be cut to 32 (a widening one is not)."""
    for setting, builds in builds_of(op, 90).items():
        for build in builds:
            assert not re.search(r"(mul|mad)\.lo\.[su]32", build.ptx), (setting, build.kernel)


TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCTS = {"_grouped_fwd_kernel", "_grouped_dw_kernel", "_moe_mlp_up_kernel", "_moe_mlp_down_bwd_kernel"}


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_products_run_on_tensor_cores_and_copy_asynchronously(capability: int):
    found = builds_of("moe_mlp", capability)
    builds = [(s, b) for s, some in found.items() for b in some if s.endswith("bf16") and b.kernel in PRODUCTS]
    assert {build.kernel for _, build in builds} == PRODUCTS
    for setting, build in builds:
        where = (setting, build.kernel)
        print(f"sm_{capability} {setting} {build.kernel}: {build.registers} registers, {build.shared} B shared")
        assert f".target sm_{capability}" in build.ptx and TENSOR_CORES[capability] in build.ptx, where
        assert build.spilled == 0 and build.shared <= SHARED_LIMIT[capability], where
        # Both operands, gathered or not, go to shared memory 16 bytes at a time; only the epilogue loads as wide itself.
        assert len(re.findall(r"cp\.async\.cg\.shared\.global.*0x10", build.ptx)) >= 8, where
        synchronous = len(re.findall(r"ld\.global\S*\.v4", build.ptx))
        assert synchronous == (8 if build.kernel == "_moe_mlp_down_bwd_kernel" else 0), where
