"""`alf-moe train`: check everything that can be checked without torch, start torchrun, turn its end into an exit code.

The workers (`moe.train`) leave `<run>/exit.json` {"code", "reason"} and exit 0 when they stop on purpose; a worker that
exits with an error is a crash, which torchrun may restart. Across machines every one runs this command (`launch.hosts`).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from launch import hosts
from moe.config import Config, ConfigError, load, resolve

CONFIGURATION, DATA, CHECKPOINT = 2, 3, 5
EXIT_CODES = {
    0: "done",
    1: "a worker crashed",
    CONFIGURATION: "configuration refused",
    DATA: "data missing or refused",
    4: "loss or gradient not finite too often, or loss guard",
    CHECKPOINT: "checkpoint refused",
    75: "saved after a signal: start again with --resume",
}
FLAGS = {
    "--config FILE": "TOML file with settings; repeatable, later files win",
    "--nproc N": "processes; default: one per GPU, without a GPU 2",
    "--resume": "continue the run of this name from its newest checkpoint",
    "--clean": "remove the run folder of this name first",
    "--max-restarts N": "start crashed workers again, N times at most; default 0",
    **hosts.FLAGS,
    "--SECTION.SETTING VALUE": "override one setting",
}
NUMBERS = {"--nproc": 1, "--max-restarts": 0, "--nnodes": 1, "--node-rank": 0}  # flags, least values
TEXTS = ("--rdzv-endpoint", "--rdzv-id", "--local-addr")
SHUTDOWN_SECONDS = 120  # a checkpoint must fit between SIGTERM and SIGKILL; torchrun's own default is 30
RANK_0 = "[default0]:"  # torchrun's prefix of the lines of local rank 0


class Refused(Exception):
    """Not started: one sentence for the user and the exit code."""

    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.code = code


@dataclass
class Options(hosts.Hosts):
    """The command line, split into what is ours and what goes to the workers."""

    files: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    nproc: int | None = None
    max_restarts: int = 0
    resume: bool = False
    clean: bool = False


def main(argv: list[str]) -> int:
    """Train; returns one of EXIT_CODES."""
    if "--help" in argv or "-h" in argv:
        from launch.help import show_help  # rich is for people; a start need not wait for it

        show_help(FLAGS, EXIT_CODES)
        return 0
    try:
        options = parse(argv)
        gpus = count_gpus()
        nproc = options.nproc or gpus or 2
        config = check(options, nproc, gpus)
        run_dir = Path(config.run.folder) / str(config.run.name)
        if options.node_rank == 0:
            prepare_folder(run_dir, options)
    except ConfigError as error:
        return _refuse(CONFIGURATION, str(error))
    except Refused as error:
        return _refuse(error.code, str(error))
    return run(options, nproc, run_dir)


def _refuse(code: int, sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code


# -- before any process starts -----------------------------------------------------------------------------------------


def parse(argv: list[str]) -> Options:
    """Our flags; every other `--a.b value` is an override and is checked by moe.config. Raises ConfigError."""
    options = Options()
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("--resume", "--clean"):
            if equals:
                raise ConfigError(f"{flag} takes no value: write {flag} alone")
            setattr(options, flag[2:], True)
        elif flag == "--config" or flag in NUMBERS or flag in TEXTS:
            if not equals:
                if not words or words[0].startswith("--"):
                    raise ConfigError(f"{flag} has no value: write {flag} VALUE")
                value = words.pop(0)
            if flag == "--config":
                options.files.append(value)
            else:
                number = whole_number(flag, value, NUMBERS[flag]) if flag in NUMBERS else value
                setattr(options, flag[2:].replace("-", "_"), number)
        elif flag.startswith("--") and "." not in flag:
            known = [known.split()[0] for known in FLAGS]
            near = difflib.get_close_matches(flag, known[:-1], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "settings look like --train.steps 100; alf-moe train --help"
            raise ConfigError(f"{flag} is not an option of alf-moe train: {hint}")
        else:
            options.overrides.append(word)
            if not equals and words and not words[0].startswith("--"):
                options.overrides.append(words.pop(0))
    return options


def whole_number(flag: str, text: str, least: int) -> int:
    """The value of a flag. Raises ConfigError."""
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{flag} {text} is not a whole number >= {least}: write for example {flag} 2")
    return int(text)


def count_gpus() -> int:
    """GPUs that the workers will see, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA itself stops at the first name that is not a device.
        stop = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
        return min(stop, _installed_gpus()) if all(n.isdecimal() for n in names[:stop]) else stop
    return _installed_gpus()


def _installed_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
        if listed.returncode == 0:
            return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))
    except (OSError, subprocess.TimeoutExpired):
        pass
    return sum(1 for device in Path("/dev").glob("nvidia[0-9]*"))


def check(options: Options, nproc: int, gpus: int) -> Config:
    """The resolved configuration. Raises ConfigError and Refused."""
    if options.resume and options.clean:
        raise ConfigError("--resume and --clean contradict each other: give one of them")
    options.check(options.clean)
    if gpus and nproc > gpus:
        raise ConfigError(f"--nproc {nproc} is more than the {gpus} GPUs of this machine: set --nproc {gpus} or less")
    config = resolve(load(options.files, options.overrides), nproc * options.nnodes, cuda=gpus > 0)
    if not Path(config.data.path).is_dir():
        raise Refused(
            DATA,
            f"data.path = {config.data.path!r} is not a folder: run `alf-moe prepare` first, or name a prepared folder",
        )
    return config


def prepare_folder(run_dir: Path, options: Options) -> None:
    """Apply the rules of the run folder: an existing run is only touched with --resume or --clean. Raises Refused."""
    if options.clean and run_dir.exists():
        if run_dir.is_symlink() or not _is_run(run_dir):
            raise Refused(
                CONFIGURATION,
                f"--clean: {run_dir} does not look like a run (no run.json or config.toml in it): remove it yourself",
            )
        shutil.rmtree(run_dir)
    if options.resume:
        if not _is_run(run_dir):
            raise Refused(
                CONFIGURATION,
                f"--resume: {run_dir} holds no run: leave out --resume, or correct run.name and run.folder",
            )
        if not list((run_dir / "checkpoints").glob("step-*")):
            raise Refused(CHECKPOINT, f"--resume: {run_dir} has no checkpoint: start again with --clean")
    elif run_dir.exists() and not (run_dir.is_dir() and _is_empty(run_dir)):
        raise Refused(
            CONFIGURATION,
            f"{run_dir} exists: continue it with --resume, remove it with --clean, or choose another --run.name",
        )
    (run_dir / "exit.json").unlink(missing_ok=True)


def _is_run(run_dir: Path) -> bool:
    return (
        (run_dir / "run.json").is_file() or (run_dir / "config.toml").is_file() or _is_empty(run_dir, or_nothing=False)
    )


def _is_empty(run_dir: Path, or_nothing: bool = True) -> bool:
    """Whether a start ended here before the first step: only what this launcher and an early refusal leave behind."""
    found = {entry.name for entry in run_dir.iterdir()} if run_dir.is_dir() else set()
    return found <= {"logs", "exit.json"} and (or_nothing or bool(found))


# -- the workers -------------------------------------------------------------------------------------------------------


def torchrun_command(options: Options, nproc: int, logs: Path) -> list[str]:
    """The torchrun command line. Rank 0 keeps the console; stderr of all ranks, stdout of the others go to files."""
    command = [sys.executable, "-m", "torch.distributed.run", *options.torchrun(), "--nproc-per-node", str(nproc)]
    command += ["--max-restarts", str(options.max_restarts), "--log-dir", str(logs), "--tee", "0:2"]
    if nproc > 1:
        command += ["--redirects", ",".join(f"{rank}:3" for rank in range(1, nproc))]
    command += ["-m", "moe.train"]
    for file in options.files:
        command += ["--config", file]
    return command + options.overrides + (["--resume"] if options.resume else [])


def environment(nproc: int, options: Options, logs: Path) -> dict[str, str]:
    """The environment of torchrun and its workers."""
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "ALF_MOE_LAUNCHER": str(
            os.getpid()
        ),  # a worker that starts when its torchrun is gone sees that it is an orphan
        # Without it more than half of the restarts over gloo hang or fail (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **options.environment(logs),
    }


def run(options: Options, nproc: int, run_dir: Path) -> int:
    """Start torchrun, pass signals on, wait; the exit code is the workers' own where they left one."""
    logs = options.logs(run_dir)
    logs.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(logs / "hang", ignore_errors=True)  # of an earlier start, like the notes of failures
    for note in logs.glob("failure-*.json"):
        note.unlink()
    signals: list[int] = []
    process: subprocess.Popen | None = None

    def stop(number: int, _frame: Any) -> None:
        signals.append(number)
        if len(signals) > 1:  # torchrun would break off its own shutdown at a second signal
            print(f"already stopping: the checkpoint is being written, {SHUTDOWN_SECONDS} s at most", file=sys.stderr)
        elif process is not None:
            process.terminate()

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        process = subprocess.Popen(
            torchrun_command(options, nproc, logs),
            env=environment(nproc, options, logs),
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which then asks once
        )
        if signals:
            process.terminate()
        assert process.stderr is not None, "stderr is a pipe"
        reader = threading.Thread(target=_sort_stderr, args=(process.stderr, logs / "torchrun.log"), daemon=True)
        reader.start()
        code = process.wait()
        reader.join(timeout=5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return finish(run_dir, code, bool(signals), options)


def _sort_stderr(lines: IO[str], log: Path) -> None:
    """Rank 0's lines to the console; tracebacks and torchrun's own lines, dozens at a crash, to files."""
    with log.open("w") as own:
        for line in lines:
            if line.startswith(RANK_0 + "[rank0]:"):
                continue  # torch marks a traceback so: it is in rank 0's stderr.log, and often not the first failure
            if line.startswith(RANK_0):
                print(line.removeprefix(RANK_0), end="", file=sys.stderr, flush=True)
            else:
                own.write(line)
                own.flush()


# -- the end -----------------------------------------------------------------------------------------------------------


def finish(run_dir: Path, code: int, signalled: bool, options: Options) -> int:
    """The exit code; a crash is told in one block."""
    try:
        # Elsewhere than on machine 0 the file may be an earlier run's, which machine 0 has not removed yet.
        if code == 0 or options.node_rank == 0:
            left = json.loads((run_dir / "exit.json").read_text())
            if left.get("rank"):  # one rank alone, and not the one whose stderr is the console
                print(f"error: {left['reason']}", file=sys.stderr)
            return int(left["code"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(f"warning: {run_dir / 'exit.json'} cannot be read ({error})", file=sys.stderr)
    if code == 0:
        return 0
    again = ["alf-moe", "train"]
    for file in options.files:
        again += ["--config", file]
    again += options.overrides + (["--nproc", str(options.nproc)] if options.nproc else [])
    again += options.again()
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    if signalled:
        print("error: stopped by a signal outside of a training step: nothing was saved by it", file=sys.stderr)
    else:
        print(crash_report(run_dir, options.logs(run_dir)), file=sys.stderr)
    print(f"  checkpoint  {saved[-1] if saved else 'none'}", file=sys.stderr)
    print(f"  next        {shlex.join(again + (['--resume'] if saved else options.afresh()))}", file=sys.stderr)
    return 1


def crash_report(run_dir: Path, logs: Path) -> str:
    """The first failing rank, its exception, the last logged step and where to read on; or who is missing in a hang."""
    hang = logs / "hang" / "report.txt"
    if hang.exists():
        return f"error: {hang.read_text()}\n  last step   {last_step(run_dir)}"
    rank, cause, log = first_failure(logs)
    lines = [f"error: a worker crashed ({'rank ' + str(rank) if rank is not None else 'unknown rank'})"]
    lines += [f"  exception   {cause}", f"  last step   {last_step(run_dir)}", f"  log         {log}"]
    return "\n".join(lines)


def first_failure(logs: Path) -> tuple[int | None, str, Path]:
    """(rank, exception, log file) of the worker that failed first, by torchrun's report and the workers' stderr."""
    own = logs / "torchrun.log"
    report = own.read_text(errors="replace") if own.exists() else ""
    last = report.rpartition("Failures:")[2]
    failed = [(int(r), int(c)) for r, c in re.findall(r"\(local_rank: (\d+)\)\s*exitcode\s*: (-?\d+)", last)]
    if not failed:
        last = report.strip().splitlines()[-1:] or ["torchrun ended without a word"]
        return None, last[0], own
    # The root cause is what torchrun saw first, and it looks now and then: the others fail of the same failure in that
    # time. First is who was killed (by another signal than torchrun's own), then who noted the earliest exception.
    rank, code = next((one for one in failed if one[1] < 0 and one[1] != -signal.SIGTERM), failed[-1])
    notes = [json.loads(file.read_text()) for file in logs.glob("failure-*.json")]
    if code > 0 and notes:
        newest = max(note["attempt"] for note in notes)
        rank = min((n for n in notes if n["attempt"] == newest), key=lambda note: note["time"])["rank"]
    attempts = sorted(logs.glob(f"*/attempt_*/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    log = attempts[-1] if attempts else own
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the kernel may have run out of memory (dmesg)" if name == "SIGKILL" else ""
        return rank, f"killed by {name}{hint}", log
    return rank, exception(log.read_text(errors="replace") if attempts else "") or f"exit code {code}", log


def exception(stderr: str) -> str | None:
    """The exception that the last traceback ends with: its first line that is not indented."""
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in stderr.splitlines()]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    after = lines[starts[-1] + 1 :] if starts else []
    return next((line for line in after if line and not line[0].isspace()), None)


def last_step(run_dir: Path) -> str:
    """The last step in metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    for line in reversed(file.read_text().splitlines() if file.exists() else []):
        try:
            return str(json.loads(line)["train/step"])
        except (ValueError, KeyError, TypeError):
            continue  # the last line may be cut
    return "none logged"
