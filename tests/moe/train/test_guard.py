"""Loss spikes: which steps are refused, and that all ranks refuse them together."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from moe.observe.sinks import read_metrics
from moe.parallel import build_ranks
from moe.train.device import StopSignal
from moe.train.guard import WINDOW, SpikeGuard
from moe.train.loop import Run, run_steps
from tests.corpus import make_token_folder
from tests.moe.train.test_run import config
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU


def window(n=WINDOW):
    return [4.0 + 0.01 * math.sin(i) for i in range(n)]


def test_the_limit_is_the_mean_and_six_sigma_of_the_window():
    guard = SpikeGuard(6.0, window())
    limit = statistics.fmean(window()) + 6 * statistics.pstdev(window())
    assert guard.limit() == pytest.approx(limit) and 4.0 < limit < 4.1
    assert guard.allows(limit - 1e-6) and not SpikeGuard(6.0, window()).allows(limit + 1e-6)
    assert SpikeGuard(6.0, window()).allows(0.0)  # below is no spike


def test_before_the_window_is_full_and_without_sigma_everything_passes():
    guard = SpikeGuard(6.0, window(WINDOW - 1))
    assert guard.allows(4000.0) and len(guard.losses) == WINDOW
    off = SpikeGuard(0.0, window())
    assert off.allows(4000.0) and off.losses == window()


def test_an_outlier_does_not_blind_the_guard_and_a_new_level_is_accepted():
    guard = SpikeGuard(6.0, window())
    before = guard.limit()
    assert not guard.allows(4000.0) and len(guard.losses) == WINDOW
    assert guard.limit() < before + 0.02 and not guard.allows(4.5)
    refused = 0
    while not guard.allows(5.0):
        refused += 1
        assert refused < 60
    assert refused > 3


def test_what_is_not_finite_is_the_gradient_check_s():
    guard = SpikeGuard(6.0, window())
    for loss in (math.nan, math.inf, -math.inf):
        assert guard.allows(loss)
    assert guard.losses == window()


def _spike(rank, n, data, folder):
    run = Run(
        config(data, n, parallel__ep=n, train__steps=5, checkpoint__every=0),
        build_ranks(rank, n, CPU, n),
        Path(folder),
        False,
    )
    run.progress.losses += [5.0 + 0.1 * math.sin(i) for i in range(WINDOW)]
    real, weights = run.engine.forward_backward, []

    def spiked(batches):
        weights.append([p.detach().clone() for p in run.engine.model.parameters()])
        out = real(batches)
        factor = 1000.0 if run.progress.step == 2 and rank == n - 1 else 1.0  # of one rank alone
        return out._replace(losses_3=out.losses_3 * factor)

    run.engine.forward_backward = spiked
    outcome = run_steps(run, StopSignal())
    same = [all(torch.equal(a, b) for a, b in zip(weights[i], weights[i + 1], strict=True)) for i in range(4)]
    restored = Run(run.config, run.ranks, Path(folder), True).progress
    return outcome.code, run.progress.skipped, run.progress.spikes, same, restored == run.progress, len(restored.losses)


def test_a_spike_on_one_rank_is_skipped_by_all_counted_and_logged(tmp_path):
    data = make_token_folder(tmp_path / "data")
    (tmp_path / "run").mkdir()
    for found in run_ranks(_spike, 2, str(data), str(tmp_path / "run")):
        assert found == (0, 1, 1, [False, False, True, False], True, WINDOW)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["why"]) for e in events if e["event"] == "skip"] == [(3, "loss spike")]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/ce" in row]
    assert [row["optim/loss_spikes"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[2]["optim/grad_norm"] is None and rows[2]["loss/ce"] is None


def _nan(rank, n, data):
    return [_poisoned(rank, n, data, ep) for ep in (2, 1)]


def _poisoned(rank, n, data, ep):
    run = Run(config(data, n, parallel__ep=ep), build_ranks(rank, n, CPU, ep), Path(data), False)
    run.train_step(False)
    before = [p.detach().clone() for p in run.engine.model.parameters()]

    def poison(grad):
        (grad.to_local() if isinstance(grad, DTensor) else grad)[0, 0, 0] = math.nan
        return grad

    if rank == n - 1:
        run.engine.expert_parameters[0].register_hook(poison)
    done, _ = run.train_step(False)
    same = all(torch.equal(a, b) for a, b in zip(before, run.engine.model.parameters(), strict=True))
    return done.applied, same, run.progress.skipped


def test_p12_a_nan_in_one_expert_s_gradient_on_one_rank_skips_the_step_on_all(tmp_path):
    data = make_token_folder(tmp_path / "data")
    assert run_ranks(_nan, 2, str(data)) == [[(False, True, 1)] * 2] * 2


def test_the_guard_stops_a_run_that_only_spikes(tmp_path):
    run = Run(config(make_token_folder(tmp_path / "data"), train__max_skipped_steps=3), ALONE, tmp_path, False)
    run.guard.allows = lambda loss: False
    outcome = run_steps(run, StopSignal())
    assert outcome.code == 4 and "3 steps in a row were skipped" in outcome.reason and run.progress.spikes == 3
