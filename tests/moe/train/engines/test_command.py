"""The real command with the DeepSpeed engine on two processes: trained, resumed, gone on with natively, and started by
DeepSpeed's own launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from moe.observe.sinks import read_metrics
from tests.corpus import make_token_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: pip install 'alf-moe[deepspeed]'"),
]
ROOT = Path(__file__).parents[4]
BIN = Path(sys.executable).parent
SETTINGS = """
--config configs/tiny.toml --model.dim 32 --model.num_layers 3 --model.num_kv_heads 2 --model.num_experts 8
--model.expert_hidden_dim 16 --model.vocab_size 128 --data.seq_len 16 --train.batch_size 8 --train.micro_batch_size 2
--train.compute_dtype float32 --parallel.ep 2 --optim.warmup_steps 0 --optim.decay_share 0.0 --observe.wandb off
--observe.log_every 1 --observe.peak_tflops 1 --observe.regret_every 0 --evaluate.max_tokens 64 --evaluate.every 0
--evaluate.batch_size 4 --checkpoint.every 0
"""
ZERO = ["--train.engine", "deepspeed", "--deepspeed.zero_stage", "2"]


def words(folder: Path, name: str, steps: int, *more: str) -> list[str]:
    run = ["--data.path", str(folder / "data"), "--run.folder", str(folder), "--run.name", name]
    return [*SETTINGS.split(), *run, "--train.steps", str(steps), *more]


def started(command: list[str], **environment: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def trained(folder: Path, name: str, steps: int, *more: str) -> None:
    started([str(BIN / "alf-moe"), "train", "--nproc", "2", *words(folder, name, steps, *more)])


def losses(folder: Path, name: str) -> list[tuple[float, float]]:
    """Cross-entropy and gradient norm of every step."""
    rows = [row for row in read_metrics(folder / name / "metrics.jsonl") if "loss/ce" in row]
    assert [row["train/step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss/ce"], row["optim/grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a run of six steps at once."""
    folder = tmp_path_factory.mktemp("runs")
    make_token_folder(folder / "data")
    trained(folder, "whole", 6, *ZERO)
    return folder


def test_p07_p26_a_deepspeed_run_resumes_to_the_bit_and_goes_on_natively(folder):
    trained(folder, "parts", 2, *ZERO)
    trained(folder, "parts", 4, *ZERO, "--resume")
    assert losses(folder, "parts") == losses(folder, "whole")[:4]
    trained(folder, "parts", 6, "--resume")
    for step, expected in zip(losses(folder, "parts"), losses(folder, "whole"), strict=True):
        assert step == pytest.approx(expected, rel=1e-4)
    assert 'engine = "native"' in (folder / "parts" / "config.toml").read_text()
    started([str(BIN / "alf-moe"), "ckpt", "verify", str(folder / "parts")])


def test_deepspeed_s_launcher_starts_the_same_run(folder):
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--module", "moe.train", *words(folder, "launched", 2, *ZERO)]
    started(command, DS_ACCELERATOR="cpu", PATH=f"{BIN}:{os.environ['PATH']}")
    assert losses(folder, "launched") == losses(folder, "whole")[:2]
    assert json.loads((folder / "launched" / "exit.json").read_text())["code"] == 0
