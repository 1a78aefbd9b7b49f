"""Where metrics go: the console, metrics.jsonl and events.jsonl of the run folder, and W&B. Rank 0 writes, others do not."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moe.config import Config
from moe.observe.console import startup_block, step_line, summary_table
from moe.observe.dashboard import IMAGE, is_shown

if TYPE_CHECKING:
    import numpy as np


IMAGES = 200


class Sinks:
    """Created once per run and rank; with enabled=False every call does nothing.

    about: what the start-up block and W&B's configuration say. `wandb_id` is in the checkpoint, so that a resumed run
    continues the same curves.
    """

    def __init__(
        self, run_dir: Path, config: Config, about: dict[str, Any], wandb_id: str | None, enabled: bool = True
    ):
        self.run_dir, self.config, self.about, self.enabled = run_dir, config, about, enabled
        self.wandb_id = wandb_id
        self._warned: set[str] = set()
        self._wandb: Any = None
        if not enabled:
            return
        self._metrics = _append(run_dir / "metrics.jsonl")
        self._events = _append(run_dir / "events.jsonl")
        self._image_slot = self._slot(int(about["start_step"])) if about["start_step"] else -1
        print(startup_block(config, about), flush=True)
        if config.observe.wandb != "off":
            self._start_wandb()

    def write(self, metrics: dict[str, float]) -> None:
        """One logged step: metrics must hold train/step and train/tokens."""
        if not self.enabled:
            return
        print(step_line(self.config, self.about["world_size"], metrics), flush=True)
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._metrics.write(json.dumps(finite) + "\n")
        if self._wandb is not None:
            try:
                shown = {key: value for key, value in metrics.items() if is_shown(key)}
                self._wandb.log(shown)  # never step=: rows below the last one would be dropped after a resume
            except Exception as error:
                self.warn("wandb.log", f"W&B stopped taking metrics ({error}); metrics.jsonl has everything")
                self._wandb = None

    def image(self, where: dict[str, float], load_LE: np.ndarray | None) -> None:
        """A heat map of A_k / L to W&B, at most IMAGES a run at log-spaced steps; where: train/step and train/tokens."""
        if self._wandb is None or load_LE is None or (slot := self._slot(int(where["train/step"]))) <= self._image_slot:
            return
        self._image_slot = slot
        try:
            import wandb

            from moe.observe.heat import heat_map

            self._wandb.log({**where, IMAGE: wandb.Image(heat_map(load_LE))})
        except Exception as error:
            self.warn("wandb.image", f"W&B took no heat map ({error}); loads.npz has the loads")

    def _slot(self, step: int) -> int:
        """Which of IMAGES equal parts of log(steps) this step is in."""
        return int((IMAGES - 1) * min(1.0, math.log(max(1, step)) / max(math.log(self.config.train.steps), 1e-9)))

    def event(self, kind: str, **fields: Any) -> None:
        """A line in events.jsonl: start, resume, save, skip, warn."""
        if self.enabled:
            self._events.write(json.dumps({"time": time.time(), "event": kind, **fields}) + "\n")

    def warn(self, cause: str, sentence: str) -> None:
        """A sentence with a remedy, once per cause."""
        if self.enabled and cause not in self._warned:
            self._warned.add(cause)
            print(f"warning: {sentence}", file=sys.stderr, flush=True)
            self.event("warn", cause=cause, text=sentence)

    def finish(self, summary: dict[str, Any]) -> None:
        """The table at the end; closes everything."""
        if not self.enabled:
            return
        print(summary_table(summary), flush=True)
        if self._wandb is not None:
            try:
                self._wandb.summary.update(summary)
                self._wandb.finish()
            except Exception as error:
                self.warn("wandb.finish", f"W&B did not finish ({error}): wandb sync {self.run_dir}/wandb/*run-*")
        self._metrics.close()
        self._events.close()

    def _start_wandb(self) -> None:
        online = self.config.observe.wandb == "online" or (
            self.config.observe.wandb == "auto" and bool(os.environ.get("WANDB_API_KEY"))
        )
        for mode in ("online", "offline") if online else ("offline",):
            try:
                import wandb

                self._wandb = wandb.init(
                    project=self.config.observe.wandb_project,
                    name=self.config.run.name,
                    group=self.config.observe.wandb_group,
                    job_type=self.config.balance.method,
                    id=self.wandb_id,
                    resume="allow",
                    mode=mode,
                    dir=str(self.run_dir),
                    config={**self.config.model_dump(), "about": self.about},
                    settings=wandb.Settings(silent=True, console="off", init_timeout=60, finish_timeout=120),
                )
                self._wandb.define_metric("train/step")
                self._wandb.define_metric("train/tokens")
                self._wandb.define_metric("*", step_metric="train/step")
                self.wandb_id = self._wandb.id
                return
            except Exception as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
                then = (
                    "logging offline; upload later with wandb sync"
                    if mode == "online"
                    else "no W&B; metrics.jsonl has all"
                )
                self.warn(f"wandb {mode}", f"W&B could not start {mode} ({problem}): {then}")


def _append(path: Path) -> TextIO:
    """Open to append whole lines: a half-written last one, of a run that was killed, is ended first."""
    file = path.open("a+b")
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.close()
    return path.open("a", buffering=1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl by step. A half-written last line is passed over, and where a resumed run wrote a step again
    the later row of the same kind (training or validation) counts."""
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows[int(row["train/step"]), "val/ce" in row] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [rows[key] for key in sorted(rows)]
