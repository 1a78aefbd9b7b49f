"""scripts/torture.py, short; and that it would see what it looks for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moe.train import checkpoint
from scripts import torture
from tests.tiny import ALONE


@pytest.mark.slow
def test_three_kills_lose_nothing(capsys):
    assert torture.main(["--kills", "3", "--seed", "3"]) == 0
    assert "mismatches                        0" in capsys.readouterr().out


def test_a_difference_in_one_bit_or_in_the_position_is_a_mismatch(tmp_path):
    state = {"engine": {"model": {"w": torch.tensor([0.0, 1.0])}}}
    trainer = {"progress": {"step": 3}, "next_samples": "a", "init_hash": "b"}
    for name, change, more in (("calm", 0.0, {}), ("bit", -0.0, {}), ("order", 0.0, {"next_samples": "c"})):
        state["engine"]["model"]["w"][0] = change
        checkpoint.save(tmp_path / name, 3, state, trainer | more, ALONE, 1)
    shutil.copytree(tmp_path / "calm", tmp_path / "same")
    found = {name: torture.compare(tmp_path / "calm", tmp_path / name) for name in ("same", "bit", "order")}
    assert found == {"same": [], "bit": ["engine.model.w"], "order": ["next_samples"]}
    (tmp_path / "same" / "step-00000003" / "trainer.json").write_text("{}")
    assert "trainer.json has 2 bytes" in torture.compare(tmp_path / "calm", tmp_path / "same")[0]


def test_a_resume_from_an_older_checkpoint_is_seen(tmp_path):
    run, found = tmp_path / "torture", torture.Found()
    run.mkdir()
    kill = {"time": 1.0, "published": 10, "step": 13, "events": 1, "lines": 13}
    (tmp_path / "kills.jsonl").write_text(json.dumps(kill) + "\n")
    lines = [("start", 0, 0.5), ("resume", 10, 2.0), ("resume", 5, 3.0)]
    text = "".join(json.dumps({"event": e, "step": s, "time": t}) + "\n" for e, s, t in lines)
    (run / "events.jsonl").write_text(text)
    assert torture.check_resumes(run, found, 0) == 3
    assert (found.resumes, found.lost, found.went_back) == (2, [3, 8], 1)
