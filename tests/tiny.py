"""Small configurations, models and batches for tests."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from moe.config import Config, resolve, validate
from moe.parallel import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def tiny_tree() -> dict[str, Any]:
    """A configuration of seconds: 1 dense + 2 MoE layers, 8 experts."""
    return {
        "run": {"name": "tiny", "seed": 0},
        "model": {
            "vocab_size": 128,
            "dim": 32,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "first_k_dense": 1,
            "num_experts": 8,
            "top_k": 2,
            "num_shared_experts": 1,
            "expert_hidden_dim": 16,
            "init_std": 0.05,
        },
        "data": {"seq_len": 16},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "train": {"steps": 10, "batch_size": 8, "loss_chunk": 24},
        "balance": {"method": "sign", "rate": 1e-2},
    }


def tiny_config(world_size: int = 1, **settings: Any) -> Config:
    """`tiny_config(train__steps=5)`: the tiny tree with dotted settings (double underscore for the dot), resolved."""
    tree = tiny_tree()
    for path, value in settings.items():
        section, key = path.split("__")
        tree.setdefault(section, {})[key] = value
    # The Megatron engine is refused without a GPU; `tests.moe.interop.megatron_model.patch` makes a CPU do.
    claimed = tree["train"].get("engine") == "megatron"
    if claimed:
        tree["train"] = {"compute_dtype": "float32", "kernels": "torch"} | tree["train"]
    if tree.get("parallel", {}).get("cp", 1) == 1:
        return resolve(validate(tree), world_size, cuda=claimed)
    # Sharing sequences, without Transformer Engine and the bfloat16 that it wants; `shared_attention.py` makes a CPU do.
    dtype = tree["train"].pop("compute_dtype")
    with patch("moe.config.engines.find_spec", return_value=True):
        config = resolve(validate(tree), world_size, cuda=True)
    return config.model_copy(update={"train": config.train.model_copy(update={"compute_dtype": dtype})})


def tiny_mla(**settings: Any) -> dict[str, Any]:
    """Settings for `tiny_config` with latent attention: 4 heads, queries and keys of 12 + 4 dims, values of 8."""
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_kv_heads": None}
    return {"model__attention": "mla"} | {f"model__{name}": size for name, size in sizes.items()} | settings


def random_tokens(batch: int = 8, seq: int = 16, vocab: int = 128, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token targets [batch, seq] int64."""
    ids = torch.randint(0, vocab, (batch, seq + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
