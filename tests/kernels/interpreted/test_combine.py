"""What combine does with rows of no pair, its operators and its refusals. Values and gradients are in test_ops.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cases import Shape, choices
from kernels.combine import combine
from kernels.permute import sort_by_expert
from tests.kernels.compare import poisoned  # noqa: F401  (autouse)

IDS_TK = choices(Shape(41, 0, 0, 9, 4), "masked", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, 8])
def test_rows_of_no_pair_are_not_read_and_their_gradient_is_zero(tile: int, dtype: torch.dtype):
    found = sort_by_expert(IDS_TK, 9, masked=True, tile=tile)
    none = found.order_R < 0
    rows = torch.where(none[:, None], torch.nan, torch.ones(len(none), 24)).to(dtype).requires_grad_()
    weights = torch.full((41, 4), 0.25, requires_grad=True)
    out = combine(rows, weights, found)
    grad_rows, grad_weights = torch.autograd.grad(out, [rows, weights], torch.ones_like(out))
    real = (IDS_TK >= 0).float()
    assert torch.equal(out.float(), (real.sum(1) / 4)[:, None].expand(41, 24))
    assert torch.equal(grad_rows.float(), torch.where(none, 0.0, 0.25)[:, None].expand_as(rows))
    assert torch.equal(grad_weights, 24 * real)


def test_rows_may_end_after_the_last_pair():
    """An all-to-all sends and returns the real rows only."""
    found = sort_by_expert(IDS_TK, 9, masked=True)
    whole = torch.randn(len(found.order_R), 24)
    weights = torch.rand(41, 4)
    results = []
    for rows in (whole, whole[: int(found.counts_E.sum())]):
        rows = rows.clone().requires_grad_()
        out = combine(rows, weights, found)
        (grad,) = torch.autograd.grad(out, rows, torch.ones_like(out))
        results.append((out, grad[: int(found.counts_E.sum())]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tile", [1, 16])
def test_no_token(tile: int):
    found = sort_by_expert(IDS_TK[:0], 9, tile=tile)
    rows = torch.randn(len(found.order_R), 8, requires_grad=True)
    out = combine(rows, torch.ones(0, 4), found)
    (grad,) = torch.autograd.grad(out.sum(), rows)
    assert out.shape == (0, 8) and (grad == 0).all()


def test_a_gradient_that_is_expanded_or_transposed():
    found = sort_by_expert(IDS_TK, 9, masked=True)
    results = []
    for upstream in (torch.ones(24, 41).T, torch.ones(1, 1).expand(41, 24), torch.ones(41, 24)):
        rows = torch.linspace(-1, 1, len(found.order_R) * 24).view(-1, 24).requires_grad_()
        results.append(torch.autograd.grad(combine(rows, torch.ones(41, 4), found), rows, upstream)[0])
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])


def test_operators_agree_with_their_fakes():
    found = sort_by_expert(IDS_TK, 9, masked=True, tile=4)
    rows, weights = torch.randn(len(found.order_R), 8, requires_grad=True), torch.rand(41, 4, requires_grad=True)
    indices: tuple[Tensor, ...] = (found.inverse_TK, found.order_R)
    torch.library.opcheck(torch.ops.alf_moe.combine.default, (rows, weights, *indices))
    grad = torch.randn(41, 8)
    plain = (grad, rows.detach(), weights.detach(), *indices)
    torch.library.opcheck(torch.ops.alf_moe.combine_backward.default, plain)


def test_p32_what_does_not_fit_is_refused():
    found = sort_by_expert(IDS_TK, 9, masked=True)
    rows, weights = torch.randn(len(found.order_R), 8), torch.rand(41, 4)
    with pytest.raises(ValueError, match=r"weights_TK is \(41, 3\).*a weight for every pair"):
        combine(rows, weights[:, :3], found)
    with pytest.raises(ValueError, match=r"weights_TK is torch.bfloat16 on cpu: give float32 on cpu"):
        combine(rows, weights.bfloat16(), found)
    with pytest.raises(ValueError, match=r"weights_TK is torch.float32 on meta"):
        combine(rows, weights.to("meta"), found)
    with pytest.raises(ValueError, match=r"rows_RD is \(165, 8\): give \[R, D\] with R = 164"):
        combine(torch.cat([rows, rows[:1]]), weights, found)
    with pytest.raises(ValueError, match="rows_RD is on meta: give it on cpu"):
        combine(rows.to("meta"), weights, found)
