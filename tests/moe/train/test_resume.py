"""A restored run is the uninterrupted one, bit for bit, whatever balances it. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from moe.balance import BALANCERS
from moe.config import ASSIGNMENTS
from moe.train.device import StopSignal
from moe.train.loop import Run, run_steps, train
from tests.corpus import make_token_folder
from tests.moe.train.test_run import config, tensors
from tests.tiny import ALONE

CASES = {method: {"balance__rate": None} for method in BALANCERS}
CASES |= {method: {"balance__rate": None, "train__micro_batch_size": 8} for method in ASSIGNMENTS if method != "hash"}
CASES["base"] |= {"model__top_k": 1}
CASES |= {
    "proportional, auto": {"balance__rate": "auto"},
    "quantile, auto": {"balance__rate": "auto"},
    "sign, schedule": {
        "balance__schedule": "inverse_sqrt",
        "balance__schedule_offset": 1.0,
        "balance__warmup_steps": 5,
    },
    "smebu, phi": {"balance__phi_loss": 0.1, "balance__rate": None, "balance__clip": 0.5},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_token_folder(tmp_path_factory.mktemp("data") / "folder")


def settings(data, case):
    return config(
        data, balance__method=case.split(",")[0], observe__regret_every=0, evaluate__max_tokens=32, **CASES[case]
    )


@pytest.mark.parametrize("case", CASES)
def test_p07_p36_every_method_goes_on_as_if_nothing_had_been(tmp_path, data, case):
    c = settings(data, case)
    assert train(c, ALONE, tmp_path / "run", False).code == 0
    whole = Run(c, ALONE, tmp_path / "run", True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    again = Run(c, ALONE, tmp_path / "run", True)
    assert again.progress.step == 3 and len(again.micro_batches()) == 8 // c.train.micro_batch_size
    assert run_steps(again, StopSignal()).code == 0
    a, b = tensors(whole.state()), tensors(again.state())
    assert [key for key in a if not np.array_equal(a[key], b[key])] == [] and a.keys() == b.keys()
    assert whole.progress == again.progress and whole.balancer.step_count == 6
    assert set(whole.balancer.state) == {key.removeprefix("/balancer/") for key in a if "/balancer/" in key} - {
        "step_count"
    }
