"""The gradients of one optimizer step from its micro-batches, whatever takes the backward pass. Letters: L layers, E experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from moe.balance import stats as router_stats
from moe.balance.losses import global_aux_loss
from moe.config import Config
from moe.model.loss import IGNORED
from moe.model.transformer import Output
from moe.parallel import Ranks
from moe.train.data import Batch
from moe.train.engines import StepOutput


def accumulate(
    config: Config,
    ranks: Ranks,
    micro_batches: Sequence[Batch],
    forward: Callable[..., Output],
    backward: Callable[[Tensor], None],
    micro_step: Callable[[bool], AbstractContextManager],
) -> StepOutput:
    """forward: the model's arguments -> Output. backward: takes one micro-batch's part of the loss, a sum over its real
    tokens / real tokens of the step over all ranks; the parts of all ranks and micro-batches are to be added up.
    micro_step(last): entered around both."""
    real = sum(int((batch.targets_BS != IGNORED).sum()) for batch in micro_batches)  # on host: batches come from there
    tokens = ranks.sum(torch.tensor(real, dtype=torch.int64, device=ranks.device))
    scale = 1.0 / tokens.clamp_min(1)
    losses_3 = torch.zeros(3, device=ranks.device)
    stats = seen_LE = None
    for index, batch in enumerate(micro_batches):
        with micro_step(index == len(micro_batches) - 1):
            padded = bool((batch.targets_BS == IGNORED).any())
            out = forward(*(t.to(ranks.device, non_blocking=True) for t in batch), padded)
            if out.prob_sum_LE is not None:
                seen_LE, out = _global_aux(config.balance.aux_loss, ranks, out, seen_LE)
            backward((out.ce + out.aux + out.z) * scale)
        losses_3 += torch.stack([out.ce, out.aux, out.z]).detach()
        stats = out.stats if stats is None else router_stats.add(stats, out.stats)
    assert stats is not None, "a step has at least one micro-batch"
    return StepOutput(losses_3, tokens, stats)


def _global_aux(coefficient: float, ranks: Ranks, out: Output, seen_LE: Tensor | None) -> tuple[Tensor, Output]:
    """The counts of all ranks in this step so far, and the output with the loss on them: one more collective a
    micro-batch, for all layers at once."""
    assert out.prob_sum_LE is not None
    counts_LE = ranks.sum(out.stats.tokens_per_expert)
    seen_LE = counts_LE if seen_LE is None else seen_LE + counts_LE
    return seen_LE, out._replace(aux=out.aux + coefficient * global_aux_loss(out.prob_sum_LE, seen_LE))
