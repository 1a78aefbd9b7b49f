"""Who is missing when nothing moves. The real ranks are in test_faults.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moe.train.watchdog import hang_report


def rank(place, waits):
    return {"place": place, "waits": waits, "line": "loop.py:7 in f", "stack": ""}


def first_line(found, world_size):
    return hang_report(found, world_size, 8.0, Path("logs/hang")).splitlines()[0].partition(": ")[2]


def test_who_is_missing():
    waiting, busy = rank("step 8", True), rank("step 8, data", False)
    assert first_line({0: waiting, 2: waiting}, 3) == "rank 1 does not answer"
    assert first_line({0: waiting, 1: busy}, 2) == "rank 1 did not come to where the others wait"
    assert first_line({0: waiting, 1: waiting}, 2) == "every rank waits for the others"
    text = hang_report({0: waiting, 1: busy}, 2, 8.0, Path("logs/hang"))
    assert text.splitlines()[1:] == [
        "  rank 0      step 8: loop.py:7 in f",
        "  rank 1      step 8, data: loop.py:7 in f",
        "  stacks      logs/hang",
    ]


CODE = """
import sys, time
from pathlib import Path
from moe.train.watchdog import Watchdog
from tests.tiny import ALONE
with Watchdog(ALONE, Path(sys.argv[1]), 0.4) as watchdog:
    for step in range(10):
        watchdog.at(f"step {step}")
        time.sleep(0.1)
time.sleep(0.8)  # over: nobody watches
print("alive", flush=True)
with Watchdog(ALONE, Path(sys.argv[1]), 0.4) as watchdog:
    time.sleep(30)
"""


def test_progress_is_no_hang_and_silence_is(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "alive\n" and done.returncode == 1
    report = (tmp_path / "logs" / "hang" / "report.txt").read_text()
    assert report in done.stderr and "rank 0 did not come" in report and "start: <string>:13 in <module>" in report
