"""One rank of a training run: `torchrun --nproc-per-node 2 -m moe.train --config configs/tiny.toml [--a.b.c value]`.

`alf-moe train` starts this, checks the run folder first and turns exit.json into an exit code. A worker that exits with
an error is restarted by torchrun: a requested stop, or a refusal by all ranks, is therefore exit 0 with the code in exit.json.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from moe.config import Config, ConfigError, load, resolve
from moe.parallel import build_ranks, join_ranks
from moe.train.checkpoint import CheckpointError, has_checkpoint
from moe.train.data import DataError
from moe.train.device import keep_freed_memory
from moe.train.loop import Outcome, train

MEET_S = 10.0  # for the other ranks to refuse as well: they find the same reason at the same place, or never


def main(argv: list[str]) -> None:
    """Parse, train, leave exit.json."""
    files, overrides, resume = parse(argv)
    rank = int(os.environ.get("RANK", 0))
    run_dir, refused = None, True
    try:
        config = load(files, overrides)
        run_dir = Path(config.run.folder) / str(config.run.name)
        if rank == 0:
            (run_dir / "exit.json").unlink(missing_ok=True)  # of an attempt before this one
        outcome, refused = run(config, run_dir, resume), False
    except ConfigError as error:
        outcome = Outcome(2, str(error))
    except DataError as error:
        outcome = Outcome(3, str(error))
    except CheckpointError as error:
        outcome = Outcome(5, str(error))
    except BaseException as error:
        crash(error, rank, run_dir)
    alone = refused and not others_refuse(rank)
    if rank == 0 or alone:
        leave(outcome, rank, run_dir, alone)
    if alone:
        sys.stderr.flush()
        os._exit(1)  # the others wait in a collective: torchrun ends them
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def parse(argv: list[str]) -> tuple[list[str], list[str], bool]:
    """(configuration files, overrides, whether to resume)."""
    files: list[str] = []
    overrides: list[str] = []
    resume = False
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--resume":
            resume = True
        elif word == "--config" and words:
            files.append(words.pop(0))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        elif not word.startswith("--local_rank="):  # the deepspeed launcher adds it to every command
            overrides.append(word)
    return files, overrides, resume


def run(config: Config, run_dir: Path, resume: bool) -> Outcome:
    """Join the ranks and train."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    # A collective must not give up before the watchdog has said who is missing.
    rank, world_size, device = join_ranks(2 * config.train.timeout_s + 60)
    if device.type == "cpu":
        keep_freed_memory()
    config = resolve(config, world_size, cuda=device.type == "cuda")
    # A worker that torchrun started again continues; its first attempt may have died before the first checkpoint.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    resume = resume or (restarted and has_checkpoint(run_dir / "checkpoints"))
    p = config.parallel
    ranks = build_ranks(rank, world_size, device, p.ep, p.tp, p.pp, p.cp)
    return train(config, ranks, run_dir, resume, process_start())


def die_with_parent() -> None:
    """A worker whose torchrun was killed would train on, and write into the folder of the run that replaces it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: from now on
    launcher = os.environ.get("ALF_MOE_LAUNCHER")  # and before now: alf-moe train starts torchrun, which started us
    if launcher is not None and parent_of(os.getppid()) != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)


def parent_of(pid: int) -> int:
    """Of a process on this machine; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def process_start() -> float:
    """time.time() when this process began: importing torch is part of a run's time."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def others_refuse(rank: int) -> bool:
    """Whether every rank ended in a refusal."""
    if not dist.is_initialized():
        return True  # the command line and the files are the same everywhere
    store = dist.distributed_c10d._get_default_store()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store.set(f"alf_moe/refused/{attempt}/{rank}", "")
    try:
        store.wait([f"alf_moe/refused/{attempt}/{r}" for r in range(dist.get_world_size())], timedelta(seconds=MEET_S))
    except RuntimeError:  # DistStoreError
        return False
    return True


def leave(outcome: Outcome, rank: int, run_dir: Path | None, alone: bool) -> None:
    """exit.json for the launcher, and the sentence."""
    reason = f"{outcome.reason} (on rank {rank} alone)" if alone else outcome.reason
    if outcome.code not in (0, 75):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        who = {"rank": rank} if alone else {}
        (run_dir / "exit.json").write_text(json.dumps({"code": outcome.code, "reason": reason, **who}))


def crash(error: BaseException, rank: int, run_dir: Path | None) -> None:
    """Note when this rank failed and of what, for the launcher to find the first one; does not return."""
    for line in traceback.format_exc().splitlines():
        print(f"[rank{rank}]: {line}", file=sys.stderr)  # as torch does: the launcher keeps these from the console
    if run_dir is not None:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        note = {"time": time.time(), "attempt": attempt, "rank": rank, "exception": text}
        (run_dir / "logs" / f"failure-{attempt}-{rank}.json").write_text(json.dumps(note))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # threads in a collective would make the interpreter's own end long, or another failure


if __name__ == "__main__":
    main(sys.argv[1:])
