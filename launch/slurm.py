"""`alf-moe slurm`: write the sbatch script of a training run on several machines; nothing is submitted."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from launch import train
from moe.config import ConfigError, load, resolve

USAGE = """usage: alf-moe slurm --nodes N --gpus G --time D-HH:MM:SS [--warn SECONDS] [--port P] [--out FILE] -- TRAIN ARGUMENTS

Writes the script to FILE, or to the console; submit it with sbatch. --gpus: GPUs, and processes, of each machine. --warn:
seconds between SIGUSR1 and the end of --time, in which a checkpoint must fit (default 300); the run then saves, ends with exit
code 75, and the job queues itself again. --port: of the first machine, where all meet (default 29400). The run folder and the
data must be on a file system that all machines see."""

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}
#SBATCH --signal=USR1@{warn}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

# One task a machine: `alf-moe train` starts its processes. SIGUSR1 reaches the tasks {warn} s before the end.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
if compgen -G {checkpoints} >/dev/null; then resume=(--resume); fi

# A collective that hangs ends after 2 train.timeout_s + 60 seconds; every rank then leaves its last collectives beside its logs.
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_FR_BUFFER_SIZE={recorder}
export NCCL_DEBUG="${{NCCL_DEBUG:-WARN}}"

srun --kill-on-bad-exit=0 bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' task \\
  {command} \\
  --rdzv-endpoint "$first:{port}" --rdzv-id "$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" ${{resume[@]+"${{resume[@]}}"}}
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def main(argv: list[str]) -> int:
    """Write the script; 2 and one sentence when it could not run."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    try:
        text, out = script(argv)
        if out is not None:
            try:
                Path(out).write_text(text)
            except OSError as error:
                raise ConfigError(f"--out {out} cannot be written ({error.strerror}): name another file") from None
            print(f"sbatch {shlex.quote(out)}")
        else:
            print(text, end="")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def script(argv: list[str]) -> tuple[str, str | None]:
    """The text of the script and the file that --out names. Raises ConfigError."""
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    found = {"--warn": "300", "--port": "29400"}
    known = ("--nodes", "--gpus", "--time", "--warn", "--port", "--out")
    for flag, value in zip(own[::2], [*own[1::2], ""], strict=False):
        if flag not in known:
            raise ConfigError(
                f"{flag} is not an option of alf-moe slurm: it has {', '.join(known)}; train's own follow --"
            )
        if not value:
            raise ConfigError(f"{flag} has no value: write {flag} VALUE")
        found[flag] = value
    for flag in ("--nodes", "--gpus", "--time"):
        if flag not in found:
            raise ConfigError(f"{flag} is missing: alf-moe slurm --nodes 2 --gpus 8 --time 24:00:00 -- --config FILE")
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", found["--time"]):
        raise ConfigError(f"--time {found['--time']} is no time of SLURM: write for example 24:00:00 or 2-00:00:00")
    nodes, gpus, warn, port = (train.whole_number(f, found[f], 1) for f in ("--nodes", "--gpus", "--warn", "--port"))
    options = train.parse(words)
    if options.clean or options.resume or options.nproc or options.nnodes > 1:
        raise ConfigError(
            "--clean, --resume, --nproc and --nnodes are the script's to set: leave them out after -- (it resumes by itself)"
        )
    config = resolve(load(options.files, options.overrides), nodes * gpus, cuda=True)
    several = ["--nnodes", str(nodes)] if nodes > 1 else []
    command = shlex.join(["alf-moe", "train", *words, "--nproc", str(gpus), *several])
    text = SCRIPT.format(
        name=shlex.quote(str(config.run.name)), nodes=nodes, gpus=gpus, time=found["--time"], warn=warn, port=port,
        recorder=train.hosts.FLIGHT_RECORDER, command=command,
        checkpoints=shlex.quote(f"{config.run.folder}/{config.run.name}/checkpoints/step-*"),
    )  # fmt: skip
    if nodes == 1:  # nobody to meet
        text = re.sub(r" \\\n  --rdzv-endpoint \S+ --rdzv-id \S+ ", " ", text).replace(
            ' --node-rank "$SLURM_NODEID"', ""
        )
        text = re.sub(r"first=.*\n", "", text)
    return text, found.get("--out")
