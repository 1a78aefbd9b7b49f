"""DeepSpeed's own files in a checkpoint, and runs that start from them."""

from __future__ import annotations

import contextlib
import io
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.parallel import build_ranks
from moe.train import manifest
from moe.train.checkpoint import CheckpointError
from moe.train.loop import Run
from tests.corpus import make_token_folder
from tests.moe.train.engines.layouts import whole
from tests.ranks import run_ranks
from tests.tiny import CPU, tiny_config

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def build(rank: int, n: int, data: str, folder: Path, resume: bool = False, **settings) -> Run:
    base = {
        "data__path": data,
        "parallel__ep": 2,
        "train__engine": "deepspeed",
        "train__micro_batch_size": 2,
        "observe__wandb": "off",
        "observe__regret_every": 0,
        "observe__peak_tflops": 1.0,
        "checkpoint__background": False,
        "optim__lr": 1e-3,
    }
    return Run(tiny_config(n, **base | settings), build_ranks(rank, n, CPU, 2), folder, resume)


def state_of(run: Run) -> dict[str, np.ndarray]:
    """Every tensor that the next step depends on, in full."""
    state = run.engine.state_dict() | {"balancer": run.balancer.state_dict()}
    return {f"{part}/{key}": whole(value) for part in state for key, value in state[part].items()}


def refusal(rank: int, n: int, data: str, folder: Path, start_from: Path, **settings) -> str | None:
    try:
        build(rank, n, data, folder, deepspeed__start_from=str(start_from), **settings)
    except CheckpointError as error:
        return str(error)
    return None


def go(rank: int, n: int, data: str, root: str, stage: int) -> dict:
    """A run with own files, saved after two steps; who starts from them or resumes it; and what is refused."""
    folder = Path(root) / f"zero_{stage}"
    folder.mkdir(parents=True, exist_ok=True)
    run = build(rank, n, data, folder, deepspeed__zero_stage=stage, deepspeed__own_files=True)
    for _ in range(2):
        run.train_step(False)
    run.save()
    run.settle()
    found = {
        "saved": state_of(run),
        "norm": run.engine.forward_backward(run.micro_batches()) and run.engine.step().grad_norm,
    }
    saved = folder / "checkpoints" / "step-00000002"
    found["manifest"] = manifest.verify(saved)
    other = {"deepspeed__zero_stage": stage, "run__seed": 7}
    batches = run.micro_batches()
    started = build(rank, n, data, folder, deepspeed__start_from=str(saved), **other)
    found["started"], found["step"] = state_of(started), started.progress.step
    started.engine.set_lr(1e-3)
    started.engine.forward_backward(batches)
    found["started norm"] = started.engine.step().grad_norm
    found["published"] = [router.expert_bias_E.tolist() for router in started.routers.values()]
    native = build(rank, n, data, folder, resume=True, train__engine="native")
    found["resumed"] = state_of(native)
    found["other stage"] = refusal(rank, n, data, folder, saved, deepspeed__zero_stage=(stage + 1) % 4)
    found["nothing"] = refusal(rank, n, data, folder, folder / "absent", deepspeed__zero_stage=stage)
    alone, damaged = folder / "alone", folder / "damaged"
    if rank == 0:
        shutil.copytree(saved / "deepspeed", alone)
        shutil.copytree(saved, damaged)
        file = next((damaged / "deepspeed").rglob("*_states.pt"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    run.ranks.barrier()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        moved = build(rank, n, data, folder, deepspeed__start_from=str(alone), **other)
    found["moved"], found["said"] = state_of(moved), said.getvalue()
    found["damaged"] = refusal(rank, n, data, folder, damaged, deepspeed__zero_stage=stage)
    return found


def check(found: dict, stage: int, rank: int) -> None:
    assert found["manifest"] is None and found["step"] == 0
    for what in ("started", "moved", "resumed"):
        assert found[what].keys() == found["saved"].keys()
        for name, value in found["saved"].items():
            assert np.array_equal(found[what][name], value), (what, name)
    assert found["started norm"] == found["norm"]
    assert torch.tensor(found["published"]).tolist() == found["saved"]["balancer/bias"].tolist()
    assert np.abs(found["saved"]["balancer/bias"]).max() > 0
    assert f"deepspeed.zero_stage = {stage}" in found["other stage"]
    assert "is not a folder" in found["nothing"] and "damaged" in found["damaged"]
    assert ("runs any code" in found["said"]) == (rank == 0)


def every(rank: int, n: int, data: str, root: str, stages: list[int]) -> list[dict]:
    return [go(rank, n, data, root, stage) for stage in stages]


@pytest.mark.parametrize("stages", [[1], pytest.param([0, 2, 3], marks=pytest.mark.slow)])
def test_p26_deepspeed_s_files_hold_everything_and_are_read_with_care(stages, tmp_path):
    data = str(make_token_folder(tmp_path / "data"))
    for rank, found in enumerate(run_ranks(every, 2, data, str(tmp_path), stages, timeout_s=400)):
        for stage, one in zip(stages, found, strict=True):
            check(one, stage, rank)
