"""Route: the whole router in one pass, its load and the statistics of the balancers included.

The equations are those of kernels/router_topk.py, the kernels are in kernels/route_triton.py. logits_TE bfloat16, float16 or
float32; expert_bias_E float32. With r_k = w_k (g_k - sum_j g_j w_j / scaling), or w_k g_k without the division by the sum, and g
the gradient of the weights w:

    sigmoid: grad logits_k = (1 - s_k) r_k at the chosen, else 0;   softmax: grad logits_e = r_e [e chosen] - s_e sum_k r_k

Saved for backward: logits and ids; the scores are computed again. Integer atomics only: deterministic.
Letters: T tokens, E experts, K experts per token, G groups, B bins of a histogram.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import Backend, fused
from kernels.permute import count_tokens
from kernels.route_triton import route_op
from kernels.router_topk import (
    FIXED_POINT,
    RESPONSE_BINS,
    SMALLEST_SUM,
    response_histogram,
    router_topk,
    selection_scores,
    sorted_topk,
)

# -- the reference ---------------------------------------------------------------------------------------------------

STATISTICS = ("dual_sum", "prob_sum", "boundary_count", "response_histogram")
NEED_NEXT = frozenset(STATISTICS[2:])  # what looks at the (K + 1)-th place


class Routed(NamedTuple):
    """topk_weights_TK float32, differentiable in the logits; topk_ids_TK int32, -1 for masked tokens. The rest is int64,
    sums over real tokens, None unless asked for.

    tokens_per_expert_E: the load. dual_sum []: of the K chosen scores + bias, in units of 2**-32. prob_sum_E: of score / sum
    of scores, same units. boundary_count_E: tokens whose K-th or (K + 1)-th expert this is, where these two are no more than
    boundary_width apart. response_histogram_EB: see `response_histogram`.
    """

    topk_weights_TK: Tensor
    topk_ids_TK: Tensor
    tokens_per_expert_E: Tensor
    dual_sum: Tensor | None = None
    prob_sum_E: Tensor | None = None
    boundary_count_E: Tensor | None = None
    response_histogram_EB: Tensor | None = None


def route_reference(
    logits_TE: Tensor,
    expert_bias_E: Tensor,
    top_k: int,
    score_function: str,
    renormalize: bool = True,
    scaling: float = 1.0,
    token_mask_T: Tensor | None = None,
    num_groups: int = 1,
    group_top_k: int = 1,
) -> Routed:
    """The equations without statistics, differentiable, in float32 (float64 for float64 logits). Ties: a stable sort."""
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = wide_TE.sigmoid() if score_function == "sigmoid" else wide_TE.softmax(-1)
    biased_TGe = (scores_TE.detach() + expert_bias_E).unflatten(-1, (num_groups, -1))
    if group_top_k < num_groups:
        best_TG = biased_TGe.sort(-1, descending=True).values[..., :2].sum(-1)
        rank_TG = best_TG.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        biased_TGe = biased_TGe.masked_fill((rank_TG >= group_top_k)[..., None], -torch.inf)
    ids_TK = biased_TGe.flatten(-2).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if token_mask_T is not None:
        weights_TK = weights_TK.masked_fill(~token_mask_T[:, None], 0)
        ids_TK = ids_TK.masked_fill(~token_mask_T[:, None], -1)
    chosen_TKE = ids_TK[..., None] == torch.arange(logits_TE.shape[1], device=ids_TK.device)
    return Routed(weights_TK * scaling, ids_TK, chosen_TKE.sum((0, 1)))


# -- torch -------------------------------------------------------------------------------------------------------------


def _route_torch(
    logits_TE: Tensor,
    expert_bias_E: Tensor,
    top_k: int,
    score_function: str,
    renormalize: bool,
    scaling: float,
    token_mask_T: Tensor | None,
    num_groups: int,
    group_top_k: int,
    statistics: AbstractSet[str],
    boundary_width: float,
) -> Routed:
    limits = num_groups, group_top_k
    weights_TK, ids_TK, scores_TE, places_TK1 = router_topk(
        logits_TE,
        expert_bias_E,
        top_k,
        score_function,
        renormalize,
        scaling,
        token_mask_T,
        *limits,
        places=bool(statistics & NEED_NEXT),
    )
    with torch.no_grad():
        biased_TE, chosen_TK = selection_scores(scores_TE, expert_bias_E, *limits), ids_TK.clamp_min(0)
        real_T = logits_TE.new_ones(len(logits_TE), dtype=torch.bool) if token_mask_T is None else token_mask_T
        found = {}
        if "dual_sum" in statistics:  # sums in float64: the same in any order
            dual_T = biased_TE.gather(-1, chosen_TK).sum(-1, dtype=torch.float64)
            found["dual_sum"] = (dual_T * FIXED_POINT).round().long().masked_fill(~real_T, 0).sum()
        if "prob_sum" in statistics:
            row_T1 = scores_TE.sum(-1, keepdim=True, dtype=torch.float64).float().clamp_min(SMALLEST_SUM)
            fixed_TE = ((scores_TE / row_T1).double() * FIXED_POINT).round().long()
            found["prob_sum_E"] = fixed_TE.masked_fill(~real_T[:, None], 0).sum(0)
        if places_TK1 is not None and "boundary_count" in statistics:
            near_T = real_T & (places_TK1[:, top_k - 1] - places_TK1[:, top_k] <= boundary_width)
            pair_T2 = sorted_topk(biased_TE, top_k + 1)[1][:, top_k - 1 :].masked_fill(~near_T[:, None], -1)
            found["boundary_count_E"] = count_tokens(pair_T2, logits_TE.shape[1], "torch")
        if places_TK1 is not None and "response_histogram" in statistics:
            found["response_histogram_EB"] = response_histogram(biased_TE, chosen_TK, places_TK1, token_mask_T)
        counts_E = count_tokens(ids_TK, logits_TE.shape[1], "torch")
    return Routed(weights_TK, ids_TK.int(), counts_E, **found)


def _check(
    logits_TE: Tensor,
    expert_bias_E: Tensor,
    top_k: int,
    score_function: str,
    token_mask_T: Tensor | None,
    num_groups: int,
    group_top_k: int,
    statistics: AbstractSet[str],
) -> None:
    if logits_TE.dim() != 2 or logits_TE.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        told = f"logits_TE is {logits_TE.dtype} {tuple(logits_TE.shape)}"
        raise ValueError(f"{told}: give bfloat16, float16 or float32 of two dimensions, tokens and experts")
    (tokens, experts), device = logits_TE.shape, logits_TE.device
    for name, given, dtype, size in (
        ("expert_bias_E", expert_bias_E, torch.float32, experts),
        ("token_mask_T", token_mask_T, torch.bool, tokens),
    ):
        if given is not None and (given.dtype != dtype or given.shape != (size,) or given.device != device):
            told = f"{name} is {given.dtype} {tuple(given.shape)} on {given.device}"
            raise ValueError(f"{told}: give {dtype} ({size},) on {device}, as logits_TE is")
    if score_function not in ("sigmoid", "softmax"):
        raise ValueError(f"score_function = {score_function!r} is not known: choose sigmoid or softmax")
    if group_top_k < 1 or num_groups < 1 or experts % num_groups:
        told = f"num_groups = {num_groups} and group_top_k = {group_top_k} do not fit {experts} experts"
        raise ValueError(f"{told}: choose a divisor of the experts, and at least 1 group")
    limited = group_top_k < num_groups
    if limited and experts // num_groups < 2:
        raise ValueError(f"num_groups = {num_groups} leaves 1 expert a group: choose groups of at least 2")
    reach = experts // num_groups * group_top_k if limited else experts
    if not 1 <= top_k <= reach:
        raise ValueError(f"top_k = {top_k} is not within 1 and the {reach} experts in reach: choose at most that many")
    if not statistics <= set(STATISTICS):
        raise ValueError(f"statistics = {sorted(statistics)} has unknown names: choose from {', '.join(STATISTICS)}")
    if statistics & NEED_NEXT and top_k == experts:
        told = f"statistics = {sorted(statistics)} look at the place after the last of top_k = {top_k}"
        raise ValueError(f"{told}: choose at most {experts - 1} of the {experts} experts")


def route(
    logits_TE: Tensor,
    expert_bias_E: Tensor,
    top_k: int,
    score_function: str,
    renormalize: bool = True,
    scaling: float = 1.0,
    token_mask_T: Tensor | None = None,
    num_groups: int = 1,
    group_top_k: int = 1,
    statistics: AbstractSet[str] = frozenset(),
    boundary_width: float = 0.0,
    backend: Backend = "auto",
) -> Routed:
    """Route T tokens and count; see the equations at the top of the file.

    logits_TE bfloat16, float16 or float32; expert_bias_E float32, no gradient; token_mask_T bool, False for padding.
    statistics: of STATISTICS, those to fill. NaN logits rank first; ids stay within the experts. Raises ValueError for other
    dtypes, devices, shapes or backends, for K beyond the experts in reach, and for unknown names.
    """
    limits = num_groups, group_top_k
    _check(logits_TE, expert_bias_E, top_k, score_function, token_mask_T, *limits, statistics)
    settings = score_function, renormalize, float(scaling)
    if not fused(logits_TE, backend):
        return _route_torch(
            logits_TE, expert_bias_E, top_k, *settings, token_mask_T, *limits, statistics, boundary_width
        )
    experts = logits_TE.shape[1]
    widths = {
        "dual_sum": 1,
        "prob_sum": experts,
        "boundary_count": experts,
        "response_histogram": experts * RESPONSE_BINS,
    }
    sizes = [experts, *(width if name in statistics else 0 for name, width in widths.items())]
    mask_T = None if token_mask_T is None else token_mask_T.contiguous()
    weights_TK, ids_TK, counts = route_op(
        logits_TE.contiguous(),
        expert_bias_E.contiguous(),
        mask_T,
        top_k,
        *settings,
        *limits,
        float(boundary_width),
        sizes,
    )
    load_E, dual, prob_E, boundary_E, response = counts.split(sizes)
    return Routed(
        weights_TK,
        ids_TK,
        load_E,
        dual[0] if "dual_sum" in statistics else None,
        prob_E if "prob_sum" in statistics else None,
        boundary_E if "boundary_count" in statistics else None,
        response.view(experts, RESPONSE_BINS) if "response_histogram" in statistics else None,
    )
