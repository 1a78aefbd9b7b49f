"""Every setting is mapped to Megatron-core, read by our own code, or refused by name: a new one cannot be forgotten."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moe.config import Config, ConfigError, resolve, validate
from tests.tiny import CPU, tiny_tree

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None, reason="needs megatron-core: pip install 'alf-moe[megatron]'"
)
# Read by the loop, the data, the optimizer, the router, the balancer and the sinks, which every engine shares.
OURS = {
    "run", "optim", "balance", "evaluate", "checkpoint", "observe", "deepspeed",
    "model.init_std", "model.scale_residual_init",
    "data.path", "data.mix",
    "parallel.capacity_factor",  # of padded dispatch, which is refused
    "train.steps", "train.batch_size", "train.micro_batch_size", "train.deterministic", "train.max_skipped_steps",
    "train.spike_sigma", "train.timeout_s", "train.profile", "train.engine",
    "train.loss_chunk",  # not read: a limit on memory, and docs/engines.md says so
}  # fmt: skip
# Another value of every other setting, and what has to go with it.
OTHER: dict[str, dict[str, Any]] = {
    "model.vocab_size": {"vocab_size": 256}, "model.dim": {"dim": 64}, "model.num_layers": {"num_layers": 4},
    "model.num_heads": {"num_heads": 2}, "model.num_kv_heads": {"num_kv_heads": 4}, "model.head_dim": {"head_dim": 16},
    "model.rope_theta": {"rope_theta": 5e5}, "model.norm_eps": {"norm_eps": 1e-5},
    "model.tie_embeddings": {"tie_embeddings": True}, "model.first_k_dense": {"first_k_dense": 2},
    "model.dense_hidden_dim": {"dense_hidden_dim": 64}, "model.num_experts": {"num_experts": 16},
    "model.top_k": {"top_k": 3}, "model.num_shared_experts": {"num_shared_experts": 2},
    "model.expert_hidden_dim": {"expert_hidden_dim": 32}, "model.score_function": {"score_function": "softmax"},
    "model.renormalize": {"renormalize": False}, "model.num_groups": {"num_groups": 2, "group_top_k": 2},
    "model.group_top_k": {"group_top_k": 2, "num_groups": 2},
    "model.routed_scaling_factor": {"routed_scaling_factor": 2.5}, "model.train_router": {"train_router": False},
    "model.attention": {"attention": "mla", "num_kv_heads": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                        "qk_rope_head_dim": 4, "v_head_dim": 8},
    "model.q_lora_rank": {"q_lora_rank": 8}, "model.kv_lora_rank": {"kv_lora_rank": 8},
    "model.qk_nope_head_dim": {"qk_nope_head_dim": 8}, "model.qk_rope_head_dim": {"qk_rope_head_dim": 4},
    "model.v_head_dim": {"v_head_dim": 8},
    "data.seq_len": {"seq_len": 32}, "data.document_mask": {"document_mask": True},
    "parallel.ep": {"ep": 2}, "parallel.tp": {"tp": 2}, "parallel.pp": {"pp": 2}, "parallel.cp": {"cp": 2},
    "parallel.data": {"data": "shard"}, "parallel.dispatch": {"dispatch": "padded"},
    "train.compute_dtype": {"compute_dtype": "bfloat16"}, "train.kernels": {"kernels": "auto"},
    "train.activation_checkpointing": {"activation_checkpointing": "full"}, "train.compile": {"compile": True},
}  # fmt: skip


def settings() -> list[str]:
    """section.setting of everything that is not ours."""
    return [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        for name in field.annotation.model_fields  # type: ignore[union-attr]
        if not {section, f"{section}.{name}"} & OURS
    ]


def changed(section: str, change: dict[str, Any]) -> Config:
    tree = tiny_tree()
    tree["model"]["num_layers"] = 6
    dtype = "bfloat16" if section == "parallel" else "float32"  # as parallel.cp wants it
    tree["train"] |= {"engine": "megatron", "compute_dtype": dtype, "kernels": "torch"}
    tree.setdefault(section, {}).update(change)
    with patch("moe.config.engines.find_spec", return_value=True):  # also of Transformer Engine
        return resolve(validate(tree), 4, cuda=True)


def told(config: Config) -> dict[str, Any]:
    """What Megatron and the router in its layers are given."""
    from moe.model.router import Router
    from moe.train.engines.megatron_setup import autocast, ddp_config, gpt_settings, transformer_config

    theirs = {k: v for k, v in asdict(transformer_config(config, CPU)).items() if not callable(v)}
    router = vars(Router(config, 1)) | {"trained": Router(config, 1).weight.requires_grad}
    ours = {name: router[name] for name in ("choice", "groups", "seq_len", "kernels", "trained")}
    with autocast(config, CPU):
        return (
            theirs
            | asdict(ddp_config(config))
            | gpt_settings(config)
            | ours
            | {"autocast": torch.is_autocast_enabled("cpu")}
        )


@pytest.mark.parametrize("path", settings())
def test_a_setting_reaches_megatron_or_is_refused_by_name(path):
    assert path in OTHER, (
        f"{path} is new: map it in megatron_setup.py or refuse it in moe/config/engines.py; then add it here"
    )
    section, _ = path.split(".")
    try:
        config = changed(section, OTHER[path])
    except ConfigError as error:
        assert path in str(error)
        return
    without = {} if path == "model.num_groups" else {k: v for k, v in OTHER[path].items() if f"{section}.{k}" != path}
    assert told(config) != told(changed(section, without))


def shared(installed: set[str], **settings: Any) -> Config:
    """Two ranks that share sequences on a GPU, with these packages."""
    tree = tiny_tree()
    tree["train"] |= {"engine": "megatron", "compute_dtype": settings.pop("compute_dtype", None)}
    tree["model"] |= settings
    tree["parallel"] = {"cp": 2}
    with patch("moe.config.engines.find_spec", side_effect=lambda name: name in installed or None):
        return resolve(validate(tree), 2, cuda=True)


def test_shared_sequences_want_transformer_engine_and_what_its_attention_wants():
    both = {"megatron", "transformer_engine"}
    resolved = shared(both)
    assert resolved.train.compute_dtype == "bfloat16" and resolved.train.micro_batch_size == 8
    for installed, settings, says in (
        (
            {"megatron"},
            {},
            r"parallel\.cp = 2 .* Transformer Engine's, .* pip install .* 'transformer_engine\[pytorch\]'",
        ),
        (
            both,
            {"compute_dtype": "float32"},
            r"train\.compute_dtype = 'float32' .* parallel\.cp = 2: set it to bfloat16",
        ),
        (both, {"head_dim": 12}, r"model\.head_dim = 12 is no multiple of 8, .* parallel\.cp = 2: set it to 16"),
    ):
        with pytest.raises(ConfigError, match=says):
            shared(installed, **settings)
