"""Ids out of range on the CPU: an error, never a wrong number; also in a compiled graph."""

from __future__ import annotations

import pytest
import torch

from kernels.permute import count_tokens, sort_by_expert

IDS = torch.tensor([[2, 0], [1, 4]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [5, 6, -2, 2**31 - 1])
def test_ids_out_of_range_are_refused(bad: int, dtype: torch.dtype):
    ids = IDS.clone().to(dtype)
    ids[1, 1] = bad
    with pytest.raises(ValueError, match=rf"topk_ids has {bad}: give -1 to 4$"):
        count_tokens(ids, 5)
    with pytest.raises(ValueError, match=rf"topk_ids has {bad}: give -1 to 4$"):
        sort_by_expert(ids, 5, masked=True)
    with pytest.raises(ValueError, match=rf"topk_ids has {bad}: give 0 to 4"):
        sort_by_expert(ids, 5)


def test_p11_masked_ids_without_saying_so_are_refused():
    ids = IDS.clone()
    ids[0] = -1
    assert count_tokens(ids, 5).tolist() == [0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match="topk_ids has -1: give 0 to 4, and masked = True where some are -1"):
        sort_by_expert(ids, 5)


@pytest.mark.parametrize("bad", [5, -2])
def test_a_compiled_graph_checks_them_when_it_runs(bad: int):
    def counted(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return count_tokens(ids, 5), sort_by_expert(ids, 5).counts_E

    torch.compiler.reset()
    compiled = torch.compile(counted, fullgraph=True, backend="aot_eager")
    assert all(counts.tolist() == [1, 1, 1, 0, 1] for counts in compiled(IDS))
    ids = IDS.clone()
    ids[1, 1] = bad
    with pytest.raises(RuntimeError, match="topk_ids is not within"):
        compiled(ids)


def test_a_backend_that_is_not_there_is_refused():
    with pytest.raises(
        ValueError, match="backend = 'triton' cannot take tensors on cpu: give CUDA tensors, or choose torch"
    ):
        sort_by_expert(IDS, 5, backend="triton")
    with pytest.raises(ValueError, match="backend = 'cuda' is not known: choose auto, triton or torch"):
        count_tokens(IDS, 5, backend="cuda")  # pyright: ignore[reportArgumentType]
