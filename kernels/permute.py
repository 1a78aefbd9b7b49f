"""Permute: rows of tokens in the order of their experts, and back.

    rows_RD[r] = x_TD[order_R[r] // K]         R = number of (token, expert) pairs, sorted by expert, stable
    grad x_TD[t] = sum_k grad rows_RD[inverse_TK[t, k]]     a gather, summed in float32 (float64 for float64), no atomics

The order is a counting sort (kernels in kernels/permute_triton.py). Pair p of expert e goes to row

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
from torch import Tensor

from kernels.backend import Backend, fused
from kernels.permute_triton import count_op, padded_size, permute_op, sort_op


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
        order = ids.new_full((padded_size(ids.numel(), num_experts, tile),), -1).index_copy_(0, rows, order)
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


def _check_range(topk_ids: Tensor, num_experts: int, lowest: int) -> None:
    """Host sync on a GPU. Inside torch.compile the range is checked when the graph runs, and torch raises a RuntimeError."""
    way_out = f"give {lowest} to {num_experts - 1}" + (", and masked = True where some are -1" if lowest == 0 else "")
    if torch.compiler.is_compiling():
        inside = ((topk_ids >= lowest) & (topk_ids < num_experts)).all()
        torch._assert_async(inside, f"topk_ids is not within {lowest} and {num_experts - 1}: {way_out}")
    elif topk_ids.numel():
        low, high = (int(end) for end in topk_ids.aminmax())
        if low < lowest or high >= num_experts:
            raise ValueError(f"topk_ids has {low if low < lowest else high}: {way_out}")


def padded_ends(counts_E: Tensor, tile: int) -> Tensor:
    """ends_E int64: where the rows of each expert end in an order with this tile, its padding included."""
    return (counts_E + counts_E.neg().remainder(tile)).cumsum(0)


def count_tokens(topk_ids_TK: Tensor, num_experts: int, backend: Backend = "auto", check_ids: bool = False) -> Tensor:
    """tokens_per_expert [E] int64, exact; id -1 is not counted. Any shape of ids. No host sync.

    check_ids: also the Triton path refuses ids outside -1 to E - 1, at the price of one on a GPU; else it does not count them.
    Raises ValueError for ids that are not int32 or int64, no experts, other backends, and, always on a CPU, for such ids.
    """
    _check_ids(topk_ids_TK, num_experts)
    ids, triton = topk_ids_TK.reshape(-1), fused(topk_ids_TK, backend)
    if check_ids or (ids.device.type == "cpu" and not triton):
        _check_range(ids, num_experts, -1)
    return count_op(ids.contiguous(), num_experts) if triton else _count_torch(ids.long(), num_experts)


def sort_by_expert(
    topk_ids_TK: Tensor,
    num_experts: int,
    masked: bool = False,
    tile: int = 1,
    backend: Backend = "auto",
    check_ids: bool = False,
) -> Permutation:
    """Stable expert-sorted order of all pairs. masked: some ids are -1; their pairs get no row (one host sync on the torch
    path, none on the Triton path: see the top of the file). tile: every expert's rows start at a multiple of it; counts_E
    stay the true counts, `padded_ends` says where the groups end.

    check_ids: also the Triton path refuses ids outside -1 (0 without masked) to E - 1, at the price of a host sync on a GPU;
    else such a pair gets no row.
    Raises ValueError for other dtypes or shapes, K > E, tile < 1, other backends, and, always on a CPU, for such ids.
    """
    _check_ids(topk_ids_TK, num_experts)
    if topk_ids_TK.dim() != 2 or not 1 <= topk_ids_TK.shape[1] <= num_experts:
        raise ValueError(f"topk_ids_TK is {tuple(topk_ids_TK.shape)}: give [T, K] with 1 <= K <= {num_experts} experts")
    if tile < 1:
        raise ValueError(f"tile = {tile}: give at least 1")
    triton = fused(topk_ids_TK, backend)
    if check_ids or (topk_ids_TK.device.type == "cpu" and not triton):
        _check_range(topk_ids_TK, num_experts, -1 if masked else 0)
    if not triton:
        return _sort_torch(topk_ids_TK.long(), num_experts, masked, tile)
    order_R, inverse_TK, counts_E = sort_op(topk_ids_TK.contiguous(), num_experts, tile)
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


def permute(x_TD: Tensor, permutation: Permutation, backend: Backend = "auto") -> Tensor:
    """rows_RD in expert order, same dtype as x_TD; zeros in rows of no pair.

    Raises ValueError for other shapes, devices or backends.
    """
    order_R, inverse_TK = permutation.order_R, permutation.inverse_TK
    if x_TD.dim() != 2 or x_TD.shape[0] != inverse_TK.shape[0]:
        raise ValueError(f"x_TD is {tuple(x_TD.shape)}: give [T, D] with T = {inverse_TK.shape[0]}, as the permutation")
    if x_TD.device != inverse_TK.device:
        raise ValueError(f"x_TD is on {x_TD.device}: give it on {inverse_TK.device}, where the permutation is")
    if not fused(x_TD, backend):
        return _Permute.apply(x_TD, permutation)
    return permute_op(x_TD.contiguous(), order_R.contiguous(), inverse_TK.contiguous())
