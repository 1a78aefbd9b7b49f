"""Parameters, FLOPs and memory against counts made by hand and published ones."""

import subprocess
import sys

import pytest

from moe.config import DeepSpeedSection, resolve, validate
from moe.observe import cost
from tests.tiny import tiny_config, tiny_mla, tiny_tree


def deepseekmoe_16b():
    """arXiv:2401.06066, section 5.1.2 and the released configuration."""
    tree = tiny_tree()
    tree["model"] = {
        "vocab_size": 102_400,
        "dim": 2048,
        "num_layers": 28,
        "num_heads": 16,
        "head_dim": 128,
        "first_k_dense": 1,
        "dense_hidden_dim": 10_944,
        "num_experts": 64,
        "top_k": 6,
        "num_shared_experts": 2,
        "expert_hidden_dim": 1408,
    }
    tree["data"]["seq_len"] = 4096
    return resolve(validate(tree))


def test_parameters_by_hand():
    # V 128, D 32, 3 layers (1 dense), 4 query and 2 key/value heads of 8, 8 experts of 16, top-2, 1 shared.
    p = cost.parameter_counts(tiny_config())
    assert p.embedding == p.head == 128 * 32
    assert p.attention == 3 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32)
    assert p.dense_mlp == 3 * 32 * (2 + 1) * 16
    assert p.router == 2 * 8 * 32
    assert p.routed_experts == 2 * 8 * 3 * 32 * 16
    assert p.shared_experts == 2 * 1 * 3 * 32 * 16
    assert p.norms == (2 * 3 + 1) * 32
    assert p.total == 4096 * 2 + 9216 + 4608 + 512 + 24576 + 3072 + 224
    assert p.active == p.total - 2 * 6 * 1536


def test_parameters_are_those_of_the_model():
    from moe.model.transformer import Transformer
    from tests.tiny import ALONE

    for settings in (
        {},
        {"model__tie_embeddings": True},
        {"model__num_shared_experts": 0, "model__first_k_dense": 0},
        tiny_mla(),
        tiny_mla(model__q_lora_rank=24),
    ):
        config = tiny_config(**settings)
        model = Transformer(config, ALONE)
        assert cost.parameter_counts(config).total == sum(p.numel() for p in model.parameters())


def test_deepseekmoe_16b_has_the_published_size():
    p = cost.parameter_counts(deepseekmoe_16b())
    assert round(p.total / 1e9, 1) == 16.4
    assert round(p.active / 1e9, 1) == 2.8


def test_p42_flops_by_hand():
    config = tiny_config()
    weights = 9216 + 4608 + 512 + 2 * 2 * 1536 + 3072 + 128 * 32  # K of E experts; the head, not the embedding
    attention = 3 * 6 * 16 * 4 * 8  # layers * 6 * S * H * head_dim: forward and backward, causal half
    assert cost.flops_per_token(config) == 6 * weights + attention


def test_latent_attention_by_hand():
    # 4 heads, latents of 24 and 16, queries and keys of 12 + 4 dims, values of 8.
    config = tiny_config(**tiny_mla(model__q_lora_rank=24))
    p = cost.parameter_counts(config)
    assert p.attention == 3 * ((32 * 24 + 24 * 64) + (32 * (16 + 4) + 16 * 4 * 20) + 4 * 8 * 32)
    assert p.norms == (2 * 3 + 1) * 32 + 3 * (24 + 16)
    plain = cost.parameter_counts(tiny_config())
    assert p.total - p.attention - p.norms == plain.total - plain.attention - plain.norms
    products = 3 * 3 * 16 * 4 * (16 + 8)  # layers * 3 * S * H * (dims of a key + of a value)
    matrices = p.active - p.embedding - p.norms
    assert cost.flops_per_token(config) == 6 * matrices + products
    direct = cost.parameter_counts(tiny_config(**tiny_mla()))
    assert direct.attention == 3 * (32 * 64 + (32 * (16 + 4) + 16 * 4 * 20) + 4 * 8 * 32)


def test_p42_flops_of_a_tied_head_are_counted():
    assert cost.flops_per_token(tiny_config(model__tie_embeddings=True)) == cost.flops_per_token(tiny_config())


def test_p42_mfu_counts_active_parameters_only():
    few, many = tiny_config(model__num_experts=8), tiny_config(model__num_experts=16)
    router = 6 * 2 * 8 * 32
    assert cost.flops_per_token(many) - cost.flops_per_token(few) == router
    # 989 TFLOP/s at 1e6 tokens/s of 989e6 * 0.4 FLOPs is 40 %.
    assert cost.mfu(1e6, 989e6 * 0.4, 989.0) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA H100 NVL", None),  # other parts than their namesakes in the table
        ("NVIDIA GB200", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_name_that_the_driver_gives(name, peak):
    assert cost.device_peak_tflops(name) == (None if peak is None else pytest.approx(peak, abs=0.5))


def test_memory_divides_only_the_routed_experts():
    alone, two = (cost.state_gib(tiny_config(world_size=2, parallel__ep=ep)) * 2**30 for ep in (1, 2))
    p = cost.parameter_counts(tiny_config())
    assert alone == 16 * p.total
    assert two == 16 * (p.total - p.routed_experts / 2)
    assert cost.state_gib(tiny_config(4, parallel__data="shard"), 4) * 2**30 == 16 * p.total / 4
    layout = {"model__num_layers": 4, "parallel__ep": 2, "parallel__tp": 2, "parallel__pp": 2}
    shared = tiny_config(4, train__engine="megatron", **layout)
    q = cost.parameter_counts(shared)
    assert cost.state_gib(shared, 4) * 2**30 == 16 * ((q.total - q.routed_experts) / 2 + q.routed_experts / 2) / 2
    sharded = tiny_config(4, train__engine="megatron", parallel__data="shard", **layout)
    assert cost.state_gib(sharded, 4) == cost.state_gib(shared, 4) / 2 + 8 * q.total / 4 / 2**30
    t = tiny_config(4).train.model_copy(update={"engine": "deepspeed"})
    stages = [
        tiny_config(4).model_copy(update={"train": t, "deepspeed": DeepSpeedSection(zero_stage=stage)})
        for stage in range(4)
    ]
    found = [cost.state_gib(config, 4) * 2**30 for config in stages]
    assert found == [16 * p.total, 8 * p.total + 12 * p.total / 4, 4 * p.total + 16 * p.total / 4, 20 * p.total / 4]


def test_cost_imports_no_torch():
    code = "import sys, moe.observe.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_imbalance_costs_the_routed_experts_share_of_the_flops():
    # D 32, F 16, 2 MoE layers, top-2: 2 * 2 * 3 * 32 * 16 = 6,144 parameters of routed experts, 6 FLOPs each.
    config = tiny_config()
    share = 6 * 6144 / cost.flops_per_token(config)
    assert cost.imbalance_share(config, 1.0) == 0
    assert cost.imbalance_share(config, 2.0) == pytest.approx(share / (1 + share))  # the experts take twice as long
    assert cost.imbalance_share(config, 1e9) == pytest.approx(1, abs=1e-6)
