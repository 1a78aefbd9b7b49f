"""Permute: rows of tokens in the order of their experts, and back.

    rows_RD[r] = x_TD[order_R[r] // K]         R = number of (token, expert) pairs, sorted by expert, stable
    grad x_TD[t] = sum_k grad rows_RD[inverse_TK[t, k]]     a gather, summed in float32 (float64 for float64), no atomics

The order is a counting sort. Pair p of expert e goes to row

    |pairs of experts before e| + |pairs of e in blocks before p's| + |pairs of e before p in its block|

The first two are one running sum over the table [experts, blocks] of counts, the last is counted by comparison.
topk_ids_TK int32 or int64, -1 = no row; all indices come out int64. No float and no host sync on the Triton path.

Rows of no pair: order_R is -1 there, `permute` writes zeros, no gradient comes from them. There are some
  - at the end, on the Triton path with masked = True: how many pairs are real is known on the device only, so order_R keeps
    T * K places, real rows first. The torch path waits for the number and cuts;
  - after the rows of every expert with tile > 1, up to a multiple of tile, and at the end up to a size known to the host.
Groups end before them (counts_E, or padded_ends), so a grouped product never takes them for rows of an expert.

rows_RD in the dtype of x_TD, any. Saved for backward: inverse_TK.
Letters: T tokens, D model dim, E experts, e local experts, K experts per token, R dispatched rows, p ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import fused


class Permutation(NamedTuple):
    """order_R int64: pair t*K+k of each row (-1: none); inverse_TK int64: row of each pair (-1: none); counts_E int64, true
    counts. masked: inverse_TK may have -1. padded: order_R may have -1."""

    order_R: Tensor
    inverse_TK: Tensor
    counts_E: Tensor
    masked: bool
    padded: bool = False

    @property
    def token_R(self) -> Tensor:
        """The token of each row, int64."""
        return self.order_R.div(self.inverse_TK.shape[1], rounding_mode="floor")


# -- the reference -----------------------------------------------------------------------------------------------------


def permute_reference(x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """The equation, differentiable, in the dtype of x_TD."""
    padded = torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])])
    return padded[order_R.div(top_k, rounding_mode="floor")]  # -1: the row of zeros


# -- Triton ------------------------------------------------------------------------------------------------------------


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


def _power(value: int) -> int:
    """The power of 2 at or above value >= 1."""
    return 1 << (value - 1).bit_length()


def _bins(num_experts: int) -> int:
    return min(1024, max(32, _power(num_experts)))


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
    order_R = ids_TK.new_full((_padded_size(pairs, num_experts, tile),), -1, dtype=torch.int64)
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
    block_d = min(1024, _power(dim))
    return 1024 // block_d, block_d


def pair_blocks(rows_RD: Tensor) -> tuple[int, int]:
    """Pairs and values of a row in a program that treats pairs alone."""
    block_d = min(512, _power(rows_RD.shape[1]))
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
_count = torch.library.custom_op("alf_moe::count_tokens", count_tokens_forward, mutates_args=())
_sort = torch.library.custom_op("alf_moe::sort_by_expert", sort_forward, mutates_args=())
_forward = torch.library.custom_op("alf_moe::permute", permute_forward, mutates_args=())
_backward = torch.library.custom_op("alf_moe::permute_backward", permute_backward, mutates_args=())


@_count.register_fake
def _(ids_N, num_experts):
    return ids_N.new_empty(num_experts, dtype=torch.int64)


@_sort.register_fake
def _(ids_TK, num_experts, tile):
    order_R = ids_TK.new_empty(_padded_size(ids_TK.numel(), num_experts, tile), dtype=torch.int64)
    return order_R, torch.empty_like(ids_TK, dtype=torch.int64), ids_TK.new_empty(num_experts, dtype=torch.int64)


@_forward.register_fake
def _(x_TD, order_R, inverse_TK):
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


@_backward.register_fake
def _(grad_RD, inverse_TK):
    return grad_RD.new_empty(inverse_TK.shape[0], grad_RD.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _differentiate(ctx, grad_RD):
    return _backward(grad_RD.contiguous(), *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# -- torch -------------------------------------------------------------------------------------------------------------


def _count_torch(ids_N: Tensor, num_experts: int) -> Tensor:
    """No host sync (torch.bincount has one on CUDA)."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_N.device)
    counts.scatter_add_(0, torch.where(ids_N < 0, num_experts, ids_N), torch.ones_like(ids_N))
    return counts[:num_experts]


def _sort_torch(ids_TK: Tensor, num_experts: int, masked: bool, tile: int) -> Permutation:
    ids = ids_TK.reshape(-1)
    counts_E = _count_torch(ids, num_experts)
    if masked:
        ids = torch.where(ids < 0, num_experts, ids)
    order = ids.sort(stable=True).indices
    if masked:
        order = order[: int(counts_E.sum())]  # sync: only when tokens are masked
    rows = torch.arange(order.numel(), device=ids.device)
    if tile > 1:
        gap_E = counts_E.neg().remainder(tile)
        rows = rows + (gap_E.cumsum(0) - gap_E)[ids[order]]
    inverse = torch.full_like(ids, -1)
    inverse[order] = rows
    if tile > 1:
        order = ids.new_full((_padded_size(ids.numel(), num_experts, tile),), -1).index_copy_(0, rows, order)
    return Permutation(order, inverse.view_as(ids_TK), counts_E, masked, tile > 1)


def gather_rows(rows_RD: Tensor, index: Tensor, masked: bool) -> Tensor:
    """rows_RD[index] as [..., D]; zeros where the index is -1 (only looked for when masked)."""
    if not masked:
        # index_select copies whole rows: 5 to 10 times as fast on CPU as rows_RD[index].
        return rows_RD.index_select(0, index.reshape(-1)).view(*index.shape, rows_RD.shape[1])
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(*index.shape, rows_RD.shape[1])
    rows = rows_RD.index_select(0, index.clamp_min(0).reshape(-1)).view(*index.shape, rows_RD.shape[1])
    return rows.masked_fill_((index < 0)[..., None], 0)


def sum_rows(rows_RD: Tensor, index_TK: Tensor, masked: bool) -> Tensor:
    """sum_k rows_RD[index_TK[:, k]] [T, D], accumulated in float32. On CPU embedding_bag reads every row once and keeps none:
    10 to 20 times as fast as a gather and a sum (T = 2,048, K = 4, D = 256)."""
    if masked or index_TK.shape[1] == 1:
        gathered_TKD = gather_rows(rows_RD, index_TK, masked)
        return gathered_TKD[:, 0] if index_TK.shape[1] == 1 else gathered_TKD.sum(dim=1)
    return F.embedding_bag(index_TK, rows_RD, mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(permutation.inverse_TK)
        ctx.masked = permutation.masked
        return gather_rows(x_TD, permutation.token_R, permutation.padded)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        (inverse_TK,) = ctx.saved_tensors
        return sum_rows(grad_RD, inverse_TK, ctx.masked), None


# -- what others call --------------------------------------------------------------------------------------------------


def _check_ids(topk_ids: Tensor, num_experts: int) -> None:
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids is {topk_ids.dtype}: give int32 or int64")
    if num_experts < 1:
        raise ValueError(f"num_experts = {num_experts}: give at least 1")


def _padded_size(pairs: int, num_experts: int, tile: int) -> int:
    """Rows that are enough for every routing; a multiple of tile."""
    return (pairs + num_experts * (tile - 1)) // tile * tile


def padded_ends(counts_E: Tensor, tile: int) -> Tensor:
    """ends_E int64: where the rows of each expert end in an order with this tile, its padding included."""
    return (counts_E + counts_E.neg().remainder(tile)).cumsum(0)


def count_tokens(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """tokens_per_expert [E] int64, exact; id -1 is not counted. Any shape of ids. No host sync.

    Raises ValueError for ids that are not int32 or int64, or no experts.
    """
    _check_ids(topk_ids_TK, num_experts)
    ids = topk_ids_TK.reshape(-1)
    return _count(ids.contiguous(), num_experts) if fused(ids) else _count_torch(ids.long(), num_experts)


def sort_by_expert(topk_ids_TK: Tensor, num_experts: int, masked: bool = False, tile: int = 1) -> Permutation:
    """Stable expert-sorted order of all pairs. masked: some ids are -1; their pairs get no row (one host sync on the torch
    path, none on the Triton path: see the top of the file). tile: every expert's rows start at a multiple of it; counts_E
    stay the true counts, `padded_ends` says where the groups end.

    Raises ValueError for other dtypes or shapes, K > E, or tile < 1.
    """
    _check_ids(topk_ids_TK, num_experts)
    if topk_ids_TK.dim() != 2 or not 1 <= topk_ids_TK.shape[1] <= num_experts:
        raise ValueError(f"topk_ids_TK is {tuple(topk_ids_TK.shape)}: give [T, K] with 1 <= K <= {num_experts} experts")
    if tile < 1:
        raise ValueError(f"tile = {tile}: give at least 1")
    if not fused(topk_ids_TK):
        return _sort_torch(topk_ids_TK.long(), num_experts, masked, tile)
    order_R, inverse_TK, counts_E = _sort(topk_ids_TK.contiguous(), num_experts, tile)
    return Permutation(order_R, inverse_TK, counts_E, masked, masked or tile > 1)


def regroup(counts_pe: Tensor, rows: int) -> Permutation:
    """From (source rank, local expert) blocks, as an all-to-all delivers them, to (local expert, source rank) order.

    counts_pe integer [ranks, local experts]: rows of each block; rows: their sum, known to the host (the receive splits).
    Equal to sorting the local expert of every row, without a sort and without a host sync: a block moves as a whole.
    Every row is a token with K = 1: inverse_TK is [R, 1]. Raises ValueError for other shapes.
    """
    if counts_pe.dim() != 2 or counts_pe.is_floating_point() or rows < 0:
        raise ValueError(
            f"counts_pe is {counts_pe.dtype} {tuple(counts_pe.shape)}, rows = {rows}: give integers [ranks, local experts]"
            " and their sum"
        )
    counts_ep = counts_pe.T.contiguous()
    from_pe = counts_pe.flatten().cumsum(0) - counts_pe.flatten()
    to_ep = counts_ep.flatten().cumsum(0) - counts_ep.flatten()
    shift_pe = to_ep.view_as(counts_ep).T - from_pe.view_as(counts_pe)
    row = torch.arange(rows, device=counts_pe.device)
    to = row + shift_pe.flatten().repeat_interleave(counts_pe.flatten(), output_size=rows)
    order_R = row - shift_pe.T.flatten().repeat_interleave(counts_ep.flatten(), output_size=rows)
    return Permutation(order_R, to[:, None], counts_pe.sum(0), False)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """rows_RD in expert order, same dtype as x_TD; zeros in rows of no pair.

    Raises ValueError for other shapes or devices.
    """
    order_R, inverse_TK = permutation.order_R, permutation.inverse_TK
    if x_TD.dim() != 2 or x_TD.shape[0] != inverse_TK.shape[0]:
        raise ValueError(f"x_TD is {tuple(x_TD.shape)}: give [T, D] with T = {inverse_TK.shape[0]}, as the permutation")
    if x_TD.device != inverse_TK.device:
        raise ValueError(f"x_TD is on {x_TD.device}: give it on {inverse_TK.device}, where the permutation is")
    if not fused(x_TD):
        return _Permute.apply(x_TD, permutation)
    return _forward(x_TD.contiguous(), order_R.contiguous(), inverse_TK.contiguous())
