"""What the ranks that hold copies of Megatron's parameters share of the optimizer: AdamW's state and its work.

With `use_distributed_optimizer` Megatron's DistributedDataParallel keeps parameters and gradients in flat buckets, of which each
rank of a group owns an equal part: gradients are summed into it (reduce-scatter), and updated parameters are gathered from it.
A parameter may lie in two parts; our AdamW updates what a rank owns of it, so that its state and its work are divided.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Piece(NamedTuple):
    """What this rank owns of a parameter: elements begin to end of it, flat, as a leaf that shares its memory (None: nothing),
    and the group that owns all of it."""

    owned: nn.Parameter | None
    begin: int
    end: int
    group: dist.ProcessGroup

    def of(self, tensor: Tensor) -> Tensor:
        """The owned elements of a tensor of the parameter's shape."""
        return tensor.view(-1)[self.begin : self.end]

    def whole(self, own: Tensor | None, parameter: Tensor) -> Tensor:
        """A tensor of the parameter's shape from what each rank of the group has for its elements; a collective."""
        found = torch.zeros_like(parameter, requires_grad=False)
        if own is not None:
            self.of(found).copy_(own)
        dist.all_reduce(found, group=self.group)
        return found


def pieces(gpt: Any) -> dict[nn.Parameter, Piece]:
    """Of every parameter in the buckets of a DistributedDataParallel."""
    found = {}
    for bucket_group in gpt.bucket_groups + gpt.expert_parallel_bucket_groups:
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            data = bucket.param_data
            size = data.numel() // group.size()
            first = group.rank() * size
            for parameter in bucket.params_list:
                # Where it lies, paddings included, which `param_to_index` of 0.16 leaves out.
                at = (parameter.data_ptr() - data.data_ptr()) // data.element_size()
                begin, end = max(at, first) - at, min(at + parameter.numel(), first + size) - at
                owned = nn.Parameter(data[at + begin : at + end]) if begin < end else None
                found[parameter] = Piece(owned, begin, end, group)
    return found
