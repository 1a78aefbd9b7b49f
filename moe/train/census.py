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
    if not matrices:
        return {}
    keys: dict[tuple[str, torch.Size], Tensor] = {}
    sums = [
        sum(_partial(name, weight, ranks, keys) for name, weight in layer)
        for _, layer in sorted(matrices.items())
    ]  # fmt: skip
    total_LE = ranks.sum(torch.stack(sums)).tolist()  # type: ignore[arg-type]
    digits = max(2, len(str(max(matrices))))
    return {
        f"layer_{layer:0{digits}d}": [f"{value % 2**64:016x}" for value in row]
        for layer, row in zip(sorted(matrices), total_LE, strict=True)
    }


def _partial(name: str, weight: Tensor, ranks: Ranks, keys: dict[tuple[str, torch.Size], Tensor]) -> Tensor:
    """This rank's part of the sums [E] int64 of one matrix: 0 where another rank holds the same values and counts them."""
    local, start = _local_part(weight)
    sums_E = torch.zeros(len(weight), dtype=torch.int64, device=local.device)
    if not _counts(weight, ranks):
        return sums_E
    if (name, weight.shape) not in keys:
        # The seed is the matrix's name: exchanged rows of two matrices must show as well.
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "little") % 2**63)
        drawn = torch.randint(-(2**63), 2**63 - 1, weight.shape[1:], generator=generator, dtype=torch.int64)
        keys[name, weight.shape] = drawn.to(local.device)
    inside = tuple(slice(s, s + n) for s, n in zip(start[1:], local.shape[1:], strict=True))
    key = keys[name, weight.shape][inside]
    bits = local.detach().contiguous().view(INTEGERS[local.element_size()])
    for index, expert in enumerate(bits):  # one at a time: the products are 2 to 4 times the size of the weights
        sums_E[start[0] + index] = (expert.long() * key).sum()
    return sums_E


def _local_part(weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if not isinstance(weight, DTensor):
        return weight, (0,) * weight.dim()
    _, start = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return weight.to_local(), tuple(start)


def _counts(weight: Tensor, ranks: Ranks) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    if not isinstance(weight, DTensor):
        return ranks.rank == 0
    mesh = weight.device_mesh
    place = mesh.get_coordinate()
    assert place is not None, "a rank outside of the mesh holds no part"
    copies = (p for p, placement in zip(place, weight.placements, strict=True) if isinstance(placement, Replicate))
    return 0 in mesh.mesh and not any(copies)
