"""The routed experts of one rank, fused: gather, SwiGLU experts and weighted sum without a permuted copy of the tokens.

    gate_RF, up_RF = x_TD[token of r] @ w13_e2FD[expert of r].T     (gate rows first)          h_RF = silu(gate) * up
    rows_RD = h_RF @ w2_eDF[expert of r].T;     out_TD[t] = sum_k topk_weights_TK[t, k] * rows_RD[inverse_TK[t, k]]

and, with w_R the weight of a row's pair and g_RF = grad out_TD[token of r] @ w2_eDF[expert of r],

    grad w_R = sum_f g_RF * h_RF           = <grad out, row>, so that the rows are not needed again
    grad gate_RF = w g up silu'(gate);     grad up_RF = w g silu(gate)
    grad w2_eDF = sum of grad out_TD[token of r] (x) w h_RF;     grad w13_e2FD = sum of (grad gate, grad up) (x) x_TD[token of r]
    grad x_TD[t] = sum_k of (grad gate, grad up) @ w13_e2FD at row inverse_TK[t, k]

x_TD, w13_e2FD, w2_eDF and out_TD bfloat16, float16 (sums in float32) or float32; topk_weights_TK float32; indices int64, -1 in
order_R or inverse_TK: a row, or a pair, of zeros. Sums over rows are products of their own, no atomics: deterministic.
Saved for backward: x, gu_R2F (gate and up before the activation, in the dtype of x), topk_weights, indices, w13 and w2; never
the rows, h or x in expert order. h is made again from gu, whose rounding is then that of the gradients alone.
`saved_bytes_per_token` is the table of this.
Letters: T tokens, D model dim, F expert hidden dim, e local experts, K experts per token, R dispatched rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.backend import Backend, fused
from kernels.combine import combine, combine_forward, combine_reference, weighted_sum
from kernels.grouped_gemm import (
    Blocks,
    Tiles,
    gemm_blocks,
    grouped_forward,
    grouped_gemm,
    grouped_gemm_reference,
    grouped_mm,
    grouped_mm_weight_gradient,
    grouped_weight_gradient,
    rounded,
    row_tiles,
    tile_place,
    tile_rows,
)
from kernels.grouped_gemm_table import faster
from kernels.permute import Permutation, gather_rows, permute, sum_rows
from kernels.permute_triton import permute_backward
from kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

# -- the reference -----------------------------------------------------------------------------------------------------


def moe_mlp_reference(
    x_TD: Tensor, topk_weights_TK: Tensor, permutation: Permutation, w13_e2FD: Tensor, w2_eDF: Tensor
) -> Tensor:
    """The equation, a loop over the experts; keeps float64."""
    order_R, inverse_TK, counts_e = permutation.order_R, permutation.inverse_TK, permutation.counts_E
    padded = torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])])
    tokens_R = torch.where(order_R < 0, len(x_TD), order_R.clamp_min(0) // inverse_TK.shape[1])
    gate_RF, up_RF = grouped_gemm_reference(padded[tokens_R], w13_e2FD, counts_e).chunk(2, dim=-1)
    rows_RD = grouped_gemm_reference(F.silu(gate_RF) * up_RF, w2_eDF, counts_e)
    return combine_reference(rows_RD, topk_weights_TK, inverse_TK)


def saved_bytes_per_token(dim: int, hidden: int, top_k: int, element: int = 2) -> dict[str, int]:
    """Bytes that a token keeps for the backward pass, without the weights of the experts and their int64 counts (8 e in all).

    moe_mlp: x, gu and the routing. torch: without Triton, the permuted x in the place of x. permute: an implementation that
    keeps the permuted x, gu, h and the rows for combine.
    The routing is a float32 weight and two int64 indices a pair.
    """
    routing = top_k * (4 + 8 + 8)
    return {
        "moe_mlp": element * (dim + 2 * top_k * hidden) + routing,
        "torch": element * top_k * (dim + 2 * hidden) + routing,
        "permute": element * top_k * (2 * dim + 3 * hidden) + routing,
    }


# -- Triton ------------------------------------------------------------------------------------------------------------


@triton.jit
def _moe_mlp_up_kernel(
    x_ptr, order_ptr, w13_ptr, h_ptr, gu_ptr, tile_ends_ptr, row_ends_ptr, R, D, F,
    K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    GROUP: tl.constexpr, SAVE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile, column = tile_place(tl.program_id(0), tl.cdiv(R, BM) + E, tl.cdiv(F, BF), GROUP)
    expert, first, end = tile_rows(tile, tile_ends_ptr, row_ends_ptr, R, E, EP, BM)
    if first >= end:
        return
    m = tl.arange(0, BM)
    f = column * BF + tl.arange(0, BF)
    pair = tl.load(order_ptr + first + m, mask=first + m < end, other=-1)
    x = x_ptr + (pair // K)[:, None] * D
    gate13 = w13_ptr + expert * 2 * F * D + f[None, :] * D
    up13 = w13_ptr + expert * 2 * F * D + (F + f)[None, :] * D
    gate = tl.zeros((BM, BF), tl.float32)
    up = tl.zeros((BM, BF), tl.float32)
    for start in range(0, tl.where(expert < E, D, 0), BD):
        d = start + tl.arange(0, BD)
        inside = (f < F)[None, :] & (d < D)[:, None]
        a = tl.load(x + d[None, :], mask=(pair >= 0)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(gate13 + d[:, None], mask=inside, other=0.0)
        c = tl.load(up13 + d[:, None], mask=inside, other=0.0)
        if INTERPRET:  # it multiplies bfloat16 wrongly
            a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
        gate = tl.dot(a, b, gate, input_precision="ieee")
        up = tl.dot(a, c, up, input_precision="ieee")
    stored = (first + m < end)[:, None] & (f < F)[None, :]
    h = gate * tl.sigmoid(gate) * up
    tl.store(
        h_ptr + first * F + (m[:, None] * F + f[None, :]), rounded(h, h_ptr.dtype.element_ty, INTERPRET), mask=stored
    )
    if SAVE:
        gu = gu_ptr + first * 2 * F + (m[:, None] * 2 * F + f[None, :])
        tl.store(gu, rounded(gate, gu_ptr.dtype.element_ty, INTERPRET), mask=stored)
        tl.store(gu + F, rounded(up, gu_ptr.dtype.element_ty, INTERPRET), mask=stored)


@triton.jit
def _moe_mlp_down_bwd_kernel(
    grad_ptr, order_ptr, weights_ptr, w2_ptr, gu_ptr, grad_gu_ptr, wh_ptr, partial_ptr, tile_ends_ptr, row_ends_ptr, R, D, F,
    K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    GROUP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile, column = tile_place(tl.program_id(0), tl.cdiv(R, BM) + E, tl.cdiv(F, BF), GROUP)
    expert, first, end = tile_rows(tile, tile_ends_ptr, row_ends_ptr, R, E, EP, BM)
    if first >= end:
        return
    m = tl.arange(0, BM)
    f = column * BF + tl.arange(0, BF)
    pair = tl.load(order_ptr + first + m, mask=first + m < end, other=-1)
    grad = grad_ptr + (pair // K)[:, None] * D
    w2 = w2_ptr + expert * D * F + f[None, :]
    grad_h = tl.zeros((BM, BF), tl.float32)  # without the weight of the row
    for start in range(0, tl.where(expert < E, D, 0), BD):
        d = start + tl.arange(0, BD)
        a = tl.load(grad + d[None, :], mask=(pair >= 0)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(w2 + d[:, None] * F, mask=(f < F)[None, :] & (d < D)[:, None], other=0.0)
        if INTERPRET:
            a, b = a.to(tl.float32), b.to(tl.float32)
        grad_h = tl.dot(a, b, grad_h, input_precision="ieee")
    stored = (first + m < end)[:, None] & (f < F)[None, :]
    at = m[:, None] * 2 * F + f[None, :]
    gate = tl.load(gu_ptr + first * 2 * F + at, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(gu_ptr + first * 2 * F + F + at, mask=stored, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + pair, mask=pair >= 0, other=0.0)
    # What needs no grad_h comes first and takes the weight: then each is one product with grad_h (255 to 180 registers, sm_90).
    dtype: tl.constexpr = wh_ptr.dtype.element_ty
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    slope = up * (sigmoid + silu * (1 - sigmoid)) * weight[:, None]
    tl.store(grad_gu_ptr + first * 2 * F + at, rounded(grad_h * slope, dtype, INTERPRET), mask=stored)
    tl.store(partial_ptr + pair * tl.cdiv(F, BF) + column, tl.sum(grad_h * (silu * up), axis=1), mask=pair >= 0)
    silu *= weight[:, None]
    tl.store(grad_gu_ptr + first * 2 * F + F + at, rounded(grad_h * silu, dtype, INTERPRET), mask=stored)
    wh = rounded(silu * up, dtype, INTERPRET)
    tl.store(wh_ptr + first * F + (m[:, None] * F + f[None, :]), wh, mask=stored)


def swiglu_blocks(blocks: Blocks) -> Blocks:
    """Half as many columns: a tile has two sums, or an epilogue that holds gate and up beside one. Not tuned: no GPU was at
    hand."""
    return blocks._replace(columns=blocks.columns // 2)


def up_forward(
    x_TD: Tensor, order_R: Tensor, w13_e2FD: Tensor, tiles: Tiles, blocks: Blocks, top_k: int, save: bool
) -> tuple[Tensor, Tensor]:
    """Launch the up kernel: h_RF, and gu_R2F if save (else no rows). Contiguous tensors."""
    (experts, hidden2, dim), rows = w13_e2FD.shape, len(order_R)
    h_RF = x_TD.new_empty(rows, hidden2 // 2)
    gu_R2F = x_TD.new_empty(rows if save else 0, hidden2)
    if h_RF.numel() == 0:
        return h_RF, gu_R2F
    grid = (tiles.bound * triton.cdiv(hidden2 // 2, blocks.columns),)
    _moe_mlp_up_kernel[grid](
        x_TD, order_R, w13_e2FD, h_RF, gu_R2F, tiles.tile_ends_e, tiles.row_ends_e, rows, dim, hidden2 // 2,
        K=top_k, E=experts, EP=triton.next_power_of_2(experts), BM=blocks.rows, BF=blocks.columns, BD=blocks.depth,
        GROUP=blocks.group, SAVE=save, INTERPRET=knobs.runtime.interpret, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return h_RF, gu_R2F


def down_backward(
    grad_TD: Tensor,
    topk_weights_TK: Tensor,
    order_R: Tensor,
    w2_eDF: Tensor,
    gu_R2F: Tensor,
    tiles: Tiles,
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel behind w2: grad_gu_R2F, wh_RF and grad_topk_weights_TK. Contiguous tensors."""
    (experts, dim, hidden), rows = w2_eDF.shape, len(order_R)
    grad_gu_R2F, wh_RF = torch.empty_like(gu_R2F), gu_R2F.new_empty(rows, hidden)
    columns = -(-hidden // blocks.columns)
    # A part for every pair and column of tiles, zero for pairs without a row.
    partial_TKC = grad_TD.new_zeros(*topk_weights_TK.shape, columns, dtype=torch.float32)
    if wh_RF.numel() == 0:
        return grad_gu_R2F, wh_RF, partial_TKC.sum(-1)
    _moe_mlp_down_bwd_kernel[(tiles.bound * columns,)](
        grad_TD, order_R, topk_weights_TK, w2_eDF, gu_R2F, grad_gu_R2F, wh_RF, partial_TKC,
        tiles.tile_ends_e, tiles.row_ends_e, rows, dim, hidden,
        K=topk_weights_TK.shape[1], E=experts, EP=triton.next_power_of_2(experts), BM=blocks.rows, BF=blocks.columns,
        BD=blocks.depth, GROUP=blocks.group, INTERPRET=knobs.runtime.interpret, num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip
    return grad_gu_R2F, wh_RF, partial_TKC.sum(-1)


def exact(rows_RD: Tensor) -> Tensor:
    """float32 under the interpreter, which cuts bfloat16 off where a GPU rounds: there torch rounds the sums over k."""
    return rows_RD.float() if knobs.runtime.interpret else rows_RD


def moe_mlp_forward(
    x_TD: Tensor, topk_weights_TK: Tensor, order_R: Tensor, inverse_TK: Tensor, counts_e: Tensor, w13_e2FD: Tensor,
    w2_eDF: Tensor, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernels: out_TD, and gu_R2F if save (else no rows). Contiguous tensors."""
    blocks = gemm_blocks(x_TD.dtype, len(order_R), len(counts_e))
    tiles = row_tiles(counts_e, len(order_R), blocks.rows)
    h_RF, gu_R2F = up_forward(x_TD, order_R, w13_e2FD, tiles, swiglu_blocks(blocks), inverse_TK.shape[1], save)
    rows_RD = grouped_forward(h_RF, w2_eDF, tiles, blocks)
    return combine_forward(exact(rows_RD), topk_weights_TK, inverse_TK).to(x_TD.dtype), gu_R2F


def moe_mlp_backward(
    grad_TD: Tensor, x_TD: Tensor, topk_weights_TK: Tensor, order_R: Tensor, inverse_TK: Tensor, counts_e: Tensor,
    w13_e2FD: Tensor, w2_eDF: Tensor, gu_R2F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels: the gradients of x, topk_weights, w13 and w2. Contiguous tensors."""
    top_k = inverse_TK.shape[1]
    blocks = gemm_blocks(x_TD.dtype, len(order_R), len(counts_e))
    tiles = row_tiles(counts_e, len(order_R), blocks.rows)
    grad_gu_R2F, wh_RF, grad_weights_TK = down_backward(
        grad_TD, topk_weights_TK, order_R, w2_eDF, gu_R2F, tiles, swiglu_blocks(blocks)
    )
    grad_w2_eDF = grouped_weight_gradient(grad_TD, wh_RF, tiles.row_ends_e, order_R, top_k, "left")
    grad_w13_e2FD = grouped_weight_gradient(grad_gu_R2F, x_TD, tiles.row_ends_e, order_R, top_k, "right")
    grad_rows_RD = grouped_forward(grad_gu_R2F, w13_e2FD.transpose(1, 2), tiles, blocks)
    grad_x_TD = permute_backward(exact(grad_rows_RD), inverse_TK).to(x_TD.dtype)
    return grad_x_TD, grad_weights_TK, grad_w13_e2FD, grad_w2_eDF


# Registered as operators: a compiled model keeps them without a graph break.
_forward = torch.library.custom_op("alf_moe::moe_mlp", moe_mlp_forward, mutates_args=())
_backward = torch.library.custom_op("alf_moe::moe_mlp_backward", moe_mlp_backward, mutates_args=())


@_forward.register_fake
def _(x_TD, topk_weights_TK, order_R, inverse_TK, counts_e, w13_e2FD, w2_eDF, save):
    return torch.empty_like(x_TD), x_TD.new_empty(order_R.shape[0] if save else 0, w13_e2FD.shape[1])


@_backward.register_fake
def _(grad_TD, x_TD, topk_weights_TK, order_R, inverse_TK, counts_e, w13_e2FD, w2_eDF, gu_R2F):
    return tuple(torch.empty_like(tensor) for tensor in (x_TD, topk_weights_TK, w13_e2FD, w2_eDF))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_TD, _):
    grad_x_TD, grad_weights_TK, grad_w13_e2FD, grad_w2_eDF = _backward(grad_TD.contiguous(), *ctx.saved_tensors)
    return grad_x_TD, grad_weights_TK, None, None, None, grad_w13_e2FD, grad_w2_eDF, None


_forward.register_autograd(_differentiate, setup_context=_save)


# -- torch -------------------------------------------------------------------------------------------------------------


def _check(x_TD: Tensor, topk_weights_TK: Tensor, permutation: Permutation, w13_e2FD: Tensor, w2_eDF: Tensor) -> None:
    x, w13, w2 = tuple(x_TD.shape), tuple(w13_e2FD.shape), tuple(w2_eDF.shape)
    if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"x_TD is {x_TD.dtype}: give bfloat16, float16, float32 or float64")
    if len(x) != 2 or len(w13) != 3 or w13[1] % 2 or w13[2] != x[1]:
        raise ValueError(f"w13_e2FD is {w13} for x_TD {x}: give [experts, 2F, D] for x_TD [T, D]")
    if w2 != (w13[0], w13[2], w13[1] // 2):
        raise ValueError(f"w2_eDF is {w2}: give {(w13[0], w13[2], w13[1] // 2)}, as w13_e2FD is {w13}")
    if w13[1] * w13[2] >= 2**31:
        raise ValueError(f"w13_e2FD is {w13}: give fewer than 2**31 values an expert")
    pairs, weights = tuple(permutation.inverse_TK.shape), tuple(topk_weights_TK.shape)
    if len(pairs) != 2 or pairs[0] != x[0] or pairs[1] > w13[0]:
        raise ValueError(f"inverse_TK is {pairs}: give [{x[0]}, K] with K at most the {w13[0]} experts")
    if permutation.order_R.dim() != 1 or len(permutation.order_R) > pairs[0] * pairs[1]:
        raise ValueError(
            f"order_R is {tuple(permutation.order_R.shape)}: give at most {pairs[0] * pairs[1]} rows (tile = 1)"
        )
    if permutation.counts_E.shape != (w13[0],):
        raise ValueError(
            f"counts_E is {tuple(permutation.counts_E.shape)}: give ({w13[0]},), a number for every expert"
        )
    if weights != pairs or topk_weights_TK.dtype != torch.float32:
        raise ValueError(f"topk_weights_TK is {topk_weights_TK.dtype} {weights}: give float32 {pairs}, as inverse_TK")
    for name, tensor in (("w13_e2FD", w13_e2FD), ("w2_eDF", w2_eDF)):
        if tensor.dtype != x_TD.dtype:
            raise ValueError(f"{name} is {tensor.dtype}: give {x_TD.dtype}, as x_TD")
    for name, tensor in (("w13_e2FD", w13_e2FD), ("w2_eDF", w2_eDF), ("topk_weights_TK", topk_weights_TK)):
        if tensor.device != x_TD.device:
            raise ValueError(f"{name} is on {tensor.device}: give {x_TD.device}, as x_TD")
    for name, tensor in permutation._asdict().items():
        if isinstance(tensor, Tensor) and (tensor.dtype != torch.int64 or tensor.device != x_TD.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: give int64 on {x_TD.device}")


class _Torch(torch.autograd.Function):
    # The equations at the top. The rows of x stay for the gradient of w13, where the Triton path gathers them once more.
    @staticmethod
    def forward(
        ctx, x_TD: Tensor, topk_weights_TK: Tensor, w13_e2FD: Tensor, w2_eDF: Tensor, permutation: Permutation
    ) -> Tensor:
        order_R, inverse_TK, counts_e, masked, padded = permutation
        rows_RD = gather_rows(x_TD, permutation.token_R, padded)
        gu_R2F = grouped_mm(rows_RD, w13_e2FD, counts_e)
        ctx.save_for_backward(rows_RD, topk_weights_TK, w13_e2FD, w2_eDF, gu_R2F, order_R, inverse_TK, counts_e)
        ctx.masked, ctx.padded = masked, padded
        return weighted_sum(grouped_mm(swiglu_forward(gu_R2F), w2_eDF, counts_e), topk_weights_TK, inverse_TK, masked)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        rows_RD, topk_weights_TK, w13_e2FD, w2_eDF, gu_R2F, order_R, inverse_TK, counts_e = ctx.saved_tensors
        token_R = order_R.div(inverse_TK.shape[1], rounding_mode="floor")
        grad_RD = gather_rows(grad_TD, token_R, ctx.padded)
        wide = torch.promote_types(gu_R2F.dtype, topk_weights_TK.dtype)
        grad_h_RF = grouped_mm(grad_RD, w2_eDF.transpose(1, 2), counts_e).to(wide)  # without the weight of the row
        weight_R1 = topk_weights_TK.reshape(-1)[order_R][:, None]  # of some pair where there is none: never read
        gate_RF, up_RF = gu_R2F.to(wide).chunk(2, dim=-1)
        silu_RF = F.silu(gate_RF)
        h_RF = silu_RF * up_RF
        grad_weight_R = (grad_h_RF * h_RF).sum(dim=-1).to(topk_weights_TK.dtype)
        grad_weights_TK = F.pad(grad_weight_R, (0, 1))[inverse_TK]  # -1: the last one, 0
        grad_gu_R2F = swiglu_backward(grad_h_RF.mul_(weight_R1), gate_RF, up_RF, silu_RF).to(gu_R2F.dtype)
        grad_w2_eDF = grouped_mm_weight_gradient(grad_RD, h_RF.mul_(weight_R1).to(gu_R2F.dtype), counts_e)
        grad_w13_e2FD = grouped_mm_weight_gradient(grad_gu_R2F, rows_RD, counts_e)
        grad_rows_RD = grouped_mm(grad_gu_R2F, w13_e2FD.transpose(1, 2), counts_e)
        return sum_rows(grad_rows_RD, inverse_TK, ctx.masked), grad_weights_TK, grad_w13_e2FD, grad_w2_eDF, None


def moe_mlp(
    x_TD: Tensor,
    topk_weights_TK: Tensor,
    permutation: Permutation,
    w13_e2FD: Tensor,
    w2_eDF: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """out_TD in the dtype of x_TD: the routed experts of a rank that has all of them.

    topk_weights_TK float32; the permutation of `sort_by_expert`. backend auto: Triton where it runs, unless
    kernels/grouped_gemm_table.json has F.grouped_mm as the faster. Raises ValueError for other dtypes, devices, shapes or
    backends.
    """
    _check(x_TD, topk_weights_TK, permutation, w13_e2FD, w2_eDF)
    tensors = (x_TD, topk_weights_TK, w13_e2FD, w2_eDF)
    if not fused(x_TD, backend) or x_TD.dtype == torch.float64:
        return _Torch.apply(x_TD, topk_weights_TK, w13_e2FD, w2_eDF, permutation)
    counts_e = permutation.counts_E
    if backend == "auto" and faster("moe_mlp", x_TD, w13_e2FD, len(permutation.order_R)) == "torch":
        gu_R2F = grouped_gemm(permute(x_TD, permutation), w13_e2FD, counts_e, "torch")
        return combine(grouped_gemm(swiglu(gu_R2F), w2_eDF, counts_e, "torch"), topk_weights_TK, permutation)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    x_TD, topk_weights_TK, w13_e2FD, w2_eDF = (tensor.contiguous() for tensor in tensors)
    routing = (permutation.order_R, permutation.inverse_TK, counts_e)
    return _forward(x_TD, topk_weights_TK, *routing, w13_e2FD, w2_eDF, save)[0]
