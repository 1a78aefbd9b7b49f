"""Steps that must not reach the weights because their loss stands out."""

from __future__ import annotations

import statistics

from moe.parallel import Ranks
from moe.train.engines import StepOutput

WINDOW = 128  # losses; with fewer the spread is not known and nothing is refused


def mean_ce(out: StepOutput, ranks: Ranks) -> float:
    """Cross-entropy of the global batch in nats per token, equal on all ranks; an all-reduce of one number."""
    return float(ranks.sum(out.losses_3[0].double()) / out.tokens)


class SpikeGuard:
    """Refuses a step whose loss is above mean + sigma * standard deviation of the last WINDOW ones; sigma = 0: none.

    losses: the window, oldest first; in the checkpoint. A refused loss enters it cut to the limit: one outlier does not
    blind the guard, and a level that stays is accepted after a few steps. Every rank must bring the same losses.
    """

    def __init__(self, sigma: float, losses: list[float]):
        self.sigma, self.losses = sigma, losses

    def allows(self, loss: float) -> bool:
        """Judge the loss of this step and take it in. One that is not finite is left to the gradient's own check."""
        if not self.sigma or not abs(loss) < float("inf"):
            return True
        limit = self.limit()
        self.losses.append(min(loss, limit))
        del self.losses[:-WINDOW]
        return loss <= limit

    def limit(self) -> float:
        """The highest loss that passes."""
        if len(self.losses) < WINDOW:
            return float("inf")
        return statistics.fmean(self.losses) + self.sigma * statistics.pstdev(self.losses)
