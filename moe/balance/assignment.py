"""Routing that solves the batch, and routing that looks at no score: baselines and controls of the comparison.

Pure functions of the scores of one batch; METHODS says of each whether a token's experts may depend on later tokens, and
whether inference routes the same way. All rows are real tokens: the caller takes padding out. Nothing is differentiated;
combine weights come from the unbiased scores, as everywhere. The iterative ones synchronise with the host.
Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.router_topk import topk_lowest_index
from moe.balance.dual import all_finite


class Method(NamedTuple):
    """causal: a token's experts depend on no later token of the batch. matches_inference: a token alone, with the same
    state, gets the same experts. label: one sentence for tables and plots."""

    causal: bool
    matches_inference: bool
    label: str


METHODS: dict[str, Method] = {
    "sinkhorn": Method(False, False, "uses future tokens of the batch; inference is plain top-K"),
    "base": Method(False, False, "uses future tokens of the batch; inference is the best expert"),
    "expert_choice": Method(False, False, "uses future tokens of the batch: experts choose; tokens may get no expert"),
    "bip": Method(True, True, "routes with the prices of the previous batch"),
    "bip_leaky": Method(False, False, "uses future tokens of the batch: routes it with its own prices, as published"),
    "hash": Method(True, True, "looks at the token id only; nothing is learnt"),
}


# -- Sinkhorn ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn_log_plan(logits_TE: Tensor, iterations: int = 100, tolerance: float = 1e-4) -> Tensor:
    """Logarithm of exp(logits) with rows and columns scaled alternately to the sums 1/T and 1/E, [T, E] float64
    (Megatron-core, sinkhorn load balancing).

    Columns are exact; it stops once every row is within `tolerance` (relative), or after `iterations`. In logarithms,
    because exp of a logit above 88 is infinite in float32, and below -103 zero.
    """
    tokens, num_experts = logits_TE.shape
    log_plan_TE = logits_TE.double()
    for _ in range(iterations):
        log_plan_TE = log_plan_TE - log_plan_TE.logsumexp(dim=1, keepdim=True)
        log_plan_TE = log_plan_TE - log_plan_TE.logsumexp(dim=0, keepdim=True)
        rows_T = log_plan_TE.exp().sum(dim=1) * (tokens / num_experts)
        if float((rows_T - 1).abs().max()) <= tolerance:
            break
    return log_plan_TE - math.log(num_experts)


def sinkhorn_route(logits_TE: Tensor, top_k: int, iterations: int = 100, tolerance: float = 1e-4) -> Tensor:
    """Top K of the plan, [T, K] int64. logits_TE float32: the router's logits, not the scores.

    Scaling a row leaves its order alone, so this is a bias on the logits, found from the batch itself.
    """
    return topk_lowest_index(sinkhorn_log_plan(logits_TE, iterations, tolerance), top_k)


# -- BASE --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def base_route(scores_TE: Tensor, eps: float = 1e-3) -> Tensor:
    """One expert per token, at most C = ceil(T / E) tokens per expert, of nearly the largest total score: [T, 1] int64 (BASE
    layers, arXiv:2103.16716). Exactly balanced when E divides T.

    The total is within eps * E * C of the optimum: the auction algorithm for similar objects (Bertsekas and Castanon 1989),
    with eps scaled down from half of the range of the scores. Raises ValueError unless eps > 0 and the scores are finite.
    """
    if not eps > 0:
        raise ValueError(f"eps = {eps} is not positive: choose a small difference of scores, such as 1e-3")
    if not all_finite(scores_TE):
        raise ValueError("scores hold NaN or infinity: base_route needs finite scores")
    tokens, num_experts = scores_TE.shape
    if num_experts == 1 or tokens == 0:
        return torch.zeros(tokens, 1, dtype=torch.int64, device=scores_TE.device)
    capacity = -(-tokens // num_experts)
    # Dummy tokens that like every expert the same fill what stays free. With all places taken, prices may start anywhere,
    # which scaling eps needs.
    values_TE = F.pad(scores_TE.double(), (0, 0, 0, capacity * num_experts - tokens))
    price_E = values_TE.new_zeros(num_experts)
    phase = float(values_TE.max() - values_TE.min()) / 2
    eps = max(eps, phase * 1e-10)  # below the rounding of float64 prices would not rise
    while phase > eps:
        _, price_E = _auction(values_TE, price_E, capacity, phase)
        phase /= 5
    return _auction(values_TE, price_E, capacity, eps)[0][:tokens, None]


def _auction(values_TE: Tensor, start_E: Tensor, capacity: int, eps: float) -> tuple[Tensor, Tensor]:
    """The expert of each token [T] and the prices [E]: no token would gain more than eps by going elsewhere."""
    price_E, floor = start_E, float("-inf")
    expert_T = values_TE.new_full(values_TE.shape[:1], -1, dtype=torch.int64)
    bid_T = values_TE.new_full(values_TE.shape[:1], floor)
    while len(free := (expert_T < 0).nonzero().squeeze(-1)):
        best = (values_TE[free] - price_E).topk(2, dim=-1)
        # What the token could pay until its second best expert is as good, and eps more, so that prices rise.
        expert_T[free] = best.indices[:, 0]
        bid_T[free] = price_E[best.indices[:, 0]] + best.values[:, 0] - best.values[:, 1] + eps
        order = bid_T.sort(descending=True, stable=True).indices
        order = order[expert_T[order].sort(stable=True).indices]  # by expert, the highest bids first
        counts_E = torch.bincount(expert_T, minlength=len(price_E))
        begin_E = counts_E.cumsum(0) - counts_E
        place = torch.arange(len(order), device=order.device) - begin_E[expert_T[order]]
        # A full expert costs its lowest bid that still holds.
        lowest_E = bid_T[order[(begin_E + capacity - 1).clamp_max(len(order) - 1)]]
        price_E = torch.where(counts_E >= capacity, lowest_E, price_E)
        out = order[place >= capacity]
        expert_T[out], bid_T[out] = -1, floor
    return expert_T, price_E


# -- expert choice -----------------------------------------------------------------------------------------------------


class ExpertChoice(NamedTuple):
    """mask_TE bool: expert k took token i. topk_ids_TK int64 [T, E] (K = E): k where it did, -1 elsewhere."""

    mask_TE: Tensor
    topk_ids_TK: Tensor


@torch.no_grad()
def expert_choice_route(scores_TE: Tensor, capacity: int) -> ExpertChoice:
    """Every expert takes its `capacity` best tokens (arXiv:2202.09368; capacity = K T / E), ties to the first
    token. Raises ValueError for a capacity above T."""
    tokens, num_experts = scores_TE.shape
    if not 0 <= capacity <= tokens:
        raise ValueError(f"capacity = {capacity} is not a number of the {tokens} tokens: choose 0 to {tokens}")
    taken_EC = topk_lowest_index(scores_TE.T.contiguous(), capacity)
    mask_TE = torch.zeros(tokens, num_experts, dtype=torch.bool, device=scores_TE.device).scatter(0, taken_EC.T, True)
    expert_E = torch.arange(num_experts, device=scores_TE.device)
    return ExpertChoice(mask_TE, torch.where(mask_TE, expert_E, -1))


# -- BIP ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bip_bias(scores_TE: Tensor, bias_E: Tensor, top_k: int, iterations: int, clip: bool = True) -> Tensor:
    """The bias [E] float32 after `iterations` of BIP-based balancing (arXiv:2502.15451, algorithm 1), from bias_E.

        p_i = the (K + 1)-th largest over k of s_ik - q_k            what the token pays
        q_k = the (floor(K T / E) + 1)-th largest over i of s_ik - p_i       what the expert costs, b = -q

    clip, as published: both are at least 0 (the constraints are <=), so the bias is <= 0. Without it one iteration is
    quantile balancing. Raises ValueError unless 1 <= K < E.
    """
    tokens, num_experts = scores_TE.shape
    if not 1 <= top_k < num_experts:
        raise ValueError(
            f"top_k = {top_k} of {num_experts} experts leaves nothing to balance: choose 1 to {num_experts - 1}"
        )
    place = tokens * top_k // num_experts  # below T because K < E
    bias_E = bias_E.float()
    for _ in range(iterations):
        paid_T1 = (scores_TE + bias_E).topk(top_k + 1, dim=-1).values[:, top_k:]
        if clip:
            paid_T1 = paid_T1.clamp_min(0.0)
        bias_E = -(scores_TE - paid_T1).topk(place + 1, dim=0).values[place]
        if clip:
            bias_E = bias_E.clamp_max(0.0)
    return bias_E


class BipRouting(NamedTuple):
    """topk_ids_TK int64; bias_E float32, for the next batch."""

    topk_ids_TK: Tensor
    bias_E: Tensor


def bip_route(scores_TE: Tensor, bias_E: Tensor, top_k: int, iterations: int, leaky: bool) -> BipRouting:
    """Route a batch, and solve it for the next bias. leaky: "bip_leaky" of METHODS, the published order, which routes the
    batch with what it has just been solved for; else "bip", which routes with `bias_E`. Raises as `bip_bias`."""
    next_E = bip_bias(scores_TE, bias_E, top_k, iterations)
    return BipRouting(topk_lowest_index(scores_TE + (next_E if leaky else bias_E), top_k), next_E)


# -- hash --------------------------------------------------------------------------------------------------------------


def hash_route(token_ids_T: Tensor, num_experts: int, top_k: int, seed: int) -> Tensor:
    """K distinct experts per token id, drawn once and for all by hashing (id, expert, seed): [T, K] int64 (hash layers,
    arXiv:2106.04426, random hashing). token_ids_T: int64 >= 0.

    Uniform over the ids of a large vocabulary; over tokens as uneven as their ids. Raises ValueError unless 1 <= K <= E.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k = {top_k} is not a number of the {num_experts} experts: choose 1 to {num_experts}")
    expert_E = torch.arange(num_experts, device=token_ids_T.device)
    start = _mix64(torch.tensor(seed, dtype=torch.int64, device=token_ids_T.device))
    keys_TE = _mix64(start ^ (token_ids_T.long()[:, None] * num_experts + expert_E))
    return keys_TE.topk(top_k, dim=-1).indices


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, a bijection. Shifts of negative int64 copy the sign: the mask undoes that."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


# -- in a router -------------------------------------------------------------------------------------------------------


class RouterBatch(NamedTuple):
    """What a method may look at, real tokens only: logits_TE, scores_TE float32; token_ids_T int64, for hash alone."""

    logits_TE: Tensor
    scores_TE: Tensor
    token_ids_T: Tensor | None
    top_k: int
    layer: int


def _expert_choice(batch: RouterBatch) -> Tensor:
    tokens, num_experts = batch.scores_TE.shape
    return expert_choice_route(batch.scores_TE, tokens * batch.top_k // num_experts).topk_ids_TK


def _bip_leaky(batch: RouterBatch) -> Tensor:
    start_E = batch.scores_TE.new_zeros(batch.scores_TE.shape[-1])
    return bip_route(batch.scores_TE, start_E, batch.top_k, BIP_ITERATIONS, leaky=True).topk_ids_TK


def _hash(batch: RouterBatch) -> Tensor:
    assert batch.token_ids_T is not None, "the transformer hands the token ids to its routers"
    return hash_route(batch.token_ids_T, batch.scores_TE.shape[-1], batch.top_k, batch.layer)


BIP_ITERATIONS = 4  # published: 2 to 14, 4 in most of the paper's tables

ROUTES: dict[str, Callable[[RouterBatch], Tensor]] = {
    "sinkhorn": lambda batch: sinkhorn_route(batch.logits_TE, batch.top_k),
    "base": lambda batch: base_route(batch.scores_TE.nan_to_num()),  # NaN: the step is skipped, not crashed
    "expert_choice": _expert_choice,
    "bip_leaky": _bip_leaky,
    "hash": _hash,
}
"""topk_ids [T, K] (expert choice: [T, E]) of the methods of `balance.method` that assign a batch by themselves."""


@torch.no_grad()
def assign(method: str, batch: RouterBatch, token_mask_T: Tensor | None) -> Tensor:
    """topk_ids int64 of all tokens, -1 for padding and for no expert. token_mask_T: bool, False for padding."""
    if token_mask_T is None:
        return ROUTES[method](batch)
    real = batch._replace(
        logits_TE=batch.logits_TE[token_mask_T],
        scores_TE=batch.scores_TE[token_mask_T],
        token_ids_T=None if batch.token_ids_T is None else batch.token_ids_T[token_mask_T],
    )
    ids_RK = ROUTES[method](real)
    ids_TK = ids_RK.new_full((len(token_mask_T), ids_RK.shape[-1]), -1)
    ids_TK[token_mask_T] = ids_RK
    return ids_TK
