"""The decoder-only transformer. Letters: B batch, S sequence, T = B*S tokens, D model dim, L MoE layers, E experts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe.balance.losses import RouterLosses
from moe.balance.stats import RouterStats, stack, zeros
from moe.config import Config, ModelSection
from moe.model.attention import ATTENTION, Positions, positions
from moe.model.experts import SwiGLU, local_part
from moe.model.layer import MoELayer
from moe.model.loss import IGNORED, chunked_cross_entropy
from moe.model.norm import RMSNorm
from moe.model.router import Router
from moe.parallel import Ranks


class Output(NamedTuple):
    """Differentiable float32 scalars, each a sum over the real tokens of the batch, apart from the detached integer
    statistics (tokens_L, tokens_per_expert_LE). prob_sum_LE float32, differentiable: only for the global aux loss, which
    the engine adds, because it needs the counts of all ranks."""

    ce: Tensor
    aux: Tensor
    z: Tensor
    stats: RouterStats
    prob_sum_LE: Tensor | None = None


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); the MLP is dense or sparse."""

    def __init__(self, config: Config, ranks: Ranks, layer: int):
        super().__init__()
        m = config.model
        is_moe = layer >= m.first_k_dense
        self.attention_norm = RMSNorm(m.dim, m.norm_eps)
        self.attention = ATTENTION[m.attention](m)
        self.mlp_norm = RMSNorm(m.dim, m.norm_eps)
        self.moe = MoELayer(config, ranks, layer) if is_moe else None
        dense_dim = m.dense_hidden_dim or (m.top_k + m.num_shared_experts) * m.expert_hidden_dim
        self.mlp = None if is_moe else SwiGLU(m.dim, dense_dim)

    def forward(
        self, x_BSD: Tensor, where: Positions, mask_T: Tensor | None, token_ids_T: Tensor
    ) -> tuple[Tensor, RouterStats | None, RouterLosses | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), where)
        h_BSD = self.mlp_norm(x_BSD)
        if self.mlp is not None:
            return x_BSD + self.mlp(h_BSD), None, None
        assert self.moe is not None, "a block has either a dense or a sparse MLP"
        out_TD, stats, losses = self.moe(h_BSD.flatten(0, 1), mask_T, token_ids_T)
        return x_BSD + out_TD.view_as(x_BSD), stats, losses


class Transformer(nn.Module):
    """DeepSeekMoE (arXiv:2401.06066): pre-norm blocks, the first `first_k_dense` dense, the others sparse.

    eos_id: id of the end-of-document token; None: plain causal attention.
    """

    def __init__(self, config: Config, ranks: Ranks, eos_id: int | None = None):
        super().__init__()
        m = config.model
        self.config, self.eos_id = config, eos_id if config.data.document_mask else None
        self.compute_dtype = torch.bfloat16 if config.train.compute_dtype == "bfloat16" else torch.float32
        self.embedding = nn.Embedding(m.vocab_size, m.dim)
        self.blocks = nn.ModuleList(Block(config, ranks, layer) for layer in range(m.num_layers))
        self.norm = RMSNorm(m.dim, m.norm_eps)
        self.head = None if m.tie_embeddings else nn.Linear(m.dim, m.vocab_size, bias=False)

    @property
    def routers(self) -> dict[int, Router]:
        """Routers by global layer index."""
        return {
            layer: block.moe.router
            for layer, block in enumerate(self.blocks)
            if isinstance(block, Block) and block.moe is not None
        }

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor, padded: bool = False) -> Output:
        """tokens_BS, targets_BS int64; padded: some targets are IGNORED, and those positions are no load either."""
        targets_T = targets_BS.reshape(-1)
        x_BSD, stats, losses = self._hidden(tokens_BS, targets_T != IGNORED if padded else None)
        head = self.embedding if self.head is None else self.head
        ce = chunked_cross_entropy(self.norm(x_BSD).flatten(0, 1), head.weight, targets_T, self.config.train.loss_chunk)
        if not losses:
            return Output(ce, ce * 0, ce * 0, zeros(0, self.config.model.num_experts, x_BSD.device))
        aux, z = torch.stack([loss.aux for loss in losses]).sum(), torch.stack([loss.z for loss in losses]).sum()
        sums = [loss.prob_sum_E for loss in losses if loss.prob_sum_E is not None]
        return Output(ce, aux, z, stack(stats), torch.stack(sums) if sums else None)

    def hidden(self, tokens_BS: Tensor, mask_T: Tensor | None) -> tuple[Tensor, list[RouterStats], list[RouterLosses]]:
        """The residual stream [B, S, D] after the last block, not yet normalised, and what each MoE layer returned."""
        return self._hidden(tokens_BS, mask_T)  # apart from it: under FSDP2 each way in gathers the parameters once

    def _hidden(self, tokens_BS: Tensor, mask_T: Tensor | None) -> tuple[Tensor, list[RouterStats], list[RouterLosses]]:
        where = positions(tokens_BS, self.config.model, self.eos_id)
        x_BSD = self.embedding(tokens_BS).to(self.compute_dtype)
        stats, losses = [], []
        for block in self.blocks:
            x_BSD, layer_stats, layer_losses = self._run(block, x_BSD, where, mask_T, tokens_BS.flatten())
            if layer_stats is not None:
                stats.append(layer_stats)
                losses.append(layer_losses)
        return x_BSD, stats, losses

    def _run(self, block: nn.Module, *args):
        mode = self.config.train.activation_checkpointing
        if mode == "none" or not (self.training and torch.is_grad_enabled()):
            return block(*args)
        if mode == "full":
            return checkpoint(block, *args, use_reentrant=False)
        keep = partial(create_selective_checkpoint_contexts, _keep_expensive)
        return checkpoint(block, *args, use_reentrant=False, context_fn=keep)

    def init_weights(self, seed: int) -> None:
        """`fill_weights`, and bias 0."""
        fill_weights(self.named_parameters(), self.config.model, seed)
        for router in self.routers.values():
            router.expert_bias_E.zero_()
            if router.ema_share_E is not None:
                router.ema_share_E.fill_(1 / self.config.model.num_experts)


@torch.no_grad()
def fill_weights(named: Iterable[tuple[str, Tensor]], m: ModelSection, seed: int) -> None:
    """Normal weights of std `init_std`, norms 1, in place. Every parameter, and every expert of a stacked one, has a
    generator of its own: the values depend on the name, neither on the layout of the ranks nor on the device."""
    for name, parameter in named:
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        residual = m.scale_residual_init and name.endswith(("wo.weight", "w2", "w2.weight"))
        std = m.init_std / math.sqrt(2 * m.num_layers) if residual else m.init_std
        local, first = local_part(parameter)
        if ".experts." not in name:
            _fill_normal(local, first, parameter.shape, std, f"{seed}/{name}")
            continue
        for index, expert in enumerate(local, start=first[0]):
            _fill_normal(expert, first[1:], parameter.shape[1:], std, f"{seed}/{name}/{index}")


def _fill_normal(part: Tensor, first: Sequence[int], shape: torch.Size, std: float, key: str) -> None:
    """Fill the part that begins at index `first` of a tensor of this shape, all of which is drawn."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    part.copy_(whole[tuple(slice(at, at + size) for at, size in zip(first, part.shape, strict=True))] * std)


_EXPENSIVE = {"mm", "bmm", "addmm", "_grouped_mm", "grouped_mm", "grouped_gemm", "moe_mlp", "topk", "max", "sort"}


def _keep_expensive(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    # Matrix products, attention and the routing decision are kept; norms, activations and gathers are recomputed.
    name = getattr(op, "overloadpacket", op).__name__
    keep = name in _EXPENSIVE or "attention" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
