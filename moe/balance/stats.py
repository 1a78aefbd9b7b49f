"""RouterStats: what a router returns about a batch. Only integer sums: they add exactly over micro-batches and ranks.

Letters: T tokens, K experts per token, L MoE layers, E experts, B bins.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.router_topk import (
    FIXED_POINT,
    LOW_BIN,  # noqa: F401 (moe.balance.quantile reads it here, and the next two)
    OCTAVES,  # noqa: F401
    RESPONSE_BINS,  # noqa: F401
    count_bins,
    response_histogram,
    selection_scores,
)
from moe.balance.losses import token_shares

QUANTILE_BINS = 1000
NEED_PLACES = frozenset({"response_histogram", "quantile_histogram", "bip_histogram"})


class RouterStats(NamedTuple):
    """Int64 tensors, each with a leading L once stacked. Beyond the first two they are None unless asked for.

    tokens []: real tokens routed. tokens_per_expert [E]: the load A_k. dual_sum []: sum_i TopKSum(s_i + b), fixed point.
    prob_sum [E]: sum_i of the scores divided by their sum, fixed point. response_histogram [E, B]: of the load response
    r_ik (`moe.balance.quantile`), ascending; its upper half is A_k. quantile_histogram [E, B]: of alpha_i - s_ik in uniform
    bins on [min b - 1, max b + 1]; bip_histogram [E, B]: the same with alpha_i at least 0. dropped []: pairs that found no room
    under `parallel.dispatch` = padded; the layer fills it in, and the engine takes it out.
    """

    tokens: Tensor
    tokens_per_expert: Tensor
    dual_sum: Tensor | None = None
    prob_sum: Tensor | None = None
    response_histogram: Tensor | None = None
    quantile_histogram: Tensor | None = None
    bip_histogram: Tensor | None = None
    dropped: Tensor | None = None


@torch.no_grad()
def collect(
    needs: Set[str],
    scores_TE: Tensor,
    bias_E: Tensor,
    topk_ids_TK: Tensor,
    counts_E: Tensor,
    token_mask_T: Tensor | None = None,
    num_groups: int = 1,
    group_top_k: int = 1,
    places_TK1: Tensor | None = None,
) -> RouterStats:
    """The statistics of one layer's micro-batch. scores_TE, bias_E: float32. topk_ids_TK: -1 for padding.

    needs: names of the optional fields to fill. places_TK1: the K + 1 largest of scores + bias (of the groups in reach), if
    they are known already; the fields in NEED_PLACES read them. In group-limited routing an expert out of a token's reach
    counts as infinitely far from it: the response is that of the experts' biases while the groups stay.
    """
    top_k = topk_ids_TK.shape[-1]
    tokens = counts_E.new_full((), len(topk_ids_TK)) if token_mask_T is None else token_mask_T.sum()
    stats = RouterStats(tokens, counts_E)
    if not needs:
        return stats
    biased_TE = selection_scores(scores_TE, bias_E, num_groups, group_top_k)
    ids_TK = topk_ids_TK.clamp_min(0).long()
    fields = {}
    if "dual_sum" in needs:
        fields["dual_sum"] = _fixed_point(biased_TE.gather(-1, ids_TK).sum(-1), token_mask_T).sum()
    if "prob_sum" in needs:
        fields["prob_sum"] = _fixed_point(token_shares(scores_TE, token_mask_T), token_mask_T).sum(0)
    if needs & NEED_PLACES:
        if places_TK1 is None:
            places_TK1 = biased_TE.topk(top_k + 1, dim=-1).values
        alpha_T1 = places_TK1[:, top_k:]
        if "response_histogram" in needs:
            fields["response_histogram"] = response_histogram(biased_TE, ids_TK, places_TK1, token_mask_T)
        if "quantile_histogram" in needs:
            fields["quantile_histogram"] = quantile_histogram(biased_TE, bias_E, alpha_T1, token_mask_T)
        if "bip_histogram" in needs:
            fields["bip_histogram"] = quantile_histogram(biased_TE, bias_E, alpha_T1.clamp_min(0.0), token_mask_T)
    return stats._replace(**fields)


def _fixed_point(values: Tensor, mask_T: Tensor | None) -> Tensor:
    fixed = (values.double() * FIXED_POINT).round().long()
    if mask_T is None:
        return fixed
    return torch.where(mask_T.view(-1, *[1] * (fixed.dim() - 1)), fixed, 0)


def quantile_histogram(biased_TE: Tensor, bias_E: Tensor, alpha_T1: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Histogram [E, B] int64 of alpha_i - s_ik, alpha_i the (K + 1)-th largest of s_i + b, on [min b - 1, max b + 1].

    Experts out of reach (biased_TE = -inf) are in the last bin.
    """
    low, high = bias_E.min() - 1, bias_E.max() + 1
    place_TE = (alpha_T1 - (biased_TE - bias_E) - low) * (QUANTILE_BINS / (high - low))
    place_TE = place_TE.nan_to_num_(0.0).clamp_(0, QUANTILE_BINS - 1)  # NaN scores: the step is skipped, not crashed
    return count_bins(place_TE.int(), QUANTILE_BINS, token_mask_T)


def _fields(stats: RouterStats) -> dict[str, Tensor]:
    return {name: value for name, value in stats._asdict().items() if value is not None}


def stack(stats: list[RouterStats]) -> RouterStats:
    """One RouterStats with a leading layer dimension."""
    return RouterStats(**{name: torch.stack([getattr(s, name) for s in stats]) for name in _fields(stats[0])})


def add(a: RouterStats, b: RouterStats) -> RouterStats:
    """The statistics of both micro-batches together."""
    return RouterStats(**{name: value + getattr(b, name) for name, value in _fields(a).items()})


def zeros(num_layers: int, num_experts: int, device: torch.device | str = "cpu") -> RouterStats:
    """The statistics of no token, without optional fields."""
    return RouterStats(
        torch.zeros(num_layers, dtype=torch.int64, device=device),
        torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device),
    )


def nothing(needs: Set[str], bias_E: Tensor, top_k: int, num_groups: int = 1, group_top_k: int = 1) -> RouterStats:
    """The statistics of no token of one layer, with the optional fields that `needs` names."""
    ids_TK = torch.empty(0, top_k, dtype=torch.int64, device=bias_E.device)
    counts_E = torch.zeros_like(bias_E, dtype=torch.int64)
    scores_TE = bias_E.new_empty(0, len(bias_E))
    return collect(needs, scores_TE, bias_E, ids_TK, counts_E, None, num_groups, group_top_k)


def flatten(stats: RouterStats) -> Tensor:
    """One int64 vector, so that all layers and fields travel in one all-reduce."""
    return torch.cat([field.reshape(-1) for field in _fields(stats).values()])


def unflatten(flat: Tensor, like: RouterStats) -> RouterStats:
    """The inverse of `flatten`, in the shapes of `like`."""
    fields = _fields(like)
    parts = flat.split([field.numel() for field in fields.values()])
    return RouterStats(**{name: part.view_as(fields[name]) for part, name in zip(parts, fields, strict=True)})
