"""One rank of a training run: `torchrun --nproc-per-node 2 -m moe.train --config configs/tiny.toml [--a.b.c value]`.

`alf-moe train` starts this, checks the run folder first and turns exit.json into an exit code. A worker that exits with
an error is restarted by torchrun: a requested stop or a refusal is therefore exit 0 with the code in exit.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from moe.config import ConfigError, load, resolve
from moe.parallel import build_ranks, join_ranks
from moe.train.checkpoint import CheckpointError, has_checkpoint
from moe.train.data import DataError
from moe.train.loop import Outcome, train


def main(argv: list[str]) -> None:
    """Parse, join the ranks, train, leave exit.json."""
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
        else:
            overrides.append(word)

    rank, world_size, device = join_ranks()
    run_dir = None
    try:
        config = load(files, overrides)
        run_dir = Path(config.run.folder) / str(config.run.name)
        config = resolve(config, world_size, cuda=device.type == "cuda")
        # A worker that torchrun started again continues; its first attempt may have died before the first checkpoint.
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        resume = resume or (restarted and has_checkpoint(run_dir / "checkpoints"))
        ranks = build_ranks(rank, world_size, device, config.parallel.ep)
        outcome = train(config, ranks, run_dir, resume)
    except ConfigError as error:
        outcome = Outcome(2, str(error))
    except DataError as error:
        outcome = Outcome(3, str(error))
    except CheckpointError as error:
        outcome = Outcome(5, str(error))
    if rank == 0:
        if outcome.code not in (0, 75):
            print(f"error: {outcome.reason}", file=sys.stderr, flush=True)
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "exit.json").write_text(json.dumps(outcome._asdict()))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
