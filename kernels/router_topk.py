"""Top-K routing: which experts a token visits, and with which weights.

    scores_TE = sigmoid(logits_TE) or softmax(logits_TE)          float32
    topk_ids_TK = TopK_k(scores_TE + expert_bias_E)               the bias selects ...
    topk_weights_TK = scores_TE at topk_ids_TK (/ their sum) * scaling     ... and never weighs (arXiv:2408.15664, eq. 3)

Group-limited (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): only the experts of the best `group_top_k` of `num_groups`
contiguous groups; the score of a group is the sum of its two best biased scores.
Ties go to the lowest expert (and group) index, so that a recomputation chooses the same experts.

These are the parts, in torch; `kernels.route` does all of it and counts in one pass.
Letters: T tokens, E experts, K experts per token, G groups, B bins of a histogram.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# -- choosing -----------------------------------------------------------------------------------------------


class TopK(NamedTuple):
    """topk_weights_TK float32 (differentiable) and topk_ids_TK int64 (-1: no expert); scores_TE float32. On demand
    places_TK1 float32: the K + 1 largest of what the top K was taken of, largest first."""

    topk_weights_TK: Tensor
    topk_ids_TK: Tensor
    scores_TE: Tensor
    places_TK1: Tensor | None = None


REPEATED = 9  # up to here, on CPU, repeated maxima beat one topk: 2x at E = 16, K = 2, 1.2x at E = 256, K = 8


def sorted_topk(values_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Values [T, K] float32 and indices [T, K] int64 of the K largest of a row, largest first, ties to the lowest index.

    torch.topk leaves ties open (it picks the last ones on CPU); torch.max takes the first. For large K every value becomes
    a distinct int64: its bits in an order-preserving form, then the reversed index. One topk of these is 4x faster than a
    stable sort (E=256).
    """
    if values_TE.device.type == "cpu" and 0 < top_k <= REPEATED:
        left_TE = values_TE.float().clone()
        values, ids = [], []
        for _ in range(top_k):
            value_T1, id_T1 = left_TE.max(dim=-1, keepdim=True)
            left_TE.scatter_(-1, id_T1, float("-inf"))
            values.append(value_T1)
            ids.append(id_T1)
        return torch.cat(values, -1), torch.cat(ids, -1)
    num_experts = values_TE.shape[-1]
    bits = (values_TE.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    reversed_index = torch.arange(num_experts - 1, -1, -1, device=values_TE.device)
    keys = ordered * num_experts + reversed_index
    ids_TK = num_experts - 1 - keys.topk(top_k, dim=-1).values.remainder(num_experts)
    return values_TE.float().gather(-1, ids_TK), ids_TK


def topk_lowest_index(values_TE: Tensor, top_k: int) -> Tensor:
    """The indices of `sorted_topk`."""
    return sorted_topk(values_TE, top_k)[1]


def router_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """scores_TE float32. Raises ValueError for an unknown score function."""
    if score_function == "sigmoid":
        return logits_TE.float().sigmoid()
    if score_function == "softmax":
        return logits_TE.float().softmax(dim=-1)
    raise ValueError(f"score_function = {score_function!r} is not known: choose sigmoid or softmax")


def selection_scores(scores_TE: Tensor, expert_bias_E: Tensor, num_groups: int = 1, group_top_k: int = 1) -> Tensor:
    """What the top K is taken of, [T, E] float32: scores + bias, -inf for the experts of groups out of reach.

    -inf and not 0: biased scores can be negative, and then a masked expert would win.
    """
    biased_TE = scores_TE + expert_bias_E
    if group_top_k >= num_groups:
        return biased_TE
    biased_TGe = biased_TE.unflatten(-1, (num_groups, -1))
    best_TG = biased_TGe.topk(2, dim=-1).values.sum(-1)
    reach_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(-1, topk_lowest_index(best_TG, group_top_k), True)
    return biased_TGe.masked_fill(~reach_TG[..., None], float("-inf")).flatten(-2)


def combine_weights(
    scores_TE: Tensor, topk_ids_TK: Tensor, renormalize: bool = True, scaling: float = 1.0, masked: bool = False
) -> Tensor:
    """topk_weights_TK float32, differentiable in scores_TE. masked: some ids are -1, whose weight is 0."""
    weights_TK = scores_TE.gather(-1, topk_ids_TK.clamp_min(0) if masked else topk_ids_TK)
    if masked:
        weights_TK = weights_TK.masked_fill(topk_ids_TK < 0, 0.0)
    if renormalize:
        # The sum can underflow to 0 (all chosen sigmoids ~ 0): the weights are then 0, not 0/0.
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return weights_TK * scaling if scaling != 1.0 else weights_TK


def router_topk(
    logits_TE: Tensor,
    expert_bias_E: Tensor,
    top_k: int,
    score_function: str,
    renormalize: bool = True,
    scaling: float = 1.0,
    token_mask_T: Tensor | None = None,
    num_groups: int = 1,
    group_top_k: int = 1,
    places: bool = False,
) -> TopK:
    """Route T tokens; see the equations at the top of the file.

    logits_TE: any float dtype, computed in float32. expert_bias_E: float32, no gradient. token_mask_T: bool, False for
    padding, whose ids become -1 and whose weights 0. places: also return places_TK1 (K < E). Raises
    ValueError for K > E or an unknown score function.
    """
    if top_k > logits_TE.shape[-1]:
        raise ValueError(f"top_k = {top_k} is more than the {logits_TE.shape[-1]} experts: choose at most that many")
    scores_TE = router_scores(logits_TE, score_function)
    with torch.no_grad():
        biased_TE = selection_scores(scores_TE, expert_bias_E, num_groups, group_top_k)
        places_TK1, ids_TK = sorted_topk(biased_TE, top_k + places)
        ids_TK = ids_TK[:, :top_k]
        if token_mask_T is not None:
            ids_TK = ids_TK.masked_fill(~token_mask_T[:, None], -1)
    weights_TK = combine_weights(scores_TE, ids_TK, renormalize, scaling, token_mask_T is not None)
    return TopK(weights_TK, ids_TK, scores_TE, places_TK1 if places else None)


# -- counting ----------------------------------------------------------------------------------------------------------

FIXED_POINT = 2.0**32  # dual_sum and prob_sum count in units of 2**-32
LOW_BIN, OCTAVES = -20, 21  # |r| from 1e-6 to 2, two bins an octave
RESPONSE_BINS = 2 * (2 * OCTAVES + 1)
# Gradients of shares grow with 1 / sum_j s_ij. Times E f_k they must stay finite in float32, for sigmoid scores that underflow.
SMALLEST_SUM = 1e-20


def response_histogram(
    biased_TE: Tensor, topk_ids_TK: Tensor, places_TK1: Tensor, token_mask_T: Tensor | None
) -> Tensor:
    """Histogram [E, B] int64 of the load response. places_TK1: the K + 1 largest of biased_TE. The bin is read off the
    exponent and the first bit of the mantissa; the side is the choice itself, so that a tie at the boundary counts where it
    was routed."""
    top_k, half = topk_ids_TK.shape[-1], RESPONSE_BINS // 2
    size_TE = (places_TK1[:, top_k - 1 : top_k] - biased_TE).abs_()
    size_TE.scatter_(-1, topk_ids_TK, (biased_TE.gather(-1, topk_ids_TK) - places_TK1[:, top_k:]).abs_())
    bin_TE = (size_TE.view(torch.int32) >> 22).sub_(((LOW_BIN + 127) << 1) - 1).clamp_(0, half - 1)
    chosen_TK = half + bin_TE.gather(-1, topk_ids_TK)
    bin_TE.neg_().add_(half - 1).scatter_(-1, topk_ids_TK, chosen_TK)
    return count_bins(bin_TE, RESPONSE_BINS, token_mask_T)


def count_bins(bin_TE: Tensor, bins: int, mask_T: Tensor | None) -> Tensor:
    """Histogram [E, bins] int64 of bin_TE int32, which is overwritten. mask_T: count these tokens only."""
    experts = bin_TE.shape[-1]
    flat = bin_TE.add_(bins * torch.arange(experts, dtype=torch.int32, device=bin_TE.device))
    if mask_T is not None:
        flat.masked_fill_(~mask_T[:, None], experts * bins)
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = torch.bincount(flat.reshape(-1), minlength=experts * bins + 1)
    else:  # bincount waits for the device, and breaks a graph: its size depends on the data
        counts = torch.zeros(experts * bins + 1, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(0, flat.reshape(-1).long(), counts.new_ones(1).expand(flat.numel()))
    return counts[: experts * bins].view(experts, bins)
