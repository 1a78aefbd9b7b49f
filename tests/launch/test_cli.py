"""The command line: speed, refusals in one sentence, the rules of the run folder, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moe
from launch import cli, train

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.toml")


def alf_moe(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command line that would start: the data folder exists, the run folder does not."""
    (tmp_path / "data").mkdir()
    found = ["--config", TINY, "--nproc", "2", "--run.folder", str(tmp_path / "runs")]
    return [*found, "--data.path", str(tmp_path / "data")]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch):
    """workers(code): run this Python code in place of torchrun, on a machine without GPUs."""
    monkeypatch.setattr(train, "count_gpus", lambda: 0)

    def replace(code: str) -> None:
        monkeypatch.setattr(train, "torchrun_command", lambda options, nproc, logs: [sys.executable, "-c", code])

    replace("")
    return replace


def one_sentence(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def leave(run_dir: Path, *names: str) -> None:
    for name in names:
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


# -- alf-moe -----------------------------------------------------------------------------------------------------------


def test_help_is_quick():
    start = time.perf_counter()
    done = alf_moe("--help")
    assert time.perf_counter() - start < 2.0  # 0.05 s on an idle machine
    assert done.returncode == 0
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_version():
    assert alf_moe("--version").stdout.strip().endswith(moe.__version__)


def test_nothing_is_an_error(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2


def test_unknown_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in one_sentence(capsys.readouterr().err)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cli.main(["--help"]) == 2
    assert "Linux" in one_sentence(capsys.readouterr().err)


# -- alf-moe train -----------------------------------------------------------------------------------------------------


def test_train_help_shows_every_setting(capsys: pytest.CaptureFixture[str]):
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, section in train.Config.model_fields.items():
        for key, info in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"--{name}.{key} " in shown
            assert info.description, f"{name}.{key} has no description"
    assert "NoneType" not in shown


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--nprocs", "2"], 2, "did you mean --nproc?"),
        (["--nproc", "two"], 2, "--nproc two is not a whole number"),
        (["--nproc", "0"], 2, "--nproc 0 is not a whole number"),
        (["--resume=yes"], 2, "--resume takes no value"),
        (["--config"], 2, "--config has no value"),
        (["--config", "absent.toml"], 2, "absent.toml does not exist"),
        (["--nproc", "3"], 2, "parallel.ep = 2 does not divide the 3 ranks"),
        (["--train.stepz", "3"], 2, "did you mean train.steps?"),
        (["--train.steps", "-3"], 2, "train.steps = -3 is out of range"),
        (["--data.path", "absent"], 3, "alf-moe prepare"),
        (["--resume", "--clean"], 2, "contradict"),
        (["--resume"], 2, "holds no run"),
    ],
)
def test_refusals(words, workers, capsys, run_dir, more: list[str], code: int, says: str):
    assert train.main([*words, *more]) == code
    assert says in one_sentence(capsys.readouterr().err)
    assert not run_dir.exists()


def test_more_processes_than_gpus(words, monkeypatch, capsys):
    monkeypatch.setattr(train, "count_gpus", lambda: 1)
    assert train.main(words) == 2
    assert "--nproc 2 is more than the 1 GPUs" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, 4), ("", 0), ("-1", 0), ("0,1", 2), ("0,-1,1", 1), ("0,1,2,3,4,5", 4), ("GPU-a,GPU-b", 2)],
)
def test_count_gpus(monkeypatch, visible: str | None, found: int):
    monkeypatch.setattr(train, "_installed_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert train.count_gpus() == found


def test_existing_run_is_not_touched(words, workers, run_dir, capsys):
    leave(run_dir, "run.json", "exit.json")
    assert train.main(words) == 2
    assert "--resume" in one_sentence(capsys.readouterr().err)
    assert (run_dir / "exit.json").exists()


def test_clean(words, workers, run_dir):
    leave(run_dir, "run.json", "checkpoints/step-00000001/x")
    assert train.main([*words, "--clean"]) == 0
    assert not (run_dir / "run.json").exists()
    assert not (run_dir / "checkpoints").exists()


def test_clean_leaves_foreign_folders(words, workers, run_dir, capsys):
    leave(run_dir, "thesis.tex")
    assert train.main([*words, "--clean"]) == 2
    assert "does not look like a run" in one_sentence(capsys.readouterr().err)
    assert (run_dir / "thesis.tex").exists()


def test_a_start_that_failed_early_does_not_block(words, workers, run_dir):
    leave(run_dir, "exit.json", "logs/torchrun.log")
    assert train.main(words) == 0


def test_resume_needs_a_checkpoint(words, workers, run_dir, capsys):
    leave(run_dir, "run.json")
    assert train.main([*words, "--resume"]) == 5
    one_sentence(capsys.readouterr().err)
    leave(run_dir, "checkpoints/step-00000001/MANIFEST.json")
    assert train.main([*words, "--resume"]) == 0


# -- the workers' end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 75])
def test_exit_json_is_the_exit_code(words, workers, run_dir, code: int):
    workers(f"open({str(run_dir / 'exit.json')!r}, 'w').write('{json.dumps({'code': code, 'reason': 'r'})}')")
    assert train.main(words) == code


def test_crash_is_one_block(words, workers, run_dir, capsys):
    report = "Root Cause (first observed failure):\n[0]:\n  time : x\n  host : h\n  rank      : 1 (local_rank: 1)\n"
    report += "  exitcode  : 1 (pid: 7)\n  error_file: <N/A>\n"
    own = "[default0]:a warning of rank 0\n[default0]:[rank0]: Traceback\n"
    workers(
        "import pathlib, sys\n"
        f"run = pathlib.Path({str(run_dir)!r})\n"
        "log = run / 'logs/id_x/attempt_0/1/stderr.log'; log.parent.mkdir(parents=True)\n"
        "trace = 'Traceback (most recent call last)\\n  File x\\nValueError: first\\n[W] shutting down\\n'\n"
        "log.write_text(trace)\n"
        "(run / 'metrics.jsonl').write_text('{\"train/step\": 30}\\n{\"train/st')\n"
        f"sys.stderr.write({own + report!r}); sys.exit(1)\n"
    )
    assert train.main(words) == 1
    err = capsys.readouterr().err
    assert (
        "a warning of rank 0" in err and "[default0]" not in err and "Traceback" not in err and "Root Cause" not in err
    )
    for part in ("(rank 1)", "ValueError: first", "last step   30", "attempt_0/1/stderr.log", "--clean"):
        assert part in err
    assert "Root Cause" in (run_dir / "logs" / "torchrun.log").read_text()


def test_killed_worker(tmp_path):
    (tmp_path / "torchrun.log").write_text("Root Cause\n rank      : 0 (local_rank: 0)\n exitcode  : -9 (pid: 1)\n")
    rank, cause, _ = train.first_failure(tmp_path)
    assert rank == 0
    assert "SIGKILL" in cause


@pytest.mark.parametrize(
    ("stderr", "found"),
    [
        ("", None),
        ("a warning\nanother: one\n", None),
        (
            "[rank0]: Traceback (most recent call last):\n[rank0]:   File x\n[rank0]: RuntimeError: y\n",
            "RuntimeError: y",
        ),
        (
            "Traceback (most recent call last):\n  a\nKeyError: 1\n\nDuring ...\n\n"
            "Traceback (most recent call last):\n  b\nStop\nlater\n",
            "Stop",
        ),
    ],
)
def test_exception_of_a_traceback(stderr: str, found: str | None):
    assert train.exception(stderr) == found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_reach_torchrun_as_sigterm(words, workers, run_dir, number: signal.Signals):
    exit_json = json.dumps({"code": 75, "reason": "signal"})
    workers(
        "import os, signal, sys, time\n"
        f"def stop(*_): open({str(run_dir / 'exit.json')!r}, 'w').write('{exit_json}'); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"os.kill({os.getpid()}, {int(number)})\n"
        "time.sleep(20); sys.exit(3)"
    )
    before = signal.getsignal(number)
    assert train.main(words) == 75
    assert signal.getsignal(number) is before


def test_a_second_signal_leaves_the_first_its_time(words, workers, run_dir, capsys):
    left = str(run_dir / "exit.json")
    workers(
        "import json, os, signal, time\n"
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        f"os.kill({os.getpid()}, {int(signal.SIGINT)})\n"
        "while not got: time.sleep(0.01)\n"
        f"os.kill({os.getpid()}, {int(signal.SIGINT)})\n"
        "time.sleep(0.5)\n"
        f"open({left!r}, 'w').write(json.dumps({{'code': 75 if len(got) == 1 else 3, 'reason': 'r'}}))"
    )
    assert train.main(words) == 75
    assert "already stopping" in capsys.readouterr().err


def test_ctrl_c_of_the_terminal_reaches_the_launcher_alone(words, workers):
    workers("import os, sys; sys.exit(os.getsid(0) != os.getpid())")  # a session of its own
    assert train.main(words) == 0


def test_a_signal_before_the_first_step_is_no_crash(words, workers, run_dir, capsys):
    workers(f"import os, time; os.kill({os.getpid()}, {int(signal.SIGTERM)}); time.sleep(20)")
    assert train.main(words) == 1
    err = capsys.readouterr().err
    assert "stopped by a signal outside of a training step" in err and "crashed" not in err
    assert "checkpoint  none" in err and err.strip().endswith("--clean")


def test_what_to_do_next_names_the_newest_checkpoint(words, workers, run_dir, capsys):
    leave(run_dir, "run.json", "checkpoints/step-00000009/x", "checkpoints/step-00000010/x")
    (run_dir / "exit.json").write_text('{"code": 75}')  # of the last start: it says nothing about this one
    workers("import sys; sys.exit(1)")
    assert train.main([*words, "--resume"]) == 1
    err = capsys.readouterr().err
    assert "checkpoint  step-00000010" in err and err.strip().endswith("--nproc 2 --resume")


def test_a_failure_after_a_restart_is_that_of_the_last_attempt(tmp_path):
    for attempt, name in enumerate(("old", "new")):
        log = tmp_path / "id" / f"attempt_{attempt}" / "0" / "stderr.log"
        log.parent.mkdir(parents=True)
        log.write_text(f"Traceback (most recent call last):\n  x\nValueError: {name}\n")
        os.utime(log, (attempt, attempt))
    report = "Root Cause\n rank : 5 (local_rank: 0)\n exitcode : 1 (pid: 1)\n"
    (tmp_path / "torchrun.log").write_text(report.replace("0)", "7)") + report)
    assert train.first_failure(tmp_path)[:2] == (0, "ValueError: new")


def test_the_first_failure_is_who_was_killed_or_who_noted_it_first(tmp_path):
    """torchrun's root cause is only whom it saw first."""
    line = " rank : {0} (local_rank: {0})\n exitcode : {1} (pid: 1)\n"
    for attempt, rank, when in ((0, 3, 1.0), (1, 0, 9.0), (1, 2, 8.0)):
        note = {"time": when, "attempt": attempt, "rank": rank, "exception": "x"}
        (tmp_path / f"failure-{attempt}-{rank}.json").write_text(json.dumps(note))

    def first(*failed):
        report = (
            "Failures:\n" + "".join(line.format(*one) for one in failed[1:]) + "Root Cause\n" + line.format(*failed[0])
        )
        (tmp_path / "torchrun.log").write_text(report)
        return train.first_failure(tmp_path)[:2]

    assert first((0, 1), (2, 1))[0] == 2
    assert first((0, 1), (1, -9), (2, 1)) == (1, "killed by SIGKILL; the kernel may have run out of memory (dmesg)")
    assert first((0, 1), (1, -15))[0] == 2  # torchrun itself sends SIGTERM to the others


def test_a_hang_is_told_as_the_watchdog_told_it(tmp_path):
    (tmp_path / "logs" / "hang").mkdir(parents=True)
    (tmp_path / "logs" / "hang" / "report.txt").write_text("no progress for 8 s: rank 1 does not answer\n  stacks x")
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 30}\n')
    lines = train.crash_report(tmp_path, tmp_path / "logs").splitlines()
    assert lines == ["error: no progress for 8 s: rank 1 does not answer", "  stacks x", "  last step   30"]


def test_notes_of_an_earlier_start_are_gone(words, workers, run_dir):
    leave(run_dir, "run.json", "logs/failure-0-1.json", "logs/hang/report.txt", "checkpoints/step-00000009/x")
    workers("import sys; sys.exit(1)")
    assert train.main([*words, "--resume"]) == 1
    assert not list((run_dir / "logs").glob("failure-*")) and not (run_dir / "logs" / "hang").exists()


def test_as_many_processes_as_gpus_and_two_without(words, monkeypatch, workers):
    seen = []
    monkeypatch.setattr(train, "run", lambda options, nproc, run_dir: seen.append(nproc) or 0)
    for gpus in (0, 4):
        monkeypatch.setattr(train, "count_gpus", lambda gpus=gpus: gpus)
        train.main([w for w in words if w not in ("--nproc", "2")])
    assert seen == [2, 4]


def test_command_and_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    options = train.parse(
        ["--config", "a.toml", "--resume", "--train.steps", "3", "--max-restarts=2", "--config=b.toml"]
    )
    command = train.torchrun_command(options, 3, Path("logs"))
    tail = ["-m", "moe.train", "--config", "a.toml", "--config", "b.toml", "--train.steps", "3", "--resume"]
    assert command[-len(tail) :] == tail
    assert command[command.index("--redirects") + 1] == "1:3,2:3"
    assert command[command.index("--max-restarts") + 1] == "2"
    assert train.environment(3, options, Path("logs"))["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert train.environment(3, options, Path("logs"))["OMP_NUM_THREADS"] == "2"
    assert train.environment(3, options, Path("logs"))["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_a_real_torchrun(words, monkeypatch, capfd, tmp_path):
    """The names of its log files, its report and its prefix are those that we read."""
    package = tmp_path / "moe" / "train"
    package.mkdir(parents=True)
    (tmp_path / "moe" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, sys, time\n"
        "print('rank', os.environ['RANK'], 'out', flush=True); print('noted by', os.environ['RANK'], file=sys.stderr)\n"
        "if os.environ['RANK'] == '1': raise ValueError('rank 1 has had enough')\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(train, "count_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert train.main(words) == 1
    out, err = capfd.readouterr()
    assert out == "rank 0 out\n"
    assert "noted by 0\n" in err and "noted by 1" not in err
    assert "(rank 1)" in err and "ValueError: rank 1 has had enough" in err and "stderr.log" in err


def test_a_reader_that_stops_reading_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "launch.cli", "plan", "--config", "configs/tiny.toml", "--gpus", "2"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
