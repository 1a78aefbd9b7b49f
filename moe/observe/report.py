"""The offline report: run folders in, one HTML file out that needs nothing else (report.html, .css, .js, report_curves.js).

Letters: N logged steps, L MoE layers, E experts, C columns of a strip.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.observe import heat
from moe.observe.compare import not_comparable, settings_that_differ
from moe.observe.console import duration, short
from moe.observe.runs import Loads, RunData

COLUMNS = 384  # of a strip: as wide as a page needs; with 27 layers x 64 experts 0.5 MB
POINTS = 600  # of a curve
BAND_COLUMNS = 160
EVENTS = 500


class Chart(NamedTuple):
    """One figure of curves. lines: (metric, label); a metric that ends in layer_ is that of the chosen layer. floor: draw
    the sampling floor."""

    title: str
    unit: str
    lines: list[tuple[str, str]]
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    floor: bool = False


def _worst_and_mean(metric: str, what: str = "") -> list[tuple[str, str]]:
    return [(f"moe/{metric}/max", f"{what}worst layer"), (f"moe/{metric}/mean", f"{what}mean")]


CHARTS = [
    Chart("Loss", "nats per token", [("loss/ce", "training"), ("val/ce", "held out")], "Cross-entropy alone."),
    Chart(
        "MaxVio",
        "max A / L − 1",
        [*_worst_and_mean("maxvio_batch"), ("moe/maxvio_seen/max", "all counts so far, worst layer")],
        "Of one batch, and of everything counted since the start.",
        log_y=True,
        floor=True,
    ),
    Chart("MaxVio of one layer", "max A / L − 1", [("moe/maxvio_batch/layer_", "layer")], log_y=True, floor=True),
    Chart(
        "Excess MaxVio over the sampling floor",
        "MaxVio − floor",
        [*_worst_and_mean("excess_maxvio_batch"), ("moe/excess_maxvio_val/max", "held out, worst layer")],
        "0: as even as uniform random routing would be.",
    ),
    Chart(
        "Idle and dead experts",
        "experts of a layer",
        [
            ("moe/idle_batch/max", "idle in the batch, worst layer"),
            ("moe/idle_seen/max", "idle since the start, worst layer"),
            ("moe/dead/max", "dead: below 1 % of the mean for 100 steps, worst layer"),
        ],
    ),
    Chart(
        "Range of the bias",
        "score",
        [*_worst_and_mean("bias_range"), ("moe/topk_margin/mean", "top-K margin, mean")],
        "max b − min b. Red line for sigmoid scores: 1. Top-K margin: how far the K-th expert is from the next.",
    ),
    Chart(
        "Regret against its bound",
        "score per token, summed over steps",
        [
            ("regret/static_sum/max", "static regret, worst layer"),
            ("regret/static_sum/mean", "static regret, mean"),
            ("regret/bound/max", "bound, worst layer"),
        ],
        log_x=True,
        log_y=True,
    ),
    Chart(
        "Distance from the best bias",
        "score per token",
        [
            ("regret/dynamic/max", "dynamic regret, worst layer"),
            ("regret/dynamic/mean", "mean"),
            ("regret/balance_tax/mean", "balance tax, mean"),
        ],
        log_y=True,
    ),
    Chart(
        "Straggler factor",
        "busiest rank / mean",
        [
            ("moe/straggler_batch/max", "this run, worst layer"),
            ("moe/straggler_batch/mean", "this run, mean"),
            ("moe/straggler_8_batch/mean", "8 ranks, simulated"),
            ("moe/straggler_64_batch/mean", "64 ranks, simulated"),
        ],
    ),
    Chart(
        "Share of the step",
        "share",
        [
            ("speed/imbalance_share", "lost to the busiest rank (estimate by FLOPs)"),
            ("speed/balance_share", "balancing and its all-reduce"),
            ("speed/regret_share", "measuring the regret"),
        ],
    ),
    Chart("Throughput", "tokens per second", [("speed/tokens_per_s", "all ranks")]),
    Chart("Memory", "GiB", [("memory/peak_gib", "highest of any rank so far")]),
    Chart("Gradient norm", "before clipping", [("optim/grad_norm", "global norm")], log_y=True),
]


def build(runs: Sequence[RunData]) -> str:
    """The whole file. runs: of distinct names (runs.unique_names)."""
    data = {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "charts": [chart._asdict() for chart in CHARTS],
        "palette": heat.palette(),
        "load_values": heat.load_values(),
        "first": heat.FIRST,
        "half": heat.HALF,
        "comparability": not_comparable(runs) if len(runs) > 1 else [],
        "differences": settings_that_differ(runs) if len(runs) > 1 else {},
        "runs": [_run(run) for run in runs],
    }
    here = Path(__file__).parent
    page = here.joinpath("report.html").read_text()
    # The data come last: what is in them is never searched for the other marks.
    for mark, text in (
        ("/*style*/", here.joinpath("report.css").read_text()),
        ("/*script*/", here.joinpath("report.js").read_text() + here.joinpath("report_curves.js").read_text()),
        ("/*data*/", json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")),
    ):
        before, after = page.split(mark)
        page = before + text + after
    return page


def _run(run: RunData) -> dict[str, Any]:
    layers = run.loads.layers if run.loads is not None else []
    return {
        "name": run.name,
        "path": str(run.path),
        "facts": facts(run),
        "problems": run.problems,
        "floor": run.about.get("floor"),
        "method": run.config.get("balance.method"),
        "covered": run.last("regret/bound_covers"),
        "series": _series(run),
        "layers": [int(layer) for layer in layers],
        "dense": run.loads is not None and not layers,
        "strips": strips(run.loads) if run.loads is not None and len(run.loads.steps) else None,
        "config": {key: _text(value) for key, value in run.config.items()},
        "about": {key: _text(value) for key, value in run.about.items()},
        "events": [_event(event) for event in run.events[-EVENTS:]],
        "events_left_out": max(0, len(run.events) - EVENTS),
    }


def _series(run: RunData) -> dict[str, list[list[float]]]:
    wanted = [key for chart in CHARTS for key, _ in chart.lines]
    exact = {key for key in wanted if not key.endswith("layer_")}
    per_layer = tuple(key for key in wanted if key.endswith("layer_"))
    keys = {key for row in run.rows for key in row if key in exact or key.startswith(per_layer)}
    return {key: thin(*run.series(key)) for key in sorted(keys)}


def thin(x: Sequence[int], y: Sequence[float], points: int = POINTS) -> list[list[float]]:
    """At most `points` points: where there are more, the lowest and the highest of each part, so that no peak is lost; the
    last stays."""
    if len(x) > points:
        value = np.asarray(y)
        keep = {len(x) - 1}
        for part in np.array_split(np.arange(len(x) - 1), (points - 1) // 2):
            keep |= {int(part[value[part].argmin()]), int(part[value[part].argmax()])}
        order = sorted(keep)
        x, y = [x[i] for i in order], [y[i] for i in order]
    return [[int(step) for step in x], [float(f"{v:.4g}") if abs(v) < 1e4 else round(v) for v in y]]


def strips(loads: Loads) -> dict[str, Any]:
    """Per layer the load and the bias, expert x step, as PNGs of palette indices, and the band of the bias. Logged steps are
    joined until at most COLUMNS are left: their counts are added, their last bias is kept."""
    starts = _starts(len(loads.steps), COLUMNS)
    counts = np.add.reduceat(loads.counts, starts, axis=0)
    ends = np.append(starts[1:], len(loads.steps)) - 1
    joined = Loads(loads.steps[ends], counts, None if loads.bias is None else loads.bias[ends], loads.layers)
    load_CLE = joined.relative()
    firsts = np.concatenate([[0], joined.steps[:-1]]) + 1
    found: dict[str, Any] = {
        "experts": int(counts.shape[-1]),
        "steps": [[int(a), int(b)] for a, b in zip(firsts, joined.steps, strict=True)],
        "load": [heat.png_url(heat.load_index(load_CLE[:, i].T)) for i in range(len(loads.layers))],
    }
    if joined.bias is not None and np.isfinite(joined.bias).any():
        found |= _bias(joined.steps, joined.bias)
    return found


def _starts(length: int, most: int) -> np.ndarray:
    """First index of each of at most `most` parts of about the same length."""
    return np.unique(np.linspace(0, length, min(length, most), endpoint=False).astype(int))


def _bias(steps: np.ndarray, bias_CLE: np.ndarray) -> dict[str, Any]:
    limits = [float(np.nanmax(np.abs(bias_CLE[:, i]), initial=0.0)) for i in range(bias_CLE.shape[1])]
    maps = [heat.png_url(heat.signed_index(bias_CLE[:, i].T, limit)) for i, limit in enumerate(limits)]
    known = np.isfinite(bias_CLE).all((1, 2))
    steps, bias_CLE = steps[known], bias_CLE[known]
    ends = np.append(_starts(len(steps), BAND_COLUMNS)[1:], len(steps)) - 1
    bands = np.quantile(bias_CLE[ends], (0, 0.1, 0.5, 0.9, 1), axis=-1)  # [5, C, L]
    return {
        "bias": maps,
        "bias_limit": limits,
        "band_steps": steps[ends].tolist(),
        "band": [[[float(f"{v:.3g}") for v in row] for row in bands[:, :, i]] for i in range(bands.shape[2])],
    }


def facts(run: RunData) -> list[list[str]]:
    """Name and value of what one wants to know first."""
    c, found = run.config, []
    step, steps = run.last("train/step"), c.get("train.steps")
    reason = run.outcome.get("reason") or "no exit.json: running, or killed"
    found.append(["outcome", f"{reason} (exit code {run.outcome['code']})" if run.outcome.get("code") else reason])
    if c.get("model.num_experts"):
        sparse = c.get("model.num_layers", 0) - c.get("model.first_k_dense", 0)
        model = f"{c['model.num_experts']} experts, top-{c.get('model.top_k')}, {sparse} MoE layers"
        found.append(["model", model])
    if "balance.method" in c:
        rate = c.get("balance.rate")
        found.append(["balancing", c["balance.method"] + (f", rate {rate}" if rate is not None else "")])
    if step is not None:
        found.append(["steps", f"{step:,.0f}" + (f" of {steps:,}" if steps else "")])
    for title, key, show in (
        ("tokens", "train/tokens", short),
        ("held-out loss", "val/ce", "{:.4f} nats per token".format),
        ("bits per byte", "val/bits_per_byte", "{:.4f}".format),
    ):
        if (value := run.last(key)) is not None:
            found.append([title, show(value)])
    late = run.series("moe/maxvio_batch/max")[1]
    late = late[-max(1, len(late) // 5) :]
    if late:
        floor = run.about.get("floor")
        text = f"{sum(late) / len(late):.3f}" + (f" (floor {floor:.3f})" if floor is not None else "")
        found.append(["MaxVio, worst layer, mean of the last fifth of the logged steps", text])
    rates, seconds = run.series("speed/tokens_per_s")[1], run.last("speed/step_s")
    if rates:
        found.append(["throughput, median", f"{short(float(np.median(rates)))} tokens per second"])
    if run.outcome == {} and steps and step is not None and seconds is not None:
        found.append(["time left", duration((steps - step) * seconds)])
    return found


def _event(event: dict[str, Any]) -> list[str]:
    when, step = event.get("time"), event.get("step")
    rest = {key: value for key, value in event.items() if key not in ("time", "event", "step", "text")}
    said = str(event["text"]) if "text" in event else "; ".join(f"{key} {_text(value)}" for key, value in rest.items())
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if isinstance(when, (int, float)) else "–"
    return [clock, str(event.get("event", "–")), "–" if step is None else str(step), said]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "–" if value is None else str(value)
