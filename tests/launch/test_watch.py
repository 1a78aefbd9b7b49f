"""`alf-moe watch`: one frame through the real command, at every width, of runs in every state."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from launch.watch import frame, heat_cells, sparkline
from moe.observe.live import open_live
from tests.run_folder import make_run


def watch(*words, width=100):
    environment = {**os.environ, "COLUMNS": str(width)}
    command = [sys.executable, "-m", "launch.cli", "watch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout  # colours are for terminals
    return done.stdout


def drawn(live, width, height=None):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(frame(live, width, height))
    return console.export_text()


def test_one_frame_says_everything(tmp_path):
    folder = make_run(tmp_path / "r", steps=10)
    text = watch(folder, "--once")
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert text.splitlines()[0] == "r  done"
    for part in (
        "step 10/10 (100.0%)",
        f"loss {row['loss/ce']:.4f}",
        "val 2.5000 (step 10)",
        f"maxvio {row['moe/maxvio_batch/mean']:.3f} mean",
        "floor 0.100",
        f"L01  {row['moe/maxvio_batch/layer_01']:.3f}",
        f"L02  {row['moe/maxvio_batch/layer_02']:.3f}",
        "! idle experts in a layer: 1; the longest idle for 12 steps; dead experts in a layer: 2\n",
        "load up to step 10",
        "save  step 10",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize("width", [30, 50, 100, 200])
def test_a_frame_fits_its_width(tmp_path, width):
    live = open_live(make_run(tmp_path / "r", steps=50, layers=3, experts=64))
    lines = drawn(live, width).splitlines()
    assert max(map(len, lines)) <= width
    cells = next(line for line in lines if line.startswith("L01"))
    assert len(cells.split()[-1]) == -(-64 // -(-64 // max(1, width - 16)))
    assert any("most uneven of" in line for line in lines) == (width < 80) or width == 30  # wrapped there


def test_the_worst_layers_are_shown_where_not_all_fit(tmp_path):
    folder = make_run(tmp_path / "r", steps=5, layers=27)
    live = open_live(folder)
    text = drawn(live, 100, height=20)
    worst = sorted(sorted(live.maxvio(), key=lambda layer: -live.maxvio()[layer])[:7])
    assert [int(line[1:3]) for line in text.splitlines() if line.startswith("L")] == worst
    assert "the worst 7 of 27 layers" in text
    assert len(text.splitlines()) <= 20


def test_cells_show_idle_low_mean_high_and_unknown():
    assert heat_cells([0.0, 0.1, 1.0, 2.0, 9.0, float("nan")], 1).plain == "×▁▄██·"
    assert heat_cells([1.0, 0.0, 1.2, 1.1], 2).plain == "×▅"  # an idle expert is not averaged away


def test_a_sparkline_is_as_wide_as_it_may_be():
    assert sparkline([], 10) == ""
    assert sparkline([1, 1], 10) == "▁▁"
    assert sparkline([0, 7], 10) == "▁█"
    assert len(sparkline(list(map(float, range(95))), 10)) == 10


def test_a_run_that_has_not_logged_and_one_without_experts(tmp_path):
    assert "waiting for the first logged step" in watch(tmp_path, "--once")
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1, "loss/ce": null}\n')
    text = watch(tmp_path, "--once")
    assert "loss not finite" in text and "no expert" in text


def test_loads_without_a_token_do_not_stop_it(tmp_path):
    folder = make_run(tmp_path / "r", steps=2)
    np.savez(folder / "loads.npz", steps=[2], counts=np.zeros((1, 2, 8), int), layers=[1, 2])
    assert "········" in watch(folder, "--once")


def test_it_ends_with_the_run(tmp_path):
    folder = make_run(tmp_path / "r", steps=3)
    (folder / "exit.json").unlink()
    command = [sys.executable, "-u", "-m", "launch.cli", "watch", str(folder), "--interval", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    (folder / "exit.json").write_text('{"code": 75, "reason": "stopped by a signal"}')
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "stopped by a signal (exit code 75)" in out
