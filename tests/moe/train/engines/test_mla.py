"""Latent attention over two ranks: replicated, sharded and under ZeRO-3 it trains as on one process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from moe.balance import build_balancer
from moe.train import checkpoint
from tests.moe.train.engines.layouts import LR, build
from tests.moe.train.engines.test_conformance import CLIP, MICRO, Pair, state_of, train
from tests.ranks import run_ranks
from tests.tiny import tiny_mla

MLA = tiny_mla(model__q_lora_rank=24, optim__lr=LR, optim__grad_clip=CLIP, train__micro_batch_size=MICRO)
LAYOUTS = [
    (2, "replicate", {}),
    (1, "shard", {}),
    (2, "shard", {}),
]
if find_spec("deepspeed") is not None:
    LAYOUTS.append((2, "replicate", {"train__engine": "deepspeed", "deepspeed__zero_stage": 3}))


def start(rank: int, n: int, ep: int, data: str, settings: dict) -> Pair:
    engine, ranks = build(rank, n, ep, data, **MLA | settings)
    return Pair(engine, build_balancer(engine.config.balance, list(engine.model.routers), 8, 2), ranks)


def every(rank: int, n: int, recorded: list, folder: str) -> list[tuple]:
    """Of each layout: the steps with replayed routing and the state after them, which is saved too."""
    found = []
    for index, (ep, data, settings) in enumerate(LAYOUTS):
        pair = start(rank, n, ep, data, settings)
        steps = [train(pair, step, recorded) for step in range(len(recorded))]
        checkpoint.save(Path(folder) / str(index), 1, {"engine": pair.engine.state_dict()}, {}, pair.ranks, 1)
        found.append((steps, state_of(pair.engine)))
    return found


def test_latent_attention_trains_alike_in_every_layout_and_its_checkpoints_load_anywhere(tmp_path):
    alone = start(0, 1, 1, "replicate", {})
    reference = [train(alone, step) for step in range(4)]
    expected = state_of(alone.engine)
    for ranks in run_ranks(every, 2, reference, str(tmp_path)):
        for layout, (steps, state) in zip(LAYOUTS, ranks, strict=True):
            for step, first in zip(steps, reference, strict=True):
                assert step.loss == pytest.approx(first.loss, rel=1e-5), layout
                assert step.norm == pytest.approx(first.norm, rel=1e-5), layout
                assert step.counts == first.counts and step.bias == first.bias, layout
            assert state.keys() == expected.keys()
            for name in (name for name in state if name.startswith("model/")):
                off = np.linalg.norm(state[name] - expected[name])
                assert off <= 1e-4 * np.linalg.norm(expected[name]), (layout, name)
    for index, (_, state) in enumerate(ranks):  # every layout's file, on one process
        taken = {"engine": alone.engine.state_dict()}
        (saved,) = checkpoint.whole(tmp_path / str(index), alone.ranks, print)
        checkpoint.load(saved, taken, alone.ranks)
        alone.engine.load_state_dict(taken["engine"])
        loaded = state_of(alone.engine)
        assert all(np.array_equal(loaded[name], state[name]) for name in state), LAYOUTS[index]
