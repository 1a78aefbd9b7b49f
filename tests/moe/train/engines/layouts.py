"""Runs of the tiny model in any layout, whose routing can be recorded and replayed: what the tests of layouts share.

A layout is (dp, ep, data), data the setting parallel.data. Letters: L MoE layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kernels.permute import count_tokens
from kernels.router_topk import combine_weights, router_scores
from moe.balance import build_balancer
from moe.balance.stats import collect
from moe.model.router import Router
from moe.parallel import Ranks, build_ranks
from moe.train.data import Batch
from moe.train.engines import Engine
from tests.moe.train.engines.shared_attention import build_shared
from tests.tiny import CPU, random_tokens, tiny_config

BATCH = 8
LR = 1e-3  # at 1e-2 AdamW makes 3e-5 of the rounding of a norm within 45 steps
LAYOUTS = [
    (dp, ep, data) for data in ("replicate", "shard") for dp, ep in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
]
LAYOUTS.remove((1, 1, "shard"))  # one rank has nothing to shard


class Step(NamedTuple):
    """What one optimizer step showed. ids [L] of [T, K] and margins [L] (least distance of the K-th from the K+1-th biased
    score) are of this rank's tokens."""

    loss: float
    norm: float
    counts: list[list[int]]
    bias: list[list[float]]
    ids: list[np.ndarray]
    margins: list[float]


def whole(tensor: Tensor) -> np.ndarray:
    """All of a tensor that may be sharded; a collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().numpy()


def share(rank: int, n: int, step: int, micro: int | None = None) -> list[Batch]:
    """This rank's micro-batches of a step."""
    x, y = random_tokens(batch=BATCH, seed=step)
    per_rank = BATCH // n
    starts = range(rank * per_rank, (rank + 1) * per_rank, micro := micro or per_rank)
    return [Batch(x[i : i + micro], y[i : i + micro]) for i in starts]


def build(rank: int, n: int, ep: int, data: str, **settings: Any) -> tuple[Engine, Ranks]:
    """An engine with the weights of seed 0; native, unless the settings say otherwise."""
    config = tiny_config(n, **{"parallel__ep": ep, "parallel__data": data} | settings)
    p = config.parallel
    ranks = build_ranks(rank, n, CPU, p.ep, p.tp, p.pp, p.cp)
    return build_shared(config, ranks, 0), ranks


def replay(router: Router, ids_TK: Tensor) -> None:
    """Let the next forward passes choose these experts, whatever their scores are."""

    def route(logits_TE, mask_T, token_ids_T, needs, assigned):
        scores_TE = router_scores(logits_TE, router.model.score_function)
        weights_TK = combine_weights(scores_TE, ids_TK, router.model.renormalize, 1.0, masked=False)
        counts_E = count_tokens(ids_TK, router.model.num_experts)
        return weights_TK, ids_TK, scores_TE, collect(needs, scores_TE.detach(), router.expert_bias_E, ids_TK, counts_E)

    router._route = route


def run(
    rank: int, n: int, ep: int, data: str, count: int, recorded: list[Step] | None = None, **settings: Any
) -> tuple[list[Step], dict[str, np.ndarray]]:
    """`count` steps, and every gradient of the first. recorded: the steps of one process, whose routing is replayed."""
    engine, ranks = build(rank, n, ep, data, optim__lr=LR, **settings)
    routers = engine.model.routers
    balancer = build_balancer(engine.config.balance, list(routers), 8, engine.config.model.top_k)
    seen: dict[int, tuple[np.ndarray, float]] = {}

    def note(layer: int, router: Router):
        def hook(_module, _inputs, routing):
            chosen = (routing.scores_TE + router.expert_bias_E).topk(router.model.top_k + 1).values
            seen[layer] = routing.topk_ids_TK.numpy().copy(), float((chosen[:, -2] - chosen[:, -1]).min())

        return hook

    for layer, router in routers.items():
        router.register_forward_hook(note(layer, router))
    steps, gradients = [], {}
    for number in range(count):
        if recorded is not None:
            for router, ids_TK in zip(routers.values(), recorded[number].ids, strict=True):
                replay(router, torch.from_numpy(ids_TK).chunk(n)[rank])
        out = engine.forward_backward(share(rank, n, number))
        if number == 0:
            gradients = {name: whole(p.grad) for name, p in engine.model.named_parameters()}
        done = engine.step()
        stats, _ = ranks.start_balance_sum(out.stats).wait()
        balancer.step(stats)
        balancer.publish(list(routers.values()))
        bias = [router.expert_bias_E.tolist() for router in routers.values()]
        loss = float((ranks.sum(out.losses_3) / out.tokens).sum())
        found = list(seen.values())
        steps.append(
            Step(
                loss,
                done.grad_norm,
                stats.tokens_per_expert.tolist(),
                bias,
                [i for i, _ in found],
                [m for _, m in found],
            )
        )
    return steps, gradients


def runs(rank: int, n: int, layouts: list[tuple[int, str]], count: int, recorded: list[Step]) -> list[tuple]:
    """For every (ep, data): the steps with replayed routing, those with their own, and the gradients."""
    found = []
    for ep, data in layouts:
        replayed, gradients = run(rank, n, ep, data, count, recorded)
        free, _ = run(rank, n, ep, data, count)
        found.append((replayed, free, gradients if rank == 0 else None))
    return found
