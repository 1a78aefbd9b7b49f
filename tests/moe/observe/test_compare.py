"""Comparisons that are none are refused, each for its own reason."""

import pytest

from moe.observe.compare import not_comparable, settings_that_differ
from moe.observe.runs import read_run
from tests.run_folder import make_run


def pair(tmp_path, **changes):
    return [read_run(make_run(tmp_path / "a", 5)), read_run(make_run(tmp_path / "b", **{"steps": 5, **changes}))]


def test_runs_that_differ_in_the_balancing_alone_are_comparable(tmp_path):
    runs = pair(tmp_path)
    runs[1].config["balance.method"] = "none"
    assert not_comparable(runs) == []
    assert settings_that_differ(runs) == {"balance.method": ["sign", "none"], "run.name": ["a", "b"]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data_hash": "d1"}, "the data or their order differ: a data d0"),
        ({"init_hash": "w1"}, "the initial weights differ: a w0; b w1"),
        ({"steps": 6}, "the tokens trained on differ: a 640; b 768"),
        ({"flops_per_token": 2000.0}, "the active FLOPs of a token differ: a 1,000; b 2,000"),
        ({"init_hash": None}, "the initial weights: b does not say"),
    ],
)
def test_what_differs_is_named(tmp_path, changes, says):
    (sentence,) = not_comparable(pair(tmp_path, **changes))
    assert sentence.startswith(f"NOT COMPARABLE: {says}")


@pytest.mark.parametrize("setting", ["run.seed", "data.seq_len", "train.batch_size", "data.mix.wiki"])
def test_another_order_of_the_same_data_is_not_comparable(tmp_path, setting):
    runs = pair(tmp_path)
    runs[1].config[setting] = 99
    (sentence,) = not_comparable(runs)
    assert setting in sentence
