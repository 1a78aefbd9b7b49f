"""`alf-moe slurm`: what the script says, that bash reads it, and what a fake SLURM makes of it."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import slurm, train
from moe.config import load, resolve

OWN = ["--nodes", "2", "--gpus", "2", "--time", "1-12:00:00", "--warn", "240"]
TRAIN = ["--", "--config", "configs/tiny.toml", "--run.name", "it's", "--train.batch_size", "16"]


def test_the_script_says_what_was_asked_and_bash_reads_it(tmp_path: Path, capsys):
    file = tmp_path / "job.sh"
    assert slurm.main([*OWN, "--out", str(file), *TRAIN]) == 0
    assert capsys.readouterr().out == f"sbatch {file}\n"
    text = file.read_text()
    for line in ("nodes=2", "ntasks-per-node=1", "gpus-per-node=2", "time=1-12:00:00", "signal=USR1@240", "requeue"):
        assert f"#SBATCH --{line}\n" in text
    assert 'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in text
    assert "TORCH_FR_BUFFER_SIZE=2000" in text and "TORCH_NCCL_DUMP_ON_TIMEOUT=1" in text
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("code", [0, 75, 2])
@pytest.mark.parametrize("saved", [0, 3])
def test_a_job_starts_every_machine_resumes_and_queues_itself_again_on_75_alone(tmp_path: Path, nodes, code, saved):
    own = ["--nodes", str(nodes), *OWN[2:]]
    text, _ = slurm.script([*own, "--", *TRAIN[1:], "--run.folder", str(tmp_path / "r u n s")])
    (tmp_path / "job.sh").write_text(text)
    for step in range(saved):
        (tmp_path / "r u n s" / "it's" / "checkpoints" / f"step-0000000{step}").mkdir(parents=True)
    fake = {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$*" >> "$LOG"; fi',
        "srun": f'shift; for id in $(seq 0 {nodes - 1}); do SLURM_NODEID=$id "$@"; code=$?; done; exit $code',
        "alf-moe": f'printf "%s|" "$@" >> "$LOG"; echo >> "$LOG"; exit {code}',
    }
    for name, body in fake.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    env |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41"}
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], env=env, capture_output=True, text=True)
    assert done.returncode == code and done.stderr == ""
    *starts, last = (tmp_path / "log").read_text().splitlines()
    starts += [] if code == 75 else [last]
    assert code != 75 or last == "requeue 41"
    assert len(starts) == nodes
    for rank, line in enumerate(starts):
        words = line.removesuffix("|").split("|")
        options = train.parse(words[1:])
        assert words[0] == "train" and options.nproc == 2 and options.nnodes == nodes
        assert options.overrides[:2] == ["--run.name", "it's"] and options.resume == bool(saved)
        options.check(False)
        if nodes == 2:
            meeting = options.node_rank, options.rdzv_endpoint, options.rdzv_id
            assert meeting == (rank, "node7:29400", "41-0")


@pytest.mark.parametrize("engine", ["native-shard", "deepspeed", "megatron"])
def test_a_job_of_several_machines_for_every_engine(tmp_path: Path, engine):
    """What each machine starts is the configuration that was checked, of 16 ranks."""
    files = ["--config", "configs/deepseekmoe-16b.toml", "--config", f"configs/engines/{engine}.toml"]
    text, _ = slurm.script(["--nodes", "2", "--gpus", "8", "--time", "24:00:00", "--", *files, "--data.path", "d"])
    (tmp_path / "job.sh").write_text(text)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")]).returncode == 0
    command = next(line for line in text.splitlines() if line.startswith("  alf-moe train")).removesuffix("\\")
    options = train.parse(shlex.split(command)[2:])
    assert options.files == files[1::2] and (options.nproc, options.nnodes) == (8, 2)
    config = resolve(load(options.files, options.overrides), options.nproc * options.nnodes, cuda=True)
    engines = {"native-shard": "native"}
    assert config.train.engine == engines.get(engine, engine) and config.data_ranks(16) == (
        4 if engine == "megatron" else 16
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes", "2"], "--gpus is missing"),
        (["--node", "2"], "--node is not an option"),
        (["--nodes"], "--nodes has no value"),
        ([*OWN[:4], "--time", "tomorrow"], "--time tomorrow is no time"),
        (["--nodes", "0", *OWN[2:], *TRAIN], "--nodes 0 is not a whole number"),
        ([*OWN, *TRAIN, "--clean"], "--clean, --resume"),
        ([*OWN, *TRAIN, "--train.batch_size", "6"], "train.batch_size = 6 is not divisible by the 4 ranks"),
        ([*OWN, "--out", "configs/tiny.toml/x", *TRAIN], "--out configs/tiny.toml/x cannot be written"),
        (OWN, "--config is missing"),
        (
            [
                *OWN[:2],
                "--gpus",
                "4",
                *OWN[4:],
                "--",
                "--config",
                "configs/deepseekmoe-16b.toml",
                "--config",
                "configs/engines/megatron.toml",
            ],
            "parallel.ep = 8 does not divide the 4 ranks of a stage",
        ),
    ],
)
def test_refusals_are_one_sentence(words, says, capsys):
    assert slurm.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line
