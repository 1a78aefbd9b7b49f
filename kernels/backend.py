"""Which path an operation takes. Triton runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (set before triton
is first imported); everything else is torch."""

from __future__ import annotations

from torch import Tensor
from triton import knobs


def fused(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and knobs.runtime.interpret)
