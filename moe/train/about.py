"""What a run is: versions and commit, the device and its peak rate, a hash of the weights it began with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

import moe
from moe.config import Config
from moe.model.experts import local_part
from moe.observe import cost
from moe.parallel import Ranks
from moe.train.device import measured_peak_tflops


def provenance() -> dict[str, Any]:
    """Versions and commit of this run."""
    folder = Path(moe.__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=folder).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return {
        "alf_moe": moe.__version__,
        "git": commit or None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def device_name(device: torch.device) -> str:
    """For the start-up block and the peak table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def weights_hash(weights: Mapping[str, Tensor], ranks: Ranks) -> str:
    """A hash of all weights, whole or DTensors, that does not depend on the layout of the ranks: comparisons are refused
    when it differs."""
    parts: dict[str, str] = {}
    for name, parameter in weights.items():
        local, (first, *_) = local_part(parameter)
        unit = 1 if ".experts." in name else 0  # whole experts can be hashed where they are
        if local.shape[unit:] != parameter.shape[unit:]:
            assert isinstance(parameter, DTensor), "only these have parts"
            local, first = parameter.full_tensor().detach(), 0  # one at a time
        local = local.cpu()
        if ".experts." in name:
            parts |= {f"{name}/{first + i}": xxhash.xxh3_64_hexdigest(e.numpy().tobytes()) for i, e in enumerate(local)}
        else:
            parts[name] = xxhash.xxh3_64_hexdigest(local.numpy().tobytes())
    everything = {key: value for part in ranks.gather_objects(parts) for key, value in part.items()}
    return xxhash.xxh3_64_hexdigest(json.dumps(everything, sort_keys=True).encode())


def peak_tflops(config: Config, ranks: Ranks) -> tuple[float, str]:
    """TFLOP/s of all devices together, and where the figure is from. A collective where it is measured."""
    if config.observe.peak_tflops:
        return config.observe.peak_tflops * ranks.world_size, "observe.peak_tflops"
    known = cost.device_peak_tflops(device_name(ranks.device))
    dtype = torch.bfloat16 if config.train.compute_dtype == "bfloat16" else torch.float32
    ranks.barrier()  # all ranks measure together: they share the cores, as in training
    found = ranks.gather_objects((known or measured_peak_tflops(dtype, ranks.device), known is not None))
    return sum(rate for rate, _ in found), "data sheet" if all(sheet for _, sheet in found) else "measured"
