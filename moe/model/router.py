"""The router: scores, the biased choice of experts, and what is counted and penalised about it.

Letters: T tokens, D model dim, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.backend import Backend, fused
from kernels.permute import count_tokens
from kernels.route import STATISTICS, route
from kernels.router_topk import combine_weights, router_scores, router_topk
from moe.balance import BALANCERS
from moe.balance.assignment import ROUTES, RouterBatch, assign
from moe.balance.losses import RouterLosses, router_losses
from moe.balance.stats import NEED_PLACES, RouterStats, collect
from moe.config import Config

IN_ONE_PASS = frozenset(STATISTICS)


class Routing(NamedTuple):
    """topk_weights_TK float32; topk_ids_TK integer, -1 for no expert; scores_TE float32, detached; the batch's detached
    statistics and its losses.

    masked: some ids may be -1.
    """

    topk_weights_TK: Tensor
    topk_ids_TK: Tensor
    scores_TE: Tensor
    stats: RouterStats
    losses: RouterLosses
    masked: bool


class Router(nn.Module):
    """Gate projection, scores, biased top-K (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    Weight, scores and bias are float32 whatever the rest of the model is in: in bf16 a bias step of 1e-3 doubles for
    |b| in [0.25, 0.5) and is lost above 0.5.
    """

    expert_bias_E: Tensor
    ema_share_E: Tensor | None

    def __init__(self, config: Config, layer: int):
        super().__init__()
        m = self.model = config.model
        self.balance, self.seq_len, self.layer = config.balance, config.data.seq_len, layer
        self.kernels: Backend = config.train.kernels
        self.choice = m.top_k, m.score_function, m.renormalize, m.routed_scaling_factor
        self.groups = m.num_groups, m.group_top_k
        self.needs = BALANCERS[self.balance.method].needs_of(self.balance)
        self.weight = nn.Parameter(torch.empty(m.num_experts, m.dim, dtype=torch.float32), requires_grad=m.train_router)
        self.register_buffer("expert_bias_E", torch.zeros(m.num_experts, dtype=torch.float32))
        # A copy of the balancer's, which the checkpoint has.
        shares_E = torch.full((m.num_experts,), 1 / m.num_experts) if self.balance.phi_loss else None
        self.register_buffer("ema_share_E", shares_E, persistent=False)

    def _apply(self, fn, recurse=True):
        # .to(bf16), .half() and .bfloat16() change the device here, never the dtype.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, x_TD: Tensor, token_mask_T: Tensor | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """x_TD any float dtype; token_mask_T bool, False for padding (None: every token is real); token_ids_T int64, which
        only the method hash looks at."""
        m = self.model
        logits_TE = F.linear(x_TD.float(), self.weight)
        needs = self.needs if self.training else frozenset()
        assigned = self.balance.method in ROUTES and (self.training or self.balance.method == "hash")
        if fused(logits_TE, self.kernels) and not assigned:
            weights_TK, ids_TK, scores_TE, stats = self._route_fused(logits_TE, token_mask_T, needs)
        else:
            weights_TK, ids_TK, scores_TE, stats = self._route(logits_TE, token_mask_T, token_ids_T, needs, assigned)
        losses = router_losses(
            self.balance,
            logits_TE,
            scores_TE,
            ids_TK,
            stats.tokens_per_expert,
            token_mask_T,
            self.weight,
            self.ema_share_E,
            self.seq_len,
            m.top_k,
        )
        masked = token_mask_T is not None or ids_TK.shape[-1] != m.top_k  # expert choice has K = E
        return Routing(weights_TK, ids_TK, scores_TE.detach(), stats, losses, masked)

    def _route(
        self,
        logits_TE: Tensor,
        mask_T: Tensor | None,
        token_ids_T: Tensor | None,
        needs: AbstractSet[str],
        assigned: bool,
    ) -> tuple[Tensor, Tensor, Tensor, RouterStats]:
        m, places_TK1 = self.model, None
        if assigned:  # by a method that sees the whole batch
            scores_TE = router_scores(logits_TE, m.score_function)
            batch = RouterBatch(logits_TE.detach(), scores_TE.detach(), token_ids_T, m.top_k, self.layer)
            ids_TK = assign(self.balance.method, batch, mask_T)
            weights_TK = combine_weights(scores_TE, ids_TK, m.renormalize, m.routed_scaling_factor, masked=True)
        else:
            weights_TK, ids_TK, scores_TE, places_TK1 = router_topk(
                logits_TE, self.expert_bias_E, *self.choice, mask_T, *self.groups, places=bool(needs & NEED_PLACES)
            )
        counts_E = count_tokens(ids_TK, m.num_experts, self.kernels)
        scores = scores_TE.detach()
        stats = collect(needs, scores, self.expert_bias_E, ids_TK, counts_E, mask_T, *self.groups, places_TK1)
        return weights_TK, ids_TK, scores_TE, stats

    def _route_fused(
        self, logits_TE: Tensor, mask_T: Tensor | None, needs: AbstractSet[str]
    ) -> tuple[Tensor, Tensor, Tensor, RouterStats]:
        found = route(logits_TE, self.expert_bias_E, *self.choice, mask_T, *self.groups, needs & IN_ONE_PASS)
        scores_TE = router_scores(logits_TE, self.model.score_function)  # for the losses and for who watches
        scores, ids_TK, counts_E = scores_TE.detach(), found.topk_ids_TK, found.tokens_per_expert_E
        stats = collect(needs - IN_ONE_PASS, scores, self.expert_bias_E, ids_TK, counts_E, mask_T, *self.groups)
        stats = stats._replace(
            dual_sum=found.dual_sum, prob_sum=found.prob_sum_E, response_histogram=found.response_histogram_EB
        )
        return found.topk_weights_TK, ids_TK, scores_TE, stats
