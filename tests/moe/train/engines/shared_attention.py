"""Attention over sequences that ranks share, on a CPU: a stand-in for Transformer Engine's, which needs a GPU. Of Megatron-core's
layers it replaces the core attention alone; products, rotary positions and the order of the chunks are theirs.

Letters: B batch, S sequence, s = S / n of it on this rank, H heads, h head dim, n ranks that share a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import Config
from moe.parallel import Ranks
from moe.train.engines import Engine, build_engine


def build_shared(config: Config, ranks: Ranks, eos_id: int) -> Engine:
    """As `build_engine`; with parallel.cp > 1 the stand-in is in the layers."""
    if config.parallel.cp == 1:
        return build_engine(config, ranks, eos_id)
    from moe.train.engines.megatron_core import MegatronEngine

    return MegatronEngine(config, ranks, eos_id, core_attention=SharedAttention)


def order_of(n: int) -> list[int]:
    """The 2 n chunks of a sequence as they lie on the ranks one after the other: the first and the last on rank 0."""
    return [chunk for rank in range(n) for chunk in (rank, 2 * n - 1 - rank)]


def part_of(whole_BSX: Tensor, rank: int, n: int) -> Tensor:
    """What rank `rank` of n has of each sequence, s of S along dimension 1."""
    chunks = whole_BSX.unflatten(1, (2 * n, -1))
    return chunks[:, order_of(n)].chunk(n, dim=1)[rank].flatten(1, 2)


class SharedAttention(nn.Module):
    """Queries of this rank against the keys and values of all: softmax over the positions up to each query's own."""

    def __init__(self, *_: Any, softmax_scale: float | None = None, pg_collection: Any, **__: Any):
        super().__init__()
        self.group, self.scale = pg_collection.cp, softmax_scale

    def forward(self, query_sBHh: Tensor, key_sBHh: Tensor, value_sBHh: Tensor, *_: Any, **__: Any) -> Tensor:
        """[s, B, H * h]; H of keys and values divides that of queries."""
        n, seq = self.group.size(), len(query_sBHh) * self.group.size()
        position_S = torch.cat([torch.arange(seq).chunk(2 * n)[chunk] for chunk in order_of(n)])
        seen_sS = position_S.chunk(n)[self.group.rank()][:, None] >= position_S
        key, value = (_Gather.apply(part, self.group).permute(1, 2, 0, 3) for part in (key_sBHh, value_sBHh))
        query = query_sBHh.permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(query, key, value, seen_sS, scale=self.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class _Gather(torch.autograd.Function):
    # What each rank's queries want of the keys is added up on the rank that has the keys.
    @staticmethod
    def forward(ctx, part_sX: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        every = [torch.empty_like(part_sX, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(every, part_sX.contiguous(), group=group)
        return torch.cat(every)

    @staticmethod
    def backward(ctx, grad_SX: Tensor):
        grad_SX = grad_SX.contiguous().clone()
        dist.all_reduce(grad_SX, group=ctx.group)
        return grad_SX.chunk(ctx.group.size())[ctx.group.rank()], None
