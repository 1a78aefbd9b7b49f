"""What a balancing method is worth in GPU-hours on 8 to 65,536 GPUs: recorded routing of real runs, modelled machines.

    python scripts/simulate_scale.py record RUN ... --out docs/scale_routing.json      late loads of finished runs
    python scripts/simulate_scale.py simulate --config FILE [--section.setting VALUE] [--out docs/scale.json] [--plot FILE]
    python scripts/simulate_scale.py validate [--bench docs/bench_dispatch.json]       against what was measured on a CPU

docs/scale.md says what of it is measured, what modelled, and under which assumptions. The configuration must have the
E and K of the recording. Letters: N recorded intervals, L recorded MoE layers, E experts, K experts per token, D draws.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from launch.plan import DEVICES, GB, Device
from moe.config import Config, ConfigError, load, resolve
from moe.observe import cost, footprint
from moe.observe.runs import RunData, read_run
from moe.train.about import provenance

WORLDS = [8 * 2**n for n in range(14)]
PLACEMENTS = ("contiguous", "packed", "replicated")
# DeepEP, docs/legacy.md: 153 of 160 GB/s over NVLink among 8 GPUs, 43 to 58 of 50 GB/s over InfiniBand among 16 to 64; the
# smallest of each. Theirs are logical rates, which can exceed the link's.
ATTAINED_INSIDE, ATTAINED_OUTSIDE = 153 / 160, 43 / 50
# Llama 3 (arXiv:2407.21783, section 3.3.4): 419 unexpected interruptions of 16,384 GPUs in 54 days.
GPU_HOURS_BETWEEN_FAILURES = 16384 * 54 * 24 / 419
DRAWS = 200


# -- the recording -----------------------------------------------------------------------------------------------------


def read_recording(path: Path, late: float) -> dict[str, Any]:
    """Counts [N, L, E] of the intervals in the last `late` of a run, and the mean straggler factors of its single batches
    by number of ranks. Raises ConfigError."""
    run = read_run(path)
    if run.outcome.get("code") != 0:
        raise ConfigError(f"{path} has no exit.json with code 0: name runs that are finished")
    if run.loads is None:
        raise ConfigError(f"{path} has no readable loads.npz: name runs that have one")
    begins, last = np.concatenate([[0], run.loads.steps[:-1]]), int(run.loads.steps[-1])
    kept = begins >= last * (1 - late)
    if kept.sum() < 2:
        raise ConfigError(
            f"{path} has {kept.sum()} intervals in --late {late:g}: a placement needs 2, name more of the run"
        )
    experts = run.loads.counts.shape[-1]
    late_rows = [row for row in run.rows if row["train/step"] > last * (1 - late)]

    def mean(key: str) -> float | None:
        found = [row[key] for row in late_rows if row.get(key) is not None]
        return statistics.mean(found) if found else None

    batch = {str(n): mean(f"moe/straggler_{n}_batch/mean") for n in (2, 4, 8, 16, 64) if n < experts}
    maxvio = mean("moe/maxvio_batch/mean")
    if maxvio is None:
        raise ConfigError(f"{path} logged no moe/maxvio_batch/mean: name runs with a metrics.jsonl")
    return {
        "seed": run.config["run.seed"],
        "git": run.about.get("git"),
        "steps": [int(begins[kept][0]) + 1, last],
        "top_k": run.config["model.top_k"],
        "seq_len": run.config["data.seq_len"],
        "batch_tokens": run.config["train.batch_size"] * run.config["data.seq_len"],
        "straggler_batch": {n: value for n, value in batch.items() if value is not None} | {str(experts): 1 + maxvio},
        "val_ce": run.last("val/ce"),
        "counts": run.loads.counts[kept].tolist(),
    } | ({} if (rho := scored_correlation(run)) is None else {"rho_of_scores": rho})


def scored_correlation(run: RunData) -> float | None:
    """rho from recorded scores (observe.record_scores, with log_every = 1 so that the bias of every step is there): the
    variance of the counts of whole sequences over that of independent picks, all layers and steps. None without them."""
    loads, seq_len, seen, chance = run.loads, run.config["data.seq_len"], 0.0, 0.0
    if loads is None or loads.bias is None:
        return None
    rows = {int(step): row for row, step in enumerate(loads.steps)}
    for index, layer in enumerate(loads.layers):
        for file in sorted((run.path / "scores").glob(f"layer_{layer:02d}_steps_*.npz")):
            with np.load(file) as arrays:
                scores_NTE, steps, top_k = arrays["scores"], arrays["steps"].tolist(), int(arrays["top_k"])
            for scores_TE, step in zip(scores_NTE, steps, strict=True):
                if step not in rows or step - 1 not in rows or len(scores_TE) % seq_len:
                    continue  # the bias that routed this step is not in loads.npz, or the batch was cut
                biased_TE = scores_TE + loads.bias[rows[step - 1], index]
                chosen_TE = np.zeros(biased_TE.shape)
                np.put_along_axis(chosen_TE, np.argsort(-biased_TE, -1, kind="stable")[:, :top_k], 1, -1)
                counts_QE = chosen_TE.reshape(-1, seq_len, chosen_TE.shape[-1]).sum(1)
                p_E = counts_QE.mean(0) / seq_len
                seen += counts_QE.var(0, ddof=1).sum()
                chance += (seq_len * p_E * (1 - p_E)).sum()
    return (seen / chance - 1) / (seq_len - 1) if chance else None


# -- how uneven a batch is ---------------------------------------------------------------------------------------------


def shares(counts_NLE: np.ndarray) -> np.ndarray:
    """Of a layer's picks, float64."""
    return counts_NLE / counts_NLE.sum(-1, keepdims=True)


def contiguous(experts: int, ranks: int) -> np.ndarray:
    """Part of each expert's tokens that each rank gets, [E, ranks]: blocks of neighbours."""
    return np.repeat(np.eye(ranks), experts // ranks, axis=0)


def replicated(load_E: np.ndarray, ranks: int, spare: int) -> np.ndarray:
    """The same after DeepSeek's EPLB (arXiv:2412.19437, section 3.4): `spare` further places a rank go one by one to the
    expert with the most load a copy; copies are placed heaviest first on the least loaded rank with a free place, which
    has none of that expert where there is one. spare = 0: packed without copies."""
    copies = np.ones(len(load_E))
    for _ in range(spare * ranks):
        copies[np.argmax(np.where(copies < ranks, load_E / copies, -1))] += 1
    placed, free, loads = np.zeros((len(load_E), ranks)), np.full(ranks, len(load_E) // ranks + spare), np.zeros(ranks)
    for expert in np.argsort(-load_E / copies, kind="stable"):
        for _ in range(int(copies[expert])):
            rank = min(range(ranks), key=lambda r: (free[r] == 0, placed[expert, r] > 0, loads[r]))
            placed[expert, rank] += 1 / copies[expert]
            loads[rank] += load_E[expert] / copies[expert]
            free[rank] -= 1
    return placed


def straggler(counts_DE: np.ndarray, placed_ER: np.ndarray) -> np.ndarray:
    """Tokens of the busiest rank over the mean, [D]."""
    loads_DR = counts_DE @ placed_ER
    return loads_DR.max(-1) / loads_DR.mean(-1)


def expected(shares_NLE: np.ndarray, picks: float, ranks: int, draws: int = 50) -> float:
    """Mean straggler factor of batches of `picks` independent picks on contiguous ranks."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(max(1, round(picks)), shares_NLE, size=(draws, *shares_NLE.shape[:2]))
    return float(straggler(counts, contiguous(shares_NLE.shape[-1], ranks)).mean())


def correlation(recording: dict[str, Any]) -> float:
    """Correlation within a sequence, rho in [0, 1]: with the design effect 1 + (S - 1) rho of S tokens (Kish, Survey Sampling,
    1965) the mean MaxVio of drawn batches is that of the recorded ones."""
    p, picks = shares(np.array(recording["counts"])), recording["batch_tokens"] * recording["top_k"]
    measured, low, high = recording["straggler_batch"][str(p.shape[-1])], 0.0, 1.0
    for _ in range(20):
        rho = (low + high) / 2
        above = expected(p, picks / design_effect(rho, recording["seq_len"]), p.shape[-1]) > measured
        low, high = (low, rho) if above else (rho, high)
    return low  # 0 when independent picks are as uneven already


def design_effect(rho: float, seq_len: int) -> float:
    """How many tokens are worth one independent one."""
    return 1 + (seq_len - 1) * rho


class Imbalance(NamedTuple):
    """Straggler factors, means over the layers and micro-batches of a step: of one expert-parallel group, and of the slowest
    of `groups` that wait for each other at the end of the step, by groups."""

    one: float
    slowest: dict[int, float]


def imbalance(
    recording: dict[str, Any], rho: float, config: Config, placement: str, groups: list[int], spare: int
) -> Imbalance:
    """Of the recorded loads on config's expert-parallel groups. Placements are of the interval before."""
    m, p = config.model, shares(np.array(recording["counts"]))
    ranks, rng = config.parallel.ep, np.random.default_rng(0)
    micro = config.train.micro_batch_size or 1
    picks = ranks * micro * config.data.seq_len * m.top_k / design_effect(rho, config.data.seq_len)
    passes = config.train.batch_size // (ranks * groups[0] * micro)  # groups[0]: of this config
    layers = np.arange(config.num_moe_layers) * p.shape[1] // config.num_moe_layers
    intervals = np.unique(np.linspace(1, len(p) - 1, 5).round().astype(int))
    one, slowest = [], {n: [] for n in groups}
    for interval in intervals:
        pool_LD = np.empty((p.shape[1], DRAWS))
        for layer in range(p.shape[1]):
            before = p[interval - 1, layer]
            spares = {"packed": 0, "replicated": spare}
            fixed = placement == "contiguous"
            placed = contiguous(len(before), ranks) if fixed else replicated(before, ranks, spares[placement])
            drawn = rng.multinomial(max(1, round(picks)), p[interval, layer], size=DRAWS)
            pool_LD[layer] = straggler(drawn, placed)
        step_G = np.zeros(max(groups))
        for _ in range(passes):
            for layer in layers:
                step_G += pool_LD[layer, rng.integers(DRAWS, size=len(step_G))]
        step_G /= passes * len(layers)
        one.append(step_G.mean())
        for n in groups:
            slowest[n].append(step_G[: len(step_G) // n * n].reshape(-1, n).max(-1).mean())
    return Imbalance(float(np.mean(one)), {n: float(np.mean(values)) for n, values in slowest.items()})


# -- the machine -------------------------------------------------------------------------------------------------------


def step_seconds(
    config: Config, world: int, gpus: int, device: Device, mfu: float, hidden: float, slowest: float
) -> float:
    """One step on `world` ranks: arithmetic, of which the routed experts' part and the exchange of rows are stretched by the
    busiest rank of the slowest group; `hidden`: share of the transfers behind arithmetic."""
    arithmetic = config.tokens_per_step * cost.flops_per_token(config) / (world * device.tflops * 1e12 * mfu)
    stretched = arithmetic * cost.routed_share(config)
    sent = footprint.traffic(config, world, gpus)
    inside, outside = device.inside * GB * ATTAINED_INSIDE, device.outside * GB * ATTAINED_OUTSIDE
    rows = sent.rows_inside / inside + sent.rows_outside / outside
    gradients = sent.parameters / (inside if world <= gpus else outside)
    return arithmetic + (slowest - 1) * stretched + (1 - hidden) * (slowest * rows + gradients)


def checkpoint_interval(save: float, between: float) -> float:
    """Seconds of work from one checkpoint to the next (Daly, Future Generation Computer Systems 22, 2006; Young's
    sqrt(2 save between), CACM 17, 1974, is its first term). save, between: seconds of a save, mean between failures."""
    if save >= 2 * between:
        return between
    ratio = math.sqrt(save / (2 * between))
    return math.sqrt(2 * save * between) * (1 + ratio / 3 + ratio**2 / 9) - save


def goodput(save: float, restart: float, between: float) -> float:
    """Share of the time that is work which stays, at that interval (Daly, 2006): failures also hit saves and restarts."""
    work = checkpoint_interval(save, between)
    return work / (between * math.exp(restart / between) * math.expm1((work + save) / between))


# -- commands ----------------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    least, most = dict.fromkeys(("gpus", "sequences"), 1) | {"spare": 0}, {"mfu": 1.0, "hidden": 1.0, "rho": 1.0}
    for name in ("gpus", "sequences", "mfu", "hidden", "tokens", "save", "restart", "spare", "rho"):
        value, low, high = getattr(options, name), least.get(name, 0.0), most.get(name, math.inf)
        if value is None:
            continue
        positive = name in ("mfu", "tokens", "save")
        if not low <= value <= high or (positive and value == 0) or math.isinf(value):
            limit = "more than 0" if positive else f"at least {low:g}"
            raise ConfigError(
                f"--{name} = {value:g} is out of range: give {limit}" + (f", at most {high:g}" if name in most else "")
            )


def configs_of(options: argparse.Namespace, overrides: list[str]) -> dict[int, Config]:
    """The configuration for each number of GPUs that parallel.ep divides, with as many sequences a GPU. Raises ConfigError."""
    ep = load(options.config, overrides).parallel.ep
    sequences = lambda world: ["--train.batch_size", str(world * options.sequences)]  # noqa: E731
    worlds = [n for n in WORLDS if n % ep == 0]
    found = {n: resolve(load(options.config, [*overrides, *sequences(n)]), n, cuda=True) for n in worlds}
    if not found:
        raise ConfigError(f"parallel.ep = {ep} divides none of {WORLDS[0]} to {WORLDS[-1]:,} GPUs: choose a power of 2")
    return found


def simulate(options: argparse.Namespace, overrides: list[str], routing: dict[str, Any]) -> dict[str, Any]:
    """GPU-hours by method, placement and number of GPUs. Raises ConfigError."""
    configs = configs_of(options, overrides)
    smallest = next(iter(configs.values()))
    ranks, device = smallest.parallel.ep, DEVICES[options.device]
    for name, run in routing["runs"].items():
        found = (len(run["counts"][0][0]), run["top_k"])
        if found != (smallest.model.num_experts, smallest.model.top_k):
            raise ConfigError(
                f"model.num_experts, top_k = {smallest.model.num_experts}, {smallest.model.top_k} are not those of the "
                f"recording {name}, {found[0]}, {found[1]}: set them to these, or record runs of that shape"
            )
    kept = {n: goodput(options.save, options.restart, 3600 * GPU_HOURS_BETWEEN_FAILURES / n) for n in configs}

    def costs(slowest: dict[int, float]) -> dict[str, list[float]]:
        steps = [
            step_seconds(configs[n], n, options.gpus, device, options.mfu, options.hidden, slowest[n // ranks])
            for n in configs
        ]
        hours = [
            options.tokens / configs[n].tokens_per_step * seconds * n / 3600 / kept[n]
            for n, seconds in zip(configs, steps, strict=True)
        ]
        return {"step_s": steps, "gpu_hours": hours}

    groups = [n // ranks for n in configs]
    methods = {"balanced": {"contiguous": {"straggler": 1.0} | costs(dict.fromkeys(groups, 1.0))}}
    for name, run in routing["runs"].items():
        methods[name], rho = {}, correlation(run) if options.rho is None else options.rho
        for placement in PLACEMENTS:
            found = imbalance(run, rho, smallest, placement, groups, options.spare)
            slowest = {"slowest": list(found.slowest.values())}
            methods[name][placement] = {"straggler": found.one} | slowest | costs(found.slowest)
    settings = {name: getattr(options, name) for name in SETTINGS}
    intervals = [checkpoint_interval(options.save, 3600 * GPU_HOURS_BETWEEN_FAILURES / n) for n in configs]
    return {
        "about": provenance(), "config": options.config, "overrides": overrides, "settings": settings, "ep": ranks,
        "gpus": list(configs), "goodput": list(kept.values()), "checkpoint_interval_s": intervals, "methods": methods,
    }  # fmt: skip


SETTINGS = ("device", "sequences", "mfu", "hidden", "tokens", "save", "restart", "spare", "rho")


def table(found: dict[str, Any]) -> str:
    """Markdown: straggler factor of one group; thousands of GPU-hours; on the most GPUs what is saved against `none` (balanced,
    without one), and thousands of GPU-hours with experts packed by load, and with copies of the hot ones."""
    gpus = found["gpus"]
    chosen = [gpus.index(n) for n in dict.fromkeys((gpus[0], 512, 8192, 65536)) if n in gpus]
    heads = [f"{gpus[i]:,}" for i in chosen]
    lines = [
        f"| method | straggler | thousand GPU-hours on {' | '.join(heads)} | saved | packed | replicated |",
        "|---" * (5 + len(chosen)) + "|",
    ]
    none = found["methods"].get("none", found["methods"]["balanced"])["contiguous"]["gpu_hours"][-1]
    for name, placements in sorted(found["methods"].items(), key=lambda item: item[1]["contiguous"]["gpu_hours"][-1]):
        hours = placements["contiguous"]["gpu_hours"]
        others = [f"{placements[p]['gpu_hours'][-1] / 1e3:,.1f}" if p in placements else "–" for p in PLACEMENTS[1:]]
        middle = " | ".join(f"{hours[i] / 1e3:,.1f}" for i in chosen)
        saved = f"{100 * (1 - hours[-1] / none):.1f} %"
        lines.append(
            f"| {name} | {placements['contiguous']['straggler']:.2f} | {middle} | {saved} | {' | '.join(others)} |"
        )
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """GPU-hours beyond perfect balance, per cent, over the number of GPUs; dashed with replication."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    best = np.array(found["methods"]["balanced"]["contiguous"]["gpu_hours"])
    for name, placements in found["methods"].items():
        if name == "balanced":
            continue
        over = lambda kind: 100 * (np.array(placements[kind]["gpu_hours"]) / best - 1)  # noqa: B023, E731
        (line,) = axis.plot(found["gpus"], over("contiguous"), label=name)
        axis.plot(found["gpus"], over("replicated"), "--", color=line.get_color(), linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="GPU-hours beyond perfect balance, %")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def validate(routing: dict[str, Any], bench: dict[str, Any]) -> str:
    """Two tables: straggler factors of single batches on fewer ranks than rho was set on, predicted / measured; step time of 1,
    2 and 4 processes."""
    ranks = (2, 4, 8)
    lines = [f"| method | rho | {' | '.join(f'{n} ranks' for n in ranks)} |", "|---" * 5 + "|"]
    for name, run in routing["runs"].items():
        rho, p, measured = correlation(run), shares(np.array(run["counts"])), run["straggler_batch"]
        picks = run["batch_tokens"] * run["top_k"] / design_effect(rho, run["seq_len"])
        cells = [f"{expected(p, picks, n):.2f} / {measured[str(n)]:.2f}" for n in ranks]
        lines.append(f"| {name} | {rho:.3f} | {' | '.join(cells)} |")
    lines += [
        "",
        "| processes | compute, measured | rows, modelled | gradients, modelled | step, ms | measured | ratio |",
    ]
    lines.append("|---" * 7 + "|")
    for n, row in predicted_steps(bench).items():
        lines.append(
            f"| {n} | " + " | ".join(f"{1e3 * value:.0f}" for value in row[:5]) + f" | {row[3] / row[4]:.2f} |"
        )
    return "\n".join(lines)


def predicted_steps(bench: dict[str, Any]) -> dict[int, tuple[float, float, float, float, float]]:
    """Of scripts/bench_dispatch.py's step: seconds of compute (processes that do not talk), of rows and of gradients by
    footprint.traffic at the bandwidth of its bare exchanges, their sum, and the measured step. Nothing hidden, loads even."""
    from scripts.bench_dispatch import config_of

    found = {}
    for word, entry in bench["results"]["scaling"].items():
        n, seconds = int(word), {arm: statistics.median(values) for arm, values in entry["seconds"].items()}
        rows = gradients = 0.0
        if n > 1:
            exchange, sent = bench["results"]["exchange"][word], footprint.traffic(config_of(n, n), n, n)
            rate = exchange["mib_per_rank"] * 2**20 / statistics.median(exchange["seconds"]["bare"])
            rows, gradients = sent.rows_inside / rate, sent.parameters / rate
        found[n] = (seconds["silent"], rows, gradients, seconds["silent"] + rows + gradients, seconds["step"])
    return found


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the overrides of the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "simulate", "validate"))
    parser.add_argument("runs", type=Path, nargs="*", help="record: folders <method>/seedN of finished runs")
    parser.add_argument("--late", type=float, default=0.5, help="record: the last part of the steps")
    parser.add_argument("--routing", type=Path, default=Path("docs/scale_routing.json"))
    parser.add_argument("--bench", type=Path, default=Path("docs/bench_dispatch.json"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--device", default="H100", choices=DEVICES)
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--sequences", type=int, default=4, help="of a GPU in a step, whatever the number of GPUs")
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--hidden", type=float, default=0.5, help="share of the transfers behind arithmetic")
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--save", type=float, default=30.0, help="seconds in which a checkpoint stops the training")
    parser.add_argument("--restart", type=float, default=600.0, help="seconds from a failure to the next step")
    parser.add_argument("--rho", type=float, help="correlation within a sequence (default: each run's own)")
    parser.add_argument("--spare", type=int, default=1, help="places a rank for copies of hot experts")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2: the question was not understood."""
    options, overrides = parse(argv)
    try:
        if options.command == "record":
            runs = {path.resolve().parent.name: read_recording(path, options.late) for path in options.runs}
            if not runs or len(runs) < len(options.runs):
                raise ConfigError(
                    f"{len(options.runs)} runs have {len(runs)} methods: name one run of each method, at least one"
                )
            text = json.dumps({"about": provenance(), "runs": runs}, separators=(",", ":"))
            (options.out or options.routing).write_text(text + "\n")
            return 0
        check(options)
        routing = json.loads(options.routing.read_text())
        if options.command == "validate":
            print(validate(routing, json.loads(options.bench.read_text())))
            return 0
        found = simulate(options, overrides, routing)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if options.out:
        rounded = json.loads(json.dumps(found), parse_float=lambda word: float(f"{float(word):.5g}"))
        options.out.write_text(json.dumps(rounded, separators=(",", ":")) + "\n")
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
