"""Where the time went: a clock that the test moves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe.observe import cost, goodput
from moe.observe.goodput import PARTS, Goodput
from moe.observe.sinks import read_metrics
from moe.train.loop import train
from tests.corpus import make_token_folder
from tests.moe.train.test_run import config
from tests.tiny import ALONE, tiny_config


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    return pass_time


def steps(meter, clock, count):
    for _ in range(count):
        with meter.part("productive"):
            with meter.part("data_wait"):
                clock(1)
            clock(4)
        clock(0.5)


def test_every_second_is_in_one_part_and_the_shares_add_up(clock, tmp_path):
    meter = Goodput(990.0, tmp_path / "events.jsonl")
    clock(10)
    steps(meter, clock, 4)
    with meter.part("checkpoint"):
        clock(3)
    with meter.part("evaluation"):
        clock(5)
    meter.imbalanced(2.0)
    seconds = dict.fromkeys(PARTS, 0.0) | {"productive": 14, "init": 20, "data_wait": 4, "evaluation": 5}
    assert meter.seconds == seconds | {"checkpoint": 3, "imbalance": 2}
    shares = meter.metrics()
    assert shares["goodput/productive"] == pytest.approx(14 / 50) and shares["goodput/other"] == pytest.approx(2 / 50)
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("events", [True, False])  # the file may be gone; the checkpoint says the same
def test_a_restart_costs_everything_from_its_checkpoint_to_its_first_step(clock, tmp_path, events):
    meter = Goodput(1000.0, tmp_path / "events.jsonl")
    steps(meter, clock, 4)
    saved = json.loads(json.dumps(meter.state()))
    steps(meter, clock, 2)  # lost: 11 s
    clock(100)  # down
    if events:
        (tmp_path / "events.jsonl").write_text('{"time": 1000.0}\n')
    after = Goodput(1133.0, tmp_path / "events.jsonl")
    after.resume(saved)
    clock(7)  # starting
    steps(after, clock, 2)
    assert after.seconds == dict.fromkeys(PARTS, 0.0) | {"productive": 24, "data_wait": 6, "restarts": 11 + 100 + 7}
    assert sum(after.metrics().values()) == pytest.approx(1) and after.first == 1000.0


def test_a_restart_without_a_checkpoint_lost_everything(clock, tmp_path):
    (tmp_path / "events.jsonl").write_text('{"time": 900.0}\n{"ti')
    meter = Goodput(995.0, tmp_path / "events.jsonl")
    clock(10)
    steps(meter, clock, 1)
    assert meter.seconds["restarts"] == 110 and meter.seconds["init"] == 0 and meter.first == 900.0
    (tmp_path / "events.jsonl").write_text('{"ti')
    assert Goodput(995.0, tmp_path / "events.jsonl").first == 995.0


def test_the_routed_share_by_hand():
    c = tiny_config()  # 2 MoE layers, top 2, D = 32, F = 16
    assert cost.routed_share(c) == pytest.approx(6 * 2 * 2 * 3 * 32 * 16 / cost.flops_per_token(c))


def test_a_run_logs_it_and_a_resumed_one_goes_on(tmp_path):
    data = make_token_folder(tmp_path / "data")
    c = config(data, evaluate__every=2, observe__regret_every=0)
    assert train(c, ALONE, tmp_path / "run", False).code == 0
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/ce" in r]
    keys = {key for key in rows[-1] if key.startswith("goodput/")}
    documented = set()
    for row in re.findall(
        r"^\| `goodput/([^`]+)`", (Path(__file__).parents[3] / "docs/metrics.md").read_text(), flags=re.M
    ):
        documented |= {f"goodput/{name}" for name in row.strip("{}").split(",")}
    assert keys == documented == {f"goodput/{name}" for name in (*PARTS, "other")}
    last = rows[-1]
    assert sum(last[key] for key in keys) == pytest.approx(1) and min(last[key] for key in keys) >= 0
    assert last["goodput/restarts"] == last["goodput/imbalance"] == 0
    assert min(last[f"goodput/{part}"] for part in ("productive", "init", "data_wait", "evaluation", "checkpoint")) > 0
    assert train(config(data, train__steps=8, observe__regret_every=0), ALONE, tmp_path / "run", True).code == 0
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/ce" in r]
    assert rows[-1]["train/step"] == 8 and rows[-1]["goodput/restarts"] > 0
