"""Both dispatchers do the same: one conformance test. And what padded dispatch does without room. pNN: pitfall NN."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import kernels.permute
from kernels.combine import combine
from kernels.permute import count_tokens, permute, sort_by_expert
from moe.balance.stats import RouterStats
from moe.model.dispatch import AllToAllDispatcher, PaddedDispatcher, pack, unpack
from moe.model.router import Routing
from moe.parallel import build_ranks
from tests.ranks import run_ranks
from tests.tiny import CPU

T, D, E, K = 24, 8, 8, 3
ROUTINGS = ("random", "masked", "one expert", "one rank", "none at all")
KINDS = {"exact": None, "padded": 8.0}


def routing_of(kind: str, rank: int) -> Routing:
    g = torch.Generator().manual_seed(rank)
    ids = torch.rand(T, E, generator=g).topk(K).indices
    if kind == "one expert":  # and its neighbours: K different ones
        ids = torch.tensor([5, 6, 7]).expand(T, K).contiguous()
    if kind == "one rank":
        ids = torch.rand(T, E // 2, generator=g).topk(K).indices
    mask_T = torch.rand(T, generator=g) < 0.5 if kind == "masked" else torch.full((T,), kind != "none at all")
    masked = kind in ("masked", "none at all")
    ids = torch.where(mask_T[:, None], ids, -1) if masked else ids
    weights = torch.rand(T, K, generator=g).requires_grad_()
    stats = RouterStats(torch.tensor(T), count_tokens(ids, E))
    return Routing(weights, ids, torch.empty(0), stats, None, masked)  # type: ignore[arg-type]


def x_of(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(100 + rank)).to(dtype).requires_grad_()


def expert(rows_RD: torch.Tensor, counts_e: torch.Tensor, first: int) -> torch.Tensor:
    """Expert k multiplies by k + 1 and is not linear; rows after the last expert's are as undefined as a product's."""
    of = torch.repeat_interleave(torch.arange(first, first + len(counts_e)), counts_e)
    factor = torch.full((len(rows_RD),), torch.nan)
    factor[: len(of)] = of + 1.0
    return (rows_RD.float() * factor[:, None]).sin().to(rows_RD.dtype)


def results(out, x, weights):
    out.backward(torch.arange(out.numel(), dtype=out.dtype).view_as(out) / 100)
    return [t.detach().float().numpy() for t in (out, x.grad, weights.grad)]


def local(kind, rank, dtype):
    """The same without any dispatcher."""
    x, routing = x_of(rank, dtype), routing_of(kind, rank)
    p = sort_by_expert(routing.topk_ids_TK, E, routing.masked)
    rows = expert(permute(x, p), p.counts_E, 0)
    return results(combine(rows, routing.topk_weights_TK, p), x, routing.topk_weights_TK)


def cases(rank, n):
    group, found = build_ranks(rank, n, CPU, n).ep_group, {}
    assert group is not None
    for name, factor in KINDS.items():
        dispatcher = AllToAllDispatcher(E, group) if factor is None else PaddedDispatcher(E, group, factor)
        for kind, dtype in itertools.product(ROUTINGS, (torch.float32, torch.bfloat16)):
            x, routing = x_of(rank, dtype), routing_of(kind, rank)
            rows, plan = dispatcher.dispatch(x, routing).arrive()
            counts = plan.tokens_per_local_expert_e
            everyone = sum(routing_of(kind, r).stats.tokens_per_expert for r in range(n))
            assert counts.tolist() == everyone.view(n, -1)[rank].tolist()
            assert not rows[int(counts.sum()) :].any()  # nothing but zeros after the last expert's
            out = dispatcher.combine(expert(rows, counts, rank * E // n), plan)
            assert plan.dropped is None or int(plan.dropped) == 0
            found[name, kind, dtype] = results(out, x, routing.topk_weights_TK)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return run_ranks(cases, request.param)


def test_p18_every_dispatcher_equals_no_dispatcher(ranks):
    for rank, found in enumerate(ranks):
        for (name, kind, dtype), arrays in found.items():
            close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            for array, expected in zip(arrays, local(kind, rank, dtype), strict=True):
                np.testing.assert_allclose(array, expected, **close, err_msg=f"{name} {kind} {dtype} on rank {rank}")


def test_padded_with_room_enough_is_exact_to_the_bit(ranks):
    for found in ranks:
        for name, kind, dtype in found:
            for a, b in zip(found[name, kind, dtype], found["exact", kind, dtype], strict=True):
                assert np.array_equal(a, b), (kind, dtype)


def overflowing(rank, n):
    group = build_ranks(rank, n, CPU, n).ep_group
    assert group is not None
    dispatcher = PaddedDispatcher(E, group, 1.0)
    x, routing = x_of(rank, torch.float32), routing_of("one rank", rank)
    rows, plan = dispatcher.dispatch(x, routing).arrive()
    out = dispatcher.combine(rows, plan)
    return (
        int(plan.dropped),
        len(rows),
        results(out, x, routing.topk_weights_TK),
        plan.tokens_per_local_expert_e.tolist(),
    )


def test_pairs_without_room_are_counted_exactly_and_count_as_zero():
    capacity = T * K // 2
    for rank, (dropped, rows, (out, _, grad_weights), counts) in enumerate(run_ranks(overflowing, 2)):
        assert rows == 2 * capacity and dropped == T * K - capacity  # all go to rank 0's experts
        assert sum(counts) == (2 * capacity if rank == 0 else 0)
        x, routing = x_of(rank, torch.float32), routing_of("one rank", rank)
        order = routing.topk_ids_TK.flatten().sort(stable=True).indices
        kept = torch.zeros(T * K, dtype=torch.bool)
        kept[order[:capacity]] = True  # by expert, then by token
        weights = torch.where(kept.view(T, K), routing.topk_weights_TK, 0)
        np.testing.assert_allclose(out, (x * weights.sum(1, keepdim=True)).detach().numpy(), rtol=1e-5)
        assert ((grad_weights != 0) == kept.view(T, K).numpy()).all()


@pytest.mark.parametrize("capacity", [1, 3, 5, 40])
def test_pack_and_unpack_are_inverse_where_there_is_room(capacity):
    counts_pe = torch.tensor([[0, 2, 1], [4, 0, 3], [0, 0, 0]])
    packing, kept_pe = pack(counts_pe, 12, capacity)  # two rows more than are sent
    assert kept_pe.sum(1).tolist() == counts_pe.sum(1).clamp(max=capacity).tolist()
    rows = torch.arange(1.0, 13).view(12, 1)
    slots = permute(rows, packing)
    assert len(slots) == 3 * capacity
    arrived = permute(slots, unpack(kept_pe, capacity))
    of_expert = [e for p in range(3) for e in torch.repeat_interleave(torch.arange(3), kept_pe[p]).tolist()]
    sent = [float(r) for p in range(3) for r in (0, 3, 10)[p] + 1 + torch.arange(int(kept_pe[p].sum()))]
    expected = [r for _, r in sorted(zip(of_expert, sent, strict=True))]
    assert arrived.flatten().tolist() == expected + [0.0] * (3 * capacity - len(expected))


def waits(rank, n):
    """How often the host asks a tensor for its value, by dispatcher, forward and backward."""
    group, found = build_ranks(rank, n, CPU, n).ep_group, {}
    assert group is not None
    kernels.permute._check_range = lambda *_: None  # only a CPU looks at every id
    for dispatcher in (AllToAllDispatcher(E, group), PaddedDispatcher(E, group, 2.0)):
        x, routing, calls = x_of(rank, torch.float32), routing_of("random", rank), []
        real = {
            name: getattr(torch.Tensor, name)
            for name in ("tolist", "item", "__int__", "__bool__", "nonzero", "__index__")
        }
        for name, method in real.items():
            setattr(
                torch.Tensor, name, lambda *a, name=name, method=method, calls=calls: calls.append(name) or method(*a)
            )
        try:
            rows, plan = dispatcher.dispatch(x, routing).arrive()
            dispatcher.combine(rows * 2, plan).sum().backward()
        finally:
            for name, method in real.items():
                setattr(torch.Tensor, name, method)
        found[type(dispatcher).__name__] = calls
    return found


def test_p28_one_wait_of_the_host_when_exact_and_none_when_padded():
    for found in run_ranks(waits, 2):
        assert found == {"AllToAllDispatcher": ["tolist"], "PaddedDispatcher": []}
