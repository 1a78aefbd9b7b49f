"""SwiGLU MLPs: the dense one, and the routed experts with stacked weights. Letters: D model dim, F hidden dim, E experts,
e local experts, R rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kernels.backend import Backend
from kernels.grouped_gemm import grouped_gemm
from kernels.moe_mlp import moe_mlp
from kernels.permute import Permutation
from kernels.swiglu import swiglu


def cast(weight: Tensor, like: Tensor) -> Tensor:
    """A float32 parameter in the dtype of the activations (no-op under FSDP2, which casts when it gathers)."""
    return weight.to(like.dtype)


class Linear(nn.Linear):
    """y = x W^T without bias, W kept in float32 and used in the dtype of x."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, cast(self.weight, input))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), with w1 and w3 stacked in w13 [2F, D]; the dense MLP and the shared experts."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w13 = Linear(dim, 2 * hidden_dim)
        self.w2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w13(x)))


class Experts(nn.Module):
    """Routed experts: w13 [E, 2F, D], w2 [E, D, F]; DTensors Shard(0) over the ep mesh when there is one."""

    def __init__(
        self, num_experts: int, dim: int, hidden_dim: int, ep_mesh: DeviceMesh | None, backend: Backend = "auto"
    ):
        super().__init__()
        self.backend: Backend = backend
        self.w13 = self._sharded(torch.empty(num_experts, 2 * hidden_dim, dim), ep_mesh)
        self.w2 = self._sharded(torch.empty(num_experts, dim, hidden_dim), ep_mesh)

    @staticmethod
    def _sharded(full: Tensor, mesh: DeviceMesh | None) -> nn.Parameter:
        # Only the shape and device of `full` matter: initialisation fills each expert from its own seed.
        if mesh is None:
            return nn.Parameter(full)
        rows = full.shape[0] // mesh.size()
        local = full[:rows].clone()
        return nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))

    def _weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """w13_e2FD and w2_eDF of this rank in the dtype of the activations."""
        return cast(local_tensor(self.w13), like), cast(local_tensor(self.w2), like)

    def mixture(self, x_TD: Tensor, topk_weights_TK: Tensor, permutation: Permutation) -> Tensor:
        """x_TD -> out_TD, the weighted sum of each token's experts, all of them on this rank."""
        return moe_mlp(x_TD, topk_weights_TK, permutation, *self._weights(x_TD), self.backend)

    def forward(self, rows_RD: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
        """rows_RD sorted by local expert -> rows_RD, same order."""
        w13, w2 = self._weights(rows_RD)
        gu_R2F = grouped_gemm(rows_RD, w13, tokens_per_expert_e, self.backend)
        return grouped_gemm(swiglu(gu_R2F), w2, tokens_per_expert_e, self.backend)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (differentiable); a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> tuple[Tensor, Sequence[int]]:
    """This rank's part of a parameter, without gradient, and where it begins in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), [0] * tensor.dim()
    _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), first
