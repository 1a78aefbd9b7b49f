"""Our model's weights in Megatron-core's names and shapes, and back: what makes initial weights, checkpoints and hashes of the
two engines the same. Linear in the tensors: optimizer moments travel as their parameters do.

    wq, wk, wv                     one linear_qkv, by groups of query heads: the group's queries, its key, its value
    experts.w13, w2 [E, ...]       linear_fc1, linear_fc2 of every local expert; ours is a DTensor over ep

A matrix that the ranks of parallel.tp share is gathered on the way to ours, and its part is taken on the way back.

Letters: D model dim, E experts, e local experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe.config import ModelSection
from moe.model.experts import local_tensor

# Transformer Engine's fused layers hold the norm before them, and grouped experts their matrices side by side.
TRANSFORMER_ENGINE = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.local_experts.\2.\1.weight"),
)


class Row(NamedTuple):
    """Tensors that hold the same numbers. kind: same (one each), qkv (three of ours), stack (one of ours). split: how
    tensor-parallel ranks share theirs: rows, columns, or halves (rows of the gate, then rows of the other factor); None: copies."""

    kind: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    split: str | None = None


def plain(name: str, first_layer: int = 0) -> str:
    """A parameter's name as it is without Transformer Engine and pipeline; first_layer: of this stage."""
    for fused, apart in TRANSFORMER_ENGINE:
        name = re.sub(fused, apart, name)
    return re.sub(r"(?<=^decoder\.layers\.)\d+", lambda found: str(int(found[0]) + first_layer), name)


def rows(m: ModelSection, local_experts: int) -> Iterator[Row]:
    """Every parameter and persistent buffer of the model."""
    yield Row("same", ("embedding.weight",), ("embedding.word_embeddings.weight",), "rows")
    for layer in range(m.num_layers):
        ours, theirs = f"blocks.{layer}.", f"decoder.layers.{layer}."
        yield Row("same", (ours + "attention_norm.weight",), (theirs + "input_layernorm.weight",))
        heads = tuple(f"{ours}attention.{name}.weight" for name in ("wq", "wk", "wv"))
        yield Row("qkv", heads, (theirs + "self_attention.linear_qkv.weight",), "rows")
        out = theirs + "self_attention.linear_proj.weight"
        yield Row("same", (ours + "attention.wo.weight",), (out,), "columns")
        yield Row("same", (ours + "mlp_norm.weight",), (theirs + "pre_mlp_layernorm.weight",))
        if layer < m.first_k_dense:
            yield from _swiglu(ours + "mlp.", theirs + "mlp.")
            continue
        for name in ("weight", "expert_bias_E"):
            yield Row("same", (f"{ours}moe.router.{name}",), (f"{theirs}mlp.router.router.{name}",))
        for name, linear in (("w13", "linear_fc1"), ("w2", "linear_fc2")):
            each = (f"{theirs}mlp.experts.local_experts.{index}.{linear}.weight" for index in range(local_experts))
            yield Row("stack", (f"{ours}moe.experts.{name}",), tuple(each))
        if m.num_shared_experts:
            yield from _swiglu(ours + "moe.shared_experts.", theirs + "mlp.shared_experts.")
    yield Row("same", ("norm.weight",), ("decoder.final_layernorm.weight",))
    if not m.tie_embeddings:
        yield Row("same", ("head.weight",), ("output_layer.weight",), "rows")


def _swiglu(ours: str, theirs: str) -> Iterator[Row]:
    yield Row("same", (ours + "w13.weight",), (theirs + "linear_fc1.weight",), "halves")
    yield Row("same", (ours + "w2.weight",), (theirs + "linear_fc2.weight",), "columns")


def to_ours(
    theirs: Mapping[str, Tensor],
    m: ModelSection,
    ep: int,
    mesh: DeviceMesh | None,
    tp_group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """theirs: by `plain` name, parameters or tensors of their shapes, all of `rows` or some. Unchanged ones are not copied.

    mesh: over the ep ranks that share the experts; tp_group: those that share the other matrices (a collective); None for one
    rank.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for kind, names, parts, split in rows(m, m.num_experts // ep):
        if parts[0] not in theirs:
            continue
        tensors = [theirs[name].detach() for name in parts]
        if split is not None and tp_group is not None:
            tensors = [_gathered(tensors[0], split, tp_group)]
        if kind == "qkv":
            tensors = _apart(tensors[0], m)
        elif kind == "stack":
            tensors = [_sharded(torch.stack(tensors), mesh)]
        found |= dict(zip(names, tensors, strict=True))
        used |= set(parts)
    assert used == set(theirs), f"Megatron-core names that are not known: {sorted(set(theirs) - used)}"
    return found


@torch.no_grad()
def from_ours(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    m: ModelSection,
    ep: int,
    tp_group: dist.ProcessGroup | None = None,
) -> None:
    """The inverse of `to_ours`, in place."""
    for kind, names, parts, split in rows(m, m.num_experts // ep):
        if parts[0] not in theirs:
            continue
        tensors: Sequence[Tensor] = [local_tensor(ours[name].detach()) for name in names]
        if kind == "qkv":
            tensors = [_together(tensors, m)]
        elif kind == "stack":
            tensors = tensors[0].unbind()
        if split is not None and tp_group is not None:
            tensors = [_part(tensors[0], split, tp_group)]
        for name, tensor in zip(parts, tensors, strict=True):
            theirs[name].copy_(tensor)


def _gathered(part_XX: Tensor, split: str, group: dist.ProcessGroup) -> Tensor:
    every = [torch.empty_like(part_XX) for _ in range(group.size())]
    dist.all_gather(every, part_XX.contiguous(), group=group)
    if split == "halves":
        return torch.cat([part.unflatten(0, (2, -1)) for part in every], dim=1).flatten(0, 1)
    return torch.cat(every, dim=0 if split == "rows" else 1)


def _part(whole_XX: Tensor, split: str, group: dist.ProcessGroup) -> Tensor:
    size, rank = group.size(), group.rank()
    if split == "halves":
        return whole_XX.unflatten(0, (2, -1)).chunk(size, dim=1)[rank].flatten(0, 1)
    return whole_XX.chunk(size, dim=0 if split == "rows" else 1)[rank]


def _sharded(local_eXX: Tensor, mesh: DeviceMesh | None) -> Tensor:
    return local_eXX if mesh is None else DTensor.from_local(local_eXX, mesh, [Shard(0)], run_check=False)


def _sizes(m: ModelSection) -> tuple[int, int, int]:
    """Groups, rows of a group's queries, rows of its key."""
    assert m.num_kv_heads and m.head_dim, "resolve() gives the heads"
    return m.num_kv_heads, m.num_heads // m.num_kv_heads * m.head_dim, m.head_dim


def _apart(qkv_XD: Tensor, m: ModelSection) -> list[Tensor]:
    groups, queries, head = _sizes(m)
    by_group = qkv_XD.unflatten(0, (groups, queries + 2 * head)).split([queries, head, head], dim=1)
    return [part.flatten(0, 1) for part in by_group]


def _together(qkv: Sequence[Tensor], m: ModelSection) -> Tensor:
    return torch.cat([part.unflatten(0, (_sizes(m)[0], -1)) for part in qkv], dim=1).flatten(0, 1)
