"""The Megatron-core engine: its GPTModel, MoE layers, dispatchers and DistributedDataParallel, with our router and balancer.

The router is `moe.model.router.Router` behind Megatron's interface: the same choices, statistics and losses as in the native
engine. Initial weights, checkpoints and optimizer state are those of the native engine too (`megatron_weights`), so that a
run may go on under the other one. Expert and data parallelism; all logits of a micro-batch exist at one time
(train.loss_chunk is not used). With Transformer Engine where it is installed.

Written for megatron-core 0.16; what depends on its version: `transformer_config`, `block_spec` and the names in
`megatron_weights`. Letters: B batch, S sequence, T = B * S tokens, D model dim, E experts, K experts per token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe.balance import stats as router_stats
from moe.balance.losses import RouterLosses
from moe.balance.stats import RouterStats
from moe.config import Config
from moe.model.loss import IGNORED
from moe.model.router import Router
from moe.model.transformer import Output, fill_weights
from moe.parallel import Ranks
from moe.train.data import Batch
from moe.train.engines import StepOutput
from moe.train.engines.megatron_weights import from_ours, plain, to_ours
from moe.train.engines.native import NativeEngine
from moe.train.optim import build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
# The narrowest recomputation that Megatron has, and the widest.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class MegatronEngine(NativeEngine):
    """See `moe.train.engines.Engine`. Clipping and AdamW are the native engine's."""

    model: Any

    def __init__(self, config: Config, ranks: Ranks, eos_id: int):
        self.config, self.ranks, self.sharded = config, ranks, False
        start_megatron(config, ranks)
        self.model = MegatronTransformer(config, ranks)
        self.init_weights()
        self.optimizer = build_optimizer(self.model, config.optim)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.expert_parameters = [p for name, p in trained if ".mlp.experts." in name]
        self.dense_parameters = [p for name, p in trained if ".mlp.experts." not in name]

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepOutput:
        device, gpt = self.ranks.device, self.model.gpt
        gpt.zero_grad_buffer()
        real = sum(int((batch.targets_BS != IGNORED).sum()) for batch in micro_batches)
        tokens = self.ranks.sum(torch.tensor(real, dtype=torch.int64, device=device))
        scale = 1.0 / tokens.clamp_min(1)
        for router in self.model.megatron_routers:
            router.scale = scale
        losses_3, stats = torch.zeros(3, device=device), None
        for batch in micro_batches:
            out = self._forward(batch)
            (out.ce * scale).backward()  # the routers' losses hang on their weights
            losses_3 += torch.stack([out.ce, out.aux, out.z]).detach()
            stats = out.stats if stats is None else router_stats.add(stats, out.stats)
        finalize_model_grads([gpt])
        for parameter in self.dense_parameters + self.expert_parameters:
            parameter.grad = parameter.main_grad  # type: ignore[attr-defined]
        assert stats is not None, "a step has at least one micro-batch"
        return StepOutput(losses_3, tokens, stats)

    def _forward(self, batch: Batch) -> Output:
        tokens, targets = (t.to(self.ranks.device, non_blocking=True) for t in batch)
        return self.model(tokens, targets, bool((batch.targets_BS == IGNORED).any()))

    # -- in the native engine's names ----------------------------------------------------------------------------------

    def _ours(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return to_ours(theirs, self.config.model, self.config.parallel.ep, self.ranks.ep_mesh)

    def _take(self, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        from_ours(ours, theirs, self.config.model, self.config.parallel.ep)

    def weights(self) -> dict[str, Tensor]:
        return self._ours(dict(self.model.plain_parameters()))

    def init_weights(self) -> None:
        """Those that the native engine begins with."""
        weights = self.weights()
        fill_weights(weights.items(), self.config.model, self.config.run.seed)
        self._take(weights, dict(self.model.plain_parameters()))

    def state_dict(self) -> dict[str, Any]:
        state, steps = {}, torch.zeros((), device=self.ranks.device)
        moments: dict[str, dict[str, Tensor]] = {kind: {} for kind in MOMENTS}
        for name, parameter in self.model.plain_parameters():
            if not parameter.requires_grad:
                continue
            own = self.optimizer.state[parameter]
            for kind in MOMENTS:
                moments[kind][name] = own[kind] if own else torch.zeros_like(parameter)
            steps = own["step"] if own else steps
        for kind in MOMENTS:
            state |= {f"state.{name}.{kind}": tensor for name, tensor in self._ours(moments[kind]).items()}
        # Every parameter has a gradient in every step, so that all have as many.
        state |= {f"state.{name}.step": steps.clone() for name in self._ours(moments[MOMENTS[0]])}
        return {"model": self._ours(self.model.plain_tensors()), "optimizer": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._take(state["model"], self.model.plain_tensors())
        trained = {name: p for name, p in self.model.plain_parameters() if p.requires_grad}
        steps = next(value for name, value in state["optimizer"].items() if name.endswith(".step"))
        for parameter in trained.values():
            moments = {kind: torch.zeros_like(parameter) for kind in MOMENTS}
            self.optimizer.state[parameter] = {"step": steps.clone().to(parameter.device), **moments}
        for kind in MOMENTS:
            end = f".{kind}"
            ours = {
                name.removeprefix("state.").removesuffix(end): value
                for name, value in state["optimizer"].items()
                if name.endswith(end)
            }
            self._take(ours, {name: self.optimizer.state[p][kind] for name, p in trained.items()})


class MegatronTransformer(nn.Module):
    """A GPTModel with the face of `moe.model.transformer.Transformer`."""

    def __init__(self, config: Config, ranks: Ranks):
        super().__init__()
        self.config, m = config, config.model
        self.uses_te = uses_transformer_engine(ranks.device)
        theirs = transformer_config(config, ranks.device)
        gpt = GPTModel(
            config=theirs,
            transformer_layer_spec=block_spec(config, theirs, self.uses_te, ranks.device),
            vocab_size=m.vocab_size,
            max_sequence_length=config.data.seq_len,
            share_embeddings_and_output_weights=m.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=m.rope_theta,  # type: ignore[arg-type]
        ).to(ranks.device)
        self.gpt = DistributedDataParallel(theirs, DistributedDataParallelConfig(), gpt)
        found = [module for module in gpt.modules() if isinstance(module, MegatronRouter)]
        self.megatron_routers = sorted(found, key=lambda router: router.router.layer)

    @property
    def routers(self) -> dict[int, Router]:
        """Routers by global layer index."""
        return {router.router.layer: router.router for router in self.megatron_routers}

    def plain_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Of the GPTModel, by the names it has without Transformer Engine."""
        return [(plain(name), parameter) for name, parameter in self.gpt.module.named_parameters()]

    def plain_tensors(self) -> dict[str, Tensor]:
        """Parameters, and the bias of every router."""
        biases = {
            f"decoder.layers.{layer}.mlp.router.router.expert_bias_E": router.expert_bias_E
            for layer, router in self.routers.items()
        }
        return {**dict(self.plain_parameters()), **biases}

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor, padded: bool = False) -> Output:
        """As `Transformer.forward`; aux and z are detached: their gradient comes through the routers' weights."""
        real_BS = targets_BS != IGNORED
        ce_BS = self._run(tokens_BS, ~real_BS if padded else None, targets_BS.clamp_min(0))
        ce = (ce_BS * real_BS).sum()
        stats, losses = zip(*(router.take() for router in self.megatron_routers), strict=True)
        aux, z = torch.stack([each.aux for each in losses]).sum(), torch.stack([each.z for each in losses]).sum()
        return Output(ce, aux, z, router_stats.stack(list(stats)))

    def hidden(self, tokens_BS: Tensor, mask_T: Tensor | None) -> None:
        """A forward pass for who watches the routers; nothing comes back."""
        self._run(tokens_BS, None if mask_T is None else ~mask_T.view_as(tokens_BS), None)
        for router in self.megatron_routers:
            router.take()

    def _run(self, tokens_BS: Tensor, padding_BS: Tensor | None, labels_BS: Tensor | None) -> Tensor:
        seq, device = tokens_BS.shape[1], tokens_BS.device
        positions_BS = torch.arange(seq, device=device).expand_as(tokens_BS)
        hidden = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=device).triu(1)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.train.compute_dtype == "bfloat16"):
            mask = None if self.uses_te else hidden  # Transformer Engine has its own causal mask
            return self.gpt(tokens_BS, positions_BS, mask, labels=labels_BS, padding_mask=padding_BS)


class MegatronRouter(nn.Module):
    """Our router as Megatron's layers call theirs: [S, B, D] in, dense weights and a map [S * B, E] out."""

    def __init__(self, ours: Config, device: torch.device, config: TransformerConfig, pg_collection: object = None):
        super().__init__()
        with torch.device(device):
            self.router = Router(ours, 0)
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


def start_megatron(config: Config, ranks: Ranks) -> None:
    """Megatron's process groups and random generators, once in a process."""
    if not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        # Its default order of ranks is ours: neighbours share the experts.
        parallel_state.initialize_model_parallel(expert_model_parallel_size=config.parallel.ep)
        if ranks.device.type == "cuda":
            model_parallel_cuda_manual_seed(config.run.seed)
        else:
            initialize_rng_tracker(inference_rng_tracker=True)
    assert parallel_state.get_expert_model_parallel_world_size() == config.parallel.ep, "one layout a process"


def uses_transformer_engine(device: torch.device) -> bool:
    """Whether the layers are Transformer Engine's."""
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """Our settings in Megatron's words; `moe.config.limits` has refused those that it has none for."""
    m = config.model
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
        expert_model_parallel_size=config.parallel.ep,
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


def block_spec(config: Config, theirs: TransformerConfig, use_te: bool, device: torch.device) -> Any:
    """Megatron's layers, with our router in the sparse ones."""
    spec: Any = get_gpt_decoder_block_spec(theirs, use_transformer_engine=use_te, normalization="RMSNorm")
    for layer in spec.layer_specs[config.model.first_k_dense :]:
        layer.submodules.mlp.submodules.router = partial(MegatronRouter, config, device)
    return spec
