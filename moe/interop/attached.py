"""A balancer beside a model and a trainer that are not ours: what the glue for each library shares.

The glue hooks every router and says what it chose (`Routed`); the rest is here. One call a step, after the optimizer's:

    attached = attach(model, "coordinate")       # moe.interop.transformers or moe.interop.megatron
    ...
    optimizer.step()
    attached.step()

Letters: T tokens, K experts per token, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from kernels.permute import count_tokens
from moe.balance import build_balancer
from moe.balance.stats import RouterStats, add, collect, nothing, stack, zeros
from moe.config import ASSIGNMENTS, RATES, BalanceSection, ConfigError, check_rule, sentence
from moe.observe.load import effective_experts, idle, maxvio
from moe.parallel import Ranks

LOSSES = ("aux_loss", "group_loss", "phi_loss", "simbal_loss", "z_loss")


class Routed(NamedTuple):
    """What a router did with a micro-batch. topk_ids_TK int64 [T, K]. scores_TE: gives the unbiased scores [T, E]; called
    only for the rules that read them. token_mask_T bool, False for padding; None: every token is real."""

    topk_ids_TK: Tensor
    scores_TE: Callable[[], Tensor]
    token_mask_T: Tensor | None = None


class Groups(NamedTuple):
    """Group-limited routing, as `model.num_groups` and `model.group_top_k`."""

    num_groups: int = 1
    group_top_k: int = 1


class ForeignRouter:
    """A router of another library as far as a balancer knows it: `bias` is the name of its buffer [E]."""

    ema_share_E = None

    def __init__(self, module: nn.Module, bias: str, layer: int):
        self.module, self.bias, self.layer = module, bias, layer
        self.seen: RouterStats | None = None  # since the last step

    @property
    def expert_bias_E(self) -> Tensor:
        """The buffer itself."""
        return self.module.get_buffer(self.bias)

    def restore(self, bias_E: Tensor) -> None:
        """Put the master bias back where `.bfloat16()` or `.to(dtype)` has rounded the buffer: in bfloat16 a step of 1e-3 is
        lost above 0.5."""
        if self.expert_bias_E.dtype != torch.float32:
            setattr(self.module, self.bias, bias_E.to(self.expert_bias_E.device, copy=True))


class WholePass:
    """The forward pass of a whole model: whether anything is learned from it. Reentrant recomputation runs layers without
    gradient, so that the routers themselves cannot tell."""

    learns = True

    def watch(self, model: nn.Module) -> None:
        """Hook a module that every forward pass enters and leaves."""
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, always_call=True)

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before it."""
        self.learns = torch.is_grad_enabled()

    def end(self, *_: object) -> None:
        """After it, also when it failed."""
        self.learns = True


class Attached:
    """Moves the bias of a foreign model's routers. `attach` makes one; every rank of `group` calls `step` once per optimizer
    step.

    Counted is what the routers see in training mode, in a forward pass with gradient: evaluation, generation under no_grad
    and the recomputation of activations count nothing, micro-batches add up. The bias goes on from the model's own.
    """

    def __init__(
        self,
        routers: Sequence[ForeignRouter],
        section: BalanceSection | str,
        num_experts: int,
        top_k: int,
        groups: Groups,
        moe_layers: Sequence[int],
        group: dist.ProcessGroup | None,
    ):
        """routers: those of this rank. moe_layers: the layers with experts of the whole model, from 0. group: None for all
        ranks."""
        self.section = checked(section)
        self.routers, self.groups, self.group = sorted(routers, key=lambda router: router.layer), groups, group
        layers = [router.layer for router in self.routers]
        assert len(set(layers)) == len(layers), f"two routers of one layer among {layers}"
        if unknown := set(self.section.frozen_layers) - set(moe_layers):
            raise ConfigError(
                f"balance.frozen_layers has {min(unknown)}, which is no MoE layer: name some of {list(moe_layers)}"
            )
        self.balancer = build_balancer(self.section, layers, num_experts, top_k)
        self.needs = self.balancer.needs_of(self.section)
        self.last = zeros(len(layers), num_experts)
        if self.routers:
            start_LE = torch.stack([router.expert_bias_E.float() for router in self.routers])
            self.balancer.to(start_LE.device).state["bias"] = start_LE
            self._publish()

    def watch(
        self, router: ForeignRouter, whole: WholePass, read: Callable[[Any, tuple[Any, ...], Any], Routed]
    ) -> None:
        """Hook a router; read(module, args, output) says what one forward pass did."""

        def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            router.restore(self.balancer.bias_LE[self.routers.index(router)])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # -1: not the recomputation in the backward pass.
            if module.training and whole.learns and torch._C._current_graph_task_id() == -1:
                self.count(router, read(module, args, output))

        router.module.register_forward_pre_hook(before)
        router.module.register_forward_hook(after)

    def count(self, router: ForeignRouter, routed: Routed) -> None:
        """Add a micro-batch."""
        ids_TK, mask_T = routed.topk_ids_TK.detach(), routed.token_mask_T
        if mask_T is not None:
            ids_TK = ids_TK.masked_fill(~mask_T[:, None], -1)
        bias_E = router.expert_bias_E
        counts_E = count_tokens(ids_TK, len(bias_E))
        scores_TE = routed.scores_TE().detach().float() if self.needs else counts_E.new_zeros(0)
        stats = collect(self.needs, scores_TE, bias_E, ids_TK, counts_E, mask_T, *self.groups)
        router.seen = stats if router.seen is None else add(router.seen, stats)

    def step(self, applied: bool = True) -> None:
        """One step of the rule on what all ranks of the group counted since the last one: one all-reduce.

        applied: False when the optimizer skipped its step (a gradient that is not finite): the counts are forgotten, the
        bias stays. Raises RuntimeError when no router counted a token on any rank.
        """
        if not self.routers:  # a pipeline stage of dense layers
            return
        top_k = self.balancer.top_k
        seen = [
            router.seen if router.seen is not None else nothing(self.needs, router.expert_bias_E, top_k, *self.groups)
            for router in self.routers
        ]
        for router in self.routers:
            router.seen = None
        device = seen[0].tokens.device
        stats, stopped = self._ranks(device).start_balance_sum(stack(seen), not applied).wait()
        if stopped:
            return
        if not bool(stats.tokens.any()):  # sync: once a step
            raise RuntimeError(
                "no router has seen a token in training mode since the last step, so no bias can move: call model.train(), "
                "and step() after the forward passes"
            )
        self.balancer.to(device).step(stats)
        self.last = stats
        self._publish()

    def metrics(self) -> dict[str, float]:
        """Of the last step, over all ranks; the names are those of docs/metrics.md. Waits for the device."""
        if not self.routers:
            return {}
        counts_LE, bias_LE = self.last.tokens_per_expert.cpu(), self.balancer.bias_LE.cpu()
        rows = {
            "maxvio_batch": maxvio(counts_LE),
            "idle_batch": idle(counts_LE),
            "bias_range": bias_LE.amax(-1) - bias_LE.amin(-1),
        }
        out = {f"moe/{name}/max": float(row_L.max()) for name, row_L in rows.items()}
        out |= {f"moe/{name}/mean": float(row_L.mean()) for name, row_L in rows.items()}
        out["moe/effective_experts_batch/mean"] = float(effective_experts(counts_LE).mean())
        digits = max(2, len(str(self.routers[-1].layer)))
        values = zip(self.routers, rows["maxvio_batch"].tolist(), strict=True)
        return out | {f"moe/maxvio_batch/layer_{router.layer:0{digits}d}": value for router, value in values}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on; counts since the last step are not in it: save after `step`."""
        return self.balancer.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse; the routers get the bias. Raises ValueError for another method's state."""
        self.balancer.load_state_dict(state)
        for router in self.routers:
            router.seen = None
        self._publish()

    def _publish(self) -> None:
        for router, bias_E in zip(self.routers, self.balancer.bias_LE, strict=True):
            router.restore(bias_E)
        self.balancer.publish(self.routers)

    def _ranks(self, device: torch.device) -> Ranks:
        if not dist.is_initialized():
            return Ranks(0, 1, device)
        group = self.group or dist.group.WORLD
        return Ranks(dist.get_rank(group), dist.get_world_size(group), device, dp_group=group)


def checked(section: BalanceSection | str) -> BalanceSection:
    """The section of a bias rule, its rate filled in; a name alone is the method with its defaults. Raises ConfigError."""
    if isinstance(section, str):
        try:
            section = BalanceSection.model_validate({"method": section})
        except ValidationError as error:
            raise ConfigError(sentence(error, ("balance",))) from None
    if section.method in ASSIGNMENTS:
        raise ConfigError(
            f"balance.method = {section.method!r} assigns the batch itself, which only our own router does: choose a rule, one "
            f"of {', '.join(RATES)}"
        )
    for name in LOSSES:
        if value := getattr(section, name):
            raise ConfigError(
                f"balance.{name} = {value} is a loss, and an attached balancer only moves the bias: set it to 0, and use the "
                "other trainer's own"
            )
    if section.schedule == "linear" and section.freeze_step is None:
        raise ConfigError(
            "balance.schedule = 'linear' has no end: set balance.freeze_step to the number of optimizer steps"
        )
    check_rule(section)
    return section.model_copy(update={"rate": section.rate or RATES.get(section.method)})
