"""The grouped product under Triton's interpreter: what the table of cases does not ask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels.grouped_gemm as module
from kernels.cases import TOLERANCE, normal
from kernels.grouped_gemm import (
    Tiles,
    gemm_blocks,
    grouped_forward,
    grouped_gemm,
    grouped_gemm_reference,
    grouped_weight_gradient,
    row_tiles,
)


def made(
    counts: list[int], N: int, D: int, rows: int | None = None, dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """rows_RD, weight_eND, tokens_per_expert_e."""
    x = normal(sum(counts) if rows is None else rows, D, device="cpu", dtype=dtype, seed=0)
    weight = normal(len(counts), N, D, device="cpu", dtype=dtype, seed=1)
    return x, weight, torch.tensor(counts, dtype=torch.int64)


def run(fn, rows: Tensor, weight: Tensor, counts: Tensor) -> list[Tensor]:
    """Output and gradients; the upstream gradient depends on the place alone."""
    leaves = [rows.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    out = fn(*leaves, counts)
    upstream = torch.linspace(-1, 1, max(2, out.numel()))[: out.numel()].view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.bfloat16().to(out.dtype))]


def close(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> bool:
    errors = [float((f.double() - e).norm() / e.norm().clamp_min(1e-30)) for f, e in zip(found, exact, strict=True)]
    return max(errors) <= TOLERANCE[dtype]


def equals_the_reference(rows: Tensor, weight: Tensor, counts: Tensor) -> bool:
    exact = run(grouped_gemm_reference, rows.double(), weight.double(), counts)
    return close(run(grouped_gemm, rows, weight, counts), exact, rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("counts", "N", "D"),
    [
        ([65, 0, 64, 63, 1], 33, 65),  # around a tile of float32; nothing a multiple of 8, which F.grouped_mm refuses
        ([0, 0, 300, 0], 129, 7),  # around a tile of bfloat16; depth below a step
        ([700], 65, 40),  # more row tiles than the 8 that share a column
    ],
)
def test_tiles_that_do_not_fit(counts, N, D, dtype):
    assert equals_the_reference(*made(counts, N, D, dtype=dtype))


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]])
def test_p20_rows_past_the_last_group_are_zeros_and_never_read(counts):
    rows, weight, counts_e = made(counts, 24, 40, rows=sum(counts) + 150)
    rows[sum(counts) :] = torch.nan
    leaves = [rows.requires_grad_(), weight.requires_grad_()]
    out = grouped_gemm(*leaves, counts_e)
    grad_rows, grad_weight = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert (out[sum(counts) :] == 0).all() and (grad_rows[sum(counts) :] == 0).all()
    assert out.isfinite().all() and grad_weight.isfinite().all()
    assert (grad_weight[counts_e == 0] == 0).all()


def test_a_tile_writes_no_row_of_another_group(monkeypatch):
    # Of all tiles the interpreter runs the first only: no later one can mend what it should have left alone.
    rows, weight, counts = made([5, 9], 16, 8)
    make = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: make(*args, **kwargs).fill_(-1))
    blocks = gemm_blocks(rows.dtype, 14, 2)
    out = grouped_forward(rows, weight, row_tiles(counts, 14, blocks.rows)._replace(bound=1), blocks)
    assert (out[:5] != -1).all() and (out[5:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_backends_agree(dtype):
    arguments = made([40, 0, 3, 70], 48, 24, dtype=dtype)
    found = run(grouped_gemm, *arguments)
    other = run(lambda *a: grouped_gemm(*a, backend="torch"), *arguments)
    # Each is within the tolerance of the exact value.
    assert close(found, [tensor.double() for tensor in other], dtype)


def test_more_rows_in_the_groups_than_there_are_is_cut():
    rows, weight, _ = made([9, 9], 16, 8)
    out = grouped_gemm(rows, weight, torch.tensor([9, 10**6]))
    assert torch.equal(out, grouped_gemm(rows, weight, torch.tensor([9, 9])))


def test_gradients_that_nobody_asked_for_are_not_made(monkeypatch):
    rows, weight, counts = made([5, 6], 16, 8)
    monkeypatch.setattr(module, "grouped_weight_gradient", None)
    (grad,) = torch.autograd.grad(grouped_gemm(rows.requires_grad_(), weight, counts).sum(), rows)
    assert grad.shape == rows.shape


def test_p19_addresses_of_rows_beyond_32_bits():
    # The rows of expert 1 begin at row 2**21 of 1,024 values: memory that is asked for and hardly touched.
    many, dim = 2**21, 1024
    rows = torch.empty(many + 3, dim, dtype=torch.bfloat16)
    rows[many:] = normal(3, dim, device="cpu", dtype=torch.bfloat16, seed=0)
    weight = normal(2, 8, dim, device="cpu", dtype=torch.bfloat16, seed=1)
    ends = torch.tensor([many, many + 3])
    blocks = gemm_blocks(torch.bfloat16, 3, 1)._replace(depth=1024)
    out = grouped_forward(rows, weight, Tiles(torch.tensor([0, 1]), ends, 1), blocks)
    assert close([out[many:]], [rows[many:].double() @ weight[1].double().T], torch.bfloat16)


def test_p19_addresses_of_gathered_tokens_beyond_32_bits():
    many, dim, order = 2**21, 1024, torch.tensor([2 * 2**21 + 1, 3, -1])  # pairs of K = 2: tokens many, 1 and none
    x = torch.empty(many + 1, dim, dtype=torch.bfloat16)
    x[[1, many]] = normal(2, dim, device="cpu", dtype=torch.bfloat16, seed=0)
    left = normal(3, 8, device="cpu", dtype=torch.bfloat16, seed=2)
    exact = left[:2].double().T @ x[[many, 1]].double()
    ends = torch.tensor([3])
    assert close([grouped_weight_gradient(left, x, ends, order, 2, "right")[0]], [exact], torch.bfloat16)
    assert close([grouped_weight_gradient(x, left, ends, order, 2, "left")[0]], [exact.T], torch.bfloat16)


def test_p19_addresses_of_experts_beyond_32_bits():
    rows, _, counts = made([0, 3], 8, 16)
    far = torch.empty(2**31 + 128)
    weight = far.as_strided((2, 8, 16), (2**31, 16, 1))
    weight[1] = normal(8, 16, device="cpu", dtype=torch.float32, seed=1)
    blocks = gemm_blocks(torch.float32, 3, 2)
    out = grouped_forward(rows, weight, row_tiles(counts, 3, blocks.rows), blocks)
    assert close([out], [rows.double() @ weight[1].double().T], torch.float32)


def test_compiles_without_a_graph_break():
    arguments = made([5, 0, 6], 16, 8)

    def twice(rows, weight, counts):
        return 2 * grouped_gemm(rows, weight, counts)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled, *arguments), run(twice, *arguments), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_RD": torch.zeros(11, 8, dtype=torch.int32)}, "rows_RD is torch.int32: give bfloat16"),
        ({"rows_RD": torch.zeros(11, 9)}, r"weight_eND is \(2, 16, 8\) for rows_RD \(11, 9\)"),
        ({"rows_RD": torch.zeros(11)}, r"weight_eND is \(2, 16, 8\) for rows_RD \(11,\)"),
        ({"weight_eND": torch.zeros(2, 16, 8, dtype=torch.bfloat16)}, "weight_eND is torch.bfloat16 on cpu"),
        ({"weight_eND": torch.zeros(2, 16, 8, device="meta")}, "weight_eND is torch.float32 on meta"),
        ({"weight_eND": torch.zeros(16, 8)}, r"weight_eND is \(16, 8\)"),
        ({"weight_eND": torch.zeros(2, 1, 1).expand(2, 2**28, 8)}, "fewer than 2\\*\\*31 values"),
        ({"tokens_per_expert_e": torch.tensor([5, 6], dtype=torch.int32)}, "tokens_per_expert_e is torch.int32"),
        (
            {"tokens_per_expert_e": torch.tensor([5, 6, 0])},
            r"tokens_per_expert_e is torch.int64 \(3,\): give int64 \(2,\)",
        ),
        ({"tokens_per_expert_e": torch.zeros(2, dtype=torch.int64, device="meta")}, "tokens_per_expert_e is on meta"),
        ({"backend": "cuda"}, "backend = 'cuda' is not known"),
    ],
)
def test_what_it_refuses(change, message):
    rows, weight, counts = made([5, 6], 16, 8)
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**({"rows_RD": rows, "weight_eND": weight, "tokens_per_expert_e": counts} | change))
