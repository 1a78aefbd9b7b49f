"""The laboratory: balancing rules on score streams, without a network, with what the theory says beside what happens.

Letters: T tokens, K experts per token, E experts, N batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.permute import count_tokens
from kernels.router_topk import topk_lowest_index
from moe.balance import Balancer, build_balancer
from moe.balance.dual import dual_value, lagrangian_change, solve_dual
from moe.balance.stats import collect, stack
from moe.config import BalanceSection
from moe.observe.regret import curvature, hindsight_gap, regret_bound

POOL = 65_536  # tokens that the best fixed bias in hindsight is computed on, spread over the batches


@dataclass
class Trace:
    """What one rule did on one stream: a value for every batch, as it was routed (before the rule saw it)."""

    maxvio: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    """max_k |A_k - L|, tokens."""
    lagrangian: list[float] = field(default_factory=list)
    """G(b_n) / T, score units per token."""
    square: list[float] = field(default_factory=list)
    """|A - L|^2, tokens squared."""
    bias: list[Tensor] = field(default_factory=list)
    """b_n, float32 [E]."""
    violations: dict[str, int] = field(default_factory=dict)
    """How often a deterministic property of docs/theory.md did not hold (fixed scores only)."""


def simulate(
    batches: Iterable[Tensor], sections: Sequence[BalanceSection], top_k: int, keep: bool = True
) -> tuple[list[Trace], list[Tensor]]:
    """Run every rule on the same batches [T, E] of float32 scores, as training would: the bias from batch n routes n + 1.

    Returns the traces and, with keep, the batches. keep=False leaves out what needs float64 over the batch: only maxvio and
    deviation are filled.
    """
    rules: list[Balancer] = []
    traces = [Trace() for _ in sections]
    kept: list[Tensor] = []
    for scores_TE in batches:
        tokens, experts = scores_TE.shape
        rules = rules or [build_balancer(section, [0], experts, top_k) for section in sections]
        if keep:
            kept.append(scores_TE)
        for rule, trace in zip(rules, traces, strict=True):
            bias_E = rule.bias_LE[0]
            ids_TK = topk_lowest_index(scores_TE + bias_E, top_k)
            counts_E = count_tokens(ids_TK, experts)
            error_E = counts_E.double() - top_k * tokens / experts
            trace.maxvio.append(float(error_E.max()) * experts / (top_k * tokens))
            trace.deviation.append(float(error_E.abs().max()))
            if keep:
                trace.square.append(float(error_E.square().sum()))
                trace.lagrangian.append(float(dual_value(scores_TE, bias_E, top_k)) / tokens)
                trace.bias.append(bias_E.clone())
            rule.step(stack([collect(rule.needs, scores_TE, bias_E, ids_TK, counts_E)]))
    return traces, kept


def check_properties(scores_TE: Tensor, trace: Trace, section: BalanceSection, top_k: int) -> dict[str, int]:
    """Count violations of properties 1, 3, 4 and 5 of docs/theory.md on a run over fixed scores.

    1 (any rule): the change of the Lagrangian is benefit minus payment, to 1e-9 of its size. 3 (any rule): a token that
    leaves k for j has the bias of j moved up at least as far. 4, 5 (sign rule at a constant rate): the band m (E - 1) of
    the loads once it was reached, and the range of the bias.
    """
    tokens, experts = scores_TE.shape
    found = {"1: change of the Lagrangian": 0, "3: preference": 0}
    scores = scores_TE.double()
    loads = []
    for before, after in zip(trace.bias, trace.bias[1:], strict=False):
        change = lagrangian_change(scores, before, after, top_k)
        direct = dual_value(scores, after, top_k) - dual_value(scores, before, top_k)
        scale = max(1.0, float(dual_value(scores, before, top_k).abs()))
        found["1: change of the Lagrangian"] += bool((change.total - direct).abs() > 1e-9 * scale)
        old, new = _chosen(scores, before, top_k), _chosen(scores, after, top_k)
        move_E = (after - before).double()
        left = torch.where(old & ~new, move_E, -torch.inf).amax(-1)  # of the experts left, the one that moved up most
        taken = torch.where(new & ~old, move_E, torch.inf).amin(-1)
        found["3: preference"] += int((left > taken + 1e-12).sum())
        loads.append(old.sum(0).double())
    if section.method == "sign" and section.schedule == "constant" and isinstance(section.rate, float):
        rate = section.rate
        spread = float((scores.amax(-1) - scores.amin(-1)).max())
        band = _crowd(scores, 2 * rate) * (experts - 1)
        start = int((experts - 1) * (1 + spread / (2 * rate))) + 1
        target = top_k * tokens / experts
        late = loads[start:] if start < len(loads) else []
        found[f"4: |A - L| <= {band} after {start} batches"] = sum(bool((a - target).abs().max() > band) for a in late)
        # A float32 bias: its rounding, not the rule's.
        limit = spread + 2 * rate + 1e-5
        found["5: range of the bias"] = sum(float(b.max() - b.min()) > limit for b in trace.bias)
    return found


def _chosen(scores: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    order = (scores + bias_E.double()).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def _crowd(scores: Tensor, width: float) -> int:
    # m: the most tokens in any closed window of this width of the pairwise margins s_ij - s_ik.
    most = 1
    for j in range(scores.shape[1]):
        for k in range(j):
            margin = (scores[:, j] - scores[:, k]).sort().values
            ends = torch.searchsorted(margin, margin + width, right=True)
            most = max(most, int((ends - torch.arange(len(margin))).max()))
    return most


@dataclass
class Regret:
    """Against the best fixed bias in hindsight, per token: the running sum, and the bound where one covers the rule."""

    cumulative: np.ndarray
    bound: np.ndarray | None
    covered: str
    """Which bound, or why none."""
    facts: dict[str, float]


def static_regret(
    batches: Sequence[Tensor], trace: Trace, section: BalanceSection, top_k: int, best_E: Tensor
) -> Regret:
    """Running sum of f_n(b_n) - f_n(b*), / T, and the bound of docs/theory.md with the measured G, D and mu."""
    tokens, experts = batches[0].shape
    own = np.array(trace.lagrangian)
    other = np.array([float(dual_value(batch, best_E, top_k)) / tokens for batch in batches])
    distances = [float((bias.double() - best_E).norm()) for bias in trace.bias]
    facts = {
        "G": max(trace.square) ** 0.5,  # sup_n E |A - L|^2, from one draw of each batch
        "D": max(distances),
        "mu": float(np.mean([curvature(batch, best_E, top_k) for batch in batches[:: max(1, len(batches) // 8)]])),
    }
    load, gap = top_k * tokens / experts, hindsight_gap(tokens, experts, top_k, facts["mu"])
    bounds = [
        regret_bound(section, load, n, facts["G"], facts["mu"], distances[0], facts["D"])
        for n in range(1, len(batches) + 1)
    ]
    values = [bound.value for bound in bounds if bound.value is not None]
    bound = (np.array(values) + gap) / tokens if len(values) == len(bounds) else None
    return Regret(np.cumsum(own - other), bound, bounds[-1].which, facts)


def hindsight_bias(batches: Sequence[Tensor], top_k: int) -> Tensor:
    """b* [E] float64: the best fixed bias for all batches, from at most POOL of their tokens, spread evenly."""
    every = -(-sum(len(batch) for batch in batches) // POOL)
    return solve_dual(torch.cat([batch[::every] for batch in batches]), top_k).bias


def summary(trace: Trace, floor: float, jump_at: int | None = None) -> dict[str, Any]:
    """Early (first 40 batches), late (last quarter) and, after a jump, the 40 batches that follow it: mean MaxVio."""
    vio = np.array(trace.maxvio)
    out = {"early": vio[:40].mean(), "late": vio[-max(1, len(vio) // 4) :].mean()}
    if jump_at is not None:
        out["after"] = vio[jump_at : jump_at + 40].mean()
    return {name: float(value) for name, value in out.items()} | {"late_excess": float(out["late"] - floor)}
