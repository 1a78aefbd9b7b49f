"""SwiGLU between the two products of an MLP (arXiv:2002.05202): gate rows first, as the products of w13 come.

    h_RF = silu(gate_RF) * up_RF        grad gate_RF = grad h_RF * up * silu'(gate)        grad up_RF = grad h_RF * silu(gate)

Any float dtype, any leading dims. Saved for backward: gu_R2F alone; autograd would keep silu(gate) too. The Triton path has it
inside its products (kernels/moe_mlp.py).
Letters: R rows, F hidden dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gu_R2F: Tensor) -> Tensor:
    """h_RF of gate and up side by side, same dtype."""
    return _SwiGLU.apply(gu_R2F)


def swiglu_forward(gu_R2F: Tensor) -> Tensor:
    """The equation."""
    gate_RF, up_RF = gu_R2F.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


def swiglu_backward(grad_RF: Tensor, gate_RF: Tensor, up_RF: Tensor, silu_RF: Tensor) -> Tensor:
    """grad gu_R2F; silu_RF of the gate. Both halves are written where they stay; torch.compile sees to that by itself."""
    if torch.compiler.is_compiling():
        grad_gate_RF = torch.ops.aten.silu_backward(grad_RF * up_RF, gate_RF)
        return torch.cat([grad_gate_RF, grad_RF * silu_RF], dim=-1)
    grad_gu_R2F = grad_RF.new_empty(*grad_RF.shape[:-1], 2 * grad_RF.shape[-1])
    grad_gate_RF, grad_up_RF = grad_gu_R2F.chunk(2, dim=-1)
    slope_RF = torch.mul(grad_RF, up_RF, out=grad_up_RF)  # its place is free until the last line
    torch.ops.aten.silu_backward.grad_input(slope_RF, gate_RF, grad_input=grad_gate_RF)
    torch.mul(grad_RF, silu_RF, out=grad_up_RF)
    return grad_gu_R2F


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gu_R2F: Tensor) -> Tensor:
        ctx.save_for_backward(gu_R2F)
        return swiglu_forward(gu_R2F)

    @staticmethod
    def backward(ctx, grad_RF: Tensor):
        gate_RF, up_RF = ctx.saved_tensors[0].chunk(2, dim=-1)
        return swiglu_backward(grad_RF, gate_RF, up_RF, F.silu(gate_RF))
