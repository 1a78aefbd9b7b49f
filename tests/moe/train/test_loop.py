"""The step and what surrounds it: layouts, what is logged, when a run stops. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.observe.sinks import read_metrics
from moe.parallel import build_ranks
from moe.train import checkpoint
from moe.train.device import StopSignal
from moe.train.loop import Run, run_steps, train
from moe.train.optim import learning_rate
from tests.corpus import make_token_folder
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, tiny_config


@pytest.fixture
def data(tmp_path):
    return str(make_token_folder(tmp_path / "data"))


def config(data, world_size=1, **settings):
    base = {"observe__wandb": "off", "observe__peak_tflops": 1.0, "observe__log_every": 2, "observe__regret_every": 0}
    return tiny_config(world_size, **{"data__path": data, "train__steps": 5, **base, **settings})


def rows_of(run_dir):
    return read_metrics(run_dir / "metrics.jsonl")


# -- layouts -----------------------------------------------------------------------------------------------------------

LOSSES = {"balance__aux_loss": 0.1, "balance__aux_scope": "sequence", "balance__z_loss": 0.01, "evaluate__every": 2}


class AskedOf:
    """A stop signal that reached one rank only."""

    def __init__(self, asked):
        self.requested = asked


def _on_two_ranks(rank, n, data, folder):
    whole = config(data, n, parallel__ep=2, train__micro_batch_size=2, evaluate__batch_size=3, **LOSSES)
    ranks = build_ranks(rank, n, CPU, 2)
    assert train(whole, ranks, Path(folder) / "two", False).code == 0
    bias = Run(whole, ranks, Path(folder) / "two", True).balancer.bias_LE.tolist()
    # p13: no MoE layer, so nothing to sum and nothing to log about it
    dense = config(data, n, model__first_k_dense=3, balance__method="none", balance__rate=None)
    assert train(dense, build_ranks(rank, n, CPU, 1), Path(folder) / "dense", False).code == 0
    assert Run(dense, build_ranks(rank, n, CPU, 1), Path(folder) / "dense", True).progress.step == 5
    stopped = Run(config(data, n), build_ranks(rank, n, CPU, 1), Path(folder), False)
    outcome = run_steps(stopped, AskedOf(rank == 1))
    assert next(checkpoint.whole(stopped.checkpoints, stopped.ranks, print)).trainer["step"] == stopped.progress.step
    return bias, outcome.code, stopped.progress.step


@pytest.fixture
def two_ranks(data, tmp_path):
    return run_ranks(_on_two_ranks, 2, data, str(tmp_path)), tmp_path


def test_p01_p02_p13_p24_p25_a_run_logs_the_same_in_every_layout(two_ranks, data):
    results, folder = two_ranks
    logged, biases = [], [bias for bias, _, _ in results]
    for name, micro in (("one", 8), ("micro", 2)):
        alone = config(data, train__micro_batch_size=micro, evaluate__batch_size=4, **LOSSES)
        assert train(alone, ALONE, folder / name, False).code == 0
        logged.append(rows_of(folder / name))
        biases.append(Run(alone, ALONE, folder / name, True).balancer.bias_LE.tolist())
    logged.append(rows_of(folder / "two"))
    assert all(bias == biases[-1] for bias in biases) and np.abs(biases[-1]).max() > 0  # to the bit
    for rows in logged[1:]:
        assert [r["train/step"] for r in rows] == [2, 2, 4, 4, 5, 5]  # each a training row and an evaluation
        for found, expected in zip(rows, logged[0], strict=True):
            keys = [k for k in expected if not k.startswith(("speed/", "memory/", "goodput/", "moe/straggler"))]
            assert {k: found[k] for k in keys} == pytest.approx({k: expected[k] for k in keys}, rel=1e-4, abs=1e-7)
    counts = [np.load(folder / name / "loads.npz")["counts"] for name in ("one", "micro", "two")]
    assert all(np.array_equal(c, counts[0]) for c in counts)
    assert counts[0].sum(axis=(1, 2)).tolist() == [2 * 2 * 8 * 16 * 2] * 2 + [2 * 8 * 16 * 2]
    # p13: a model without experts, on two ranks
    dense = rows_of(folder / "dense")
    assert dense[-1]["val/ce"] > 0 and not any(key.startswith("moe/") for row in dense for key in row)
    # A signal that reached rank 1 alone stops both after the same step.
    assert [(code, step) for _, code, step in results] == [(75, 1)] * 2


# -- the step ----------------------------------------------------------------------------------------------------------


def test_every_step_has_its_own_learning_rate_and_the_logged_one_is_that_of_the_step(data, tmp_path):
    c = config(data, optim__warmup_steps=2, observe__log_every=1)
    run, used = Run(c, ALONE, tmp_path, False), []
    step = run.engine.optimizer.step
    run.engine.optimizer.step = lambda: used.append([g["lr"] for g in run.engine.optimizer.param_groups]) or step()
    run_steps(run, StopSignal())
    expected = [learning_rate(c.optim, 5, n) for n in range(5)]
    assert [set(rates) for rates in used] == [{rate} for rate in expected] and len(set(expected)) == 4
    assert [r["optim/lr"] for r in rows_of(tmp_path) if "optim/lr" in r] == expected


def test_p05_p10_the_bias_of_one_batch_routes_the_next_one(data, tmp_path):
    run, before, after = Run(config(data), ALONE, tmp_path, False), [], []
    real = run.engine.forward_backward

    def watched(micro_batches):
        before.append([r.expert_bias_E.clone() for r in run.routers.values()])
        out = real(micro_batches)
        after.append([r.expert_bias_E.clone() for r in run.routers.values()])
        return out

    run.engine.forward_backward = watched
    for step in range(3):
        master = run.balancer.bias_LE.clone()
        run.train_step(False)
        assert torch.equal(torch.stack(before[step]), master) and torch.equal(torch.stack(after[step]), master)
        assert not torch.equal(run.balancer.bias_LE, master)


def test_p04_evaluation_in_a_run_leaves_bias_counters_and_progress(data, tmp_path):
    run = Run(config(data, balance__phi_loss=0.1), ALONE, tmp_path, False)
    run.train_step(False)
    state, step = run.state(), run.progress.step
    before = {k: v.clone() for part in ("balancer", "tracker") for k, v in state[part].items()}
    model = {k: v.clone() for k, v in run.engine.model.state_dict().items()}
    run.evaluate()
    run.evaluate()
    state = run.state()
    assert all(torch.equal(v, before[k]) for part in ("balancer", "tracker") for k, v in state[part].items())
    assert all(torch.equal(v, model[k]) for k, v in run.engine.model.state_dict().items())
    assert run.progress.step == step and run.engine.model.training
    row = rows_of(tmp_path)[-1]
    assert row["val/tokens"] == 199 and row["val/ce"] == run.val_ce
    assert row["val/bits_per_byte"] == pytest.approx(run.val_ce / math.log(2) * 200 / 600, rel=2e-2)  # 3 bytes a token


def test_a_logged_loss_is_the_mean_of_the_applied_steps_since_the_last_one(data, tmp_path):
    run, seen = Run(config(data, observe__log_every=3, train__steps=6), ALONE, tmp_path, False), []
    real = run.engine.forward_backward

    def watched(micro_batches):
        out = real(micro_batches)
        seen.append(float(out.losses_3[0] / out.tokens))
        if len(seen) == 5:
            run.engine.model.norm.weight.grad[0] = math.inf
            return out._replace(losses_3=out.losses_3 * math.nan)
        return out

    run.engine.forward_backward = watched
    run_steps(run, StopSignal())
    rows = [r for r in rows_of(tmp_path) if "loss/ce" in r]
    assert [r["train/step"] for r in rows] == [3, 5, 6]  # a skipped step is logged at once
    means = [np.mean(seen[:3]), seen[3], seen[5]]
    assert [r["loss/ce"] for r in rows] == pytest.approx(means, rel=1e-5)
    assert [r["loss/total"] for r in rows] == pytest.approx(means, rel=1e-5)
    assert [r["optim/skipped_steps"] for r in rows] == [0, 1, 1]
    assert [r["train/tokens"] for r in rows] == [3 * 128, 5 * 128, 6 * 128]


def test_the_order_hash_is_of_every_sample_so_far(data, tmp_path):
    run, expected = Run(config(data), ALONE, tmp_path, False), ""
    for step in range(3):
        run.train_step(False)
        expected = run.data.order_hash(expected, step)
    assert run.progress.order_hash == expected
    assert run.next_samples() == run.data.order_hash(expected, 3)


def test_p07_a_resumed_router_has_the_bias_and_the_shares_of_the_balancer(data, tmp_path):
    c = config(data, balance__phi_loss=0.1, train__steps=2)
    assert train(c, ALONE, tmp_path / "run", False).code == 0
    run = Run(c, ALONE, tmp_path / "run", True)
    for index, router in enumerate(run.routers.values()):
        assert torch.equal(router.ema_share_E, run.balancer.state["ema_share"][index])
        assert (router.ema_share_E - 1 / 8).abs().max() > 1e-6
        assert torch.equal(router.expert_bias_E, run.balancer.bias_LE[index]) and router.expert_bias_E.abs().max() > 0


# -- the end -----------------------------------------------------------------------------------------------------------


def test_guard_stops_at_its_limit_and_saves_there(data, tmp_path):
    c = config(data, train__steps=30, train__max_skipped_steps=3, optim__lr=1e30)
    assert train(c, ALONE, tmp_path / "run", False).code == 4
    skipped = [r["step"] for r in map(json.loads, (tmp_path / "run" / "events.jsonl").open()) if r["event"] == "skip"]
    assert skipped == list(range(skipped[0], skipped[0] + 3))
    losses = {r["train/step"]: r["loss/ce"] for r in rows_of(tmp_path / "run")}
    assert losses[2] > 0 and losses[skipped[-1]] is None  # step 1 was applied; since then no step has a loss
    run = Run(c, ALONE, tmp_path / "run", True)
    assert run.progress.step == skipped[-1] and run.progress.skipped_in_row == 3


def test_a_resumed_run_keeps_its_identity_and_refuses_other_data(data, tmp_path):
    assert train(config(data, train__steps=2), ALONE, tmp_path / "run", False).code == 0
    about = (tmp_path / "run" / "run.json").read_text()
    assert train(config(data, train__steps=3), ALONE, tmp_path / "run", True).code == 0
    assert (tmp_path / "run" / "run.json").read_text() == about
    with np.load(tmp_path / "run" / "loads.npz") as loads:
        assert loads["steps"].tolist() == [2, 3]  # the loads of both parts
    kinds = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").open()]
    assert kinds == ["start", "save", "resume", "save"]
    other = str(make_token_folder(tmp_path / "other", seed=1))
    with pytest.raises(checkpoint.CheckpointError, match=r"data = .* differs from"):
        Run(config(other), ALONE, tmp_path / "run", True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_signals_are_remembered(number):
    signal.signal(number, signal.SIG_IGN)  # one that is not listened to must fail this test, not end it
    signals = StopSignal()
    assert not signals.requested
    signal.raise_signal(number)
    assert signals.requested and signals.name == number.name
