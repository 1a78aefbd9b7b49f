"""The ways to test Triton kernels without a GPU, each in a process of its own; the slow one runs the bodies of tests/gpu."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LANES = {
    "interpreted": {"TRITON_INTERPRET": "1"},
    "compiled": {"ALF_COMPILE_LANE": "1"},
    "../gpu": {"TRITON_INTERPRET": "1", "ALF_GPU_TESTS_ON": "cpu"},
}


@pytest.mark.parametrize("lane", [pytest.param(lane, marks=[pytest.mark.slow] * (lane == "../gpu")) for lane in LANES])
def test_lane(lane: str, tmp_path: Path):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ALF_COMPILE_LANE", "ALF_GPU_TESTS_ON")}
    env |= LANES[lane] | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu or not gpu", str(HERE / lane)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parents[1])
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted and int(counted[1]) >= 5 and "skipped" not in done.stdout
