"""The mesh of ranks, and the few collectives that everyone else calls.

dp = all data-parallel ranks; ep divides dp: the ranks that share one copy of the experts; edp = dp / ep: the copies.
Rank r has ep coordinate r % ep, so that an ep group is made of neighbours. With Megatron-core tp neighbours share the dense
matrices, cp groups of those the sequences, and pp blocks of ranks are the stages of a pipeline: then dp is still all ranks, of
which tp * cp * pp see the same sequences, and ep and edp are those of a stage.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.balance.stats import RouterStats, flatten, unflatten


@dataclass(frozen=True)
class BalanceSum:
    """A sum of statistics under way."""

    stats: RouterStats
    stop: bool
    flat: Tensor | None
    work: dist.Work | None

    def wait(self) -> tuple[RouterStats, bool]:
        """The statistics of the global batch, and whether any rank asks to stop."""
        if self.work is None or self.flat is None:
            return self.stats, self.stop
        self.work.wait()
        return unflatten(self.flat[:-1], self.stats), bool(self.flat[-1].item())  # sync: the stop flag, once a step


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. Groups are None where they would have one member."""

    rank: int
    world_size: int
    device: torch.device
    dp_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None
    dp_mesh: DeviceMesh | None = None
    ep_mesh: DeviceMesh | None = None
    edp_mesh: DeviceMesh | None = None
    tp: int = 1
    pp: int = 1
    cp: int = 1

    @property
    def data_size(self) -> int:
        """Shares of a batch."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def data_rank(self) -> int:
        """Which of them this rank sees."""
        return self.rank // (self.tp * self.cp) % self.data_size

    @property
    def first_to_see(self) -> bool:
        """Of the ranks that see the same share, the one that counts its tokens."""
        return self.rank % (self.tp * self.cp) == 0 and self.rank < self.world_size // self.pp

    @property
    def is_main(self) -> bool:
        """The rank that writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks (a new tensor)."""
        return _all_reduce(tensor, self.dp_group)

    def sum_over_ep(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that share the experts (a new tensor)."""
        return _all_reduce(tensor, self.ep_group)

    def start_balance_sum(self, stats: RouterStats, stop: bool = False) -> BalanceSum:
        """Start the one int64 all-reduce of a step, for all layers and fields; the stop flag rides along. It travels
        while the optimizer steps."""
        if self.dp_group is None:
            return BalanceSum(stats, stop, None, None)
        flag = torch.tensor([int(stop)], dtype=torch.int64, device=stats.tokens.device)
        flat = torch.cat([flatten(stats), flag])
        return BalanceSum(stats, stop, flat, dist.all_reduce(flat, group=self.dp_group, async_op=True))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks; they may have different numbers of them."""
        if self.dp_group is None:
            return rows
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=rows.device)
        sizes[self.rank] = len(rows)
        dist.all_reduce(sizes, group=self.dp_group)
        sizes = sizes.tolist()
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(every, padded, group=self.dp_group)
        return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])

    def broadcast_object(self, value: object) -> object:
        """Rank 0's value, on all ranks."""
        box = [value]
        if self.dp_group is not None:
            dist.broadcast_object_list(box, src=0, group=self.dp_group)
        return box[0]

    def gather_objects(self, value: object) -> list:
        """Every rank's value, on every rank."""
        if self.dp_group is None:
            return [value]
        box: list = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.dp_group)
        return box

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.dp_group is not None:
            dist.barrier(group=self.dp_group)


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    tensor = tensor.clone()
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def join_ranks(timeout_s: float = 600.0) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started: (rank, world size, device). Alone, without torchrun: (0, 1, device).

    timeout_s: a collective that takes longer fails.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # Both backends: objects and checkpoints travel over gloo, tensors of the device over NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return rank, world_size, device


def build_ranks(
    rank: int, world_size: int, device: torch.device, ep: int, tp: int = 1, pp: int = 1, cp: int = 1
) -> Ranks:
    """The groups of the (dp, ep) layout. Every rank must call it: groups are made by all ranks together."""
    if world_size == 1:
        return Ranks(rank, world_size, device)
    edp = world_size // (ep * pp)
    mesh = init_device_mesh(device.type, (pp, edp, ep), mesh_dim_names=("pp", "edp", "ep"))
    return Ranks(
        rank,
        world_size,
        device,
        dp_group=dist.group.WORLD,
        ep_group=mesh["ep"].get_group() if ep > 1 else None,
        edp_group=mesh["edp"].get_group() if edp > 1 else None,
        dp_mesh=init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp",)),
        ep_mesh=mesh["ep"] if ep > 1 else None,
        edp_mesh=mesh["edp"] if edp > 1 else None,
        tp=tp,
        pp=pp,
        cp=cp,
    )


class _Flight:
    """An all-to-all under way, forward or backward, and what it must not lose meanwhile."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.work: dist.Work | None = None
        self.buffers: tuple[Tensor, Tensor] | None = None

    def start(self, rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
        received, rows = rows.new_empty(sum(receive), *rows.shape[1:]), rows.contiguous()
        self.work = dist.all_to_all_single(received, rows, receive, send, group=self.group, async_op=True)
        self.buffers = received, rows
        return received

    def land(self) -> Tensor:
        assert self.work is not None and self.buffers is not None, "arrive() follows send_rows(), once"
        self.work.wait()
        received, self.work, self.buffers = self.buffers[0], None, None
        return received


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, receive: list[int], send: list[int], flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(rows, receive, send)

    @staticmethod
    def backward(ctx, _grad: Tensor):
        return ctx.flight.land(), None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received: Tensor, receive: list[int], send: list[int], flight: _Flight) -> Tensor:
        ctx.splits, ctx.flight = (send, receive), flight
        return flight.land()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.flight.start(grad, *ctx.splits)
        return grad, None, None, None  # of no meaning: the gradient is what lands in _Depart


class Journey(NamedTuple):
    """Rows under way between ranks. In the backward pass their gradients leave where they arrived and land where they left:
    what ran meanwhile in the forward pass has its gradient taken meanwhile in the backward pass."""

    received: Tensor
    receive: list[int]
    send: list[int]
    flight: _Flight

    def arrive(self) -> Tensor:
        """Wait (on CUDA: the stream, not the host)."""
        return _Arrive.apply(*self)


def send_rows(rows_RD: Tensor, receive: Sequence[int], send: Sequence[int], group: dist.ProcessGroup) -> Journey:
    """Rows in blocks of send[rank] leave; they arrive in blocks of receive[rank]. Differentiable, any dtype, empty blocks
    allowed."""
    flight = _Flight(group)
    received = _Depart.apply(rows_RD, list(receive), list(send), flight)
    return Journey(received, list(receive), list(send), flight)
