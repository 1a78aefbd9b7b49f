"""What observing a run costs: each part timed by itself, as a share of a step, and the bytes that it writes.

    python scripts/bench_observe.py                     # the parts, at the tiny preset's shape and at 27 layers x 64 experts
    python scripts/bench_observe.py --ab 6              # runs of configs/tiny.toml with and without, in turn; quiet machine

The parts are timed on one process and W&B offline, at the default intervals: counting at every step, a logged line every
observe.log_every steps, a heat map at most 200 times a run, a probe of the regret every observe.regret_every steps.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe.balance import build_balancer
from moe.balance.dual import solve_dual
from moe.config import Config, load, resolve
from moe.observe import cost
from moe.observe.load import LoadTracker
from moe.observe.regret import RegretMeter
from moe.observe.runs import read_run
from moe.observe.sinks import Sinks
from moe.parallel import Ranks

TINY = Path("configs/tiny.toml")
LARGE_STEP, LARGE_STEPS = 0.25, 20_000  # seconds, and steps of such a run: its heat maps are at most 200
ALONE = Ranks(0, 1, torch.device("cpu"))


def timer() -> Callable[[], float]:
    """Seconds of the wall or, on a busy machine, of this process."""
    return time.process_time if "--cpu" in sys.argv else time.perf_counter


def typical(part: Callable[[], object], repeats: int) -> float:
    """Seconds: the median of `repeats` calls after two that warm up."""
    clock, times = timer(), []
    for n in range(repeats + 2):
        begin = clock()
        part()
        if n >= 2:
            times.append(clock() - begin)
    return statistics.median(times)


def probe_seconds(config: Config, layers: int, experts: int, top_k: int, probes: int = 12) -> float:
    """A rank's part of a probe of the regret, without the forward pass: the mean, as large layers are measured in turn."""
    tokens, o = config.observe.regret_tokens, config.observe
    meter = RegretMeter(config.balance, range(layers), experts, top_k, tokens, o.regret_reservoir, 0, tokens)
    skew_E = 0.5 * torch.randn(experts)
    draw = lambda: torch.sigmoid(torch.randn(layers, tokens, experts) + skew_E)  # noqa: E731
    best_E = solve_dual(draw()[0], top_k).bias.float()
    clock, times = timer(), []
    for n in range(probes + 4):  # until the reservoir is full
        scores_LTE, bias_LE = draw(), best_E + 0.003 * torch.randn(layers, experts)
        begin = clock()
        meter.observe(scores_LTE, bias_LE, ALONE)
        times += [clock() - begin] * (n >= 4)
    return statistics.mean(times)


def parts(config: Config, layers: int, experts: int, top_k: int, tokens: int, folder: Path) -> list[tuple]:
    """(name, seconds, steps between two of them, bytes written) of everything at a step or a logged step."""
    torch.manual_seed(0)
    o = config.observe
    tracker = LoadTracker(range(layers), experts, top_k, ep=2)
    balancer = build_balancer(config.balance, list(range(layers)), experts, top_k)
    scores_LTE = torch.rand(layers, tokens, experts)
    ids = scores_LTE.topk(top_k, dim=-1).indices
    counts_LE = torch.stack([torch.bincount(layer.flatten(), minlength=experts) for layer in ids])
    tokens_L = torch.full((layers,), tokens)
    bias_LE = balancer.bias_LE
    about = {"parameters_total": 1, "parameters_active": 1, "flops_per_token": 1.0, "peak_tflops": 1.0, "floor": 0.1}
    about |= {"peak_source": "", "state_gib": 0.0, "free_memory_gib": 0.0, "world_size": 1, "device": "cpu"}
    about |= {"data_hash": "", "run_dir": "", "start_step": 0, "deterministic_flags": []}
    silence(True)
    sinks = Sinks(folder, config, about, None)
    step = 0

    def update() -> None:
        tracker.update(counts_LE, tokens_L, bias_LE, bias_LE)

    def metrics() -> dict[str, float]:
        nonlocal step
        step += o.log_every
        named = {"train/step": step, "train/tokens": step * tokens, "loss/ce": 3.0, "loss/aux": 0.0, "loss/z": 0.0}
        named |= {"optim/lr": 1e-3, "optim/grad_norm": 1.0, "optim/skipped_steps": 0, "speed/tokens_per_s": 1e3}
        named |= {"speed/step_s": 0.25, "speed/mfu": 0.1, "speed/balance_share": 0.01, "memory/peak_gib": 1.0}
        return tracker.metrics(step, bias_LE) | named

    update()
    row = metrics()
    found = [("counting", typical(update, 200), 1, 0), ("metrics", typical(metrics, 50), o.log_every, 0)]
    size = written(folder)
    found.append(("console, JSONL, W&B", typical(lambda: sinks.write(row), 50), o.log_every, 0))
    found[-1] = (*found[-1][:3], (written(folder) - size) // 52)
    latest = folder / "loads-latest.npz"
    found.append(
        ("loads-latest.npz", typical(lambda: tracker.write_latest(latest), 50), o.log_every, latest.stat().st_size)
    )
    where, picture = {"train/step": 1, "train/tokens": 1}, tracker.last_load()

    def image() -> None:
        sinks._image_slot = -1
        sinks.image(where, picture)

    size = written(folder)
    per_image = max(o.log_every, config.train.steps // 200)
    found.append(("heat map", typical(image, 20), per_image, 0))
    found[-1] = (*found[-1][:3], (written(folder) - size) // 22)
    sinks.finish({"outcome": "done"})
    silence(False)
    return found


def silence(on: bool) -> None:
    """The console line goes nowhere while it is timed."""
    sys.stdout = open(os.devnull, "w") if on else sys.__stdout__  # noqa: SIM115


def written(folder: Path) -> int:
    """Bytes of all files of a run folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def table(title: str, found: list[tuple], step_s: float, limit: float) -> bool:
    """Print one table; whether the sum keeps within `limit` of a step."""
    print(f"\n{title}, step {1e3 * step_s:.0f} ms")
    print("| part | ms | every | ms per step | share of the step | bytes per step |\n|---|---|---|---|---|---|")
    for name, seconds, every, size in found:
        share = seconds / every / step_s
        print(
            f"| {name} | {1e3 * seconds:.3f} | {every} | {1e3 * seconds / every:.4f} | {share:.3%} | {size / every:,.0f} |"
        )
    total = sum(seconds / every for _, seconds, every, _ in found) / step_s
    print(f"| all | | | {1e3 * total * step_s:.4f} | {total:.3%} | {sum(s / e for _, _, e, s in found):,.0f} |")
    print(f"limit {limit:.1%}: {'kept' if total <= limit else 'BROKEN'}")
    return total <= limit


def compare(pairs: int, steps: int, folder: Path) -> None:
    """Runs of the tiny preset with everything and with nothing, in turn; the 95 % interval of the difference of a step."""
    quiet = ["--observe.wandb", "off", "--observe.regret_every", "0", "--observe.log_every", str(steps)]
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for pair in range(pairs):
        order = list(seconds) if pair % 2 == 0 else list(reversed(seconds))  # a drift of the machine meets both
        for name in order:
            words = [
                "--train.steps",
                str(steps),
                "--optim.warmup_steps",
                "0",
                "--run.folder",
                str(folder),
                "--run.name",
                f"{name}-{pair}",
            ]
            words += [
                "--evaluate.max_tokens",
                "4096",
                *(quiet if name == "without" else ["--observe.wandb", "offline"]),
            ]
            command = [sys.executable, "-m", "launch.cli", "train", "--config", str(TINY), *words]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            run = read_run(folder / f"{name}-{pair}")
            times, ends = run.series("speed/step_s")[1], run.series("speed/step_s")[0]
            spans = [b - a for a, b in zip([0, *ends], ends, strict=False)]
            seconds[name].append(sum(t * n for t, n in zip(times, spans, strict=True)) / steps)
    differences = [a / b - 1 for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    mean = statistics.mean(differences)
    print(f"\nA/B, {pairs} pairs of {steps} steps: with / without − 1 = {mean:+.2%}", end="")
    if pairs > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, pairs - 1)) * statistics.stdev(differences) / math.sqrt(pairs)
        print(f", 95 % interval {mean - half:+.2%} to {mean + half:+.2%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny-step", type=float, default=0.25, help="seconds of a step of the tiny preset here")
    parser.add_argument(
        "--cpu", action="store_true", help="CPU time of this process in place of the wall clock: for a busy machine"
    )
    parser.add_argument("--ab", type=int, default=0, metavar="PAIRS", help="pairs of runs; default: no A/B")
    parser.add_argument(
        "--steps",
        type=int,
        default=100,
        help="steps of a run of the A/B; a multiple of observe.regret_every, of which one probe comes at the first step",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    tiny = resolve(load([str(TINY)], ["--observe.wandb", "offline"]), 2)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {cost.parameter_counts(tiny).total:,} parameters"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        (folder / "large").mkdir()
        m, every = tiny.model, tiny.observe.regret_every
        found = parts(tiny, tiny.num_moe_layers, m.num_experts, m.top_k, tiny.tokens_per_step, folder / "tiny")
        found.append(
            ("probe of the regret", probe_seconds(tiny, tiny.num_moe_layers, m.num_experts, m.top_k), every, 0)
        )
        kept = table("configs/tiny.toml", found, options.tiny_step, 0.01)
        long = tiny.model_copy(update={"train": tiny.train.model_copy(update={"steps": LARGE_STEPS})})
        found = parts(long, 27, 64, 6, 8192, folder / "large")
        found.append(("probe of the regret", probe_seconds(tiny, 27, 64, 6), every, 0))
        kept &= table("27 layers, 64 experts", found, LARGE_STEP, 0.005)
        if options.ab:
            compare(options.ab, options.steps, folder / "ab")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
