"""The router: which experts a token visits. Letters: T tokens, D model dim, E experts, K experts per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.permute import count_tokens
from kernels.router_topk import router_topk
from moe.balance import BALANCERS
from moe.balance.losses import aux_loss, z_loss
from moe.balance.stats import RouterStats, collect
from moe.config import BalanceSection, ModelSection


class RouterLosses(NamedTuple):
    """Differentiable terms, float32 scalars, sums over real tokens; zero when their coefficient is zero."""

    aux: Tensor
    z: Tensor


class Routing(NamedTuple):
    """topk_weights_TK float32; topk_ids_TK int64, -1 for padding; the batch's detached statistics and losses.

    masked: some ids may be -1.
    """

    topk_weights_TK: Tensor
    topk_ids_TK: Tensor
    stats: RouterStats
    losses: RouterLosses
    masked: bool


class Router(nn.Module):
    """Gate projection, scores, biased top-K (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    Weight, scores and bias are float32 whatever the rest of the model is in: in bf16 a bias step of 1e-3 doubles for
    |b| in [0.25, 0.5) and is lost above 0.5.
    """

    expert_bias_E: Tensor

    def __init__(self, model: ModelSection, balance: BalanceSection):
        super().__init__()
        self.model, self.balance = model, balance
        self.needs = BALANCERS[balance.method].needs
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.dim, dtype=torch.float32))
        self.register_buffer("expert_bias_E", torch.zeros(model.num_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # .to(bf16), .half() and .bfloat16() change the device here, never the dtype.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, x_TD: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        """x_TD any float dtype; token_mask_T bool, False for padding (None: every token is real)."""
        m = self.model
        logits_TE = F.linear(x_TD.float(), self.weight)
        topk_weights_TK, topk_ids_TK, scores_TE = router_topk(
            logits_TE,
            self.expert_bias_E,
            m.top_k,
            m.score_function,
            m.renormalize,
            m.routed_scaling_factor,
            token_mask_T,
        )
        counts_E = count_tokens(topk_ids_TK, m.num_experts)
        needs = self.needs if self.training else frozenset()
        stats = collect(needs, scores_TE.detach(), self.expert_bias_E, topk_ids_TK, counts_E, token_mask_T)
        losses = self._losses(logits_TE, scores_TE, counts_E, token_mask_T)
        return Routing(topk_weights_TK, topk_ids_TK, stats, losses, token_mask_T is not None)

    def _losses(self, logits_TE: Tensor, scores_TE: Tensor, counts_E: Tensor, mask_T: Tensor | None) -> RouterLosses:
        zero = logits_TE.new_zeros(())
        aux = zero
        if self.balance.aux_loss:
            aux = self.balance.aux_loss * aux_loss(scores_TE, counts_E, self.model.top_k, mask_T)
        z = self.balance.z_loss * z_loss(logits_TE, mask_T) if self.balance.z_loss else zero
        return RouterLosses(aux, z)
