"""`alf-moe theory`: balancing rules on score streams without a network; tables and plots beside the theory's bounds.

alf-moe theory --streams fixed,iid,jump --methods sign,coordinate,proportional:inverse:0.2 --seeds 3 -o theory/
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moe.config import ASSIGNMENTS, RATES, BalanceSection, ConfigError, check_rule

SYNTAX = "METHOD[:SCHEDULE][:RATE], for example sign:1e-3 or proportional:inverse:0.2"


def parse_method(text: str) -> BalanceSection:
    """`sign:1e-3`, `proportional:inverse:0.2`, `coordinate`. Raises ConfigError with one sentence."""
    from pydantic import ValidationError

    from moe.config import sentence

    method, *rest = text.split(":")
    words: dict[str, Any] = {"method": method, "rate": RATES.get(method)}
    for word in rest:
        try:
            words["rate"] = float(word)
        except ValueError:
            words["rate" if word == "auto" else "schedule"] = word
    try:
        section = BalanceSection(**words)
    except ValidationError as error:
        raise ConfigError(f"--methods {text}: {sentence(error, ('balance',))}; write {SYNTAX}") from None
    try:
        check_rule(section)
    except ConfigError as error:
        raise ConfigError(f"--methods {text}: {error}") from None
    if method in ASSIGNMENTS:
        raise ConfigError(
            f"--methods {text}: {method} moves no bias, so it has no regret: choose of {', '.join(RATES)}"
        )
    if section.schedule == "linear":
        raise ConfigError(f"--methods {text}: the linear schedule has no end here; choose inverse or inverse_sqrt")
    return section


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="alf-moe theory", description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--streams", default="fixed,iid,drift,topics,jump", help="comma-separated kinds, or recorded=FILE.npz"
    )
    p.add_argument("--methods", default="sign:1e-3,proportional:1e-2,quantile:1,coordinate", help=SYNTAX)
    p.add_argument("--tokens", type=int, default=2048, help="tokens of a batch (T)")
    p.add_argument("--experts", type=int, default=64, help="experts (E)")
    p.add_argument("--top-k", type=int, default=6, help="experts per token (K)")
    p.add_argument("--score", choices=["sigmoid", "softmax"], default="sigmoid", help="score function")
    p.add_argument("--steps", type=int, default=160, help="batches of a run")
    p.add_argument("--seeds", type=int, default=3, help="seeds 0 ... N-1, the same batches for every method")
    p.add_argument("-o", "--out", default="theory", help="folder for results.json, table.md and the plots")
    return p


def check(options: argparse.Namespace) -> tuple[list[str], dict[str, BalanceSection]]:
    """Streams and sections by name. Raises ConfigError, and ValueError for a recording that does not fit."""
    from moe.balance.streams import KINDS, open_stream, recorded_path

    for name, least in (("tokens", 1), ("experts", 2), ("top_k", 1), ("steps", 2), ("seeds", 1)):
        if (value := getattr(options, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')} = {value} is too small: give at least {least}")
    if options.top_k >= options.experts:
        raise ConfigError(
            f"--top-k = {options.top_k} leaves nothing to choose from --experts = {options.experts}: give at most "
            f"{options.experts - 1}"
        )
    streams = options.streams.split(",")
    for kind in streams:
        if kind not in KINDS and recorded_path(kind) is None:
            raise ConfigError(f"--streams {kind} is not known: choose of {', '.join(KINDS)} or recorded=FILE.npz")
        if (path := recorded_path(kind)) and not Path(path).is_file():
            raise ConfigError(
                f"--streams {kind}: there is no such file; a training run with observe.record_scores writes it"
            )
        if recorded_path(kind):
            open_stream(
                kind, 0, 0, 0, "", options.steps, options.seeds - 1
            )  # refuses what cannot be read or is too short
    if (out := Path(options.out)).exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is no folder: name one for results.json, table.md and the plots")
    return streams, {text: parse_method(text) for text in options.methods.split(",")}


def main(argv: list[str]) -> int:
    """Run, write, print the table."""
    options = parser().parse_args(argv)
    out = Path(options.out)
    try:
        streams, sections = check(options)
        out.mkdir(parents=True, exist_ok=True)
        results = run(options, streams, sections)
    except (ValueError, OSError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = markdown(results)
    (out / "table.md").write_text(table + "\n")
    (out / "results.json").write_text(json.dumps({"options": vars(options), "results": results}))
    print(table)
    plot(results, out)
    print(f"\n{out}/table.md, results.json and the plots")
    return 0


def run(options: argparse.Namespace, streams: list[str], sections: dict[str, BalanceSection]) -> list[dict[str, Any]]:
    """One record per stream, seed and method."""
    from moe.balance.dual import sampling_floor
    from moe.balance.streams import JUMP_AT, open_stream
    from moe.observe import laboratory as lab

    found: list[dict[str, Any]] = []
    for kind in streams:
        for seed in range(options.seeds):
            sizes = options.tokens, options.experts, options.top_k, options.score
            batches, top_k = open_stream(kind, *sizes, options.steps, seed)
            traces, kept = lab.simulate(batches, list(sections.values()), top_k)
            tokens, experts = kept[0].shape
            best = lab.hindsight_bias(kept, top_k)
            for (name, section), trace in zip(sections.items(), traces, strict=True):
                regret = lab.static_regret(kept, trace, section, top_k, best)
                record: dict[str, Any] = {"stream": kind, "seed": seed, "method": name}
                floor = sampling_floor(tokens, experts, top_k)
                record |= lab.summary(trace, floor, int(len(kept) * JUMP_AT) if kind == "jump" else None)
                record |= {"experts": experts, "floor": floor, "maxvio": trace.maxvio, "deviation": trace.deviation}
                record |= {"lagrangian": trace.lagrangian, "regret": regret.cumulative.tolist()}
                record |= {"bound": None if regret.bound is None else regret.bound.tolist(), "covered": regret.covered}
                record |= regret.facts
                if kind == "fixed":
                    record["violations"] = lab.check_properties(kept[0], trace, section, top_k)
                found.append(record)
            print(f"{kind}, seed {seed}: {len(kept)} batches of {tokens} tokens", file=sys.stderr, flush=True)
    return found


def markdown(results: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    rows = [
        "| stream | method | early | late | late excess | regret | bound | properties violated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["stream"], r["method"]) for r in results):
        mine = [r for r in results if (r["stream"], r["method"]) == key]
        mean = {name: sum(r[name] for r in mine) / len(mine) for name in ("early", "late", "late_excess")}
        regret = sum(r["regret"][-1] for r in mine) / len(mine)
        bounds = [r["bound"][-1] for r in mine if r["bound"] is not None]
        bound = f"{sum(bounds) / len(bounds):.3g}" if bounds else mine[0]["covered"]
        broken = [name for r in mine for name, count in r.get("violations", {}).items() if count]
        properties = "; ".join(dict.fromkeys(broken)) or ("none" if "violations" in mine[0] else "–")
        rows.append(
            f"| {key[0]} | {key[1]} | {mean['early']:.3f} | {mean['late']:.3f} | {mean['late_excess']:+.3f} "
            f"| {regret:.3g} | {bound} | {properties} |"
        )
    return "\n".join(rows)


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """One PNG per stream, of seed 0: MaxVio against the floor, |A - L|, the Lagrangian, regret against the bounds."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'alf-moe[plots]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for kind in dict.fromkeys(r["stream"] for r in results):
        mine = [r for r in results if r["stream"] == kind and r["seed"] == 0]
        figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
        for index, r in enumerate(mine):
            steps = range(1, len(r["maxvio"]) + 1)
            line = {"color": f"C{index}", "label": r["method"], "linewidth": 1.2}
            axes[0, 0].plot(steps, r["maxvio"], **line)
            axes[0, 1].plot(steps, r["deviation"], **line)
            axes[1, 0].plot(steps, r["lagrangian"], **line)
            axes[1, 1].plot(steps, [v if v > 0 else float("nan") for v in r["regret"]], **line)
            if r["bound"] is not None:
                axes[1, 1].plot(steps, r["bound"], color=f"C{index}", linestyle="--", label=f"bound ({r['covered']})")
        axes[0, 0].axhline(mine[0]["floor"], color="black", linestyle=":", label="sampling floor")
        if kind == "fixed":
            axes[0, 1].axhline(mine[0]["experts"] - 1, color="black", linestyle=":", label="E - 1")
        titles = (
            "MaxVio",
            "max |A − L|, tokens",
            "Lagrangian per token",
            "regret against the best fixed bias, per token (where positive)",
        )
        for ax, title, log in zip(axes.flat, titles, ((0, 1), (0, 1), (0, 0), (1, 1)), strict=True):
            ax.set(
                title=title, xlabel="batch", xscale="log" if log[0] else "linear", yscale="log" if log[1] else "linear"
            )
            ax.legend(fontsize=8)
        values = sorted(v for r in mine for v in r["lagrangian"])  # a rule that overshoots at first leaves the picture
        low, high = values[0], values[int(0.9 * len(values))]
        axes[1, 0].set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low) + 1e-9)
        figure.suptitle(f"stream: {kind}, seed 0")
        figure.savefig(out / f"{kind.replace('=', '-').replace('/', '-')}.png", dpi=110)
        plt.close(figure)
