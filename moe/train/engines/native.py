"""The native engine: torch alone. Experts are sharded over ep; `data_parallel` replicates or shards the rest over dp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from moe.config import Config
from moe.model.experts import local_tensor
from moe.model.layer import MoELayer
from moe.model.transformer import Transformer
from moe.parallel import Ranks
from moe.train.data import Batch
from moe.train.engines import StepOutput, StepResult
from moe.train.engines.accumulate import accumulate
from moe.train.engines.data_parallel import replicate, shard, sum_expert_gradients
from moe.train.optim import build_optimizer

# By parameter name, without groups: these differ between layouts, and their settings are the configuration's.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class NativeEngine:
    """See `moe.train.engines.Engine`."""

    def __init__(self, config: Config, ranks: Ranks, eos_id: int):
        self.config, self.ranks = config, ranks
        self.sharded = config.parallel.data == "shard" and ranks.dp_mesh is not None
        with torch.device("meta" if self.sharded else ranks.device):  # no rank ever holds what it would only shard
            self.model = Transformer(config, ranks, eos_id)
        if config.train.compile:
            for block in self.model.blocks:
                block.compile()
        if self.sharded:
            shard(self.model, ranks)
            self.model.to_empty(device=ranks.device)
        self.model.init_weights(config.run.seed)
        self.optimizer = build_optimizer(self.model, config.optim)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.expert_parameters = [p for name, p in named if ".experts." in name]
        self.dense_parameters = [p for name, p in named if ".experts." not in name]
        replicated = not self.sharded and ranks.dp_group is not None
        self.replicated = replicate(self.model, ranks) if replicated else None

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepOutput:
        out = self._accumulate(micro_batches)
        if out.stats.dropped is None:
            return out
        dropped = int(self.ranks.sum(out.stats.dropped.sum()).item())  # sync: once a step, with padded dispatch
        if dropped:
            self.optimizer.zero_grad()
            out = self._exactly(micro_batches)
        return out._replace(stats=out.stats._replace(dropped=None), dropped=dropped)

    def _exactly(self, micro_batches: Sequence[Batch]) -> StepOutput:
        layers = [module for module in self.model.modules() if isinstance(module, MoELayer)]
        for layer in layers:
            layer.exact = True
        try:
            return self._accumulate(micro_batches)
        finally:
            for layer in layers:
                layer.exact = False

    def _accumulate(self, micro_batches: Sequence[Batch]) -> StepOutput:
        def micro_step(last: bool):
            return nullcontext() if last or self.replicated is None else self.replicated.no_sync()

        forward = self.replicated or self.model
        out = accumulate(self.config, self.ranks, micro_batches, forward, Tensor.backward, micro_step)
        if not self.sharded:
            sum_expert_gradients(self.expert_parameters, self.ranks)
        return out

    def _grad_norm(self) -> float:
        """The global norm, every parameter once: shards are summed over all ranks, replicas over none, and of the experts
        those of one ep group (edp ranks hold equal copies)."""
        dense = sum_of_squares(self.dense_parameters, self.ranks.device)
        experts = sum_of_squares(self.expert_parameters, self.ranks.device)
        total = self.ranks.sum(dense + experts) if self.sharded else dense + self.ranks.sum_over_ep(experts)
        return math.sqrt(x) if (x := total.item()) >= 0 else math.nan  # sync: once a step

    def step(self) -> StepResult:
        norm = self._grad_norm()
        applied = math.isfinite(norm)
        if applied:
            if norm > (limit := self.config.optim.grad_clip):
                grads = [
                    local_tensor(p.grad) for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None
                ]
                torch._foreach_mul_(grads, limit / norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(norm, applied)

    def discard(self) -> None:
        self.model.zero_grad()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        model = get_model_state_dict(
            self.model
        )  # first: after a forward pass alone it puts FSDP2's shards back in place
        moments = get_optimizer_state_dict(self.model, self.optimizer, options=FLAT)
        return {"model": model, "optimizer": {k: v for k, v in moments.items() if k.startswith("state.")}}

    def write_files(self, folder: Path, balancer: dict[str, Tensor]) -> bool:
        return False

    def read_files(self) -> dict[str, Tensor] | None:
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"])
        own = get_optimizer_state_dict(self.model, self.optimizer, options=FLAT)
        set_optimizer_state_dict(self.model, self.optimizer, own | state["optimizer"], options=FLAT)


def sum_of_squares(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Of this rank's parts of the gradients; float64 scalar."""
    local = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    if not local:
        return torch.zeros((), device=device, dtype=torch.float64)
    return torch.stack(torch._foreach_norm(local)).double().square().sum()
