"""Which path an operation takes. Triton runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (set before triton
is first imported); everything else is torch."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)  # asked once: torch.compile cannot trace triton's answer

Backend = Literal["auto", "triton", "torch"]
"""auto: Triton where it runs. torch: the way out when a kernel misbehaves."""


def fused(tensor: Tensor, backend: Backend = "auto") -> bool:
    """Whether the Triton kernels take this tensor. Raises ValueError for an unknown backend, and for triton where it does not
    run."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend = {backend!r} is not known: choose auto, triton or torch")
    able = tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")
    if backend == "triton" and not able:
        raise ValueError(
            f"backend = 'triton' cannot take tensors on {tensor.device}: give CUDA tensors, or choose torch"
        )
    return able and backend != "torch"
