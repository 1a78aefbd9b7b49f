"""The sparse layer, as its equation. Letters: T tokens, D model dim, R dispatched rows, e local experts."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.backend import Backend
from kernels.permute import sort_by_expert
from moe.balance.losses import RouterLosses
from moe.balance.stats import RouterStats
from moe.config import Config
from moe.model.dispatch import AllToAllDispatcher, PaddedDispatcher
from moe.model.experts import Experts, SwiGLU
from moe.model.router import Router
from moe.parallel import Ranks


class MoELayer(nn.Module):
    """out = sum_{k in TopK(s + b)} w_k expert_k(x) + shared(x)   (DeepSeekMoE, arXiv:2401.06066, eq. 9)."""

    def __init__(self, config: Config, ranks: Ranks, layer: int):
        super().__init__()
        m = config.model
        self.kernels: Backend = config.train.kernels
        self.router = Router(config, layer)
        self.experts = Experts(m.num_experts, m.dim, m.expert_hidden_dim, ranks.ep_mesh, config.train.kernels)
        self.shared_experts = (
            SwiGLU(m.dim, m.num_shared_experts * m.expert_hidden_dim) if m.num_shared_experts else None
        )
        # None: every expert is on this rank.
        self.dispatcher = self.training_dispatcher = None
        if (group := ranks.ep_group) is not None:
            self.dispatcher = self.training_dispatcher = AllToAllDispatcher(m.num_experts, group, self.kernels)
            if config.parallel.dispatch == "padded":
                self.training_dispatcher = PaddedDispatcher(
                    m.num_experts, group, config.parallel.capacity_factor, self.kernels
                )
        self.exact = False  # the engine sets it, to repeat a step for which padded dispatch had no room
        self.num_experts = m.num_experts

    def forward(
        self, x_TD: Tensor, token_mask_T: Tensor | None = None, token_ids_T: Tensor | None = None
    ) -> tuple[Tensor, RouterStats, RouterLosses]:
        """x_TD -> out_TD, same dtype, with the statistics and losses of this batch; padding gets shared experts only."""
        routing = self.router(x_TD, token_mask_T, token_ids_T)
        dispatcher = self.training_dispatcher if self.training and not self.exact else self.dispatcher
        if dispatcher is None:
            permutation = sort_by_expert(routing.topk_ids_TK, self.num_experts, routing.masked, backend=self.kernels)
            out_TD, stats = self.experts.mixture(x_TD, routing.topk_weights_TK, permutation), routing.stats
            shared_TD = self._shared(x_TD)
        else:
            travelling = dispatcher.dispatch(x_TD, routing)
            shared_TD = self._shared(x_TD)  # while the rows travel
            rows_RD, plan = travelling.arrive()
            rows_RD = self.experts(rows_RD, plan.tokens_per_local_expert_e)
            out_TD, stats = dispatcher.combine(rows_RD, plan), routing.stats._replace(dropped=plan.dropped)
        return out_TD if shared_TD is None else out_TD + shared_TD, stats, routing.losses

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        return None if self.shared_experts is None else self.shared_experts(x_TD)
