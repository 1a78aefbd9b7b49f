"""Reading a run while it is written: only what is new, and never a half line."""

import json
import os

import pytest

from moe.config import ConfigError
from moe.observe.live import Tail, open_live
from tests.run_folder import make_run


def append(path, *objects, end="\n"):
    with path.open("a") as file:
        file.write("\n".join(json.dumps(o) if isinstance(o, dict) else o for o in objects) + end)


def test_a_tail_gives_every_line_once_and_a_half_one_when_it_is_whole(tmp_path):
    path = tmp_path / "m.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False)  # not there yet
    append(path, {"a": 1}, '{"a": ', end="")
    assert tail.read() == ([{"a": 1}], False)
    append(path, "2}", "broken", "[3]", {"a": 4})
    assert tail.read() == ([{"a": 2}, {"a": 4}], False)
    assert tail.read() == ([], False)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_run_that_starts_again_is_read_anew(tmp_path, replaced):
    path = tmp_path / "m.jsonl"
    append(path, {"a": 1}, {"a": 2})
    tail = Tail(path)
    tail.read()
    if replaced:
        append(tmp_path / "new", {"a": 3}, {"a": 4}, {"a": 5})
        os.replace(tmp_path / "new", path)
    else:
        path.write_text("")
        append(path, {"a": 3})
    rows, anew = tail.read()
    assert anew
    assert rows[0] == {"a": 3}


def test_live_follows_a_resume_and_keeps_the_newest_of_each_kind(tmp_path):
    folder = make_run(tmp_path / "r", steps=3)
    (folder / "exit.json").unlink()
    live = open_live(folder)
    assert [row["train/step"] for row in live.rows] == [1, 2, 3]
    assert live.val["val/ce"] == 2.5
    append(folder / "metrics.jsonl", {"train/step": 2, "loss/ce": 9.0}, {"train/step": None}, {"x": 1})
    live.update()
    assert [row["train/step"] for row in live.rows] == [1, 2]
    assert live.number("loss/ce") == 9.0
    assert live.state() == "running"
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert "stopped, or hanging" in live.state()


def test_live_reads_the_latest_loads_and_falls_back(tmp_path):
    folder = make_run(tmp_path / "r", steps=3)
    assert open_live(folder).loads.steps.tolist() == [1, 2, 3]
    (folder / "loads-latest.npz").write_bytes(b"being written")
    assert open_live(folder).loads.steps.tolist() == [1, 2, 3]


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name, says in (("file", "is a file"), ("absent", "does not exist")):
        with pytest.raises(ConfigError, match=says):
            open_live(tmp_path / name)
