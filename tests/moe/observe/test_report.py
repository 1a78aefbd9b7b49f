"""What goes into the report: bounded, exact where it says so, safe whatever the run folder holds."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from moe.observe import heat
from moe.observe.report import BAND_COLUMNS, CHARTS, COLUMNS, build, strips, thin
from moe.observe.runs import Loads, read_run
from tests.moe.observe.test_load import documented_patterns
from tests.run_folder import make_run


def data_of(page):
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])


def indices(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def test_every_metric_of_a_chart_is_documented():
    patterns = documented_patterns()
    for key in {key for chart in CHARTS for key, _ in chart.lines}:
        key = key + "00" if key.endswith("layer_") else key
        assert any(pattern.fullmatch(key) for pattern in patterns.values()), key


def test_thinning_keeps_peaks_and_the_last_point():
    y = np.sin(np.arange(5000) / 300)
    y[1234], y[4001] = 50.0, -50.0
    x, found = thin(range(5000), y.tolist(), points=100)
    assert len(x) <= 100
    assert x == sorted(set(x))
    assert (found[x.index(1234)], found[x.index(4001)], x[-1]) == (50.0, -50.0, 4999)
    assert thin([1, 2], [0.123456, 123456.7]) == [[1, 2], [0.1235, 123457]]


def test_joined_columns_add_counts_and_keep_the_last_bias():
    n = 2 * COLUMNS
    counts = np.full((n, 1, 2), 10)
    counts[1, 0] = [30, 10]  # with its neighbour: 40 and 20, loads 4/3 and 2/3
    bias = np.zeros((n, 1, 2), np.float32)
    bias[1, 0] = [0.5, -0.5]
    found = strips(Loads(np.arange(1, n + 1) * 5, counts, bias, [3]))
    assert len(found["steps"]) == COLUMNS
    assert found["steps"][:2] == [[1, 10], [11, 20]]
    assert indices(found["load"][0])[:, 0].tolist() == heat.load_index(np.array([4 / 3, 2 / 3])).tolist()
    assert indices(found["bias"][0])[:, 0].tolist() == heat.signed_index(np.array([0.5, -0.5]), 0.5).tolist()
    assert len(found["band_steps"]) == BAND_COLUMNS
    assert found["band_steps"][-1] == 5 * n


def test_bias_of_an_older_part_of_the_run_is_unknown_and_not_in_the_band():
    bias = np.full((4, 1, 2), np.nan, np.float32)
    bias[2:] = [[-0.1, 0.1]]
    found = strips(Loads(np.arange(1, 5), np.ones((4, 1, 2), int), bias, [0]))
    assert indices(found["bias"][0])[0].tolist()[:2] == [heat.UNKNOWN] * 2
    assert found["band_steps"] == [3, 4]
    assert found["band"][0] == [[-0.1] * 2, [-0.08] * 2, [0.0] * 2, [0.08] * 2, [0.1] * 2]
    nothing = strips(Loads(np.arange(1, 5), np.ones((4, 1, 2), int), bias * np.nan, [0]))
    assert "bias" not in nothing


def test_what_is_in_the_folder_cannot_leave_its_place(tmp_path):
    folder = make_run(tmp_path / "r", steps=3)
    hostile = "</script><script>alert(1)</script>/*style*/ \u2028"
    (folder / "events.jsonl").write_text(json.dumps({"event": "warn", "text": hostile}) + "\n")
    page = build([read_run(folder)])
    assert "alert(1)</script>" not in page
    assert page.count("<script") == 2
    assert data_of(page)["runs"][0]["events"] == [["–", "warn", "–", hostile]]


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "loads.npz", "config.toml", "run.json", "events.jsonl", "exit.json"]
)
def test_a_report_is_made_from_what_there_is(tmp_path, missing):
    folder = make_run(tmp_path / "r", steps=3)
    (folder / missing).unlink()
    (run,) = data_of(build([read_run(folder)]))["runs"]
    assert (run["strips"] is None) == (missing == "loads.npz")
    assert (run["series"] == {}) == (missing == "metrics.jsonl")


def test_2000_steps_of_27_layers_and_64_experts_stay_below_2_megabytes(tmp_path):
    page = build([read_run(make_run(tmp_path / "r", steps=2000, layers=27, experts=64))])
    assert 300_000 < len(page.encode()) < 2_000_000
