"""Every operation of kernels/cases.py under Triton's interpreter against its reference, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from kernels.backend import fused
from kernels.cases import OPS, SMALL, Case, Op, choices
from kernels.permute import sort_by_expert
from tests.kernels.compare import ALL, DTYPES, TWINS, differences, poisoned, with_gradients  # noqa: F401  (autouse)


def test_the_interpreter_is_what_runs():
    assert fused(torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "case"), ALL)
def test_equals_the_reference(op: Op, case: Case, dtype: torch.dtype):
    assert not differences(op.run, op, case.make("cpu", dtype, 0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "wrong"), TWINS)
def test_p21_a_wrong_twin_is_refused(op: Op, wrong: str, dtype: torch.dtype):
    assert differences(op.wrong[wrong], op, op.cases[0].make("cpu", dtype, 0), dtype)


@pytest.mark.parametrize(("op", "case"), ALL)
def test_p31_two_runs_are_bitwise_equal(op: Op, case: Case):
    first, second = (with_gradients(op.run, case.make("cpu", torch.float32, 0), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
def test_strided_inputs_are_taken_for_what_they_are(op: Op):
    def strided(value):
        if not (isinstance(value, Tensor) and value.dim() > 1):
            return value
        return torch.stack([value, torch.full_like(value, 7)], -1)[..., 0]

    arguments = op.cases[0].make("cpu", torch.float32, 0)
    assert not differences(op.run, op, tuple(map(strided, arguments)), torch.float32)


@pytest.mark.parametrize(("op", "case"), ALL)
def test_p28_nothing_is_read_by_the_host(op: Op, case: Case):
    """Fake tensors have no values: a read raises. The launchers do without them in the compile lane."""
    arguments = case.make("cpu", torch.float32, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
        with_gradients(op.run, fakes, torch.float32)
        ids_TK = mode.from_tensor(choices(SMALL["masked"][0], "masked", 0))
        for tile in (1, 8):
            sort_by_expert(ids_TK, 9, masked=True, tile=tile)
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        int(mode.from_tensor(torch.ones(1)).sum())
