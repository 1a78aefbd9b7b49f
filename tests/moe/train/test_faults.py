"""What a user sees when one rank fails: through the real launcher and torchrun, two ranks that share the experts."""

from __future__ import annotations

import json
import time

import pytest

from launch import train as launcher
from moe.train import manifest
from moe.train.checkpoint import verify
from tests.corpus import make_token_folder
from tests.moe.train.test_run import SMALL_WORDS


@pytest.fixture
def start(tmp_path, monkeypatch, capfd):
    """start(fault, *words) -> (exit code, what was printed, seconds); the run folder is tmp_path / "tiny"."""
    data = make_token_folder(tmp_path / "data", {"text": 60_000})
    command = launcher.torchrun_command
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def begin(fault, *words):
        def faulty(*args):
            found = command(*args)
            if fault is not None:
                place = found.index("moe.train")
                found[place : place + 1] = ["tests.moe.train.faulty", fault]
            return found

        monkeypatch.setattr(launcher, "torchrun_command", faulty)
        began = time.monotonic()
        common = [*SMALL_WORDS, "--parallel.ep", "2", "--data.path", str(data), "--run.folder", str(tmp_path)]
        common += ["--train.steps", "12", "--checkpoint.every", "5", "--observe.log_every", "1", "--nproc", "2"]
        code = launcher.main(["--config", "configs/tiny.toml", *common, "--observe.peak_tflops", "1.0", *words])
        seconds, printed = time.monotonic() - began, capfd.readouterr()
        return code, printed.out + printed.err, seconds

    return begin


def whole(folder):
    names = manifest.steps(folder / "tiny" / "checkpoints")
    return [name for name in names if verify(folder / "tiny" / "checkpoints" / name) is None] if names else []


def block(printed):
    """The lines from `error:` on."""
    lines = printed.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1 and "Traceback" not in printed, printed
    return lines[starts[0] :]


CRASHES = [
    ("data:1:8", "rank 1", "OSError: the disk is gone", "7"),
    pytest.param(("forward:0:8", "rank 0", "ValueError: expert 3 is gone", "7"), marks=pytest.mark.slow),
    pytest.param(("wandb:0:0", "rank 0", "RuntimeError: W&B is gone", "none logged"), marks=pytest.mark.slow),
    pytest.param(("kill:1:8", "rank 1", "killed by SIGKILL", "7"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CRASHES, ids=lambda case: case[0])
def test_a_crash_is_one_block_with_the_first_rank_and_the_next_command(start, tmp_path, case):
    fault, rank, cause, step = case
    code, printed, seconds = start(fault)
    assert code == 1 and seconds < 300  # nobody waited for the 20 minutes of a collective
    first, *rest = block(printed)
    found = dict(line.strip().split(None, 1) for line in (x.replace("last step", "last_step") for x in rest))
    assert first == f"error: a worker crashed ({rank})" and found["exception"].startswith(cause)
    assert found["last_step"] == step and found["log"].endswith("stderr.log")
    assert found["next"].startswith("alf-moe train --config configs/tiny.toml")
    saved = [] if step == "none logged" else ["step-00000005"]
    assert whole(tmp_path) == saved and found["next"].endswith("--resume" if saved else "--clean")


def test_bad_data_on_one_rank_alone_hangs_nobody(start):
    code, printed, seconds = start("dataerror:1:8")
    assert code == 3 and seconds < 300
    assert block(printed)[0] == "error: the corpus is gone (on rank 1 alone)"


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_is_restarted_and_the_run_goes_on_from_its_checkpoint(start, tmp_path, rank):
    code, printed, _ = start(f"kill:{rank}:8", "--max-restarts", "1")
    assert code == 0, printed
    assert whole(tmp_path) == ["step-00000010", "step-00000012"]
    events = [json.loads(line) for line in (tmp_path / "tiny" / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events if e["event"] in ("start", "resume")] == [
        ("start", 0),
        ("resume", 5),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["disk", "save"])
def test_a_save_that_fails_on_one_rank_ends_the_run_with_5_and_leaves_the_older_one(start, tmp_path, fault, rank):
    code, printed, _ = start(f"{fault}:{rank}:7", "--train.steps", "1000")
    assert code == 5, printed
    assert "checkpoint of step 10 could not be written" in block(printed)[0]
    assert whole(tmp_path) == ["step-00000005"]
    steps = [json.loads(line)["train/step"] for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert 10 <= steps[-1] < 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [("hang:1:8", "rank 1 did not come to where the others wait"), ("stop:1:8", "rank 1 does not answer")],
)
def test_a_rank_that_hangs_is_named_in_time(start, tmp_path, fault, says):
    code, printed, seconds = start(fault, "--train.timeout_s", "8")
    assert code == 1 and seconds < 300, printed
    lines = block(printed)
    assert lines[0] == f"error: no progress for 8 s (train.timeout_s): {says}"
    assert any(line.startswith("  rank 0") and "step 8" in line for line in lines)
    stacks = [json.loads(file.read_text()) for file in (tmp_path / "tiny" / "logs" / "hang").glob("rank*.json")]
    assert all("train_step" in stack["stack"] for stack in stacks)
    assert lines[-1].endswith("--resume") and whole(tmp_path) == ["step-00000005"]
