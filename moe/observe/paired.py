"""Paired comparison of finished runs: may they be compared, and what do the differences say?

An arm is a method with its settings; runs of different arms with the same seed have the same initial weights and the same
data in the same order, so that their difference is the method's and not the seed's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.config import ConfigError
from moe.observe.compare import not_comparable
from moe.observe.load import History, late_idle, late_maxvio
from moe.observe.runs import RunData, read_run

EARLY, LATE = 0.05, 0.2  # shares of the steps


class Result(NamedTuple):
    """One finished run. windows: of the logged batches, "early" and "late" of EARLY and LATE; means over the rows.

    maxvio_summed: MaxVio of the late counts, worst layer. tokens_per_s: median. curves: every logged batch, by name of _CURVES;
    None where it was not logged.
    """

    arm: str
    seed: int
    run: RunData
    ce: float
    windows: dict[str, dict[str, float]]
    maxvio_summed: float
    idle_late: int
    tokens_per_s: float
    curves: dict[str, list[float | None]]


def read_result(folder: Path, arm: str, seed: int) -> Result:
    """Raises ConfigError with one sentence for a run that is not finished or not readable."""
    run = read_run(folder)
    run.name = arm
    training = [row for row in run.rows if row.get("loss/ce") is not None]
    ce = run.last("val/ce")
    if run.outcome.get("code") != 0 or ce is None or not training or run.loads is None:
        raise ConfigError(
            f"{folder} is not a whole finished run ({'; '.join([_ended(run), *run.problems])}): it does not count"
        )
    last, history = (
        training[-1]["train/step"],
        History(run.loads.steps, run.loads.counts, np.full(run.loads.counts.shape, np.nan)),
    )
    first = max(EARLY * last, training[0]["train/step"])
    windows = {
        "early": _window([row for row in training if row["train/step"] <= first]),
        "late": _window([row for row in training if row["train/step"] > (1 - LATE) * last]),
    }
    summed = max(late_maxvio(history, LATE), default=math.nan)
    speed = statistics.median(run.series("speed/tokens_per_s")[1] or [math.nan])
    curves = {name: [row.get(key) for row in training] for name, key in _CURVES.items()}
    return Result(arm, seed, run, ce, windows, summed, late_idle(history, LATE), speed, curves)


def _ended(run: RunData) -> str:
    return f"exit code {run.outcome['code']}" if "code" in run.outcome else "it has not ended"


_WINDOW = {
    "excess": "moe/excess_maxvio_batch/mean",
    "excess_worst": "moe/excess_maxvio_batch/max",
    "maxvio": "moe/maxvio_batch/mean",
    "idle": "moe/idle_batch/max",
    "bias_range": "moe/bias_range/max",
}
_CURVES = {
    "step": "train/step",
    "loss": "loss/ce",
    "excess": _WINDOW["excess"],
    "excess_worst": _WINDOW["excess_worst"],
}


def _window(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for name, key in _WINDOW.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        found[name] = statistics.fmean(values) if values else math.nan
    return found


def differences_that_forbid(results: Sequence[Result]) -> list[str]:
    """Sentences, empty when the runs may be compared: those of one seed with each other."""
    found = []
    for seed in sorted({r.seed for r in results}):
        found += [
            f"{sentence} (seed {seed})" for sentence in not_comparable([r.run for r in results if r.seed == seed])
        ]
    return found


class Paired(NamedTuple):
    """Differences arm - reference over the seeds that both have. low, high: 95 % t interval of the mean; NaN below two
    seeds. equivalent: True when the 90 % interval lies within +-margin (two one-sided tests at 5 %), False when the 95 %
    interval excludes [-margin, margin], else None. seeds_needed: to see a difference of margin with 80 % power."""

    seeds: int
    mean: float
    sd: float
    low: float
    high: float
    equivalent: bool | None
    seeds_needed: int | None


def paired(differences: Sequence[float], margin: float) -> Paired:
    """Raises ModuleNotFoundError without scipy (extra `plots`)."""
    from scipy.stats import t

    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return Paired(n, mean, math.nan, math.nan, math.nan, None, None)
    sd = statistics.stdev(differences)
    error = sd / n**0.5
    wide, narrow = (float(t.ppf(p, n - 1)) * error for p in (0.975, 0.95))
    equivalent = None
    if abs(mean) + narrow <= margin:
        equivalent = True
    elif abs(mean) - wide > margin:
        equivalent = False
    return Paired(n, mean, sd, mean - wide, mean + wide, equivalent, math.ceil((2.8 * sd / margin) ** 2) + 2)


class Row(NamedTuple):
    """An arm in the table: means over its seeds, the worst seed, and its difference from the reference."""

    arm: str
    seeds: int
    ce: float
    excess_early: float
    excess_late: float
    excess_late_worst: float
    maxvio_summed_worst: float
    idle_late: int
    tokens_per_s: float
    delta: Paired | None


def rows(results: Sequence[Result], reference: str, margin: float) -> list[Row]:
    """One row an arm, in the order of first appearance."""
    base = {r.seed: r.ce for r in results if r.arm == reference}
    found = []
    for arm in dict.fromkeys(r.arm for r in results):
        mine = [r for r in results if r.arm == arm]
        differences = [r.ce - base[r.seed] for r in mine if r.seed in base]
        found.append(
            Row(
                arm,
                len(mine),
                statistics.fmean(r.ce for r in mine),
                statistics.fmean(r.windows["early"]["excess"] for r in mine),
                statistics.fmean(r.windows["late"]["excess"] for r in mine),
                max(r.windows["late"]["excess_worst"] for r in mine),
                max(r.maxvio_summed for r in mine),
                max(r.idle_late for r in mine),
                statistics.median(r.tokens_per_s for r in mine),
                paired(differences, margin) if differences and arm != reference else None,
            )
        )
    return found


def markdown(table: Sequence[Row], reference: str, margin: float, refused: Sequence[str]) -> str:
    """The table; without differences when the runs may not be compared."""
    lines = [*(f"**{sentence}**\n" for sentence in refused)]
    lines.append(
        f"Cross-entropy of the held-out tokens, nats. Δ: to {reference}, paired by seed, mean and 95 % interval. "
        f"Excess MaxVio: of a batch above the sampling floor, early = first {EARLY:.0%} of the steps, late = last {LATE:.0%}.\n"
    )
    lines.append(
        "| method | seeds | cross-entropy | Δ | within ±"
        + f"{margin:g} | excess MaxVio early | late | late, worst layer and "
        "seed | MaxVio of late sums, worst | idle late | tokens/s |"
    )
    lines.append("|" + "---|" * 11)
    for row in table:
        d = row.delta if not refused else None
        delta = (
            "–" if d is None else f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]" if d.seeds > 1 else f"{d.mean:+.4f}"
        )
        verdict = "–"
        if d is not None:
            unresolved = f"open ({d.seeds_needed} seeds)" if d.seeds_needed else "open"
            verdict = {True: "yes", False: "no", None: unresolved}[d.equivalent]
        lines.append(
            f"| {row.arm} | {row.seeds} | {row.ce:.4f} | {delta} | {verdict} | {row.excess_early:.3f} | {row.excess_late:.3f} "
            f"| {row.excess_late_worst:.3f} | {row.maxvio_summed_worst:.3f} | {row.idle_late} | {row.tokens_per_s:,.0f} |"
        )
    return "\n".join(lines)


def plot(table: Sequence[Row], reference: str, path: Path, methods: Mapping[str, str]) -> None:
    """Pareto plot: late excess MaxVio (log) against Δ cross-entropy with its interval. methods: of each arm; settings of one
    method have one colour and a line. Raises ModuleNotFoundError without matplotlib (extra `plots`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    floor = 1e-3  # what lies at the sampling floor has no logarithm
    for index, method in enumerate(dict.fromkeys(methods[row.arm] for row in table)):
        arms = sorted((row for row in table if methods[row.arm] == method), key=lambda row: row.excess_late)
        x = [max(row.excess_late, floor) for row in arms]
        y = [0.0 if row.delta is None else row.delta.mean for row in arms]
        low_high = [(0.0, 0.0) if d is None else (d.mean - d.low, d.high - d.mean) for d in (row.delta for row in arms)]
        error = np.nan_to_num(np.array(low_high).T)  # no interval with one seed
        color = f"C{index % 10}"
        style = {"color": color, "marker": "osD^vPX*"[index % 8], "linewidth": 0.8, "capsize": 3}
        ax.errorbar(x, y, yerr=error if error.any() else None, label=method, **style)
        if len(arms) > 1:
            for row, right, up in zip(arms, x, y, strict=True):
                setting = row.arm.removeprefix(f"{method}_").partition("=")[2] or row.arm
                place = {"textcoords": "offset points", "xytext": (6, 5)}
                ax.annotate(setting, (right, up), fontsize=8, color=color, **place)
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(
        xscale="log",
        xlabel="late excess MaxVio of a batch (mean layer); further left is better balanced",
        ylabel=f"Δ cross-entropy to {reference}, nats (95 % interval)",
    )
    _plain_numbers(ax.xaxis)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plain_numbers(axis: Any) -> None:
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "236" else "")


def plot_rates(results: Sequence[Result], path: Path) -> bool:
    """Excess MaxVio of a batch (mean layer, mean over seeds, nine logged batches around each) against rate times steps, one line
    for each rate; a panel for every rule that ran with two or more. Where the lines lie on one another, the distance that the bias
    may have gone decides; where they part, the rate. False, and no picture, without such a rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: dict[str, dict[float, list[Result]]] = {}
    for result in results:
        method, rate = (result.run.config.get(f"balance.{name}") for name in ("method", "rate"))
        if method != "none" and isinstance(rate, (int, float)):
            found.setdefault(str(method), {}).setdefault(float(rate), []).append(result)
    found = {method: rates for method, rates in found.items() if len(rates) > 1}
    if not found:
        return False
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4.5), layout="constrained", squeeze=False)
    for axis, (method, rates) in zip(axes[0], found.items(), strict=True):
        for rate, runs in sorted(rates.items()):
            steps = _floats(runs[0], "step")
            excess = np.mean([np.interp(steps, _floats(run, "step"), _floats(run, "excess")) for run in runs], axis=0)
            sums, numbers = (np.convolve(values, np.ones(9), "same") for values in (excess, np.ones_like(excess)))
            axis.loglog(rate * steps, sums / numbers, label=f"{rate:g}", linewidth=1.2)
        axis.set(title=method, xlabel="rate x steps", ylabel="excess MaxVio of a batch, mean layer")
        _plain_numbers(axis.yaxis)
        axis.legend(title="balance.rate")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def _floats(result: Result, curve: str) -> np.ndarray:
    return np.array(result.curves[curve], dtype=float)
