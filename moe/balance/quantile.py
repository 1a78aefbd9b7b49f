"""Rules that ask each expert's scores for the bias that would balance it: quantile balancing and the coordinate step.

    r_ik = s_ik + b_k - tau_ik            the load response: expert k holds token i iff r_ik > 0 (or = 0 and chosen)
    R_k(d) = #{i : r_ik > -d}             its load if its own bias alone moved by d
    q_k:  R_k(q_k) = L                    the minimiser of the batch dual along b_k

tau_ik is the K-th largest biased score of the *other* experts: the (K+1)-th of all if i chose k, the K-th of all if not.
Published quantile balancing takes the (K+1)-th for everyone (alpha_i); an expert at place K+1 then looks as if it were in.
Letters: T tokens, K experts per token, L MoE layers, E experts, B bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.balance.balancer import BiasRule, State
from moe.balance.bias import target_load
from moe.balance.stats import LOW_BIN, OCTAVES, RESPONSE_BINS, RouterStats


def load_response(biased_TE: Tensor, topk_ids_TK: Tensor) -> Tensor:
    """r_ik [T, E], dtype of biased_TE = s + b. topk_ids_TK: the chosen experts, all valid (no padding), in any order."""
    top_k = topk_ids_TK.shape[-1]
    places = biased_TE.topk(top_k + 1, dim=-1).values
    threshold_TE = places[:, top_k - 1 : top_k].expand_as(biased_TE).scatter(
        -1, topk_ids_TK, places[:, top_k:].expand(-1, top_k)
    )  # fmt: skip
    return biased_TE - threshold_TE


def coordinate_minimiser(response_TE: Tensor, top_k: int) -> Tensor:
    """q [E], exact: minus the midpoint of the floor(L)-th and (floor(L) + 1)-th largest r_ik, L = K T / E."""
    tokens, num_experts = response_TE.shape
    place = tokens * top_k // num_experts  # floor(L), below T because K < E
    ordered_TE = response_TE.sort(dim=0, descending=True).values
    above = ordered_TE[max(place - 1, 0)]  # with L < 1: half way would be infinite
    return -(above + ordered_TE[place]) / 2


def quantile_bias(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """The bias of quantile balancing, exact, not centred: minus the (floor(L) + 1)-th largest of s_ik - alpha_i, alpha_i
    the (K + 1)-th largest of s_i + b (Su Jianlin's MoE series, part 6)."""
    tokens, num_experts = scores_TE.shape
    alpha_T1 = (scores_TE + bias_E).topk(top_k + 1, dim=-1).values[:, top_k:]
    place = tokens * top_k // num_experts
    return -(scores_TE - alpha_T1).topk(place + 1, dim=0).values[place]


# -- the same from histograms ------------------------------------------------------------------------------------------


def response_edges(device: torch.device | str = "cpu") -> Tensor:
    """Edges [B + 1] float64 of the bins of r, ascending: two a power of two, from 2**LOW_BIN to 2**(LOW_BIN + OCTAVES) on
    either side of 0, and one more bin next to 0; what lies outside is in the last bins."""
    steps = torch.arange(2 * OCTAVES + 1, device=device, dtype=torch.float64)
    # An octave [2^m, 2^(m+1)) is cut at 1.5 * 2^m: the highest bit of the mantissa.
    positive = 2.0 ** (LOW_BIN + steps.div(2, rounding_mode="floor")) * torch.where(steps % 2 == 0, 1.0, 1.5)
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def coordinate_minimiser_binned(histogram_LEB: Tensor, target_L1: Tensor) -> Tensor:
    """q [L, E] float64 from the histogram of r (B ascending bins), linear inside a bin.

    The two bins next to 0 are one: which side a tie is on says only who has the lower index. Among tied experts q then
    falls with the number of tokens that tie, whoever got them: the rare ones come first, and their order keeps still.
    """
    half, edges = RESPONSE_BINS // 2, response_edges(histogram_LEB.device)
    below_LEB = histogram_LEB.cumsum(-1)
    total_LE1 = below_LEB[..., -1:]
    # The highest bin such that it and all bins above hold L, in integers: at most total - ceil(L) lie below it.
    room_LE1 = (total_LE1 - target_L1.ceil().long()[..., None]).contiguous()
    index = torch.searchsorted(below_LEB, room_LE1, right=True).clamp_max(RESPONSE_BINS - 1)
    first, last = index - (index == half).long(), index + (index == half - 1).long()
    up_to_last = below_LEB.gather(-1, last)
    inside = up_to_last - below_LEB.gather(-1, (first - 1).clamp_min(0)) * (first > 0)
    above = total_LE1 - up_to_last
    share = ((target_L1[..., None] - above) / inside.clamp_min(1)).clamp(0, 1)
    upper, lower = edges[last + 1], edges[first]
    return -(upper + share * (lower - upper)).squeeze(-1)


def quantile_bias_binned(histogram_LEB: Tensor, low_L: Tensor, high_L: Tensor, top_k: int) -> Tensor:
    """The bias of quantile balancing from B uniform bins of alpha_i - s_ik on [low, high]: its K / E quantile over the
    tokens, linear inside a bin, [L, E] float64 (Kimi K3 report: pooled counts, not averaged quantiles)."""
    bins = histogram_LEB.shape[-1]
    held_LEB = histogram_LEB.cumsum(-1)
    rank_LE1 = held_LEB[..., -1:].double() * top_k / histogram_LEB.shape[1]
    index = torch.searchsorted(held_LEB, rank_LE1.ceil().long()).clamp_max(bins - 1)
    inside = histogram_LEB.gather(-1, index).double()
    share = ((rank_LE1 - held_LEB.gather(-1, index) + inside) / inside.clamp_min(1)).clamp(0, 1)
    width_L1 = (high_L - low_L).double()[:, None] / bins
    return low_L.double()[:, None] + width_L1 * (index + share).squeeze(-1)


# -- the rules ---------------------------------------------------------------------------------------------------------


class Quantile(BiasRule):
    """b += g (b_QB - b): quantile balancing with damping g = `balance.rate`, from the pooled histogram."""

    needs = frozenset({"quantile_histogram"})

    def minimiser(self, stats: RouterStats) -> Tensor:
        """b_QB [L, E]."""
        assert stats.quantile_histogram is not None
        bias = self.bias_LE
        # The bins' range that the routers used: of the bias that routed this batch.
        return quantile_bias_binned(stats.quantile_histogram, bias.amin(-1) - 1, bias.amax(-1) + 1, self.top_k)

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        move_LE = self.minimiser(stats).double() - self.bias_LE.double()
        return move_LE - move_LE.mean(-1, keepdim=True), {}


class Bip(Quantile):
    """BIP-based balancing in causal order (arXiv:2502.15451): one iteration a batch, prices clipped at 0, so b <= 0.

    The published order, which routes a batch with the prices of that batch, is `bip_leaky` of moe/balance/assignment.py.
    """

    needs = frozenset({"bip_histogram"})
    centres = False  # the clip at 0 gives the bias an absolute level

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        assert stats.bip_histogram is not None
        bias = self.bias_LE
        solved_LE = quantile_bias_binned(stats.bip_histogram, bias.amin(-1) - 1, bias.amax(-1) + 1, self.top_k)
        return solved_LE.clamp_max(0) - bias.double(), {}


class Coordinate(BiasRule):
    """b += eta x: the exact coordinate step q, made linear in the load error as far as eta is small (docs/theory.md).

        x_k = q_k c_k^(1 - eta),    c_k = (e_k EMA|q| / EMA|e|) / q_k, at most REACH

    eta = 1, alone on unknown ground, takes q itself. A small eta averages over many batches, and the mean of q, a curved
    function of the error, is not 0 when the mean error is; that of the error is.
    State, per layer: "move_size", "error_size" [L, 1] (EMAs of the mean |q|, |e|: of equal age, so only their ratio counts).
    """

    needs = frozenset({"response_histogram"})
    MEMORY, REACH = 0.9, 4.0

    def initial_state(self, num_layers: int, num_experts: int) -> State:
        return super().initial_state(num_layers, num_experts) | {
            "move_size": torch.zeros(num_layers, 1),
            "error_size": torch.zeros(num_layers, 1),
        }

    def minimiser(self, stats: RouterStats) -> Tensor:
        """q [L, E]."""
        assert stats.response_histogram is not None
        return coordinate_minimiser_binned(stats.response_histogram, target_load(stats.tokens_per_expert))

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        q_LE, s = self.minimiser(stats).double(), self.state
        keep = self.MEMORY
        size = {
            "move_size": keep * s["move_size"].double() + (1 - keep) * q_LE.abs().mean(-1, keepdim=True),
            "error_size": keep * s["error_size"].double() + (1 - keep) * error_LE.abs().mean(-1, keepdim=True),
        }
        slope_L1 = size["move_size"] / size["error_size"].clamp_min(1e-300)
        linear_LE = error_LE * slope_L1
        ratio_LE = (linear_LE.abs() / q_LE.abs().clamp_min(1e-300)).clamp_max(self.REACH)
        return q_LE * ratio_LE ** (1 - rate_L1).clamp(0, 1), size
