"""Runs whose ranks share sequences (parallel.cp), through the loop, against one process of the native engine. The attention is a
stand-in: `shared_attention.py`. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from moe.config import Config
from moe.observe.console import layout
from moe.observe.sinks import read_metrics
from moe.parallel import Ranks, build_ranks
from moe.train import loop
from tests.corpus import make_token_folder
from tests.moe.train.engines.shared_attention import build_shared
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, tiny_config

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None, reason="needs megatron-core: pip install 'alf-moe[megatron]'"
)


def config(folder: Path, n: int, steps: int, **settings: Any) -> Config:
    """With everything that looks at tokens: evaluation with padded windows, the regret, recorded scores."""
    base = {
        "data__path": str(folder / "data"), "observe__wandb": "off", "observe__log_every": 1, "observe__peak_tflops": 1.0,
        "observe__regret_every": 2, "observe__regret_tokens": 64, "observe__record_scores": 2, "optim__schedule": "wsd",
        "optim__decay_share": 0.0, "optim__lr": 1e-3, "evaluate__batch_size": 3, "train__micro_batch_size": 2,
    }  # fmt: skip
    return tiny_config(n, train__steps=steps, **base | settings)


def go_on(rank: int, n: int, folder: str, cp: int, runs: list[tuple[str, int, bool]]) -> None:
    """Runs of (name, steps, resume) under Megatron, n ranks of which cp share sequences."""
    warnings.simplefilter("ignore")
    from tests.moe.interop.megatron_model import patch as patch_megatron

    patch_megatron()
    ranks = build_ranks(rank, n, CPU, n, cp=cp)
    for name, steps, resume in runs:
        c = config(Path(folder), n, steps, train__engine="megatron", parallel__ep=n, parallel__cp=cp)
        with patch.object(loop, "build_engine", build_shared):
            assert loop.train(c, ranks, Path(folder) / name, resume).code == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    make_token_folder(folder / "data")
    assert loop.train(config(folder, 1, 6), ALONE, folder / "native", False).code == 0
    shared = [("whole", 6, False), ("parts", 3, False), ("parts", 6, True), ("changed", 3, False)]
    run_ranks(go_on, 2, str(folder), 2, shared, timeout_s=280)
    run_ranks(go_on, 2, str(folder), 1, [("changed", 6, True)], timeout_s=280)
    return folder


def column(folder: Path, run: str, name: str) -> dict[int, float]:
    rows = read_metrics(folder / run / "metrics.jsonl")
    return {int(row["train/step"]): row[name] for row in rows if name in row}


def test_p22_a_run_is_that_of_one_process(folder):
    for name in ("loss/total", "val/ce", "regret/dynamic/mean", "regret/static/mean"):
        theirs, ours = column(folder, "whole", name), column(folder, "native", name)
        assert ours and theirs == pytest.approx(ours, rel=1e-5 if "regret" not in name else 1e-3), name
    for name in ("train/tokens", "val/tokens", "moe/maxvio_batch/max", "moe/maxvio_val/max", "moe/bias_range/max"):
        theirs, ours = column(folder, "whole", name), column(folder, "native", name)
        assert ours and theirs == ours, name


def test_p22_a_token_counts_once_in_the_speed(folder):
    rate, seconds = column(folder, "whole", "speed/tokens_per_s"), column(folder, "whole", "speed/step_s")
    per_step = config(folder, 1, 6).tokens_per_step
    assert {step: rate[step] * seconds[step] for step in rate} == pytest.approx(dict.fromkeys(rate, per_step))


def test_p24_recorded_scores_are_of_every_token_once(folder):
    for file in (folder / "native" / "scores").glob("*.npz"):
        ours, theirs = np.load(file)["scores"], np.load(folder / "whole" / "scores" / file.name)["scores"]
        assert ours.shape == theirs.shape
        for one, other in zip(ours, theirs, strict=True):  # in another order
            np.testing.assert_allclose(*(np.sort(scores, axis=0) for scores in (one, other)), rtol=1e-4)


def test_p07_it_resumes_to_the_bit(folder):
    for name in ("loss/total", "optim/grad_norm", "val/ce", "moe/bias_range/max", "regret/static/mean"):
        whole, parts = column(folder, "whole", name), column(folder, "parts", name)
        assert whole and {step: parts[step] for step in whole} == whole, name


def test_p26_a_run_may_change_how_many_ranks_share_a_sequence(folder):
    whole, changed = (column(folder, run, "loss/total") for run in ("whole", "changed"))
    assert [changed[step] for step in (1, 2, 3)] == [whole[step] for step in (1, 2, 3)]
    assert changed == pytest.approx(whole, rel=1e-5)


def test_p22_ranks_are_those_of_megatron():
    """Two of each kind: who sees the same share of a batch, and that one of them counts it."""
    from megatron.core.parallel_state import RankGenerator

    theirs = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    ranks = [Ranks(rank, 16, CPU, tp=2, pp=2, cp=2) for rank in range(16)]
    for group in theirs.get_ranks("dp"):
        assert [ranks[rank].data_rank for rank in group] == [0, 1]
    for group in theirs.get_ranks("tp-cp-pp"):
        assert len({ranks[rank].data_rank for rank in group}) == 1
        assert sum(ranks[rank].first_to_see for rank in group) == 1


def test_the_start_names_the_ranks_that_share_sequences():
    c = tiny_config(8, train__engine="megatron", parallel__cp=2, parallel__tp=2, parallel__ep=4)
    assert layout(c, 8) == "dp = 2, ep = 4, tp = 2, cp = 2; megatron engine"
