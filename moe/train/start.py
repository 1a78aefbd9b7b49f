"""Starting from a Hugging Face checkpoint: its weights and expert bias at step 0, a fresh optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe.config import Config, ConfigError
from moe.interop.hf import Checkpoint, HfError
from moe.train.checkpoint import CheckpointError
from moe.train.folder import file_hash, read_meta

if TYPE_CHECKING:
    from moe.train.loop import Run

FREE = {"init_std", "scale_residual_init", "train_router"}  # of no weight that is there
FREE_UPCYCLED = FREE | {"score_function", "num_groups", "group_top_k"}  # of the router, which is new


def start_from(run: Run) -> None:
    """Take the weights and the bias of run.start_from, on every rank its part. A collective; raises CheckpointError on all
    ranks when the checkpoint cannot be read, is not of this model, or has another tokenizer than the data."""
    c, folder = run.config, Path(str(run.config.run.start_from))
    found: list[Checkpoint] = []
    experts = {"num_experts": c.model.num_experts, "top_k": c.model.top_k}  # that a dense one is to become
    together(run, lambda: found.append(Checkpoint(folder, experts)))
    (checkpoint,) = found
    together(run, lambda: check(c, checkpoint))
    state = run.engine.state_dict()
    together(run, lambda: checkpoint.fill(state["model"]))
    for moment in state["optimizer"].values():  # torch made them by a step of its own, and counted it
        moment.zero_()
    run.engine.load_state_dict(state)
    if run.routers:
        names = [f"blocks.{layer}.moe.router.expert_bias_E" for layer in run.routers]
        bias_LE = torch.stack([state["model"][name] for name in names])
        run.balancer.load_state_dict(run.balancer.state_dict() | {"bias": bias_LE})
        run.balancer.publish(list(run.routers.values()))


def together(run: Run, work: Callable[[], object]) -> None:
    """Every rank works; all of them fail when one does."""
    problem = None
    try:
        work()
    except (HfError, ConfigError, OSError) as error:
        problem = str(error)
    for rank, said in enumerate(run.ranks.gather_objects(problem)):
        if said is not None:
            where = "" if rank == 0 else f" (on rank {rank})"
            raise CheckpointError(f"run.start_from = {run.config.run.start_from!r}: {said}{where}")


def check(config: Config, checkpoint: Checkpoint) -> None:
    """Raises HfError when it is of another model, or has another tokenizer than the data."""
    for name, ours in config.model:
        theirs = getattr(checkpoint.model, name)
        if name not in (FREE if checkpoint.sparse else FREE_UPCYCLED) and ours != theirs:
            raise HfError(
                f"model.{name} = {ours!r} differs from its {theirs!r}: take the [model] section that alf-moe import writes"
            )
    tokenizer = checkpoint.folder / "tokenizer.json"
    if tokenizer.exists():
        used = read_meta(Path(config.data.path), verify=False)["tokenizer"]["xxh3"]
        if used != file_hash(tokenizer):
            raise HfError(
                f"data.path = {config.data.path!r} was prepared with another tokenizer than its own: run "
                f"alf-moe prepare --tokenizer {checkpoint.folder}"
            )
