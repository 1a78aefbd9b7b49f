"""A stock Megatron-core GPTModel that a CPU can run: what is replaced, and only for the CPU."""

from __future__ import annotations

import hashlib
import re

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, SEQUENCE, EXPERTS, TOP_K = 64, 12, 8, 2


def patch():
    """What Megatron asks CUDA for."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # Megatron asks for it by name
    random._get_cuda_rng_state = lambda *_, **__: None  # saved around recomputation: the model draws nothing
    random._set_cuda_rng_state = lambda *_, **__: None
    torch.cuda.current_stream = lambda *_: None  # 0.19 asks before every reduction, and uses it where it overlaps
    schedules.torch = OnCpu()  # the schedules count tokens on "cuda"
    rope_utils.torch = OnCpu()  # an index of chunks goes there
    torch.Tensor.cuda = lambda self, *_, **__: self


class OnCpu:
    """torch, but for the device of zeros and pinned memory."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def zeros(self, *sizes, device=None, **settings):
        return torch.zeros(*sizes, **settings)

    def tensor(self, data, *, pin_memory=False, **settings):
        return torch.tensor(data, **settings)


def begin(**parallel):
    """Once in a process: Megatron's groups and generators, without CUDA."""
    patch()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(**parallel)
        random.initialize_rng_tracker(inference_rng_tracker=True)


class CpuRouter(TopKRouter):
    """The stock router but for its product, which needs Transformer Engine in 0.16.1."""

    def gating(self, input):
        return torch.nn.functional.linear(input.float(), self.weight.float(), self.bias)


def build(ep=1, **settings):
    """1 dense and 2 MoE layers."""
    sizes = dict(
        num_layers=3, hidden_size=32, num_attention_heads=4, ffn_hidden_size=32, use_cpu_initialization=True,
        num_moe_experts=EXPERTS, moe_router_topk=TOP_K, moe_ffn_hidden_size=16, moe_layer_freq=[0, 1, 1],
        moe_router_score_function="sigmoid", moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="allgather", expert_model_parallel_size=ep, moe_shared_expert_intermediate_size=16,
        add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu, hidden_dropout=0.0,
        attention_dropout=0.0, bias_dropout_fusion=False, gradient_accumulation_fusion=False, normalization="RMSNorm",
        persist_layer_norm=False, masked_softmax_fusion=False, moe_router_dtype="fp32", init_method_std=0.2,
    )  # fmt: skip
    config = TransformerConfig(**(sizes | settings))
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in block.layer_specs[1:]:
        layer.submodules.mlp.submodules.router = CpuRouter
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    _draw(model, parallel_state.get_expert_model_parallel_rank() * EXPERTS // ep)
    return model.train()


@torch.no_grad()
def _draw(model, first_expert):
    """Weights that depend on their names alone, whatever the layout; an expert's is its global number."""
    for name, weight in model.named_parameters():
        name = re.sub(r"local_experts\.(\d+)", lambda found: f"experts.{first_expert + int(found[1])}", name)
        if weight.dim() > 1:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
            weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))


def routers(model):
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def forward(model, tokens, **more):
    """The mean loss of next-token prediction."""
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    return model(tokens, positions, mask, labels=tokens, **more).mean()
