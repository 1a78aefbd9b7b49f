"""Checkpoints as files: the order of writing, what is kept, what is refused. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor, Shard

from moe.config import CheckpointSection
from moe.parallel import build_ranks
from moe.train import checkpoint, manifest
from moe.train.census import expert_census
from moe.train.checkpoint import CheckpointError
from moe.train.saver import Saver
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


def _exchanged(rank, n, folder):
    ranks, folder = build_ranks(rank, n, CPU, n), Path(folder)

    def state(value):
        local = {"w13": torch.full((2, 4, 3), value), "w2": torch.full((2, 3, 2), value)}
        for weight in local.values():
            weight += torch.arange(2)[:, None, None]  # all experts differ
        shards = {k: DTensor.from_local(v, ranks.ep_mesh, [Shard(0)], run_check=False) for k, v in local.items()}
        return {"engine": {"model": {f"blocks.11.moe.experts.{k}": v for k, v in shards.items()}}}

    for step in (1, 2):
        checkpoint.save(folder, step, state(10.0 * step + 2 * rank), {}, ranks, 2)
    if rank == 0:
        place = folder / "step-00000002"
        census = manifest.read_census(place)
        first, second = place / "state" / "__0_0.distcp", place / "state" / "__1_0.distcp"
        first.rename(place / "x")
        second.rename(first)
        (place / "x").rename(second)
        files = (p for p in place.rglob("*") if p.is_file() and p.name != manifest.NAME)
        manifest.write(place, manifest.describe(place, files), census)
    ranks.barrier()
    said, loaded = [], []
    for found in checkpoint.whole(folder, ranks, said.append):
        into = state(0.0)
        try:
            checkpoint.load(found, into, ranks)
        except CheckpointError as error:
            said.append(str(error))
        loaded.append(into["engine"]["model"]["blocks.11.moe.experts.w2"].full_tensor()[:, 0, 0].tolist())
    return said, loaded


def test_p26_exchanged_expert_shards_are_found_though_the_manifest_agrees(tmp_path):
    for said, loaded in run_ranks(_exchanged, 2, str(tmp_path)):
        assert loaded == [[22.0, 23.0, 20.0, 21.0], [10.0, 11.0, 12.0, 13.0]]  # the files are readable, and wrong
        assert said == [
            "checkpoint step-00000002 does not hold the experts that were saved: "
            "4 differ from the census in its manifest, the first is layer_11, expert 0"
        ]


def test_the_census_sees_values_places_and_names():
    w = {"blocks.1.moe.experts.w13": torch.randn(2, 4, 3), "blocks.1.moe.experts.w2": torch.randn(2, 3, 2)}
    other = dict(w, **{"blocks.1.moe.shared_experts.w2.weight": torch.ones(3, 2)})
    census = expert_census(w, ALONE)
    assert expert_census(other, ALONE) == census and list(census) == ["layer_01"] and len(set(census["layer_01"])) == 2
    for change in (
        lambda t: t.flip(1),
        lambda t: t.flip(2),
        lambda t: t.flip(0),
        lambda t: -t,
        lambda t: torch.where(torch.arange(t.numel()).view_as(t) == 5, t.nextafter(torch.tensor(9.0)), t),
    ):
        for name in w:
            changed = expert_census(w | {name: change(w[name])}, ALONE)["layer_01"]
            assert changed[0] != census["layer_01"][0], (name, change)
    same = torch.randn(2, 3, 3)
    one = expert_census({"1.experts.w13": same, "1.experts.w2": same + 1}, ALONE)
    assert one != expert_census({"1.experts.w13": same + 1, "1.experts.w2": same}, ALONE)


def test_the_last_ones_and_every_nth_are_kept(tmp_path):
    for step in (10, 20, 30, 40, 50):
        checkpoint.save(tmp_path, step, {"a": torch.zeros(1)}, {}, ALONE, keep=1, keep_every=20)
    assert manifest.steps(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]


def test_the_disk_is_looked_at_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=11))
    with pytest.raises(CheckpointError, match="takes 12 bytes and 11 are free"):
        save(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12))
    save(tmp_path, 2)
    assert manifest.steps(tmp_path) == ["step-00000001", "step-00000002"]


def slow_write(monkeypatch, seconds):
    write = FileSystemWriter.write_data

    def slowly(self, *args, **kwargs):
        time.sleep(seconds)
        return write(self, *args, **kwargs)

    monkeypatch.setattr(FileSystemWriter, "write_data", slowly)


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    slow_write(monkeypatch, 0.5)
    published, state = [], {"a": torch.full((3,), 1.0)}
    saver = Saver(tmp_path, CheckpointSection(), ALONE, published.append)
    began = time.perf_counter()
    saver.save(1, state, {})
    assert time.perf_counter() - began < 0.4 and published == [] and not manifest.steps(tmp_path)
    state["a"] += 1  # the next step
    saver.wait()
    assert [path.name for path in published] == ["step-00000001"]
    assert read(newest_whole(tmp_path)) == [1.0] * 3
    saver = Saver(tmp_path, CheckpointSection(background=False), ALONE, published.append)
    saver.save(2, state, {})
    assert len(published) == 2


def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    saver = Saver(tmp_path, CheckpointSection(), ALONE, print)
    save(tmp_path, 1, 1.0)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    assert not saver.failed
    saver.save(2, {"a": torch.zeros(3)}, {})
    until = time.monotonic() + 10
    while not saver.failed and time.monotonic() < until:
        time.sleep(0.01)
    assert saver.failed
    for again in (saver.wait, lambda: saver.save(3, {"a": torch.zeros(3)}, {})):
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left on device"):
            again()
    assert read(newest_whole(tmp_path)) == [1.0] * 3
