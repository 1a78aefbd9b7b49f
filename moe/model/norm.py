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

    with one product g x for both sums, and x and r kept."""

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
        product_TD = grad_TD * wide_TD
        grad_weight = torch.mv(product_TD.T, r_T1[:, 0])
        share_T1 = torch.mv(product_TD, weight.float())[:, None].mul_(r_T1**3).div_(x_TD.shape[1])
        grad_x_TD = torch.mul(grad_TD, weight, out=product_TD).mul_(r_T1).addcmul_(wide_TD, share_T1, value=-1)
        return grad_x_TD.to(x_TD.dtype).view(grad.shape), grad_weight.to(weight.dtype), None
