"""Learning-rate schedules, parameter groups, and the switches of the trainer."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time

import pytest
import torch

from moe.config import OptimSection
from moe.model.transformer import Transformer
from moe.train import device
from moe.train.device import Clock, StopSignal
from moe.train.loop import Run, run_steps
from moe.train.optim import build_optimizer, learning_rate
from tests.corpus import make_token_folder
from tests.tiny import ALONE, CPU, tiny_config


def rates(steps, **settings):
    optim = OptimSection(lr=1.0, **settings)
    return [learning_rate(optim, steps, step) for step in range(steps)]


def test_cosine_with_warm_up():
    lr = rates(11, warmup_steps=2, final_lr_share=0.1)
    assert lr[:3] == [0.5, 1.0, 1.0]
    assert lr[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way between steps 2 and 10
    assert lr[-1] == pytest.approx(0.1)
    assert lr[2:] == sorted(lr[2:], reverse=True)


def test_wsd_is_warm_up_stable_linear_decay():
    lr = rates(20, warmup_steps=4, schedule="wsd", decay_share=0.25, final_lr_share=0.0)
    assert lr[:4] == [0.25, 0.5, 0.75, 1.0]
    assert lr[4:15] == [1.0] * 11
    assert lr[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_wsd_decay_that_does_not_fit_behind_the_warm_up_is_shortened():
    lr = rates(10, warmup_steps=8, schedule="wsd", decay_share=0.5, final_lr_share=0.0)
    assert lr[7] == 1.0 and lr[8:] == pytest.approx([0.5, 0.0])


def test_norms_and_embeddings_do_not_decay_and_every_parameter_is_in_one_group():
    model = Transformer(tiny_config(), ALONE)
    groups = build_optimizer(model, tiny_config().optim).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    where = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert where.keys() == dict(model.named_parameters()).keys()
    assert all((decay == 0) == ("norm" in name or "embedding" in name) for name, decay in where.items())


def test_adamw_against_its_formula():
    model = torch.nn.Linear(3, 2, bias=False)
    optim = OptimSection(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    optimizer, generator = build_optimizer(model, optim), torch.Generator().manual_seed(0)
    expected, m, v = model.weight.detach().double(), 0.0, 0.0
    for step in range(1, 4):
        gradient = torch.randn(2, 3, generator=generator)
        model.weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient.double(), 0.9 * v + 0.1 * gradient.double() ** 2
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-3)
    torch.testing.assert_close(model.weight.detach(), expected.float(), rtol=1e-5, atol=1e-6)


def test_clock_takes_what_passed_since_the_last_time():
    clock = Clock(CPU)
    for _ in range(2):
        with clock.step(), clock.balance():
            time.sleep(0.01)
    steps, step_s, balance_s, regret_s = clock.take()
    assert steps == 2 and step_s >= balance_s >= 0.02 and regret_s == 0
    assert clock.take() == (0, 0.0, 0.0, 0.0)


def run_with(tmp_path, **settings):
    data = make_token_folder(tmp_path / "data")
    base = {"data__path": str(data), "observe__wandb": "off", "observe__peak_tflops": 1.0, "train__steps": 9}
    run = Run(tiny_config(**{**base, **settings}), ALONE, tmp_path, False)
    assert run_steps(run, StopSignal()).code == 0
    return run


def test_profile_writes_a_trace(tmp_path):
    run_with(tmp_path, train__profile=True)
    import gzip

    with gzip.open(tmp_path / "profile" / "trace-rank0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names


def test_deterministic_lists_the_flags_it_sets(tmp_path, capsys):
    try:
        run = run_with(tmp_path, train__deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert "torch.use_deterministic_algorithms(True)" in run.flags
        assert "torch.use_deterministic_algorithms(True)" in capsys.readouterr().out
    finally:
        torch.use_deterministic_algorithms(False)


FAULTS = """
import resource, sys, torch
from moe.train.device import keep_freed_memory
def faults():
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(12)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin
faults(), faults()
before, done = faults(), keep_freed_memory()
faults()
print(before, done, faults())
"""


def test_freed_memory_is_kept_for_the_next_step(monkeypatch):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library than glibc")
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)

    def run():
        done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
        return done.stdout.split()

    # What malloc keeps by itself depends on where in its heap the tensors come to lie.
    _, done, after = run()
    assert done == "True" and int(after) < 100
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # whoever sets it decides: every tensor has pages of its own
    before, done, after = run()
    assert done == "False" and min(int(before), int(after)) > 5_000  # 48 MiB are 12,288 pages


def test_neither_the_end_of_the_heap_nor_large_blocks_go_back(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, name, value):
            return asked.append((name, value)) or 1

    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: Library())
    monkeypatch.setattr(device.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert device.keep_freed_memory()
    assert asked == [(-3, 2**25), (-1, -1)]  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    monkeypatch.setattr(device.platform, "libc_ver", lambda: ("", ""))
    assert not device.keep_freed_memory() and len(asked) == 2
