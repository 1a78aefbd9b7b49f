"""How the expert bias is chosen: `build_balancer(config, layers)` gives the object that the training loop steps.

A balancer owns the float32 master bias of its layers and whatever state its method has; the routers hold copies. It is
stepped once per applied optimizer step with the statistics of the whole global batch, and what it computes from batch n
is used from batch n + 1 on. Letters: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe.balance.bias import centred, sign_direction
from moe.balance.stats import RouterStats
from moe.config import BalanceSection


class HasExpertBias(Protocol):
    """A router, as far as a balancer knows it: expert_bias_E is a float32 buffer [E]."""

    expert_bias_E: Tensor


class Balancer:
    """`none`, and the base of every bias rule: a rule overrides `update`.

    layers: *global* indices of the transformer layers with experts, in order. frozen: such a layer's bias never moves.
    """

    def __init__(self, section: BalanceSection, layers: Sequence[int], num_experts: int):
        self.section = section
        self.layers = list(layers)
        self.bias_LE = torch.zeros(len(self.layers), num_experts, dtype=torch.float32)
        self.step_count = torch.zeros((), dtype=torch.int64)
        self.moving_L1 = torch.ones(len(self.layers), 1, dtype=torch.bool)

    def to(self, device: torch.device | str) -> Balancer:
        """Move the state; the bias stays float32."""
        self.bias_LE = self.bias_LE.to(device)
        self.moving_L1 = self.moving_L1.to(device)
        return self

    def freeze(self, layer: int) -> None:
        """Keep the bias of this global layer as it is (a frozen layer or a teacher)."""
        self.moving_L1[self.layers.index(layer)] = False

    def update(self, stats: RouterStats) -> Tensor:
        """The next bias [L, E] float32 from the global batch's statistics; pure."""
        return self.bias_LE

    def step(self, stats: RouterStats) -> None:
        """One dual step. Layers that routed no token stay as they are."""
        moves_L1 = self.moving_L1 & (stats.tokens > 0)[:, None]
        self.bias_LE = torch.where(moves_L1, self.update(stats), self.bias_LE)
        self.step_count += 1

    @torch.no_grad()
    def publish(self, routers: Sequence[HasExpertBias]) -> None:
        """Copy the master bias into the routers' `expert_bias_E` buffers, after every step and load."""
        torch._foreach_copy_([router.expert_bias_E for router in routers], list(self.bias_LE.unbind(0)))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return {"bias_LE": self.bias_LE, "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError, with nothing changed, when the state does not fit."""
        own = self.state_dict()
        if state.keys() != own.keys() or any(
            state[k].shape != own[k].shape or state[k].dtype != own[k].dtype for k in own
        ):
            shapes = {k: tuple(v.shape) for k, v in state.items()}
            raise ValueError(f"the saved state {shapes} is not that of balance.method = {self.section.method!r}")
        for name, value in state.items():
            setattr(self, name, value.clone().to(own[name].device))


class Sign(Balancer):
    """b_k += u * sign(L - A_k): DeepSeek's rule, arXiv:2408.15664, algorithm 1."""

    def update(self, stats: RouterStats) -> Tensor:
        assert self.section.rate is not None, "resolve() gives every bias rule a rate"
        bias_LE = self.bias_LE + self.section.rate * sign_direction(stats.tokens_per_expert)
        return centred(bias_LE) if self.section.centre else bias_LE


BALANCERS: dict[str, type[Balancer]] = {"none": Balancer, "sign": Sign}


def build_balancer(section: BalanceSection, layers: Sequence[int], num_experts: int) -> Balancer:
    """The balancer of `balance.method`."""
    return BALANCERS[section.method](section, layers, num_experts)
