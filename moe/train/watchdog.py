"""Says which rank is missing when nothing moves: a thread that watches its own rank and, in time, ends it.

Every rank that gets nowhere for `train.timeout_s` leaves its stack in <run>/logs/hang/; the lowest of them reads the others'
and writes report.txt, which the launcher shows. Files and no store: the process that hosts the store may be the one that hangs.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from moe.parallel import Ranks

ANSWER_S = 3.0  # for all ranks to leave their stack: they began to wait at about the same time
# Where a rank that waits for others stands, seen from Python: a collective, or the autograd engine that runs one.
WAITING = (f"torch{os.sep}distributed{os.sep}", f"autograd{os.sep}graph.py", f"moe{os.sep}parallel.py")


class Watchdog:
    """While open: `at(place)` whenever the rank gets somewhere; silence for `timeout_s` is a hang."""

    def __init__(self, ranks: Ranks, run_dir: Path, timeout_s: float):
        self.ranks, self.folder, self.timeout_s = ranks, run_dir / "logs" / "hang", timeout_s
        self._main = threading.get_ident()
        self._over = threading.Event()
        self.at("start")

    def __enter__(self) -> Watchdog:
        self.at("start")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def at(self, place: str) -> None:
        """The rank begins something new."""
        self._place, self._since = place, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() - self._since > self.timeout_s:
                self._report()
                os._exit(1)  # the main thread cannot be woken

    def _report(self) -> None:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        inner = frames[-1]
        mine = {
            "place": self._place,
            "waits": any(part in inner.filename for part in WAITING),
            "line": f"{inner.filename}:{inner.lineno} in {inner.name}",
            "stack": "".join(traceback.format_list(frames)),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".rank{self.ranks.rank}"
        temporary.write_text(json.dumps(mine))
        temporary.replace(self.folder / f"rank{self.ranks.rank}.json")
        time.sleep(ANSWER_S)
        found = {
            rank: json.loads(file.read_text())
            for rank in range(self.ranks.world_size)
            if (file := self.folder / f"rank{rank}.json").exists()
        }
        if self.ranks.rank == min(found):
            text = hang_report(found, self.ranks.world_size, self.timeout_s, self.folder)
            (self.folder / "report.txt").write_text(text)
            print(text, file=sys.stderr, flush=True)


def hang_report(found: dict[int, dict[str, Any]], world_size: int, timeout_s: float, folder: Path) -> str:
    """One block: the missing rank, where every rank stands, where the stacks are."""
    silent = [rank for rank in range(world_size) if rank not in found]
    busy = [rank for rank, report in found.items() if not report["waits"]]
    missing, why = (silent, "does not answer") if silent else (busy, "did not come to where the others wait")
    who = f"rank {', '.join(map(str, missing))} {why}" if missing else "every rank waits for the others"
    lines = [f"no progress for {timeout_s:g} s (train.timeout_s): {who}"]
    lines += [f"  rank {rank:<6} {report['place']}: {report['line']}" for rank, report in sorted(found.items())]
    return "\n".join([*lines, f"  stacks      {folder}"])
