"""The parts of a bias rule: pure functions from a batch's load to the next bias, vectorised over layers.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.balance.stats import RouterStats
from moe.config import BalanceSection


def target_load(tokens_per_expert_LE: Tensor) -> Tensor:
    """L = K T / E per layer, [L, 1] float64, from counts before any drop: sum_k A_k = K T exactly."""
    return tokens_per_expert_LE.sum(dim=-1, keepdim=True, dtype=torch.float64) / tokens_per_expert_LE.shape[-1]


def load_error(tokens_per_expert_LE: Tensor) -> Tensor:
    """e_k = (L - A_k) / L, [L, E] float64, positive for an expert with too little; 0 for a layer without tokens."""
    target_L1 = target_load(tokens_per_expert_LE)
    return (target_L1 - tokens_per_expert_LE) / target_L1.clamp_min(1e-300)


def sign_direction(tokens_per_expert_LE: Tensor) -> Tensor:
    """sign(L - A_k), float32, 0 for an expert exactly at the target (arXiv:2408.15664, algorithm 1).

    Compared in integers (E * A_k against sum A): exact beyond 2**24 tokens.
    """
    num_experts = tokens_per_expert_LE.shape[-1]
    total = tokens_per_expert_LE.sum(dim=-1, keepdim=True)
    return (total - num_experts * tokens_per_expert_LE).sign().float()


def rms_direction(error_LE: Tensor) -> Tensor:
    """e / RMS(e), 0 where RMS(e) = 0: the rule of Su Jianlin's MoE series."""
    rms_L1 = error_LE.square().mean(-1, keepdim=True).sqrt()
    return torch.where(rms_L1 > 0, error_LE / rms_L1.clamp_min(1e-300), 0.0)


def centred(bias_LE: Tensor) -> Tensor:
    """The bias minus its mean over experts, float32: the same routing, no drift. The mean is taken in float64."""
    return (bias_LE.double() - bias_LE.double().mean(dim=-1, keepdim=True)).float()


def schedule(section: BalanceSection, n: int) -> float:
    """Factor of the rate at step n (from 1): `balance.schedule` (the decaying ones: arXiv:2512.03915), times a linear
    warm-up, and 0 from `balance.freeze_step` on."""
    if section.freeze_step is not None and n >= section.freeze_step:
        return 0.0
    factor = min(1.0, n / section.warmup_steps) if section.warmup_steps else 1.0
    if section.schedule == "inverse":
        return factor / (n + section.schedule_offset)
    if section.schedule == "inverse_sqrt":
        return factor / (n + section.schedule_offset) ** 0.5
    if section.schedule == "linear":
        assert section.freeze_step is not None, "resolve() gives the linear schedule its end"
        return factor * (1 - n / section.freeze_step)
    return factor


class Gain:
    """The rate that needs no tuning: raised while successive load errors agree, lowered while they alternate.

    For an optimum that wanders and a load that is a sample, the lag-1 covariance of the errors is zero exactly at the gain
    of the Kalman filter, positive below it and negative above it (the innovation test of adaptive filtering; derivation
    and literature in docs/theory.md). So ln rate += SPEED * corr(z_n, z_{n-1}) with z = (L - A) / sqrt(L), whose sampling
    variance does not depend on the batch's size. It begins at HIGH, where a filter that knows nothing yet begins, and a jump
    of the optimum sets it back there: an error far above its mean and above what sampling makes (|z|^2 = E - K for
    independent tokens), in the direction of the last one. A burst, which the next batch does not repeat, sets nothing back.

    State, per layer: "gain" [L, 1], "last_error" [L, E], "error_power" [L, 1] (EMA of |z|^2, outliers cut to JUMP times
    the mean, so that the first batch after a jump does not hide the second), "age" [L, 1] int64.
    """

    LOW, HIGH, SPEED = 0.03, 1.0, 0.3
    JUMP, ALIKE, MEMORY = 4.0, 0.5, 0.9

    @classmethod
    def initial_state(cls, num_layers: int, num_experts: int) -> dict[str, Tensor]:
        """Before the first batch."""
        return {
            "gain": torch.full((num_layers, 1), cls.HIGH),
            "last_error": torch.zeros(num_layers, num_experts),
            "error_power": torch.zeros(num_layers, 1),
            "age": torch.zeros(num_layers, 1, dtype=torch.int64),
        }

    @classmethod
    def step(cls, state: dict[str, Tensor], stats: RouterStats) -> tuple[Tensor, dict[str, Tensor]]:
        """The rate [L, 1] for this batch, and the next state."""
        target_L1 = target_load(stats.tokens_per_expert)
        z_LE = (target_L1 - stats.tokens_per_expert) / target_L1.clamp_min(1e-300).sqrt()
        last_LE, age_L1 = state["last_error"].double(), state["age"]
        power_L1 = z_LE.square().sum(-1, keepdim=True)
        norms_L1 = (power_L1 * last_LE.square().sum(-1, keepdim=True)).sqrt()
        corr_L1 = torch.where(norms_L1 > 0, (z_LE * last_LE).sum(-1, keepdim=True) / norms_L1.clamp_min(1e-300), 0.0)
        gain_L1 = (state["gain"].double() * (cls.SPEED * corr_L1).exp()).clamp(cls.LOW, cls.HIGH)
        noise_L1 = stats.tokens_per_expert.shape[-1] - stats.tokens_per_expert.sum(-1) / stats.tokens.clamp_min(1)
        usual_L1 = torch.maximum(debiased(state["error_power"], age_L1, cls.MEMORY), noise_L1.double()[:, None])
        far_L1 = (age_L1 > 0) & (power_L1 > cls.JUMP * usual_L1)
        gain_L1 = torch.where(far_L1 & (corr_L1 > cls.ALIKE), cls.HIGH, gain_L1)
        kept_L1 = torch.where(far_L1, cls.JUMP * usual_L1, power_L1)
        return gain_L1, {
            "gain": gain_L1,
            "last_error": z_LE,
            "error_power": cls.MEMORY * state["error_power"] + (1 - cls.MEMORY) * kept_L1,
            "age": age_L1 + 1,
        }


def debiased(ema: Tensor, age: Tensor, memory: float) -> Tensor:
    """The exponential mean of `age` values that started at 0, as a weighted mean of those values, float64."""
    return ema.double() / (1 - memory ** age.clamp_min(1).double())
