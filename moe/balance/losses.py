"""Losses on the router. Each returns a *sum over real tokens*: the caller divides by the real tokens of the whole
optimizer step, so that the gradient depends on neither the micro-batches nor the ranks.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def aux_loss(scores_TE: Tensor, tokens_per_expert_E: Tensor, top_k: int, token_mask_T: Tensor | None) -> Tensor:
    """T * E * sum_k f_k P_k over this micro-batch, f detached (Switch Transformer, arXiv:2101.03961, eq. 4).

    f_k = A_k / (K T); P_k = mean over real tokens of the score, divided by the token's sum (sigmoid scores do not sum to 1).
    """
    probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if token_mask_T is not None:
        probs_TE = probs_TE * token_mask_T[:, None]
    pairs = tokens_per_expert_E.sum().clamp_min(1)
    share_E = tokens_per_expert_E / pairs
    return scores_TE.shape[-1] * (share_E * probs_TE.sum(dim=0)).sum()


def z_loss(logits_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """sum_i (logsumexp_k z_ik)^2 (ST-MoE, arXiv:2202.08906, eq. 5), float32."""
    squared_T = logits_TE.float().logsumexp(dim=-1).square()
    if token_mask_T is not None:
        squared_T = squared_T * token_mask_T
    return squared_T.sum()
