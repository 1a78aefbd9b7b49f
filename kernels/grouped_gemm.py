"""Grouped matrix product: every group of rows with the weights of its own expert.

    out_RN[r] = rows_RD[r] @ weight_eND[group of r].T      groups are consecutive rows, sizes in tokens_per_expert_e
    grad rows_RD[r] = grad out_RN[r] @ weight_eND[group of r]          the same kernel, the weights transposed
    grad weight_eND[i] = sum over the rows r of group i of grad out_RN[r] (x) rows_RD[r]       exact zeros without rows

rows_RD, weight_eND and out_RN bfloat16, float16 (sums in float32) or float32 (IEEE, no TF32); tokens_per_expert_e int64 on the
device of the rows and never read by the host; the matrix of one expert has fewer than 2**31 values. float64 has the
reference only. Saved for backward: rows, weights, sizes.
Triton writes zeros into rows past the last group; F.grouped_mm leaves them uninitialised (pytorch#193633).

Tiles: a group of c rows has cdiv(c, BM) row tiles, so all have at most cdiv(R, BM) + e, which the host knows. Every program
finds its expert by counting the groups whose tiles end at or before its own tile; programs past the last tile return.
Every value is written by one program, no atomics: deterministic.
Letters: R rows, D inner dim, N output dim, e local experts, K experts per token (of gathered rows).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels import grouped_gemm_cpu as cpu
from kernels.backend import Backend, fused
from kernels.grouped_gemm_table import faster

# -- the reference -----------------------------------------------------------------------------------------------------


def grouped_gemm_reference(rows_RD: Tensor, weight_eND: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    """A loop over the groups; any float dtype. The oracle of the tests, and float64's only path."""
    counts = tokens_per_expert_e.tolist()
    *groups, rest = rows_RD.split([*counts, rows_RD.shape[0] - sum(counts)])
    products = [group @ weight.T for group, weight in zip(groups, weight_eND, strict=True)]
    return torch.cat([*products, rest.new_zeros(rest.shape[0], weight_eND.shape[1])])


# -- Triton ------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_place(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row tile and column tile of a program: GROUP row tiles pass each column tile while it is in the L2 cache."""
    band = program // (GROUP * tiles_n)
    inside = program % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    return band * GROUP + inside % height, inside // height


@triton.jit
def tile_rows(tile, tile_ends_ptr, row_ends_ptr, R, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end of the rows of a row tile, int64. Expert E: the rows past the last group."""
    lane = tl.arange(0, EP)
    ends = tl.load(tile_ends_ptr + lane, mask=lane < E, other=2**31 - 1)
    expert = tl.sum((ends <= tile).to(tl.int64), axis=0)
    tiles_before = tl.load(tile_ends_ptr + expert - 1, mask=expert > 0, other=0)
    rows_before = tl.load(row_ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(row_ends_ptr + expert, mask=expert < E, other=R)
    return expert, rows_before + (tile - tiles_before) * BM, tl.minimum(end, R)


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 to dtype, to the nearest. The interpreter cuts bfloat16 off, which biases every product that follows."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _grouped_fwd_kernel(
    rows_ptr, weight_ptr, out_ptr, tile_ends_ptr, row_ends_ptr, R, N, D, stride_e, stride_n, stride_d,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    tile, column = tile_place(tl.program_id(0), tl.cdiv(R, BM) + E, tl.cdiv(N, BN), GROUP)
    expert, first, end = tile_rows(tile, tile_ends_ptr, row_ends_ptr, R, E, EP, BM)
    if first >= end:
        return
    m = tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    # int64 to the first row of the tile and to the expert, int32 inside: fewer registers.
    rows = rows_ptr + first * D + m[:, None] * D
    weight = weight_ptr + expert * stride_e + n[None, :] * stride_n
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, tl.where(expert < E, D, 0), BD):
        d = start + tl.arange(0, BD)
        a = tl.load(rows + d[None, :], mask=(first + m < end)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(weight + d[:, None] * stride_d, mask=(n < N)[None, :] & (d < D)[:, None], other=0.0)
        if INTERPRET:  # it multiplies bfloat16 wrongly
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    out = out_ptr + first * N + (m[:, None] * N + n[None, :])
    stored = (first + m < end)[:, None] & (n < N)[None, :]
    tl.store(out, rounded(total, out_ptr.dtype.element_ty, INTERPRET), mask=stored)


@triton.jit
def _grouped_dw_kernel(
    left_ptr, right_ptr, order_ptr, out_ptr, row_ends_ptr, R, N, D,
    K: tl.constexpr, GATHER: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    tile_n, tile_d = tile_place(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(D, BD), GROUP)
    n = tile_n * BN + tl.arange(0, BN)
    d = tile_d * BD + tl.arange(0, BD)
    begin = tl.load(row_ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.minimum(tl.load(row_ends_ptr + expert), R)
    total = tl.zeros((BN, BD), tl.float32)
    for start in range(0, (end - begin).to(tl.int32), BR):
        row = begin + start + tl.arange(0, BR)
        live = row < end
        left_row, right_row = row, row
        if GATHER != "none":
            pair = tl.load(order_ptr + row, mask=live, other=-1)
            live = pair >= 0
            if GATHER == "left":
                left_row = pair // K
            else:
                right_row = pair // K
        # Loaded as its transpose: through tl.trans sm_80 would copy it synchronously.
        left = tl.load(left_ptr + left_row[None, :] * N + n[:, None], mask=live[None, :] & (n < N)[:, None], other=0.0)
        right = tl.load(
            right_ptr + right_row[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
        )
        if INTERPRET:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    out = out_ptr + expert.to(tl.int64) * N * D + (n[:, None] * D + d[None, :])
    tl.store(out, rounded(total, out_ptr.dtype.element_ty, INTERPRET), mask=(n < N)[:, None] & (d < D)[None, :])


class Blocks(NamedTuple):
    """Sizes of a tile: rows, columns, depth of one step; programs of a column in a row; warps; stages of the pipeline."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


def gemm_blocks(dtype: torch.dtype, rows: int, experts: int) -> Blocks:
    """Tile of a product: 64 rows where an expert has under 256 on average, because half of its last tile is empty.

    Not tuned: no GPU was at hand. Three stages of 32 KiB: two programs share a multiprocessor of an H100.
    """
    if dtype == torch.float32:  # no tensor cores: registers hold less
        return Blocks(64, 64, 16, 8, 4, 3)
    return Blocks(128, 128, 64, 8, 8, 3) if rows >= 256 * experts else Blocks(64, 128, 64, 8, 4, 3)


class Tiles(NamedTuple):
    """Schedule of the row tiles on the device: tile_ends_e and row_ends_e int64, and the bound that the host knows."""

    tile_ends_e: Tensor
    row_ends_e: Tensor
    bound: int


def row_tiles(tokens_per_expert_e: Tensor, rows: int, block: int) -> Tiles:
    """Tiles of `block` rows that never cross a group. The rows past the last group are one more group."""
    tile_ends_e = ((tokens_per_expert_e + (block - 1)) // block).cumsum(0)
    bound = triton.cdiv(rows, block) + tokens_per_expert_e.shape[0]
    return Tiles(tile_ends_e, tokens_per_expert_e.cumsum(0), bound)


def grouped_forward(rows_RD: Tensor, weight_eND: Tensor, tiles: Tiles, blocks: Blocks) -> Tensor:
    """Launch the forward kernel: out_RN. Contiguous rows; weights of any strides, so that it is also the gradient of the rows."""
    (rows, inner), (experts, columns, _) = rows_RD.shape, weight_eND.shape
    out_RN = rows_RD.new_empty(rows, columns)
    if out_RN.numel() == 0:
        return out_RN
    grid = (tiles.bound * triton.cdiv(columns, blocks.columns),)
    _grouped_fwd_kernel[grid](
        rows_RD, weight_eND, out_RN, tiles.tile_ends_e, tiles.row_ends_e, rows, columns, inner, *weight_eND.stride(),
        E=experts, EP=triton.next_power_of_2(experts), BM=blocks.rows, BN=blocks.columns, BD=blocks.depth,
        GROUP=blocks.group, INTERPRET=knobs.runtime.interpret, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out_RN


def grouped_weight_gradient(
    left_RN: Tensor,
    right_RD: Tensor,
    row_ends_e: Tensor,
    order_R: Tensor | None = None,
    top_k: int = 1,
    gather: str = "none",
) -> Tensor:
    """Launch the kernel of the weight gradient: sum over a group's rows of left (x) right, [e, N, D]. Contiguous tensors.

    gather "left" or "right": that side has a row per token, and row r of it is order_R[r] // top_k (no row at -1).
    """
    columns, inner = left_RN.shape[1], right_RD.shape[1]
    rows = len(left_RN if gather != "left" else right_RD)
    grad_eND = left_RN.new_empty(len(row_ends_e), columns, inner)
    if grad_eND.numel() == 0:
        return grad_eND
    blocks = gemm_blocks(left_RN.dtype, 256 * len(row_ends_e), len(row_ends_e))  # rows are the depth here
    stages = blocks.stages if gather == "none" else 2 * blocks.stages - 1  # the index is a stage before every load
    grid = (triton.cdiv(columns, blocks.columns) * triton.cdiv(inner, blocks.columns), len(row_ends_e))
    _grouped_dw_kernel[grid](
        left_RN, right_RD, row_ends_e if order_R is None else order_R, grad_eND, row_ends_e, rows, columns, inner,
        K=top_k, GATHER=gather, BN=blocks.columns, BD=blocks.columns, BR=blocks.depth,
        GROUP=blocks.group, INTERPRET=knobs.runtime.interpret, num_warps=blocks.warps, num_stages=stages,
    )  # fmt: skip
    return grad_eND


# Registered as operators: a compiled model keeps them without a graph break.


@torch.library.custom_op("alf_moe::grouped_gemm", mutates_args=())
def _forward(rows_RD: Tensor, weight_eND: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    blocks = gemm_blocks(rows_RD.dtype, len(rows_RD), len(weight_eND))
    return grouped_forward(rows_RD, weight_eND, row_tiles(tokens_per_expert_e, len(rows_RD), blocks.rows), blocks)


@torch.library.custom_op("alf_moe::grouped_gemm_weight_gradient", mutates_args=())
def _weight_gradient(grad_RN: Tensor, rows_RD: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    return grouped_weight_gradient(grad_RN, rows_RD, tokens_per_expert_e.cumsum(0))


@_forward.register_fake
def _(rows_RD, weight_eND, tokens_per_expert_e):
    return rows_RD.new_empty(rows_RD.shape[0], weight_eND.shape[1])


@_weight_gradient.register_fake
def _(grad_RN, rows_RD, tokens_per_expert_e):
    return grad_RN.new_empty(tokens_per_expert_e.shape[0], grad_RN.shape[1], rows_RD.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_RN):
    rows_RD, weight_eND, counts_e = ctx.saved_tensors
    grad_RN = grad_RN.contiguous()
    grad_rows_RD = _forward(grad_RN, weight_eND.transpose(1, 2), counts_e) if ctx.needs_input_grad[0] else None
    grad_weight_eND = _weight_gradient(grad_RN, rows_RD, counts_e) if ctx.needs_input_grad[1] else None
    return grad_rows_RD, grad_weight_eND, None


_forward.register_autograd(_differentiate, setup_context=_save)


# -- torch -------------------------------------------------------------------------------------------------------------


def _has_own(rows_RD: Tensor) -> bool:
    """Whether kernels/grouped_gemm_cpu.py does it."""
    return rows_RD.device.type == "cpu" and rows_RD.dtype == torch.bfloat16


def _is_opaque(rows_RD: Tensor) -> bool:
    """Whether torch shall see an operator of ours: our own product, or one for torch.compile, whose fake kernel of F.grouped_mm
    knows bfloat16 alone (torch 2.13)."""
    return _has_own(rows_RD) or (torch.compiler.is_compiling() and rows_RD.dtype != torch.bfloat16)


def grouped_mm(rows_RD: Tensor, weight_eND: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    """The product, differentiable, without Triton."""
    if rows_RD.dtype == torch.float64:  # F.grouped_mm has none
        return grouped_gemm_reference(rows_RD, weight_eND, tokens_per_expert_e)
    if rows_RD.shape[0] == 0:
        # No row on this rank: a product that is empty but keeps every gradient zero instead of None.
        return rows_RD @ weight_eND[0].T + 0.0 * weight_eND.sum()
    if _is_opaque(rows_RD):
        return _opaque(rows_RD, weight_eND, tokens_per_expert_e)
    offsets = tokens_per_expert_e.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_RD, weight_eND.transpose(-2, -1), offs=offsets)


def grouped_mm_weight_gradient(grad_RN: Tensor, rows_RD: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    """grad weight_eND without Triton; exact zeros without rows. Not differentiable."""
    if rows_RD.dtype == torch.float64 or rows_RD.shape[0] == 0:
        counts = tokens_per_expert_e.tolist()
        groups = zip(grad_RN[: sum(counts)].split(counts), rows_RD[: sum(counts)].split(counts), strict=True)
        return torch.stack([grad.T @ rows for grad, rows in groups])
    if _is_opaque(rows_RD):
        return _opaque_weight_gradient(grad_RN, rows_RD, tokens_per_expert_e)
    return F.grouped_mm(grad_RN.T, rows_RD, offs=tokens_per_expert_e.cumsum(0, dtype=torch.int32))


@torch.library.custom_op("alf_moe::grouped_mm", mutates_args=())
def _opaque(rows_RD: Tensor, weight_eND: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    if _has_own(rows_RD):
        return cpu.forward(rows_RD.contiguous(), weight_eND, tokens_per_expert_e)
    offsets = tokens_per_expert_e.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_RD, weight_eND.transpose(-2, -1), offs=offsets)


@torch.library.custom_op("alf_moe::grouped_mm_weight_gradient", mutates_args=())
def _opaque_weight_gradient(grad_RN: Tensor, rows_RD: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    if _has_own(rows_RD):
        return cpu.weight_gradient(grad_RN.contiguous(), rows_RD.contiguous(), tokens_per_expert_e)
    return F.grouped_mm(grad_RN.T, rows_RD, offs=tokens_per_expert_e.cumsum(0, dtype=torch.int32))


@_opaque.register_fake
def _(rows_RD, weight_eND, tokens_per_expert_e):
    return rows_RD.new_empty(rows_RD.shape[0], weight_eND.shape[1])


@_opaque_weight_gradient.register_fake
def _(grad_RN, rows_RD, tokens_per_expert_e):
    return grad_RN.new_empty(tokens_per_expert_e.shape[0], grad_RN.shape[1], rows_RD.shape[1])


def _differentiate_opaque(ctx, grad_RN):
    rows_RD, weight_eND, counts_e = ctx.saved_tensors
    grad_rows_RD = _opaque(grad_RN, weight_eND.transpose(1, 2), counts_e) if ctx.needs_input_grad[0] else None
    grad_weight_eND = _opaque_weight_gradient(grad_RN, rows_RD, counts_e) if ctx.needs_input_grad[1] else None
    return grad_rows_RD, grad_weight_eND, None


_opaque.register_autograd(_differentiate_opaque, setup_context=_save)


def _use_triton(rows_RD: Tensor, weight_eND: Tensor, backend: Backend) -> bool:
    """auto: what the table says where Triton runs. float64 is always torch."""
    if not fused(rows_RD, backend) or rows_RD.dtype == torch.float64:
        return False
    return backend == "triton" or faster("grouped_gemm", rows_RD, weight_eND, len(rows_RD)) == "triton"


def _check(rows_RD: Tensor, weight_eND: Tensor, tokens_per_expert_e: Tensor) -> None:
    rows, weight, counts = tuple(rows_RD.shape), tuple(weight_eND.shape), tuple(tokens_per_expert_e.shape)
    if rows_RD.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"rows_RD is {rows_RD.dtype}: give bfloat16, float16, float32 or float64")
    if len(rows) != 2 or len(weight) != 3 or weight[2] != rows[1]:
        raise ValueError(f"weight_eND is {weight} for rows_RD {rows}: give [experts, N, D] for rows [R, D]")
    if counts != weight[:1] or tokens_per_expert_e.dtype != torch.int64:
        raise ValueError(f"tokens_per_expert_e is {tokens_per_expert_e.dtype} {counts}: give int64 ({weight[0]},)")
    if weight_eND.dtype != rows_RD.dtype or weight_eND.device != rows_RD.device:
        found = f"{weight_eND.dtype} on {weight_eND.device}"
        raise ValueError(f"weight_eND is {found}: give {rows_RD.dtype} on {rows_RD.device}, as rows_RD")
    if weight[1] * weight[2] >= 2**31:
        raise ValueError(f"weight_eND is {weight}: give fewer than 2**31 values an expert")
    if tokens_per_expert_e.device != rows_RD.device:
        raise ValueError(f"tokens_per_expert_e is on {tokens_per_expert_e.device}: give {rows_RD.device}, as rows_RD")


def grouped_gemm(rows_RD: Tensor, weight_eND: Tensor, tokens_per_expert_e: Tensor, backend: Backend = "auto") -> Tensor:
    """out_RN in the dtype of rows_RD; empty groups are allowed and get zero gradients.

    backend auto: Triton where it runs, unless kernels/grouped_gemm_table.json has torch as the faster. The sizes must add up
    to at most R; rows past the last group are zeros with Triton and undefined with torch. Raises
    ValueError for other dtypes, devices, shapes or backends.
    """
    _check(rows_RD, weight_eND, tokens_per_expert_e)
    if not _use_triton(rows_RD, weight_eND, backend):
        return grouped_mm(rows_RD, weight_eND, tokens_per_expert_e)
    return _forward(rows_RD.contiguous(), weight_eND.contiguous(), tokens_per_expert_e)
