"""How balanced the experts are, from exact integer counts of the global batch. Definitions: docs/metrics.md.

Every function takes tokens_per_expert_LE int64 and returns a float64 tensor over layers, finite also at exact balance and
for a layer without tokens (0). Letters: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.balance.dual import sampling_floor


def relative_load(tokens_per_expert_LE: Tensor) -> Tensor:
    """A_k / L, [L, E] float64, L = K T / E the mean load; 1 everywhere for a layer without tokens."""
    counts = tokens_per_expert_LE.double()
    mean = counts.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, counts / mean.clamp_min(1e-300), 1.0)


def maxvio(tokens_per_expert_LE: Tensor) -> Tensor:
    """max_k A_k / L - 1 (arXiv:2408.15664, eq. 4)."""
    return relative_load(tokens_per_expert_LE).amax(-1) - 1


def minvio(tokens_per_expert_LE: Tensor) -> Tensor:
    """min_k A_k / L - 1: -1 when an expert is idle."""
    return relative_load(tokens_per_expert_LE).amin(-1) - 1


def avgvio(tokens_per_expert_LE: Tensor) -> Tensor:
    """mean_k |A_k / L - 1|."""
    return (relative_load(tokens_per_expert_LE) - 1).abs().mean(-1)


def cv(tokens_per_expert_LE: Tensor) -> Tensor:
    """std_k(A) / L."""
    return relative_load(tokens_per_expert_LE).std(-1, correction=0)


def idle(tokens_per_expert_LE: Tensor) -> Tensor:
    """Experts without a token; 0 for a layer that saw none at all."""
    routed_L1 = tokens_per_expert_LE.sum(-1, keepdim=True) > 0
    return ((tokens_per_expert_LE == 0) & routed_L1).sum(-1).double()


def effective_experts(tokens_per_expert_LE: Tensor) -> Tensor:
    """exp(entropy of the load shares) / E, in (0, 1]."""
    experts = tokens_per_expert_LE.shape[-1]
    share = relative_load(tokens_per_expert_LE) / experts
    return torch.special.entr(share).sum(-1).exp() / experts


def straggler(tokens_per_expert_LE: Tensor, ranks: int) -> Tensor:
    """Tokens received by the busiest of `ranks` contiguous blocks of experts / mean. With several copies of the experts
    (edp > 1) this is the factor of their joint load."""
    load_LE = relative_load(tokens_per_expert_LE)
    return load_LE.unflatten(-1, (ranks, -1)).mean(-1).amax(-1)


def _on_grid(tokens: int) -> int:
    # Padding makes T differ from batch to batch, and each new floor is a simulation: T is rounded to 7 binary digits, at
    # most 0.4 % of the floor. Powers of two, and most batch sizes, stay as they are.
    shift = max(0, tokens.bit_length() - 7)
    return (tokens + (1 << shift >> 1)) >> shift << shift


class History(NamedTuple):
    """What was between logged steps: steps [N] int64 (the last step of each row), counts [N, L, E] int64, and bias
    [N, L, E] float32, that of the last step; NaN where an older version wrote none."""

    steps: np.ndarray
    counts: np.ndarray
    bias: np.ndarray


class _Row(NamedTuple):
    step: int
    counts_LE: np.ndarray
    bias_LE: np.ndarray


def late_counts(history: History, share: float) -> np.ndarray:
    """Counts [L, E] summed over the rows that lie in the last `share` of the steps."""
    if len(history.steps) == 0:
        return np.zeros(history.counts.shape[1:], dtype=np.int64)
    begins = np.concatenate([[0], history.steps[:-1]])
    late = begins >= history.steps[-1] * (1 - share)
    late[-1] = True  # one row longer than the window: better that than nothing
    return history.counts[late].sum(axis=0)


def late_maxvio(history: History, share: float = 0.2) -> list[float]:
    """MaxVio of each layer's `late_counts`."""
    return maxvio(torch.from_numpy(late_counts(history, share))).tolist()


def late_idle(history: History, share: float = 0.2) -> int:
    """Experts, over all layers, without a token in `late_counts`."""
    return int(idle(torch.from_numpy(late_counts(history, share))).sum())


class LoadTracker:
    """What is counted over a run: seen and interval counts, idle streaks. `update` stays on the device.

    layers: global indices of the MoE layers, which appear in the metric names.
    """

    DEAD_LOAD, DEAD_STEPS = 0.01, 100
    MAX_ROWS = 2048  # 27 layers x 64 experts: 42 MB
    SIMULATED_RANKS = (2, 4, 8, 16, 64)

    def __init__(
        self, layers: Sequence[int], num_experts: int, top_k: int, ep: int, device: torch.device | str = "cpu"
    ):
        self.layers, self.top_k, self.ep = list(layers), top_k, ep
        shape = (len(self.layers), num_experts)
        self.seen_LE, self.interval_LE, self.last_LE, self.idle_streak_LE, self.low_streak_LE = (
            torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(5)
        )
        self.flips_LE = torch.zeros(shape, dtype=torch.bool, device=device)
        self.last_sign_LE = torch.zeros(shape, dtype=torch.int8, device=device)
        self.step = self.dropped_pairs = self.repeated_steps = 0
        self._rows: list[_Row] = []

    def update(self, counts_LE: Tensor, tokens_L: Tensor, bias_before_LE: Tensor, bias_after_LE: Tensor) -> None:
        """Take the counts of one applied step in."""
        self.step += 1
        self.last_LE = counts_LE
        self.seen_LE += counts_LE
        self.interval_LE += counts_LE
        routed_L1 = tokens_L[:, None] > 0  # a layer without tokens keeps its streaks
        idle_LE = counts_LE == 0
        self.idle_streak_LE = torch.where(routed_L1, (self.idle_streak_LE + 1) * idle_LE, self.idle_streak_LE)
        target_L1 = tokens_L[:, None] * self.top_k / counts_LE.shape[-1]
        low_LE = counts_LE < self.DEAD_LOAD * target_L1
        self.low_streak_LE = torch.where(routed_L1, (self.low_streak_LE + 1) * low_LE, self.low_streak_LE)
        sign_LE = (bias_after_LE - bias_before_LE).sign().to(torch.int8)
        self.flips_LE = sign_LE * self.last_sign_LE < 0
        self.last_sign_LE = sign_LE

    def count_dropped(self, pairs: int) -> None:
        """Pairs for which padded dispatch had no room in a step, which was repeated when there were any."""
        self.dropped_pairs += pairs
        self.repeated_steps += pairs > 0

    def metrics(self, step: int, bias_LE: Tensor) -> dict[str, float]:
        """Metrics of the last batch and of everything seen; closes the interval that ends with `step`."""
        if not self.layers:
            return {}
        last, seen, bias = self.last_LE.cpu(), self.seen_LE.cpu(), bias_LE.cpu().double()
        self._rows.append(_Row(step, self.interval_LE.cpu().numpy().copy(), bias.float().numpy()))
        if len(self._rows) > self.MAX_ROWS:  # neighbours are merged: every count stays, half of the times go
            odd, pairs = self._rows[len(self._rows) // 2 * 2 :], zip(self._rows[::2], self._rows[1::2], strict=False)
            self._rows = [b._replace(counts_LE=a.counts_LE + b.counts_LE) for a, b in pairs] + odd
        self.interval_LE.zero_()
        out = self._summaries(last, "batch") | self._layers("maxvio_batch", maxvio(last))
        median, p95 = maxvio(last).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        out |= {"moe/maxvio_batch/median": median, "moe/maxvio_batch/p95": p95}
        out |= self._one("maxvio_seen", maxvio(seen)) | self._one("idle_seen", idle(seen))
        out |= self._one("bias_range", bias.amax(-1) - bias.amin(-1)) | self._one("bias_drift", bias.mean(-1).abs())
        out |= self._one("flip_rate", self.flips_LE.double().mean(-1).cpu())
        out |= self._one("idle_streak", self.idle_streak_LE.amax(-1).double().cpu())
        out |= self._one("dead", (self.low_streak_LE >= self.DEAD_STEPS).sum(-1).double().cpu())
        out |= {"moe/dropped_pairs": self.dropped_pairs, "moe/repeated_steps": self.repeated_steps}
        self.dropped_pairs = self.repeated_steps = 0
        for ranks in self.SIMULATED_RANKS:
            if last.shape[-1] % ranks == 0:
                out |= self._one(f"straggler_{ranks}_batch", straggler(last, ranks))
        return out

    def val_metrics(self, counts_LE: Tensor) -> dict[str, float]:
        """Metrics of a held-out set, the bias frozen."""
        return self._summaries(counts_LE.cpu(), "val") if self.layers else {}

    def _summaries(self, counts_LE: Tensor, scope: str) -> dict[str, float]:
        tokens = int(counts_LE[0].sum()) // self.top_k
        floor = sampling_floor(_on_grid(tokens), counts_LE.shape[-1], self.top_k)
        out = self._one(f"maxvio_{scope}", maxvio(counts_LE))
        out |= self._one(f"excess_maxvio_{scope}", maxvio(counts_LE) - floor)
        out |= self._one(f"avgvio_{scope}", avgvio(counts_LE)) | self._one(f"cv_{scope}", cv(counts_LE))
        out |= self._one(f"idle_{scope}", idle(counts_LE)) | self._one(
            f"straggler_{scope}", straggler(counts_LE, self.ep)
        )
        worst, mean = minvio(counts_LE), effective_experts(counts_LE)
        out |= {
            f"moe/minvio_{scope}/min": float(worst.min()),
            f"moe/effective_experts_{scope}/mean": float(mean.mean()),
        }
        return out

    def _one(self, name: str, value_L: Tensor) -> dict[str, float]:
        return {f"moe/{name}/max": float(value_L.max()), f"moe/{name}/mean": float(value_L.mean())}

    def _layers(self, name: str, value_L: Tensor) -> dict[str, float]:
        # As many digits as the last layer needs, so that sorting by name is sorting by layer.
        digits = max(2, len(str(self.layers[-1])))
        named = zip(self.layers, value_L.tolist(), strict=True)
        return {f"moe/{name}/layer_{layer:0{digits}d}": v for layer, v in named}

    # -- state ---------------------------------------------------------------------------------------------------------

    _STATE = ("seen_LE", "interval_LE", "last_LE", "idle_streak_LE", "low_streak_LE", "flips_LE", "last_sign_LE")

    def state_dict(self) -> dict[str, Tensor]:
        """In the checkpoint."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_dict."""
        for name in self._STATE:
            setattr(self, name, state[name].clone())

    def history(self) -> History:
        """All logged rows."""
        shape = (len(self._rows), *self.seen_LE.shape)
        steps = np.array([row.step for row in self._rows], dtype=np.int64)
        counts = np.array([row.counts_LE for row in self._rows], dtype=np.int64).reshape(shape)
        return History(steps, counts, np.array([row.bias_LE for row in self._rows], dtype=np.float32).reshape(shape))

    def last_load(self) -> np.ndarray | None:
        """A_k / L [L, E] of the last closed interval, for the heat map; None before there is one."""
        return relative_load(torch.from_numpy(self._rows[-1].counts_LE)).numpy() if self._rows else None

    def write_npz(self, path: Path) -> None:
        """loads.npz of the run folder: steps, counts, bias, layers; replaced in one rename."""
        history, temporary = self.history(), path.with_name("loads.tmp.npz")
        np.savez_compressed(temporary, **history._asdict(), layers=np.array(self.layers))
        temporary.replace(path)

    def read_npz(self, path: Path, last_step: int) -> None:
        """Rows up to `last_step` of an earlier part of the run; none if the file is not there."""
        if path.exists():
            with np.load(path) as file:
                counts = file["counts"]
                bias: np.ndarray = file["bias"] if "bias" in file else np.full(counts.shape, np.nan, np.float32)
                rows = [_Row(*row) for row in zip(file["steps"].tolist(), counts, bias, strict=True)]
                self._rows = [row for row in rows if row.step <= last_step]

    def write_latest(self, path: Path) -> None:
        """loads-latest.npz for `alf-moe watch`: the last closed interval alone, so that it can be written at every logged
        step."""
        if self._rows:
            step, counts, bias = self._rows[-1]
            temporary = path.with_name("loads-latest.tmp.npz")
            np.savez(temporary, steps=[step], counts=counts[None], bias=bias[None], layers=np.array(self.layers))
            temporary.replace(path)
