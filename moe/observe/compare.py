"""Whether runs may be compared at all, and in what their settings differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe.observe.runs import RunData

# The order of the samples follows from the data and these settings.
ORDER = ("run.seed", "data.seq_len", "train.batch_size")


def _order(run: RunData) -> Any:
    if "data_hash" not in run.about:
        return None
    mix = sorted((key, value) for key, value in run.config.items() if key.startswith("data.mix."))
    settings = [f"{key} {run.config.get(key)}" for key in ORDER] + [f"{key} {value}" for key, value in mix]
    return ", ".join([f"data {run.about['data_hash']}", *settings])


CHECKS: list[tuple[str, Callable[[RunData], Any]]] = [
    ("the data or their order", _order),
    ("the initial weights", lambda run: run.about.get("init_hash")),
    ("the tokens trained on", lambda run: run.last("train/tokens")),
    ("the active FLOPs of a token", lambda run: run.about.get("flops_per_token")),
]


def not_comparable(runs: Sequence[RunData]) -> list[str]:
    """One sentence for each thing that differs or that a run does not say; empty: they may be compared."""
    found = []
    for what, value in CHECKS:
        values = {run.name: value(run) for run in runs}
        silent = [name for name, v in values.items() if v is None]
        if silent:
            found.append(f"NOT COMPARABLE: {what}: {', '.join(silent)} does not say")
        elif len({str(v) for v in values.values()}) > 1:
            said = "; ".join(f"{name} {_short(v)}" for name, v in values.items())
            found.append(f"NOT COMPARABLE: {what} differ: {said}")
    return found


def _short(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def settings_that_differ(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Dotted setting -> its value in each run, None where a run has none."""
    keys = sorted({key for run in runs for key in run.config})
    table = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: values for key, values in table.items() if any(v != values[0] for v in values)}
