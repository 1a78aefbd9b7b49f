"""Combine: the weighted sum of what the experts returned for a token.

    out_TD[t] = sum_k weights_TK[t, k] * rows_RD[inverse_TK[t, k]]        accumulated in float32
    grad rows_RD[r] = w * grad out_TD[t];   grad weights_TK[t, k] = <rows_RD[inverse], grad out_TD[t]>

rows_RD any float dtype, weights_TK float32, inverse_TK int64 (-1: no row, counts as zero), out_TD in the dtype of rows_RD.
Rows of no pair (order_R -1, see permute.py) are not read, and their gradient is zero.
Saved for backward: rows, weights, inverse, order. Every row is written once, no atomics: deterministic.
Letters: T tokens, D model dim, K experts per token, R dispatched rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, fused
from kernels.permute import Permutation, gather_rows
from kernels.permute_triton import pair_blocks, token_blocks

# -- the reference -----------------------------------------------------------------------------------------------------


def combine_reference(rows_RD: Tensor, weights_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    """The equation, differentiable, in float32 (float64 for float64 rows)."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    padded = torch.cat([rows_RD.to(wide), rows_RD.new_zeros(1, rows_RD.shape[1], dtype=wide)])
    return (weights_TK.to(wide)[:, :, None] * padded[inverse_TK]).sum(1).to(rows_RD.dtype)  # -1: the row of zeros


# -- Triton ------------------------------------------------------------------------------------------------------------


@triton.jit
def _combine_fwd_kernel(
    rows_ptr, weights_ptr, inverse_ptr, out_ptr, T, D,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    token = t < T
    total = tl.zeros((BT, BD), tl.float32)
    for k in tl.static_range(K):
        pair = t.to(tl.int64) * K + k
        row = tl.load(inverse_ptr + pair, mask=token, other=-1)
        weight = tl.load(weights_ptr + pair, mask=token, other=0.0)
        there = (row >= 0)[:, None] & (d < D)[None, :]
        value = tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        total += weight[:, None] * value
    out = out_ptr + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=token[:, None] & (d < D)[None, :])


@triton.jit
def _combine_bwd_kernel(
    grad_ptr, rows_ptr, weights_ptr, inverse_ptr, order_ptr, grad_rows_ptr, grad_weights_ptr, N, R, D,
    K: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """By pairs: neighbours share the gradient of their token in the cache. The products are summed once, at the end: a sum for
    every k and block is a barrier, and a barrier leaves one load in flight."""
    pair = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    row = tl.load(inverse_ptr + pair, mask=pair < N, other=-1)
    weight = tl.load(weights_ptr + pair, mask=pair < N, other=0.0)
    hole = tl.load(order_ptr + pair, mask=pair < R, other=0) < 0  # the row of this number has no pair
    product = tl.zeros((BP, BD), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (d < D)[None, :]
        there = (row >= 0)[:, None] & inside
        at = row[:, None] * D + d[None, :]
        grad = tl.load(grad_ptr + (pair // K)[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        value = tl.load(rows_ptr + at, mask=there, other=0.0).to(tl.float32)
        product += value * grad
        found = (weight[:, None] * grad).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + at, found, mask=there)
        empty = grad_rows_ptr + pair[:, None] * D + d[None, :]
        tl.store(empty, tl.zeros_like(found), mask=hole[:, None] & inside)
    tl.store(grad_weights_ptr + pair, tl.sum(product, axis=1), mask=pair < N)


def combine_forward(rows_RD: Tensor, weights_TK: Tensor, inverse_TK: Tensor) -> Tensor:
    """Launch the forward kernel. Contiguous tensors."""
    tokens, top_k = weights_TK.shape
    dim = rows_RD.shape[1]
    out_TD = rows_RD.new_empty(tokens, dim)
    if out_TD.numel() == 0:
        return out_TD
    block_t, block_d = token_blocks(dim)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(dim, block_d))
    _combine_fwd_kernel[grid](
        rows_RD, weights_TK, inverse_TK, out_TD, tokens, dim, K=top_k, BT=block_t, BD=block_d, num_warps=4
    )
    return out_TD


def combine_backward(
    grad_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, inverse_TK: Tensor, order_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: grad_rows_RD, grad_weights_TK. Contiguous tensors; order_R at least as long as rows_RD."""
    pairs, (rows, dim) = inverse_TK.numel(), rows_RD.shape
    grad_rows_RD, grad_weights_TK = torch.empty_like(rows_RD), torch.empty_like(weights_TK)
    if dim == 0 or max(pairs, rows) == 0:
        return grad_rows_RD, grad_weights_TK.zero_()
    block_p, block_d = pair_blocks(rows_RD)
    _combine_bwd_kernel[(triton.cdiv(max(pairs, rows), block_p),)](
        grad_TD, rows_RD, weights_TK, inverse_TK, order_R, grad_rows_RD, grad_weights_TK, pairs, rows, dim,
        K=inverse_TK.shape[1], BP=block_p, BD=block_d, num_warps=4,
    )  # fmt: skip
    return grad_rows_RD, grad_weights_TK


def _combine(rows_RD: Tensor, weights_TK: Tensor, inverse_TK: Tensor, order_R: Tensor) -> Tensor:
    return combine_forward(rows_RD, weights_TK, inverse_TK)  # order_R is for the backward pass


# Registered as operators: a compiled model keeps them without a graph break.
_forward = torch.library.custom_op("alf_moe::combine", _combine, mutates_args=())
_backward = torch.library.custom_op("alf_moe::combine_backward", combine_backward, mutates_args=())


@_forward.register_fake
def _(rows_RD, weights_TK, inverse_TK, order_R):
    return rows_RD.new_empty(weights_TK.shape[0], rows_RD.shape[1])


@_backward.register_fake
def _(grad_TD, rows_RD, weights_TK, inverse_TK, order_R):
    return torch.empty_like(rows_RD), torch.empty_like(weights_TK)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_TD):
    return *_backward(grad_TD.contiguous(), *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# -- torch -------------------------------------------------------------------------------------------------------------


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, permutation.inverse_TK, permutation.order_R)
        ctx.padded = permutation.padded
        return weighted_sum(rows_RD, weights_TK, permutation.inverse_TK, permutation.masked)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        rows_RD, weights_TK, inverse_TK, order_R = ctx.saved_tensors
        order_R = order_R[: len(rows_RD)]
        token_R = order_R.div(inverse_TK.shape[1], rounding_mode="floor")
        wide = torch.promote_types(rows_RD.dtype, weights_TK.dtype)
        grad_RD = gather_rows(grad_TD.to(wide), token_R, ctx.padded)
        grad_weights_R = (grad_RD * rows_RD.to(wide)).sum(dim=-1).to(weights_TK.dtype)
        grad_weights_TK = F.pad(grad_weights_R, (0, 1))[inverse_TK]  # -1: the last one, 0
        weights_R = weights_TK.reshape(-1)[order_R]  # of some pair where there is none: the gradient is zero there
        grad_rows_RD = grad_RD.mul_(weights_R[:, None]).to(rows_RD.dtype)
        return grad_rows_RD, grad_weights_TK, None


def weighted_sum(rows_RD: Tensor, weights_TK: Tensor, inverse_TK: Tensor, masked: bool) -> Tensor:
    """The equation at the top, without a gradient."""
    if masked:
        gathered_TKD = gather_rows(rows_RD, inverse_TK, masked).to(weights_TK.dtype)
        return torch.bmm(weights_TK[:, None, :], gathered_TKD)[:, 0].to(rows_RD.dtype)
    # embedding_bag keeps no gathered rows; its weights must have the dtype of the rows, and bfloat16 would round them.
    rows = rows_RD.to(torch.promote_types(rows_RD.dtype, weights_TK.dtype))
    return F.embedding_bag(inverse_TK, rows, mode="sum", per_sample_weights=weights_TK.to(rows.dtype)).to(rows_RD.dtype)


def combine(rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation, backend: Backend = "auto") -> Tensor:
    """out_TD in the dtype of rows_RD; weights_TK float32. Pairs without a row count as zero. rows_RD may lack rows at the end
    that have no pair.

    Raises ValueError for other dtypes, devices, shapes or backends.
    """
    order_R, inverse_TK = permutation.order_R, permutation.inverse_TK
    if weights_TK.shape != inverse_TK.shape:
        shapes = f"{tuple(weights_TK.shape)} and inverse_TK {tuple(inverse_TK.shape)}"
        raise ValueError(f"weights_TK is {shapes}: give a weight for every pair of the permutation")
    if rows_RD.dim() != 2 or len(rows_RD) > len(order_R):
        raise ValueError(f"rows_RD is {tuple(rows_RD.shape)}: give [R, D] with R = {len(order_R)}, as the permutation")
    if rows_RD.device != inverse_TK.device:
        raise ValueError(f"rows_RD is on {rows_RD.device}: give it on {inverse_TK.device}, where the permutation is")
    if not fused(rows_RD, backend):
        return _Combine.apply(rows_RD, weights_TK, permutation)
    if weights_TK.dtype != torch.float32 or weights_TK.device != rows_RD.device:
        raise ValueError(f"weights_TK is {weights_TK.dtype} on {weights_TK.device}: give float32 on {rows_RD.device}")
    return _forward(rows_RD.contiguous(), weights_TK.contiguous(), inverse_TK.contiguous(), order_R.contiguous())
