"""The one normalisation of the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight, float32 inside (arXiv:1910.07467); any shape [..., D], the dtype of x."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one kernel there
            return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """On a CPU torch composes the norm of ten operations and keeps two float32 copies of the input. Here, with
    r = 1 / rms(x) and D the dim:

        grad weight = sum over rows of r g x        grad x = r g weight - x r^3 / D sum over D of g weight x

    and x and r kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        wide_TD = x_TD.float()
        r_T1 = torch.linalg.vector_norm(wide_TD, dim=1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight, r_T1)
        return (wide_TD * r_T1).mul_(weight).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x_TD, weight, r_T1 = ctx.saved_tensors
        wide_TD, grad_TD = x_TD.float(), grad.reshape(x_TD.shape).float()
        # torch has one pass for this in LayerNorm, which is RMSNorm where the mean is 0, but for a last term: it takes the mean
        # of grad * weight off every row.
        grad_x_TD, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad_TD, wide_TD, weight.shape, torch.zeros_like(r_T1), r_T1, weight.float(), None, [True, True, False]
        )
        grad_x_TD.add_(torch.mv(grad_TD, weight.float())[:, None].mul_(r_T1).div_(x_TD.shape[1]))
        return grad_x_TD.to(x_TD.dtype).view(grad.shape), grad_weight.to(weight.dtype), None
