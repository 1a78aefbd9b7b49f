"""Is the default rule (`coordinate`, rate "auto") as good as hand-tuned rivals? 36 score streams, no network.

    python scripts/design_default.py estimate [--cells 3,7]        CPU-hours, from two batches of every cell
    python scripts/design_default.py run --jobs 2 [--cells 3,7] [--minutes 60]
    python scripts/design_default.py report [--summary docs/design_default.json]
    python scripts/design_default.py run|report --held-out ...     other cells, which had no part in the choice of the rule

Every cell of CELLS is run for 160 batches with 3 seeds (2 at T = 131,072), all contestants on the same batches:

- the default, which nobody tuned: `coordinate` with rate "auto";
- the rivals, tuned per cell: RIVALS, every method at several rates. For every figure the best of all of them is taken,
  over the mean of the seeds; so the rival of one figure may be another than that of the next;
- ablations of the default, which are no rivals (not at T = 131,072: half of its time), and no balancing.

Figures: late = mean MaxVio of the last quarter; early = of the first 40 batches; after = of the 40 batches after the
jump (stream jump only). Ratios are default / best rival; LIMITS says what passes. A contestant diverged on a seed when
its bias is not finite or its late MaxVio is above 1.25 times that of no balancing (where none is needed, noise alone
exceeds 1).

CELLS is a fractional design: every pair of levels of any two of its factors occurs, and every stream has each E and
each K once; T = 131,072 is for four cells only. Among the tables with these properties that random search found it was
taken for its low cost (T * E, K) alone, before any cell had run. Streams: moe/balance/streams.py; `recorded` needs the files
OUT/recorded/E{E}_K{K}_T{T}_{score}.npz of observe.record_scores with 180 batches, and is skipped without them.

`run` resumes: a finished cell and seed is one JSON file in OUT, and is not run again; with --refresh the default and its
ablations are, when moe/balance has changed since, beside the rivals' figures of before. Letters: T tokens, E experts,
K experts per token, L MoE layers (one here).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels.router_topk
import moe.balance
from kernels.router_topk import topk_lowest_index
from moe.balance import BALANCERS, Balancer, build_balancer
from moe.balance.balancer import State
from moe.balance.bias import Gain
from moe.balance.quantile import Coordinate
from moe.balance.stats import RouterStats, add, collect, stack
from moe.balance.streams import JUMP_AT, SEED_STRIDE, open_stream
from moe.config import BalanceSection
from moe.observe.laboratory import Trace, summary
from moe.train.about import provenance

STEPS = 160
BLOCK = 2**18  # scores of one block of tokens, small enough for a core's cache; the statistics of blocks add up exactly


class Cell(NamedTuple):
    """One setting."""

    experts: int
    top_k: int
    tokens: int
    score: str
    stream: str

    @property
    def seeds(self) -> int:
        """Seeds 0 ... N - 1."""
        return 2 if self.tokens > 100_000 else 3

    @property
    def recording(self) -> str:
        """Name of its file of recorded scores."""
        return f"E{self.experts}_K{self.top_k}_T{self.tokens}_{self.score}.npz"

    def __str__(self) -> str:
        return f"{self.stream}, E {self.experts}, K {self.top_k}, T {self.tokens:,}, {self.score}"


SIGM, SOFT = "sigmoid", "softmax"
DESIGN = {  # stream: E, K, T, score
    "iid": [(16, 1, 16384, SOFT), (64, 2, 2048, SIGM), (256, 8, 2048, SOFT), (512, 6, 2048, SOFT)],
    "drift": [(16, 2, 16384, SOFT), (64, 6, 2048, SOFT), (256, 8, 2048, SIGM), (512, 1, 2048, SIGM)],
    "fast_drift": [(16, 6, 2048, SIGM), (64, 8, 2048, SIGM), (256, 1, 16384, SOFT), (512, 2, 2048, SOFT)],
    "topics": [(16, 6, 16384, SOFT), (64, 2, 131072, SOFT), (256, 1, 2048, SIGM), (512, 8, 2048, SOFT)],
    "skewed": [(16, 1, 16384, SIGM), (64, 8, 2048, SOFT), (256, 2, 2048, SOFT), (512, 6, 2048, SOFT)],
    "jump": [(16, 8, 16384, SOFT), (64, 6, 131072, SIGM), (256, 2, 2048, SIGM), (512, 1, 2048, SIGM)],
    "growing": [(16, 8, 131072, SIGM), (64, 1, 16384, SOFT), (256, 6, 2048, SOFT), (512, 2, 2048, SIGM)],
    "times_ten": [(16, 6, 2048, SIGM), (64, 8, 2048, SIGM), (256, 1, 131072, SOFT), (512, 2, 16384, SIGM)],
    "recorded": [(16, 2, 16384, SIGM), (64, 1, 2048, SIGM), (256, 6, 2048, SIGM), (512, 8, 2048, SOFT)],
}
CELLS = [Cell(*setting, stream) for stream, settings in DESIGN.items() for setting in settings]
HELD_OUT = [  # the same table with the other score function, where it is cheap
    cell._replace(score=SOFT if cell.score == SIGM else SIGM)
    for cell in CELLS
    if cell.stream != "recorded" and cell.tokens * cell.experts <= 2**19
]

# -- the contestants ---------------------------------------------------------------------------------------------------

DEFAULT, NOTHING = "coordinate auto", "none"
RIVALS = {
    "sign": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "proportional": (1e-3, 3e-3, 1e-2, 3e-2),
    "rms": (1e-3, 3e-3, 1e-2),
    "smebu": (5e-4, 2e-3, 1e-2),
    "quantile": (0.03, 0.1, 0.3, 1.0),
}


class Curved(Coordinate):
    """No linear part: the move is q."""

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        return self.minimiser(stats), {}


class Linear(Coordinate):
    """The linear part whatever the gain."""

    def move(self, stats: RouterStats, error_LE: Tensor, rate_L1: Tensor) -> tuple[Tensor, State]:
        return super().move(stats, error_LE, torch.zeros_like(rate_L1))


class OtherGain(Coordinate):
    """The automatic gain with other constants. For one layer."""

    gain: type[Gain] = Gain

    def next_state(self, stats: RouterStats, n: int) -> State:
        rate_L1, gain_state = self.gain.step(self.state, stats)
        self.section = self.section.model_copy(update={"rate": float(rate_L1)})
        return super().next_state(stats, n) | gain_state


class NoReset(OtherGain):
    """No reset on a jump."""

    gain = type("NoJump", (Gain,), {"JUMP": math.inf})


class EagerReset(OtherGain):
    """A reset on any error far above its mean whose direction is not against the last one's."""

    gain = type("GainEager", (Gain,), {"ALIKE": 0.0})


class HalfStart(Coordinate):
    """The gain begins at 0.5, not at its upper end."""

    def initial_state(self, num_layers: int, num_experts: int) -> State:
        state = super().initial_state(num_layers, num_experts)
        return state | {"gain": torch.full_like(state["gain"], 0.5)}


ABLATIONS: dict[str, tuple[type[Balancer], str, float | str]] = {  # class, method and rate of its section
    "published threshold": (BALANCERS["quantile"], "quantile", "auto"),
    "gain 0.2": (Coordinate, "coordinate", 0.2),
    "gain 0.5": (Coordinate, "coordinate", 0.5),
    "no linear part": (Curved, "coordinate", "auto"),
    "always linear": (Linear, "coordinate", "auto"),
    "no reset": (NoReset, "coordinate", "auto"),
    "eager reset": (EagerReset, "coordinate", "auto"),
    "start 0.5": (HalfStart, "coordinate", "auto"),
}
RIVAL_NAMES = [f"{method} {rate:g}" for method, rates in RIVALS.items() for rate in rates]


def contestants(cell: Cell) -> dict[str, Balancer]:
    """Fresh rules by name."""

    def rule(method: str, rate: float | str | None) -> Balancer:
        return build_balancer(BalanceSection(method=method, rate=rate), [0], cell.experts, cell.top_k)

    rules = {NOTHING: rule("none", None), DEFAULT: rule("coordinate", "auto")}
    rules |= {f"{method} {rate:g}": rule(method, rate) for method, rates in RIVALS.items() for rate in rates}
    for name, (kind, method, rate) in ABLATIONS.items() if cell.tokens < 100_000 else ():
        rules[name] = kind(BalanceSection(method=method, rate=rate), [0], cell.experts, cell.top_k)
    return rules


# -- running -----------------------------------------------------------------------------------------------------------


def chosen_experts(biased_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The set of topk_lowest_index [T, K], in any order: its slow search only for rows with a tie at the boundary; and the
    K + 1 largest values."""
    places_TK1, ids = biased_TE.topk(top_k + 1, dim=-1)
    ids_TK, tied_T = ids[:, :top_k], places_TK1[:, top_k - 1] == places_TK1[:, top_k]
    if tied_T.any():
        ids_TK[tied_T] = topk_lowest_index(biased_TE[tied_T], top_k)
    return ids_TK, places_TK1


def simulate(batches: Iterable[Tensor], rules: Mapping[str, Balancer], top_k: int) -> dict[str, list[float]]:
    """MaxVio of every batch by rule: as moe.observe.laboratory.simulate, bit for bit, up to seven times as fast."""
    maxvio: dict[str, list[float]] = {name: [] for name in rules}
    for scores_TE in batches:
        tokens, experts = scores_TE.shape
        target = top_k * tokens / experts
        blocks = scores_TE.split(max(1, BLOCK // experts))
        for name, rule in rules.items():
            bias_E, total = rule.bias_LE[0], None
            for block_TE in blocks:
                ids_TK, places_TK1 = chosen_experts(block_TE + bias_E, top_k)
                counts_E = torch.bincount(ids_TK.reshape(-1), minlength=experts)
                stats = collect(rule.needs, block_TE, bias_E, ids_TK, counts_E, places_TK1=places_TK1)
                total = stats if total is None else add(total, stats)
            assert total is not None
            maxvio[name].append((float(total.tokens_per_expert.max()) - target) * experts / (top_k * tokens))
            rule.step(stack([total]))
    return maxvio


def batches_of(cell: Cell, seed: int, out: Path) -> Iterator[Tensor]:
    """The scores [T, E] of one cell and seed. Raises OSError or ValueError for a recording that does not fit."""
    kind = f"recorded={out / 'recorded' / cell.recording}" if cell.stream == "recorded" else cell.stream
    batches, top_k = open_stream(kind, cell.tokens, cell.experts, cell.top_k, cell.score, STEPS, seed)
    count = 0
    for scores_TE in batches:
        if (*scores_TE.shape, top_k) != (cell.tokens, cell.experts, cell.top_k):
            raise ValueError(f"{kind} has T, E = {tuple(scores_TE.shape)} and K = {top_k}")
        yield scores_TE
        count += 1
    if count < STEPS:
        raise ValueError(
            f"{kind} has {count} batches from seed {seed} on: record {STEPS + (cell.seeds - 1) * SEED_STRIDE}"
        )


def source_digest() -> str:
    """Of moe/balance and its histograms: results of different rules can be told apart even between commits."""
    files = [*sorted(Path(moe.balance.__file__).parent.glob("*.py")), Path(kernels.router_topk.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def unit_path(out: Path, cell: Cell, seed: int) -> Path:
    """The file of one cell and seed."""
    return out / f"{cell.stream}_{cell.recording.removesuffix('.npz')}_seed{seed}.json"


def run_unit(task: tuple[int, Cell, int, Path, float]) -> str | None:
    """Run one cell with one seed and write its file, unless the deadline is over. Returns the line to print. What its file
    holds already of the rivals and of no balancing stays."""
    index, cell, seed, out, deadline = task
    if time.time() > deadline:
        return None
    torch.set_num_threads(1)
    start = time.process_time()
    path, rules = unit_path(out, cell, seed), contestants(cell)
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if before:
        rules = {name: rule for name, rule in rules.items() if name not in (NOTHING, *RIVAL_NAMES)}
    try:
        maxvio = simulate(batches_of(cell, seed, out), rules, cell.top_k)
    except (OSError, ValueError) as error:
        return f"cell {index}, seed {seed} skipped: {error}"
    finite = {name: bool(rule.bias_LE.isfinite().all()) for name, rule in rules.items()}
    seconds = time.process_time() - start
    found = {"cell": cell._asdict(), "seed": seed, "cpu_seconds": seconds, "balance_digest": source_digest()}
    found |= {"versions": provenance(), "finite": finite, "maxvio": maxvio}
    if before:
        found["finite"], found["maxvio"] = before["finite"] | finite, before["maxvio"] | maxvio
        found |= {"cpu_seconds": before["cpu_seconds"] + seconds, "rivals": before.get("rivals") or _source(before)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.replace(path)
    return f"cell {index}, seed {seed}: {seconds:.0f} CPU-seconds ({cell})"


def _source(unit: dict[str, Any]) -> str:
    return f"commit {unit['versions']['git']}, moe/balance {unit['balance_digest']}"


def run(cells: dict[int, Cell], out: Path, jobs: int, minutes: float, refresh: bool) -> None:
    """All missing units, the cheapest cells first, in `jobs` processes of one thread; refresh: and those of other sources."""

    def finished(path: Path) -> bool:
        return path.is_file() and not (refresh and json.loads(path.read_text())["balance_digest"] != source_digest())

    out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * minutes
    todo = []
    for index, cell in sorted(cells.items(), key=lambda item: item[1].tokens * item[1].experts):
        if cell.stream == "recorded" and not (out / "recorded" / cell.recording).is_file():
            print(f"cell {index} skipped: there is no {out / 'recorded' / cell.recording}")
            continue
        seeds = [seed for seed in range(cell.seeds) if not finished(unit_path(out, cell, seed))]
        todo += [(index, cell, seed, out, deadline) for seed in seeds]
    print(f"{len(todo)} units to run", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are spawned now
    with multiprocessing.get_context("spawn").Pool(jobs) if jobs > 1 and todo else nullcontext() as pool:
        for line in pool.imap_unordered(run_unit, todo) if pool else map(run_unit, todo):
            if line:
                print(line, flush=True)


def estimate(cells: dict[int, Cell]) -> None:
    """CPU-minutes of the cells, from the second of two batches (recorded: of iid in its place)."""
    torch.set_num_threads(1)
    total = 0.0
    for index, cell in cells.items():
        stand_in = cell._replace(stream="iid") if cell.stream == "recorded" else cell
        rules, batches = contestants(cell), batches_of(stand_in, 0, Path())
        simulate([next(batches)], rules, cell.top_k)
        start = time.process_time()
        simulate([next(batches)], rules, cell.top_k)
        minutes = (time.process_time() - start) * STEPS * cell.seeds / 60
        total += minutes
        print(f"cell {index:2d}  {minutes:6.1f} CPU-minutes  {cell}", flush=True)
    print(f"{len(cells)} cells: {total / 60:.2f} CPU-hours")


# -- the report --------------------------------------------------------------------------------------------------------

LIMITS = {"late": 1.05, "early": 1.25, "after": 1.5}  # of the ratio default / best rival
DIVERGED = 1.25  # times the late MaxVio of no balancing


def gather(table: list[Cell], out: Path) -> dict[str, Any]:
    """What docs/design_default.json holds: of every finished cell the figures of every contestant, means over seeds."""
    cells, versions, seconds = {}, set(), 0.0
    for index, cell in enumerate(table):
        paths = [unit_path(out, cell, seed) for seed in range(cell.seeds)]
        if not all(path.is_file() for path in paths):
            continue
        units = [json.loads(path.read_text()) for path in paths]
        versions |= {_source(u) for u in units} | {f"rivals: {u['rivals']}" for u in units if "rivals" in u}
        versions |= {f"torch {u['versions']['torch']}, Python {u['versions']['python']}" for u in units}
        seconds += sum(unit["cpu_seconds"] for unit in units)
        jump_at = int(STEPS * JUMP_AT) if cell.stream == "jump" else None
        figures: dict[str, dict[str, float]] = {}
        for name in units[0]["maxvio"]:
            own = [summary(Trace(maxvio=unit["maxvio"][name]), 0.0, jump_at) for unit in units]
            idle = [summary(Trace(maxvio=unit["maxvio"][NOTHING]), 0.0)["late"] for unit in units]
            figures[name] = {f: round(statistics.fmean(s[f] for s in own), 5) for f in LIMITS if f in own[0]}
            figures[name]["diverged"] = sum(
                not unit["finite"][name] or s["late"] > DIVERGED * none
                for unit, s, none in zip(units, own, idle, strict=True)
            )
        cells[str(index)] = cell._asdict() | {"seeds": cell.seeds, "figures": figures}
    found = {"steps": STEPS, "of": len(table), "cpu_hours": round(seconds / 3600, 2), "versions": sorted(versions)}
    return found | {"cells": cells}


def best_rival(figures: dict[str, dict[str, float]], figure: str) -> str:
    """The name of the tuned rival with the lowest figure."""
    return min(RIVAL_NAMES, key=lambda name: figures[name][figure])


def ratios(found: dict[str, Any], figure: str, name: str = DEFAULT, other: str | None = None) -> dict[str, float]:
    """name / other, or / the best rival, by cell that has the figure."""
    every = {i: c["figures"] for i, c in found["cells"].items() if figure in c["figures"].get(name, {})}
    return {i: f[name][figure] / f[other or best_rival(f, figure)][figure] for i, f in every.items()}


def spread(values: dict[str, float]) -> str:
    """Median, worst and its cell, as two fields of a table."""
    if not values:
        return "– | –"
    worst = max(values, key=lambda i: values[i])
    return f"{statistics.median(values.values()):.2f} | {values[worst]:.2f} (cell {worst})"


def cell_of(entry: dict[str, Any]) -> Cell:
    """The cell of an entry of `gather`."""
    return Cell(*(entry[name] for name in Cell._fields))


def verdict(found: dict[str, Any]) -> list[str]:
    """What is missing, the share of the cells that pass, every failure."""
    cells = found["cells"]
    missing = [i for i in range(found["of"]) if str(i) not in cells]
    lines = [f"{len(cells)} of {found['of']} cells, {found['cpu_hours']} CPU-hours. {'; '.join(found['versions'])}"]
    if missing:
        lines += ["", f"**{len(missing)} cells missing:** {', '.join(map(str, missing))}"]
    failures = []
    lines += ["", "| figure | limit | cells | passed | share | median | worst |", "|---|---|---|---|---|---|---|"]
    for figure, limit in LIMITS.items():
        values = ratios(found, figure)
        failed = {i: value for i, value in values.items() if value > limit}
        passed, count = len(values) - len(failed), len(values)
        share = f"{passed / count:.0%}" if count else "–"
        lines.append(f"| {figure} | {limit} | {count} | {passed} | {share} | {spread(values)} |")
        for i, value in failed.items():
            failures.append(f"- {figure} {value:.2f} > {limit}: cell {i} ({cell_of(cells[i])})")
    for i, c in cells.items():
        if diverged := c["figures"][DEFAULT]["diverged"]:
            failures.append(f"- diverged on {diverged} of {c['seeds']} seeds: cell {i} ({cell_of(c)})")
    return [*lines, "", f"{len(failures)} failures", *(["", *failures] if failures else [])]


def details(found: dict[str, Any]) -> list[str]:
    """Every cell, and the ablations."""
    by_figure = {figure: ratios(found, figure) for figure in LIMITS}
    lines = ["Ratio to the best tuned rival (MaxVio of the default / of the rival, and its name)", ""]
    lines += ["| cell | stream | E | K | T | score | late | early | after |", "|---|---|---|---|---|---|---|---|---|"]
    for i, c in found["cells"].items():
        row = [i, c["stream"], c["experts"], c["top_k"], c["tokens"], c["score"]]
        for figure in LIMITS:
            if i not in by_figure[figure]:
                row.append("–")
                continue
            rival = best_rival(c["figures"], figure)
            own, other = c["figures"][DEFAULT][figure], c["figures"][rival][figure]
            row.append(f"{by_figure[figure][i]:.2f} ({own:.3f} / {other:.3f} {rival})")
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "Ablations: ratio to the full rule, median and worst cell", ""]
    lines += [f"| ablation | {' | '.join(f'{figure} | worst' for figure in LIMITS)} |", "|---|---|---|---|---|---|---|"]
    for name in ABLATIONS:
        lines.append(f"| {name} | {' | '.join(spread(ratios(found, f, name, DEFAULT)) for f in LIMITS)} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["estimate", "run", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/design"), help="folder of the finished units")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--cells", default="", help="comma-separated numbers; default: all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no unit after this time")
    parser.add_argument(
        "--refresh", action="store_true", help="run: the default again where moe/balance has changed since"
    )
    parser.add_argument("--summary", type=Path, help="report: also write the figures to this JSON file")
    parser.add_argument("--held-out", action="store_true", help="the cells of HELD_OUT instead of CELLS")
    options = parser.parse_args(argv)
    table = HELD_OUT if options.held_out else CELLS
    indices = [int(word) for word in options.cells.split(",")] if options.cells else range(len(table))
    cells = {index: table[index] for index in indices}
    if options.command == "estimate":
        estimate(cells)
    elif options.command == "run":
        run(cells, options.out, options.jobs, options.minutes, options.refresh)
    else:
        found = gather(table, options.out)
        print("\n".join([*verdict(found), "", *details(found)]))
        if options.summary:
            options.summary.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
