"""Regret while training: how far the expert bias is from the best one, per token and in score units (docs/theory.md).

    dynamic  = f_n(b_n) - min_b f_n(b)              of the probed tokens of one step, f = G / T; 0: the bias was optimal
    static   = mean_n f_n(b_n) - min_b mean_n f_n(b)          against the best fixed bias in hindsight
    tax      = mean_i TopKSum(s_i) - sum_k s_ik x_ik          score given up for balance
    margin   = median_i of the K-th less the (K+1)-th s_i + b_n        how firmly the tokens choose

Every `observe.regret_every` steps the scores of the coming batch are read by a forward pass of its own, without gradient
and before anything is updated: training does not see it. The hindsight bias is that of a reservoir, a uniform sample of
all tokens probed so far, each kept with what it got from the bias of its time: with room for every token static regret is
exact. What a rank does at a probe is bounded: many large layers are measured in turn, each keeps its last values.
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
    all_finite,
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
REGRET_FORMAT = 2  # of the state in checkpoints: another one is not read
SCORES_PER_PROBE = 2**17  # a rank's dual problems at a probe: four layers of 16 experts in three probes, or one of 64


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


def layers_of_probe(probe: int, layers: int, scores_per_layer: int, world_size: int) -> range:
    """Of the endless row of layers 0 ... L - 1, 0 ... L - 1, ... those that probe number `probe` measures: at most all, and
    on average so many that a rank solves dual problems of SCORES_PER_PROBE scores. scores_per_layer: (T + R) E."""
    rate = SCORES_PER_PROBE * world_size
    if rate >= layers * scores_per_layer:
        return range(probe * layers, (probe + 1) * layers)
    return range(-(-probe * rate // scores_per_layer), -(-(probe + 1) * rate // scores_per_layer))


def keys_of_probe(seed: int, probe: int, tokens: int) -> Tensor:
    """Uniform random keys [T] float64 of the tokens of a probe, the same on every rank and after a resume."""
    digest = hashlib.sha256(f"{seed}/{probe}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(tokens, generator=rng, dtype=torch.float64)


def curvature(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> float:
    """mu, tokens per score unit: the second-smallest eigenvalue of the boundary Laplacian, window: the lower quartile of the
    margins; 0 when that is 0 (ties)."""
    width = float(margins(scores_TE, bias_E, top_k).quantile(0.25))
    if width <= 0:
        return 0.0
    return max(0.0, float(torch.linalg.eigvalsh(boundary_curvature(scores_TE, bias_E, top_k, width))[1]))


def margins(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """The K-th less the (K+1)-th largest biased score of each token, [T] float64."""
    places = (scores_TE.double() + bias_E.double()).topk(top_k + 1, dim=-1).values
    return places[:, top_k - 1] - places[:, top_k]


def balance_tax(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """mean_i [TopKSum(s_i) - sum_k s_ik x_ik], [...] float64 >= 0. scores [..., T, E], bias [..., E]."""
    scores = scores.double()
    ids = (scores + bias.double()[..., None, :]).topk(top_k, dim=-1).indices
    best = scores.topk(top_k, dim=-1).values
    return (best.sum(-1) - scores.gather(-1, ids).sum(-1)).mean(-1)


class RegretMeter:
    """Takes the probes of a run in. Every rank is given the scores of all ranks and holds the same state, on the CPU; the
    dual problems are shared out by layer and solved on the device of the rank.

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
            "probes_L": torch.zeros(count, dtype=torch.int64),  # that measured the layer
            "last_5L": torch.zeros(5, count, dtype=torch.float64),  # dynamic, balance tax, mu, static, margin
            "sums_3L": torch.zeros(3, count, dtype=torch.float64),  # of the first three
            "best_LE": torch.zeros(count, num_experts, dtype=torch.float64),  # the hindsight bias
            "square_L": torch.zeros(count, dtype=torch.float64),  # max |A - L|^2 over steps, tokens squared
            "keys_R": torch.full((reservoir,), torch.inf, dtype=torch.float64),
            "scores_LRE": torch.zeros(count, reservoir, num_experts),
            "gained_LR": torch.zeros(count, reservoir, dtype=torch.float64),  # TopKSum(s_i + b_n) - K / E sum b_n
            "biases_PLE": torch.zeros(self.MAX_BIASES, count, num_experts),
            "bias_every": torch.ones((), dtype=torch.int64),
        }
        self._fresh = False

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
        if not all_finite(scores_LTE):
            return  # the step that these tokens belong to will be skipped; the scores are the same on all ranks
        s, layers, probe = self.state, len(self.layers), int(self.state["probes"])
        self._keep(scores_LTE.cpu(), bias_LE.cpu())
        scores_per_layer = (scores_LTE.shape[1] + s["scores_LRE"].shape[1]) * self.num_experts
        turn = [n % layers for n in layers_of_probe(probe, layers, scores_per_layer, ranks.world_size)]
        found = torch.zeros(layers, 5 + self.num_experts, dtype=torch.float64, device=ranks.device)
        for layer in turn[ranks.rank :: ranks.world_size]:
            found[layer] = self._measure(layer, scores_LTE[layer].to(ranks.device), bias_LE[layer].to(ranks.device))
        found = ranks.sum(found).cpu()
        s["probes"] += 1
        s["probes_L"][turn] += 1
        s["last_5L"][:, turn] = found[turn, :5].T
        s["sums_3L"][:, turn] += found[turn, :3].T
        s["best_LE"][turn] = found[turn, 5:]
        self._fresh = self._fresh or bool(turn)

    def _measure(self, layer: int, scores_TE: Tensor, bias_E: Tensor) -> Tensor:
        """[5 + E] float64: dynamic regret, balance tax, mu and static regret, per token, margin, and the hindsight bias."""
        s, top_k, tokens = self.state, self.top_k, len(scores_TE)
        filled = int(s["keys_R"].isfinite().sum())
        kept_RE = s["scores_LRE"][layer, :filled].to(scores_TE.device)
        now = solve_dual(scores_TE, top_k, start=bias_E)
        start = s["best_LE"][layer] if int(s["probes_L"][layer]) else now.bias
        best = solve_dual(kept_RE, top_k, start=start.to(scores_TE.device))
        dynamic = (dual_value(scores_TE, bias_E, top_k) - now.value).clamp_min(0) / tokens  # rounding: just below 0
        static = s["gained_LR"][layer, :filled].mean() - float(best.value) / filled
        tax, margin = balance_tax(scores_TE, bias_E, top_k), margins(scores_TE, bias_E, top_k).median()
        mu = curvature(scores_TE, bias_E, top_k) / tokens
        return torch.cat([best.bias.new_tensor([dynamic, tax, mu, static, margin]), best.bias])

    def _keep(self, scores_LTE: Tensor, bias_LE: Tensor) -> None:
        s, probe = self.state, int(self.state["probes"])
        # A token stays when its random key is among the R smallest of all: a uniform sample of everything seen.
        keys_T = keys_of_probe(self.seed, probe, scores_LTE.shape[1])
        room = len(s["keys_R"])
        kept = torch.cat([s["keys_R"], keys_T]).topk(room, largest=False).indices
        come = kept[kept >= room] - room
        stays = torch.zeros(room, dtype=torch.bool).index_fill_(0, kept[kept < room], True) & s["keys_R"].isfinite()
        place = (~stays).nonzero()[: len(come), 0]  # the first free ones: what is filled stays in front
        chosen_LCE = scores_LTE[:, come]
        top_LC = (chosen_LCE.double() + bias_LE.double()[:, None]).topk(self.top_k, dim=-1).values.sum(-1)
        s["keys_R"][place] = keys_T[come]
        s["scores_LRE"][:, place] = chosen_LCE.float()
        s["gained_LR"][:, place] = top_LC - self.top_k / self.num_experts * bias_LE.double().sum(-1, keepdim=True)
        # Every so many biases, so that the list stays short: D is their largest distance from the comparator.
        if probe // int(s["bias_every"]) >= self.MAX_BIASES:
            s["biases_PLE"][: self.MAX_BIASES // 2] = s["biases_PLE"][::2].clone()
            s["bias_every"] *= 2
        if probe % int(s["bias_every"]) == 0:
            s["biases_PLE"][probe // int(s["bias_every"])] = bias_LE

    def metrics(self) -> dict[str, float]:
        """Each layer's last values, their means over its probes; empty when nothing was measured since the last call."""
        fresh, self._fresh = self._fresh, False
        s = self.state
        seen = s["probes_L"].nonzero()[:, 0].tolist()
        if not fresh or not seen:
            return {}
        dynamic, tax, _, static, margin = s["last_5L"]
        means_3L = s["sums_3L"] / s["probes_L"]
        out = self._one("dynamic", dynamic, seen) | self._one("dynamic_mean", means_3L[0], seen)
        out |= self._one("static", static, seen) | self._one("balance_tax", tax, seen)
        out |= self._one("static_sum", static * max(1, int(s["steps"])), seen) | self._one("mu", means_3L[2], seen)
        out["regret/probes"] = float(s["probes"])
        out |= {"moe/topk_margin/min": float(margin[seen].min()), "moe/topk_margin/mean": float(margin[seen].mean())}
        bounds = {index: self.bound(index).value for index in seen}
        covered = all(value is not None and math.isfinite(value) for value in bounds.values())
        if covered:
            bound_L = torch.tensor([bounds.get(index, math.nan) for index in range(len(self.layers))])
            out |= self._one("bound", bound_L.double(), seen)
        return out | {"regret/bound_covers": float(covered)}

    def bound(self, index: int) -> Bound:
        """Of layer number `index`, per token and summed over the steps, as `static_sum`. Added is by how much a minimum over
        the reservoir's tokens is expected to lie below the minimiser of the mean, once for every step."""
        if self.layers[index] in self.section.frozen_layers:
            return Bound(None, NO_BOUND)
        s, T = self.state, self.tokens_per_step
        steps = max(1, int(s["steps"]))
        mu = float(s["sums_3L"][2, index] / s["probes_L"][index]) * T
        stored = (int(s["probes"]) - 1) // int(s["bias_every"]) + 1
        distances = (s["biases_PLE"][:stored, index].double() - s["best_LE"][index]).norm(dim=-1)
        load, gradient = self.top_k * T / self.num_experts, float(s["square_L"][index]) ** 0.5
        found = regret_bound(self.section, load, steps, gradient, mu, float(distances[0]), float(distances.max()))
        if found.value is None:
            return found
        kept = int(s["keys_R"].isfinite().sum())
        # Per token: the sum's is the same for any number.
        gap = hindsight_gap(T, self.num_experts, self.top_k, mu) / kept
        return found._replace(value=found.value / T + steps * gap)

    def _one(self, name: str, value_L: Tensor, seen: list[int]) -> dict[str, float]:
        digits = max(2, len(str(self.layers[-1])))
        values = value_L[seen].tolist()
        out = {f"regret/{name}/max": max(values), f"regret/{name}/mean": sum(values) / len(values)}
        if name in ("dynamic", "static"):
            layers = [self.layers[index] for index in seen]
            out |= {
                f"regret/{name}/layer_{layer:0{digits}d}": value for layer, value in zip(layers, values, strict=True)
            }
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """In the checkpoint."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_dict."""
        self.state = {name: state[name].clone() for name in self.state}
