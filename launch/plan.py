"""`alf-moe plan`: will it fit, how fast can it be, how long does it take. Arithmetic alone; imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NamedTuple

from moe.config import Config, ConfigError, load, resolve

GB, GIB = 1e9, 2**30


class Device(NamedTuple):
    """memory: GiB; tflops: dense bf16; inside, outside: GB/s that one sends to its node's and to other nodes' devices."""

    memory: float
    tflops: float
    inside: float
    outside: float


# Memory, dense bf16 rate and NVLink (half of the two-way figure) from NVIDIA's data sheets of each part; outside: one network
# card of 200 (A100) or 400 Gbit/s a GPU, as in DGX A100, DGX H100 and DGX B200.
DEVICES = {
    "A100": Device(80e9 / GIB, 312.0, 300.0, 25.0),
    "H100": Device(80e9 / GIB, 989.0, 450.0, 50.0),
    "H200": Device(141e9 / GIB, 989.0, 450.0, 50.0),
    "B200": Device(180e9 / GIB, 2250.0, 900.0, 50.0),
}
RESERVED = 3.0  # GiB a GPU: context, NCCL and the allocator's rest; a rule of thumb, not measured


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the overrides."""
    p = argparse.ArgumentParser(prog="alf-moe plan", description="Memory, traffic and time of a run, on paper.")
    p.add_argument("--config", action="append", default=[], help="TOML file; repeatable, later wins")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--gpus", type=int, default=8, help="GPUs, and processes, of a node (default 8)")
    p.add_argument("--device", default="H100", help=f"one of {', '.join(DEVICES)} (default H100)")
    p.add_argument("--memory", type=float, help="GiB of a GPU, in place of the device's")
    p.add_argument("--tokens", type=float, help="token budget, as 2e12; default: train.steps of the configuration")
    p.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached in practice (default 0.4)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p.parse_known_args(argv)


def check(options: argparse.Namespace) -> Device:
    """The device, with --memory. Raises ConfigError."""
    for name in ("nodes", "gpus"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} = {getattr(options, name)} is too small: give at least 1")
    for name, most in (("memory", None), ("tokens", None), ("mfu", 1.0)):
        value = getattr(options, name)
        if value is not None and not 0 < value <= (most or float("inf")):
            raise ConfigError(
                f"--{name} = {value:g} is out of range: give more than 0" + (f", at most {most:g}" if most else "")
            )
    if options.device not in DEVICES:
        raise ConfigError(
            f"--device {options.device} is not known: choose {', '.join(DEVICES)}, and --memory for another size"
        )
    device = DEVICES[options.device]
    return device if options.memory is None else device._replace(memory=options.memory)


def plan(config: Config, device: Device, nodes: int, gpus: int, tokens: float | None, mfu: float) -> dict[str, Any]:
    """Everything that is printed. config: resolved for nodes * gpus ranks."""
    from moe.observe import cost, footprint

    world = nodes * gpus
    counts, flops = cost.parameter_counts(config), cost.flops_per_token(config)
    budget = tokens or config.train.steps * config.tokens_per_step
    sent = footprint.traffic(config, world, gpus)
    arithmetic = world * device.tflops * 1e12 / flops
    inside, outside = sent.rows_inside / (device.inside * GB), sent.rows_outside / (device.outside * GB)
    # A collective over several nodes is as fast as its slowest link, one card a GPU.
    gradients = sent.parameters / ((device.inside if nodes == 1 else device.outside) * GB)
    network_s = inside + outside + gradients
    network = config.tokens_per_step / network_s if network_s else float("inf")
    compute_s = config.tokens_per_step / (arithmetic * mfu)
    step = {"nothing hidden": compute_s + network_s, "all hidden": max(compute_s, network_s)}
    modes = {}
    for mode in ("none", "selective", "full"):
        other = config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": mode})})
        balanced, worst = (footprint.memory(other, world, worst) for worst in (False, True))
        modes[mode] = {"balanced": balanced._asdict(), "worst": worst._asdict()}
    return {
        "parameters": counts._asdict(),
        "flops_per_token": flops,
        "tokens": budget,
        "tokens_per_active_parameter": budget / counts.active,
        "world_size": world,
        "sequences_per_rank": config.train.batch_size // world,
        "memory": modes,
        "mode": config.train.activation_checkpointing,
        "memory_limit": device.memory * GIB,
        "checkpoint": 12 * counts.total,
        "sent_per_step": sent._asdict(),
        "bound_arithmetic_tokens_per_s": arithmetic,
        "bound_network_tokens_per_s": network,
        "mfu": mfu,
        "tokens_per_s": {name: config.tokens_per_step / seconds for name, seconds in step.items()},
        "steps": budget / config.tokens_per_step,
        "days": {name: budget / config.tokens_per_step * seconds / 86400 for name, seconds in step.items()},
    }


def fits(found: dict[str, Any]) -> bool:
    """Whether the mode of the configuration fits with balanced loads."""
    return found["memory"][found["mode"]]["balanced"]["peak"] + RESERVED * GIB <= found["memory_limit"]


def text(found: dict[str, Any], options: argparse.Namespace) -> str:
    """For the terminal."""
    counts, sent = found["parameters"], found["sent_per_step"]
    short = lambda n: f"{n / 1e9:,.2f} B" if n >= 1e9 else f"{n / 1e6:,.2f} M"  # noqa: E731
    per_parameter = found["tokens_per_active_parameter"]
    ranks = f"{found['world_size']:,} ({options.nodes} x {options.gpus} {options.device})"
    gflop = found["flops_per_token"] / 1e9
    lines = [
        f"parameters   {short(counts['total'])}, active {short(counts['active'])}; {gflop:,.2f} GFLOP a token",
        f"tokens       {found['tokens']:.3g} in {found['steps']:,.0f} steps; {per_parameter:,.1f} for each active parameter",
        f"ranks        {ranks}, {found['sequences_per_rank']} sequences a step each",
        f"checkpoint   {found['checkpoint'] / GB:,.1f} GB (float32 parameters and both moments)",
        "",
        f"GiB a rank, of {found['memory_limit'] / GIB:.1f} less {RESERVED:.0f} for context and communication:",
        f"  {'checkpointing':<14}{'state':>8}{'activations':>13}{'loss':>7}{'exchange':>10}{'peak':>8}{'  worst load':>14}",
    ]
    for mode, memory in found["memory"].items():
        one = {name: value / GIB for name, value in memory["balanced"].items()}
        state, kept = one["parameters"] + one["gradients"] + one["optimizer"], one["activations"] + one["weight_copies"]
        mark = " <- configured" if mode == found["mode"] else ""
        lines.append(
            f"  {mode:<14}{state:>8.2f}{kept:>13.2f}{one['loss']:>7.2f}{one['exchange']:>10.2f}{one['peak']:>8.2f}"
            f"{memory['worst']['peak'] / GIB:>14.2f}{mark}"
        )
    rows, outside, parameters = (sent[name] / GB for name in ("rows_inside", "rows_outside", "parameters"))
    arithmetic, network = found["bound_arithmetic_tokens_per_s"], found["bound_network_tokens_per_s"]
    lines += [
        "",
        f"a rank sends in a step, GB: rows inside its node {rows:,.2f}, to others {outside:,.2f}; parameters {parameters:,.2f}",
        f"bounds, tokens/s: arithmetic {arithmetic:,.0f}, network {network:,.0f}",
        f"at {found['mfu']:.0%} of the peak, by how much of the transfers is hidden behind arithmetic:",
    ]
    for hidden, speed in found["tokens_per_s"].items():
        lines.append(f"  {hidden:<16}{speed:>14,.0f} tokens/s{found['days'][hidden]:>12,.1f} days")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Returns 0, or 2: it does not fit, or the question was not understood."""
    options, overrides = parse(argv)
    try:
        device = check(options)
        config = resolve(load(options.config, overrides), options.nodes * options.gpus, cuda=True)
        if config.train.engine != "native":
            raise ConfigError(
                f"train.engine = {config.train.engine!r} holds other things than the native engine, the only one that is planned: "
                "plan with --train.engine native"
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = plan(config, device, options.nodes, options.gpus, options.tokens, options.mfu)
    print(json.dumps(found) if options.json else text(found, options))
    if fits(found):
        return 0
    peak = found["memory"][found["mode"]]["balanced"]["peak"] / GIB
    way_out = (
        "lower train.micro_batch_size, set train.activation_checkpointing = full or parallel.data = shard, or add GPUs"
    )
    told = f"{peak:.1f} GiB and {RESERVED:.0f} of context do not fit {device.memory:.1f} GiB"
    print(f"error: {told}: {way_out}", file=sys.stderr)
    return 2
