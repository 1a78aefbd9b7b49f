"""The W&B dashboard as code: which metrics go to W&B, in which panels they are shown, and how the view is pushed.

W&B gets what the dashboard shows and nothing else, about 50 scalars and 3 a layer; metrics.jsonl has everything.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moe.config import ConfigError

IMAGE = "moe/load_heatmap"
AXES = ("train/step", "train/tokens")


class Panel(NamedTuple):
    """One plot over train/step. A metric that ends in /layer_ stands for one key a layer. methods: runs are grouped by
    balance.method, with a band from the lowest to the highest run."""

    title: str
    metrics: list[str]
    log_x: bool = False
    log_y: bool = False
    methods: bool = False


def _both(metric: str) -> list[str]:
    return [f"{metric}/max", f"{metric}/mean"]


SECTIONS: dict[str, list[Panel]] = {
    "1 Is it learning?": [
        Panel("Cross-entropy, nats per token", ["loss/ce", "val/ce"]),
        Panel("Held-out bits per byte", ["val/bits_per_byte"]),
        Panel("Auxiliary and z-loss", ["loss/aux", "loss/z"]),
        Panel("Learning rate", ["optim/lr"]),
        Panel("Gradient norm before clipping", ["optim/grad_norm"], log_y=True),
    ],
    "2 Is it balanced?": [
        Panel(
            "MaxVio of a batch, over the layers",
            [f"moe/maxvio_batch/{of}" for of in ("max", "p95", "median")],
            log_y=True,
        ),
        Panel("MaxVio of a batch, each layer", ["moe/maxvio_batch/layer_"], log_y=True),
        Panel("MaxVio of everything so far, and held out", ["moe/maxvio_seen/max", "moe/maxvio_val/max"], log_y=True),
        Panel("Excess over the sampling floor", _both("moe/excess_maxvio_batch")),
        Panel("Idle and dead experts", ["moe/idle_batch/max", "moe/idle_seen/max", "moe/dead/max"]),
        Panel("Longest idle streak, steps", ["moe/idle_streak/max"]),
        Panel("Effective experts, share", ["moe/effective_experts_batch/mean"]),
        Panel("Load of every expert (layer × expert)", [IMAGE]),
    ],
    "3 Is the controller healthy?": [
        Panel(
            "Range of the bias (red line 1.0 for sigmoid), top-K margin",
            [*_both("moe/bias_range"), "moe/topk_margin/mean"],
        ),
        Panel("Drift of the mean bias", ["moe/bias_drift/max"]),
        Panel("Share of experts whose update turned", _both("moe/flip_rate")),
    ],
    "4 Regret against bounds": [
        Panel("Static regret and its bound", [*_both("regret/static_sum"), "regret/bound/max"], log_x=True, log_y=True),
        Panel("A bound covers this rule (0 or 1)", ["regret/bound_covers"]),
        Panel("Distance from the best bias", _both("regret/dynamic"), log_y=True),
        Panel("Distance from the best bias, each layer", ["regret/dynamic/layer_"], log_y=True),
        Panel("Static regret, each layer", ["regret/static/layer_"]),
        Panel("Balance tax", ["regret/balance_tax/mean"]),
    ],
    "5 Does imbalance cost time?": [
        Panel("Straggler factor of this run", _both("moe/straggler_batch")),
        Panel("Share of the step", ["speed/imbalance_share", "speed/balance_share", "speed/regret_share"]),
        Panel("Tokens per second", ["speed/tokens_per_s"]),
        Panel("MFU on active parameters", ["speed/mfu"]),
    ],
    "6 Compare methods": [
        Panel("Cross-entropy by method", ["loss/ce"], methods=True),
        Panel("Held-out cross-entropy by method", ["val/ce"], methods=True),
        Panel("Excess MaxVio by method", ["moe/excess_maxvio_batch/max"], methods=True),
        Panel("Tokens per second by method", ["speed/tokens_per_s"], methods=True),
    ],
    "7 Run health": [
        Panel("Share of the time: productive, lost to restarts", ["goodput/productive", "goodput/restarts"]),
        Panel("Skipped steps and loss spikes", ["optim/skipped_steps", "optim/loss_spikes"]),
        Panel("Seconds per step", ["speed/step_s"], log_y=True),
        Panel("Highest memory of a rank, GiB", ["memory/peak_gib"]),
    ],
}

METRICS = {metric for panels in SECTIONS.values() for panel in panels for metric in panel.metrics}


def is_shown(key: str) -> bool:
    """Whether W&B gets this key of metrics.jsonl."""
    return key in AXES or re.sub(r"/layer_\d+$", "/layer_", key) in METRICS


def describe() -> str:
    """What would be pushed."""
    lines = []
    for title, panels in SECTIONS.items():
        lines.append(title)
        for panel in panels:
            marks = [
                mark
                for mark, on in (("log x", panel.log_x), ("log y", panel.log_y), ("by method", panel.methods))
                if on
            ]
            metrics = ", ".join(metric + "NN" if metric.endswith("/layer_") else metric for metric in panel.metrics)
            lines.append(f"  {panel.title}: {metrics}" + (f"  [{', '.join(marks)}]" if marks else ""))
    return "\n".join(lines)


def build(entity: str, project: str, name: str) -> Any:
    """The view, a wandb_workspaces Workspace that is not saved yet. Raises ConfigError without the extra `dashboard`."""
    try:
        from wandb_workspaces import workspaces  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("the dashboard needs wandb-workspaces: pip install 'alf-moe[dashboard]'") from None
    sections = [
        workspaces.Section(name=title, is_open=index < 2, panels=[_panel(panel) for panel in panels])
        for index, (title, panels) in enumerate(SECTIONS.items())
    ]
    settings = workspaces.WorkspaceSettings(x_axis="train/step")
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _panel(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2  # pyright: ignore[reportMissingImports]

    if panel.metrics == [IMAGE]:
        return v2.MediaBrowser(title=panel.title, media_keys=panel.metrics, num_columns=2)
    options: dict[str, Any] = {"title": panel.title, "x": "train/step", "log_x": panel.log_x, "log_y": panel.log_y}
    if panel.methods:
        options |= {"groupby": v2.Config("balance.method"), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    (first, *_) = panel.metrics
    if first.endswith("/layer_"):
        return v2.LinePlot(metric_regex=f"{first}[0-9]+", **options)
    return v2.LinePlot(y=list(panel.metrics), **options)


def push(entity: str | None, project: str, name: str) -> str:
    """Save as a view of its own, whatever views there are, so that nobody's edits are overwritten; the result is its address.
    Raises ConfigError without a login, and what W&B raises without a network."""
    import wandb

    view = build(entity or "", project, name)
    if not wandb.login(prompt=False, verify=False):
        raise ConfigError("W&B has no login on this machine: run wandb login, or set WANDB_API_KEY")
    view.entity = entity or wandb.Api().default_entity or ""
    return view.save_as_new_view().url
