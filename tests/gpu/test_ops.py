"""Every operation and gradient on hardware against its reference in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import fused
from kernels.cases import MODELS, MOE_MLP, PERMUTE, Case, Op, moe_mlp_case
from tests.kernels.compare import ALL, DTYPES, TWINS, differences, with_gradients

pytestmark = pytest.mark.gpu


def test_the_kernels_are_what_runs(device: torch.device):
    assert fused(torch.zeros(1, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "case"), ALL)
def test_p20_equals_the_reference_on_poisoned_memory(op: Op, case: Case, dtype: torch.dtype, device: torch.device):
    assert not differences(op.run, op, case.make(device, dtype, 0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "wrong"), TWINS)
def test_p21_a_wrong_twin_is_refused(op: Op, wrong: str, dtype: torch.dtype, device: torch.device):
    assert differences(op.wrong[wrong], op, op.cases[0].make(device, dtype, 0), dtype)


@pytest.mark.parametrize("name", ["1B", "fine"])
def test_the_experts_of_a_model_equal_the_reference(name: str, device: torch.device, large: bool):
    shape = MODELS[name]._replace(T=1024) if large else MODELS[name]._replace(T=24, D=40, F=24, E=8, K=3)
    case = moe_mlp_case(name, shape, "uniform")
    assert not differences(MOE_MLP.run, MOE_MLP, case.make(device, torch.bfloat16, 0), torch.bfloat16)


@pytest.mark.parametrize(("op", "case"), [*ALL, pytest.param(PERMUTE, PERMUTE.cases[0], id="twice")])
def test_p31_two_runs_are_bitwise_equal(op: Op, case: Case, device: torch.device):
    runs = (with_gradients(op.run, case.make(device, torch.bfloat16, 0), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
