"""Checkpoints in the background: the state is copied, and a thread writes the copy while training goes on.

`torch.distributed.checkpoint.async_save` does the same with its own thread, but ends before the manifest and the rename,
which must be in the background too and whose failure every rank has to hear of.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from moe.config import CheckpointSection
from moe.parallel import Ranks
from moe.train import checkpoint
from moe.train.checkpoint import CheckpointError


class Saver:
    """Writes checkpoints of one run, one at a time. Every rank makes one: the thread's collectives have a group of their
    own, over gloo also beside NCCL, so that they cannot come between those of the training."""

    def __init__(self, folder: Path, section: CheckpointSection, ranks: Ranks, published: Callable[[Path], None]):
        self.folder, self.section, self.published = folder, section, published
        group = dist.new_group(backend="gloo") if ranks.dp_group is not None else None
        self.ranks = dataclasses.replace(ranks, device=torch.device("cpu"), dp_group=group)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: dict[str, Any], trainer: dict[str, Any], own: Path | None = None) -> None:
        """Copy the state and write it, in the background if the configuration says so. Called by all ranks; raises the
        CheckpointError of the save before this one, or without a background its own."""
        self.wait()
        copy = BlockingAsyncStager(cache_staged_state_dict=False).stage(state)
        self._thread = threading.Thread(
            target=self._write, args=(step, copy, trainer, own), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self.section.background:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint is published. Raises CheckpointError, on all ranks, when it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a failure: the others find out in `wait`."""
        return self._error is not None

    def _write(self, step: int, state: dict[str, Any], trainer: dict[str, Any], own: Path | None) -> None:
        s = self.section
        try:
            path = checkpoint.save(self.folder, step, state, trainer, self.ranks, s.keep, s.keep_every, own)
            if self.ranks.is_main:
                self.published(path)
        except CheckpointError as error:
            self._error = error
        except BaseException as error:  # a thread's exception would otherwise only be printed
            self._error = CheckpointError(f"the checkpoint of step {step} failed: {type(error).__name__}: {error}")
