"""Losses on the router. Each but `simbal_loss` returns a *sum over real tokens*, a float32 scalar: the caller divides by
the real tokens of the whole optimizer step, so that the gradient depends on neither the micro-batches nor the ranks.

    p_ik = s_ik / sum_j s_ij              sigmoid scores do not sum to 1
    P_k = mean_i p_ik                     over the real tokens of a window
    f_k = A_k / (K T)                     counted over a window, never differentiated

Arguments of the same name are the same everywhere: scores_TE float32 (the unbiased scores); token_mask_T bool, False for
padding, None when every token is real. Padding adds nothing and has gradient 0, whatever its scores are.
Letters: T tokens, B sequences, D model dim, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.permute import count_tokens
from kernels.router_topk import SMALLEST_SUM, topk_lowest_index
from moe.config import BalanceSection


def token_shares(scores_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """p_ik [T, E] float32; rows of padding are 0, and so is a row whose scores are all 0."""
    if token_mask_T is not None:
        # Before the division: padding may hold NaN, whose gradient would be NaN after any later mask.
        scores_TE = scores_TE.masked_fill(~token_mask_T[:, None], 0.0)
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(SMALLEST_SUM)


def aux_loss(scores_TE: Tensor, tokens_per_expert_E: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """T * E * sum_k f_k P_k, T and P_k from the tokens given (Switch Transformer, arXiv:2101.03961, eq. 4).

    tokens_per_expert_E int64: the counts of these tokens for the micro-batch scope. For the global scope, the counts of the
    global batch so far, over all ranks; P stays local (arXiv:2501.11873). Only their ratios matter, so K is not needed.
    """
    share_E = tokens_per_expert_E / tokens_per_expert_E.sum().clamp_min(1)
    return scores_TE.shape[-1] * (share_E * token_shares(scores_TE, token_mask_T).sum(dim=0)).sum()


def global_aux_loss(prob_sum_LE: Tensor, seen_LE: Tensor) -> Tensor:
    """sum over layers of T * E * sum_k f_k P_k with f of the global batch so far (arXiv:2501.11873).

    prob_sum_LE float32, differentiable: sums of `token_shares` over this micro-batch. seen_LE int64: counts of all ranks and
    of the micro-batches of this optimizer step up to this one.
    """
    share_LE = seen_LE / seen_LE.sum(-1, keepdim=True).clamp_min(1)
    return prob_sum_LE.shape[-1] * (share_LE * prob_sum_LE).sum()


def sequence_aux_loss(
    scores_TE: Tensor, topk_ids_TK: Tensor, seq_len: int, token_mask_T: Tensor | None = None
) -> Tensor:
    """sum_b T_b * E * sum_k f_bk P_bk, f and P of one sequence, T_b its real tokens (DeepSeek-V3, arXiv:2412.19437,
    eqs. 17-20).

    Rows b * seq_len to (b + 1) * seq_len - 1 are sequence b, whole. topk_ids_TK int64: the top K of the unbiased scores, as
    published, or the biased selection; -1 and padding are not counted. Raises ValueError unless seq_len divides T.
    """
    tokens, num_experts = scores_TE.shape
    if seq_len < 1 or tokens % seq_len:
        raise ValueError(f"seq_len = {seq_len} does not divide the {tokens} tokens: give whole sequences")
    none_TK = topk_ids_TK < 0
    if token_mask_T is not None:
        none_TK = none_TK | ~token_mask_T[:, None]
    sequence_T1 = torch.arange(tokens, device=scores_TE.device)[:, None] // seq_len
    slot_TK = (sequence_T1 * num_experts + topk_ids_TK).masked_fill(none_TK, -1)
    # As many slots as experts times sequences: torch, whatever train.kernels says.
    counts_BE = count_tokens(slot_TK, tokens // seq_len * num_experts, "torch").view(-1, num_experts)
    share_BE = counts_BE / counts_BE.sum(dim=-1, keepdim=True).clamp_min(1)
    prob_sum_BE = token_shares(scores_TE, token_mask_T).view(-1, seq_len, num_experts).sum(dim=1)
    return num_experts * (share_BE * prob_sum_BE).sum()


def group_aux_loss(
    scores_TE: Tensor, tokens_per_expert_E: Tensor, num_groups: int, token_mask_T: Tensor | None = None
) -> Tensor:
    """T * G * sum_g f_g P_g over contiguous blocks of E / G experts, f_g and P_g the sums over a block: the device-level
    balance loss of DeepSeekMoE (arXiv:2401.06066, section 3.3).

    tokens_per_expert_E int64: of these tokens or of the global batch, as in `aux_loss`. Raises ValueError unless num_groups
    divides E.
    """
    num_experts = scores_TE.shape[-1]
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups = {num_groups} does not divide the {num_experts} experts: choose a divisor")
    counts_G = tokens_per_expert_E.view(num_groups, -1).sum(dim=-1)
    share_G = counts_G / counts_G.sum().clamp_min(1)
    prob_sum_G = token_shares(scores_TE, token_mask_T).sum(dim=0).view(num_groups, -1).sum(dim=-1)
    return num_groups * (share_G * prob_sum_G).sum()


def phi_loss(scores_TE: Tensor, ema_share_E: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """T * sum_k P_k (1 + log m_k): phi-balancing with the negative entropy as potential (arXiv:2605.15403).

    ema_share_E float32: m, the running mean of P from `update_share`; never differentiated. An m_k of 0 counts as the
    smallest normal number.
    """
    price_E = 1 + ema_share_E.detach().clamp_min(torch.finfo(torch.float32).tiny).log()
    return (price_E * token_shares(scores_TE, token_mask_T).sum(dim=0)).sum()


@torch.no_grad()
def update_share(ema_E: Tensor, prob_sum_E: Tensor, tokens: Tensor | int, rate: float) -> Tensor:
    """m + rate * (P - m) [..., E] float32, P = prob_sum / tokens (arXiv:2605.15403); m where there were no tokens.

    prob_sum_E [..., E]: sum of `token_shares` over the global batch (RouterStats.prob_sum / FIXED_POINT). tokens [...]: its
    real tokens. rate in [0, 1]. Starting from m = 1 / E, m keeps the sum 1.
    """
    tokens_1 = torch.as_tensor(tokens, device=ema_E.device)[..., None]
    mean_E = prob_sum_E.double() / tokens_1.clamp_min(1)
    return torch.where(tokens_1 > 0, ema_E + rate * (mean_E - ema_E), ema_E.double()).float()


def simbal_loss(weight_ED: Tensor) -> Tensor:
    """sum_jk |(R^T R - I)_jk|, R = weight_ED^T the [D, E] router matrix: its columns, one an expert, shall be orthonormal
    (SimBal, arXiv:2506.14038; coefficient 0.1). Float32, and balance only by way of the geometry: no load enters.

    *Not* a sum over tokens. A caller that divides by the tokens of the optimizer step multiplies this by the real tokens of
    each micro-batch; then it counts once a step.
    """
    weight_ED = weight_ED.float()
    gram_EE = weight_ED @ weight_ED.T
    return (gram_EE - torch.eye(len(gram_EE), device=gram_EE.device)).abs().sum()


def z_loss(logits_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """sum_i (logsumexp_k z_ik)^2 (ST-MoE, arXiv:2202.08906, eq. 5). logits_TE: any float dtype."""
    logits_TE = logits_TE.float()
    if token_mask_T is not None:
        logits_TE = logits_TE.masked_fill(~token_mask_T[:, None], 0.0)
    squared_T = logits_TE.logsumexp(dim=-1).square()
    if token_mask_T is not None:
        squared_T = squared_T * token_mask_T
    return squared_T.sum()


class RouterLosses(NamedTuple):
    """Differentiable terms of one layer, float32 scalars, sums over real tokens, coefficients applied; zero when unused.

    aux: all balance losses but that of the global scope. prob_sum_E [E]: what `global_aux_loss` needs, else None.
    """

    aux: Tensor
    z: Tensor
    prob_sum_E: Tensor | None


def router_losses(
    section: BalanceSection,
    logits_TE: Tensor,
    scores_TE: Tensor,
    topk_ids_TK: Tensor,
    tokens_per_expert_E: Tensor,
    token_mask_T: Tensor | None,
    weight_ED: Tensor,
    ema_share_E: Tensor | None,
    seq_len: int,
    top_k: int,
) -> RouterLosses:
    """Every loss that the section asks for, on one layer's micro-batch. top_k: the router's own, which a method that assigns
    the batch need not give every token."""
    zero, mask_T = logits_TE.new_zeros((), dtype=torch.float32), token_mask_T
    aux, prob_sum_E = zero, None
    if section.aux_loss and section.aux_scope == "global":
        prob_sum_E = token_shares(scores_TE, mask_T).sum(dim=0)
    elif section.aux_loss and section.aux_scope == "sequence":
        ids_TK = topk_ids_TK
        if section.aux_selection == "unbiased":
            ids_TK = topk_lowest_index(scores_TE.detach(), top_k)
        aux = aux + section.aux_loss * sequence_aux_loss(scores_TE, ids_TK, seq_len, mask_T)
    elif section.aux_loss:
        aux = aux + section.aux_loss * aux_loss(scores_TE, tokens_per_expert_E, mask_T)
    if section.group_loss:
        assert section.group_loss_groups is not None, "resolve() gives the group loss its groups"
        groups = section.group_loss_groups
        aux = aux + section.group_loss * group_aux_loss(scores_TE, tokens_per_expert_E, groups, mask_T)
    if section.phi_loss:
        assert ema_share_E is not None, "a router of phi_loss has the running shares"
        aux = aux + section.phi_loss * phi_loss(scores_TE, ema_share_E, mask_T)
    if section.simbal_loss:
        # It is no sum over tokens: weighted with the real ones here, it counts once a step.
        tokens = len(logits_TE) if mask_T is None else mask_T.sum()
        aux = aux + section.simbal_loss * tokens * simbal_loss(weight_ED)
    z = section.z_loss * z_loss(logits_TE, mask_T) if section.z_loss else zero
    return RouterLosses(aux, z, prob_sum_E)
