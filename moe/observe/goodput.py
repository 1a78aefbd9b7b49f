"""Where the wall-clock time of a run went since its first start, over all its restarts. Rank 0's clock counts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTS = ("productive", "init", "data_wait", "evaluation", "checkpoint", "restarts", "imbalance")


class Goodput:
    """Seconds by part; what is in none is `other` (logging, the end of the run).

    began: time.time() of the start of this process. Until the first step its time is `init`, or `restarts` when the run had
    begun before: then with everything since the checkpoint that it goes on from, whose steps are done again.
    """

    def __init__(self, began: float, events: Path):
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        earlier = _first_event(events)
        self.first = began if earlier is None else min(began, earlier)
        self._unaccounted_since: float | None = self.first
        self._until_first_step = "init" if earlier is None else "restarts"
        self._open: list[str] = []
        self._mark = 0.0

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on with `state()` of the checkpoint."""
        self.first, self._unaccounted_since = saved["first"], saved["at"]
        self.seconds = {name: saved["seconds"].get(name, 0.0) for name in PARTS}
        self._until_first_step = "restarts"

    def state(self) -> dict[str, Any]:
        """In the checkpoint (JSON)."""
        return {"first": self.first, "at": time.time(), "seconds": dict(self.seconds)}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time in here counts as `name`; what is opened inside counts as itself alone."""
        now = self._close_interval()
        if name == "productive" and self._unaccounted_since is not None:
            self.seconds[self._until_first_step] += now - self._unaccounted_since
            self._unaccounted_since = None
        self._open.append(name)
        try:
            yield
        finally:
            self._close_interval()
            self._open.pop()

    def imbalanced(self, seconds: float) -> None:
        """So much of the productive time went into waiting for the busiest rank."""
        self.seconds["productive"] -= seconds
        self.seconds["imbalance"] += seconds

    def metrics(self) -> dict[str, float]:
        """Shares of the time since the first start; their sum is 1."""
        wall = max(time.time() - self.first, 1e-9)
        shares = {f"goodput/{name}": seconds / wall for name, seconds in self.seconds.items()}
        return shares | {"goodput/other": 1 - sum(shares.values())}

    def _close_interval(self) -> float:
        now = time.time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._mark
        self._mark = now
        return now


def _first_event(events: Path) -> float | None:
    """When an earlier start of this run began to log; None: this is the first."""
    if not events.exists():
        return None
    with events.open() as file:
        try:
            return float(json.loads(file.readline())["time"])
        except (ValueError, KeyError, TypeError):  # cut by a kill
            return None
