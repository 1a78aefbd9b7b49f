"""`alf-moe ckpt`: what it lists, what it refuses, what it finds different."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from launch import ckpt, cli
from moe.train import checkpoint, manifest
from moe.train.contents import same_bits
from tests.tiny import ALONE


@pytest.fixture
def run(tmp_path):
    """Two checkpoints that differ in one expert, one setting and the position."""
    for step in (4, 10):
        experts = torch.arange(2 * 8 * 3.0).view(2, 8, 3)
        experts[1, 2, 1] += step
        state = {
            "engine": {"model": {"blocks.1.moe.experts.w13": experts, "norm": torch.ones(4)}},
            "n": torch.tensor(7),
        }
        trainer = {
            "progress": {"step": step, "tokens": 1000 * step},
            "config": {"optim": {"lr": step * 1e-3, "eps": 1e-8}},
        }
        checkpoint.save(tmp_path / "checkpoints", step, state, trainer, ALONE, 2)
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 10, "val/ce": 3.25}\n')
    return tmp_path


def place(run, step) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def alf_moe(capsys, *words):
    code = cli.main(["ckpt", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def test_ls_shows_step_size_tokens_loss_and_state(run, capsys):
    code, lines, _ = alf_moe(capsys, "ls", run)
    assert code == 0 and len(lines) == 3
    assert lines[0].split() == ["step", "date", "size", "tokens", "val/ce"]
    assert lines[1].split()[0] == "4" and lines[1].split()[-3:] == ["4.0k", "–", "whole"]
    assert lines[2].split()[0] == "10" and lines[2].split()[-3:] == ["10.0k", "3.2500", "whole"]
    (place(run, 4) / "trainer.json").write_text("[]")
    code, lines, _ = alf_moe(capsys, "ls", run)
    assert code == 5 and "damaged: trainer.json has 2 bytes" in lines[1] and lines[2].endswith("whole")


def test_verify_finds_damage_and_exchanged_experts_and_unpickles_nothing_of_a_damaged_one(run, capsys):
    assert alf_moe(capsys, "verify", run)[:2] == (0, ["step-00000004  whole", "step-00000010  whole"])
    census = manifest.read_census(place(run, 10))
    census["layer_01"].reverse()
    files = json.loads((place(run, 10) / manifest.NAME).read_text())["files"]
    manifest.write(place(run, 10), files, census)
    code, lines, _ = alf_moe(capsys, "verify", place(run, 10))
    assert code == 5 and lines == [
        "step-00000010  damaged: 2 differ from the census in its manifest, the first is layer_01, expert 0"
    ]
    marker = run / "ran"
    (place(run, 4) / "state" / ".metadata").write_bytes(pickle.dumps(Touch(marker)))
    code, lines, _ = alf_moe(capsys, "verify", run)
    assert code == 5 and "damaged: state/.metadata has" in lines[0]
    code, _, err = alf_moe(capsys, "diff", place(run, 4), place(run, 10))
    assert code == 5 and err.startswith("error: ") and "compare whole checkpoints" in err and not marker.exists()


class Touch:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_diff_names_what_differs_and_by_how_much(run, capsys):
    assert alf_moe(capsys, "diff", place(run, 4), place(run, 4))[:2] == (0, ["no difference"])
    code, lines, _ = alf_moe(capsys, "diff", place(run, 4), place(run, 10))
    assert code == 1 and lines == [
        "optim.lr: 0.004 | 0.01",
        "progress.step: 4 | 10",
        "progress.tokens: 4000 | 10000",
        "engine.model.blocks.1.moe.experts.w13: 1 of 48 values differ, by at most 6",
    ]
    one, other = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2).bfloat16(), "c": torch.ones(3)}
    assert ckpt.tensor_changes(one, other) == [
        "a: [2] torch.float32 | [2] torch.bfloat16",
        "b: only in A",
        "c: only in B",
    ]


def test_the_same_bits():
    a = torch.tensor([0.0, float("nan")], dtype=torch.bfloat16)
    assert same_bits(a, a.clone()) and not same_bits(a, torch.tensor([-0.0, float("nan")], dtype=torch.bfloat16))
    assert not same_bits(a, a.float()) and not same_bits(a, a[:1]) and same_bits(torch.tensor(3), torch.tensor(3))
