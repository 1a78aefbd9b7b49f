"""RouterStats: what a router returns about a batch. Only integer sums: they add exactly over micro-batches and ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RouterStats(NamedTuple):
    """tokens [] or [L] int64: real tokens routed; tokens_per_expert [E] or [L, E] int64: the load A_k."""

    tokens: Tensor
    tokens_per_expert: Tensor


def stack(stats: list[RouterStats]) -> RouterStats:
    """One RouterStats with a leading layer dimension."""
    return RouterStats(*(torch.stack(field) for field in zip(*stats, strict=True)))


def add(a: RouterStats, b: RouterStats) -> RouterStats:
    """The statistics of both micro-batches together."""
    return RouterStats(*(x + y for x, y in zip(a, b, strict=True)))


def zeros(num_layers: int, num_experts: int, device: torch.device | str = "cpu") -> RouterStats:
    """The statistics of no token."""
    return RouterStats(
        torch.zeros(num_layers, dtype=torch.int64, device=device),
        torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device),
    )


def flatten(stats: RouterStats) -> Tensor:
    """One int64 vector, so that all layers and fields travel in one all-reduce."""
    return torch.cat([field.reshape(-1) for field in stats])


def unflatten(flat: Tensor, like: RouterStats) -> RouterStats:
    """The inverse of `flatten`, in the shapes of `like`."""
    parts = flat.split([field.numel() for field in like])
    return RouterStats(*(part.view_as(field) for part, field in zip(parts, like, strict=True)))
