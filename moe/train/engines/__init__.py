"""What the training loop asks of an engine, and how one is built. The loop never asks which engine it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moe.balance.stats import RouterStats
from moe.config import Config
from moe.model.transformer import Transformer
from moe.parallel import Ranks
from moe.train.data import Batch


class StepOutput(NamedTuple):
    """Of one optimizer step on this rank: losses_3 = sums of (ce, aux, z) over its real tokens, float32, on device;
    tokens = real tokens of the step over ALL ranks, int64; stats = summed over this rank's micro-batches; dropped = pairs of
    token and expert, over all ranks, for which padded dispatch had no room: not 0, the step was repeated exactly."""

    losses_3: Tensor
    tokens: Tensor
    stats: RouterStats
    dropped: int = 0


class StepResult(NamedTuple):
    """grad_norm: true global norm before clipping; applied: False when it was not finite and nothing was changed."""

    grad_norm: float
    applied: bool


class Engine(Protocol):
    """Runs the model: the loss it minimises is the sum over real tokens / real tokens of the step over all ranks."""

    model: Transformer

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepOutput:
        """Gradients of one optimizer step, ready in every rank when it returns."""
        ...

    def step(self) -> StepResult:
        """Clip, update, clear the gradients; skip the update when the gradient is not finite."""
        ...

    def discard(self) -> None:
        """Clear the gradients instead of a step; nothing else changes."""
        ...

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name: whole, or a DTensor. A collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Sharded model and optimizer state for torch.distributed.checkpoint, of the same names and shapes in every engine."""
        ...

    def write_files(self, folder: Path, balancer: dict[str, Tensor]) -> bool:
        """Files of the engine's own kind that a checkpoint is to hold as well; False: none. A collective."""
        ...

    def read_files(self) -> dict[str, Tensor] | None:
        """Start from such files, if the configuration names any; the balancer's state in them. A collective. Raises
        CheckpointError."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a loaded state in."""
        ...


def build_engine(config: Config, ranks: Ranks, eos_id: int) -> Engine:
    """The engine of `train.engine` with freshly initialised weights."""
    if config.train.engine == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)  # read at import; without it, it probes and warns
        from moe.train.engines.deepspeed_zero import DeepSpeedEngine

        return DeepSpeedEngine(config, ranks, eos_id)
    if config.train.engine == "megatron":
        from moe.train.engines.megatron_core import MegatronEngine

        return MegatronEngine(config, ranks, eos_id)
    from moe.train.engines.native import NativeEngine

    return NativeEngine(config, ranks, eos_id)
