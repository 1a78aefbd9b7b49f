"""Checkpoints as files: the order of writing, what is kept, what is refused. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from moe.parallel import build_ranks
from moe.train import checkpoint, manifest
from moe.train.checkpoint import CheckpointError
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU


def save(folder, step, value=0.0, keep=2, ranks=ALONE):
    return checkpoint.save(folder, step, {"a": torch.full((3,), value)}, {"note": step}, ranks, keep)


def newest_whole(folder, warn=print, ranks=ALONE):
    return next(checkpoint.whole(folder, ranks, warn))


def read(found, state=None):
    state = state or {"a": torch.zeros(3)}
    checkpoint.load(found, state, ALONE)
    return state["a"].tolist()


def test_newest_ones_are_kept_and_LATEST_names_the_newest(tmp_path):
    for step in (2, 10, 100):
        save(tmp_path, step, float(step))
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000010", "step-00000100", "LATEST"}
    assert (tmp_path / "LATEST").read_text() == "step-00000100"
    found = newest_whole(tmp_path)
    assert (found.path.name, found.trainer["step"], found.trainer["note"]) == ("step-00000100", 100, 100)
    assert read(found) == [100.0] * 3


def test_every_byte_is_on_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    happened, fsync, rename, replace = [], os.fsync, Path.rename, Path.replace

    def noted_fsync(number):
        happened.append(("fsync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        fsync(number)

    def noted_rename(path, target):
        if path.parent == tmp_path:  # not one of DCP's own
            assert checkpoint.verify(path) is None  # whole, its manifest included
            happened.append(("rename", path.name))
        return rename(path, target)

    def noted_replace(path, target):
        happened.append(("replace", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    monkeypatch.setattr(Path, "replace", noted_replace)
    path = save(tmp_path, 1)
    named = happened.index(("rename", ".partial-step-00000001"))
    for file in (p for p in path.rglob("*") if p.is_file()):
        written = "MANIFEST.json.tmp" if file.name == "MANIFEST.json" else file.name
        assert ("fsync", written) in happened[:named], file
    assert happened[named + 1 :] == [("fsync", tmp_path.name), ("fsync", "LATEST.tmp"), ("replace", "LATEST")]


def test_what_an_interrupted_save_left_behind_is_not_in_the_next_one(tmp_path):
    left = tmp_path / ".partial-step-00000003" / "state" / "half.distcp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    assert not checkpoint.has_checkpoint(tmp_path)
    path = save(tmp_path, 3, 1.5)
    assert not (path / "state" / "half.distcp").exists() and read(newest_whole(tmp_path)) == [1.5] * 3
    assert checkpoint.has_checkpoint(tmp_path)


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    for place, name in ((FileSystemWriter, "write_data"), (manifest, "write")):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
            patch.setattr(place, name, full)
            save(tmp_path, 2, 2.0, keep=1)
    found = newest_whole(tmp_path)
    assert found.path.name == "step-00000001" and read(found) == [1.0] * 3
    assert (tmp_path / "LATEST").read_text() == "step-00000001"


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 7)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="step-00000001 has format_version 7 and this version reads 2"):
        newest_whole(tmp_path)


class Explosive:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_p44_a_changed_file_is_refused_before_anything_is_unpickled(tmp_path):
    save(tmp_path, 1, 1.0)
    newest = save(tmp_path, 2)
    marker, metadata = tmp_path / "ran", newest / "state" / ".metadata"
    metadata.write_bytes(pickle.dumps(Explosive(marker)))
    warnings = []
    found = newest_whole(tmp_path, warnings.append)
    assert found.path.name == "step-00000001" and read(found) == [1.0] * 3
    assert len(warnings) == 1 and "step-00000002 is refused" in warnings[0] and not marker.exists()
    pickle.loads(metadata.read_bytes())
    assert marker.exists()  # it would have run


def test_p44_files_that_are_cut_or_that_the_manifest_does_not_name_are_refused(tmp_path):
    path = save(tmp_path, 1)
    whole = (path / "trainer.json").read_bytes()
    (path / "trainer.json").write_bytes(whole[:-1])
    assert checkpoint.verify(path) == f"trainer.json has {len(whole) - 1} bytes, the manifest says {len(whole)}"
    (path / "trainer.json").write_bytes(whole)
    (path / "state" / "extra.distcp").write_text("")
    assert "extra.distcp" in str(checkpoint.verify(path))
    (path / "state" / "extra.distcp").unlink()
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {
        "MANIFEST.json"
    }
    (path / "MANIFEST.json").unlink()
    assert "MANIFEST.json" in str(checkpoint.verify(path))


def test_p06_a_float32_bias_is_saved_to_the_last_bit(tmp_path):
    bias = torch.tensor([0.3000001, 0.5 + 2.0**-20, -1e-7])
    checkpoint.save(tmp_path, 1, {"balancer": {"bias": bias}}, {}, ALONE, 1)
    state = {"balancer": {"bias": torch.zeros(3)}}
    checkpoint.load(newest_whole(tmp_path), state, ALONE)
    assert state["balancer"]["bias"].dtype == torch.float32 and torch.equal(state["balancer"]["bias"], bias)


def _failures(rank, n, folder):
    ranks, folder = build_ranks(rank, n, CPU, 1), Path(folder)
    with pytest.raises(CheckpointError) as error:
        save(folder / "file", 1, ranks=ranks)  # its folder cannot be made
    path = save(folder / "good", 4, float(rank), ranks=ranks)
    assert newest_whole(folder / "good", ranks=ranks).path == path
    assert list(checkpoint.whole(folder / "none", ranks, print)) == []
    return str(error.value)


def test_a_failure_of_rank_0_is_raised_on_every_rank(tmp_path):
    (tmp_path / "file").touch()
    first, second = run_ranks(_failures, 2, str(tmp_path))
    assert first == second
    assert "check the disk's space and permissions" in first


def test_a_state_that_does_not_fit_is_one_sentence(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="step-00000001 does not fit this configuration"):
        checkpoint.load(newest_whole(tmp_path), {"b": torch.zeros(3)}, ALONE)
    shutil.rmtree(path)
    assert list(checkpoint.whole(tmp_path, ALONE, print)) == []
