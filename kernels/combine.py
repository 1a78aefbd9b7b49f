"""Combine: the weighted sum of what the experts returned for a token.

    out_TD[t] = sum_k weights_TK[t, k] * rows_RD[inverse_TK[t, k]]        accumulated in float32
    grad rows_RD[r] = w * grad out_TD[t];   grad weights_TK[t, k] = <rows_RD[inverse], grad out_TD[t]>

Saved for backward: rows, weights, inverse. Every row is written once: deterministic.
Letters: T tokens, D model dim, K experts per token, R dispatched rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.permute import Permutation, gather_rows


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, permutation.inverse_TK, permutation.order_R)
        ctx.masked = permutation.masked
        gathered_TKD = gather_rows(rows_RD, permutation.inverse_TK, permutation.masked)
        return torch.bmm(weights_TK[:, None, :], gathered_TKD.float())[:, 0].to(rows_RD.dtype)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        rows_RD, weights_TK, inverse_TK, order_R = ctx.saved_tensors
        grad_TD = grad_TD.float()
        gathered_TKD = gather_rows(rows_RD, inverse_TK, ctx.masked).float()
        grad_weights_TK = torch.bmm(gathered_TKD, grad_TD[:, :, None])[:, :, 0]
        weights_R = weights_TK.reshape(-1)[order_R]
        tokens_R = order_R.div(inverse_TK.shape[1], rounding_mode="floor")
        grad_rows_RD = (weights_R[:, None] * grad_TD[tokens_R]).to(rows_RD.dtype)
        return grad_rows_RD, grad_weights_TK, None


def combine(rows_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """out_TD in the dtype of rows_RD; weights_TK float32. Pairs without a row count as zero."""
    return _Combine.apply(rows_RD, weights_TK, permutation)
