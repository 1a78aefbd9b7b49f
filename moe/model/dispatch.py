"""Dispatch and combine: rows to the experts and back over the expert-parallel group. On one rank there is nothing to send:
`kernels.moe_mlp`.

    travelling = dispatcher.dispatch(x_TD, routing)     # the rows leave
    ...                                                 # whatever needs neither rows nor experts runs meanwhile
    rows_RD, plan = travelling.arrive()                 # in the order of the local experts
    out_TD = dispatcher.combine(experts(rows_RD, plan.tokens_per_local_expert_e), plan)

Letters: T tokens, D model dim, E experts, e local experts, K experts per token, R dispatched rows, p ranks of the group,
C rows of capacity, S = p * C slots.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import Backend
from kernels.combine import combine
from kernels.permute import Permutation, permute, regroup, sort_by_expert
from moe.model.router import Routing
from moe.parallel import Journey, send_rows


class Plan(NamedTuple):
    """How to get the rows back. tokens_per_local_expert_e int64; splits are rows per rank of the group; packing: rows to
    slots, None where blocks have the size of their content; dropped int64 []: pairs of this rank without a slot."""

    permutation: Permutation
    topk_weights_TK: Tensor
    tokens_per_local_expert_e: Tensor
    local: Permutation
    send_splits: list[int]
    receive_splits: list[int]
    packing: Permutation | None = None
    dropped: Tensor | None = None


class Travelling(NamedTuple):
    """Rows on their way to the experts."""

    journey: Journey
    plan: Plan

    def arrive(self) -> tuple[Tensor, Plan]:
        """rows_RD sorted by local expert, and the plan of their way back."""
        return permute(self.journey.arrive(), self.plan.local), self.plan


class AllToAllDispatcher:
    """Experts in contiguous blocks over the ranks of `group`. Exact: every block is as large as its content, which the host
    has to know: one device-to-host wait a layer."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup, backend: Backend = "auto"):
        self.num_experts, self.group = num_experts, group
        self.backend: Backend = backend

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Travelling:
        permutation = sort_by_expert(routing.topk_ids_TK, self.num_experts, routing.masked, backend=self.backend)
        send_pe = permutation.counts_E.view(self.group.size(), -1)  # rows by (destination rank, its local expert)
        receive_pe = self._exchange(send_pe)
        send_splits, receive_splits = torch.stack([send_pe.sum(1), receive_pe.sum(1)]).tolist()  # sync: uneven splits
        rows_RD = permute(x_TD, permutation, self.backend)[
            : sum(send_splits)
        ]  # without the empty rows after those of masked tokens
        journey = send_rows(rows_RD, receive_splits, send_splits, self.group)
        local = regroup(receive_pe, sum(receive_splits))
        return Travelling(
            journey, Plan(permutation, routing.topk_weights_TK, local.counts_E, local, send_splits, receive_splits)
        )

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        rows_RD = permute(rows_RD, _inverse(plan.local), self.backend)
        rows_RD = send_rows(rows_RD, plan.send_splits, plan.receive_splits, self.group).arrive()
        if plan.packing is not None:
            rows_RD = permute(rows_RD, _inverse(plan.packing), self.backend)  # zeros for pairs without a slot
        return combine(rows_RD, plan.topk_weights_TK, plan.permutation, self.backend)

    def _exchange(self, send_pe: Tensor) -> Tensor:
        """Rows by (source rank, my local expert), from rows by (destination rank, its local expert)."""
        receive_pe = torch.empty_like(send_pe)
        dist.all_to_all_single(receive_pe, send_pe, group=self.group)
        return receive_pe


class PaddedDispatcher(AllToAllDispatcher):
    """Every pair of ranks exchanges C = capacity_factor * T * K / p rows, filled or not (at most as many as can be needed):
    the host waits for nothing. Pairs beyond C are dropped, the last ones of the destination's last experts, and counted;
    whoever calls decides what becomes of the step. All ranks must bring the same T."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup, capacity_factor: float, backend: Backend = "auto"):
        super().__init__(num_experts, group, backend)
        self.capacity_factor = capacity_factor

    def capacity(self, tokens: int, top_k: int) -> int:
        """C."""
        ranks = self.group.size()
        return min(
            math.ceil(self.capacity_factor * tokens * top_k / ranks), tokens * min(top_k, self.num_experts // ranks)
        )

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Travelling:
        permutation = sort_by_expert(routing.topk_ids_TK, self.num_experts, routing.masked, backend=self.backend)
        wanted_pe = permutation.counts_E.view(self.group.size(), -1)
        capacity = self.capacity(*routing.topk_ids_TK.shape)
        packing, send_pe = pack(wanted_pe, len(permutation.order_R), capacity)
        receive_pe = self._exchange(send_pe)
        splits = [capacity] * self.group.size()
        journey = send_rows(
            permute(permute(x_TD, permutation, self.backend), packing, self.backend), splits, splits, self.group
        )
        local = unpack(receive_pe, capacity)
        dropped = (wanted_pe - send_pe).sum()
        return Travelling(
            journey,
            Plan(permutation, routing.topk_weights_TK, local.counts_E, local, splits, splits, packing, dropped),
        )


def pack(counts_pe: Tensor, rows: int, capacity: int) -> tuple[Permutation, Tensor]:
    """From rows sorted by (rank, expert) to slots, `capacity` a rank, and the counts of the rows that found one.

    counts_pe int64: rows of each block; rows: their sum or more (rows after the last block go nowhere). No host sync.
    """
    size_p1 = counts_pe.sum(1, keepdim=True)
    slot_C = torch.arange(capacity, device=counts_pe.device)
    order_S = torch.where(slot_C < size_p1, size_p1.cumsum(0) - size_p1 + slot_C, -1).flatten()
    ends_pe = counts_pe.cumsum(1)
    kept_pe = ends_pe.clamp(max=capacity) - (ends_pe - counts_pe).clamp(max=capacity)
    return Permutation(order_S, _invert(order_S, rows)[:, None], counts_pe.flatten(), True, True), kept_pe


def unpack(counts_pe: Tensor, capacity: int) -> Permutation:
    """From slots as they arrive, each rank's filled from its first one in blocks of my experts, to (expert, rank) order;
    empty slots go nowhere, and as many rows of zeros follow the last expert's. No host sync."""
    ranks, experts = counts_pe.shape
    ends_pe = counts_pe.cumsum(1)
    slot_pC = torch.arange(capacity, device=counts_pe.device).expand(ranks, capacity).contiguous()
    expert_pC = torch.searchsorted(ends_pe, slot_pC, right=True)
    counts_ep = counts_pe.T.contiguous()
    shift_pe = (counts_ep.flatten().cumsum(0).view_as(counts_ep) - counts_ep).T - (ends_pe - counts_pe)
    to_pC = slot_pC + shift_pe.gather(1, expert_pC.clamp(max=experts - 1))
    to_S = torch.where(expert_pC < experts, to_pC, -1).flatten()
    return Permutation(_invert(to_S, ranks * capacity), to_S[:, None], counts_pe.sum(0), True, True)


def _invert(index: Tensor, size: int) -> Tensor:
    """Where each of `size` numbers stands in `index`, whose other entries are -1; -1 where it does not."""
    found = index.new_full((size + 1,), -1)
    found.scatter_(0, torch.where(index < 0, size, index), torch.arange(len(index), device=index.device))
    return found[:size]


def _inverse(p: Permutation) -> Permutation:
    """The way back of rows that each are one token (K = 1): `permute` with the roles exchanged."""
    return Permutation(p.inverse_TK[:, 0], p.order_R[:, None], p.counts_E, masked=p.padded, padded=p.masked)
