"""The run folder's files, the console line, and a real offline W&B run read back from its file."""

import json
import math
import struct
import sys
import time
import zlib

import numpy as np
import pytest

from moe.observe import sinks
from moe.observe.console import step_line, summary_table
from moe.observe.dashboard import is_shown
from moe.observe.sinks import Sinks, read_metrics
from tests.tiny import tiny_config

ABOUT = {
    "parameters_total": 50_400,
    "parameters_active": 31_968,
    "flops_per_token": 189_312.0,
    "peak_tflops": 0.25,
    "peak_source": "measured",
    "state_gib": 0.001,
    "free_memory_gib": 8.0,
    "floor": 0.167,
    "world_size": 2,
    "device": "cpu",
    "data_hash": "0123456789abcdef",
    "start_step": 0,
    "run_dir": "runs/tiny",
    "deterministic_flags": [],
}


def row(step, **more):
    """What the trainer logs."""
    return {
        "train/step": step,
        "train/tokens": 128 * step,
        "loss/total": 3.25,
        "loss/ce": 3.2145,
        "loss/aux": 0.0,
        "loss/z": 0.0,
        "optim/lr": 3e-4,
        "optim/grad_norm": 0.84,
        "optim/skipped_steps": 0,
        "speed/tokens_per_s": 182_400.0,
        "speed/step_s": 2.0,
        "speed/balance_share": 0.01,
        "speed/mfu": 0.345,
        "speed/tflops": 341.0,
        "memory/peak_gib": 61.2,
        "moe/maxvio_batch/mean": 0.21,
        "moe/maxvio_batch/max": 0.63,
        "moe/maxvio_batch/layer_01": 0.1,
        "moe/maxvio_batch/layer_02": 0.63,
        "moe/idle_batch/max": 0.0,
        "moe/straggler_batch/max": 1.07,
    } | more


def quiet(**settings):
    return tiny_config(**({"observe__wandb": "off"} | settings))


def wandb_history(data):
    """Rows of a .wandb file's bytes: LevelDB log framing (32 KiB blocks, 7-byte headers) around protobuf records.

    A file that is still being written may end anywhere: what is whole is read, and what is not is left for later.
    """
    from wandb.proto import wandb_internal_pb2 as pb

    assert data[:4] == b":W&B"
    offset, whole, rows = 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        check, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        part = data[offset + 7 : offset + 7 + length]
        if len(part) < length:
            break
        assert check == zlib.crc32(bytes([kind]) + part), f"{offset} is not the start of a part"
        whole += part
        offset += 7 + length
        if kind in (1, 4):  # a full record, or its last part
            record = pb.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def wandb_rows(run, enough):
    """History of the offline runs in a run folder. Now and then W&B's own process writes the last rows just after
    finish() has returned: it is waited for until enough(rows), a minute at most."""
    until = time.monotonic() + 60
    while True:
        files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
        rows = [row for path in files for row in wandb_history(path.read_bytes())]
        if enough(rows) or time.monotonic() > until:
            return rows
        time.sleep(0.05)


# -- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_a_row_is_one_json_line_there_at_once_with_null_for_what_is_not_finite(tmp_path):
    out = Sinks(tmp_path, quiet(), ABOUT, None)
    out.write(row(1, **{"loss/ce": math.nan, "optim/grad_norm": math.inf}))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # not closed: flushed
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == row(1, **{"loss/ce": None, "optim/grad_norm": None})


def test_reading_passes_over_a_half_written_last_line_and_lets_later_rows_win(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"train/step": s, "loss/ce": c} for s, c in ((10, 5.0), (20, 4.0), (30, 3.0), (20, 4.5), (30, 3.5))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"train/step": 40, "loss/c')
    assert [(r["train/step"], r["loss/ce"]) for r in read_metrics(path)] == [(10, 5.0), (20, 4.5), (30, 3.5)]


def test_training_and_validation_of_one_step_are_both_kept(tmp_path):
    out = Sinks(tmp_path, quiet(), ABOUT, None)
    out.write(row(10))
    out.write({"train/step": 10, "train/tokens": 1280, "val/ce": 3.0, "val/bits_per_byte": 1.1, "val/tokens": 99})
    merged = {k: v for r in read_metrics(tmp_path / "metrics.jsonl") for k, v in r.items()}
    assert merged["loss/ce"] == 3.2145
    assert merged["val/ce"] == 3.0


def test_a_resumed_run_does_not_glue_its_first_row_to_a_half_written_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"train/step": 1}) + '\n{"train/step": 2, "loss/c')
    Sinks(tmp_path, quiet(), ABOUT, None).write(row(2))
    assert [r["train/step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


# -- console ---------------------------------------------------------------------------------------------------------


def test_the_line_of_a_step():
    line = step_line(quiet(train__steps=20_000), 8, row(1200))
    assert "\n" not in line
    assert "\x1b" not in line
    assert line.startswith("step 1,200/20,000 (6.0%) | ")
    for field in ("gnorm 0.84", "182.4k tok/s (22.8k/", "mfu 34.5%", "mem 61.2GiB", "maxvio 0.21 (L02 0.63)", "skip 0"):
        assert field in line
    assert line.endswith("eta 10h26m")  # 18,800 steps of 2 s


def test_a_model_without_experts_has_a_line_too():
    assert "maxvio" not in step_line(quiet(), 1, {k: v for k, v in row(1).items() if not k.startswith("moe/")})


def test_start_up_block_says_what_runs_and_where_to_look(tmp_path, capsys):
    Sinks(tmp_path, quiet(), ABOUT, None)
    text = capsys.readouterr().out
    for part in ("50.4k", "32.0k", "189.3k", "0.25 TFLOP/s", "0123456789abcdef", "sign", "runs/tiny", "metrics.jsonl"):
        assert part in text


def test_summary_table_shows_every_value():
    text = summary_table({"outcome": "done", "steps": 1500, "val/ce": 2.5, "late_maxvio": {"layer_01": 0.25}})
    for part in ("done", "1,500", "2.5000", "layer_01 0.250"):
        assert part in text


# -- events and warnings ---------------------------------------------------------------------------------------------


def test_a_warning_comes_once_per_cause_and_is_an_event(tmp_path, capsys):
    out = Sinks(tmp_path, quiet(), ABOUT, None)
    for _ in range(3):
        out.warn("disk", "the disk is nearly full: free some space")
    out.warn("clock", "the clock went back: check ntp")
    assert capsys.readouterr().err.count("warning: ") == 2
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["cause"] for e in events] == ["disk", "clock"]


def test_other_ranks_write_nothing(tmp_path, capsys):
    out = Sinks(tmp_path, tiny_config(observe__wandb="offline"), ABOUT, None, enabled=False)
    out.write(row(1))
    out.event("save", step=1)
    out.warn("x", "y")
    out.finish({})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert out.wandb_id is None


# -- W&B -------------------------------------------------------------------------------------------------------------


def test_offline_run_has_every_key_and_a_resumed_one_the_same_id_with_no_row_lost(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = tiny_config(observe__wandb="auto")  # no key in the environment: offline
    first = Sinks(tmp_path, config, ABOUT, None)
    assert first.wandb_id
    for step in (1, 2, 3):
        first.write(row(step))
    first.finish({"val/ce": 2.5})
    second = Sinks(tmp_path, config, ABOUT | {"start_step": 2}, first.wandb_id)  # step 3 was lost and is run again
    assert second.wandb_id == first.wandb_id
    second.write(row(3, **{"loss/ce": 3.0}))
    second.finish({"val/ce": 2.4})

    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.stem for path in files} == {f"run-{first.wandb_id}"}
    rows = wandb_rows(tmp_path, lambda rows: len(rows) >= 4)
    assert [r["train/step"] for r in rows] == [1, 2, 3, 3]
    for logged, sent in zip(rows, (row(1), row(2), row(3), row(3, **{"loss/ce": 3.0})), strict=True):
        assert {k: v for k, v in logged.items() if not k.startswith("_")} == {
            k: v for k, v in sent.items() if is_shown(k)
        }
    whole = files[0].read_bytes()
    for end in range(7, len(whole), 101):  # as found while W&B still writes
        read = wandb_history(whole[:end])
        assert read == rows[: len(read)]


class FakeRun:
    id = "abc"

    def __init__(self):
        self.calls, self.axes, self.summary = [], [], {}

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, *args, **kwargs):
        self.calls.append((args, kwargs))

    def finish(self, *args, **kwargs):
        pass


class FakeWandb:
    """Records the modes it is started in and fails in some."""

    Settings = dict

    def __init__(self, failing=()):
        self.failing, self.modes, self.run = failing, [], FakeRun()

    def init(self, mode, **kwargs):
        self.modes.append(mode)
        self.kwargs = kwargs
        if mode in self.failing:
            raise RuntimeError(f"no {mode} today")
        return self.run


def test_p45_step_is_a_metric_of_its_own_and_never_an_argument(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = Sinks(tmp_path, tiny_config(observe__wandb="offline"), ABOUT, "kept")
    out.write(row(1))
    ((_, kwargs),) = fake.run.calls
    assert "step" not in kwargs
    assert ("*", "train/step") in fake.run.axes
    assert fake.kwargs["id"] == "kept"
    assert (fake.kwargs["group"], fake.kwargs["job_type"]) == (None, "sign")
    assert fake.kwargs["resume"] == "allow"


def test_runs_of_a_comparison_share_a_group_and_have_their_method_as_job_type(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = {"observe__wandb_group": "seeds", "balance__method": "quantile", "balance__rate": 1.0}
    Sinks(tmp_path, tiny_config(observe__wandb="offline", **settings), ABOUT, None)
    assert (fake.kwargs["group"], fake.kwargs["job_type"]) == ("seeds", "quantile")


@pytest.mark.parametrize(
    ("setting", "key", "modes"),
    [
        ("auto", None, ["offline"]),
        ("auto", "k", ["online"]),
        ("online", None, ["online"]),
        ("offline", "k", ["offline"]),
        ("off", "k", []),
    ],
)
def test_modes(tmp_path, monkeypatch, setting, key, modes):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv("WANDB_API_KEY", raising=False)
    Sinks(tmp_path, tiny_config(observe__wandb=setting), ABOUT, None)
    assert fake.modes == modes


@pytest.mark.parametrize(("failing", "warnings"), [(["online"], 1), (["online", "offline"], 2)])
def test_wandb_that_cannot_start_falls_back_with_one_warning_each(tmp_path, monkeypatch, capsys, failing, warnings):
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = Sinks(tmp_path, tiny_config(observe__wandb="online"), ABOUT, None)
    out.write(row(1))
    assert fake.modes == ["online", "offline"]
    assert len(fake.run.calls) == (1 if warnings == 1 else 0)
    assert capsys.readouterr().err.count("warning: ") == warnings
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_wandb_that_fails_in_the_middle_does_not_stop_training(tmp_path, monkeypatch, capsys):
    fake = FakeWandb()
    fake.run.log = lambda *a, **k: (_ for _ in ()).throw(OSError("disk"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = Sinks(tmp_path, tiny_config(observe__wandb="offline"), ABOUT, None)
    out.write(row(1))
    out.write(row(2))
    assert capsys.readouterr().err.count("warning: ") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_wandb_that_cannot_finish_does_not_fail_the_run_and_may_not_wait_for_ever(tmp_path, monkeypatch, capsys):
    fake = FakeWandb()
    fake.run.finish = lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = Sinks(tmp_path, tiny_config(observe__wandb="offline"), ABOUT, None)
    out.finish({"val/ce": 2.5})
    assert capsys.readouterr().err.count("warning: ") == 1
    assert fake.kwargs["settings"]["finish_timeout"] > 0


def test_heat_maps_come_at_log_spaced_steps_and_few(tmp_path, monkeypatch):
    fake = FakeWandb()
    fake.Image = lambda image: image
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = Sinks(tmp_path, tiny_config(observe__wandb="offline", train__steps=20_000), ABOUT, None)
    for step in range(1, 20_001):
        out.image({"train/step": step, "train/tokens": step}, np.ones((1, 2)))
    steps = [args[0]["train/step"] for args, _ in fake.run.calls]
    assert steps[0] == 1
    assert 100 < len(steps) <= 200
    assert steps[-1] - steps[-2] > 20 * (steps[1] - steps[0])


def test_wandb_is_not_imported_with_the_module():
    assert "wandb" not in vars(sinks)
