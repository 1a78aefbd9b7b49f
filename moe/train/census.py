"""A hash of every expert's weights, by layer and global expert, that no layout of the ranks changes.

    h = sum_i bits_i * key_i  mod 2^64     over the elements i of an expert's matrices, keys drawn once per position

A sum, so that ranks which hold parts of an expert add theirs, in any order; a permuted or exchanged expert has another one.
Letters: e local experts, L MoE layers, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe.parallel import Ranks

EXPERTS = re.compile(r"(?:^|\.)(\d+)\..*\bexperts\.(\w+)$")
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def expert_census(model: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[str]]:
    """{layer_NN: [hexadecimal, one per global expert]} of a model's state: stacked experts [E, ...], whole or DTensors.

    A collective: every rank of `ranks` calls it with its part of the same model.
    """
    matrices: dict[int, list[tuple[str, Tensor]]] = {}
    for name, weight in sorted(model.items()):
        if found := EXPERTS.search(name):
            matrices.setdefault(int(found[1]), []).append((found[2], weight))
    # The stages of a pipeline hold different layers; the first rank that holds a layer says which copy of it is counted.
    held = ranks.gather_objects({layer: len(matrices[layer][0][1]) for layer in matrices})
    experts = {layer: number for rank in held for layer, number in rank.items()}
    if not experts:
        return {}
    first = {layer: next(rank for rank, layers in enumerate(held) if layer in layers) for layer in experts}
    keys: dict[tuple[str, torch.Size], Tensor] = {}
    device = next((weight.device for layer in matrices.values() for _, weight in layer), ranks.device)
    sums = []
    for layer in sorted(experts):
        sums_E = torch.zeros(experts[layer], dtype=torch.int64, device=device)
        for name, weight in matrices.get(layer, ()):
            if _counts(weight, ranks, first[layer]):
                _add_partial(sums_E, name, weight, keys)
        sums.append(sums_E)
    total_LE = ranks.sum(torch.stack(sums)).tolist()
    digits = max(2, len(str(max(experts))))
    return {
        f"layer_{layer:0{digits}d}": [f"{value % 2**64:016x}" for value in row]
        for layer, row in zip(sorted(experts), total_LE, strict=True)
    }


def _add_partial(sums_E: Tensor, name: str, weight: Tensor, keys: dict[tuple[str, torch.Size], Tensor]) -> None:
    """Add this rank's part of one matrix to the sums [E] int64."""
    local, start = _local_part(weight)
    if (name, weight.shape) not in keys:
        # The seed is the matrix's name: exchanged rows of two matrices must show as well.
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "little") % 2**63)
        drawn = torch.randint(-(2**63), 2**63 - 1, weight.shape[1:], generator=generator, dtype=torch.int64)
        keys[name, weight.shape] = drawn.to(local.device)
    inside = tuple(slice(s, s + n) for s, n in zip(start[1:], local.shape[1:], strict=True))
    key = keys[name, weight.shape][inside]
    bits = local.detach().contiguous().view(INTEGERS[local.element_size()])
    for index, expert in enumerate(bits):  # one at a time: the products are 2 to 4 times the size of the weights
        sums_E[start[0] + index] += (expert.long() * key).sum()


def _local_part(weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if not isinstance(weight, DTensor):
        return weight, (0,) * weight.dim()
    _, start = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return weight.to_local(), tuple(start)


def _counts(weight: Tensor, ranks: Ranks, first: int) -> bool:
    """Whether this rank is the first of those that hold the same part; first: that of those with the layer."""
    if not isinstance(weight, DTensor):
        return ranks.rank == first
    mesh = weight.device_mesh
    place = mesh.get_coordinate()
    assert place is not None, "a rank outside of the mesh holds no part"
    copies = (p for p, placement in zip(place, weight.placements, strict=True) if isinstance(placement, Replicate))
    return first in mesh.mesh and not any(copies)
