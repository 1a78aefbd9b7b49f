"""What a person reads in the terminal: the start-up block, one line per logged step, the table at the end."""

from __future__ import annotations

from typing import Any

from moe.config import Config


def short(value: float) -> str:
    """1234567 -> 1.2M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """3725 -> 1h02m."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s"


def startup_block(config: Config, about: dict[str, Any]) -> str:
    """What runs, on what, and where to look."""
    m, b = config.model, config.balance
    tokens = config.train.steps * config.tokens_per_step
    kind = f"{m.num_experts} experts, top-{m.top_k}, {m.num_shared_experts} shared, {m.score_function} scores"
    rows = {
        "model": f"{short(about['parameters_total'])} parameters, {short(about['parameters_active'])} active per token; "
        f"{m.num_layers} layers, {config.num_moe_layers} sparse: {kind}",
        "compute": f"{short(about['flops_per_token'])} FLOP per token in {config.train.compute_dtype}; "
        f"MFU against {about['peak_tflops']:.3g} TFLOP/s ({about['peak_source']})",
        "memory": f"about {about['state_gib']:.2f} GiB of parameters, gradients and optimizer per rank; "
        f"{about['free_memory_gib']:.1f} GiB free",
        "ranks": f"{about['world_size']} x {about['device']}, {layout(config, about['world_size'])}",
        "data": f"{config.data.path} ({about['data_hash']}); {short(tokens)} tokens, "
        f"{tokens / about['parameters_active']:.1f} per active parameter",
        "balancing": b.method
        + (f", rate {b.rate}" if b.rate else "")
        + f"; sampling floor {about['floor']:.3f}"
        + (f"; {about['balancing_note']}" if about.get("balancing_note") else ""),
        "run": f"{about['run_dir']} (metrics.jsonl, loads.npz, checkpoints/, wandb/)",
    }
    if about["deterministic_flags"]:
        rows["deterministic"] = "; ".join(about["deterministic_flags"])
    if about["start_step"]:
        rows["resumed"] = f"after step {about['start_step']:,}"
    return "\n".join(f"{name:<13} {text}" for name, text in rows.items())


def layout(config: Config, world_size: int) -> str:
    """How the ranks share the work: tp, pp and cp where there are several."""
    p = config.parallel
    words = [f"dp = {config.data_ranks(world_size)}", f"ep = {p.ep}"]
    words += [f"{name} = {size}" for name, size in (("tp", p.tp), ("pp", p.pp), ("cp", p.cp)) if size > 1]
    return ", ".join(words) + ("" if config.train.engine == "native" else f"; {config.train.engine} engine")


def step_line(config: Config, world_size: int, metrics: dict[str, float]) -> str:
    """One plain line; a field appears only when it is known."""
    step, steps = int(metrics["train/step"]), config.train.steps
    parts = [f"step {step:,}/{steps:,} ({100 * step / steps:.1f}%)"]
    if "val/ce" in metrics:
        parts += [f"val {metrics['val/ce']:.4f}", f"{metrics['val/bits_per_byte']:.4f} bits/byte"]
        if "moe/maxvio_val/max" in metrics:
            parts.append(f"maxvio_val {metrics['moe/maxvio_val/max']:.3f}")
        return " | ".join(parts)
    rate = metrics["speed/tokens_per_s"]
    parts += [
        f"loss {metrics['loss/ce']:.4f}",
        f"gnorm {metrics['optim/grad_norm']:.2f}",
        f"lr {metrics['optim/lr']:.1e}",
        f"{short(rate)} tok/s ({short(rate / world_size)}/rank)",
        f"mfu {100 * metrics['speed/mfu']:.1f}%",
        f"mem {metrics['memory/peak_gib']:.1f}GiB",
    ]
    if "moe/maxvio_batch/max" in metrics:
        layers = {k: v for k, v in metrics.items() if k.startswith("moe/maxvio_batch/layer_")}
        worst = max(layers, key=lambda k: layers[k]).rsplit("_", 1)[1]
        parts.append(
            f"maxvio {metrics['moe/maxvio_batch/mean']:.2f} (L{worst} {metrics['moe/maxvio_batch/max']:.2f}) "
            f"idle {int(metrics['moe/idle_batch/max'])} strag {metrics['moe/straggler_batch/max']:.2f}"
        )
    parts.append(f"skip {int(metrics['optim/skipped_steps'])}")
    parts.append(f"eta {duration((steps - step) * metrics['speed/step_s'])}")
    return " | ".join(parts)


def summary_table(summary: dict[str, Any]) -> str:
    """Name and value, one row each."""
    rows = []
    for name, value in summary.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v:.3f}" for k, v in value.items())
        elif isinstance(value, float):
            value = f"{value:.4f}"
        elif isinstance(value, int):
            value = f"{value:,}"
        rows.append((name, str(value)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(["-" * (width + 40), *(f"{name:<{width}}  {value}" for name, value in rows)])
