"""`alf-moe watch`: a run in the terminal, from its files alone: losses, balance, a heat block of the experts, events.

alf-moe watch runs/tiny            # until the run ends; Ctrl-C leaves the run alone
alf-moe watch runs/tiny --once     # one frame, also for pipes
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from moe.config import ConfigError

if TYPE_CHECKING:
    from moe.observe.live import Live

BARS = "▁▂▃▄▅▆▇█"
BELOW = 13  # lines of a frame besides the layers


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="alf-moe watch", description=(__doc__ or "").split("\n")[0])
    p.add_argument("run", metavar="RUN", help="run folder")
    p.add_argument("--once", action="store_true", help="print one frame and end")
    p.add_argument("--interval", type=float, default=1.0, help="seconds between two frames; default 1")
    return p


def main(argv: list[str]) -> int:
    """Draw until the run has ended."""
    from moe.observe.live import open_live

    options = parser().parse_args(argv)
    try:
        if not 0.1 <= options.interval <= 3600:
            raise ConfigError(f"--interval {options.interval:g} is outside 0.1 to 3600 seconds: give for example 1")
        live = open_live(Path(options.run))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    if options.once or live.finished():
        console.print(frame(live, console.width, None))
        return 0
    try:
        with Screen(console=console, auto_refresh=False, screen=console.is_terminal) as screen:
            while not live.finished():
                screen.update(frame(live, console.width, console.height), refresh=True)
                time.sleep(options.interval)
                live.update()
        console.print(frame(live, console.width, None))
    except KeyboardInterrupt:
        pass
    return 0


def frame(live: Live, width: int, height: int | None) -> RenderableType:
    """One picture. height None: as long as it needs."""
    parts: list[RenderableType] = [_head(live, width)]
    if live.row:
        parts += [_losses(live, width), _balance(live)]
    if live.maxvio():
        parts += [_layers(live, width, None if height is None else max(1, height - BELOW))]
    parts.append(_events(live, 3 if height is not None else 5))
    return Group(*parts)


def _head(live: Live, width: int) -> RenderableType:
    from moe.observe.console import duration, short

    state = live.state()
    colour = "green" if state in ("running", "done") else "yellow"
    first = Text.assemble((live.run.name, "bold"), "  ", (state, colour))
    step, steps = live.number("train/step"), live.run.config.get("train.steps")
    if step is None:
        return first
    parts = [f"step {step:,.0f}" + (f"/{steps:,} ({100 * step / steps:.1f}%)" if steps else "")]
    if (rate := live.number("speed/tokens_per_s")) is not None:
        parts.append(f"{short(rate)} tok/s")
    if (mfu := live.number("speed/mfu")) is not None:
        parts.append(f"mfu {100 * mfu:.1f}%")
    if (memory := live.number("memory/peak_gib")) is not None:
        parts.append(f"mem {memory:.1f}GiB")
    seconds = live.number("speed/step_s")
    if steps and seconds is not None and not live.finished():
        parts.append(f"eta {duration((steps - step) * seconds)}")
    lines = [first, Text(" | ".join(parts))]
    if steps:
        full = min(1.0, step / steps) * min(width, 60)
        lines.append(Text.assemble(("━" * round(full), colour), ("─" * (min(width, 60) - round(full)), "dim")))
    return Group(*lines)


def _losses(live: Live, width: int) -> RenderableType:
    ce, val = live.number("loss/ce"), live.val.get("val/ce")
    text = f"loss {ce:.4f}" if ce is not None else "loss not finite"
    for name in ("aux", "z"):
        if value := live.number(f"loss/{name}"):
            text += f"  {name} {value:.4f}"
    if isinstance(val, (int, float)):
        text += f"  val {val:.4f} (step {live.val['train/step']:,})"
    room = max(8, min(60, width - len(text) - 3))
    return Text(f"{text}  {sparkline(live.history('loss/ce'), room)}", no_wrap=True)


def sparkline(values: list[float], width: int) -> str:
    """The last values as bars between their lowest and highest; each bar is a mean where there are more than fit."""
    size = -(-len(values) // width) or 1
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BARS[round((len(BARS) - 1) * (v - low) / ((high - low) or 1))] for v in means)


def _balance(live: Live) -> RenderableType:
    n = live.number
    mean, worst = n("moe/maxvio_batch/mean"), n("moe/maxvio_batch/max")
    if mean is None or worst is None:
        return Text("no expert is balanced in this model", style="dim")
    floor = live.run.about.get("floor")
    text = Text(f"maxvio {mean:.3f} mean, {worst:.3f} worst layer" + (f", floor {floor:.3f}" if floor else ""))
    if (straggler := n("moe/straggler_batch/max")) is not None:
        text.append(f"  straggler {straggler:.2f}")
    alarms = Text(style="bold red")
    for key, says in (
        ("moe/idle_batch/max", "idle experts in a layer: {:.0f}"),
        ("moe/idle_streak/max", "the longest idle for {:.0f} steps"),
        ("moe/dead/max", "dead experts in a layer: {:.0f}"),
        ("optim/skipped_steps", "skipped steps: {:.0f}"),
    ):
        if value := n(key):
            alarms.append(f"{'! ' if not alarms else '; '}{says.format(value)}")
    return Group(text, alarms) if alarms else text


def _layers(live: Live, width: int, most: int | None) -> RenderableType:
    """A line a layer: MaxVio and one cell an expert; the worst layers where not all fit."""
    maxvio = live.maxvio()
    shown = sorted(sorted(maxvio, key=lambda layer: -maxvio[layer])[:most])
    load = {}
    if live.loads is not None and len(live.loads.steps):
        load = dict(zip(live.loads.layers, live.loads.relative()[-1], strict=True))
    grid = Table.grid(padding=(0, 1))
    group = 1
    for layer in shown:
        bar = BARS[min(len(BARS) - 1, int(4 * maxvio[layer]))]
        cells = Text()
        if layer in load:
            group = -(-len(load[layer]) // max(1, width - 16))
            cells = heat_cells(load[layer].tolist(), group)
        grid.add_row(Text(f"L{layer:02d}"), Text(f"{maxvio[layer]:6.3f} {bar}"), cells)
    notes = []
    if len(shown) < len(maxvio):
        notes.append(f"the worst {len(shown)} of {len(maxvio)} layers")
    if live.loads is not None and len(live.loads.steps):
        notes.append(f"load up to step {live.loads.steps[-1]:,}: × idle, ▄ the mean, █ twice or more")
    if group > 1:
        notes.append(f"a cell is the most uneven of {group} experts")
    return Group(grid, Text("; ".join(notes), style="dim"))


def heat_cells(load: list[float], group: int) -> Text:
    """One cell for each `group` experts: height and colour say the load relative to the mean."""
    from moe.observe import heat

    colours = heat.palette()
    text = Text(no_wrap=True)
    for start in range(0, len(load), group):
        value = max(load[start : start + group], key=lambda v: abs(v - 1))
        if value != value:  # a layer without tokens
            text.append("·", style="dim")
        elif value == 0:
            text.append("×", style="bold white on black")
        else:
            red, green, blue = colours[int(heat.load_index(value))]
            bar = BARS[min(len(BARS) - 1, max(0, round(4 * value) - 1))]
            text.append(bar, style=f"black on rgb({red},{green},{blue})")
    return text


def _events(live: Live, most: int) -> RenderableType:
    from moe.observe.console import duration

    lines = []
    for event in list(live.events)[-most:]:
        when = event.get("time")
        age = f"{duration(max(0.0, time.time() - when))} ago" if isinstance(when, (int, float)) else ""
        step = f"step {event['step']}" if "step" in event else ""
        rest = str(event.get("text") or event.get("checkpoint") or "")
        words = filter(None, (str(event.get("event", "?")), step, rest, age))
        lines.append(Text("  ".join(words), no_wrap=True, overflow="ellipsis", style="dim"))
    return Group(*lines)
