"""`python -m moe.train`: what it leaves for the launcher, and when a restarted worker resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.config import ConfigError
from moe.train import __main__ as worker
from moe.train.checkpoint import CheckpointError
from moe.train.data import DataError
from moe.train.loop import Outcome

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "configs" / "tiny.toml")


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(outcome, *words) -> (exit.json, the arguments of `train`); an exception is raised by it."""
    calls = []

    def begin(outcome, *words):
        def train(config, ranks, run_dir, resume, began):
            calls.append((config, run_dir, resume))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(worker, "train", train)
        worker.main([f"--config={TINY}", "--parallel.ep", "1", "--run.folder", str(tmp_path), *words])
        left = json.loads((tmp_path / "tiny" / "exit.json").read_text())
        return left, calls[-1] if calls else None

    return begin


@pytest.mark.parametrize(
    ("outcome", "code", "prints"),
    [
        (Outcome(0, "done"), 0, False),
        (Outcome(75, "stopped"), 75, False),
        (Outcome(4, "not finite"), 4, True),
        (ConfigError("bad setting"), 2, True),
        (DataError("bad data"), 3, True),
        (CheckpointError("bad checkpoint"), 5, True),
    ],
)
def test_exit_json_has_the_code_and_the_reason(start, capsys, outcome, code, prints):
    left, _ = start(outcome)
    reason = outcome.reason if isinstance(outcome, Outcome) else str(outcome)
    assert left == {"code": code, "reason": reason}
    assert capsys.readouterr().err == (f"error: {reason}\n" if prints else "")


def test_a_bad_setting_is_refused_before_training(start, capsys):
    left, called = start(Outcome(0, "done"), "--parallel.ep", "3")
    assert left["code"] == 2 and "parallel.ep = 3" in left["reason"] and called is None


def test_settings_and_folder_reach_the_trainer(start, tmp_path):
    _, (config, run_dir, resume) = start(Outcome(0, "done"), "--train.steps", "777")
    assert (config.train.steps, run_dir, resume) == (777, tmp_path / "tiny", False)
    assert start(Outcome(0, "done"), "--resume")[1][2] is True


def test_a_restarted_worker_resumes_where_there_is_a_checkpoint(start, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start(Outcome(0, "done"))[1][2] is False  # its first attempt died before the first checkpoint
    (tmp_path / "tiny" / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert start(Outcome(0, "done"))[1][2] is True
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert start(Outcome(0, "done"))[1][2] is False
