"""A run folder as it is found: finished, being written, cut off or damaged. What cannot be read is named and passed over.

Imports no torch: `alf-moe report` and `alf-moe watch` answer at once. Letters: N logged steps, L MoE layers, E experts.
"""

from __future__ import annotations

import json
import os
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.config import ConfigError
from moe.observe.sinks import read_metrics

FILES = ("metrics.jsonl", "events.jsonl", "run.json", "config.toml", "loads.npz")


class Loads(NamedTuple):
    """steps [N] int64, the last of each interval; counts [N, L, E] int64; bias [N, L, E] float32, None where an older
    version wrote none; layers: the global index of each layer."""

    steps: np.ndarray
    counts: np.ndarray
    bias: np.ndarray | None
    layers: list[int]

    def relative(self) -> np.ndarray:
        """A_k / L, [N, L, E] float64; NaN for a layer without tokens."""
        mean = self.counts.mean(-1, keepdims=True)
        return np.divide(self.counts, mean, out=np.full(self.counts.shape, np.nan), where=mean > 0)


@dataclass
class RunData:
    """Everything that a report needs; problems: one sentence for each thing that is missing or cannot be read."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    loads: Loads | None = None
    problems: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, without what is null or no number."""
        found = [(row["train/step"], row[key]) for row in self.rows if _is_number(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        values = self.series(key)[1]
        return values[-1] if values else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_folder(path: Path) -> None:
    """Raises ConfigError unless the folder holds at least one file of a run."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a run folder, for example runs/tiny")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file: name the run folder that holds it")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ConfigError(f"{path} may not be read: change its permissions, or name another run folder")
    if not any((path / name).exists() for name in (*FILES, "exit.json", "logs")):
        below = sorted(child.name for child in path.iterdir() if (child / "run.json").exists())
        hint = f"did you mean {path / below[0]}?" if below else "name a folder that alf-moe train wrote"
        raise ConfigError(f"{path} holds no run (none of {', '.join(FILES)}): {hint}")


def read_run(path: Path) -> RunData:
    """Raises ConfigError when the folder is none of a run."""
    check_folder(path)
    run = RunData(path, path.resolve().name)
    read_settings(run)
    rows = _read(run, "metrics.jsonl", lambda file: (read_metrics(file), bad_lines(file)))
    run.rows = _count_bad(run, "metrics.jsonl", rows)
    run.events = _count_bad(run, "events.jsonl", _read(run, "events.jsonl", json_lines))
    if not run.rows and (path / "metrics.jsonl").exists():
        run.problems.append("no step is logged yet: there are no curves")
    run.loads = _read(run, "loads.npz", read_loads)
    return run


def read_settings(run: RunData) -> None:
    """The small files: config.toml, run.json, exit.json. Problems are found anew."""
    run.problems.clear()
    run.config = flatten(_read(run, "config.toml", lambda file: tomllib.loads(file.read_text())) or {})
    run.about = _read(run, "run.json", _json_object) or {}
    run.outcome = (_read(run, "exit.json", _json_object) if (run.path / "exit.json").exists() else None) or {}


def _read(run: RunData, name: str, read: Any) -> Any:
    file = run.path / name
    if not file.exists():
        late = "; it is written with each checkpoint" if name == "loads.npz" else ""
        run.problems.append(f"{name} is missing{late}")
        return None
    try:
        return read(file)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        run.problems.append(
            f"{name} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        )
        return None


def _count_bad(run: RunData, name: str, found: tuple[list[dict[str, Any]], int] | None) -> list[dict[str, Any]]:
    rows, bad = found or ([], 0)
    if bad:
        run.problems.append(
            f"{bad:,} line{'s' if bad > 1 else ''} of {name} cannot be read and {'are' if bad > 1 else 'is'} left out"
        )
    return rows


def _json_object(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def json_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many lines are none."""
    found, bad = [], 0
    for line in file.read_text(errors="replace").splitlines():
        try:
            value = json.loads(line) if line.strip() else None
        except ValueError:
            bad += 1
            continue
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += bool(line.strip())
    return found, bad


def bad_lines(file: Path) -> int:
    """Lines of metrics.jsonl that are no row."""
    rows, bad = json_lines(file)
    return bad + sum(not _is_number(row.get("train/step")) for row in rows)


def read_loads(file: Path) -> Loads:
    """loads.npz or loads-latest.npz. Raises ValueError and what numpy raises."""
    with np.load(file) as arrays:
        steps, counts, layers = arrays["steps"], arrays["counts"], arrays["layers"].tolist()
        bias = arrays.get("bias")
    if counts.ndim != 3 or counts.shape[:2] != (len(steps), len(layers)):
        raise ValueError(f"counts have the shape {counts.shape} for {len(steps)} steps and {len(layers)} layers")
    if bias is not None and bias.shape != counts.shape:
        raise ValueError(f"the bias has the shape {bias.shape} and the counts {counts.shape}")
    return Loads(steps, counts, bias, layers)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def unique_names(runs: Iterable[RunData]) -> None:
    """Runs of the same name get as much of their path before it as tells them apart."""
    runs = list(runs)
    parts = [run.path.resolve().parts for run in runs]
    for index, run in enumerate(runs):
        length = 1
        while length < len(parts[index]) and any(
            other[-length:] == parts[index][-length:] for i, other in enumerate(parts) if i != index
        ):
            length += 1
        run.name = "/".join(parts[index][-length:])
