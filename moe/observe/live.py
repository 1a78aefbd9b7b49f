"""What `alf-moe watch` knows of a run: it reads files alone, only what is new, and may start before the run has logged."""

from __future__ import annotations

import json
import time
import zipfile
from collections import deque
from pathlib import Path
from typing import Any

from moe.config import ConfigError
from moe.observe.runs import Loads, RunData, read_loads, read_settings

KEPT = 2000  # logged lines in memory


class Tail:
    """New whole lines of a JSONL file that grows, that is not there yet, or that is replaced by a run that starts again."""

    def __init__(self, path: Path):
        self.path, self._offset, self._inode = path, 0, 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Objects since the last call, and whether the file began anew. A half-written last line waits for its end."""
        try:
            with self.path.open("rb") as file:
                stat = self.path.stat()
                anew = self._inode not in (0, stat.st_ino) or stat.st_size < self._offset
                self._offset, self._inode = 0 if anew else self._offset, stat.st_ino
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], False
        self._offset += len(whole) + len(newline)
        return [found for line in whole.splitlines() if (found := _object(line)) is not None], anew


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class Live:
    """The newest state of a run folder. `update` reads what is new."""

    def __init__(self, path: Path):
        self.run = RunData(path, path.resolve().name)
        self.rows: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.val: dict[str, Any] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=20)
        self.loads: Loads | None = None
        self._metrics, self._events = Tail(path / "metrics.jsonl"), Tail(path / "events.jsonl")
        self._loads_at = 0.0

    def update(self) -> None:
        """Read what is new."""
        read_settings(self.run)
        rows, anew = self._metrics.read()
        if anew:
            self.rows.clear()
            self.val = {}
        for row in rows:
            if not isinstance(row.get("train/step"), int):
                continue
            if "val/ce" in row:
                self.val = row
                continue
            while self.rows and self.rows[-1]["train/step"] >= row["train/step"]:
                self.rows.pop()  # a resumed run writes these steps again
            self.rows.append(row)
        events, anew = self._events.read()
        if anew:
            self.events.clear()
        self.events.extend(events)
        self._read_loads()

    def _read_loads(self) -> None:
        for name in ("loads-latest.npz", "loads.npz"):  # older versions wrote the second alone
            file = self.run.path / name
            try:
                if (written := file.stat().st_mtime) != self._loads_at:
                    self.loads, self._loads_at = read_loads(file), written
                return
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue

    @property
    def row(self) -> dict[str, Any]:
        """The newest training line; empty before there is one."""
        return self.rows[-1] if self.rows else {}

    def number(self, key: str) -> float | None:
        """A finite metric of the newest line."""
        value = self.row.get(key)
        return float(value) if isinstance(value, (int, float)) else None

    def history(self, key: str) -> list[float]:
        """A metric over the kept lines."""
        return [float(row[key]) for row in self.rows if isinstance(row.get(key), (int, float))]

    def maxvio(self) -> dict[int, float]:
        """MaxVio of the last batch by global layer index."""
        prefix = "moe/maxvio_batch/layer_"
        found = {key: value for key, value in self.row.items() if key.startswith(prefix)}
        return {int(key.removeprefix(prefix)): float(value) for key, value in found.items() if value is not None}

    def finished(self) -> bool:
        """Whether the run has left its exit code."""
        return "reason" in self.run.outcome

    def state(self) -> str:
        """Running, silent or how it ended."""
        if self.finished():
            code = self.run.outcome.get("code")
            return f"{self.run.outcome['reason']}" + (f" (exit code {code})" if code else "")
        if not self.rows:
            return "waiting for the first logged step"
        age = time.time() - (self.run.path / "metrics.jsonl").stat().st_mtime
        expected = (self.number("speed/step_s") or 1.0) * self.run.config.get("observe.log_every", 10)
        if age > max(60.0, 10 * expected):
            return f"no line for {age / 60:.0f} min, {expected:.0f} s are usual: stopped, or hanging (see logs/)"
        return "running"


def open_live(path: Path) -> Live:
    """Raises ConfigError when the path is no folder; an empty one may become a run."""
    if not path.is_dir():
        kind = "is a file: name the run folder that holds it" if path.exists() else "does not exist: name a run folder"
        raise ConfigError(f"{path} {kind}, for example runs/tiny")
    live = Live(path)
    live.update()
    return live
