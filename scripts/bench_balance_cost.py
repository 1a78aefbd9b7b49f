"""What balancing costs at the tiny preset: its timed sections over the step, and an A/B against balance.method = none.

    torchrun --nproc-per-node 2 scripts/bench_balance_cost.py [--config configs/tiny.toml] [--blocks 40]

Sections: the counts and further statistics in the forward, the all-reduce (start and wait), the bias step, publishing
it, the load statistics and the metrics of the logged lines; their sum over the step time, without the sinks.
A/B: two runs in the same processes, one with the configured method, one with none, take turns in blocks of BLOCK steps;
which of them goes first alternates. Once as trained (so B also has the step time of unbalanced experts), once with the
learning rate 0 and the bias frozen at 0 by rate 1e-12 (the same routing in both: the machinery of the bias step alone).
The interval is that of the mean over pairs of blocks, 95 %, Student's t.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy import stats as scipy_stats

import moe.model.router
from moe.balance import Balancer
from moe.config import load, resolve
from moe.observe.load import LoadTracker
from moe.parallel import BalanceSum, Ranks, build_ranks, join_ranks
from moe.train.about import provenance
from moe.train.loop import Run

BLOCK = 10  # one logged line each, as observe.log_every has it
WARM_UP = 3  # blocks of each run that are not counted
SECONDS: dict[str, float] = {}


def timed(owner: object, name: str, label: str) -> None:
    """Add the seconds of every call of owner.name to SECONDS[label]."""
    inner: Callable = getattr(owner, name)

    def outer(*args, **kwargs):
        start = time.perf_counter()
        result = inner(*args, **kwargs)
        SECONDS[label] = SECONDS.get(label, 0.0) + time.perf_counter() - start
        return result

    setattr(owner, name, outer)


def block(run: Run) -> float:
    """Seconds of BLOCK steps and the metrics of their logged line."""
    start = time.perf_counter()
    for _ in range(BLOCK):
        run.train_step(False)
    run.tracker.metrics(run.progress.step, run.balancer.bias_LE)
    return time.perf_counter() - start


def compare(
    files: list[str], overrides: list[str], ranks: Ranks, blocks: int
) -> tuple[list[float], list[float], float]:
    """Seconds of the counted blocks of the configured method and of none, and the sections' share of the former."""
    runs = []
    for method in ([], ["--balance.method", "none"]):
        words = ["--observe.wandb", "off", "--run.name", "bench", *overrides, *method]
        config = resolve(load(files, words), ranks.world_size, cuda=ranks.device.type == "cuda")
        runs.append(Run(config, ranks, Path(tempfile.mkdtemp()), False))
    seconds: tuple[list[float], list[float]] = ([], [])
    inside = 0.0
    for index in range(blocks + WARM_UP):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            ranks.barrier()
            SECONDS.clear()
            took = block(runs[which])
            if index >= WARM_UP:
                seconds[which].append(took)
                if which == 0:
                    inside += sum(SECONDS.values())
                    for label, value in SECONDS.items():
                        TOTAL[label] = TOTAL.get(label, 0.0) + value
    return seconds[0], seconds[1], inside / sum(seconds[0])


TOTAL: dict[str, float] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["configs/tiny.toml"])
    parser.add_argument("--blocks", type=int, default=40)
    options = parser.parse_args()
    rank, world_size, device = join_ranks()
    ranks = build_ranks(rank, world_size, device, load(options.config, []).parallel.ep)
    timed(moe.model.router, "count_tokens", "counts in the forward")
    timed(moe.model.router, "collect", "further statistics in the forward")
    timed(Ranks, "start_balance_sum", "all-reduce, start")
    timed(BalanceSum, "wait", "all-reduce, wait")
    timed(Balancer, "step", "bias step")
    timed(Balancer, "publish", "publish")
    timed(LoadTracker, "update", "load statistics")
    timed(LoadTracker, "metrics", "load metrics")
    if rank == 0:
        print("device:", torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores")
        print("versions:", {key: value for key, value in provenance().items() if value})
    for title, overrides in (
        ("as trained", []),
        ("learning rate 0, bias at rest", ["--optim.lr", "1e-12", "--balance.rate", "1e-12"]),
    ):
        TOTAL.clear()
        a, b, share = compare(options.config, overrides, ranks, options.blocks)
        if rank == 0:
            report(title, a, b, share)
    ranks.barrier()


def report(title: str, a: list[float], b: list[float], share: float) -> None:
    """Print one comparison."""
    ratios = [x / y - 1 for x, y in zip(a, b, strict=True)]
    mean, error = statistics.fmean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    half = float(scipy_stats.t.ppf(0.975, len(ratios) - 1)) * error
    print(f"\n{title}: {len(a)} pairs of {BLOCK} steps")
    print(f"  median step       {1e3 * statistics.median(a) / BLOCK:.2f} ms with balancing, "
          f"{1e3 * statistics.median(b) / BLOCK:.2f} ms with none")  # fmt: skip
    print(f"  A/B               {100 * mean:+.2f} % [{100 * (mean - half):+.2f}, {100 * (mean + half):+.2f}]")
    print(f"  timed sections    {100 * share:.3f} % of the step")
    for label, value in sorted(TOTAL.items(), key=lambda item: -item[1]):
        print(f"    {label:<33} {100 * value / sum(a):.3f} %")


if __name__ == "__main__":
    main()
