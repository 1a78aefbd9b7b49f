"""Route: the whole router in one pass, its load and the statistics of the balancers included.

The equations are those of kernels/router_topk.py. logits_TE bfloat16, float16 or float32; expert_bias_E float32. With r_k = w_k
(g_k - sum_j g_j w_j / scaling), or w_k g_k without the division by the sum, and g the gradient of the weights w:

    sigmoid: grad logits_k = (1 - s_k) r_k at the chosen, else 0;   softmax: grad logits_e = r_e [e chosen] - s_e sum_k r_k

Saved for backward: logits and ids; the scores are computed again. Integer atomics only: deterministic.
Letters: T tokens, E experts, K experts per token, G groups, B bins of a histogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import fused
from kernels.permute import count_tokens
from kernels.router_topk import (
    FIXED_POINT,
    LOW_BIN,
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


# -- Triton ------------------------------------------------------------------------------------------------------------

_TAKEN = tl.constexpr(-(2**31))  # below the key of every float
_LOWEST = tl.constexpr(-2139095041)  # the key of -inf
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_SMALLEST_SUM = tl.constexpr(SMALLEST_SUM)
_FIXED_POINT = tl.constexpr(FIXED_POINT)
_ROUND = tl.constexpr(1.5 * 2**52)  # added to a float64 below 2**51 and taken off again: rounds half to even
_HALF = tl.constexpr(RESPONSE_BINS // 2)
_FIRST_BIN = tl.constexpr(((LOW_BIN + 127) << 1) - 1)


@triton.jit
def _key(value):
    """int32 in the order of the float32; NaN is the largest, as in torch. No value here is -0.0."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scale(logits, SOFTMAX: tl.constexpr):
    """What the scores of a row share: maximum and sum of the exponentials."""
    peak = tl.max(logits, 1)
    total = peak
    if SOFTMAX:
        total = tl.sum(tl.exp(logits - peak[:, None]), 1)
    return peak[:, None], total[:, None]


@triton.jit
def _score(logits, peak, total, SOFTMAX: tl.constexpr):
    """A logit of -inf, which fills the place of what is not there, scores 0."""
    if SOFTMAX:
        scores = tl.exp(logits - peak) / total
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    return scores


@triton.jit
def _divisor(picked, RENORMALIZE: tl.constexpr):
    """What the chosen scores are divided by, and whether it is their sum. A comparison keeps NaN, tl.maximum does not."""
    total = tl.sum(picked, 1)
    small = total < _TINY
    if RENORMALIZE:
        total = tl.where(small, _TINY, total)
    else:
        total = tl.full(total.shape, 1.0, tl.float32)
    return total[:, None], small[:, None]


@triton.jit
def _fixed(value):
    return (value.to(tl.float64) * _FIXED_POINT + _ROUND - _ROUND).to(tl.int64)


@triton.jit
def _within_reach(
    key, e, SIZE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GROUP_TOP_K: tl.constexpr, BT: tl.constexpr
):
    """key with -inf for the experts outside the best groups; what is no expert stays taken."""
    group, place = e // SIZE, tl.arange(0, GP)
    best = tl.full((BT, GP), _TAKEN, tl.int32)
    for g in range(G):
        own = tl.where((group == g)[None, :], key, _TAKEN)
        first, at = tl.max(own, 1, return_indices=True)
        second = tl.max(tl.where(e[None, :] == at[:, None], _TAKEN, own), 1)
        best = tl.where(place[None, :] == g, _key(_value(first) + _value(second))[:, None], best)
    kept = tl.minimum(key, _LOWEST)
    for _ in range(GROUP_TOP_K):
        at = tl.argmax(best, 1)
        best = tl.where(place[None, :] == at[:, None], _TAKEN, best)
        kept = tl.where(group[None, :] == at[:, None], key, kept)
    return kept


@triton.jit
def _count_dual(dual_ptr, biased, real):
    """Sums in float64 here and below: the same in any order."""
    dual = _fixed(tl.sum(biased.to(tl.float64), 1))
    tl.atomic_add(dual_ptr, tl.sum(tl.where(real, dual, 0), 0), sem="relaxed")


@triton.jit
def _count_prob(prob_ptr, scores, e, expert, there):
    row = tl.sum(scores.to(tl.float64), 1).to(tl.float32)
    row = tl.where(row < _SMALLEST_SUM, _SMALLEST_SUM, row)
    share = _fixed(tl.div_rn(scores, tl.broadcast_to(row[:, None], scores.shape)))
    tl.atomic_add(prob_ptr + e, tl.sum(tl.where(there, share, 0), 0), mask=expert, sem="relaxed")


@triton.jit
def _count_boundary(boundary_ptr, last, last_id, following, following_id, real, width):
    near = real & (_value(last) - _value(following) <= width)
    one = tl.full(near.shape, 1, tl.int64)
    tl.atomic_add(boundary_ptr + last_id, one, mask=near, sem="relaxed")
    tl.atomic_add(boundary_ptr + following_id, one, mask=near, sem="relaxed")


@triton.jit
def _count_response(response_ptr, key, chosen, last, following, e, there):
    """As `response_histogram`."""
    biased = _value(key)
    size = tl.abs(tl.where(chosen, biased - _value(following)[:, None], _value(last)[:, None] - biased))
    bin = (size.to(tl.int32, bitcast=True) >> 22) - _FIRST_BIN
    bin = tl.minimum(tl.maximum(bin, 0), _HALF - 1)
    bin = tl.where(chosen, _HALF + bin, _HALF - 1 - bin)
    one = tl.full(bin.shape, 1, tl.int64)
    tl.atomic_add(response_ptr + e[None, :] * (2 * _HALF) + bin, one, mask=there, sem="relaxed")


@triton.jit
def _route_fwd_kernel(
    logits_ptr, bias_ptr, mask_ptr, weights_ptr, ids_ptr, load_ptr, dual_ptr, prob_ptr, boundary_ptr, response_ptr,
    T, E, scaling, width,
    K: tl.constexpr, KP: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GROUP_TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    t, e, place = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, EP), tl.arange(0, KP)
    token, expert = t < T, e < E
    real = token
    if mask_ptr is not None:
        real = tl.load(mask_ptr + t, mask=token, other=0) != 0
    start = logits_ptr + t.to(tl.int64)[:, None] * E
    logits = tl.load(start + e[None, :], mask=token[:, None] & expert[None, :], other=float("-inf")).to(tl.float32)
    peak, total = _scale(logits, SOFTMAX)
    scores = _score(logits, peak, total, SOFTMAX)
    bias = tl.load(bias_ptr + e, mask=expert, other=0.0)
    key = tl.where(expert[None, :], _key(scores + bias[None, :]), _TAKEN)
    if GROUP_TOP_K < G:
        key = _within_reach(key, e, SIZE, G, GP, GROUP_TOP_K, BT)

    left, ids = key, tl.zeros((BT, KP), tl.int32)
    last, last_id = tl.zeros((BT,), tl.int32), tl.zeros((BT,), tl.int32)
    for k in range(K):
        last, last_id = tl.max(left, 1, return_indices=True)
        left = tl.where(e[None, :] == last_id[:, None], _TAKEN, left)
        ids = tl.where(place[None, :] == k, last_id[:, None], ids)

    pair = t.to(tl.int64)[:, None] * K + place[None, :]
    kept = token[:, None] & (place < K)[None, :]
    # Read again, K values of a row in cache: cheaper than a sum over the row in every round above.
    picked = tl.load(start + ids, mask=kept, other=float("-inf")).to(tl.float32)
    picked = tl.where(kept, _score(picked, peak, total, SOFTMAX), 0.0)
    divisor, _ = _divisor(picked, RENORMALIZE)
    tl.store(weights_ptr + pair, tl.where(real[:, None], picked / divisor * scaling, 0.0), mask=kept)
    tl.store(ids_ptr + pair, tl.where(real[:, None], ids, -1), mask=kept)

    there = real[:, None] & expert[None, :]
    chosen = there & (left == _TAKEN)
    load = tl.sum(chosen.to(tl.int32), 0)
    tl.atomic_add(load_ptr + e, load.to(tl.int64), mask=load > 0, sem="relaxed")
    if dual_ptr is not None:
        lift = tl.load(bias_ptr + ids, mask=kept, other=0.0)
        _count_dual(dual_ptr, tl.where(kept, picked + lift, 0.0), real)
    if prob_ptr is not None:
        _count_prob(prob_ptr, scores, e, expert, there)
    if boundary_ptr is not None or response_ptr is not None:
        following, following_id = tl.max(left, 1, return_indices=True)
        if boundary_ptr is not None:
            _count_boundary(boundary_ptr, last, last_id, following, following_id, real, width)
        if response_ptr is not None:
            _count_response(response_ptr, key, chosen, last, following, e, there)


@triton.jit
def _route_bwd_kernel(
    grad_ptr, logits_ptr, ids_ptr, grad_logits_ptr, T, E, scaling,
    K: tl.constexpr, KP: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr,
    BT: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    t, e, place = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, EP), tl.arange(0, KP)
    token, inside = t < T, (t < T)[:, None] & (e < E)[None, :]
    row = t.to(tl.int64)[:, None] * E
    pair = t.to(tl.int64)[:, None] * K + place[None, :]
    ids = tl.load(ids_ptr + pair, mask=token[:, None] & (place < K)[None, :], other=-1)
    there = ids >= 0
    grad = tl.load(grad_ptr + pair, mask=there, other=0.0) * scaling
    picked = tl.load(logits_ptr + row + ids, mask=there, other=float("-inf")).to(tl.float32)
    scores = tl.zeros((BT, EP), tl.float32)
    peak, total = tl.zeros((BT, 1), tl.float32), tl.zeros((BT, 1), tl.float32)
    if SOFTMAX:
        logits = tl.load(logits_ptr + row + e[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        peak, total = _scale(logits, SOFTMAX)
        scores = _score(logits, peak, total, SOFTMAX)
    picked = tl.where(there, _score(picked, peak, total, SOFTMAX), 0.0)
    divisor, small = _divisor(picked, RENORMALIZE)
    share = picked / divisor  # first: no gradient is divided by a sum near 0
    if RENORMALIZE:
        # The shares sum to 1, so a mean taken off first changes nothing, and nearly equal gradients lose no digits.
        grad -= tl.where(small, 0.0, tl.sum(grad, 1)[:, None] / K)
        grad -= tl.where(small, 0.0, tl.sum(share * grad, 1)[:, None])
    pull = share * grad
    through = pull if SOFTMAX else pull * (1.0 - picked)
    out = tl.zeros((BT, EP), tl.float32)
    for k in range(K):
        here = place[None, :] == k
        at = tl.sum(tl.where(here, ids, 0), 1)[:, None]
        out = tl.where(e[None, :] == at, tl.sum(tl.where(here, through, 0.0), 1)[:, None], out)
    if SOFTMAX:
        masked = tl.max(ids, 1)[:, None] < 0  # padding may hold NaN
        out = tl.where(masked, 0.0, out - scores * tl.sum(pull, 1)[:, None])
    tl.store(grad_logits_ptr + row + e[None, :], out.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def _blocks(num_experts: int) -> tuple[int, int, int]:
    """BT, EP, warps: whole rows, one warp up to 512 values, so that a maximum stays within it. Not tuned: no GPU
    was at hand."""
    block_e = triton.next_power_of_2(num_experts)
    return max(1, 512 // block_e), block_e, max(1, block_e // 512)


def route_forward(
    logits_TE: Tensor,
    expert_bias_E: Tensor,
    token_mask_T: Tensor | None,
    top_k: int,
    score_function: str,
    renormalize: bool,
    scaling: float,
    num_groups: int,
    group_top_k: int,
    boundary_width: float,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel: weights_TK, ids_TK, and the load and the statistics in one int64 vector (one fill), whose
    parts have these sizes; 0: not asked for. Contiguous tensors."""
    tokens, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.float32)
    ids_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.int32)
    counts = logits_TE.new_zeros(sum(sizes), dtype=torch.int64)
    if tokens == 0:
        return weights_TK, ids_TK, counts
    parts = [part if part.numel() else None for part in counts.split(list(sizes))]
    mask_T = None if token_mask_T is None else token_mask_T.view(torch.uint8)
    block_t, block_e, warps = _blocks(num_experts)
    _route_fwd_kernel[(triton.cdiv(tokens, block_t),)](
        logits_TE, expert_bias_E, mask_T, weights_TK, ids_TK, *parts, tokens, num_experts, scaling, boundary_width,
        K=top_k, KP=triton.next_power_of_2(top_k), SIZE=num_experts // num_groups, G=num_groups,
        GP=triton.next_power_of_2(num_groups), GROUP_TOP_K=group_top_k, SOFTMAX=score_function == "softmax",
        RENORMALIZE=renormalize, BT=block_t, EP=block_e, num_warps=warps,
    )  # fmt: skip
    return weights_TK, ids_TK, counts


def route_backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, score_function: str, renormalize: bool, scaling: float
) -> Tensor:
    """Launch the backward kernel: grad_logits_TE. Contiguous tensors."""
    (tokens, num_experts), top_k = logits_TE.shape, ids_TK.shape[1]
    grad_logits_TE = torch.empty_like(logits_TE)
    if tokens == 0:
        return grad_logits_TE
    block_t, block_e, warps = _blocks(num_experts)
    _route_bwd_kernel[(triton.cdiv(tokens, block_t),)](
        grad_TK, logits_TE, ids_TK, grad_logits_TE, tokens, num_experts, scaling,
        K=top_k, KP=triton.next_power_of_2(top_k), SOFTMAX=score_function == "softmax", RENORMALIZE=renormalize,
        BT=block_t, EP=block_e, num_warps=warps,
    )  # fmt: skip
    return grad_logits_TE


_forward = torch.library.custom_op("alf_moe::route", route_forward, mutates_args=())
_backward = torch.library.custom_op("alf_moe::route_backward", route_backward, mutates_args=())


@_forward.register_fake
def _(logits_TE, expert_bias_E, token_mask_T, top_k, *settings):
    pairs = logits_TE.shape[0], top_k
    counts = logits_TE.new_empty(sum(settings[-1]), dtype=torch.int64)
    return logits_TE.new_empty(pairs, dtype=torch.float32), logits_TE.new_empty(pairs, dtype=torch.int32), counts


@_backward.register_fake
def _(grad_TK, logits_TE, *settings):
    return torch.empty_like(logits_TE)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.settings = inputs[4:7]


def _differentiate(ctx, grad_TK, grad_ids_TK, grad_counts):
    return _backward(grad_TK.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 10


_forward.register_autograd(_differentiate, setup_context=_save)


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
            found["boundary_count_E"] = count_tokens(pair_T2, logits_TE.shape[1])
        if places_TK1 is not None and "response_histogram" in statistics:
            found["response_histogram_EB"] = response_histogram(biased_TE, chosen_TK, places_TK1, token_mask_T)
        counts_E = count_tokens(ids_TK, logits_TE.shape[1])
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
) -> Routed:
    """Route T tokens and count; see the equations at the top of the file.

    logits_TE bfloat16, float16 or float32; expert_bias_E float32, no gradient; token_mask_T bool, False for padding.
    statistics: of STATISTICS, those to fill. NaN logits rank first; ids stay within the experts. Raises ValueError for other
    dtypes, devices or shapes, for K beyond the experts in reach, and for unknown names.
    """
    limits = num_groups, group_top_k
    _check(logits_TE, expert_bias_E, top_k, score_function, token_mask_T, *limits, statistics)
    settings = score_function, renormalize, float(scaling)
    if not fused(logits_TE):
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
    weights_TK, ids_TK, counts = _forward(
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
