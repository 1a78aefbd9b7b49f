"""The dashboard names what is really logged, W&B gets no more than that, and a push overwrites nothing."""

from __future__ import annotations

import re

import pytest

from moe.config import ConfigError
from moe.observe import dashboard
from moe.observe.sinks import read_metrics
from moe.train.loop import train
from tests.corpus import make_token_folder
from tests.moe.observe.test_load import documented_patterns
from tests.moe.observe.test_sinks import wandb_rows
from tests.tiny import ALONE, tiny_config

SCALARS = 54


def test_every_metric_of_a_panel_is_documented():
    patterns = documented_patterns()
    for metric in dashboard.METRICS - {dashboard.IMAGE}:
        key = metric + "07" if metric.endswith("/layer_") else metric
        assert any(pattern.fullmatch(key) for pattern in patterns.values()), metric


def test_there_are_the_seven_sections_and_no_panel_twice():
    assert [int(title[0]) for title in dashboard.SECTIONS] == [1, 2, 3, 4, 5, 6, 7]
    titles = [panel.title for panels in dashboard.SECTIONS.values() for panel in panels]
    assert len(set(titles)) == len(titles)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Keys in the .wandb file, and rows of metrics.jsonl, of real offline runs with 8, 64 and 128 experts."""
    folder = tmp_path_factory.mktemp("offline")
    data = str(make_token_folder(folder / "data"))
    found = {}
    for experts in (8, 64, 128):
        settings = {"observe__wandb": "offline", "observe__log_every": 1, "observe__regret_every": 1}
        settings |= {"observe__regret_reservoir": 64}  # small enough that every layer is measured at every probe
        settings |= {"observe__wandb_group": "g", "observe__peak_tflops": 1.0, "model__num_experts": experts}
        settings |= {"balance__method": "proportional", "balance__rate": 0.1, "train__steps": 3, "evaluate__every": 2}
        run = folder / str(experts)
        assert train(tiny_config(1, data__path=data, **settings), ALONE, run, False).code == 0
        rows = wandb_rows(run, lambda rows: sum("val/ce" in row for row in rows) == 2)
        found[experts] = rows, read_metrics(run / "metrics.jsonl")
    return found


def keys(rows):
    return {key for row in rows for key in row if not key.startswith("_")}


def test_every_metric_of_a_panel_is_in_the_file_of_a_real_run(offline):
    rows = offline[8][0] + offline[64][0]  # 64 ranks are simulated with 64 experts alone; the bound is finite with 8
    found = {re.sub(r"/layer_\d+$", "/layer_", key) for key in keys(rows)}
    assert dashboard.METRICS | set(dashboard.AXES) == {re.sub("load_heatmap/.*", "load_heatmap", key) for key in found}


def test_every_value_is_in_the_file_as_it_is_in_metrics_jsonl(offline):
    rows, logged = offline[64]
    sent = [
        {k: v for k, v in row.items() if not k.startswith("_") and not k.startswith(dashboard.IMAGE)} for row in rows
    ]
    assert [row for row in sent if len(row) > 2] == [
        {k: v for k, v in row.items() if dashboard.is_shown(k)} for row in sorted_as_written(logged)
    ]


def sorted_as_written(rows):
    """A step's training row comes before its evaluation."""
    return sorted(rows, key=lambda row: (row["train/step"], "val/ce" in row))


def test_p30_keys_of_wandb_do_not_grow_with_the_experts_and_are_few(offline):
    few, many = (keys(rows) for rows, _ in (offline[64], offline[128]))
    assert few == many
    per_layer = {key for key in few if "/layer_" in key}
    assert len(few - per_layer) <= SCALARS
    assert len(per_layer) <= 4 * 2  # two MoE layers


# -- the view ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(monkeypatch):
    """Views that W&B would be sent."""
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")
    import wandb
    from wandb_workspaces.workspaces import Workspace, internal

    found = []

    def upsert(view):
        found.append(view.model_copy(deep=True))
        return {"upsertView": {"view": {"name": view.name, "id": f"id{len(found)}"}}}

    monkeypatch.setattr(internal, "upsert_view2", upsert)
    monkeypatch.setattr(Workspace, "url", property(lambda view: f"https://w/{view._internal_name}"))  # asks W&B
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    return found


def test_a_push_is_a_new_view_each_time(saved):
    addresses = [dashboard.push("me", "p", "mine") for _ in range(2)]
    assert [view.id for view in saved] == ["", ""]  # no view of W&B is named: nothing is replaced
    assert saved[0].name != saved[1].name
    assert addresses[0] != addresses[1]


def test_the_view_has_every_panel(saved):
    dashboard.push("me", "p", "mine")
    text = saved[0].model_dump_json()
    for title, panels in dashboard.SECTIONS.items():
        assert title in text
        for panel in panels:
            assert panel.title in text
            for metric in panel.metrics:
                assert f'"{metric}' in text, metric


def test_without_a_login_nothing_is_pushed(saved, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "login", lambda **_: False)
    with pytest.raises(ConfigError, match="run wandb login"):
        dashboard.push("me", "p", "mine")
    assert saved == []


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    with pytest.raises(ConfigError, match=r"pip install 'alf-moe\[dashboard\]'"):
        dashboard.build("me", "p", "mine")
