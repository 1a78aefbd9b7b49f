"""How the native engine spreads parameters over the data-parallel ranks: every rank a replica (DDP), or every rank a shard
(FSDP2). Gradients are summed, never averaged: the loss is divided by the tokens of all ranks already.

Experts are apart in both: DTensors over ep, and copies (replicate) or shards (shard) over edp.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from moe.model.experts import Experts, local_tensor
from moe.model.transformer import Block, Transformer
from moe.parallel import Ranks


def replicate(model: Transformer, ranks: Ranks) -> DistributedDataParallel:
    """DDP over dp for everything but the experts, whose gradients `sum_expert_gradients` adds up."""
    # Experts differ between ranks, and the weights are the same everywhere from their seeds: DDP must neither
    # broadcast nor reduce them. Buffers are the expert bias, which only the balancer writes.
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
    with warnings.catch_warnings():
        # Its successor, forward_sync_buffers, does not exist in torch 2.11.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        replicated = DistributedDataParallel(
            model,
            process_group=ranks.dp_group,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            init_sync=False,
        )
    replicated.register_comm_hook(ranks.dp_group, _sum_bucket)
    return replicated


def sum_expert_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Add up the gradients of the copies of each expert, in place (replicate only)."""
    if ranks.edp_group is None:
        return
    for parameter in parameters:
        assert parameter.grad is not None, "grouped_gemm gives every expert a gradient"
        dist.all_reduce(local_tensor(parameter.grad), group=ranks.edp_group)


def _sum_bucket(group, bucket):
    # DDP's own reduction averages. No annotations: DDP compares them with its classes, and here they would be strings.
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def shard(model: Transformer, ranks: Ranks) -> None:
    """FSDP2 in place: a block a unit over dp, and inside it the router (float32 always) and the experts (over edp).

    Every backward pass reduces the gradients into shards, those of micro-batches before the last too: gradients that wait
    in full would take as much memory as the parameters that sharding has just saved.
    """
    assert ranks.dp_mesh is not None, "one rank has nothing to shard"
    compute = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
    whole: set[nn.Parameter] = set()  # with edp = 1 an expert is on one rank only: nothing to gather, nothing to sum
    for block in model.blocks:
        assert isinstance(block, Block), "the blocks of a transformer"
        if (moe := block.moe) is not None:
            fully_shard(moe.router, mesh=ranks.dp_mesh, mp_policy=exact)
            if ranks.edp_mesh is None:
                whole |= set(moe.experts.parameters())
            else:
                _shard_experts(moe.experts, ranks.edp_mesh, compute)
        fully_shard(block, mesh=ranks.dp_mesh, mp_policy=compute, ignored_params=whole)
    fully_shard(model, mesh=ranks.dp_mesh, mp_policy=compute, ignored_params=whole)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def _shard_experts(experts: Experts, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    # Whole experts where they go round; else the rows of their matrices. Uneven shards of dimension 0 would leave ranks
    # without any, and FSDP2 takes none of another dimension.
    local = local_tensor(experts.w13).shape[0]
    dim = 0 if local % mesh.size() == 0 else 1
    fully_shard(experts, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda _: Shard(dim))
    register_fsdp_forward_method(experts, "mixture")
