"""`alf-moe plan`: figures by hand, exit codes, one sentence for what does not fit or is not understood, no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launch import plan
from moe.config import load, resolve
from moe.observe import cost, footprint

LARGE = ["--config", "configs/deepseekmoe-16b.toml", "--nodes", "2"]


def run(capsys, *words):
    code = plan.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_figures_by_hand(capsys):
    code, out, _ = run(capsys, *LARGE, "--tokens", "1e12", "--mfu", "0.5", "--json")
    found, config = json.loads(out), resolve(load(["configs/deepseekmoe-16b.toml"]), 16)
    assert code == 0
    flops, sent = cost.flops_per_token(config), footprint.traffic(config, 16, 8)
    assert found["bound_arithmetic_tokens_per_s"] == pytest.approx(16 * 989e12 / flops)
    step = config.tokens_per_step
    seconds = sent.rows_inside / 450e9 + sent.parameters / 50e9  # ep = 8 stays in the node, gradients do not
    assert sent.rows_outside == 0 and found["bound_network_tokens_per_s"] == pytest.approx(step / seconds)
    arithmetic = step * flops / (16 * 989e12 * 0.5)
    assert found["tokens_per_s"]["nothing hidden"] == pytest.approx(step / (arithmetic + seconds))
    assert found["days"]["all hidden"] == pytest.approx(1e12 / step * max(arithmetic, seconds) / 86400)
    assert found["steps"] == pytest.approx(1e12 / step)
    assert found["checkpoint"] == 12 * cost.parameter_counts(config).total
    memory = found["memory"]["full"]
    assert memory["balanced"] == footprint.memory(config, 16)._asdict()
    assert memory["worst"]["peak"] > memory["balanced"]["peak"]
    assert found["memory"]["none"]["balanced"]["peak"] > found["memory"]["selective"]["balanced"]["peak"]


def test_what_is_printed(capsys):
    code, out, _ = run(capsys, *LARGE)
    assert code == 0 and "16.38 B, active 2.83 B" in out and "16 (2 x 8 H100)" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")][1:4] == ["none", "selective", "full"]
    assert "<- configured" in next(line for line in out.splitlines() if line.startswith("  full"))


def test_what_does_not_fit_ends_with_2_and_the_way_out(capsys):
    code, out, error = run(capsys, *LARGE, "--memory", "40")
    assert code == 2 and "peak" in out
    assert error.startswith("error: ") and "do not fit 40.0 GiB" in error and "activation_checkpointing" in error
    assert run(capsys, *LARGE, "--device", "B200")[0] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--config is missing"),
        ([*LARGE, "--nodes", "0"], "--nodes = 0 is too small"),
        ([*LARGE, "--device", "H99"], "--device H99 is not known: choose A100, H100"),
        ([*LARGE, "--mfu", "1.5"], "--mfu = 1.5 is out of range"),
        ([*LARGE, "--tokens", "-1"], "--tokens = -1 is out of range"),
        ([*LARGE, "--memory", "0"], "--memory = 0 is out of range"),
        ([*LARGE, "--gpus", "3"], "parallel.ep = 8"),
        (["--config", "configs/deepseek-v3.toml", "--nodes", "240"], "parallel.data = 'shard' cannot divide"),
        ([*LARGE, "--train.engine", "deepspeed"], "train.engine = 'deepspeed' holds other things"),
        ([*LARGE, "--train.stepps", "4"], "did you mean train.steps?"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words, sentence):
    code, _, error = run(capsys, *words)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and sentence in error


def test_it_imports_no_torch():
    words = ["launch.cli", "plan", "--config", "configs/tiny.toml", "--gpus", "2"]
    program = f"import sys; sys.argv = {words}; from launch.cli import main; code = main(sys.argv[1:])"
    program += "; assert code == 0 and 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
