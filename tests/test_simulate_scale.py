"""scripts/simulate_scale.py: the arithmetic by hand, what it reads of a run, bad input. Seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from launch.plan import DEVICES
from moe.config import load, resolve
from moe.observe import cost, footprint
from scripts import simulate_scale as scale
from tests.run_folder import make_run

SHAPE = [
    "--model.num_experts",
    "16",
    "--model.top_k",
    "2",
    "--model.expert_hidden_dim",
    "4224",
    "--model.num_shared_experts",
    "1",
]
LARGE = ["--config", "configs/deepseekmoe-16b.toml", *SHAPE]


def recording(counts_NLE, **other) -> dict:
    experts = np.shape(counts_NLE)[-1]
    return {"counts": np.array(counts_NLE).tolist(), "top_k": 2, "seq_len": 256, "batch_tokens": 2048} | {
        "straggler_batch": {str(experts): 1.0},
        **other,
    }


def test_straggler_by_hand():
    counts = np.array([[6, 2, 4, 4], [1, 1, 1, 1]])
    assert scale.straggler(counts, scale.contiguous(4, 2)).tolist() == [1, 1]
    assert scale.straggler(counts, scale.contiguous(4, 4)).tolist() == [1.5, 1]


def test_packing_puts_heavy_beside_light():
    placed = scale.replicated(np.array([6.0, 5, 2, 1]), 2, 0)
    assert (placed.argmax(1) == [0, 1, 1, 0]).all() and (placed.sum(1) == 1).all()
    assert scale.replicated(np.array([4.0, 1, 1, 1]), 2, 0).argmax(1).tolist() == [
        0,
        1,
        1,
        0,
    ]  # rank 1 is full, not loaded


def test_copies_go_to_the_hottest_and_to_other_ranks():
    load = np.array([9.0, 3, 2, 2])
    placed = scale.replicated(
        load, 2, 1
    )  # two more places: the first for 9, the next for 4.5 again, but it has 2 of 2 ranks
    assert placed.sum(1) == pytest.approx([1, 1, 1, 1]) and placed[0].tolist() == [0.5, 0.5]
    assert placed[1].tolist() == [0.5, 0.5] and scale.straggler(load[None], placed) == pytest.approx(1)
    assert ((placed > 0).sum(0) == 3).all()  # E / ranks + spare places each
    # 2 + 2 + 2 for expert 0: the third copy goes to rank 0, which has 3, not to one with 2 that holds it
    assert scale.replicated(np.array([6.0, 3, 3]), 3, 1)[0] == pytest.approx([1 / 3] * 3)
    lone = scale.replicated(np.array([8.0, 0, 0, 0]), 4, 1)  # more copies than this rule could make before the limit
    assert lone[0].tolist() == [0.25] * 4


@pytest.mark.parametrize(("between_h", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_interval_is_that_of_daly_s_figures(between_h, minutes):
    """J. T. Daly, 2006, figures 3 to 5: saves of 5 minutes."""
    assert scale.checkpoint_interval(300, 3600 * between_h) / 60 == pytest.approx(minutes, rel=6e-3)


def test_goodput():
    save, restart, between = 30.0, 600.0, 3600.0
    work = scale.checkpoint_interval(save, between)
    failures = lambda t: between * math.exp(restart / between) * (math.exp((t + save) / between) - 1) / t  # noqa: E731
    assert scale.goodput(save, restart, between) == pytest.approx(1 / failures(work))
    assert failures(work) < min(failures(0.9 * work), failures(1.1 * work))  # it is the optimum
    rare = scale.goodput(save, restart, 1e9)
    assert rare == pytest.approx(1 - math.sqrt(2 * save / 1e9) - restart / 1e9, abs=1e-6)  # Young's first order
    assert round(scale.GPU_HOURS_BETWEEN_FAILURES) == 50_677  # 21.2 M GPU-hours, 419 failures


@pytest.mark.parametrize("world", [8, 64])
def test_step_by_hand(world):
    config = resolve(load(LARGE[1:2], [*SHAPE, "--train.batch_size", str(4 * world)]), world, cuda=True)
    sent, flops = footprint.traffic(config, world, 8), cost.flops_per_token(config)
    arithmetic = 4 * 4096 * flops / (989e12 * 0.4)
    rows, link = sent.rows_inside / (450e9 * 153 / 160), 450e9 * 153 / 160 if world == 8 else 50e9 * 0.86
    by_hand = arithmetic * (1 + cost.routed_share(config)) + 0.75 * (2 * rows + sent.parameters / link)
    assert sent.rows_outside == 0
    assert scale.step_seconds(config, world, 8, DEVICES["H100"], 0.4, 0.25, 2.0) == pytest.approx(by_hand)


def test_rho_is_found_again():
    p = np.random.default_rng(0).dirichlet(np.full(16, 3.0), size=(2, 2))
    counts = np.round(p * 1e6)
    rho = 0.1
    measured = scale.expected(scale.shares(counts), 4096 / scale.design_effect(rho, 256), 16)
    found = scale.correlation(recording(counts, straggler_batch={"16": measured}))
    assert found == pytest.approx(rho, rel=0.03)
    assert scale.correlation(recording(counts)) == 0


def test_rho_of_recorded_scores(tmp_path: Path):
    """Sequences whose tokens all choose alike have rho 1, independent tokens 0; the bias of the step before chooses."""
    rng, found = np.random.default_rng(0), {}
    for name, scores in {
        "alike": np.repeat(rng.random((2, 64, 1, 8)), 32, axis=2),
        "independent": rng.random((2, 64, 32, 8)),
        "biased": np.zeros((2, 64, 32, 8)),
    }.items():
        run = make_run(tmp_path / name, steps=4, layers=1)
        (run / "config.toml").write_text("[data]\nseq_len = 32\n")
        bias = np.zeros((4, 1, 8), np.float32)
        bias[1:3, 0, 5] = 2.0 * (name == "biased")  # steps 2 and 3: for the tokens of 3 and 4
        np.savez(run / "loads.npz", steps=[1, 2, 3, 4], counts=np.ones((4, 1, 8), int), bias=bias, layers=[1])
        (run / "scores").mkdir()
        scores = scores.reshape(2, 64 * 32, 8).astype(np.float32)
        np.savez(run / "scores" / "layer_01_steps_3-4.npz", scores=scores, top_k=1, steps=[3, 4])
        found[name] = scale.scored_correlation(scale.read_run(run))
        np.savez(run / "loads.npz", steps=[4], counts=np.ones((1, 1, 8), int), bias=bias[:1], layers=[1])
        assert scale.scored_correlation(scale.read_run(run)) is None  # the bias of step 3 is not known
    assert found["biased"] is None  # every token at expert 5: no variance, and none by chance
    assert found["alike"] == pytest.approx(1, abs=0.05) and found["independent"] == pytest.approx(0, abs=0.005)


def test_even_loads_cost_nothing_and_more_groups_wait_longer():
    config = resolve(load(LARGE[1:2], [*SHAPE, "--train.batch_size", "32"]), 8, cuda=True)
    skewed = np.full((3, 2, 16), 100)
    skewed[:, :, 0] = 700
    run = recording(skewed)
    found = scale.imbalance(run, 1e-3, config, "contiguous", [1, 64, 512], 1)
    assert found.slowest[1] == pytest.approx(found.one) and found.one == pytest.approx(8 * 8 / 22, rel=0.05)
    assert found.one < found.slowest[64] < found.slowest[512]
    assert (
        scale.imbalance(run, 0.2, config, "contiguous", [1], 1).one > found.one
    )  # sequences of one kind: fewer in effect
    packed, copied = (scale.imbalance(run, 1e-3, config, kind, [1], 1).one for kind in ("packed", "replicated"))
    assert copied < 1.3 < packed <= found.one * 1.05  # one expert of 7 / 22 fits no rank without copies


def test_from_runs_to_the_table(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "DRAWS", 5)
    monkeypatch.setattr(scale, "WORLDS", [8, 64])
    for method, seed in (("none", 1), ("sign", 2)):
        run = make_run(tmp_path / method / "seed0", experts=16, seed=seed)
        settings = "[run]\nseed = 0\n[model]\ntop_k = 2\n[data]\nseq_len = 64\n[train]\nbatch_size = 8\n"
        (run / "config.toml").write_text(settings)
        (run / "exit.json").write_text('{"code": 0}')
    routing, out, picture = (tmp_path / name for name in ("routing.json", "scale.json", "scale.png"))
    runs = [str(tmp_path / method / "seed0") for method in ("none", "sign")]
    assert scale.main(["record", *runs, "--out", str(routing), "--late", "0.25"]) == 0
    found = json.loads(routing.read_text())["runs"]["sign"]
    with np.load(tmp_path / "sign" / "seed0" / "loads.npz") as loads:
        assert found["counts"] == loads["counts"][30:].tolist() and found["steps"] == [31, 40]
    rows = [json.loads(line) for line in (tmp_path / "sign" / "seed0" / "metrics.jsonl").read_text().splitlines()]
    late = [
        1 + row["moe/maxvio_batch/mean"] for row in rows if row["train/step"] > 30 and "moe/maxvio_batch/mean" in row
    ]
    assert found["batch_tokens"] == 512 and found["straggler_batch"]["16"] == pytest.approx(np.mean(late))

    assert scale.main(["simulate", *LARGE, "--routing", str(routing), "--out", str(out), "--plot", str(picture)]) == 0
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert (
        "| balanced | 1.00 |" in text and "| none |" in text and "| 0.0 % |" in text and picture.stat().st_size > 1000
    )
    balanced, none = (result["methods"][name]["contiguous"] for name in ("balanced", "none"))
    hours = 1e12 / (8 * 4 * 4096) * balanced["step_s"][0] * 8 / 3600 / result["goodput"][0]
    assert balanced["gpu_hours"][0] == pytest.approx(hours, rel=1e-3) and none["gpu_hours"][0] > hours


def test_validation_reads_the_committed_files(capsys):
    assert scale.main(["validate"]) == 0
    assert "| 2 | 771 | 44 | 9 | 824 | 897 | 0.92 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["record", "runs/none"], "runs/none does not exist"),
        (["record"], "0 runs have 0 methods"),
        (["simulate", "--routing", "nowhere.json", *LARGE], "nowhere.json"),
        (["simulate"], "--config is missing"),
        (["simulate", *LARGE, "--model.top_k", "4"], "model.num_experts, top_k = 16, 4 are not those of the recording"),
        (["simulate", *LARGE, "--parallel.ep", "3"], "parallel.ep = 3 divides none of 8 to 65,536 GPUs"),
        (["simulate", *LARGE, "--hidden", "1.5"], "--hidden = 1.5 is out of range: give at least 0, at most 1"),
        (["simulate", *LARGE, "--mfu", "0"], "--mfu = 0 is out of range: give more than 0, at most 1"),
        (["simulate", *LARGE, "--save", "nan"], "--save = nan is out of range"),
        (["simulate", *LARGE, "--rho", "2"], "--rho = 2 is out of range: give at least 0, at most 1"),
        (["simulate", *LARGE, "--spare", "-1"], "--spare = -1 is out of range"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words, sentence):
    assert scale.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
