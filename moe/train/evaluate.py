"""Held-out loss, load and routing with the bias frozen.

Letters: B batch, S sequence, T = B*S tokens, L MoE layers, E experts, K experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.balance.stats import RouterStats, add
from moe.model.loss import IGNORED
from moe.model.transformer import Transformer
from moe.observe.scores import tapped
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


@torch.no_grad()
def routed_experts(model: Transformer, batches_BS: Iterable[Tensor], device: torch.device) -> np.ndarray:
    """The experts [L, T, K] int16 of every token in every layer, in the order of the tokens. batches_BS: int64, no padding."""
    was_training = model.training
    model.eval()
    with tapped(model.routers, lambda routing: routing.topk_ids_TK.short()) as found:
        for tokens_BS in batches_BS:
            model.hidden(tokens_BS.to(device), None)
    model.train(was_training)
    return torch.stack([torch.cat(ids) for ids in found.values()]).cpu().numpy()
