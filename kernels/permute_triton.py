"""The kernels of `permute` and of its sort, their launchers and operators. The equations are in kernels/permute.py.

Letters: T tokens, D model dim, E experts, K experts per token, R dispatched rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, N, bins, columns,
    PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Counts of a block of pairs: column `block` of a table [bins, columns], or added to counts [bins]."""
    block = tl.program_id(0)
    first = tl.program_id(1) * BINS
    pair = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(ids_ptr + pair, mask=pair < N, other=-1) - first
    inside = (place >= 0) & (place < BINS)
    counts = tl.histogram(place.to(tl.int32), BINS, mask=inside).to(tl.int64)
    bin = first + tl.arange(0, BINS)
    if PER_BLOCK:
        tl.store(counts_ptr + bin.to(tl.int64) * columns + block, counts, mask=bin < bins)
    else:  # integers: the order of the additions does not show
        tl.atomic_add(counts_ptr + bin, counts, mask=(bin < bins) & (counts > 0), sem="relaxed")


@triton.jit
def _place_kernel(
    ids_ptr, ends_ptr, order_ptr, inverse_ptr, N, E, columns,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Where the pairs of a block go. ends [E, columns]: the running sum of the table of counts."""
    block = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, BLOCK)
    pair = block * BLOCK + here
    expert = tl.load(ids_ptr + pair, mask=pair < N, other=-1)
    real = (expert >= 0) & (expert < E)
    rank = tl.zeros((BLOCK,), tl.int32)  # among the pairs of the block with this expert
    for start in range(0, BLOCK, STEP):
        there = start + tl.arange(0, STEP)
        other = tl.load(ids_ptr + block * BLOCK + there, mask=block * BLOCK + there < N, other=-1)
        before = (other[:, None] == expert[None, :]) & (there[:, None] < here[None, :])
        rank += tl.sum(before.to(tl.int32), axis=0)
    cell = expert.to(tl.int64) * columns + block
    row = tl.load(ends_ptr + cell - 1, mask=real & (cell > 0), other=0) + rank  # the sum without the cell itself
    tl.store(order_ptr + row, pair, mask=real)
    tl.store(inverse_ptr + pair, tl.where(real, row, -1), mask=pair < N)


@triton.jit
def _permute_fwd_kernel(
    x_ptr, order_ptr, inverse_ptr, rows_ptr, N, R, D,
    K: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """By pairs, not by rows: the K pairs of a token are neighbours and read it from the cache. By rows they would be far
    apart, and every token would come K times from memory."""
    pair = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (d < D)[None, :]
    row = tl.load(inverse_ptr + pair, mask=pair < N, other=-1)
    hole = tl.load(order_ptr + pair, mask=pair < R, other=0) < 0  # the row of this number has no pair
    there = (row >= 0)[:, None] & inside
    x = tl.load(x_ptr + (pair // K)[:, None] * D + d[None, :], mask=there, other=0)
    tl.store(rows_ptr + row[:, None] * D + d[None, :], x, mask=there)
    tl.store(rows_ptr + pair[:, None] * D + d[None, :], tl.zeros_like(x), mask=hole[:, None] & inside)


@triton.jit
def _permute_bwd_kernel(
    grad_ptr, inverse_ptr, grad_x_ptr, T, D,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    token = t < T
    total = tl.zeros((BT, BD), WIDE)
    for k in tl.static_range(K):
        row = tl.load(inverse_ptr + t * K + k, mask=token, other=-1)
        there = (row >= 0)[:, None] & (d < D)[None, :]
        total += tl.load(grad_ptr + row[:, None] * D + d[None, :], mask=there, other=0.0).to(WIDE)
    out = grad_x_ptr + t[:, None] * D + d[None, :]
    tl.store(out, total.to(grad_x_ptr.dtype.element_ty), mask=token[:, None] & (d < D)[None, :])


# Blocks: 256 pairs in the sort, whose 256 * 256 comparisons are cheap beside its launches (against 16 at a time: 32 spill on
# Triton 3.9); 1,024 values of a token in 4 warps, 16 bytes a thread and k in bfloat16; 8 KiB of pairs where these are
# independent, 64 bytes a thread. Not tuned: no GPU was at hand.
SORT_BLOCK = 256
COUNT_BLOCK = 1024


def padded_size(pairs: int, num_experts: int, tile: int) -> int:
    """Rows that are enough for every routing; a multiple of tile."""
    return (pairs + num_experts * (tile - 1)) // tile * tile


def _bins(num_experts: int) -> int:
    return min(1024, max(32, triton.next_power_of_2(num_experts)))


def count_tokens_forward(ids_N: Tensor, num_experts: int) -> Tensor:
    """Launch the counting kernel: int64 [num_experts]. Contiguous ids."""
    counts_E = ids_N.new_zeros(num_experts, dtype=torch.int64)
    if ids_N.numel() == 0:
        return counts_E
    bins = _bins(num_experts)
    grid = (triton.cdiv(ids_N.numel(), COUNT_BLOCK), triton.cdiv(num_experts, bins))
    _count_kernel[grid](
        ids_N, counts_E, ids_N.numel(), num_experts, 1, PER_BLOCK=False, BLOCK=COUNT_BLOCK, BINS=bins, num_warps=4
    )
    return counts_E


def sort_forward(ids_TK: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the two passes of the sort: order_R, inverse_TK, counts_E. Contiguous ids."""
    pairs = ids_TK.numel()
    order_R = ids_TK.new_full((padded_size(pairs, num_experts, tile),), -1, dtype=torch.int64)
    inverse_TK = torch.empty_like(ids_TK, dtype=torch.int64)
    if pairs == 0:
        return order_R, inverse_TK, ids_TK.new_zeros(num_experts, dtype=torch.int64)
    blocks = -(-pairs // SORT_BLOCK)
    columns = blocks + (tile > 1)  # the last one holds what an expert lacks to whole tiles
    table = ids_TK.new_empty(num_experts, columns, dtype=torch.int64)
    bins = _bins(num_experts)
    _count_kernel[blocks, triton.cdiv(num_experts, bins)](
        ids_TK, table, pairs, num_experts, columns, PER_BLOCK=True, BLOCK=SORT_BLOCK, BINS=bins, num_warps=4
    )
    counts_E = table[:, :blocks].sum(1)
    if tile > 1:
        table[:, blocks] = counts_E.neg().remainder(tile)
    ends = table.view(-1).cumsum(0)
    _place_kernel[(blocks,)](
        ids_TK, ends, order_R, inverse_TK, pairs, num_experts, columns, BLOCK=SORT_BLOCK, STEP=16, num_warps=4
    )
    return order_R, inverse_TK, counts_E


def token_blocks(dim: int) -> tuple[int, int]:
    """Tokens and values of a token in a program that sums over k."""
    block_d = min(1024, triton.next_power_of_2(dim))
    return 1024 // block_d, block_d


def pair_blocks(rows_RD: Tensor) -> tuple[int, int]:
    """Pairs and values of a row in a program that treats pairs alone."""
    block_d = min(512, triton.next_power_of_2(rows_RD.shape[1]))
    return max(1, 8192 // (block_d * rows_RD.element_size())), block_d


def permute_forward(x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
    """Launch the forward kernel. Contiguous tensors."""
    pairs, rows, dim = inverse_TK.numel(), order_R.shape[0], x_TD.shape[1]
    rows_RD = x_TD.new_empty(rows, dim)
    if rows_RD.numel() == 0:
        return rows_RD
    block_p, block_d = pair_blocks(x_TD)
    grid = (triton.cdiv(max(pairs, rows), block_p), triton.cdiv(dim, block_d))
    _permute_fwd_kernel[grid](
        x_TD, order_R, inverse_TK, rows_RD, pairs, rows, dim, K=inverse_TK.shape[1], BP=block_p, BD=block_d, num_warps=4
    )
    return rows_RD


def permute_backward(grad_RD: Tensor, inverse_TK: Tensor) -> Tensor:
    """Launch the backward kernel: grad_x_TD in the dtype of grad_RD. Contiguous tensors."""
    (tokens, top_k), dim = inverse_TK.shape, grad_RD.shape[1]
    grad_x_TD = grad_RD.new_empty(tokens, dim)
    if grad_x_TD.numel() == 0:
        return grad_x_TD
    block_t, block_d = token_blocks(dim)
    wide = tl.float64 if grad_RD.dtype == torch.float64 else tl.float32
    _permute_bwd_kernel[triton.cdiv(tokens, block_t), triton.cdiv(dim, block_d)](
        grad_RD, inverse_TK, grad_x_TD, tokens, dim, K=top_k, BT=block_t, BD=block_d, WIDE=wide, num_warps=4
    )
    return grad_x_TD


# Registered as operators: a compiled model keeps them without a graph break.
count_op = torch.library.custom_op("alf_moe::count_tokens", count_tokens_forward, mutates_args=())
sort_op = torch.library.custom_op("alf_moe::sort_by_expert", sort_forward, mutates_args=())
permute_op = torch.library.custom_op("alf_moe::permute", permute_forward, mutates_args=())
_backward = torch.library.custom_op("alf_moe::permute_backward", permute_backward, mutates_args=())


@count_op.register_fake
def _(ids_N, num_experts):
    return ids_N.new_empty(num_experts, dtype=torch.int64)


@sort_op.register_fake
def _(ids_TK, num_experts, tile):
    order_R = ids_TK.new_empty(padded_size(ids_TK.numel(), num_experts, tile), dtype=torch.int64)
    return order_R, torch.empty_like(ids_TK, dtype=torch.int64), ids_TK.new_empty(num_experts, dtype=torch.int64)


@permute_op.register_fake
def _(x_TD, order_R, inverse_TK):
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


@_backward.register_fake
def _(grad_RD, inverse_TK):
    return grad_RD.new_empty(inverse_TK.shape[0], grad_RD.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _differentiate(ctx, grad_RD):
    return _backward(grad_RD.contiguous(), *ctx.saved_tensors), None, None


permute_op.register_autograd(_differentiate, setup_context=_save)
