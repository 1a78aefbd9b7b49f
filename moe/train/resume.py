"""Going on from a checkpoint: where a run stands, which checkpoint it may take, and taking it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from moe.train import checkpoint
from moe.train.checkpoint import CheckpointError

if TYPE_CHECKING:
    from moe.train.loop import Run


@dataclass
class Progress:
    """Where the run stands; in every checkpoint."""

    step: int = 0
    tokens: int = 0
    order_hash: str = ""
    skipped: int = 0
    skipped_in_row: int = 0
    wandb_id: str | None = None
    spikes: int = 0
    losses: list[float] = field(default_factory=list)


def trainer_json(run: Run) -> dict[str, Any]:
    """What a checkpoint says of its run, in JSON."""
    return {
        "progress": asdict(run.progress),
        "next_samples": run.next_samples(),
        "identity": run.identity(),
        "config": run.config.model_dump(),
        "world_size": run.ranks.world_size,
        "regret_shape": run.regret_shape(),
        "init_hash": run.init_hash,
        "goodput": run.goodput.state(),
    }


def restore(run: Run) -> None:
    """Continue from the newest whole checkpoint that this configuration can take; every one passed over is a line.

    Raises CheckpointError on all ranks when there is none, or when the run is not the checkpoint's.
    """
    first_problem: CheckpointError | None = None
    for found in checkpoint.whole(run.checkpoints, run.ranks, lambda problem: warn(run, problem)):
        progress = check_fits(run, found)
        state = run.state()
        if found.trainer["regret_shape"] != run.regret_shape():
            state.pop("regret", None)
            warn(run, "the measurement of the regret starts anew: its settings are not the checkpoint's")
        try:
            checkpoint.load(found, state, run.ranks)
        except CheckpointError as problem:
            warn(run, f"checkpoint {found.path.name} is refused: {problem}")
            first_problem = first_problem or problem
            continue
        take(run, state)
        run.tracker.read_npz(run.run_dir / "loads.npz", progress.step)
        run.progress = progress
        run.goodput.resume(found.trainer["goodput"])
        return
    raise first_problem or checkpoint.none_whole(run.checkpoints)


def warn(run: Run, sentence: str) -> None:
    """Rank 0 says it; there are no sinks yet."""
    if run.ranks.is_main:
        print(f"warning: {sentence}", flush=True)


def check_fits(run: Run, found: checkpoint.Found) -> Progress:
    """Where a checkpoint stands. Raises CheckpointError when it is of another model, method, order or corpus."""
    name, saved, own = found.path.name, found.trainer["identity"], run.identity()
    for key in own:
        if saved.get(key) != own[key]:
            if key == "model":
                theirs, ours = saved.get("model") or {}, own["model"]
                setting = next(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
                key, was, now = f"model.{setting}", theirs.get(setting), ours.get(setting)
            else:
                was, now = saved.get(key), own[key]
            raise CheckpointError(
                f"{key} = {now!r} differs from {was!r} of checkpoint {name}: set it back, or start a new run.name"
            )
    progress = Progress(**found.trainer["progress"])
    if found.trainer["next_samples"] != run.data.order_hash(progress.order_hash, progress.step):
        raise CheckpointError(
            f"the samples after step {progress.step:,} are not those of checkpoint {name}, which another version "
            "wrote: use the alf-moe version of its run.json, or start a new run.name"
        )
    return progress


def take(run: Run, state: dict[str, Any]) -> None:
    """Put a loaded state where the next step reads it."""
    run.engine.load_state_dict(state["engine"])
    run.balancer.load_state_dict(state["balancer"])
    run.balancer.publish(list(run.routers.values()))
    run.tracker.load_state_dict(state["tracker"])
    if run.regret is not None and "regret" in state:
        run.regret.load_state_dict(state["regret"])
