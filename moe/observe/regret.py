"""Regret while training: how far the expert bias is from the best one, per token and in score units (docs/theory.md).

    dynamic  = f_n(b_n) - min_b f_n(b)              of the probed tokens of one step, f = G / T; 0: the bias was optimal
    static   = mean_n f_n(b_n) - min_b mean_n f_n(b)          against the best fixed bias in hindsight
    tax      = mean_i TopKSum(s_i) - sum_k s_ik x_ik          score given up for balance

Every `observe.regret_every` steps the scores of the coming batch are read by a forward pass of its own, without gradient
and before anything is updated: training does not see it. The hindsight bias is that of a reservoir, a uniform sample of
all tokens probed so far, each kept with what it got from the bias of its time: with room for every token static regret is
exact.
Letters: L MoE layers, T tokens of a probe, E experts, K experts per token, R tokens of the reservoir, P probes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.balance.dual import (
    boundary_curvature,
    dual_value,
    regret_bound_constant,
    regret_bound_log,
    regret_bound_sqrt,
    solve_dual,
)
from moe.config import BalanceSection
from moe.parallel import Ranks

NO_BOUND = "no bound covers this rule"


class Bound(NamedTuple):
    """Upper bound of the expected regret after N steps, in score units summed over tokens; None where none holds."""

    value: float | None
    which: str
    """The row of the table in docs/theory.md, or why there is none."""


def regret_bound(
    section: BalanceSection, target_load: float, steps: int, gradient: float, mu: float, start: float, widest: float
) -> Bound:
    """The bound that covers a rule, against the minimiser of the mean.

    target_load: L = K T / E of a step, tokens. gradient: G >= |A - L| of every step. mu: strong convexity, tokens per
    score unit. start, widest: |b_1 - b*| and max_n |b_n - b*|. Only `proportional` at a numeric rate without clip, warm-up
    and freezing is online gradient descent: its step is rate / L. The rate of an automatic gain, and the step of any other
    rule, depends on the batch.
    """
    plain = section.method == "proportional" and section.clip is None and not section.warmup_steps
    if not plain or not isinstance(section.rate, float) or section.freeze_step is not None or section.schedule_offset:
        return Bound(None, NO_BOUND)
    step = section.rate / target_load
    if section.schedule == "constant":
        return Bound(float(regret_bound_constant(gradient, start, steps, step)), "constant step")
    if section.schedule == "inverse_sqrt":
        return Bound(float(regret_bound_sqrt(gradient, widest, steps, step)), "step / sqrt(n)")
    if section.schedule == "inverse" and mu > 0 and step * mu >= 1:
        return Bound(float(regret_bound_log(gradient, mu, steps, step)), "step / n")
    if section.schedule == "inverse":
        return Bound(None, f"no bound: the step {step:.3g}/n is below 1/mu = {1 / max(mu, 1e-300):.3g}")
    return Bound(None, NO_BOUND)


def hindsight_gap(tokens: int, num_experts: int, top_k: int, mu: float) -> float:
    """By how much the minimum in hindsight is expected to lie below the minimiser of the mean, independent of the number of
    steps: T K (E - K) / (2 E mu), score units summed over tokens. Derivation in docs/theory.md."""
    return tokens * top_k * (num_experts - top_k) / (2 * num_experts * mu) if mu > 0 else float("inf")


def curvature(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> float:
    """mu, tokens per score unit: the second-smallest eigenvalue of the boundary Laplacian, window: the lower quartile of the
    margins; 0 when that is 0 (ties)."""
    places = (scores_TE.double() + bias_E.double()).topk(top_k + 1, dim=-1).values
    width = float((places[:, top_k - 1] - places[:, top_k]).quantile(0.25))
    if width <= 0:
        return 0.0
    return max(0.0, float(torch.linalg.eigvalsh(boundary_curvature(scores_TE, bias_E, top_k, width))[1]))


def balance_tax(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """mean_i [TopKSum(s_i) - sum_k s_ik x_ik], [...] float64 >= 0. scores [..., T, E], bias [..., E]."""
    scores = scores.double()
    ids = (scores + bias.double()[..., None, :]).topk(top_k, dim=-1).indices
    best = scores.topk(top_k, dim=-1).values
    return (best.sum(-1) - scores.gather(-1, ids).sum(-1)).mean(-1)


class RegretMeter:
    """Takes the probes of a run in. Every rank is given the scores of all ranks and holds the same state, on the CPU; the
    dual problems are shared out by layer.

    layers: global indices, as in LoadTracker. tokens_per_step: T of a training step, for the bounds. reservoir: R.
    probe_tokens: tokens of one probe, over all ranks.
    """

    MAX_BIASES = 256

    def __init__(
        self,
        section: BalanceSection,
        layers: Sequence[int],
        num_experts: int,
        top_k: int,
        tokens_per_step: int,
        reservoir: int,
        seed: int,
        probe_tokens: int,
    ):
        self.section, self.layers, self.top_k, self.tokens_per_step = section, list(layers), top_k, tokens_per_step
        self.num_experts, self.seed, self.probe_tokens = num_experts, seed, probe_tokens
        count = len(self.layers)
        self.state: dict[str, Tensor] = {
            "probes": torch.zeros((), dtype=torch.int64),
            "steps": torch.zeros((), dtype=torch.int64),
            "dynamic_L": torch.zeros(count, dtype=torch.float64),  # sums over probes
            "tax_L": torch.zeros(count, dtype=torch.float64),
            "mu_L": torch.zeros(count, dtype=torch.float64),
            "square_L": torch.zeros(count, dtype=torch.float64),  # max |A - L|^2 over steps, tokens squared
            "keys_R": torch.full((reservoir,), torch.inf, dtype=torch.float64),
            "scores_LRE": torch.zeros(count, reservoir, num_experts),
            "gained_LR": torch.zeros(count, reservoir, dtype=torch.float64),  # TopKSum(s_i + b_n) - K / E sum b_n
            "biases_PLE": torch.zeros(self.MAX_BIASES, count, num_experts),
            "bias_every": torch.ones((), dtype=torch.int64),
        }
        self._last: dict[str, Tensor] = {}

    def count(self, tokens_per_expert_LE: Tensor) -> None:
        """Take the load of an applied step in: the size of the gradient, |A - L|. It stays on the device of the counts."""
        counts_LE = tokens_per_expert_LE.double()
        square_L = (counts_LE - counts_LE.mean(-1, keepdim=True)).square().sum(-1)
        self.state["square_L"] = torch.maximum(self.state["square_L"].to(square_L.device), square_L)
        self.state["steps"] += 1

    @torch.no_grad()
    def observe(self, scores_LTE: Tensor, bias_LE: Tensor, ranks: Ranks) -> None:
        """Take a probe in: a collective. scores_LTE float32: of all ranks' probed tokens, the same on every rank, before the
        step. bias_LE: the bias that will route them."""
        if not bool(scores_LTE.isfinite().all()):
            return  # the step that these tokens belong to will be skipped; the scores are the same on all ranks
        s, top_k = self.state, self.top_k
        scores_LTE, bias_LE = scores_LTE.cpu(), bias_LE.cpu()
        tokens = scores_LTE.shape[1]
        self._keep(scores_LTE, bias_LE)
        filled = int(s["keys_R"].isfinite().sum())
        own = torch.zeros(4, len(self.layers), dtype=torch.float64)
        best_LE = torch.zeros(len(self.layers), self.num_experts, dtype=torch.float64)
        for layer in range(ranks.rank, len(self.layers), ranks.world_size):
            scores_TE, bias_E = scores_LTE[layer], bias_LE[layer]
            regret = dual_value(scores_TE, bias_E, top_k) - solve_dual(scores_TE, top_k).value
            own[0, layer] = regret.clamp_min(0) / tokens  # rounding can leave it just below
            own[1, layer] = balance_tax(scores_TE, bias_E, top_k)
            own[2, layer] = curvature(scores_TE, bias_E, top_k) / tokens
            best = solve_dual(s["scores_LRE"][layer, :filled], top_k)
            own[3, layer] = s["gained_LR"][layer, :filled].mean() - best.value / filled
            best_LE[layer] = best.bias
        device = ranks.device
        own, best_LE = ranks.sum(own.to(device)).cpu(), ranks.sum(best_LE.to(device)).cpu()
        s["probes"] += 1
        for row, name in enumerate(("dynamic_L", "tax_L", "mu_L")):
            s[name] += own[row]
        self._last = {"dynamic": own[0], "tax": own[1], "mu": own[2], "static": own[3], "best_LE": best_LE}

    def _keep(self, scores_LTE: Tensor, bias_LE: Tensor) -> None:
        s, probe = self.state, int(self.state["probes"])
        # A token stays when its random key is among the R smallest of all: a uniform sample of everything seen.
        key = hashlib.sha256(f"{self.seed}/{probe}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        keys_T = torch.rand(scores_LTE.shape[1], generator=rng, dtype=torch.float64)
        places = (scores_LTE.double() + bias_LE.double()[:, None]).topk(self.top_k, dim=-1).values.sum(-1)
        gained_LT = places - self.top_k / self.num_experts * bias_LE.double().sum(-1, keepdim=True)
        keys = torch.cat([s["keys_R"], keys_T])
        kept = keys.topk(len(s["keys_R"]), largest=False, sorted=True).indices
        s["keys_R"] = keys[kept]
        s["scores_LRE"] = torch.cat([s["scores_LRE"], scores_LTE.float()], dim=1)[:, kept]
        s["gained_LR"] = torch.cat([s["gained_LR"], gained_LT], dim=1)[:, kept]
        # Every so many biases, so that the list stays short: D is their largest distance from the comparator.
        if probe // int(s["bias_every"]) >= self.MAX_BIASES:
            s["biases_PLE"][: self.MAX_BIASES // 2] = s["biases_PLE"][::2].clone()
            s["bias_every"] *= 2
        if probe % int(s["bias_every"]) == 0:
            s["biases_PLE"][probe // int(s["bias_every"])] = bias_LE

    def metrics(self) -> dict[str, float]:
        """Values of the last probe and means over all of them; empty before the first one and when they were returned."""
        last, self._last = self._last, {}
        if not last or not self.layers:
            return {}
        probes, steps = int(self.state["probes"]), max(1, int(self.state["steps"]))
        out = self._one("dynamic", last["dynamic"]) | self._one("dynamic_mean", self.state["dynamic_L"] / probes)
        out |= self._one("static", last["static"]) | self._one("balance_tax", last["tax"])
        out |= self._one("static_sum", last["static"] * steps) | self._one("mu", self.state["mu_L"] / probes)
        out["regret/probes"] = float(probes)
        bounds = [self.bound(index, last["best_LE"]) for index in range(len(self.layers))]
        values = [bound.value for bound in bounds if bound.value is not None and math.isfinite(bound.value)]
        covered = len(values) == len(bounds)
        if covered:
            out |= self._one("bound", torch.tensor(values, dtype=torch.float64))
        return out | {"regret/bound_covers": float(covered)}

    def bound(self, index: int, best_LE: Tensor) -> Bound:
        """Of layer number `index`, per token and summed over the steps, as `static_sum`. Added is by how much a minimum over
        the reservoir's tokens is expected to lie below the minimiser of the mean, once for every step."""
        if self.layers[index] in self.section.frozen_layers:
            return Bound(None, NO_BOUND)
        s, T = self.state, self.tokens_per_step
        steps, probes = max(1, int(s["steps"])), int(s["probes"])
        mu = float(s["mu_L"][index]) / probes * T
        stored = (probes - 1) // int(s["bias_every"]) + 1
        distances = (s["biases_PLE"][:stored, index].double() - best_LE[index]).norm(dim=-1)
        load, gradient = self.top_k * T / self.num_experts, float(s["square_L"][index]) ** 0.5
        found = regret_bound(self.section, load, steps, gradient, mu, float(distances[0]), float(distances.max()))
        if found.value is None:
            return found
        kept = int(s["keys_R"].isfinite().sum())
        gap = (
            hindsight_gap(T, self.num_experts, self.top_k, mu) / kept
        )  # per token: the sum's is the same for any number
        return found._replace(value=found.value / T + steps * gap)

    def _one(self, name: str, value_L: Tensor) -> dict[str, float]:
        digits = max(2, len(str(self.layers[-1])))
        layers = zip(self.layers, value_L.tolist(), strict=True)
        out = {f"regret/{name}/max": float(value_L.max()), f"regret/{name}/mean": float(value_L.mean())}
        if name in ("dynamic", "static"):
            out |= {f"regret/{name}/layer_{layer:0{digits}d}": value for layer, value in layers}
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """In the checkpoint."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_dict."""
        self.state = {name: state[name].clone() for name in self.state}
