"""The kernels of `route`, their launchers and operators. The equations, the reference and what is saved are in kernels/route.py.

Letters: T tokens, E experts, K experts per token, G groups, B bins of a histogram.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.router_topk import FIXED_POINT, LOW_BIN, RESPONSE_BINS, SMALLEST_SUM

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


# Registered as operators: a compiled model keeps them without a graph break.
route_op = torch.library.custom_op("alf_moe::route", route_forward, mutates_args=())
_backward = torch.library.custom_op("alf_moe::route_backward", route_backward, mutates_args=())


@route_op.register_fake
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


route_op.register_autograd(_differentiate, setup_context=_save)
