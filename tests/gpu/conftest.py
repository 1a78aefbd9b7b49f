"""Tests that need a GPU: `pytest -m gpu tests/gpu`. They need torch, triton and pytest; the training step more.

ALF_GPU_TESTS_ON=cpu with TRITON_INTERPRET=1 runs the same bodies under Triton's interpreter, in small: a check of the tests.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.compare import poisoned  # noqa: F401  (autouse)

ON = os.environ.get("ALF_GPU_TESTS_ON", "cuda")


@pytest.fixture
def device() -> torch.device:
    """Where the test runs."""
    if ON == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(ON)


@pytest.fixture
def large(device: torch.device) -> bool:
    """Whether the sizes of real models fit."""
    return device.type == "cuda"
