"""Parameters, FLOPs and memory of a configuration, on paper. Imports no torch.

Letters: D model dim, F expert hidden dim, E experts, K experts per token, V vocabulary, S sequence.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from moe.config import Config, ModelSection

# Dense bf16 TFLOP/s without sparsity, from the vendors' data sheets: words that a device's name must have, words that it
# must not have. A GH200, an H100 NVL or a MIG slice is another part than its namesake: measured instead.
PEAK_TFLOPS: list[tuple[set[str], set[str], float]] = [
    ({"B200"}, {"MIG"}, 2250.0),
    ({"H200"}, {"MIG", "NVL"}, 989.0),
    ({"H100", "PCIE"}, {"MIG"}, 756.0),
    ({"H100"}, {"MIG", "NVL", "PCIE"}, 989.0),
    ({"A100"}, {"MIG"}, 312.0),
    ({"L40S"}, {"MIG"}, 362.0),
    ({"RTX", "4090"}, {"D", "LAPTOP"}, 165.2),
]


class ParameterCounts(NamedTuple):
    """Parameters by part; `total` of the model, `active` for one token (K of E routed experts)."""

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    router: int
    routed_experts: int
    shared_experts: int
    norms: int
    total: int
    active: int


def parameter_counts(config: Config) -> ParameterCounts:
    """From the resolved configuration; the expert bias is a buffer and does not count."""
    m, sparse = config.model, config.num_moe_layers
    attention, latent_norms = attention_counts(m)
    dense_dim = m.dense_hidden_dim or (m.top_k + m.num_shared_experts) * m.expert_hidden_dim
    expert = 3 * m.dim * m.expert_hidden_dim
    parts = {
        "embedding": m.vocab_size * m.dim,
        "head": 0 if m.tie_embeddings else m.vocab_size * m.dim,
        "attention": m.num_layers * attention,
        "dense_mlp": m.first_k_dense * 3 * m.dim * dense_dim,
        "router": sparse * m.num_experts * m.dim,
        "routed_experts": sparse * m.num_experts * expert,
        "shared_experts": sparse * m.num_shared_experts * expert,
        "norms": (2 * m.num_layers + 1) * m.dim + m.num_layers * latent_norms,
    }
    total = sum(parts.values())
    return ParameterCounts(**parts, total=total, active=total - sparse * (m.num_experts - m.top_k) * expert)


def attention_counts(m: ModelSection) -> tuple[int, int]:
    """(parameters of the matrices, of the norms inside) of one layer's attention."""
    if m.attention == "gqa":
        head_dim, kv = m.head_dim or m.dim // m.num_heads, m.num_kv_heads or m.num_heads
        return m.dim * head_dim * (2 * m.num_heads + 2 * kv), 0
    qk, v = head_dims(m)
    kv_rank, nope, rope = m.kv_lora_rank or 0, m.qk_nope_head_dim or 0, m.qk_rope_head_dim or 0
    queries = m.num_heads * qk
    q = m.dim * queries if m.q_lora_rank is None else m.q_lora_rank * (m.dim + queries)
    kv = m.dim * (kv_rank + rope) + kv_rank * m.num_heads * (nope + v)
    return q + kv + m.num_heads * v * m.dim, kv_rank + (m.q_lora_rank or 0)


def head_dims(m: ModelSection) -> tuple[int, int]:
    """Dims of a head's query and key, and of its value."""
    if m.attention == "mla":
        return (m.qk_nope_head_dim or 0) + (m.qk_rope_head_dim or 0), m.v_head_dim or 0
    head_dim = m.head_dim or m.dim // m.num_heads
    return head_dim, head_dim


def flops_per_token(config: Config) -> float:
    """Forward and backward FLOPs of one token: 6 per active matrix parameter (the embedding look-up is free, the head is
    not), and per layer 3 S H d for causal attention scores and as much for values (half of the full square)."""
    m = config.model
    counts = parameter_counts(config)
    matrices = counts.active - counts.embedding - counts.norms + (counts.embedding if m.tie_embeddings else 0)
    return 6.0 * matrices + 3.0 * m.num_layers * config.data.seq_len * m.num_heads * sum(head_dims(m))


def routed_share(config: Config) -> float:
    """Share of the FLOPs of a token in its K routed experts: what an imbalance between ranks stretches."""
    m = config.model
    routed = 6.0 * config.num_moe_layers * m.top_k * 3 * m.dim * m.expert_hidden_dim
    return routed / flops_per_token(config)


def imbalance_share(config: Config, straggler: float) -> float:
    """Estimated share of a step that is lost to the busiest expert-parallel rank. straggler: its load over the mean, mean
    over MoE layers. The time of the routed experts is taken as their share of the FLOPs."""
    waiting = routed_share(config) * (straggler - 1)
    return waiting / (1 + waiting)


def mfu(tokens_per_s: float, flops: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation on active parameters: a share of the peak of all devices together."""
    return tokens_per_s * flops / (peak_tflops * 1e12)


def device_peak_tflops(name: str) -> float | None:
    """Peak of a GPU by the name that its driver gives, None when it is not in the table."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    return next((peak for needed, refused, peak in PEAK_TFLOPS if needed <= words and not refused & words), None)


def state_gib(config: Config, world_size: int = 1) -> float:
    """Float32 parameters, gradients and both moments of AdamW on one rank: experts divided by ep, everything by the number
    of ranks with parallel.data = shard; under DeepSpeed what its stage shares, with a second copy of the parameters; under
    Megatron-core the mean over the stages of pp, dense matrices divided by tp, with data = shard the moments alone shared."""
    counts, p = parameter_counts(config), config.parallel
    if p.data == "shard" and config.train.engine == "native":
        return 16 * counts.total / world_size / 2**30
    local = ((counts.total - counts.routed_experts) / p.tp + counts.routed_experts / p.ep) / p.pp
    if p.data == "shard":
        return (8 * local + 8 * counts.total / world_size) / 2**30
    if config.train.engine == "deepspeed" and (stage := config.deepspeed.zero_stage):
        held = {1: 8, 2: 4, 3: 0}[stage]  # parameters and gradients; parameters
        return (held * local + (20 - held) * counts.total / world_size) / 2**30
    return 16 * local / 2**30
