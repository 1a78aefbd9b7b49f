"""How the expert bias is chosen: `build_balancer(config, layers)` gives the object that the training loop steps.

A balancer owns the float32 master bias of its layers and whatever state its method has; the routers hold copies. It is
stepped once per applied optimizer step with the statistics of the whole global batch, and what it computes from batch n
is used from batch n + 1 on. A new method is one class and one line of BALANCERS.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe.balance.balancer import Balancer
from moe.balance.quantile import Bip, Coordinate, Quantile
from moe.balance.rules import Proportional, Rms, Sign, Smebu
from moe.config import ASSIGNMENTS, BalanceSection

BALANCERS: dict[str, type[Balancer]] = {
    "none": Balancer,
    "sign": Sign,
    "proportional": Proportional,
    "rms": Rms,
    "smebu": Smebu,
    "quantile": Quantile,
    "bip": Bip,
    "coordinate": Coordinate,
} | dict.fromkeys(ASSIGNMENTS, Balancer)  # these route without a bias: moe/balance/assignment.py


def build_balancer(section: BalanceSection, layers: Sequence[int], num_experts: int, top_k: int) -> Balancer:
    """The balancer of `balance.method`."""
    return BALANCERS[section.method](section, layers, num_experts, top_k)
