"""Our balancers on a Hugging Face DeepSeek-V3 or GLM-4-MoE model, which never moves its `e_score_correction_bias` itself.

    from moe.interop.transformers import attach

    model = DeepseekV3ForCausalLM(config)        # or Glm4MoeForCausalLM, from_pretrained too; wrapped in DDP too
    balancing = attach(model, "coordinate")      # or a BalanceSection(method="sign", rate=1e-3, ...)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()                         # with gradient accumulation: after the last micro-batch
        balancing.step()

With the Trainer, call `step` from a callback's on_optimizer_step. Tokens whose `attention_mask` is 0 are no load, where it
has the shape of the tokens [B, S]; with a mask of another form every token counts.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (  # pyright: ignore[reportMissingImports]
    DeepseekV3Model,
    DeepseekV3TopkRouter,
)
from transformers.models.glm4_moe.modeling_glm4_moe import (  # pyright: ignore[reportMissingImports]
    Glm4MoeModel,
    Glm4MoeTopkRouter,
)

from moe.config import BalanceSection
from moe.interop.attached import Attached, ForeignRouter, Groups, Routed, WholePass

ROUTERS = (DeepseekV3TopkRouter, Glm4MoeTopkRouter)
STACKS = (DeepseekV3Model, Glm4MoeModel)


class _Pass(WholePass):
    token_mask_T: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super().begin(model, args, kwargs)
        mask = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        self.token_mask_T = None
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):  # sync: only with a mask
            self.token_mask_T = mask.flatten().bool()


def attach(model: nn.Module, section: BalanceSection | str, group: dist.ProcessGroup | None = None) -> Attached:
    """Balance all routers of `model`; see `Attached`.

    section: a rule's name, or its settings. group: the ranks that see different tokens of one step; None: all ranks, or none
    where torch.distributed is not in use. Raises ConfigError, and ValueError for a model without such routers.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, ROUTERS)]
    if not found:
        known = ", ".join(kind.__name__ for kind in ROUTERS)
        raise ValueError(f"{type(model).__name__} has no router to balance: its layers must have one of {known}")
    gate: Any = found[0][1]
    routers = [ForeignRouter(module, "e_score_correction_bias", _layer(name)) for name, module in found]
    groups = Groups(gate.num_group, gate.topk_group)
    layers = [router.layer for router in routers]
    attached = Attached(routers, section, gate.num_experts, gate.top_k, groups, layers, group)
    whole = _Pass()
    for stack in (module for module in model.modules() if isinstance(module, STACKS)):
        whole.watch(stack)

    def read(_module: nn.Module, _args: tuple[Any, ...], out: tuple[Tensor, Tensor, Tensor]) -> Routed:
        logits_TE, _, topk_ids_TK = out
        return Routed(topk_ids_TK, logits_TE.sigmoid, whole.token_mask_T)

    for router in routers:
        attached.watch(router, whole, read)
    return attached


def _layer(name: str) -> int:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    assert found is not None, f"{name} lies in no numbered layer"
    return int(found[1])
