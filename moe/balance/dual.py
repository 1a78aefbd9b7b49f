"""The theory of the balancing problem in numbers (docs/theory.md)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4096)
def sampling_floor(tokens: int, num_experts: int, top_k: int) -> float:
    """E[max_k A_k / L - 1] when each of T tokens picks K of E experts uniformly at random, L = K T / E: the MaxVio that
    independent tokens have under a perfect but causal bias. Derivation in docs/theory.md.

    Monte-Carlo with a fixed seed (standard error below 1 %). The counts of random K-subsets have variance
    T p (1 - p) and covariance - T p (1 - p) / (E - 1), p = K / E. Independent binomials minus their mean, scaled by
    1 / sqrt(1 - 1/E), have exactly these, and nearly the right skew, at a cost that does not grow with T.
    """
    if tokens <= 0:
        return 0.0
    draws = max(256, min(4096, 2**20 // num_experts))
    counts = np.random.default_rng(0).binomial(tokens, top_k / num_experts, size=(draws, num_experts))
    deviation = (counts - counts.mean(axis=1, keepdims=True)) / np.sqrt(1 - 1 / num_experts)
    return float(deviation.max(axis=1).mean() / (tokens * top_k / num_experts))
