"""The simple bias rules: one class each, a move from the load error alone. Letters: L MoE layers, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.balance.balancer import BiasRule, State
from moe.balance.bias import rms_direction, sign_direction
from moe.balance.stats import RouterStats


class Sign(BiasRule):
    """b += u sign(L - A): DeepSeek's rule, arXiv:2408.15664, algorithm 1."""

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        return sign_direction(stats.tokens_per_expert), {}


class Proportional(BiasRule):
    """b += u e: the sub-gradient step on the dual, arXiv:2512.03915, normalised by the target load."""

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        return error_LE, {}


class Rms(BiasRule):
    """b += u e / RMS(e): Su Jianlin's MoE series; unmoved at exact balance."""

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        return rms_direction(error_LE), {}


class Smebu(BiasRule):
    """d = tanh(kappa e) - mean; m = beta m + (1 - beta) d; b += u m: Trinity Large, arXiv:2602.17004.

    State: "momentum" [L, E].
    """

    def initial_state(self, num_layers: int, num_experts: int) -> State:
        return super().initial_state(num_layers, num_experts) | {"momentum": torch.zeros(num_layers, num_experts)}

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        push_LE = torch.tanh(self.section.kappa * error_LE)
        push_LE = push_LE - push_LE.mean(-1, keepdim=True)
        beta = self.section.momentum
        momentum_LE = beta * self.state["momentum"].double() + (1 - beta) * push_LE
        return momentum_LE, {"momentum": momentum_LE}
