"""Memory and traffic on paper: against what autograd keeps, to the byte, and what a step allocates, within a tenth."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moe.model.transformer import Transformer
from moe.observe import footprint
from moe.train.data import Batch
from moe.train.engines.native import NativeEngine
from tests.tiny import ALONE, tiny_config

SHAPE = {
    "model__vocab_size": 512,
    "model__dim": 64,
    "model__num_layers": 3,
    "model__num_heads": 4,
    "model__head_dim": None,
    "model__first_k_dense": 1,
    "model__dense_hidden_dim": 160,
    "model__num_experts": 8,
    "model__top_k": 2,
    "model__num_shared_experts": 1,
    "model__expert_hidden_dim": 24,
    "data__seq_len": 32,
    "train__batch_size": 4,
    "balance__method": "coordinate",
    "balance__rate": "auto",
}
MLA = {"model__attention": "mla", "model__num_kv_heads": None, "model__kv_lora_rank": 20}
MLA |= {"model__qk_nope_head_dim": 12, "model__qk_rope_head_dim": 8}
ATTENTION = {
    "gqa": {"model__num_kv_heads": 2},
    "mla, values narrower": MLA | {"model__v_head_dim": 16},
    "mla, values as wide": MLA | {"model__v_head_dim": 20},
    "mla, compressed queries": MLA | {"model__v_head_dim": 16, "model__q_lora_rank": 28},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("shared", [0, 1])
def test_what_autograd_keeps_to_the_byte(attention, dtype, shared):
    settings = SHAPE | ATTENTION[attention] | {"train__compute_dtype": dtype, "model__num_shared_experts": shared}
    config = tiny_config(1, **settings)
    m, tokens_BS = config.model, torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    model = Transformer(config, ALONE)
    model.init_weights(0)
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[place] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens_BS, tokens_BS)
    a, rope = footprint.element_bytes(config), 8 if m.attention == "mla" else 16
    blocks = [footprint.block_kept(config, sparse, m.top_k) for sparse in (False, True, True)]
    tables, counts, head = 2 * 4 * 32 * rope, 2 * 8 * 9, 4 * 512 * 64
    planned = 128 * (sum(block.token for block in blocks) + footprint.norm_kept(64, a) + a * 64 + 8)
    planned += sum(block.weights for block in blocks) + tables + counts + head
    assert sum(size for size, _ in kept.values()) == planned


LARGER = {"model__dim": 256, "model__expert_hidden_dim": 128, "model__vocab_size": 4096, "data__seq_len": 128}
CASES = [
    {},
    {"train__activation_checkpointing": "full"},
    {"train__activation_checkpointing": "selective"},
    {"train__batch_size": 16, "train__micro_batch_size": 4},
    {"train__compute_dtype": "float32"},
    {"train__compute_dtype": "float32", "model__vocab_size": 32768, "model__num_layers": 2},  # the head decides
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())) or "none")
def test_what_a_step_allocates_within_a_tenth(case):
    settings = SHAPE | LARGER | {"train__batch_size": 8, "model__num_kv_heads": 2, "train__compute_dtype": "bfloat16"}
    settings |= {"model__dense_hidden_dim": 512, "model__num_layers": 4} | case
    config = tiny_config(1, **settings)
    engine = NativeEngine(config, ALONE, 0)
    rows = config.train.micro_batch_size or config.train.batch_size
    tokens_BS = torch.randint(0, 4096, (rows, 128), generator=torch.Generator().manual_seed(0))
    batches = [Batch(tokens_BS, tokens_BS)] * (config.train.batch_size // rows)

    def step():
        engine.forward_backward(batches)
        engine.step()

    step()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in engine.model.parameters()}
    moments = [v for state in engine.optimizer.state.values() for v in state.values()]
    held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in moments}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert footprint.memory(config, 1).peak == pytest.approx(sum(held.values()) + peak, rel=0.1)


def test_the_worst_load_is_every_token_of_the_group_at_one_rank():
    config = tiny_config(4, **SHAPE, parallel__ep=4)
    assert footprint.rows_per_token(config, worst=False) == 2
    assert footprint.rows_per_token(config, worst=True) == 4 * 2  # two experts a rank: both
    assert (
        footprint.rows_per_token(tiny_config(8, **SHAPE | {"train__batch_size": 8}, parallel__ep=8), True) == 8
    )  # one
    balanced, worst = (footprint.memory(config, 4, w) for w in (False, True))
    assert worst.peak > balanced.peak and worst.parameters == balanced.parameters
    rows = 32 * (8 - 2)  # one sequence a rank
    a = footprint.element_bytes(config)
    assert worst.activations - balanced.activations == 2 * rows * a * (64 + 3 * 24)  # two sparse layers
    assert worst.exchange - balanced.exchange == rows * a * 64


def test_sharding_divides_the_state_and_experts_are_divided_anyway():
    whole = footprint.memory(tiny_config(1, **SHAPE), 1)
    ep = footprint.memory(tiny_config(2, **SHAPE, parallel__ep=2), 2)
    sharded = footprint.memory(tiny_config(2, **SHAPE, parallel__data="shard"), 2)
    experts = 2 * 8 * 3 * 64 * 24
    assert whole.parameters - ep.parameters == 4 * experts // 2
    assert sharded.optimizer == whole.optimizer // 2


def test_traffic_by_hand():
    config = tiny_config(4, **SHAPE, parallel__ep=4)
    a, rows = footprint.element_bytes(config), 32 * 2 * 2  # tokens of a rank, K, sparse layers
    found = footprint.traffic(config, 4, per_node=2)
    assert found.rows_inside == 4 * rows * 64 * a * 1 / 4  # of 4 ranks one is a neighbour, one is itself
    assert found.rows_outside == 4 * rows * 64 * a * 2 / 4
    parameters = 512 * 64 * 2 + 3 * 64 * 64 * 3 + 3 * 64 * 160 + 2 * 8 * 64 + 2 * 3 * 64 * 24 + 7 * 64
    assert (
        found.parameters == 2 * 3 / 4 * 4 * parameters
    )  # all-reduce of what is not an expert; one copy of each expert
    full = tiny_config(4, **SHAPE, parallel__ep=4, train__activation_checkpointing="full")
    assert footprint.traffic(full, 4, 2).rows_inside == 1.5 * found.rows_inside
