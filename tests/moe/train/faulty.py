"""A worker in which something breaks: `-m tests.moe.train.faulty FAULT:RANK:STEP <arguments of moe.train>`.

Only in the first attempt of torchrun and only on that rank; everything else is `python -m moe.train`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time

from torch.distributed.checkpoint import FileSystemWriter

from moe.train import __main__ as worker
from moe.train import loop
from moe.train.data import DataError


def stop_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def fail(error: BaseException):
    def act(*_args, **_kwargs) -> None:
        raise error

    return act


AT_DATA = {
    "data": fail(OSError("the disk is gone")),
    "dataerror": fail(DataError("the corpus is gone")),
    "hang": lambda: time.sleep(3600),
    "stop": stop_process,
    "kill": kill_process,
    "disk": fill_disk,
}


def inject(fault: str, step: int) -> None:
    """Break something in this process at step `step` (from 1)."""
    micro_batches = loop.Run.micro_batches

    def broken_micro_batches(run):
        if run.progress.step + 1 == step:
            run.saver.wait()  # so that there is a checkpoint to go on from
            if fault in AT_DATA:
                AT_DATA[fault]()
            elif fault == "forward":
                run.engine.forward_backward = fail(ValueError("expert 3 is gone"))
            elif fault == "save":
                FileSystemWriter.write_data = fail(RuntimeError("the writer is gone"))
        return micro_batches(run)

    if fault == "wandb":
        loop.Sinks.__init__ = fail(RuntimeError("W&B is gone"))
    loop.Run.micro_batches = broken_micro_batches


if __name__ == "__main__":
    fault, rank, step = sys.argv[1].split(":")
    if os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        inject(fault, int(step))
    worker.main(sys.argv[2:])
