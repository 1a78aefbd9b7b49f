"""What every test of this project has."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """Numbers that a test draws without a seed of its own are the same in each run: a failure can be seen again."""
    torch.manual_seed(0)
