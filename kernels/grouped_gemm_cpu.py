"""Grouped matrix products in bfloat16 on a CPU: the same product for groups of nearly the same size.

oneDNN compiles a bfloat16 product for every shape that it meets and keeps it: 0.2 ms and up to 0.3 MiB each. Groups of tokens
have a new size at every step. Here a group of c rows is computed as `padded_size(c)` rows, of which there are 8 an octave:

    forward   a group takes rows of its right neighbour along; what comes of them is overwritten by the neighbour's turn
    weights   the sum runs over rows of the neighbour as well, against zeros

so nothing is moved but one side of the weights' gradient. The values are those of F.grouped_mm, to the bit.
Letters: R rows, D inner dim, N output dim, e local experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded_size(rows: int) -> int:
    """The next of 16, 32, ... 128, 144, ... 256, 288, ...: at most an eighth more from 128 rows on."""
    quantum = max(16, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // quantum) * quantum


def forward(rows_RD: Tensor, weight_eND: Tensor, counts_e: Tensor) -> Tensor:
    """out_RN; zeros past the last group. Contiguous rows, weights of any strides."""
    total = len(rows_RD)
    out_RN = rows_RD.new_empty(total, weight_eND.shape[1])
    begin = 0
    for count, weight_ND in zip(counts_e.tolist(), weight_eND, strict=True):
        end, size = begin + count, padded_size(count)
        if begin + size <= total:
            torch.mm(rows_RD[begin : begin + size], weight_ND.T, out=out_RN[begin : begin + size])
        elif size <= total:  # at the end: the left neighbour's, done already, stay as they are
            out_RN[begin:end] = torch.mm(rows_RD[total - size :], weight_ND.T)[begin - total : end - total or None]
        else:
            torch.mm(rows_RD[begin:end], weight_ND.T, out=out_RN[begin:end])
        begin = end
    out_RN[begin:] = 0
    return out_RN


def weight_gradient(grad_RN: Tensor, rows_RD: Tensor, counts_e: Tensor) -> Tensor:
    """grad weight_eND; exact zeros without rows. Contiguous tensors."""
    counts = counts_e.tolist()
    total = sum(counts)  # what comes after may be anything, NaN too
    grad_eND = grad_RN.new_empty(len(counts), grad_RN.shape[1], rows_RD.shape[1])
    beside_zeros_CN = grad_RN.new_empty(padded_size(max(counts)), grad_RN.shape[1])
    begin = 0
    for count, out_ND in zip(counts, grad_eND, strict=True):
        end, size = begin + count, min(padded_size(count), total)
        first = min(begin, total - size)
        window_CN = beside_zeros_CN[:size]
        window_CN[: begin - first] = 0
        window_CN[begin - first : end - first] = grad_RN[begin:end]
        window_CN[end - first :] = 0
        torch.mm(window_CN.T, rows_RD[first : first + size], out=out_ND)
        begin = end
    return grad_eND
