"""`python -m moe.train`: what it leaves for the launcher, and when a restarted worker resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.config import ConfigError
from moe.train import __main__ as worker
from moe.train.checkpoint import CheckpointError
from moe.train.data import DataError
from moe.train.loop import Outcome
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "configs" / "tiny.toml")


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(outcome, *words) -> (exit.json, the arguments of `train`); an exception is raised by it."""
    calls, kept = [], []

    def begin(outcome, *words):
        def train(config, ranks, run_dir, resume, began):
            assert kept.pop()  # before anything is allocated
            calls.append((config, run_dir, resume))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(worker, "train", train)
        monkeypatch.setattr(worker, "keep_freed_memory", lambda: kept.append(True))
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


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
child.wait()
"""
CHILD = "from moe.train.__main__ import die_with_parent; die_with_parent(); print('up', flush=True); import time; time.sleep(60)"


def test_a_worker_dies_with_its_torchrun():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child, up = parent.stdout.readline().split()
    assert up == "up"
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while running(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not running(child)


def test_a_worker_that_starts_after_its_torchrun_died_dies_too():
    """It may have been importing torch when torchrun was killed: no signal comes any more."""
    code = CHILD.replace("import time; time.sleep(60)", "")
    for launcher, expected in ((os.getppid(), 0), (os.getpid(), -signal.SIGKILL)):  # the parent of ours, and not
        environment = {**os.environ, "ALF_MOE_LAUNCHER": str(launcher)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == expected and done.stdout == ("" if expected else "up\n")


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_refusal_of_one_rank_alone_names_it_and_one_of_all_does_not(tmp_path, capsys):
    worker.leave(Outcome(3, "no corpus"), 1, tmp_path, alone=True)
    assert json.loads((tmp_path / "exit.json").read_text()) == {
        "code": 3,
        "reason": "no corpus (on rank 1 alone)",
        "rank": 1,
    }
    worker.leave(Outcome(3, "no corpus"), 0, tmp_path, alone=False)
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 3, "reason": "no corpus"}
    assert capsys.readouterr().err == "error: no corpus (on rank 1 alone)\nerror: no corpus\n"


def _refuse(rank, n, both):
    worker.MEET_S = 1.0
    time.sleep(0.2 * rank)
    return worker.others_refuse(rank) if both or rank == 1 else None


@pytest.mark.parametrize("both", [True, False])
def test_whether_all_ranks_refuse(both):
    assert run_ranks(_refuse, 2, both) == ([True, True] if both else [None, False])
