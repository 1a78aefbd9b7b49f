"""The theory of the balancing problem in numbers (docs/theory.md): its dual function, curvature, bounds and optimum.

    G(b) = sum_i TopKSum(s_i + b) - L sum_k b_k,   L = K T / E          convex, piecewise linear
    dG/db_k = A_k(b) - L                                                the load of expert k minus the balanced load

Scores are [..., T, E] and biases [..., E], the leading dimensions the same; any float dtype, computed in float64 on the
device of the scores. Letters: T tokens, E experts, K experts per token, J = K + 1 places, P tokens of a pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def sampling_floor(tokens: int, num_experts: int, top_k: int) -> float:
    """E[max_k A_k / L - 1] when each of T tokens picks K of E experts uniformly at random, L = K T / E: the MaxVio that
    independent tokens have under a perfect but causal bias. Derivation in docs/theory.md.

    Monte-Carlo with a fixed seed (standard error below 1 %). The counts of random K-subsets have variance
    T p (1 - p) and covariance - T p (1 - p) / (E - 1), p = K / E. Independent binomials minus their mean, scaled by
    1 / sqrt(1 - 1/E), have exactly these, and nearly the right skew, at a cost that does not grow with T.
    """
    if tokens <= 0:
        return 0.0
    draws = max(256, min(4096, 2**20 // num_experts))
    counts = np.random.default_rng(0).binomial(tokens, top_k / num_experts, size=(draws, num_experts))
    deviation = (counts - counts.mean(axis=1, keepdims=True)) / np.sqrt(1 - 1 / num_experts)
    return float(deviation.max(axis=1).mean() / (tokens * top_k / num_experts))


# -- the dual function -------------------------------------------------------------------------------------------------


def dual_value(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """G(b) [...] float64, in score units summed over tokens; at least the optimum of the assignment problem, for every b.
    Derivation in docs/theory.md. Raises ValueError unless 1 <= K < E."""
    biased, bias = _biased(scores, bias, top_k), bias.double()
    return biased.topk(top_k, dim=-1).values.sum((-1, -2)) - _target(scores, top_k) * bias.sum(-1)


def dual_gradient(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """A_k(b) - L [..., E] float64, in tokens; ties go to the lowest expert index. It is a sub-gradient of G; ALF-LB steps
    against it (arXiv:2512.03915, section 2). Raises ValueError unless 1 <= K < E."""
    ids = _ranked(_biased(scores, bias, top_k))[1][..., :top_k]
    return _tally(ids.flatten(-2), scores.shape[-1]).double() - _target(scores, top_k)


class LagrangianChange(NamedTuple):
    """benefit, payment, total = benefit - payment: [...] float64, in score units summed over tokens."""

    benefit: Tensor
    payment: Tensor
    total: Tensor


def lagrangian_change(scores: Tensor, bias_before: Tensor, bias_after: Tensor, top_k: int) -> LagrangianChange:
    """The change of the Lagrangian by one bias update: arXiv:2512.03915, theorem 1, for any change D = b' - b.

    benefit = sum_ik (s_ik + b'_k)(x'_ik - x_ik) >= 0 is what the tokens gain by switching, payment = sum_k D_k (L - A_k)
    what the prices charge. total = G(b') - G(b) up to rounding. General form: derivation in docs/theory.md.
    Raises ValueError unless 1 <= K < E.
    """
    before = _ranked(_biased(scores, bias_before, top_k))[1][..., :top_k]
    biased_after = _biased(scores, bias_after, top_k)
    # Per token first: the gains of single tokens are small differences of large numbers.
    gain = biased_after.topk(top_k, dim=-1).values.sum(-1) - biased_after.gather(-1, before).sum(-1)
    load = _tally(before.flatten(-2), scores.shape[-1]).double()
    payment = ((bias_after.double() - bias_before.double()) * (_target(scores, top_k) - load)).sum(-1)
    benefit = gain.sum(-1)
    return LagrangianChange(benefit, payment, benefit - payment)


def _target(scores: Tensor, top_k: int) -> float:
    return scores.shape[-2] * top_k / scores.shape[-1]


def _biased(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    num_experts = scores.shape[-1]
    if not 1 <= top_k < num_experts:
        raise ValueError(
            f"top_k = {top_k} of {num_experts} experts leaves nothing to balance: choose 1 to {num_experts - 1}"
        )
    return scores.double() + bias.double()[..., None, :]


def _ranked(biased: Tensor) -> tuple[Tensor, Tensor]:
    # topk leaves ties open; a stable sort gives them to the lowest index.
    return torch.sort(biased, dim=-1, descending=True, stable=True)


def _tally(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 stands in the last dimension, int64 [..., size]."""
    counts = torch.zeros(*index.shape[:-1], size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(-1, index, torch.ones_like(index))


# -- curvature ---------------------------------------------------------------------------------------------------------


def boundary_curvature(scores: Tensor, bias: Tensor, top_k: int, width: float) -> Tensor:
    """Estimate of the Hessian of E G from one batch, [..., E, E] float64: the Laplacian of the graph on the experts with
    weights (tokens whose K-th and (K+1)-th ranked experts are this pair, at most `width` apart) / (2 width).

    In tokens per score unit. Its rows sum to 0; its second eigenvalue is the strong convexity mu. Derivation in
    docs/theory.md. Raises ValueError unless 1 <= K < E and width > 0.
    """
    pairs, near = _boundary_pairs(scores, bias, top_k, width)
    return _laplacian(pairs, near, scores.shape[-1]) / (2 * width)


def boundary_counts(scores: Tensor, bias: Tensor, top_k: int, width: float) -> Tensor:
    """Tokens with expert k at place K or K + 1 and these two at most `width` apart, [..., E] int64: they add over
    micro-batches and ranks. Derivation in docs/theory.md. Raises ValueError unless 1 <= K < E and width > 0."""
    pairs, near = _boundary_pairs(scores, bias, top_k, width)
    num_experts = scores.shape[-1]
    # Far tokens are counted at an expert that does not exist.
    index = torch.where(near[..., None], pairs, num_experts).flatten(-2)
    return _tally(index, num_experts + 1)[..., :num_experts]


def curvature_diagonal(boundary_count_E: Tensor, width: float) -> Tensor:
    """The diagonal of `boundary_curvature` [..., E] float64, from `boundary_counts` with the same width."""
    return boundary_count_E.double() / (2 * width)


def curvature_iid(tokens: int, num_experts: int, tie_density: float = 1.0) -> float:
    """mu = T phi E / (E - 1), in tokens per score unit, at b = 0 for scores independent over experts. phi is the mean
    density of one expert's score at the boundary, 1 for uniform scores on [0, 1]. Derivation in docs/theory.md."""
    return tokens * tie_density * num_experts / (num_experts - 1)


def _boundary_pairs(scores: Tensor, bias: Tensor, top_k: int, width: float) -> tuple[Tensor, Tensor]:
    """Experts at places K and K + 1 [..., T, 2] int64, and whether they are near each other [..., T] bool."""
    if not width > 0:
        raise ValueError(f"width = {width} is not positive: choose a small margin in score units, such as 0.01")
    values, ids = _ranked(_biased(scores, bias, top_k))
    around = slice(top_k - 1, top_k + 1)
    return ids[..., around], values[..., top_k - 1] - values[..., top_k] <= width


def _laplacian(pairs: Tensor, near: Tensor, num_experts: int) -> Tensor:
    """Graph Laplacian [..., E, E] float64 with the number of near pairs as weights."""
    index = torch.where(near, pairs[..., 0] * num_experts + pairs[..., 1], num_experts**2)
    counts = _tally(index, num_experts**2 + 1)[..., :-1].double().unflatten(-1, (num_experts, num_experts))
    weights = counts + counts.mT
    return torch.diag_embed(weights.sum(-1)) - weights


# -- bounds ------------------------------------------------------------------------------------------------------------

Number = float | Tensor


def gradient_bound(tokens: int, num_experts: int, top_k: int) -> float:
    """G with ||A - L|| <= G for every batch of T tokens: sqrt(T^2 K (E - K) / E), in tokens. Derivation in
    docs/theory.md."""
    return tokens * math.sqrt(top_k * (num_experts - top_k) / num_experts)


def regret_bound_log(G: Number, mu: Number, N: Number, c: Number | None = None) -> Number:
    """Expected regret after N steps of size c / n, in score units summed over tokens: (c G^2 / 2)(1 + ln N).

    G bounds ||A - L||, mu is the strong convexity over the region that the bias visits, c >= 1 / mu (its default).
    The rate is that of arXiv:2512.03915, section 4; constants: derivation in docs/theory.md. Raises ValueError for a
    smaller c.
    """
    if c is None:
        c = 1 / mu
    elif bool(torch.as_tensor(c * mu < 1 - 1e-12).any()):
        raise ValueError(f"c = {c} is below 1 / mu = {1 / mu}, where the bound does not hold: choose at least 1 / mu")
    log_N = N.log() if isinstance(N, Tensor) else math.log(N)
    return c * G**2 / 2 * (1 + log_N)


def regret_bound_sqrt(G: Number, D: Number, N: Number, c: Number) -> Number:
    """Expected regret after N steps of size c / sqrt(n): D^2 sqrt(N) / (2 c) + c G^2 (sqrt(N) - 1/2).

    D = max_n ||b_n - b*||; G, units and source as in `regret_bound_log`. Needs no curvature.
    """
    return D**2 * N**0.5 / (2 * c) + c * G**2 * (N**0.5 - 0.5)


def regret_bound_constant(G: Number, D: Number, N: Number, rate: Number) -> Number:
    """Expected regret after N steps of size `rate`: D^2 / (2 rate) + rate G^2 N / 2, D = ||b_1 - b*||; the rest as in
    `regret_bound_sqrt`."""
    return D**2 / (2 * rate) + rate * G**2 * N / 2


# -- the optimum -------------------------------------------------------------------------------------------------------


class DualSolution(NamedTuple):
    """bias [..., E] float64, sum 0: a minimiser of G. value [...] float64: G there. gap [...] float64 >= 0: the optimum
    of the assignment problem lies in [value - gap, value]. iterations [...] int64: Newton steps on all and on some tokens.
    """

    bias: Tensor
    value: Tensor
    gap: Tensor
    iterations: Tensor


@torch.no_grad()
def solve_dual(scores: Tensor, top_k: int, tol: float = 1e-6, start: Tensor | None = None) -> DualSolution:
    """min_b G(b) of one batch, with a proof: gap <= tol max(1, |value|), unless that is below the rounding of float64.

    value and gap are in score units, summed over tokens. The leading dimensions of scores [..., T, E] are independent
    problems, solved in turn. An interior-point method on the linear program: its primal iterate is a balanced (fractional)
    assignment, whose score is the lower bound. Of many tokens only those whose choice is in doubt take part. Derivation
    in docs/theory.md. start [..., E]: a bias believed to be good, which saves time when it is and costs little when not.
    Raises ValueError unless 1 <= K < E, tol > 0, all scores are finite and start has the shape of a bias.
    """
    if not tol > 0:
        raise ValueError(f"tol = {tol} is not positive: choose a relative accuracy such as 1e-6")
    lead = scores.shape[:-2]
    if start is not None and start.shape != (*lead, scores.shape[-1]):
        raise ValueError(f"start has shape {list(start.shape)}: give one bias per expert, {[*lead, scores.shape[-1]]}")
    layers = scores.double().reshape(math.prod(lead), *scores.shape[-2:])
    starts = [None] * len(layers) if start is None else start.double().reshape(len(layers), -1)
    solved = [_solve_layer(scores_TE, top_k, tol, start_E) for scores_TE, start_E in zip(layers, starts, strict=True)]
    return DualSolution(*(torch.stack(field).reshape(lead + field[0].shape) for field in zip(*solved, strict=True)))


_POOL = 4096  # tokens of the first interior-point solution; all of them up to four times as many
_MAX_STEPS = 200  # saturated softmax scores take 100, others 10 to 30


def _solve_layer(scores_TE: Tensor, top_k: int, tol: float, start_E: Tensor | None = None) -> DualSolution:
    tokens, num_experts = scores_TE.shape
    if start_E is not None and not bool(start_E.isfinite().all()):
        start_E = None
    first_E = scores_TE.new_zeros(num_experts) if start_E is None else start_E - start_E.mean()
    point = _look(scores_TE, first_E, top_k)
    # Not the value alone: a score of -inf outside the top K leaves that finite.
    if not all_finite(scores_TE):
        raise ValueError("the scores hold NaN or infinity: give finite ones")
    if tokens == 0:
        zero = scores_TE.new_zeros(())
        return DualSolution(torch.zeros_like(point.bias_E), zero, zero, zero.long())
    pool, iterations = tokens, 0
    if start_E is not None:
        point, iterations = _newton(scores_TE, point, top_k)
        # In doubt are the tokens that still have to move and those that the way of the last ones leads through.
        pool = min(tokens, 4 * int(point.excess_E.abs().sum()) + 8 * num_experts)
    if pool > 4 * _POOL:
        pool = _POOL
        sample_PE = scores_TE[:: tokens // _POOL]
        load_E = torch.full_like(point.bias_E, len(sample_PE) * top_k / num_experts)
        # Far more exact than the sample: its optimum is about sqrt(E / P) of a score's spread off.
        rough = _interior_point(sample_PE, load_E, top_k, 1e-5 * float(sample_PE.abs().sum()))
        point, steps = _newton(scores_TE, _look(scores_TE, rough.bias_E, top_k), top_k)
        iterations += rough.steps + steps
    lower, last_gap = -math.inf, math.inf
    while True:
        bias_E, found, steps = _solve_pool(scores_TE, point, top_k, pool, tol)
        lower, iterations = max(lower, found), iterations + steps
        solved = _look(scores_TE, bias_E, top_k)
        better = solved.value < point.value
        if better or pool == tokens:
            point = solved
        gap = max(0.0, point.value - lower)
        exact = gap <= tol * max(1.0, abs(point.value))
        # With all tokens, again from there: what a bad start was worth is no measure of how exact to be.
        if exact or (pool == tokens and not gap < last_gap / 4):
            value, steps_taken = point.value, torch.tensor(iterations, device=bias_E.device)
            return DualSolution(point.bias_E, bias_E.new_tensor(value), bias_E.new_tensor(gap), steps_taken)
        # From the better bias fewer tokens are in doubt: the same number of them may do now.
        if not better or not gap < last_gap / 4:
            pool = min(4 * pool, tokens)
        last_gap = gap


class _Point(NamedTuple):
    """What one bias does: G, A - L [E], and per token the K + 1 best experts, biased scores and the boundary margin."""

    bias_E: Tensor
    value: float
    excess_E: Tensor
    places_TJ: Tensor
    ids_TJ: Tensor
    margin_T: Tensor


def _look(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> _Point:
    # topk, four times faster than a stable sort: any tie-break gives a sub-gradient.
    places_TJ, ids_TJ = _biased(scores_TE, bias_E, top_k).topk(top_k + 1, dim=-1)
    target = _target(scores_TE, top_k)
    excess_E = _tally(ids_TJ[:, :top_k].flatten(), len(bias_E)).double() - target
    value = float(places_TJ[:, :top_k].sum() - target * bias_E.sum())
    return _Point(bias_E, value, excess_E, places_TJ, ids_TJ, places_TJ[:, top_k - 1] - places_TJ[:, top_k])


def _newton(scores_TE: Tensor, point: _Point, top_k: int, max_steps: int = 6) -> tuple[_Point, int]:
    """Newton steps on G with a boundary that is blurred over a width, from a good bias: few tokens shall stay in doubt.

    A token at margin m below the width w counts (1 - m / w) / 2 at the expert that it is about to take. This gradient has
    `boundary_curvature` as its Jacobian. The width spans as many tokens as have to move; a failed step narrows it.
    """
    tokens, num_experts = scores_TE.shape
    widest = math.inf
    for step in range(max_steps):
        excess = int(point.excess_E.abs().sum())
        if excess <= 2 * num_experts:
            return point, step
        width = min(widest, float(point.margin_T.kthvalue(min(tokens, 3 * excess // 2)).values))
        if width <= 0:
            return point, step
        near_T = point.margin_T < width
        pairs_T2 = point.ids_TJ[near_T, top_k - 1 :]
        share_T = (1 - point.margin_T[near_T] / width) / 2
        blurred_E = point.excess_E.index_add(0, pairs_T2[:, 0], share_T, alpha=-1).index_add(0, pairs_T2[:, 1], share_T)
        curvature_EE = _laplacian(pairs_T2, near_T[near_T], num_experts) / (2 * width)
        change_E = _solve_laplacian(curvature_EE, -blurred_E, ridge=1e-4)
        # The whole step is what an expert with few tokens at its boundary needs; the limited one is safe.
        for move_E in (change_E, change_E.clamp(-width, width)):
            trial = _look(scores_TE, point.bias_E + move_E, top_k)
            if trial.value < point.value:
                point = trial
                break
        else:
            widest = width / 4
    return point, max_steps


def _solve_laplacian(matrix_EE: Tensor, right_E: Tensor, ridge: float) -> Tensor:
    """The solution of sum 0; `ridge`, relative to the mean diagonal, holds experts that no token connects."""
    scale = matrix_EE.diagonal().mean().clamp_min(1e-300)
    eye_EE = torch.eye(len(right_E), dtype=right_E.dtype, device=right_E.device)
    solution_E = torch.linalg.solve(matrix_EE + scale * (1 / len(right_E) + ridge * eye_EE), right_E)
    return solution_E - solution_E.mean()


def _solve_pool(scores_TE: Tensor, point: _Point, top_k: int, pool: int, tol: float) -> tuple[Tensor, float, int]:
    """The optimum with all but the `pool` tokens of smallest margin left at their top K: bias [E], a lower bound of the
    whole problem's optimum (-inf when the others leave no balanced assignment to the pool), interior-point steps."""
    in_pool_P = point.margin_T.topk(pool, largest=False, sorted=False).indices
    biased_PE = scores_TE[in_pool_P] + point.bias_E
    held_E = _tally(point.ids_TJ[in_pool_P, :top_k].flatten(), scores_TE.shape[1]).double()
    load_E = held_E - point.excess_E
    if not bool(((load_E > 0) & (load_E < pool)).all()):
        return point.bias_E, -math.inf, 0
    limit = 0.1 * tol * max(1.0, abs(point.value))
    best = _interior_point(biased_PE, load_E, top_k, limit)
    gained = float((best.x_PE * biased_PE).sum() - point.places_TJ[in_pool_P, :top_k].sum())
    lower = point.value + gained - _loss_of_sums(biased_PE, best.x_PE, load_E, top_k)
    bias_E = point.bias_E + best.bias_E
    return bias_E - bias_E.mean(), lower, best.steps


def _loss_of_sums(scores_PE: Tensor, x_PE: Tensor, load_E: Tensor, top_k: int) -> float:
    """What x may gain by missing its sums, which rounding does by 1e-12 tokens: to move one costs at most the range of the
    scores."""
    off = float((x_PE.sum(0) - load_E).abs().sum() + (x_PE.sum(1) - top_k).abs().sum())
    return off * float(scores_PE.max() - scores_PE.min())


class _Interior(NamedTuple):
    """x [P, E] in (0, 1) with rows summing to K and columns to the given loads, its prices [E], the steps taken."""

    x_PE: Tensor
    bias_E: Tensor
    steps: int


def _interior_point(scores_PE: Tensor, load_E: Tensor, top_k: int, limit: float) -> _Interior:
    """max sum s x over 0 <= x <= 1, rows K, columns load_E, to a duality gap of `limit`: Mehrotra's predictor-corrector
    method (Wright, Primal-Dual Interior-Point Methods, SIAM 1997, chapter 10).

    u = 1 - x; row prices t, column prices -b; slacks z, w > 0 of x >= 0 and x <= 1 with z - w = t - s - b. The gap is
    sum (x z + u w). Rows are eliminated from a Newton step: what is left is a graph Laplacian on the experts.
    """
    x_PE, u_PE, z_PE, w_PE = _near_start(scores_PE, load_E, top_k, limit) or _far_start(scores_PE, load_E, limit)
    bias_E = torch.zeros_like(load_E)
    for steps in range(_MAX_STEPS + 1):
        gap = _dot(x_PE, z_PE) + _dot(u_PE, w_PE)
        # From a near start x has a way to go to its sums.
        if (gap <= limit and _loss_of_sums(scores_PE, x_PE, load_E, top_k) <= limit) or steps == _MAX_STEPS:
            break
        zx_PE, wu_PE = z_PE / x_PE, w_PE / u_PE
        stiffness_PE = zx_PE + wu_PE
        newton = _newton_system(x_PE, stiffness_PE, load_E, top_k)
        # The predictor has dz = -z (1 + dx / x) and dw = -w (1 - dx / u): its steps and its gap need neither.
        slope_PE = w_PE - z_PE
        dx_PE, _ = newton(slope_PE)
        rx_PE, ru_PE = dx_PE / x_PE, dx_PE / u_PE
        (least_x, most_x), (least_u, most_u) = (torch.stack(r.aminmax()).tolist() for r in (rx_PE, ru_PE))
        primal, dual = 1 / max(1.0, -least_x, most_u), 1 / max(1.0, 1 + most_x, 1 - least_u)
        gained = _dot(dx_PE, slope_PE)
        curved = _dot(dx_PE, stiffness_PE.mul_(dx_PE))
        predicted = (1 - dual) * gap + dual * gained - primal * gained + primal * dual * (gained - curved)
        centre = (predicted / gap) ** 3 * gap / (2 * x_PE.numel())
        # The aims of x z and u w, the predictor's error taken off: (centre - dx dz) / x - z, (centre + dx dw) / u - w.
        aim_z_PE = rx_PE.addcmul_(rx_PE, rx_PE).sub_(1).mul_(z_PE).add_(x_PE.reciprocal(), alpha=centre)
        aim_w_PE = (ru_PE - 1).mul_(ru_PE).sub_(1).mul_(w_PE).add_(u_PE.reciprocal(), alpha=centre)
        dx_PE, db_E = newton(aim_z_PE - aim_w_PE)
        dz_PE, dw_PE = aim_z_PE.addcmul_(zx_PE, dx_PE, value=-1), aim_w_PE.addcmul_(wu_PE, dx_PE)
        primal = 0.99 / max(1.0, -_least(dx_PE, x_PE), _most(dx_PE, u_PE))
        dual = 0.99 / max(1.0, -_least(dz_PE, z_PE), -_least(dw_PE, w_PE))
        if not primal + dual > 1e-9:  # rounding has the last word, or NaN
            break
        x_PE.add_(dx_PE, alpha=primal)
        u_PE.sub_(dx_PE, alpha=primal)
        bias_E.add_(db_E, alpha=dual)
        z_PE.add_(dz_PE, alpha=dual)
        w_PE.add_(dw_PE, alpha=dual)
    return _Interior(x_PE, bias_E, steps)


_Start = tuple[Tensor, Tensor, Tensor, Tensor]  # x, u, z, w


def _far_start(scores_PE: Tensor, load_E: Tensor, limit: float) -> _Start:
    """Where nothing is known: all rows alike, feasible, and both slacks of a pair well inside."""
    x_PE = (load_E / len(scores_PE)).expand_as(scores_PE).clone()
    slack_PE = scores_PE.mean(-1, keepdim=True) - scores_PE
    # Equal scores are solved at once.
    inside = max(float(slack_PE.abs().mean()), limit / (4 * slack_PE.numel()))
    return x_PE, 1 - x_PE, slack_PE.clamp_min(0) + inside, inside - slack_PE.clamp_max(0)


def _near_start(scores_PE: Tensor, load_E: Tensor, top_k: int, limit: float) -> _Start | None:
    """Where the top K have the given loads up to a few tokens: x z = u w = m for all, t halfway between the places K and
    K + 1 and m from the distance of these two. Then z - w = t - s is a quadratic equation for x. Rows and columns are a
    little off; the Newton steps mend that, and a third to a half of them is saved. None elsewhere, where more would be lost.
    """
    places_PJ, ids_PJ = scores_PE.topk(top_k + 1, dim=-1)
    off_E = _tally(ids_PJ[:, :top_k].flatten(), len(load_E)) - load_E
    if float(off_E.abs().sum()) > min(8 * len(off_E), 0.1 * len(scores_PE) * top_k):
        return None
    edges_P2 = places_PJ[:, top_k - 1 :]
    m = max(0.3 * float((edges_P2[:, 0] - edges_P2[:, 1]).mean()), limit / (4 * scores_PE.numel()))
    slack_PE = edges_P2.mean(-1, keepdim=True) - scores_PE
    root_PE = slack_PE.square().add_(4 * m * m).sqrt_()
    x_PE, u_PE = (2 * m / (root_PE + 2 * m + sign * slack_PE) for sign in (1, -1))
    return x_PE, u_PE, m / x_PE, m / u_PE


def _newton_system(
    x_PE: Tensor, stiffness_PE: Tensor, load_E: Tensor, top_k: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Solver of stiffness dx = aim - dt + db for dx [P, E] and db [E] that bring rows to K and columns to load_E."""
    theta_PE = stiffness_PE.reciprocal()
    share_PE = theta_PE / theta_PE.sum(-1, keepdim=True)
    laplacian_EE = theta_PE.sum(0).diag() - share_PE.T @ theta_PE
    lack_P1, lack_E = top_k - x_PE.sum(-1, keepdim=True), load_E - x_PE.sum(0)

    def solve(aim_PE: Tensor) -> tuple[Tensor, Tensor]:
        dx_PE = theta_PE * aim_PE
        dx_PE.addcmul_(share_PE, lack_P1 - dx_PE.sum(-1, keepdim=True))
        db_E = _solve_laplacian(laplacian_EE, lack_E - dx_PE.sum(0), ridge=1e-13)
        return dx_PE.addcmul_(theta_PE, db_E - share_PE @ db_E[:, None]), db_E

    return solve


def all_finite(values: Tensor) -> bool:
    """As isfinite().all(), which is eight times as slow on a CPU; True without elements."""
    return values.numel() == 0 or bool(torch.stack(values.aminmax()).isfinite().all())


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _least(change: Tensor, value: Tensor) -> float:
    return float((change / value).amin())


def _most(change: Tensor, value: Tensor) -> float:
    return float((change / value).amax())
