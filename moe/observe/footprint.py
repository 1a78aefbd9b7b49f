"""Memory of one rank of the native engine, on paper. Imports no torch.

    state        float32 parameters, gradients and both moments of AdamW, each once the optimizer has stepped
    activations  what autograd keeps from the forward pass, and the copies of weights in the compute dtype among it
    exchange     rows that travel to experts of other ranks and back, beside those that autograd keeps

The largest of two moments counts: the backward pass begins (all activations, the gradients of the head alone), or it has ended
(all gradients, the activations of one block). Loads are balanced, or worst: every token of the ep group picks as many
experts of this rank as it can.
Letters: D model dim, F expert hidden dim, E experts, e local experts, K experts per token, R rows at this rank's experts, V
vocabulary, H heads, d head dim, T tokens of a micro-batch of this rank, a bytes of the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

from moe.config import Config, ModelSection
from moe.observe.cost import attention_counts, head_dims, parameter_counts


class Kept(NamedTuple):
    """Bytes that autograd keeps: per token, and per layer whatever the tokens (weights in the compute dtype)."""

    token: float
    weights: int

    def __add__(self, other: object) -> Kept:  # type: ignore[override]
        assert isinstance(other, Kept)
        return Kept(self.token + other.token, self.weights + other.weights)


def element_bytes(config: Config) -> int:
    """a."""
    return 2 if config.train.compute_dtype == "bfloat16" else 4


def norm_kept(dim: int, a: int) -> float:
    """Of a token: the input, and one float32 factor."""
    return a * dim + 4


def attention_kept(m: ModelSection, a: int) -> Kept:
    """Input, queries, keys, values, output and one float32 a head; with MLA the latents, and what is padded to one width."""
    heads, (qk, v) = m.num_heads, head_dims(m)
    weights = 0 if a == 4 else a * attention_counts(m)[0]
    if m.attention == "gqa":
        kv = m.num_kv_heads or heads
        return Kept(a * (m.dim + 2 * heads * qk + 2 * kv * qk) + 4 * heads, weights)
    rank, width = m.kv_lora_rank or 0, max(qk, v)
    latent = rank + (m.qk_rope_head_dim or 0)  # the latent is a part of what the shared key is in
    token = a * m.dim + 4 * heads + norm_kept(latent, a) + a * rank
    if m.q_lora_rank is not None:
        token += norm_kept(m.q_lora_rank, a) + a * m.q_lora_rank
    # Queries, keys, values and output of one width; unpadded values are a part of the up-projection, padded output a copy.
    values = (m.qk_nope_head_dim or 0) + v if v == width else width
    token += a * heads * (3 * width + values) + (a * heads * v if v != width else 0)
    return Kept(token, weights)


def swiglu_kept(dim: int, hidden: int, a: int) -> Kept:
    """Gate and up, and what is made of them; not the input."""
    return Kept(3 * a * hidden, 0 if a == 4 else a * 3 * dim * hidden)


def router_kept(m: ModelSection, a: int) -> float:
    """Of a token: the input in float32, scores, ids and weights of the experts, the order of the rows."""
    copied = 4 * m.dim if a == 2 else 0
    return copied + 4 * m.num_experts + 8 * (m.top_k + 1) + 8 * m.renormalize + 8 * m.top_k + 16 * m.top_k


def experts_kept(m: ModelSection, a: int, rows: int, experts: int) -> Kept:
    """rows: per token, K when all experts are here. The rows, gate and up; of an exchange also what is made of them and what
    comes back."""
    token = a * rows * (m.dim + 2 * m.expert_hidden_dim)
    if experts < m.num_experts:
        token += a * (rows * m.expert_hidden_dim + m.top_k * m.dim)
    return Kept(token, 0 if a == 4 else a * 3 * experts * m.dim * m.expert_hidden_dim)


def block_kept(config: Config, sparse: bool, rows: int) -> Kept:
    """Of one block; rows: at this rank's experts, per token of its own."""
    m, a = config.model, element_bytes(config)
    kept = Kept(2 * norm_kept(m.dim, a), 0) + attention_kept(m, a)
    if not sparse:
        hidden = m.dense_hidden_dim or (m.top_k + m.num_shared_experts) * m.expert_hidden_dim
        return kept + Kept(a * m.dim, 0) + swiglu_kept(m.dim, hidden, a)
    kept += Kept(router_kept(m, a), 0) + experts_kept(m, a, rows, m.num_experts // config.parallel.ep)
    shared = m.num_shared_experts * m.expert_hidden_dim
    if shared or a == 4:
        kept += Kept(a * m.dim, 0)  # the input: in float32 it is the router's as well
    return kept + swiglu_kept(m.dim, shared, a)


def stored_kept(config: Config, sparse: bool, rows: int) -> float:
    """Of a token, under selective checkpointing: the input of the block, matrix products, attention and the choice."""
    m, a = config.model, element_bytes(config)
    heads, (qk, v) = m.num_heads, head_dims(m)
    if m.attention == "gqa":
        token = a * (2 * m.dim + 2 * heads * qk + 2 * (m.num_kv_heads or heads) * qk) + 4 * heads
    else:
        width, nope, rope = max(qk, v), m.qk_nope_head_dim or 0, m.qk_rope_head_dim or 0
        token = a * (2 * m.dim + heads * (qk + nope + v + width) + (m.kv_lora_rank or 0) + rope + (m.q_lora_rank or 0))
        token += 4 * heads
    if not sparse:
        hidden = m.dense_hidden_dim or (m.top_k + m.num_shared_experts) * m.expert_hidden_dim
        return token + a * (2 * hidden + m.dim)
    shared = m.num_shared_experts * m.expert_hidden_dim
    token += 4 * m.num_experts + 12 * (m.top_k + 1) + 12 * m.top_k
    return token + a * rows * (2 * m.expert_hidden_dim + m.dim) + a * (2 * shared + (m.dim if shared else 0))


class Memory(NamedTuple):
    """Bytes on one rank. `peak`: the larger of the two moments, so the parts do not add up to it."""

    parameters: int
    gradients: int
    optimizer: int
    activations: float
    weight_copies: float
    loss: float
    exchange: float
    peak: float


def rows_per_token(config: Config, worst: bool) -> int:
    """Rows at this rank's experts per token of its own."""
    m, ep = config.model, config.parallel.ep
    return ep * min(m.top_k, m.num_experts // ep) if worst else m.top_k


def memory(config: Config, world_size: int, worst: bool = False) -> Memory:
    """Of a resolved configuration under the native engine. What Python, torch and the device keep for themselves, what an
    allocator cannot use, and the copies of `checkpoint.background` on the host are not in it."""
    m, t, a = config.model, config.train, element_bytes(config)
    counts, block = parameter_counts(config), largest_block(config)
    sharded = config.parallel.data == "shard" and world_size > 1
    local = counts.total - counts.routed_experts + counts.routed_experts // config.parallel.ep
    held = -(-counts.total // world_size) if sharded else local
    sequences = t.batch_size // world_size
    micro = t.micro_batch_size or sequences
    tokens, rows = micro * config.data.seq_len, rows_per_token(config, worst)
    sparse = [layer >= m.first_k_dense for layer in range(m.num_layers)]
    kept = {kind: block_kept(config, kind, rows) for kind in set(sparse)}
    widest = max(kept.values(), key=lambda found: found.token * tokens + found.weights)
    if t.activation_checkpointing == "none":
        token, copies = sum(kept[kind].token for kind in sparse), sum(kept[kind].weights for kind in sparse)
    else:
        full = t.activation_checkpointing == "full"
        stored = {kind: a * m.dim if full else stored_kept(config, kind, rows) for kind in kept}
        # The block whose turn it is has everything; what is stored of it is not made again.
        again = widest.token - (0 if full else stored[max(kept, key=lambda kind: kept[kind].token)] - 2 * a * m.dim)
        token, copies = sum(stored[kind] for kind in sparse) + again, widest.weights
    if sharded:
        copies = 2 * a * block  # gathered: a block and the next
    activations = tokens * (token + norm_kept(m.dim, a) + a * m.dim + 8)
    # The gradient of the head is taken with the loss: it, in bfloat16 the head and a chunk's gradient in that, and the logits of
    # a chunk.
    head, chunk = m.vocab_size * m.dim, min(t.loss_chunk, tokens)
    loss = (8 if a == 2 else 4) * head + chunk * m.vocab_size * (6 if a == 2 else 4)
    exchange = a * m.dim * tokens * (m.top_k + rows) if config.parallel.ep > 1 else 0
    # Gradients of the rows and of what lies between the two products; those of the weights in the compute dtype.
    rows_back = a * tokens * rows * (2 * m.dim + 4 * m.expert_hidden_dim) + (a == 2) * a * block + exchange
    first = micro == sequences  # no gradient is there from a micro-batch before
    begins = (12 if first else 16) * held + activations + copies + max(loss, 4 * head + 4 * block + rows_back)
    ended = 16 * held + tokens * widest.token + widest.weights + rows_back + (4 * block if sharded or not first else 0)
    return Memory(4 * held, 4 * held, 8 * held, activations, copies, loss, exchange, max(begins, ended))


def largest_block(config: Config) -> int:
    """Parameters of the largest block, with the experts of one rank."""
    m = config.model
    expert = 3 * m.dim * m.expert_hidden_dim
    sparse = (m.num_experts // config.parallel.ep + m.num_shared_experts) * expert + m.num_experts * m.dim
    dense = 3 * m.dim * (m.dense_hidden_dim or (m.top_k + m.num_shared_experts) * m.expert_hidden_dim)
    return attention_counts(m)[0] + max(sparse if config.num_moe_layers else 0, dense if m.first_k_dense else 0)


class Traffic(NamedTuple):
    """Bytes that one rank sends in one optimizer step: rows to experts of the same node and of others, gradients and gathered
    parameters."""

    rows_inside: float
    rows_outside: float
    parameters: float


def traffic(config: Config, world_size: int, per_node: int) -> Traffic:
    """With balanced loads. Rows travel to the experts and back, forward and backward, and twice more when full
    checkpointing computes the forward pass again. ep ranks are neighbours. Collectives over n ranks send (n - 1) / n of
    their size once (gather, scatter) or twice (all-reduce)."""
    m, a, ep = config.model, element_bytes(config), config.parallel.ep
    tokens = config.train.batch_size // world_size * config.data.seq_len
    journeys = 6 if config.train.activation_checkpointing == "full" else 4
    rows = journeys * config.num_moe_layers * tokens * m.top_k * m.dim * a
    near = min(ep, per_node)
    counts = parameter_counts(config)
    dense, experts = counts.total - counts.routed_experts, counts.routed_experts / ep

    def ring(ranks: int, size: float) -> float:
        return size * (ranks - 1) / ranks

    if config.parallel.data == "shard":  # gathered for every forward and backward pass, gradients scattered once each
        passes = (
            config.train.batch_size
            // world_size
            // (config.train.micro_batch_size or config.train.batch_size // world_size)
        )
        times = passes * (2 * a + 4)
        sent = ring(world_size, times * dense) + ring(world_size // ep, times * experts)
    else:
        sent = 2 * ring(world_size, 4 * dense) + 2 * ring(world_size // ep, 4 * experts)
    return Traffic(rows * (near - 1) / ep, rows * (ep - near) / ep, sent)
