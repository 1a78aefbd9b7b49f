"""The fused routed experts under Triton's interpreter: what the table of cases does not ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import kernels.moe_mlp as module
from kernels.cases import MOE_MLP, TOLERANCE, Shape, normal
from kernels.grouped_gemm import gemm_blocks, row_tiles
from kernels.moe_mlp import (
    down_backward,
    moe_mlp,
    moe_mlp_reference,
    saved_bytes_per_token,
    swiglu_blocks,
    up_forward,
)
from kernels.permute import Permutation, sort_by_expert

NAMES = ("x_TD", "topk_weights_TK", "permutation", "w13_e2FD", "w2_eDF")


def made(case: str = "odd", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """x_TD, topk_weights_TK, permutation, w13_e2FD, w2_eDF of a case."""
    return next(c for c in MOE_MLP.cases if c.name == case).make("cpu", dtype, 0)


def run(fn, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Output and the gradients of x, topk_weights, w13 and w2; the upstream gradient depends on the place alone."""
    arguments = tuple(a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)
    out = fn(*arguments)
    upstream = torch.linspace(-1, 1, max(2, out.numel()))[: out.numel()].view_as(out).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [a for a in arguments if isinstance(a, Tensor)], upstream)]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def equals_the_reference(arguments: tuple[Any, ...]) -> bool:
    doubled = tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)
    pairs = zip(run(moe_mlp, arguments), run(moe_mlp_reference, doubled), strict=True)
    return all(error(found, exact) <= TOLERANCE[arguments[0].dtype] for found, exact in pairs)


def launched(
    x: Tensor, weights: Tensor, p: Permutation, w13: Tensor, w2: Tensor, bound: int | None = None
) -> list[Tensor]:
    """h, gu, grad_gu and wh of the two kernels, for x as the gradient of the output; of the first `bound` tiles only."""
    blocks = gemm_blocks(x.dtype, len(p.order_R), len(w13))
    tiles = row_tiles(p.counts_E, len(p.order_R), blocks.rows)
    tiles = tiles._replace(bound=tiles.bound if bound is None else bound)
    h, gu = up_forward(x, p.order_R, w13, tiles, swiglu_blocks(blocks), p.inverse_TK.shape[1], True)
    grad_gu, wh, _ = down_backward(x, weights, p.order_R, w2, gu, tiles, swiglu_blocks(blocks))
    return [h, gu, grad_gu, wh]


def test_float16():
    # At most four roundings in a row, 0.43 * 2**-11 in norm each (2**-11 at most a value): 0.86 of the bound.
    assert equals_the_reference(made(dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_a_multiple_of_eight(dtype):
    shape = Shape(29, 33, 17, 5, 3)
    ids = torch.rand(shape.T, shape.E, generator=torch.Generator().manual_seed(0)).topk(shape.K).indices
    x = normal(shape.T, shape.D, device="cpu", dtype=dtype, seed=1)
    weights = normal(shape.T, shape.K, device="cpu", dtype=torch.float32, seed=2)  # also negative ones
    w13 = normal(shape.E, 2 * shape.F, shape.D, device="cpu", dtype=torch.float32, seed=3).mul(0.2).to(dtype)
    w2 = normal(shape.E, shape.D, shape.F, device="cpu", dtype=torch.float32, seed=4).mul(0.2).to(dtype)
    assert equals_the_reference((x, weights, sort_by_expert(ids, shape.E), w13, w2))


def test_p11_rows_without_a_pair_inside_a_group_are_zeros():
    x, weights, p, w13, w2 = made()
    order, inverse = p.order_R.clone(), p.inverse_TK.clone()
    for row in (0, 20, len(order) - 1):
        inverse.view(-1)[order[row]] = -1
        order[row] = -1
    holes = p._replace(order_R=order, inverse_TK=inverse, masked=True)
    assert equals_the_reference((x, weights, holes, w13, w2))
    missing = inverse < 0
    grad_weights = run(moe_mlp, (x, weights, holes, w13, w2))[2]
    assert missing.sum() == 3 and (grad_weights[missing] == 0).all() and (grad_weights[~missing] != 0).all()


def test_p20_the_tail_of_masked_tokens_is_written_as_zeros():
    x, weights, p, w13, w2 = made("masked")
    real = int(p.counts_E.sum())
    assert real < len(p.order_R) and (p.order_R[real:] == -1).all()  # there is a tail
    for written in launched(x, weights, p, w13, w2):
        assert (written[real:] == 0).all() and (written[:real] != 0).any(1).all()


def test_p11_a_row_without_a_pair_reads_no_token():
    x, weights, p, w13, w2 = made()
    holes = (p.order_R >= 30) & (p.order_R < 40)  # pairs of tokens 10 to 13
    x[0] = torch.nan
    p = p._replace(order_R=torch.where(holes, -1, p.order_R), masked=True)
    for written in launched(x, weights, p, w13, w2):
        assert holes.sum() == 10 and (written[holes] == 0).all()


def test_a_tile_writes_no_row_of_another_group(monkeypatch):
    # Of all tiles the interpreter runs the first only: no later one can mend what it should have left alone.
    x, weights, p, w13, w2 = made()
    for owner, name in ((Tensor, "new_empty"), (torch, "empty_like")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, make=make, **kwargs: make(*args, **kwargs).fill_(-1))
    first = int(p.counts_E[0])
    for written in launched(x, weights, p, w13, w2, bound=1):
        assert 0 < first < 64 and (written[:first] != -1).all() and (written[first:] == -1).all()


@pytest.mark.parametrize("tokens", [0, 6])
def test_no_row_at_all(tokens):
    _, _, _, w13, w2 = made()
    ids = torch.full((tokens, 3), -1)
    x = normal(tokens, w13.shape[2], device="cpu", dtype=torch.float32, seed=0)
    p = sort_by_expert(ids, len(w13), masked=True)
    for order in (p.order_R, p.order_R[:0]):  # as Triton and as torch sort
        for tensor in run(moe_mlp, (x, torch.ones(tokens, 3), p._replace(order_R=order), w13, w2)):
            assert (tensor == 0).all()


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same(monkeypatch):
    arguments = made()
    kept: list[int] = []
    up = module.up_forward

    def watched(*args):
        h, gu = up(*args)
        kept.append(gu.numel())
        return h, gu

    monkeypatch.setattr(module, "up_forward", watched)
    plain = moe_mlp(*arguments)
    arguments[0].requires_grad_()
    with torch.no_grad():
        quiet = moe_mlp(*arguments)
    assert torch.equal(moe_mlp(*arguments), plain) and torch.equal(quiet, plain)
    assert kept[:2] == [0, 0] and kept[2] > 0


def test_what_is_saved_is_what_the_table_says():
    x, weights, p, w13, w2 = made(dtype=torch.bfloat16)
    saved: dict[int, int] = {}
    w13.requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_mlp(x, weights, p, w13, w2)
    for parameter in (w13, w2, p.counts_E):
        del saved[parameter.untyped_storage().data_ptr()]
    tokens, top_k = weights.shape
    assert sum(saved.values()) == tokens * saved_bytes_per_token(x.shape[1], w2.shape[2], top_k)["moe_mlp"]


def test_p19_addresses_beyond_32_bits():
    # Two tokens of 2**21 + 1 have a row; the rest of x is memory that is asked for and never touched.
    many, dim, hidden, top_k = 2**21, 1024, 8, 2
    x = torch.empty(many + 1, dim, dtype=torch.bfloat16)
    x[[1, many]] = normal(2, dim, device="cpu", dtype=torch.bfloat16, seed=0)
    w13 = normal(1, 2 * hidden, dim, device="cpu", dtype=torch.float32, seed=1).mul(dim**-0.5).bfloat16()
    w2 = normal(1, dim, hidden, device="cpu", dtype=torch.float32, seed=2).bfloat16()
    order = torch.tensor([top_k * many + 1, top_k * 1])
    blocks = swiglu_blocks(gemm_blocks(x.dtype, 2, 1))
    tiles = row_tiles(torch.tensor([2]), 2, blocks.rows)
    h, gu = up_forward(x, order, w13, tiles, blocks, top_k, True)
    gate, up = (x[[many, 1]].double() @ w13[0].double().T).chunk(2, 1)
    exact = torch.nn.functional.silu(gate) * up
    assert error(h, exact) <= TOLERANCE[x.dtype] and error(gu, torch.cat([gate, up], 1)) <= TOLERANCE[x.dtype]
    weights = torch.ones(many + 1, top_k)
    _, _, grad_weights = down_backward(x, weights, order, w2, gu, tiles, blocks)  # x as the gradient of the output
    found = torch.stack([grad_weights[many, 1], grad_weights[1, 0]])
    assert error(found, ((x[[many, 1]].double() @ w2[0].double()) * exact).sum(1)) <= TOLERANCE[x.dtype]


def test_compiles_without_a_graph_break():
    arguments = made(dtype=torch.bfloat16)

    def twice(*args):
        return 2 * moe_mlp(*args)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled, arguments), run(twice, arguments), strict=True):
        assert torch.equal(found, expected)


def _with(**fields: Tensor) -> dict[str, Permutation]:
    return {"permutation": made()[2]._replace(**fields)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": torch.zeros(37, 40, dtype=torch.int32)}, "x_TD is torch.int32: give bfloat16"),
        ({"x_TD": torch.zeros(36, 40)}, r"inverse_TK is \(37, 3\): give \[36, K\]"),
        ({"x_TD": torch.zeros(37, 41)}, r"w13_e2FD is \(7, 48, 40\) for x_TD \(37, 41\)"),
        ({"w13_e2FD": torch.zeros(7, 47, 40)}, r"w13_e2FD is \(7, 47, 40\)"),
        (
            {
                "w13_e2FD": torch.zeros(1, 1, 1).expand(7, 2**26, 40),
                "w2_eDF": torch.zeros(1, 1, 1).expand(7, 40, 2**25),
            },
            "fewer than 2\\*\\*31 values",
        ),
        ({"w2_eDF": torch.zeros(7, 24, 40)}, r"w2_eDF is \(7, 24, 40\): give \(7, 40, 24\)"),
        ({"w13_e2FD": torch.zeros(2, 48, 40), "w2_eDF": torch.zeros(2, 40, 24)}, "K at most the 2 experts"),
        ({"w2_eDF": torch.zeros(7, 40, 24, dtype=torch.bfloat16)}, "w2_eDF is torch.bfloat16: give torch.float32"),
        ({"w2_eDF": torch.zeros(7, 40, 24, device="meta")}, "w2_eDF is on meta: give cpu"),
        (
            {"topk_weights_TK": torch.zeros(37, 2)},
            r"topk_weights_TK is torch.float32 \(37, 2\): give float32 \(37, 3\)",
        ),
        ({"topk_weights_TK": torch.zeros(37, 3, dtype=torch.bfloat16)}, "topk_weights_TK is torch.bfloat16"),
        (_with(counts_E=torch.zeros(6, dtype=torch.int64)), r"counts_E is \(6,\): give \(7,\)"),
        (_with(order_R=torch.zeros(111, dtype=torch.int32)), "order_R is torch.int32 on cpu: give int64"),
        (_with(inverse_TK=torch.zeros(37, 3, dtype=torch.int64, device="meta")), "inverse_TK is torch.int64 on meta"),
        (_with(order_R=torch.zeros(112, dtype=torch.int64)), r"order_R is \(112,\): give at most 111 rows"),
    ],
)
def test_what_it_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        moe_mlp(**(dict(zip(NAMES, made(), strict=True)) | change))


def test_a_permutation_with_padded_groups_is_refused():
    x, weights, _, w13, w2 = made()
    ids = torch.rand(37, 7, generator=torch.Generator().manual_seed(0)).topk(3).indices
    with pytest.raises(ValueError, match="tile = 1"):
        moe_mlp(x, weights, sort_by_expert(ids, 7, tile=4), w13, w2)
