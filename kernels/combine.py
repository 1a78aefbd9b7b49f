"""Combine: the weighted sum of what the experts returned for a token.

    out_TD[t] = sum_k weights_TK[t, k] * rows_RD[inverse_TK[t, k]]        accumulated in float32
    grad rows_RD[r] = w * grad out_TD[t];   grad weights_TK[t, k] = <rows_RD[inverse], grad out_TD[t]>

Saved for backward: rows, weights, inverse. Every row is written once: deterministic.
Letters: T tokens, D model dim, K experts per token, R dispatched rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.permute import Permutation, gather_rows


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, permutation.inverse_TK, permutation.order_R)
        return weighted_sum(rows_RD, weights_TK, permutation.inverse_TK, permutation.masked)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        rows_RD, weights_TK, inverse_TK, order_R = ctx.saved_tensors
        token_R = order_R.div(inverse_TK.shape[1], rounding_mode="floor")
        wide = torch.promote_types(rows_RD.dtype, weights_TK.dtype)
        grad_RD = grad_TD.to(wide).index_select(0, token_R)
        grad_weights_R = (grad_RD * rows_RD.to(wide)).sum(dim=-1).to(weights_TK.dtype)
        grad_weights_TK = F.pad(grad_weights_R, (0, 1))[inverse_TK]  # -1: the last one, 0
        grad_rows_RD = grad_RD.mul_(weights_TK.reshape(-1)[order_R][:, None]).to(rows_RD.dtype)
        return grad_rows_RD, grad_weights_TK, None


def weighted_sum(rows_RD: Tensor, weights_TK: Tensor, inverse_TK: Tensor, masked: bool) -> Tensor:
    """The equation at the top, without a gradient."""
    if masked or rows_RD.is_cuda:
        gathered_TKD = gather_rows(rows_RD, inverse_TK, masked).to(weights_TK.dtype)
        return torch.bmm(weights_TK[:, None, :], gathered_TKD)[:, 0].to(rows_RD.dtype)
    # embedding_bag keeps no gathered rows; its weights must have the dtype of the rows, and bfloat16 would round them.
    rows = rows_RD.to(torch.promote_types(rows_RD.dtype, weights_TK.dtype))
    return F.embedding_bag(inverse_TK, rows, mode="sum", per_sample_weights=weights_TK.to(rows.dtype)).to(rows_RD.dtype)


def combine(rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """out_TD in the dtype of rows_RD; weights_TK float32. Pairs without a row count as zero."""
    return _Combine.apply(rows_RD, weights_TK, permutation)
