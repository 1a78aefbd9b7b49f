"""What every bias rule shares: its state, when it moves, its options. A rule says only where the bias should go.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe.balance.bias import Gain, centred, load_error, schedule
from moe.balance.losses import update_share
from moe.balance.stats import FIXED_POINT, RouterStats
from moe.config import BalanceSection

State = dict[str, Tensor]


class HasExpertBias(Protocol):
    """A router, as far as a balancer knows it: expert_bias_E and, with phi_loss, ema_share_E are float32 buffers [E]."""

    @property
    def expert_bias_E(self) -> Tensor: ...

    @property
    def ema_share_E(self) -> Tensor | None: ...


class Balancer:
    """`none`, and the base of every method. Stepped once per applied optimizer step with the statistics of the whole
    global batch; the bias that it computes from batch n is used from batch n + 1 on.

    layers: *global* indices of the transformer layers with experts, in order. `state` holds float32 and int64 tensors
    whose first dimension is L; "bias" [L, E] float32 is the master copy, the routers hold others.
    """

    needs: frozenset[str] = frozenset()
    """Fields of RouterStats beyond the counts that the rule reads."""

    @classmethod
    def needs_of(cls, section: BalanceSection) -> frozenset[str]:
        """Fields of RouterStats beyond the counts that `step` reads; the routers collect them."""
        return cls.needs | ({"prob_sum"} if section.phi_loss else frozenset())

    def __init__(self, section: BalanceSection, layers: Sequence[int], num_experts: int, top_k: int):
        self.section, self.layers, self.num_experts, self.top_k = section, list(layers), num_experts, top_k
        self.step_count = 0
        shape = (len(self.layers), num_experts)
        self.state: State = {"bias": torch.zeros(shape, dtype=torch.float32)} | self.initial_state(*shape)
        if section.phi_loss:
            self.state["ema_share"] = torch.full(shape, 1 / num_experts)
        self.moving_L = torch.tensor([layer not in section.frozen_layers for layer in self.layers], dtype=torch.bool)

    # -- what a rule overrides -----------------------------------------------------------------------------------------

    def initial_state(self, num_layers: int, num_experts: int) -> State:
        """Further state, float32 or int64 with a leading layer dimension."""
        return {}

    def next_state(self, stats: RouterStats, n: int) -> State:
        """Every entry of `state` after step n (from 1); pure."""
        return {}

    # -- what the loop calls -------------------------------------------------------------------------------------------

    @property
    def bias_LE(self) -> Tensor:
        """The master bias [L, E] float32."""
        return self.state["bias"]

    def step(self, stats: RouterStats) -> None:
        """One dual step. Frozen layers, and those that routed no token, keep all of their state.

        Raises ValueError, with nothing changed, when `stats` lacks a field of `needs`.
        """
        if missing := [name for name in sorted(self.needs_of(self.section)) if getattr(stats, name) is None]:
            raise ValueError(f"balance.method = {self.section.method!r} needs the router statistics {missing}")
        moves_L = self.moving_L & (stats.tokens > 0)
        following = self.next_state(stats, self.step_count + 1)
        if self.section.phi_loss:
            assert stats.prob_sum is not None
            prob_sum_LE = stats.prob_sum.double() / FIXED_POINT
            rate = self.section.phi_rate
            following["ema_share"] = update_share(self.state["ema_share"], prob_sum_LE, stats.tokens, rate)
        for name, new in following.items():
            old = self.state[name]
            self.state[name] = torch.where(moves_L.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)
        self.step_count += 1

    @torch.no_grad()
    def publish(self, routers: Sequence[HasExpertBias]) -> None:
        """Copy the master bias (and the shares of phi_loss) into the routers' buffers, after every step and load."""
        if not routers:  # a model without MoE layers: _foreach_copy_ refuses an empty list
            return
        torch._foreach_copy_([router.expert_bias_E for router in routers], list(self.bias_LE.unbind(0)))
        if self.section.phi_loss:
            shares = [router.ema_share_E for router in routers if router.ema_share_E is not None]
            torch._foreach_copy_(shares, list(self.state["ema_share"].unbind(0)))

    def to(self, device: torch.device | str) -> Balancer:
        """Move the state; dtypes stay."""
        self.state = {name: value.to(device) for name, value in self.state.items()}
        self.moving_L = self.moving_L.to(device)
        return self

    def state_dict(self) -> State:
        """Everything that the next step depends on."""
        return {**self.state, "step_count": torch.tensor(self.step_count, dtype=torch.int64)}

    def load_state_dict(self, state: State) -> None:
        """Raises ValueError, with nothing changed, when the state is another method's or another shape's."""
        own = self.state_dict()
        if state.keys() != own.keys() or any(
            state[k].shape != own[k].shape or state[k].dtype != own[k].dtype for k in own
        ):
            shapes = {k: tuple(v.shape) for k, v in state.items()}
            raise ValueError(f"the saved state {shapes} is not that of balance.method = {self.section.method!r}")
        self.step_count = int(state["step_count"])
        self.state = {name: state[name].clone().to(own[name].device) for name in self.state}


class BiasRule(Balancer):
    """b += rate_n * x, centred: a rule gives the move x. `rate = "auto"` sets the rate by `Gain`.

    The rate of step n is `balance.rate` times `schedule`; clipping of the load error and freezing are the same for all.
    """

    centres = True
    """Whether `balance.centre` applies."""

    def initial_state(self, num_layers: int, num_experts: int) -> State:
        return Gain.initial_state(num_layers, num_experts) if self.section.rate == "auto" else {}

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        """x [L, E], score units, and the rule's further state. error_LE: e = (L - A) / L, float64, clipped. rate_L1: what
        x will be multiplied by, float64."""
        raise NotImplementedError

    def next_state(self, stats: RouterStats, n: int) -> State:
        s = self.section
        error_LE = load_error(stats.tokens_per_expert)
        if s.clip is not None:
            error_LE = error_LE.clamp(-s.clip, s.clip)
        if s.rate == "auto":
            rate_L1, gain_state = Gain.step(self.state, stats)
        else:
            assert isinstance(s.rate, float), "resolve() gives every bias rule a rate"
            rate_L1, gain_state = error_LE.new_full((len(error_LE), 1), s.rate), {}
        rate_L1 = rate_L1 * schedule(s, n)
        move_LE, state = self.move(stats, error_LE, rate_L1)
        bias_LE = self.bias_LE.double() + rate_L1 * move_LE.double()
        return gain_state | state | {"bias": centred(bias_LE) if s.centre and self.centres else bias_LE.float()}
