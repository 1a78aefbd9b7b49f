"""The sampling floor against an exact simulation and the figures of docs/theory.md."""

import time

import numpy as np
import pytest

from moe.balance.dual import sampling_floor


def simulated(T: int, E: int, K: int, repetitions: int) -> float:
    """Uniform random top-K of every token, counted."""
    rng = np.random.default_rng(1)
    total = 0.0
    for _ in range(repetitions):
        ids_TK = rng.random((T, E), dtype=np.float32).argpartition(K, axis=1)[:, :K]
        total += np.bincount(ids_TK.ravel(), minlength=E).max() / (K * T / E) - 1
    return total / repetitions


@pytest.mark.parametrize(
    ("T", "E", "K", "repetitions"), [(256, 16, 2, 2000), (512, 64, 6, 800), (128, 8, 6, 4000), (512, 4, 1, 2000)]
)
def test_floor_is_within_two_percent_of_an_exact_simulation(T, E, K, repetitions):
    assert sampling_floor(T, E, K) == pytest.approx(simulated(T, E, K, repetitions), rel=0.02)


@pytest.mark.parametrize(("T", "floor"), [(2_359_296, 0.005), (65_536, 0.031), (2_048, 0.167)])
def test_floor_has_the_figures_of_the_theory(T, floor):
    assert sampling_floor(T, 64, 6) == pytest.approx(floor, rel=0.03)


def test_floor_falls_with_the_square_root_of_the_tokens():
    assert sampling_floor(1 << 14, 16, 2) == pytest.approx(2 * sampling_floor(1 << 16, 16, 2), rel=0.03)


def test_floor_is_cached_and_its_seed_is_fixed():
    first = sampling_floor(10_000, 256, 8)
    start = time.perf_counter()
    assert sampling_floor(10_000, 256, 8) == first
    assert time.perf_counter() - start < 1e-3
    sampling_floor.cache_clear()
    assert sampling_floor(10_000, 256, 8) == first


def test_floor_of_no_choice_is_zero():
    assert sampling_floor(0, 8, 2) == 0.0
    assert sampling_floor(100, 8, 8) == 0.0


@pytest.mark.parametrize(("T", "E", "K"), [(10, 4, 5), (10, 4, 0), (-1, 4, 2)])
def test_floor_refuses_impossible_arguments(T, E, K):
    with pytest.raises(ValueError, match="not defined"):
        sampling_floor(T, E, K)
