"""The dual of balanced routing: so far the sampling floor of the load.

Letters: T tokens, E experts, K experts per token, L = K T / E the target load, A_k the load of expert k.
"""

from __future__ import annotations

import functools
import math

import numpy as np

REPETITIONS = 4096  # standard error of the floor: 0.4 % at E = 16, 0.2 % at E = 256


@functools.lru_cache(maxsize=4096)
def sampling_floor(T: int, E: int, K: int) -> float:
    """E[max_k A_k / L - 1] when T tokens each pick K of E experts uniformly at random: no causal bias does better on
    independent tokens, except where their scores repel each other (docs/theory.md, "The floor").

    Monte-Carlo with a fixed seed. The counts of uniform top-K have variance T p (1 - p), p = K/E, and correlation
    -1/(E - 1): each repetition draws E independent Binomial(T, p), subtracts their mean (which makes the sum K T) and
    scales the deviations by 1/sqrt(1 - 1/E). That is the exact covariance with nearly the right skew, at a cost that
    does not grow with T. Derivation and figures: this project's docs/theory.md; the metric is MaxVio of
    arXiv:2408.15664, section 4.1. Returns 0 for T = 0 and K = E. Raises ValueError for other impossible arguments.
    """
    if T < 0 or not 1 <= K <= E:
        raise ValueError(f"sampling_floor(T={T}, E={E}, K={K}) is not defined: give T >= 0 and 1 <= K <= E")
    if T == 0 or K == E:
        return 0.0
    counts_NE = np.random.default_rng(0).binomial(T, K / E, size=(REPETITIONS, E))
    most_above_mean_N = counts_NE.max(axis=1) - counts_NE.mean(axis=1)
    return float(most_above_mean_N.mean() / math.sqrt(1 - 1 / E) / (K * T / E))
