"""The counting sort, the counts and the order after an all-to-all under Triton's interpreter, and what permute does with rows of
no pair. Values and gradients of permute are in test_ops.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cases import Shape, choices
from kernels.combine import combine
from kernels.permute import (
    Permutation,
    count_tokens,
    padded_ends,
    permute,
    regroup,
    sort_by_expert,
)
from kernels.permute_triton import SORT_BLOCK
from tests.kernels.compare import poisoned  # noqa: F401  (autouse)

IDS = [torch.int32, torch.int64]
SORTS = {  # shape (T, E, K) and routing; pairs are odd numbers, never whole blocks, from one block to some
    "one_block": (Shape(37, 0, 0, 3, 2), "uniform"),
    "blocks": (Shape(171, 0, 0, 61, 7), "uniform"),
    "many_experts": (Shape(163, 0, 0, 256, 8), "uniform"),
    "more_than_the_bins": (Shape(301, 0, 0, 1100, 1), "uniform"),
    "empty_experts": (Shape(203, 0, 0, 61, 3), "gaps"),
    "one_expert": (Shape(515, 0, 0, 61, 1), "one"),
    "masked": (Shape(171, 0, 0, 256, 7), "masked"),
    "one_token": (Shape(1, 0, 0, 3, 3), "uniform"),
    "whole_block": (Shape(SORT_BLOCK, 0, 0, 3, 1), "uniform"),
    "no_token": (Shape(0, 0, 0, 5, 2), "uniform"),
}
SETTINGS = [pytest.param(*setting, id=name) for name, setting in SORTS.items()]


def sorted_stably(ids_TK: Tensor, num_experts: int, tile: int = 1) -> Permutation:
    """What the sort must give, by torch's stable sort and a loop over the experts."""
    ids = ids_TK.reshape(-1).long()
    order = ids.sort(stable=True).indices[int((ids < 0).sum()) :]
    counts_E = torch.bincount(ids[order], minlength=num_experts)
    places = torch.full(((ids.numel() + num_experts * (tile - 1)) // tile * tile,), -1)
    start = 0
    for group in order.split(counts_E.tolist()):
        places[start : start + len(group)] = group
        start += -(-len(group) // tile) * tile
    inverse = torch.full_like(ids, -1)
    inverse[places[places >= 0]] = (places >= 0).nonzero()[:, 0]
    return Permutation(places, inverse.view_as(ids_TK), counts_E, False)


def same(found: Permutation, exact: Permutation) -> bool:
    pairs = list(zip(found[:3], exact[:3], strict=True))
    return all(f.dtype == torch.int64 and f.shape == e.shape and torch.equal(f, e) for f, e in pairs)


@pytest.mark.parametrize("dtype", IDS)
@pytest.mark.parametrize(("shape", "kind"), SETTINGS)
def test_the_sort_is_the_stable_sort(shape: Shape, kind: str, dtype: torch.dtype):
    ids_TK = choices(shape, kind, 0)
    found = sort_by_expert(ids_TK.to(dtype), shape.E, masked=kind == "masked")
    assert same(found, sorted_stably(ids_TK, shape.E))
    assert found.masked == found.padded == (kind == "masked")


@pytest.mark.parametrize("tile", [4, 128])
@pytest.mark.parametrize("name", ["one_block", "empty_experts", "masked", "no_token"])
def test_every_expert_starts_at_a_whole_tile(name: str, tile: int):
    shape, kind = SORTS[name]
    ids_TK = choices(shape, kind, 0)
    found = sort_by_expert(ids_TK, shape.E, masked=kind == "masked", tile=tile)
    assert same(found, sorted_stably(ids_TK, shape.E, tile))
    ends_E = padded_ends(found.counts_E, tile)
    starts_E = ends_E - ends_E.diff(prepend=ends_E.new_zeros(1))
    assert found.padded and (starts_E % tile == 0).all() and int(ends_E[-1]) <= len(found.order_R)
    experts_R = torch.bucketize(torch.arange(len(found.order_R)), ends_E, right=True)
    real = found.order_R >= 0
    assert torch.equal(ids_TK.reshape(-1)[found.order_R[real]], experts_R[real])


@pytest.mark.parametrize("wrong", ["unstable", "experts shifted", "counts shifted"])
def test_p21_a_wrong_sort_is_refused(wrong: str):
    shape, kind = SORTS["blocks"]
    ids_TK = choices(shape, kind, 0)
    exact = sorted_stably(ids_TK, shape.E)
    if wrong == "unstable":
        last = ids_TK.numel() - 1
        order_R = last - ids_TK.reshape(-1).flip(0).sort(stable=True).indices
        assert torch.equal(ids_TK.reshape(-1)[order_R], ids_TK.reshape(-1)[exact.order_R])
        assert not same(exact._replace(order_R=order_R), exact)
    elif wrong == "experts shifted":
        assert not same(sort_by_expert((ids_TK + 1) % shape.E, shape.E), exact)
    else:
        assert not same(exact._replace(counts_E=exact.counts_E.roll(1)), exact)


def test_two_sorts_are_equal_and_strided_ids_are_taken_for_what_they_are():
    ids_TK = choices(Shape(90, 0, 0, 16, 6), "uniform", 3)
    strided = torch.stack([ids_TK, torch.full_like(ids_TK, 7)], -1)[..., 0]
    first, second = sort_by_expert(ids_TK, 16), sort_by_expert(strided, 16)
    assert same(first, second) and torch.equal(count_tokens(strided, 16), first.counts_E)


@pytest.mark.parametrize("masked", [False, True])
def test_ids_that_are_no_expert_get_no_row(masked: bool):
    ids_TK = choices(Shape(70, 0, 0, 33, 5), "uniform", 1)
    cut = torch.where(ids_TK < 20, ids_TK, -1)
    assert same(sort_by_expert(ids_TK, 20, masked), sorted_stably(cut, 20))
    assert torch.equal(count_tokens(ids_TK, 20), count_tokens(cut, 20))


@pytest.mark.parametrize("dtype", IDS)
@pytest.mark.parametrize(("tokens", "bins"), [(0, 3), (1, 1), (700, 3), (400, 61), (333, 256), (350, 2500)])
def test_counts(tokens: int, bins: int, dtype: torch.dtype):
    ids = torch.randint(-1, bins, (tokens, 3), generator=torch.Generator().manual_seed(bins))
    found = count_tokens(ids.to(dtype), bins)
    assert found.dtype == torch.int64 and torch.equal(found, torch.bincount(ids[ids >= 0], minlength=bins))
    assert torch.equal(count_tokens(ids.to(dtype)[:, 0], bins), torch.bincount(ids[:, 0] + 1, minlength=bins + 1)[1:])


@pytest.mark.parametrize("tile", [1, 8])
def test_rows_of_no_pair_are_zeros_and_give_no_gradient(tile: int):
    ids_TK = choices(Shape(41, 0, 0, 9, 4), "masked", 0)
    found = sort_by_expert(ids_TK, 9, masked=True, tile=tile)
    none = found.order_R < 0
    real = int((ids_TK >= 0).sum())
    assert len(found.order_R) == (41 * 4 + 9 * (tile - 1)) // tile * tile and int(none.sum()) == len(none) - real
    assert tile > 1 or (none.nonzero() >= real).all()  # real rows first
    x = torch.randn(41, 24, requires_grad=True)
    rows = permute(x, found)
    assert (rows[none] == 0).all() and rows.isfinite().all()
    (grad,) = torch.autograd.grad(rows, x, torch.where(none[:, None], torch.nan, 1.0).expand_as(rows))
    assert torch.equal(grad, (ids_TK >= 0).sum(1)[:, None].expand(41, 24).float())


def test_all_tokens_masked_and_no_token():
    found = sort_by_expert(torch.full((6, 2), -1), 4, masked=True)
    assert (found.order_R == -1).all() and (found.inverse_TK == -1).all() and (found.counts_E == 0).all()
    x = torch.randn(6, 8, requires_grad=True)
    out = combine(permute(x, found), torch.ones(6, 2), found)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (out == 0).all() and (grad == 0).all()
    for tile, rows in ((1, 0), (16, 48)):  # 4 experts * 15 and nothing to pad: whole tiles
        empty = sort_by_expert(torch.empty(0, 2, dtype=torch.int64), 4, tile=tile)
        assert permute(x[:0], empty).shape == (rows, 8) and (permute(x[:0], empty) == 0).all()


def test_the_gradient_is_summed_in_float32_and_float64_stays_float64():
    """256 + 6 ones: each would be lost to 256 in bfloat16."""
    found = sort_by_expert(torch.arange(7)[None, :], 7)
    x = torch.zeros(1, 32, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.tensor([256.0] + [1.0] * 6)[:, None].expand(7, 32).bfloat16()
    (grad,) = torch.autograd.grad(permute(x, found), x, upstream)
    assert (grad == 262).all() and grad.dtype == torch.bfloat16
    y = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0] + [2.0**-40] * 6, dtype=torch.float64)[:, None].expand(7, 4)
    (grad,) = torch.autograd.grad(permute(y, found), y, upstream)
    assert (grad == 1 + 6 * 2.0**-40).all()


COUNTS = [[[3, 0, 2], [1, 4, 0]], [[0, 0], [0, 0]], [[5]], [[0, 7, 0, 1], [2, 0, 0, 0], [1, 1, 1, 1]]]


@pytest.mark.parametrize("counts", COUNTS)
def test_regroup_is_the_sort_of_the_rows_local_experts(counts: list[list[int]]):
    counts_pe = torch.tensor(counts)
    ranks, local = counts_pe.shape
    rows = int(counts_pe.sum())
    expert_of_row = torch.arange(local).repeat(ranks).repeat_interleave(counts_pe.view(-1))
    found = regroup(counts_pe, rows)
    assert same(found, sort_by_expert(expert_of_row[:, None], local))
    assert same(regroup(counts_pe.int(), rows), found)
    x = torch.randn(rows, 8)
    undo = Permutation(found.inverse_TK[:, 0], found.order_R[:, None], found.counts_E, False)
    assert torch.equal(permute(permute(x, found), undo), x)


def test_one_compiled_graph_forward_and_backward():
    def layer(x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        found = sort_by_expert(ids, 9, masked=True, tile=4)
        after = regroup(found.counts_E.view(3, 3), 90)
        rows = permute(permute(x, found)[:90], after)
        return combine(permute(x, found) * 2.0, weights, found), rows + count_tokens(ids, 9).sum()

    ids_TK = choices(Shape(30, 0, 0, 9, 3), "uniform", 2)
    results = []
    for fn in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 30 * 16).view(30, 16).requires_grad_()
        weights = torch.linspace(0, 1, 90).view(30, 3).requires_grad_()
        out, rows = fn(x, weights, ids_TK)
        results.append((out, rows, *torch.autograd.grad(out.sum() + rows.square().sum(), [x, weights])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_agree_with_their_fakes():
    x, ids_TK = torch.randn(5, 8, requires_grad=True), choices(Shape(5, 0, 0, 4, 2), "uniform", 0)
    found = sort_by_expert(ids_TK, 4, tile=4)
    ops = torch.ops.alf_moe
    torch.library.opcheck(ops.count_tokens.default, (ids_TK.view(-1), 4))
    torch.library.opcheck(ops.sort_by_expert.default, (ids_TK.int(), 4, 4))
    torch.library.opcheck(ops.permute.default, (x, found.order_R, found.inverse_TK))
    torch.library.opcheck(ops.permute_backward.default, (torch.randn(len(found.order_R), 8), found.inverse_TK))
