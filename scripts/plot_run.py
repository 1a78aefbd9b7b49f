"""The curve of a training run: loss, held-out loss and per-batch MaxVio over steps, from its metrics.jsonl.

python scripts/plot_run.py runs/tiny --out docs/tiny.png [--line "bigram=5.126" ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from moe.observe.sinks import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--line", nargs="*", default=[], help="NAME=VALUE: horizontal lines, nats per token")
    options = parser.parse_args()
    matplotlib.use("Agg")
    rows = read_metrics(options.run / "metrics.jsonl")

    def series(key: str) -> tuple[list[int], list[float]]:
        found = [(row["train/step"], row[key]) for row in rows if row.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    figure, (loss, load) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    loss.plot(*series("loss/ce"), linewidth=0.8, label="training")
    loss.plot(*series("val/ce"), "o-", markersize=4, label="held out")
    for index, line in enumerate(options.line):
        name, value = line.split("=")
        loss.axhline(float(value), color="black", linestyle=("--", ":", "-.")[index % 3], linewidth=0.8, label=name)
    loss.set(xlabel="step", ylabel="cross-entropy, nats per token")
    load.plot(*series("moe/maxvio_batch/max"), linewidth=0.8, label="worst layer")
    load.plot(*series("moe/maxvio_batch/mean"), linewidth=0.8, label="mean over layers")
    load.set(xlabel="step", ylabel="MaxVio of a batch", yscale="log")
    for axis in (loss, load):
        axis.legend()
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
