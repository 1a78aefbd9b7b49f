"""Whole runs on a small corpus: resume, signals, the guard, the run folder. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.config import ASSIGNMENTS, load
from moe.observe.sinks import read_metrics
from moe.parallel import build_ranks
from moe.train import checkpoint
from moe.train import data as token_data
from moe.train.loop import Run, run_steps, train
from moe.train.resume import restore
from tests.corpus import make_token_folder
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, tiny_config

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = [[path] for path in sorted(CONFIGS.glob("*.toml"))]
PRESETS += [
    [CONFIGS / "tiny.toml", path]
    for path in sorted((CONFIGS / "methods").glob("*.toml"))
    if load([str(CONFIGS / "tiny.toml"), str(path)]).balance.method not in ("none", *ASSIGNMENTS)
]
SMALL = """
--model.dim 32 --model.num_layers 3 --model.num_heads 4 --model.num_kv_heads 2 --model.head_dim 8 --model.num_experts 8
--model.top_k 2 --model.expert_hidden_dim 16 --model.dense_hidden_dim 32 --model.vocab_size 128 --data.seq_len 16
--train.batch_size 8 --train.micro_batch_size 4 --train.steps 3 --train.compute_dtype float32 --parallel.ep 1
--optim.warmup_steps 0 --observe.wandb off --evaluate.max_tokens 64 --evaluate.every 0 --evaluate.batch_size 4
--checkpoint.every 0
"""
SMALL_WORDS = SMALL.split()
GQA = "--model.num_kv_heads 2 --model.head_dim 8"
MLA = """--model.kv_lora_rank 16 --model.qk_nope_head_dim 8 --model.qk_rope_head_dim 4 --model.v_head_dim 8 --model.num_groups 2
--model.group_top_k 1 --model.first_k_dense 1"""


def config(data, world_size=1, **settings):
    base = {
        "data__path": str(data),
        "observe__wandb": "off",
        "observe__log_every": 1,
        "observe__regret_every": 2,
        "observe__regret_reservoir": 64,
        "checkpoint__every": 3,
        "train__steps": 6,
        "train__micro_batch_size": 2,
        "observe__peak_tflops": 1.0,
    }
    return tiny_config(world_size, **{**base, **settings})


def tensors(tree, path=""):
    if isinstance(tree, dict):
        return {k: v for key, sub in tree.items() for k, v in tensors(sub, f"{path}/{key}").items()}
    if isinstance(tree, torch.Tensor):
        return {path: (tree.to_local() if hasattr(tree, "to_local") else tree).clone().numpy()}
    return {path: tree}


def _resume(rank, n, data, folder):
    c = config(data, n, parallel__ep=n)
    ranks = build_ranks(rank, n, CPU, n)
    run_dir = Path(folder)
    outcome = train(c, ranks, run_dir, False)
    assert outcome.code == 0
    whole = Run(c, ranks, run_dir, True)
    ranks.barrier()
    if rank == 0:
        subprocess.run(["rm", "-r", str(run_dir / "checkpoints" / "step-00000006")], check=True)
    ranks.barrier()
    again = Run(c, ranks, run_dir, True)
    assert again.progress.step == 3
    from moe.train.device import StopSignal

    run_steps(again, StopSignal())
    a, b = tensors(whole.state()), tensors(again.state())
    assert a.keys() == b.keys() and whole.progress == again.progress
    different = [key for key in a if not np.array_equal(a[key], b[key])]
    return different, len(a)


@pytest.mark.parametrize("n", [1, 2])
def test_p07_p36_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, n):
    data = make_token_folder(tmp_path / "data")
    for different, count in run_ranks(_resume, n, str(data), str(tmp_path / "run")):
        assert different == [] and count > 50


def test_measuring_and_recording_change_nothing_in_the_training(tmp_path):
    data, weights = make_token_folder(tmp_path / "data"), []
    for name, settings in (("on", {"observe__record_scores": 6}), ("off", {"observe__regret_every": 0})):
        assert train(config(data, **settings), ALONE, tmp_path / name, False).code == 0
        run = Run(config(data, **settings), ALONE, tmp_path / name, True)
        weights.append({k: v for k, v in tensors(run.state()).items() if not k.startswith("/regret")})
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(value, weights[1][key]) for key, value in weights[0].items())
    assert {p.name for p in (tmp_path / "on" / "scores").iterdir()} == {
        "layer_01_steps_1-6.npz",
        "layer_02_steps_1-6.npz",
    }


def test_regret_settings_may_change_on_resume(tmp_path, capsys):
    data = make_token_folder(tmp_path / "data")
    assert train(config(data), ALONE, tmp_path / "run", False).code == 0
    for settings in ({"observe__regret_every": 0}, {"observe__regret_reservoir": 32}):
        run = Run(config(data, **settings), ALONE, tmp_path / "run", True)
        assert run.progress.step == 6
        assert "regret starts anew" in capsys.readouterr().out
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "regret/probes" in row]
    assert [row["train/step"] for row in rows] == [1, 3, 5]
    run = Run(config(data, observe__regret_every=3), ALONE, tmp_path / "run", True)
    assert run.regret is not None and int(run.regret.state["probes"]) == 3


def test_a_method_that_sees_later_tokens_says_so_at_the_start(tmp_path, capsys):
    data = make_token_folder(tmp_path / "data")
    settings = {"balance__rate": None, "train__micro_batch_size": 8}
    for method, says in (("sinkhorn", True), ("coordinate", False)):
        (tmp_path / method).mkdir()
        Run(config(data, balance__method=method, **settings), ALONE, tmp_path / method, False)
        line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("balancing"))
        assert ("uses future tokens of the batch" in line) == says and method in line


def test_a_checkpoint_without_a_setting_of_its_identity_is_one_sentence(tmp_path, monkeypatch):
    c = config(make_token_folder(tmp_path / "data"))
    identity = Run.identity
    monkeypatch.setattr(Run, "identity", lambda run: {k: v for k, v in identity(run).items() if k != "run.seed"})
    assert train(c, ALONE, tmp_path / "run", False).code == 0
    monkeypatch.setattr(Run, "identity", identity)
    with pytest.raises(checkpoint.CheckpointError, match=r"run\.seed = 0 differs from None of checkpoint"):
        Run(c, ALONE, tmp_path / "run", True)


def test_resume_refuses_another_order_of_samples(tmp_path, monkeypatch):
    c = config(make_token_folder(tmp_path / "data"))
    assert train(c, ALONE, tmp_path / "run", False).code == 0
    key = token_data._key
    monkeypatch.setattr(token_data, "_key", lambda seed, stream: key(seed + 1, stream))
    with pytest.raises(
        checkpoint.CheckpointError, match="the samples after step 6 are not those of checkpoint step-00000006"
    ):
        Run(c, ALONE, tmp_path / "run", True)


def test_run_folder_and_metrics_are_what_the_documents_say(tmp_path):
    data = make_token_folder(tmp_path / "data")
    c = config(data, evaluate__every=2)
    assert train(c, ALONE, tmp_path / "run", False).code == 0
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {
        "config.toml",
        "run.json",
        "metrics.jsonl",
        "events.jsonl",
        "loads.npz",
        "loads-latest.npz",
        "checkpoints",
    } <= names
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    training = [r for r in rows if "loss/ce" in r]
    assert [r["train/step"] for r in training] == [1, 2, 3, 4, 5, 6]
    assert training[-1]["train/tokens"] == 6 * 8 * 16
    assert [r["train/step"] for r in rows if "val/ce" in r] == [2, 4, 6]
    with np.load(tmp_path / "run" / "loads.npz") as loads:
        assert loads["counts"].shape == (6, 2, 8) and loads["counts"].sum() == 6 * 2 * 8 * 16 * 2
        assert loads["layers"].tolist() == [1, 2]
    reloaded = load([str(tmp_path / "run" / "config.toml")])
    assert reloaded == c
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["parameters_total"] == sum(
        p.numel() for p in Run(c, ALONE, tmp_path / "run", True).engine.model.parameters()
    )


def test_initial_weights_hash_does_not_depend_on_the_layout(tmp_path):
    data = make_token_folder(tmp_path / "data")
    alone = run_ranks(_init_hash, 1, str(data), 1)[0]
    assert run_ranks(_init_hash, 2, str(data), 2) == [alone, alone]


def test_a_rank_without_data_stops_all(tmp_path):
    data = make_token_folder(tmp_path / "data")
    for message in run_ranks(_data_on_rank_0_only, 2, str(data), timeout_s=60):
        assert "does not exist" in message and message.endswith("(on rank 1)")


def _data_on_rank_0_only(rank, n, data):
    c = config(data if rank == 0 else data + "-absent", n)
    with pytest.raises(token_data.DataError) as error:
        Run(c, build_ranks(rank, n, CPU, 1), Path(data), False)
    return str(error.value)


def _init_hash(rank, n, data, ep):
    return Run(config(data, n, parallel__ep=ep), build_ranks(rank, n, CPU, ep), Path(data), False).init_hash


@pytest.mark.parametrize("preset", PRESETS, ids=lambda files: "+".join(path.stem for path in files))
def test_p05_bias_moves_in_every_preset(tmp_path, preset):
    from moe.config import resolve

    data = make_token_folder(tmp_path / "data")
    latent = load([str(file) for file in preset]).model.attention == "mla"
    words = SMALL.replace(GQA, MLA).split() if latent else SMALL_WORDS
    c = resolve(
        load([str(file) for file in preset], [*words, "--data.path", str(data), "--observe.peak_tflops", "1.0"])
    )
    assert c.balance.method != "none"
    run = Run(c, ALONE, tmp_path, False)
    from moe.train.device import StopSignal

    assert run_steps(run, StopSignal()).code == 0
    assert len(run.routers) > 0
    for index, router in enumerate(run.routers.values()):
        assert router.expert_bias_E.abs().max() > 0
        assert torch.equal(router.expert_bias_E, run.balancer.bias_LE[index])


def test_p12_skipped_step_leaves_bias_counter_and_counts(tmp_path):
    run = Run(config(make_token_folder(tmp_path / "data")), ALONE, tmp_path, False)
    run.train_step(False)
    before, seen, count = run.balancer.bias_LE.clone(), run.tracker.seen_LE.clone(), int(run.balancer.step_count)
    real = run.engine.forward_backward

    def poisoned(micro_batches):
        out = real(micro_batches)
        run.engine.model.norm.weight.grad[0] = math.inf
        return out

    run.engine.forward_backward = poisoned
    done, _ = run.train_step(False)
    assert not done.applied and run.progress.skipped == 1 and run.progress.step == 2
    assert torch.equal(run.balancer.bias_LE, before) and torch.equal(run.tracker.seen_LE, seen)
    assert int(run.balancer.step_count) == count
    run.engine.forward_backward = real
    assert run.train_step(False)[0].applied and run.progress.skipped_in_row == 0
    assert not torch.equal(run.balancer.bias_LE, before)


def test_guard_stops_with_code_4_and_finite_weights(tmp_path):
    data = make_token_folder(tmp_path / "data")
    c = config(data, train__steps=30, train__max_skipped_steps=3, optim__lr=1e30)
    outcome = train(c, ALONE, tmp_path / "run", False)
    assert outcome.code == 4 and "train.max_skipped_steps = 3" in outcome.reason
    run = Run(c, ALONE, tmp_path / "run", True)
    assert all(torch.isfinite(p).all() for p in run.engine.model.parameters())


def test_p26_a_run_passes_over_a_checkpoint_whose_experts_are_exchanged(tmp_path, capsys):
    data = make_token_folder(tmp_path / "data")
    train(config(data), ALONE, tmp_path / "run", False)
    run = Run(config(data), ALONE, tmp_path / "run", True)
    assert run.progress.step == 6
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "MANIFEST.json"
    manifest = json.loads(file.read_text())
    row = next(iter(manifest["census"].values()))
    row[0], row[1] = row[1], row[0]  # as if their shards had been: every file still has the hash that is written there
    file.write_text(json.dumps(manifest))
    capsys.readouterr()
    restore(run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert run.progress.step == 3 and len(lines) == 1
    assert "step-00000006 is refused" in lines[0] and "2 differ from the census" in lines[0]


def test_p44_damaged_checkpoint_is_passed_over_and_foreign_settings_are_refused(tmp_path, capsys):
    data = make_token_folder(tmp_path / "data")
    train(config(data), ALONE, tmp_path / "run", False)
    run = Run(config(data), ALONE, tmp_path / "run", True)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert len(files) >= 4
    capsys.readouterr()

    def passed_over():
        restore(run)
        lines = [line for line in capsys.readouterr().out.splitlines() if line]
        return run.progress.step == 3 and len(lines) == 1 and "step-00000006 is refused" in lines[0]

    for file in files:
        good = file.read_bytes()
        for place in (0, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            assert passed_over(), (file, place)
        file.write_bytes(good[:-1])
        assert passed_over(), file
        file.unlink()
        assert passed_over(), file
        file.write_bytes(good)
        restore(run)
        assert run.progress.step == 6 and not capsys.readouterr().out
    (newest / "trainer.json").write_text("{}")
    assert Run(config(data), ALONE, tmp_path / "run", True).progress.step == 3
    for settings, name in (
        ({"balance__method": "none", "balance__rate": None}, r"balance\.method = 'none'"),
        ({"run__seed": 7}, r"run\.seed = 7"),
        ({"model__rope_theta": 500.0}, r"model\.rope_theta = 500\.0"),
        ({"train__batch_size": 4}, r"train\.batch_size = 4"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=name):
            Run(config(data, **settings), ALONE, tmp_path / "run", True)


def start(*words, nproc=2):
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "train",
        "--config",
        "configs/tiny.toml",
        "--nproc",
        str(nproc),
        *words,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_75_and_resume_finishes(tmp_path, number):
    data = make_token_folder(tmp_path / "data", {"text": 60_000})
    words = [
        *SMALL_WORDS,
        "--parallel.ep",
        "2",
        "--data.path",
        str(data),
        "--run.folder",
        str(tmp_path),
        "--observe.log_every",
        "5",
    ]
    long = [*words, "--train.steps", "100000"]
    process = start(*long)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, (out, err)
    step = json.loads((next((tmp_path / "tiny" / "checkpoints").glob("step-*")) / "trainer.json").read_text())["step"]
    assert step >= 10
    process = start(*words, "--train.steps", str(step + 3), "--resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    assert f"after step {step:,}" in out and json.loads((tmp_path / "tiny" / "exit.json").read_text())["code"] == 0
