"""A run folder as training leaves it, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moe.config import to_toml
from moe.observe.report import CHARTS
from tests.tiny import tiny_config

KEYS = sorted({key for chart in CHARTS for key, _ in chart.lines if not key.endswith("layer_")})


def make_run(
    folder: Path, steps: int = 40, layers: int = 2, experts: int = 8, seed: int = 0, bias: bool = True, **about
) -> Path:
    """`steps` logged steps of noise around a balance that gets better. about: replaces fields of run.json."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    uneven = np.exp(generator.normal(size=(1, layers, experts)) * np.exp(-np.arange(steps) / steps * 4)[:, None, None])
    counts = generator.poisson(50 * uneven / uneven.mean(-1, keepdims=True))
    moved = {"bias": np.cumsum(np.sign(1 - uneven) * 1e-3, axis=0).astype(np.float32)} if bias else {}
    numbers = np.arange(1, layers + 1)
    np.savez(folder / "loads.npz", steps=np.arange(1, steps + 1), counts=counts, layers=numbers, **moved)
    with (folder / "metrics.jsonl").open("w") as file:
        for n in range(steps):
            row = {key: float(generator.gamma(20) / 20) for key in KEYS if not key.startswith("val/")}
            row |= {"regret/bound_covers": 1.0, "train/step": n + 1, "train/tokens": 128 * (n + 1), "speed/step_s": 0.5}
            row |= {
                "moe/idle_batch/max": 1.0,
                "moe/idle_streak/max": 12.0,
                "moe/dead/max": 2.0,
                "optim/skipped_steps": 0.0,
            }
            worst = counts[n].max(-1) / counts[n].mean(-1) - 1
            row |= {f"moe/maxvio_batch/layer_{layer:02d}": float(v) for layer, v in zip(numbers, worst, strict=True)}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"train/step": steps, "train/tokens": 128 * steps, "val/ce": 2.5}) + "\n")
    events = [{"time": 1.8e9, "event": "start", "step": 0}, {"time": 1.8e9 + 9, "event": "save", "step": steps}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.toml").write_text(to_toml(tiny_config(run__name=folder.name)))
    written = {"data_hash": "d0", "init_hash": "w0", "flops_per_token": 1000.0, "floor": 0.1, **about}
    (folder / "run.json").write_text(json.dumps(written))
    (folder / "exit.json").write_text(json.dumps({"code": 0, "reason": "done"}))
    return folder
