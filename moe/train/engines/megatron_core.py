"""The Megatron-core engine: its GPTModel, MoE layers, dispatchers and DistributedDataParallel, with our router and balancer.

The router is `moe.model.router.Router` behind Megatron's interface: the same choices, statistics and losses as in the native
engine. Initial weights, checkpoints and optimizer state are those of the native engine too (`megatron_weights`), so that a
run may go on under the other one. All logits of a micro-batch exist at one time (train.loss_chunk is not used). With
Transformer Engine where it is installed.

parallel.tp shares the dense matrices, always with sequence parallelism: the routers of its ranks see different tokens.
parallel.cp shares every sequence: its ranks read the same ones and take their chunks, losses and gradients are summed over
them as over data-parallel ranks. Attention over shared sequences is Transformer Engine's.
parallel.pp makes stages of the layers; every rank balances all of them, each router contributes where it is. What a rank does
not see it contributes as 0, so that sums over all ranks are right in every layout.

Letters: B batch, S sequence, T = B * S tokens, D model dim, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from moe.balance import BALANCERS
from moe.balance import stats as router_stats
from moe.balance.stats import RouterStats
from moe.config import Config
from moe.model.loss import IGNORED
from moe.model.transformer import Output, fill_weights
from moe.parallel import Ranks
from moe.train.data import Batch
from moe.train.engines import StepOutput, StepResult
from moe.train.engines.megatron_setup import (
    MegatronRouter,
    autocast,
    block_spec,
    ddp_config,
    gpt_settings,
    own_chunks,
    start_megatron,
    tensor_group,
    transformer_config,
    uses_transformer_engine,
)
from moe.train.engines.megatron_shards import pieces
from moe.train.engines.megatron_weights import from_ours, plain, rows, to_ours
from moe.train.engines.native import NativeEngine, sum_of_squares
from moe.train.optim import build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class MegatronEngine(NativeEngine):
    """See `moe.train.engines.Engine`. Clipping and AdamW are the native engine's."""

    model: Any

    def __init__(self, config: Config, ranks: Ranks, eos_id: int, core_attention: Any = None):
        """core_attention: a module class in place of Megatron's or Transformer Engine's, built and called as theirs."""
        self.config, self.ranks, self.sharded = config, ranks, config.parallel.data == "shard"
        start_megatron(config, ranks)
        self.model = MegatronTransformer(config, ranks, core_attention)
        self.init_weights()
        self.optimizer, self.steps = build_optimizer(self.model, config.optim), 0
        self.trained = {name: p for name, p in self.model.plain_parameters() if p.requires_grad}
        self.pieces = pieces(self.model.gpt) if self.sharded else {}
        for group in self.optimizer.param_groups:
            group["params"] = [own for p in group["params"] if (own := self._own(p)) is not None]
        self.counted = [
            own for name, p in self.trained.items() if self._counts(name) and (own := self._own(p)) is not None
        ]

    def _own(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """What this rank's AdamW updates of it."""
        return self.pieces[parameter].owned if self.sharded else parameter

    def _own_part(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """The same elements of a tensor of the parameter's shape."""
        return self.pieces[parameter].of(tensor) if self.sharded else tensor

    def _counts(self, name: str) -> bool:
        """Whether the gradient norm has this rank's part of a parameter, or that of another with the same."""
        if ".mlp.experts." in name:
            return self.sharded or parallel_state.get_expert_data_parallel_rank() == 0
        first = self.sharded or parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        copied = name not in {name for row in rows(self.config.model, 0) if row.split for name in row.theirs}
        return first and not (copied and parallel_state.get_tensor_model_parallel_rank() > 0)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepOutput:
        gpt = self.model.gpt
        gpt.zero_grad_buffer()
        real = sum(int((batch.targets_BS != IGNORED).sum()) for batch in micro_batches)
        mine = torch.tensor(real * self.ranks.first_to_see, dtype=torch.int64, device=self.ranks.device)
        tokens = self.ranks.sum(mine)
        out = self.model.run(micro_batches, 1.0 / tokens.clamp_min(1))
        finalize_model_grads([gpt])
        for parameter in self.trained.values():
            if (own := self._own(parameter)) is not None:
                own.grad = self._own_part(parameter.main_grad, parameter)  # type: ignore[attr-defined]
        return StepOutput(torch.stack([out.ce, out.aux, out.z]), tokens, out.stats)

    def _grad_norm(self) -> float:
        total = self.ranks.sum(sum_of_squares(self.counted, self.ranks.device))
        return math.sqrt(x) if (x := total.item()) >= 0 else math.nan  # sync: once a step

    def step(self) -> StepResult:
        done = super().step()
        self.steps += done.applied
        if self.sharded and done.applied:
            self.model.gpt.start_param_sync()
        return done

    # -- in the native engine's names ----------------------------------------------------------------------------------

    def _ours(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return to_ours(theirs, self.config.model, self.config.parallel.ep, self.ranks.ep_mesh, tensor_group())

    def _take(self, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        from_ours(ours, theirs, self.config.model, self.config.parallel.ep, tensor_group())

    def weights(self) -> dict[str, Tensor]:
        return self._ours(dict(self.model.plain_parameters()))

    def init_weights(self) -> None:
        """Those that the native engine begins with."""
        weights = self.weights()
        fill_weights(weights.items(), self.config.model, self.config.run.seed)
        self._take(weights, dict(self.model.plain_parameters()))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Tensor] = {}
        for kind in MOMENTS:
            moments = {name: self._moment(parameter, kind) for name, parameter in self.trained.items()}
            state |= {f"state.{name}.{kind}": tensor for name, tensor in self._ours(moments).items()}
        # Every parameter has a gradient in every step, so that all have as many.
        names = [name.removeprefix("state.").rpartition(".")[0] for name in state]
        steps = torch.tensor(float(self.steps), device=self.ranks.device)
        state |= {f"state.{name}.step": steps.clone() for name in names}
        return {"model": self._ours(self.model.plain_tensors()), "optimizer": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._take(state["model"], self.model.plain_tensors())
        steps = next(value for name, value in state["optimizer"].items() if name.endswith(".step"))
        self.steps = int(steps)
        for kind in MOMENTS:
            end = f".{kind}"
            ours = {
                name.removeprefix("state.").removesuffix(end): value
                for name, value in state["optimizer"].items()
                if name.endswith(end)
            }
            moments = {name: torch.empty_like(parameter) for name, parameter in self.trained.items()}
            self._take(ours, moments)
            for name, parameter in self.trained.items():
                if (own := self._own(parameter)) is not None:
                    self.optimizer.state[own][kind] = self._own_part(moments[name], parameter).clone()
                    self.optimizer.state[own]["step"] = steps.clone().to(own.device)

    def _moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Of AdamW, in the parameter's shape."""
        own = self._own(parameter)
        moment = None if own is None else self.optimizer.state[own].get(kind)
        if self.sharded:
            return self.pieces[parameter].whole(moment, parameter)
        return torch.zeros_like(parameter) if moment is None else moment


class MegatronTransformer(nn.Module):
    """A GPTModel, or this rank's stage of it, with the face of `moe.model.transformer.Transformer`."""

    def __init__(self, config: Config, ranks: Ranks, core_attention: Any = None):
        super().__init__()
        self.config, self.ranks, m = config, ranks, config.model
        self.uses_te = uses_transformer_engine(ranks.device)
        theirs = transformer_config(config, ranks.device)
        self.first_layer = get_transformer_layer_offset(theirs)
        self.begins = parallel_state.is_pipeline_first_stage()
        self.ends = parallel_state.is_pipeline_last_stage()
        gpt = GPTModel(
            config=theirs,
            transformer_layer_spec=block_spec(config, theirs, self.uses_te, ranks.device, core_attention),
            pre_process=self.begins,
            post_process=self.ends,
            **gpt_settings(config),
        ).to(ranks.device)
        for name, parameter in gpt.named_parameters():
            if ".mlp.experts." in name:
                # Their copies are on other ranks than those of dense matrices, which with ep = 1 Megatron 0.16 overlooks.
                parameter.allreduce = False  # type: ignore[attr-defined]
        self.gpt = DistributedDataParallel(theirs, ddp_config(config), gpt)
        found = [module for module in gpt.modules() if isinstance(module, MegatronRouter)]
        self.megatron_routers = sorted(found, key=lambda router: router.router.layer)
        here = {router.router.layer: router.router for router in self.megatron_routers}
        layers = range(m.first_k_dense, m.num_layers)
        elsewhere = {layer: Elsewhere(config, layer, ranks.device) for layer in layers if layer not in here}
        self._routers: list[Any] = [here[layer] if layer in here else elsewhere[layer] for layer in layers]

    @property
    def routers(self) -> dict[int, Any]:
        """Routers by global layer index; those of other stages are `Elsewhere`."""
        return {router.layer: router for router in self._routers}

    def plain_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Of this stage, by the names that they have in the whole GPTModel without Transformer Engine."""
        return [(plain(name, self.first_layer), p) for name, p in self.gpt.module.named_parameters()]

    def plain_tensors(self) -> dict[str, Tensor]:
        """Parameters, and the bias of every router."""
        routers = [router.router for router in self.megatron_routers]
        biases = {f"decoder.layers.{r.layer}.mlp.router.router.expert_bias_E": r.expert_bias_E for r in routers}
        return {**dict(self.plain_parameters()), **biases}

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor, padded: bool = False) -> Output:
        """As `Transformer.forward`, without gradient. Every rank gives what it saw: sums over all ranks are those of the
        batch."""
        return self.run([Batch(tokens_BS, targets_BS)], None)

    def run(self, micro_batches: Sequence[Batch], scale: Tensor | None) -> Output:
        """Megatron's schedule for this pipeline: forward passes, and with `scale` (one over the real tokens of the step) the
        backward passes of the losses times it. Losses and statistics, detached, are summed over the micro-batches."""
        seen: list[Output] = []
        zero = torch.zeros((), device=self.ranks.device)
        for router in self.megatron_routers:
            router.scale = 0.0 if scale is None else scale

        def forward_step(batches: Iterator[Batch], _model: nn.Module) -> tuple[Tensor, Any]:
            batch = Batch(*map(own_chunks, next(batches)))
            padding_BS = batch.targets_BS == IGNORED
            padded = bool(padding_BS.any())  # on host, but in evaluation
            tokens_BS, targets_BS, padding_BS = (
                t.to(self.ranks.device, non_blocking=True) for t in (*batch, padding_BS)
            )
            out = self._run(tokens_BS, padding_BS if padded else None, targets_BS.clamp_min(0))
            ce = (out * ~padding_BS).sum() if self.ends else zero
            seen.append(self._take(ce.detach()))
            return out, lambda _: (ce if scale is None else ce * scale, (~padding_BS).sum().int(), {})

        schedule = get_forward_backward_func()
        schedule(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.gpt],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens_BS.shape[1],
            micro_batch_size=len(micro_batches[0].tokens_BS),
            forward_only=scale is None,
        )
        stats = seen[0].stats
        for out in seen[1:]:
            stats = router_stats.add(stats, out.stats)
        ce, aux, z = torch.stack([torch.stack([out.ce, out.aux, out.z]) for out in seen]).sum(0)
        return Output(ce, aux, z, stats)

    def _take(self, ce: Tensor) -> Output:
        """What the forward pass of one micro-batch left here; nothing of other stages."""
        zero = torch.zeros((), device=self.ranks.device)
        found = {router.router.layer: router.take() for router in self.megatron_routers}
        stats = [found[r.layer][0] if r.layer in found else r.nothing(self.training) for r in self._routers]
        aux, z = zero, zero
        for _, losses in found.values():
            aux, z = aux + losses.aux, z + losses.z
        first = parallel_state.get_tensor_model_parallel_rank() == 0  # the others have the whole loss as well
        return Output(ce if first else zero, aux, z, router_stats.stack(stats))

    def hidden(self, tokens_BS: Tensor, mask_T: Tensor | None) -> None:
        """A forward pass for who watches the routers; nothing comes back. Not with several stages."""
        padding_BS = None if mask_T is None else own_chunks(~mask_T.view_as(tokens_BS))
        self._run(own_chunks(tokens_BS), padding_BS, None)
        for router in self.megatron_routers:
            router.take()

    def _run(self, tokens_BS: Tensor, padding_BS: Tensor | None, labels_BS: Tensor | None) -> Tensor:
        seq, device = tokens_BS.shape[1], tokens_BS.device
        positions_1S = own_chunks(torch.arange(seq * self.config.parallel.cp, device=device)[None])
        hidden = positions_1S[:, None, :, None] < positions_1S[:, None, None, :]
        if padding_BS is not None and not self.begins:  # the first stage alone does this by itself
            size, rank = self.config.parallel.tp, parallel_state.get_tensor_model_parallel_rank()
            padding_BS = padding_BS.chunk(size, dim=1)[rank]
        with autocast(self.config, device):
            mask = None if self.uses_te else hidden  # Transformer Engine has its own causal mask
            return self.gpt(
                tokens_BS, positions_1S.expand_as(tokens_BS), mask, labels=labels_BS, padding_mask=padding_BS
            )


class Elsewhere(nn.Module):
    """A router of another stage, for who keeps books of all layers: its bias is published here as well."""

    expert_bias_E: Tensor

    def __init__(self, ours: Config, layer: int, device: torch.device):
        super().__init__()
        self.model, self.layer = ours.model, layer
        self.needs = BALANCERS[ours.balance.method].needs_of(ours.balance)
        self.register_buffer("expert_bias_E", torch.zeros(ours.model.num_experts, device=device))
        shares_E = torch.zeros(ours.model.num_experts, device=device) if ours.balance.phi_loss else None
        self.register_buffer("ema_share_E", shares_E)

    def nothing(self, training: bool) -> RouterStats:
        """What this rank saw of it."""
        m = self.model
        needs = self.needs if training else frozenset()
        return router_stats.nothing(needs, self.expert_bias_E, m.top_k, m.num_groups, m.group_top_k)
