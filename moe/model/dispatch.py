"""Dispatch and combine: rows to the experts and back over the expert-parallel group. On one rank there is nothing to send:
`kernels.moe_mlp`.

Letters: T tokens, D model dim, E experts, e local experts, K experts per token, R dispatched rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import Backend
from kernels.combine import combine
from kernels.permute import Permutation, permute, regroup, sort_by_expert
from moe.model.router import Routing
from moe.parallel import all_to_all_rows


class Plan(NamedTuple):
    """How to get the rows back. tokens_per_local_expert_e int64; splits are rows per rank of the group."""

    permutation: Permutation
    topk_weights_TK: Tensor
    tokens_per_local_expert_e: Tensor
    local: Permutation
    send_splits: list[int]
    receive_splits: list[int]


class AllToAllDispatcher:
    """Experts in contiguous blocks over the ranks of `group`; uneven all-to-all there and back."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup, backend: Backend = "auto"):
        self.num_experts, self.group = num_experts, group
        self.backend: Backend = backend

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Plan]:
        ep = self.group.size()
        permutation = sort_by_expert(routing.topk_ids_TK, self.num_experts, routing.masked, backend=self.backend)
        send_pe = permutation.counts_E.view(ep, -1)  # rows by (destination rank, its local expert)
        receive_pe = torch.empty_like(send_pe)  # rows by (source rank, my local expert)
        dist.all_to_all_single(receive_pe, send_pe, group=self.group)
        send_splits, receive_splits = torch.stack([send_pe.sum(1), receive_pe.sum(1)]).tolist()  # sync: uneven splits
        rows_RD = permute(x_TD, permutation, self.backend)[
            : sum(send_splits)
        ]  # without the empty rows after those of masked tokens
        rows_RD = all_to_all_rows(rows_RD, receive_splits, send_splits, self.group)
        local = regroup(receive_pe, sum(receive_splits))
        plan = Plan(permutation, routing.topk_weights_TK, local.counts_E, local, send_splits, receive_splits)
        return permute(rows_RD, local, self.backend), plan

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        received = plan.local
        # The inverse of a permutation is a permutation: un-sorting is `permute` with the roles exchanged.
        undo = Permutation(received.inverse_TK[:, 0], received.order_R[:, None], received.counts_E, False)
        rows_RD = permute(rows_RD, undo, self.backend)
        rows_RD = all_to_all_rows(rows_RD, plan.send_splits, plan.receive_splits, self.group)
        return combine(rows_RD, plan.topk_weights_TK, plan.permutation, self.backend)
