"""Grouped matrix product: every group of rows with the weights of its own expert.

    out[r] = rows_RD[r] @ weight_eND[group of r].T          groups are consecutive rows, sizes in tokens_per_expert_e

Letters: R rows, D inner dim, N output dim, e local experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_gemm_reference(rows_RD: Tensor, weight_eND: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    """A loop over the groups; any float dtype. The oracle of the tests, and float64's only path."""
    groups = rows_RD.split(tokens_per_expert_e.tolist())
    return torch.cat([group @ weight.T for group, weight in zip(groups, weight_eND, strict=True)])


def grouped_gemm(rows_RD: Tensor, weight_eND: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    """out_RN in the dtype of rows_RD; empty groups are allowed and get zero gradients.

    The sizes must add up to R: F.grouped_mm leaves rows past the last group uninitialised (pytorch#193633).
    """
    if rows_RD.dtype == torch.float64:  # F.grouped_mm has none
        return grouped_gemm_reference(rows_RD, weight_eND, tokens_per_expert_e)
    if rows_RD.shape[0] == 0:
        # No row on this rank: a product that is empty but keeps every gradient zero instead of None.
        return rows_RD @ weight_eND[0].T + 0.0 * weight_eND.sum()
    offsets = tokens_per_expert_e.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_RD, weight_eND.transpose(-2, -1), offs=offsets)
