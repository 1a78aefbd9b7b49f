"""Which path an operation takes. Triton runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (set before triton
is first imported); everything else is torch."""

from __future__ import annotations

from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)  # asked once: torch.compile cannot trace triton's answer


def fused(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor."""
    return tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")
