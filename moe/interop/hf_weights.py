"""Our model's weights in the names, shapes and order of rows of Hugging Face checkpoints, and back. Only copies: bit by bit.

    w13 [2F, D]            gate_proj, up_proj [F, D]: the dense MLP, the shared experts, every routed expert
    experts.w13 [E, 2F, D] an entry for every expert
    rotary rows of q and k pairs (i, i + d/2) of a head; where the architecture's are neighbours, (2i, 2i + 1)

Letters: D model dim, F hidden dim, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ModelSection
from moe.interop.hf_config import ARCHITECTURES

MLA = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}
STATICS = "moe_statics.e_score_correction_bias"  # [1, E]
GQA = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}


class Row(NamedTuple):
    """Tensors that hold the same numbers: one of ours (with `expert`: that entry of it), one or two of theirs, side by side.
    turned: of each of `heads` blocks of rows the last ones, whose rotary pairs are neighbours in theirs."""

    ours: str
    theirs: tuple[str, ...]
    expert: int | None = None
    heads: int = 1
    turned: int = 0


def rows(m: ModelSection, model_type: str, interleaved: bool) -> Iterator[list[Row]]:
    """Every parameter, and the expert bias where the architecture has one; the embedding, each layer, the end."""
    yield [Row("embedding.weight", ("model.embed_tokens.weight",))]
    for layer in range(m.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield [
            Row(ours + "attention_norm.weight", (theirs + "input_layernorm.weight",)),
            *_attention(m, ours + "attention.", theirs + "self_attn.", interleaved),
            Row(ours + "mlp_norm.weight", (theirs + "post_attention_layernorm.weight",)),
            *(
                _swiglu(ours + "mlp.", theirs + "mlp.")
                if layer < m.first_k_dense
                else _sparse(m, model_type, ours + "moe.", theirs + "mlp.")
            ),
        ]
    yield [Row("norm.weight", ("model.norm.weight",))]
    if not m.tie_embeddings:
        yield [Row("head.weight", ("lm_head.weight",))]


def empty_shapes(m: ModelSection, model_type: str) -> dict[str, tuple[int, int]]:
    """Tensors without an element: shared experts of width 0, which DeepSeek's and GLM's layers have all the same."""
    if m.num_shared_experts or ARCHITECTURES[model_type].names["num_shared_experts"] != "n_shared_experts":
        return {}
    shapes = {"gate_proj": (0, m.dim), "up_proj": (0, m.dim), "down_proj": (m.dim, 0)}
    layers = range(m.first_k_dense, m.num_layers)
    below = "model.layers.{}.mlp.shared_experts.{}.weight"
    return {below.format(layer, name): shape for layer in layers for name, shape in shapes.items()}


def _attention(m: ModelSection, ours: str, theirs: str, interleaved: bool) -> Iterator[Row]:
    names = GQA if m.attention == "gqa" else MLA
    if m.attention == "mla":
        names = {k: v for k, v in names.items() if k not in (("wq",) if m.q_lora_rank else ("wq_a", "q_norm", "wq_b"))}
    kv_heads, head_dim, rope = (
        m.num_kv_heads or m.num_heads,
        m.head_dim or m.dim // m.num_heads,
        m.qk_rope_head_dim or 0,
    )
    turned = {"wq": (m.num_heads, head_dim), "wk": (kv_heads, head_dim)}
    if m.attention == "mla":
        turned = {"wq": (m.num_heads, rope), "wq_b": (m.num_heads, rope), "wkv_a": (1, rope)}
    for name, other in names.items():
        heads, dims = turned.get(name, (1, 0)) if interleaved else (1, 0)
        yield Row(f"{ours}{name}.weight", (f"{theirs}{other}.weight",), None, heads, dims)


def _swiglu(ours: str, theirs: str) -> list[Row]:
    gate_up = (theirs + "gate_proj.weight", theirs + "up_proj.weight")
    return [Row(ours + "w13.weight", gate_up), Row(ours + "w2.weight", (theirs + "down_proj.weight",))]


def _sparse(m: ModelSection, model_type: str, ours: str, theirs: str) -> Iterator[Row]:
    a = ARCHITECTURES[model_type]
    for expert in range(m.num_experts):
        below = f"{theirs}experts.{expert}." if a.takes_experts else theirs  # upcycled: the same dense MLP for all
        yield Row(ours + "experts.w13", (below + "gate_proj.weight", below + "up_proj.weight"), expert)
        yield Row(ours + "experts.w2", (below + "down_proj.weight",), expert)
    if not a.takes_experts:
        return
    yield Row(ours + "router.weight", (theirs + "gate.weight",))
    if a.bias is not None:
        yield Row(ours + "router.expert_bias_E", (theirs + a.bias,))
    if m.num_shared_experts:
        yield from _swiglu(ours + "shared_experts.", theirs + "shared_experts.")


def apart(row: Row, tensor: Tensor) -> list[Tensor]:
    """Theirs, from ours (of one expert, with row.expert)."""
    if row.turned:
        plain, pairs = _by_head(row, tensor)
        tensor = torch.cat([plain, pairs.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)], dim=1).flatten(0, 1)
    if row.theirs[0].endswith(STATICS):
        tensor = tensor[None]
    return list(tensor.chunk(2)) if len(row.theirs) == 2 else [tensor]


def together(row: Row, tensors: Sequence[Tensor]) -> Tensor:
    """The inverse of `apart`."""
    tensor = torch.cat(list(tensors)) if len(row.theirs) == 2 else tensors[0]
    if row.theirs[0].endswith(STATICS):
        tensor = tensor.flatten()
    if row.turned:
        plain, pairs = _by_head(row, tensor)
        tensor = torch.cat([plain, pairs.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)], dim=1).flatten(0, 1)
    return tensor


def _by_head(row: Row, tensor: Tensor) -> Sequence[Tensor]:
    by_head = tensor.unflatten(0, (row.heads, -1))
    return by_head.split([by_head.shape[1] - row.turned, row.turned], dim=1)
