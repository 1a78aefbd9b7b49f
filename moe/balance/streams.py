"""Score streams without a network: what a router might send, batch after batch. The laboratory runs the rules on them.

`stream` yields float32 scores [T, E]; all randomness comes from the seed, so that every rule can see the same batches.
A recorded stream is a file of `observe.record_scores`. Letters: T tokens, D topics, E experts, N batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

KINDS = ("fixed", "iid", "drift", "fast_drift", "topics", "skewed", "jump", "growing", "times_ten")
"""fixed: one batch again and again. iid: fresh noise, no expert better. drift, fast_drift: the experts' means wander, by
0.02 and 0.1 of the noise a step. topics: each batch has few topics, which like few experts. skewed: constant, very unequal
means. jump: the means are drawn anew half way. growing: noise and means grow tenfold. times_ten: skewed, logits times ten."""

JUMP_AT = 0.5


def stream(kind: str, tokens: int, num_experts: int, score: str, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of scores [T, E] float32 in (0, 1). score: "sigmoid" or "softmax". Raises ValueError for an unknown
    kind or score."""
    if kind not in KINDS:
        raise ValueError(f"stream = {kind!r} is not known: choose one of {', '.join(KINDS)}")
    if score not in ("sigmoid", "softmax"):
        raise ValueError(f"score_function = {score!r} is not known: choose sigmoid or softmax")
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    mean_E = torch.zeros(num_experts)
    if kind in ("drift", "fast_drift", "jump", "growing"):
        mean_E = 0.3 * normal(num_experts)
    elif kind in ("skewed", "times_ten"):
        mean_E = normal(num_experts)
    likes_DE = normal(32, num_experts) if kind == "topics" else None
    first = None
    for n in range(steps):
        if kind in ("drift", "fast_drift"):
            mean_E = mean_E + (0.02 if kind == "drift" else 0.1) * normal(num_experts)
        if kind == "jump" and n == int(steps * JUMP_AT):
            mean_E = normal(num_experts)
        logits_TE = normal(tokens, num_experts) + mean_E
        if likes_DE is not None:
            share_D = (1.5 * normal(len(likes_DE))).softmax(0)  # another mixture of topics every batch
            topic_T = torch.multinomial(share_D, tokens, replacement=True, generator=rng)
            logits_TE = logits_TE + 0.7 * likes_DE[topic_T]
        if kind == "growing":
            logits_TE = logits_TE * math.exp(math.log(10) * n / steps)
        elif kind == "times_ten":
            logits_TE = logits_TE * 10
        scores_TE = logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)
        if kind == "fixed":
            first = scores_TE if first is None else first
            scores_TE = first
        yield scores_TE


SEED_STRIDE = 10


def recorded_path(kind: str) -> str | None:
    """FILE of "recorded=FILE", else None."""
    return kind.removeprefix("recorded=") if kind.startswith("recorded=") else None


def open_stream(
    kind: str, tokens: int, num_experts: int, top_k: int, score: str, steps: int, seed: int
) -> tuple[Iterator[Tensor], int]:
    """Batches of a synthetic or recorded stream, and its top_k. A recorded one brings its own sizes; its seed s begins
    s * SEED_STRIDE batches later. Raises OSError and ValueError for a file that is not there or not such a file."""
    path = recorded_path(kind)
    if path is None:
        return stream(kind, tokens, num_experts, score, steps, seed), top_k
    try:
        with np.load(path) as file:
            scores, top_k = file["scores"], int(file["top_k"])  # [N, T, E] float16 or float32
    except (KeyError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is no recording of observe.record_scores ({error}): name a file of <run>/scores"
        ) from None
    begin = seed * SEED_STRIDE
    if begin >= len(scores):
        raise ValueError(
            f"{path} has {len(scores)} batches and seed {seed} begins at batch {begin}: record more, or ask for fewer seeds"
        )
    return (torch.from_numpy(batch.astype(np.float32)) for batch in scores[begin : begin + steps]), top_k
