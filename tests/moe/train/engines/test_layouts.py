"""The same training in every layout of the ranks, replicated and sharded. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import numpy as np
import pytest

from tests.moe.train.engines.layouts import LAYOUTS, Step, run, runs
from tests.ranks import run_ranks


def check(layout: tuple, rows: list[tuple], reference: list[Step], gradients: dict[str, np.ndarray]) -> None:
    """rows: of each rank, what `runs` found for this layout."""
    for step, first in enumerate(reference):
        for replayed, free, _ in rows:
            assert replayed[step].loss == pytest.approx(first.loss, rel=1e-5), (layout, step)
            assert replayed[step].norm == pytest.approx(first.norm, rel=1e-5), (layout, step)
            assert replayed[step].counts == first.counts and replayed[step].bias == first.bias
            assert free[step].bias == rows[0][1][step].bias, (layout, step)  # p01: to the bit, on all ranks
    free = rows[0][1]
    differs = next((i for i, a in enumerate(reference) if free[i].counts != a.counts), len(reference))
    assert differs > 0, f"{layout}: from the same weights another routing"
    for step in range(differs):
        assert free[step].loss == pytest.approx(reference[step].loss, rel=1e-6), (layout, step)
        assert free[step].bias == reference[step].bias
    if differs < len(reference):
        print(f"{layout}: routing differs from step {differs} on, least margin {min(reference[differs].margins):.1e}")
        assert min(reference[differs].margins) < 1e-4, "a choice so clear is no matter of rounding"
    for name, expected in gradients.items():  # p22
        off = np.linalg.norm(rows[0][2][name] - expected)
        assert off <= 1e-5 * np.linalg.norm(expected), (layout, name, off)


def compare(layouts: list[tuple[int, int, str]], count: int) -> None:
    reference, gradients = run(0, 1, 1, "replicate", count)
    replayed, _ = run(0, 1, 1, "replicate", count, reference)
    assert [s.loss for s in replayed] == [s.loss for s in reference]  # the replay itself changes nothing
    assert len({step.loss for step in reference}) == count and np.abs(reference[-1].bias).max() > 0
    for n in sorted({dp for dp, _, _ in layouts if dp > 1}):
        mine = [(ep, data) for dp, ep, data in layouts if dp == n]
        found = run_ranks(runs, n, mine, count, reference, timeout_s=900)
        for index, (ep, data) in enumerate(mine):
            check((n, ep, data), [rows[index] for rows in found], reference, gradients)


def test_p01_p22_four_layouts_train_alike():
    compare([(4, 1, "shard"), (4, 2, "shard"), (4, 4, "shard"), (4, 2, "replicate")], 8)


@pytest.mark.slow
def test_p01_p22_every_layout_trains_alike_for_50_steps():
    compare(LAYOUTS, 50)
