"""Our balancers on a stock Megatron-core GPTModel, in place of its sign update.

    from moe.interop.megatron import attach

    model = get_model(...)                       # GPTModel chunks, wrapped in DDP and Float16Module or not
    balancing = attach(model, "coordinate")      # or a BalanceSection(method="sign", rate=1e-3, ...)
    ...
    update_successful, *_ = optimizer.step()
    balancing.step(applied=update_successful)

The routers keep their `expert_bias`, which is in Megatron's checkpoints as before; `attach` gives them one where
`moe_router_enable_expert_bias` is off, and turns that switch off, so that Megatron's own update does nothing. Pipeline
stages balance their own layers, and save a `state_dict` each. Not with CUDA graphs of the router, whose replay runs no hook.
Written for megatron-core 0.16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from moe.config import BalanceSection, ConfigError
from moe.interop.attached import Attached, ForeignRouter, Groups, Routed, WholePass


def attach(
    model: nn.Module | Sequence[nn.Module], section: BalanceSection | str, group: dist.ProcessGroup | None = None
) -> Attached:
    """Balance all routers of the model, or of the chunks of this pipeline stage; see `Attached`.

    section: a rule's name, or its settings. group: the ranks that see different tokens of the same layers; None: Megatron's
    tensor, data and context parallel ranks together. Raises ConfigError for settings under which a bias cannot balance.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    config = get_model_config(chunks[0])
    _check(config)
    modules: list[Any] = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    for module in modules:
        _own_bias(module)
    routers = [ForeignRouter(module, "expert_bias", module.layer_number - 1) for module in modules]
    groups = Groups(config.moe_router_num_groups or 1, config.moe_router_group_topk or 1)
    if group is None and modules:
        group = modules[0].tp_dp_cp_group
    assert config.num_moe_experts is not None, "checked above"
    attached = Attached(
        routers, section, config.num_moe_experts, config.moe_router_topk, groups, _moe_layers(config), group
    )
    _check_groups(attached, config)
    for chunk in chunks:
        get_model_config(chunk).moe_router_enable_expert_bias = False
    whole = WholePass()
    for gpt in (module for chunk in chunks for module in chunk.modules() if isinstance(module, GPTModel)):
        whole.watch(gpt)
    for router in routers:
        attached.watch(router, whole, _read)
    return attached


def _read(module: TopKRouter, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> Routed:
    hidden, padding_mask = args[0], args[1] if len(args) > 1 else None
    _, map_TE = out
    # The map is what the layer gets; in the order of the experts, and without a wait for the device.
    topk_ids_TK = map_TE.byte().topk(module.topk, dim=-1).indices

    @torch.no_grad()
    def scores_TE() -> Tensor:
        return module.gating(hidden).flatten(0, -2).sigmoid()  # once more: one [T, D] x [D, E] product

    # True is padding, whatever the docstring of 0.16 says: the router counts where it is not.
    return Routed(topk_ids_TK, scores_TE, None if padding_mask is None else ~padding_mask.reshape(-1))


def _own_bias(router: Any) -> None:
    """The bias is ours to move: Megatron neither counts for it nor updates it."""
    router.enable_expert_bias = False
    if router.expert_bias is None:
        del router.expert_bias
        zeros_E = torch.zeros(router.num_experts, dtype=torch.float32, device=router.weight.device)
        router.register_buffer("expert_bias", zeros_E)


def _check(config: TransformerConfig) -> None:
    """Raises ConfigError for settings under which the bias, or a count, would not mean what it says."""
    wrong = {
        "num_moe_experts": (config.num_moe_experts is None, "a model with experts"),
        "moe_router_score_function": (config.moe_router_score_function != "sigmoid", "sigmoid: others ignore the bias"),
        "moe_router_load_balancing_type": (
            config.moe_router_load_balancing_type == "sinkhorn",
            "none or an auxiliary loss: sinkhorn ignores the bias",
        ),
        "moe_expert_capacity_factor": (
            config.moe_expert_capacity_factor is not None,
            "none: the load is counted before any drop",
        ),
        "moe_input_jitter_eps": (config.moe_input_jitter_eps is not None, "none: the scores are read without noise"),
        "moe_router_force_load_balancing": (config.moe_router_force_load_balancing, "false: it routes at random"),
        "mtp_num_layers": (bool(config.mtp_num_layers), "none: their routers have no layer number of their own"),
    }
    for name, (bad, want) in wrong.items():
        if bad:
            raise ConfigError(
                f"{name} = {vars(config)[name]!r} does not fit a balancer of the expert bias: it must be {want}"
            )


def _check_groups(attached: Attached, config: TransformerConfig) -> None:
    groups, top_k = attached.groups.group_top_k, config.moe_router_topk
    if attached.needs and groups < attached.groups.num_groups and top_k != 2 * groups:
        raise ConfigError(
            f"balance.method = {attached.section.method!r} reads scores, and with moe_router_topk = {top_k} Megatron chooses "
            f"its moe_router_group_topk = {groups} groups by the sum of {top_k // groups} scores instead of two: choose "
            "sign, proportional, rms or smebu"
        )


def _moe_layers(config: TransformerConfig) -> list[int]:
    """The layers with experts of the whole model, from 0, as Megatron reads `moe_layer_freq`."""
    every = config.moe_layer_freq
    if isinstance(every, int):
        return [layer for layer in range(config.num_layers) if layer % every == 0]
    return [layer for layer, sparse in enumerate(every) if sparse]
