"""Paired comparison: windows, intervals and equivalence by hand, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from moe.config import ConfigError
from moe.observe.paired import differences_that_forbid, markdown, paired, plot, plot_rates, read_result, rows

STEPS = 100


def write_run(folder, ce=5.0, early=1.0, late=0.1, code=0, rate="", **facts):
    """A finished run of 100 steps with two layers of four experts."""
    folder.mkdir(parents=True)
    about = {"data_hash": "d", "init_hash": "i", "flops_per_token": 7.0} | facts
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "exit.json").write_text(json.dumps({"code": code, "reason": ""}))
    lines = []
    for step in range(1, STEPS + 1):
        excess = early if step <= 5 else late if step > 80 else 50.0
        row = {"train/step": step, "train/tokens": 10 * step, "loss/ce": ce, "speed/tokens_per_s": 3.0}
        row |= {"moe/excess_maxvio_batch/mean": excess, "moe/excess_maxvio_batch/max": 2 * excess}
        lines.append(json.dumps(row))
    lines.append(json.dumps({"train/step": STEPS, "val/ce": ce}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"train/st')
    counts = np.tile([[4, 4, 4, 4], [2, 4, 4, 6]], (10, 1, 1))
    counts[:8, 0] = [16, 0, 0, 0]
    np.savez(folder / "loads.npz", steps=np.arange(10, 101, 10), counts=counts, layers=np.array([1, 2]))
    seed = facts.get("seed", 0)
    text = f"[run]\nseed = {seed}\n[data]\nseq_len = 8\n[train]\nbatch_size = 2\n"
    if rate:
        text += f'[balance]\nmethod = "sign"\nrate = {rate}\n'
    (folder / "config.toml").write_text(text)
    return folder


def test_windows_are_the_first_twentieth_and_the_last_fifth(tmp_path):
    result = read_result(write_run(tmp_path / "a"), "sign", 0)
    assert result.windows["early"]["excess"] == pytest.approx(1.0)
    assert result.windows["late"]["excess"] == pytest.approx(0.1)
    assert result.windows["late"]["excess_worst"] == pytest.approx(0.2)
    assert (result.ce, result.maxvio_summed, result.idle_late, result.tokens_per_s) == (5.0, 0.5, 0, 3.0)
    assert math.isnan(result.windows["late"]["bias_range"])  # not logged


def test_curves_have_every_logged_batch(tmp_path):
    curves = read_result(write_run(tmp_path / "a"), "sign", 0).curves
    assert curves["step"] == list(range(1, 101)) and curves["loss"] == [5.0] * 100
    assert curves["excess"] == [1.0] * 5 + [50.0] * 75 + [0.1] * 20
    assert curves["excess_worst"] == [2.0] * 5 + [100.0] * 75 + [0.2] * 20


def test_swept_rates_are_drawn_against_rate_times_steps(tmp_path, monkeypatch):
    from matplotlib import axes

    drawn = {}
    kept = axes.Axes.loglog

    def record(axis, x, y, label, **style):
        drawn[label] = (x, y)
        return kept(axis, x, y, label=label, **style)

    monkeypatch.setattr(axes.Axes, "loglog", record)
    runs = {"a": ("0.1", 0.1), "b": ("0.01", 0.1), "c": ("0.01", 0.3), "d": ('"auto"', 0.1), "e": ("", 0.1)}
    results = [read_result(write_run(tmp_path / n, rate=r, late=v), n, 0) for n, (r, v) in runs.items()]
    assert not plot_rates([results[0], *results[3:]], tmp_path / "p.png") and not (tmp_path / "p.png").exists()
    assert plot_rates(results, tmp_path / "p.png") and (tmp_path / "p.png").is_file()
    assert drawn.keys() == {"0.1", "0.01"}  # two runs of 0.01 are one line
    x, y = drawn["0.01"]
    assert (x[0], x[-1]) == (pytest.approx(0.01), pytest.approx(1.0)) and len(x) == 100
    assert y[-1] == pytest.approx(0.2)  # the mean of 0.1 and 0.3, every value of its window
    assert y[0] == pytest.approx(1.0) and y[4] == pytest.approx((5 * 1.0 + 4 * 50.0) / 9)


def test_interval_and_equivalence_by_hand():
    d = paired([0.01, 0.02, 0.03], margin=0.01)
    # t(0.975, 2) = 4.303, t(0.95, 2) = 2.920, sd = 0.01
    assert (d.mean, d.sd) == (pytest.approx(0.02), pytest.approx(0.01))
    assert d.low == pytest.approx(0.02 - 4.3027 * 0.01 / 3**0.5, abs=1e-6)
    assert d.high == pytest.approx(0.02 + 4.3027 * 0.01 / 3**0.5, abs=1e-6)
    assert d.equivalent is None
    assert d.seeds_needed == 8 + 2  # (2.8 sd / margin)^2 = 7.84
    assert paired([0.01, 0.02, 0.03], margin=0.04).equivalent is True  # 0.02 + 2.920 * 0.00577 = 0.0369
    assert paired([0.01, 0.02, 0.03], margin=0.036).equivalent is None
    assert paired([0.49, 0.5, 0.51], margin=0.01).equivalent is False
    alone = paired([0.3], margin=0.01)
    assert (alone.mean, alone.equivalent, alone.seeds_needed) == (0.3, None, None)
    assert math.isnan(alone.low)


def test_rows_pair_by_seed_and_take_the_worst(tmp_path):
    def run(arm, seed, **settings):
        return read_result(write_run(tmp_path / f"{arm}{seed}", **settings), arm, seed)

    results = [run("none", 0, ce=5.0), run("sign", 0, ce=5.2, late=0.3), run("none", 1, ce=4.0), run("sign", 1, ce=4.1)]
    results.append(run("sign", 2, ce=9.0))  # nothing to pair with
    none, sign = rows(results, "none", 0.05)
    assert none.delta is None and none.ce == 4.5
    assert sign.delta is not None and sign.delta.mean == pytest.approx(0.15) and sign.delta.seeds == 2
    assert sign.excess_late_worst == pytest.approx(0.6)
    text = markdown([none, sign], "none", 0.05, [])
    assert "| sign | 3 |" in text and "+0.1500 [" in text
    plot([none, sign], "none", tmp_path / "p.png", {"none": "none", "sign": "sign"})
    assert (tmp_path / "p.png").stat().st_size > 5_000


def test_settings_of_a_method_are_one_line_of_the_pareto_plot(tmp_path, monkeypatch):
    from matplotlib import axes

    drawn = {}
    kept = axes.Axes.errorbar

    def record(axis, x, y, label, **style):
        drawn[label] = (list(x), list(y))
        return kept(axis, x, y, label=label, **style)

    monkeypatch.setattr(axes.Axes, "errorbar", record)
    late = {"none": 3.0, "sign_rate=1e-3": 0.4, "sign_rate=1e-2": 0.2}
    results = [read_result(write_run(tmp_path / arm, late=x, ce=5 + x), arm, 0) for arm, x in late.items()]
    methods = {arm: arm.partition("_")[0] for arm in late}
    plot(rows(results, "none", 0.01), "none", tmp_path / "p.png", methods)
    assert drawn == {
        "none": ([pytest.approx(3.0)], [0.0]),
        "sign": (pytest.approx([0.2, 0.4]), pytest.approx([-2.8, -2.6])),
    }


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"data_hash": "x"}, "the data"),
        ({"init_hash": "x"}, "the initial weights"),
        ({"flops_per_token": 8.0}, "the active FLOPs"),
        ({"seed": 5}, "the data or their order"),
    ],
)
def test_runs_of_other_data_weights_or_cost_are_refused(tmp_path, facts, word):
    same = [read_result(write_run(tmp_path / "a"), "a", 0), read_result(write_run(tmp_path / "b"), "b", 0)]
    assert differences_that_forbid(same) == []
    other = read_result(write_run(tmp_path / "c", **facts), "c", 0)
    (sentence,) = differences_that_forbid([*same, other])
    assert sentence.startswith("NOT COMPARABLE") and word in sentence
    text = markdown(rows([*same, other], "a", 0.01), "a", 0.01, [sentence])
    assert text.startswith("**NOT COMPARABLE") and "+0.0000" not in text
    assert differences_that_forbid([*same, other._replace(seed=1)]) == []  # other seeds have other weights


def test_what_is_not_finished_does_not_count(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        read_result(tmp_path, "a", 0)
    with pytest.raises(ConfigError, match="exit code 4"):
        read_result(write_run(tmp_path / "a", code=4), "a", 0)
