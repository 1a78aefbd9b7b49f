"""What is inside a checkpoint, read by one process without a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe.parallel import Ranks
from moe.train import manifest
from moe.train.census import expert_census
from moe.train.checkpoint import DCP_FAILURES, census_difference

MODEL = "engine.model."


def read_tensors(checkpoint: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Tensors by their path in the state, whole, on the CPU: all of them, or those with a wanted name. Unpickles metadata:
    `manifest.verify` comes first."""
    entries = dcp.FileSystemReader(checkpoint / "state").read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and wanted(name)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        dcp.load(tensors, checkpoint_id=checkpoint / "state", no_dist=True)
    return tensors


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes: 0.0 is not -0.0, and a NaN is itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def verify_all(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its files, then the experts against the census."""
    if problem := manifest.verify(checkpoint):
        return problem
    try:
        tensors = read_tensors(checkpoint)
    except DCP_FAILURES as error:
        return f"state cannot be read ({type(error).__name__})"
    model = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    alone = Ranks(0, 1, torch.device("cpu"))
    return census_difference(manifest.read_census(checkpoint), expert_census(model, alone))
