"""What of the Megatron-core engine depends on Megatron's version: its process groups, our settings in its words, and our router
and norm in its layers. For megatron-core 0.16.1, the newest for Python 3.11, and 0.19.2; where they differ a comment names the
version.

Letters: B batch, S sequence, T = B * S tokens, D model dim, E experts, K experts per token.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from moe.balance.losses import RouterLosses
from moe.balance.stats import RouterStats
from moe.config import Config
from moe.model.router import Router
from moe.model.transformer import RMSNorm
from moe.parallel import Ranks

# The narrowest recomputation that Megatron has, and the widest.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def start_megatron(config: Config, ranks: Ranks) -> None:
    """Megatron's process groups and random generators, once in a process."""
    if not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        # Its default order of ranks is ours: tp, cp, dp, pp from the innermost; neighbours share the experts.
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.parallel.tp,
            pipeline_model_parallel_size=config.parallel.pp,
            context_parallel_size=config.parallel.cp,
            expert_model_parallel_size=config.parallel.ep,
            expert_tensor_parallel_size=1,
        )
        if ranks.device.type == "cuda":
            model_parallel_cuda_manual_seed(config.run.seed)
        else:
            initialize_rng_tracker(inference_rng_tracker=True)
    layout = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    p = config.parallel
    assert layout == (p.tp, p.pp, p.cp, p.ep), "one layout a process"


def tensor_group() -> dist.ProcessGroup | None:
    """The ranks of parallel.tp; None for one."""
    group: Any = parallel_state.get_tensor_model_parallel_group()
    return group if group.size() > 1 else None


def own_chunks(whole_BS: Tensor) -> Tensor:
    """What this rank of parallel.cp = n has of each sequence, in order: chunks r and 2 n - 1 - r of 2 n, [B, S / n]. Under a
    causal mask all ranks have as much to do; Megatron divides rotary positions in the same way (get_pos_emb_on_this_cp_rank)."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return whole_BS
    chunks = whole_BS.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim=1)


def uses_transformer_engine(device: torch.device) -> bool:
    """Whether the layers are Transformer Engine's."""
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """Our settings in Megatron's words; `moe.config.limits` has refused those that it has none for."""
    m, p = config.model, config.parallel
    shared = m.num_shared_experts * m.expert_hidden_dim
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.dim,
        num_attention_heads=m.num_heads,
        num_query_groups=m.num_kv_heads,
        kv_channels=m.head_dim,
        ffn_hidden_size=m.dense_hidden_dim,
        num_moe_experts=m.num_experts,
        moe_ffn_hidden_size=m.expert_hidden_dim,
        moe_router_topk=m.top_k,
        moe_layer_freq=[int(layer >= m.first_k_dense) for layer in range(m.num_layers)],
        moe_shared_expert_intermediate_size=shared or None,
        moe_router_load_balancing_type="none",  # all of it is our router's
        moe_aux_loss_coeff=0.0,
        moe_grouped_gemm=uses_transformer_engine(device),
        # The all-to-all of 0.16 uses CUDA streams.
        moe_token_dispatcher_type="alltoall" if device.type == "cuda" else "allgather",
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=1,
        tensor_model_parallel_size=p.tp,
        sequence_parallel=p.tp > 1,
        pipeline_model_parallel_size=p.pp,
        context_parallel_size=p.cp,  # attention: keys and values go round (p2p)
        pipeline_dtype=torch.float32,  # the residual stream's
        batch_p2p_sync=device.type == "cuda",
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,  # an extension of Apex
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        calculate_per_token_loss=True,  # gradients are summed over ranks, not averaged
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        **RECOMPUTE[config.train.activation_checkpointing],
    )


def gpt_settings(config: Config) -> dict[str, Any]:
    """What a GPTModel wants to know beside its TransformerConfig."""
    m = config.model
    return {
        "vocab_size": m.vocab_size,
        "max_sequence_length": config.data.seq_len,
        "share_embeddings_and_output_weights": m.tie_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": m.rope_theta,
    }


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """What data-parallel ranks share: `megatron_shards`."""
    return DistributedDataParallelConfig(use_distributed_optimizer=config.parallel.data == "shard")


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Around the GPTModel: bfloat16 in the products; parameters, residual stream and (inside it, off) router float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.compute_dtype == "bfloat16")


def block_spec(
    config: Config, theirs: TransformerConfig, use_te: bool, device: torch.device, core_attention: Any = None
) -> Any:
    """Megatron's layers, with our router in the sparse ones, and our norm where Transformer Engine's is not: torch's, which
    Megatron would take, refuses sequence parallelism. core_attention: a module class in place of theirs."""
    spec: Any = get_gpt_decoder_block_spec(theirs, use_transformer_engine=use_te, normalization="RMSNorm")
    for layer, built in enumerate(spec.layer_specs, start=get_transformer_layer_offset(theirs)):
        if layer >= config.model.first_k_dense:
            submodules_of(built).router = partial(MegatronRouter, config, device)
        if not use_te:
            built.submodules.input_layernorm = built.submodules.pre_mlp_layernorm = Norm
        if core_attention is not None:
            built.submodules.self_attention.submodules.core_attention = core_attention
    if not use_te:
        spec.layer_norm = Norm
    return spec


def submodules_of(layer: Any) -> Any:
    """The parts of the sparse MLP in a layer's specification."""
    mlp = layer.submodules.mlp  # 0.16: a ModuleSpec; 0.19: a partial of the layer's class
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules


class Norm(RMSNorm):
    """RMSNorm as Megatron builds it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class MegatronRouter(nn.Module):
    """Our router as Megatron's layers call theirs: [S, B, D] in, dense weights and a map [S * B, E] out."""

    def __init__(self, ours: Config, device: torch.device, config: TransformerConfig, **_: object):
        """config and the rest: what Megatron gives its own (0.19 more than 0.16)."""
        super().__init__()
        with torch.device(device):
            self.router = Router(ours, 0)
        # Each rank of parallel.tp has the gradient of its own tokens: Megatron adds them up.
        self.router.weight.sequence_parallel = ours.parallel.tp > 1  # type: ignore[attr-defined]
        self.scale: Tensor | float = 1.0  # of the losses: one over the real tokens of the step
        self.seen: tuple[RouterStats, RouterLosses] | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron counts from 1."""
        self.router.layer = layer_number - 1

    def take(self) -> tuple[RouterStats, RouterLosses]:
        """What the last forward pass left."""
        assert self.seen is not None, "one forward pass, one take"
        seen, self.seen = self.seen, None
        return seen

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """input [S, B, D]; padding_mask [S, B], True for padding."""
        seq, batch, _ = input.shape
        with torch.autocast(input.device.type, enabled=False):
            # In the order of sequences, which the sequence losses and the recorders expect.
            mask_T = None if padding_mask is None else ~padding_mask.transpose(0, 1).flatten()
            ids_TK, weights_TK = self._route(input.transpose(0, 1).flatten(0, 1), mask_T)
            none_TE = weights_TK.new_zeros(len(ids_TK), self.router.model.num_experts)
            weights_TE = none_TE.scatter(1, ids_TK, weights_TK)
            map_TE = none_TE.bool().scatter(1, ids_TK, True)
        return tuple(t.unflatten(0, (batch, seq)).transpose(0, 1).flatten(0, 1) for t in (weights_TE, map_TE))  # type: ignore[return-value]

    def _route(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        routing = self.router(x_TD, mask_T, None)
        losses = routing.losses
        # Recomputation leaves it too, and nobody takes that.
        self.seen = routing.stats, RouterLosses(losses.aux.detach(), losses.z.detach(), None)
        ids_TK = routing.topk_ids_TK.long()
        if routing.masked:
            # Megatron's dispatchers expect K experts of every token: padding goes round, with weight 0 and uncounted.
            slots_TK = torch.arange(len(ids_TK), device=ids_TK.device)[:, None] + torch.arange(
                ids_TK.shape[1], device=ids_TK.device
            )
            ids_TK = torch.where(ids_TK < 0, slots_TK % self.router.model.num_experts, ids_TK)
        return ids_TK, _WithLoss.apply(routing.topk_weights_TK, (losses.aux + losses.z) * self.scale)


class _WithLoss(torch.autograd.Function):
    # A loss that a layer cannot return hangs on a tensor that it does: also through recomputation.
    @staticmethod
    def forward(ctx, weights: Tensor, loss: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad.new_ones((), dtype=torch.float32)
