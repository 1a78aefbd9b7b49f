"""What tests of several commands share."""

from __future__ import annotations

import pytest

from launch import prepare
from moe.train.loop import train
from tests.launch.test_prepare import documents, write_jsonl
from tests.moe.train.test_run import config
from tests.tiny import ALONE, tiny_mla

SIZES = {"model__vocab_size": 320, "data__seq_len": 32, "train__steps": 4, "checkpoint__every": 2}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of 4 steps with latent attention, checkpoints at 2 and 4, on text with a tokenizer of its own."""
    base = tmp_path_factory.mktemp("trained")
    write_jsonl(base / "notes.jsonl", documents(400))
    assert prepare.prepare("text", str(base / "data"), 300, [str(base / "notes.jsonl")]) == 0
    c = config(base / "data", run__name="tiny", **SIZES, **tiny_mla(model__q_lora_rank=24))
    assert train(c, ALONE, base / "tiny", False).code == 0
    return base / "tiny"
