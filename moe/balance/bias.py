"""Bias rules: pure functions from a batch's load to the next bias, vectorised over layers.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def target_load(tokens_per_expert_LE: Tensor) -> Tensor:
    """L = K T / E per layer, [L, 1] float64, from counts before any drop: sum_k A_k = K T exactly."""
    return tokens_per_expert_LE.sum(dim=-1, keepdim=True, dtype=torch.float64) / tokens_per_expert_LE.shape[-1]


def sign_direction(tokens_per_expert_LE: Tensor) -> Tensor:
    """sign(L - A_k), float32, 0 for an expert exactly at the target (arXiv:2408.15664, algorithm 1).

    Compared in integers (E * A_k against sum A): exact beyond 2**24 tokens.
    """
    num_experts = tokens_per_expert_LE.shape[-1]
    total = tokens_per_expert_LE.sum(dim=-1, keepdim=True)
    return (total - num_experts * tokens_per_expert_LE).sign().float()


def centred(bias_LE: Tensor) -> Tensor:
    """The bias minus its mean over experts: the same routing, no drift. The mean is taken in float64."""
    return (bias_LE.double() - bias_LE.double().mean(dim=-1, keepdim=True)).float()
