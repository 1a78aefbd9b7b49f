"""Held-out loss and load with the bias frozen. Letters: L MoE layers, E experts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.balance.stats import RouterStats, add
from moe.model.loss import IGNORED
from moe.model.transformer import Transformer
from moe.parallel import Ranks
from moe.train.data import Batch


class Evaluation(NamedTuple):
    """ce: nats per real token, without aux and z; tokens: real tokens; tokens_per_expert_LE int64, all ranks."""

    ce: float
    tokens: int
    tokens_per_expert_LE: Tensor


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], ranks: Ranks) -> Evaluation:
    """Every rank must bring the same number of batches. The balancer and its statistics see nothing of it."""
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    stats: RouterStats | None = None
    for batch in batches:
        real = batch.targets_BS != IGNORED
        out = model(batch.tokens_BS.to(ranks.device), batch.targets_BS.to(ranks.device), not bool(real.all()))
        tokens = float(real.sum()) if ranks.first_to_see else 0.0
        total += torch.tensor([float(out.ce), tokens], dtype=torch.float64, device=ranks.device)
        stats = out.stats if stats is None else add(stats, out.stats)
    model.train(was_training)
    assert stats is not None, "TokenData refuses a corpus without a held-out window"
    ce, tokens = ranks.sum(total).tolist()
    stats, _ = ranks.start_balance_sum(stats).wait()
    return Evaluation(ce / tokens if tokens else math.nan, int(tokens), stats.tokens_per_expert)
