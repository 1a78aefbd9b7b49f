"""AdamW, its parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moe.config import OptimSection


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW (arXiv:1711.05101); no decay on norms and embeddings. The expert bias is a buffer: never in here.

    Plain parameters and those of each mesh are in groups of their own: one fused update cannot mix them.
    """
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and "embedding" not in name
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((decays, mesh), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": optim.weight_decay if decays else 0.0} for (decays, _), ps in groups.items()],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def learning_rate(optim: OptimSection, steps: int, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up from lr / warmup_steps; then a cosine to
    `final_lr_share * lr`, or (wsd, arXiv:2404.06395) constant and a linear decay over the last `decay_share` of the run."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "cosine":
        done = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        decay_steps = min(round(optim.decay_share * steps), steps - optim.warmup_steps)
        share = min(1.0, (steps - 1 - step) / decay_steps) if decay_steps else 1.0
    return optim.lr * (optim.final_lr_share + (1 - optim.final_lr_share) * max(0.0, share))
