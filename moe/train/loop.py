"""The training run of one rank: set up, step, log, evaluate, save. Letters: L MoE layers, E experts."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.balance import Balancer, build_balancer
from moe.balance.assignment import METHODS
from moe.balance.dual import sampling_floor
from moe.config import Config, to_toml
from moe.model.loss import IGNORED
from moe.observe import cost, load
from moe.observe.goodput import Goodput
from moe.observe.regret import REGRET_FORMAT, RegretMeter
from moe.observe.scores import ScoreRecorder, probe_scores
from moe.observe.sinks import Sinks
from moe.parallel import Ranks
from moe.train import manifest
from moe.train.about import device_name, peak_tflops, provenance, weights_hash
from moe.train.data import Batch, DataError, TokenData
from moe.train.device import (
    Clock,
    Profiler,
    StopSignal,
    free_memory_gib,
    peak_memory_gib,
    set_deterministic,
)
from moe.train.engines import Engine, StepOutput, StepResult, build_engine
from moe.train.evaluate import evaluate
from moe.train.guard import SpikeGuard, mean_ce
from moe.train.optim import learning_rate
from moe.train.resume import Progress, restore, trainer_json
from moe.train.saver import Saver
from moe.train.start import start_from
from moe.train.watchdog import Watchdog


class Outcome(NamedTuple):
    """How a run ended: the documented exit code and why."""

    code: int
    reason: str


class Run:
    """The parts of one run on this rank."""

    def __init__(self, config: Config, ranks: Ranks, run_dir: Path, resume: bool, began: float | None = None):
        self.goodput = Goodput(time.time() if began is None else began, run_dir / "events.jsonl")
        self.config, self.ranks, self.run_dir = config, ranks, run_dir
        self.flags = set_deterministic() if config.train.deterministic else []
        self.data = self._open_data()
        self.engine: Engine = build_engine(config, ranks, self.data.eos_id)
        self.routers = self.engine.model.routers
        layers, experts = list(self.routers), config.model.num_experts
        self.balancer: Balancer = build_balancer(config.balance, layers, experts, config.model.top_k).to(ranks.device)
        self.tracker = load.LoadTracker(layers, experts, config.model.top_k, config.parallel.ep, ranks.device)
        self.regret = self._regret_meter(layers)
        o = config.observe
        scores = run_dir / "scores"
        self.recorder = ScoreRecorder(self.routers, config.model.top_k, o.record_from, o.record_scores, scores)
        if not resume and (balance := self.engine.read_files()) is not None:
            self.balancer.load_state_dict(balance)
            self.balancer.publish(list(self.routers.values()))
        if not resume and config.run.start_from is not None:
            start_from(self)
        self.init_hash = weights_hash(self.engine.weights(), ranks)
        self.watchdog = Watchdog(ranks, run_dir, config.train.timeout_s)
        self.saver = Saver(self.checkpoints, config.checkpoint, ranks, self.saved)
        self.progress = Progress()
        if resume:
            restore(self)
        self.guard, self.spiked = SpikeGuard(config.train.spike_sigma, self.progress.losses), False
        self.peak_tflops, self.peak_source = peak_tflops(config, ranks)
        self.clock = Clock(ranks.device)
        self.losses_3 = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        self.loss_tokens = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self.val_ce: float | None = None

        self.sinks = Sinks(run_dir, config, self.describe(), self.progress.wandb_id, enabled=ranks.is_main)
        self.progress.wandb_id = ranks.broadcast_object(self.sinks.wandb_id)  # type: ignore[assignment]

    def _open_data(self) -> TokenData:
        # A rank that cannot read what others can (another machine's disk) stops all of them, instead of leaving them to wait.
        c, d, problem, data = self.config, self.config.data, None, None
        try:
            data = TokenData.open(d.path, d.seq_len, dict(d.mix), c.run.seed, c.model.vocab_size, c.train.batch_size)
        except DataError as error:
            problem = str(error)
        for rank, found in enumerate(self.ranks.gather_objects(problem)):
            if found is not None:
                raise DataError(found if rank == 0 else f"{found} (on rank {rank})")
        assert data is not None
        return data

    # -- one step ------------------------------------------------------------------------------------------------------

    def micro_batches(self) -> list[Batch]:
        """This rank's share of the next optimizer step."""
        t = self.config.train
        per_rank = t.batch_size // self.ranks.data_size
        micro = t.micro_batch_size or per_rank
        first = self.ranks.data_rank * per_rank
        return [self.data.train_batch(self.progress.step, first + i, micro) for i in range(0, per_rank, micro)]

    def train_step(self, stop_requested: bool) -> tuple[StepResult, bool]:
        """One optimizer step in the order things happen; returns what was done and whether any rank asks to stop."""
        c = self.config
        self.engine.set_lr(learning_rate(c.optim, c.train.steps, self.progress.step))
        self.watchdog.at(f"step {self.progress.step + 1:,}, data")
        with self.goodput.part("data_wait"):
            batches = self.micro_batches()
        self.watchdog.at(f"step {self.progress.step + 1:,}")
        if self.regret is not None and self.progress.step % c.observe.regret_every == 0:
            with self.clock.regret():
                self.probe_regret(self.regret, batches)
        with self.recorder.step(self.progress.step + 1, self.ranks):
            out = self.engine.forward_backward(batches)
        with self.clock.balance():
            # ONE all-reduce, while the optimizer steps
            summing = self.ranks.start_balance_sum(out.stats, stop_requested)
        self.spiked = self.guard.sigma > 0 and not self.guard.allows(mean_ce(out, self.ranks))
        done = self.skip() if self.spiked else self.engine.step()
        with self.clock.balance():
            stats, stop = summing.wait()
            if done.applied:
                before_LE = self.balancer.bias_LE
                self.balancer.step(stats)  # from batch n the bias of batch n + 1
                self.balancer.publish(list(self.routers.values()))
                self.tracker.update(stats.tokens_per_expert, stats.tokens, before_LE, self.balancer.bias_LE)
                if self.regret is not None:
                    self.regret.count(stats.tokens_per_expert)
        self.advance(out, done)
        return done, stop

    def _regret_meter(self, layers: list[int]) -> RegretMeter | None:
        c, o = self.config, self.config.observe
        if not o.regret_every or not layers:
            return None
        m, steps_tokens = c.model, c.tokens_per_step
        return RegretMeter(
            c.balance, layers, m.num_experts, m.top_k, steps_tokens, o.regret_reservoir, c.run.seed, o.regret_tokens
        )

    def probe_regret(self, meter: RegretMeter, batches: list[Batch]) -> None:
        """The scores of the first tokens of the coming batch, with the bias that will route them."""
        ranks, device = self.ranks, self.ranks.device
        rows = max(1, meter.probe_tokens // (ranks.data_size * batches[0].tokens_BS.shape[1]))
        parts = []
        for batch in batches:
            real_T = (batch.targets_BS[:rows] != IGNORED).flatten()  # on host
            mask_T = None if bool(real_T.all()) else real_T.to(device)
            parts.append((batch.tokens_BS[:rows].to(device), mask_T))
            rows -= len(batch.tokens_BS)
            if rows <= 0:
                break
        scores_LTE = probe_scores(self.engine.model, parts, ranks)
        meter.observe(scores_LTE, self.balancer.bias_LE, ranks)

    def skip(self) -> StepResult:
        """Forget the gradients of a step whose loss stands out."""
        self.engine.discard()
        self.progress.spikes += 1
        return StepResult(math.nan, False)

    def advance(self, out: StepOutput, done: StepResult) -> None:
        """Count the step."""
        p = self.progress
        p.order_hash = self.data.order_hash(p.order_hash, p.step)
        p.step += 1
        p.skipped += not done.applied
        p.skipped_in_row = 0 if done.applied else p.skipped_in_row + 1
        if done.applied:
            self.losses_3 += out.losses_3
            self.loss_tokens += out.tokens
        p.tokens = p.step * self.config.tokens_per_step
        self.tracker.count_dropped(out.dropped)

    # -- logging -------------------------------------------------------------------------------------------------------

    def log(self, done: StepResult) -> None:
        """One logged line: means over the steps since the last one."""
        with self.clock.balance():
            metrics: dict[str, float] = self.tracker.metrics(self.progress.step, self.balancer.bias_LE)
            metrics |= self.regret.metrics() if self.regret is not None else {}
        losses = (self.ranks.sum(self.losses_3) / self.loss_tokens).tolist()  # 0/0: no step since then was applied
        self.losses_3.zero_()
        self.loss_tokens.zero_()
        steps, seconds, balance_seconds, regret_seconds = self.clock.take()
        tokens_per_s = steps * self.config.tokens_per_step / seconds
        flops = cost.flops_per_token(self.config)
        imbalance = cost.imbalance_share(self.config, metrics.get("moe/straggler_batch/mean", 1.0))
        self.goodput.imbalanced(seconds * imbalance)
        memory = max(self.ranks.gather_objects(peak_memory_gib(self.ranks.device)))
        p = self.progress
        metrics |= {
            "train/step": p.step,
            "train/tokens": p.tokens,
            "loss/total": sum(losses),
            "loss/ce": losses[0],
            "loss/aux": losses[1],
            "loss/z": losses[2],
            "optim/lr": learning_rate(self.config.optim, self.config.train.steps, p.step - 1),
            "optim/grad_norm": done.grad_norm,
            "optim/skipped_steps": p.skipped,
            "optim/loss_spikes": p.spikes,
            "speed/tokens_per_s": tokens_per_s,
            "speed/step_s": seconds / steps,
            "speed/balance_share": balance_seconds / seconds,
            "speed/regret_share": regret_seconds / seconds,
            "speed/imbalance_share": imbalance,
            "speed/tflops": tokens_per_s * flops / 1e12,
            "speed/mfu": cost.mfu(tokens_per_s, flops, self.peak_tflops),
            "memory/peak_gib": memory,
            **self.goodput.metrics(),
        }
        self.sinks.write(metrics)
        self.sinks.image({"train/step": p.step, "train/tokens": p.tokens}, self.tracker.last_load())
        if self.ranks.is_main:
            self.tracker.write_latest(self.run_dir / "loads-latest.npz")

    def evaluate(self) -> None:
        """Held-out loss and load, the bias frozen."""
        e, ranks = self.config.evaluate, self.ranks
        batches = self.data.val_batches(e.batch_size, ranks.data_rank, ranks.data_size, e.max_tokens)
        with self.goodput.part("evaluation"):
            found = evaluate(self.engine.model, self.watched(batches), ranks)
        self.val_ce = found.ce
        metrics = {
            "train/step": self.progress.step,
            "train/tokens": self.progress.tokens,
            "val/ce": found.ce,
            "val/bits_per_byte": found.ce / self.data.bytes_per_token_val / 0.6931471805599453,
            "val/tokens": found.tokens,
            **self.tracker.val_metrics(found.tokens_per_expert_LE),
        }
        self.sinks.write(metrics)

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same; each is progress."""
        for index, batch in enumerate(batches):
            self.watchdog.at(f"evaluation after step {self.progress.step:,}, batch {index + 1}")
            yield batch

    def describe(self) -> dict[str, Any]:
        """What the start-up block and run.json say."""
        return {
            "parameters_total": cost.parameter_counts(self.config).total,
            "parameters_active": cost.parameter_counts(self.config).active,
            "flops_per_token": cost.flops_per_token(self.config),
            "peak_tflops": self.peak_tflops,
            "peak_source": self.peak_source,
            "state_gib": cost.state_gib(self.config, self.ranks.world_size),
            "free_memory_gib": free_memory_gib(self.ranks.device),
            "floor": sampling_floor(
                self.config.tokens_per_step, self.config.model.num_experts, self.config.model.top_k
            ),
            "balancing_note": METHODS[method].label if (method := self.config.balance.method) in METHODS else None,
            "world_size": self.ranks.world_size,
            "device": device_name(self.ranks.device),
            "data_hash": self.data.fingerprint,
            "init_hash": self.init_hash,
            "start_step": self.progress.step,
            "run_dir": str(self.run_dir),
            "deterministic_flags": self.flags,
        }

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.run_dir / "checkpoints"

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on and that is a tensor."""
        state = {
            "engine": self.engine.state_dict(),
            "balancer": self.balancer.state_dict(),
            "tracker": self.tracker.state_dict(),
        }
        return state | ({"regret": self.regret.state_dict()} if self.regret is not None else {})

    def identity(self) -> dict[str, Any]:
        """What a resumed run may not change; steps, learning rates, logging and the layout of the ranks may."""
        c = self.config
        return {
            # Without the settings that are not used: a later version has more of them than an older checkpoint.
            "model": c.model.model_dump(exclude_none=True),
            "balance.method": c.balance.method,
            "run.seed": c.run.seed,
            "train.batch_size": c.train.batch_size,
            "data": self.data.fingerprint,
        }

    def regret_shape(self) -> list[int] | None:
        """How the measurement of the regret is kept; another one than the checkpoint's starts anew."""
        return [*self.regret.state["scores_LRE"].shape, REGRET_FORMAT] if self.regret is not None else None

    def next_samples(self) -> str:
        """A hash of the samples of the next step: a resumed run must read them, whichever version wrote the checkpoint."""
        return self.data.order_hash(self.progress.order_hash, self.progress.step)

    def save(self) -> None:
        """Begin a checkpoint of this step; `settle` ends it."""
        if self.ranks.is_main:
            self.tracker.write_npz(self.run_dir / "loads.npz")
        self.watchdog.at(f"checkpoint after step {self.progress.step:,}")
        with self.goodput.part("checkpoint"):
            own = self.checkpoints / f".own-step-{self.progress.step:08d}"
            written = self.engine.write_files(own, self.balancer.state_dict())
            self.saver.save(self.progress.step, self.state(), trainer_json(self), own if written else None)

    def settle(self) -> None:
        """Until the checkpoint that was begun is published. Raises CheckpointError, on all ranks, when it cannot be."""
        with self.goodput.part("checkpoint"):
            self.saver.wait()

    def saved(self, path: Path) -> None:
        """A checkpoint is published; rank 0, in the saver's thread."""
        self.sinks.event("save", step=manifest.step_of(path.name), checkpoint=path.name)


def train(config: Config, ranks: Ranks, run_dir: Path, resume: bool, began: float | None = None) -> Outcome:
    """Train to the end, to a signal or to the loss guard; began: time.time() of the start of the process.

    Raises DataError and CheckpointError.
    """
    signals = StopSignal()
    if ranks.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    run = Run(config, ranks, run_dir, resume, began)
    if ranks.is_main:
        (run_dir / "config.toml").write_text(to_toml(config))
        if not resume:  # a run keeps its identity; what resumed it is in events.jsonl
            about = {"run_id": uuid.uuid4().hex, **provenance(), **run.describe()}
            (run_dir / "run.json").write_text(json.dumps(about, indent=1))
        run.sinks.event("resume" if resume else "start", step=run.progress.step, **provenance())
    with run.watchdog:
        outcome = run_steps(run, signals)
    run.sinks.finish(summary(run, outcome))
    return outcome


def run_steps(run: Run, signals: StopSignal) -> Outcome:
    """All steps that are left, the evaluations and checkpoints between them, and those at the end."""
    c, p = run.config, run.progress
    profiler = Profiler(c.train.profile, run.run_dir, run.ranks)
    saved_at = p.step
    while p.step < c.train.steps:
        profiler.before(p.step)
        with run.goodput.part("productive"), run.clock.step():
            done, stop = run.train_step(signals.requested or run.saver.failed)
        profiler.after(p.step - 1)
        if p.step % c.observe.log_every == 0 or p.step == c.train.steps or not done.applied:
            run.log(done)
        if not done.applied:
            why = "loss spike" if run.spiked else "gradient not finite"
            run.sinks.event("skip", step=p.step, why=why, grad_norm=str(done.grad_norm))
        if p.skipped_in_row >= c.train.max_skipped_steps:
            run.recorder.write(run.ranks)
            run.save()
            run.settle()
            return Outcome(
                4,
                f"{p.skipped_in_row} steps in a row were skipped, because the gradient was not finite or the loss a spike "
                f"(train.max_skipped_steps = {c.train.max_skipped_steps}), at step {p.step}: "
                f"the weights are saved as they were before; lower optim.lr and --resume",
            )
        if stop:
            run.settle()  # a save that failed on any rank asks to stop, and ends the run here on all of them
            run.recorder.write(run.ranks)
            run.save()
            run.settle()
            return Outcome(75, f"stopped by a signal after step {p.step}; saved: continue with --resume")
        if c.checkpoint.every and p.step % c.checkpoint.every == 0:
            run.save()
            saved_at = p.step
        if c.evaluate.every and p.step % c.evaluate.every == 0 and p.step < c.train.steps:
            run.evaluate()
    run.recorder.write(run.ranks)
    if saved_at != p.step:
        run.save()
    run.settle()
    run.evaluate()
    return Outcome(0, "done")


def summary(run: Run, outcome: Outcome) -> dict[str, Any]:
    """The table at the end of the run."""
    late_L = load.late_maxvio(run.tracker.history(), share=0.2)
    return {
        "outcome": outcome.reason,
        "steps": run.progress.step,
        "tokens": run.progress.tokens,
        "val/ce": run.val_ce,
        "skipped_steps": run.progress.skipped,
        "late_maxvio": {f"layer_{layer:02d}": v for layer, v in zip(run.routers, late_L, strict=True)},
        "goodput": {name.removeprefix("goodput/"): share for name, share in run.goodput.metrics().items()},
        "idle_late": load.late_idle(run.tracker.history(), share=0.2),
        "run_dir": str(run.run_dir),
    }
