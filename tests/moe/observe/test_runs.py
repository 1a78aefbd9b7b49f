"""Run folders that are whole, cut off, damaged or none at all."""

import json
import os

import numpy as np
import pytest

from moe.config import ConfigError
from moe.observe.runs import check_folder, read_run, unique_names
from tests.run_folder import make_run


def test_a_whole_run_has_no_problem(tmp_path):
    run = read_run(make_run(tmp_path / "r"))
    assert run.problems == []
    assert run.config["balance.method"] == "sign"
    assert (len(run.rows), len(run.events), run.loads.counts.shape) == (41, 2, (40, 2, 8))
    assert run.series("val/ce") == ([40], [2.5])
    assert run.last("train/tokens") == 128 * 40


def test_every_missing_file_is_named_once(tmp_path):
    folder = make_run(tmp_path / "r")
    for name in ("config.toml", "run.json", "events.jsonl", "loads.npz"):
        (folder / name).unlink()
    problems = read_run(folder).problems
    assert len(problems) == 4
    for name in ("config.toml", "run.json", "events.jsonl", "loads.npz"):
        assert sum(problem.startswith(f"{name} is missing") for problem in problems) == 1


def test_half_written_and_foreign_lines_are_counted_and_left_out(tmp_path):
    folder = make_run(tmp_path / "r", steps=5)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n{"loss/ce": 1.0}\n\xff\xfe\n{"train/step": 6, "loss/c')
    (folder / "events.jsonl").write_text('{"event": "start"}\n{"ev')
    run = read_run(folder)
    assert len(run.rows) == 6
    assert run.problems == [
        "4 lines of metrics.jsonl cannot be read and are left out",
        "1 line of events.jsonl cannot be read and is left out",
    ]


def test_values_that_are_no_number_leave_the_curve_alone(tmp_path):
    folder = make_run(tmp_path / "r", steps=2)
    lines = [{"train/step": s, "loss/ce": v} for s, v in ((7, None), (8, "x"), (9, True), (10, 3))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(folder).series("loss/ce") == ([10], [3])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("loads.npz", b"PK\x03\x04 cut off", "loads.npz cannot be read"),
        ("loads.npz", b"", "loads.npz cannot be read"),
        ("config.toml", b"[model\n", "config.toml cannot be read"),
        ("run.json", b'{"floor": ', "run.json cannot be read"),
        ("run.json", b"[]", "run.json cannot be read (it is no JSON object)"),
        ("exit.json", b"", "exit.json cannot be read"),
    ],
)
def test_a_damaged_file_is_a_problem_and_no_crash(tmp_path, name, content, says):
    folder = make_run(tmp_path / "r")
    (folder / name).write_bytes(content)
    (problem,) = read_run(folder).problems
    assert problem.startswith(says)


@pytest.mark.parametrize("wrong", ["counts", "bias"])
def test_arrays_that_do_not_fit_each_other_are_a_problem(tmp_path, wrong):
    folder = make_run(tmp_path / "r")
    arrays = dict(np.load(folder / "loads.npz"))
    np.savez(folder / "loads.npz", **{**arrays, wrong: arrays[wrong][:, :1]})
    run = read_run(folder)
    assert run.loads is None
    assert len(run.problems) == 1 and "shape" in run.problems[0]


def test_a_run_that_has_not_logged_says_so(tmp_path):
    folder = make_run(tmp_path / "r")
    (folder / "metrics.jsonl").write_text("")
    assert "no step is logged yet: there are no curves" in read_run(folder).problems


def test_folders_that_are_no_run_are_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    make_run(tmp_path / "runs" / "mine", steps=1)
    (tmp_path / "file").write_text("")
    for path, says in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "runs", f"did you mean {tmp_path / 'runs' / 'mine'}?"),
    ):
        with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
            check_folder(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path):
    folder = make_run(tmp_path / "r", steps=1)
    folder.chmod(0)
    with pytest.raises(ConfigError, match="may not be read"):
        check_folder(folder)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [read_run(make_run(tmp_path / part / "tiny", steps=1)) for part in ("a", "b")]
    runs.append(read_run(make_run(tmp_path / "other", steps=1)))
    unique_names(runs)
    assert [run.name for run in runs] == ["a/tiny", "b/tiny", "other"]
