"""The kernels on a GPU, beside the machine's ceilings and other implementations.

    python scripts/bench_kernels.py [--shape 1B 16B V3 fine] [--tokens 4096 16384 65536] [--routing skewed balanced]
                                    [--ops route permute combine grouped_gemm moe_mlp] [--recorded FILE.npz] [--write-table]

Needs torch, triton and pytest; transformers and ScatterMoE are rivals where they are importable. The tests of tests/gpu run first
and nothing is reported unless they pass. Everything is bfloat16. Every repeat runs all arms once, in turn, each after the L2 cache
was overwritten; figures are medians of CUDA events. Ceilings are measured in the same run: a copy of 2 GiB, bytes read and written,
and a product of 8192 x 8192 x 8192. Shares count what must move at least: a row that K pairs share once (scripts/kernel_arms.py).
Routings are named in every line with their MaxVio; balanced is forced and therefore the easiest case, skewed the default beside it.
Appends a record to docs/bench_kernels.json, a line of JSON; --write-table writes kernels/grouped_gemm_table.json for this
device, by the first of --routing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, without an installation

from kernels.cases import MODELS, Shape
from kernels.grouped_gemm import grouped_gemm
from kernels.grouped_gemm_table import TABLE, device_name, setting
from kernels.moe_mlp import saved_bytes_per_token
from scripts import kernel_arms as arms
from scripts.kernel_arms import Batch, Measure

ROOT = Path(__file__).parents[1]
OPS = ("route", "permute", "combine", "grouped_gemm", "moe_mlp")
ROUTER = {"share": Shape(65_536, 0, 0, 256, 8), "latency": Shape(4096, 0, 0, 128, 8)}
GOALS = {  # of this project: at least a share or a ratio, at most microseconds or an overhead
    "route, share of copy": 0.7,
    "route, forward, microseconds": -6.5,  # a Triton router's published figure at this size, H100
    "permute, share of copy": 0.8,
    "combine, share of copy": 0.8,
    "moe_mlp, share of matmul": 0.6,
    "moe_mlp, fastest rival / ours": 1.0,
    "routing + dispatch + combine / moe_mlp": -0.15,
}
"""A negative goal is an upper limit."""


class Row(NamedTuple):
    """One figure. what: a key of GOALS where there is a goal."""

    what: str
    where: str
    value: float
    unit: str = ""

    @property
    def passed(self) -> bool | None:
        """Against the goal; None without one."""
        goal = GOALS.get(self.what)
        return None if goal is None else (self.value >= goal if goal > 0 else self.value <= -goal)


# -- before anything is measured ---------------------------------------------------------------------------------------


def run_tests(folder: str = "tests/gpu", marker: str = "gpu") -> str | None:
    """Run the tests in a process of their own. Why nothing may be reported, or None."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    if done.returncode or set(counts) & {"failed", "error", "errors"}:
        last = done.stdout.strip().splitlines()[-1:] or done.stderr.strip().splitlines()[-1:] or ["no output"]
        return (
            f"the tests of {folder} are red ({last[0]}): nothing is measured until `pytest -m {marker} {folder}` passes"
        )
    if not counts.get("passed") or counts.get("skipped", 0) > counts["passed"]:
        return f"the tests of {folder} ran {counts.get('passed', 0)} and skipped {counts.get('skipped', 0)}: run them on a GPU"
    return None


# -- time --------------------------------------------------------------------------------------------------------------


class CudaTimer:
    """Medians in seconds by CUDA events, all arms in turn, the L2 cache overwritten before each."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Two rounds warm up and compile."""
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
        for repeat in range(self.repeats + 2):
            for name, fn in functions.items():
                self.flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                fn()
                end.record()
                if repeat >= 2:
                    events[name].append((begin, end))
        torch.cuda.synchronize()
        return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in events.items()}


def ceilings(measure: Measure, device: torch.device, bytes_: int = 2**31, side: int = 8192) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP/s of a bfloat16 product."""
    source = torch.zeros(bytes_, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b})
    return {"copy": 2 * bytes_ / found["copy"], "matmul": 2 * side**3 / found["matmul"]}


# -- what is reported --------------------------------------------------------------------------------------------------


def place(b: Batch, name: str, routing: str) -> str:
    """Of a figure: the routing is part of it."""
    return f"{name} T={b.shape.T}, {routing} (MaxVio {b.maxvio:.2f})"


def bench_moving(b: Batch, where: str, measure: Measure, copy: float, names: Sequence[str]) -> list[Row]:
    """Operations limited by memory: shares of the copy."""
    rows = []
    for name, work in arms.moving(b).items():
        if name in names:
            both = arms.with_backward(work.forward, work.leaves)
            found = measure({"forward": work.forward, "both": both})
            rows.append(Row(f"{name}, share of copy", where, work.bytes_fwd / found["forward"] / copy))
            share = work.bytes_both / found["both"] / copy
            rows.append(Row(f"{name}, forward + backward, share of copy", where, share))
    return rows


def bench_router(kind: str, device: torch.device, measure: Measure, copy: float, sizes: dict[str, Shape]) -> list[Row]:
    """The router at the sizes that others publish."""
    rows = []
    for what, shape in sizes.items():
        b = arms.make_batch(kind, shape._replace(D=16, F=16), device)
        where = f"{place(b, 'router', kind)} E={shape.E} K={shape.K}"
        if what == "share":
            rows += bench_moving(b, where, measure, copy, ["route"])
        else:
            forward = {"route": arms.moving(b)["route"].forward, "counting": arms.counting(b)}
            found = measure(forward)
            rows.append(Row("route, forward, microseconds", where, 1e6 * found["route"], "us"))
            rows.append(Row("route with statistics, forward, microseconds", where, 1e6 * found["counting"], "us"))
    return rows


def bench_experts(
    b: Batch, where: str, measure: Measure, matmul: float, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, float]]:
    """moe_mlp and its rivals: shares of the dense product, ratios, memory. Also the seconds, forward and backward."""
    competing = arms.expert_arms(b, say)
    forward = measure({name: run for name, (run, _) in competing.items()})
    both = measure({name: arms.with_backward(run, leaves) for name, (run, leaves) in competing.items()})
    work = arms.flops(b.shape)
    rows = [Row("moe_mlp, forward, share of matmul", where, work / forward["ours"] / matmul)]
    rows.append(Row("moe_mlp, share of matmul", where, 3 * work / both["ours"] / matmul))
    rivals = {name: seconds for name, seconds in both.items() if name != "ours"}
    rows += [
        Row(f"{name} / ours, forward + backward", where, seconds / both["ours"]) for name, seconds in rivals.items()
    ]
    if rivals:
        rows.append(Row("moe_mlp, fastest rival / ours", where, min(rivals.values()) / both["ours"]))
    around = arms.moving(b)
    moved = measure(
        {name: arms.with_backward(work.forward, work.leaves) for name, work in around.items()}
        | {"sort": arms.sort_of(b)}
    )
    rows.append(Row("routing + dispatch + combine / moe_mlp", where, sum(moved.values()) / both["ours"]))
    for name, (run, leaves) in competing.items():
        rows.append(Row(f"{name}, saved for backward", where, arms.saved_bytes(run, leaves[2:]) / 2**20, "MiB"))
        if b.x_TD.is_cuda:
            rows.append(Row(f"{name}, peak", where, peak_mib(arms.with_backward(run, leaves)), "MiB"))
    s = b.shape
    expected = s.T * saved_bytes_per_token(s.D, s.F, s.K)["moe_mlp"] / 2**20
    rows.append(Row("moe_mlp, saved by its formula", where, expected, "MiB"))
    return rows, both


def peak_mib(fn: Callable[[], Any]) -> float:
    """Allocated above what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench_products(b: Batch, measure: Measure, triton_runs: bool = True) -> list[dict[str, Any]]:
    """Entries of the table for the two products of the experts, forward and backward."""
    entries, counts_E, pairs = [], b.permutation.counts_E, b.shape.T * b.shape.K
    for weight in (b.w13, b.w2):
        rows = torch.randn(pairs, weight.shape[2], device=weight.device, dtype=weight.dtype).requires_grad_()
        run = {
            name: arms.with_backward(
                lambda rows=rows, weight=weight, name=name: grouped_gemm(rows, weight, counts_E, name), [rows, weight]
            )
            for name in (("triton", "torch") if triton_runs else ("auto", "torch"))
        }
        found = list(measure(run).values())
        entries.append(table_entry(setting("grouped_gemm", rows, weight, pairs)._asdict(), weight.device, *found))
    return entries


def table_entry(key: dict[str, Any], device: torch.device, ours: float, theirs: float) -> dict[str, Any]:
    """An entry of kernels/grouped_gemm_table.json."""
    return key | {"device": device_name(device), "triton_ms": 1e3 * ours, "torch_ms": 1e3 * theirs}


def merge(table: list[dict[str, Any]], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New entries in place of those of the same device and setting."""

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        measured = ("triton_ms", "torch_ms", "torch", "triton", "git")
        return tuple(sorted((name, str(value)) for name, value in entry.items() if name not in measured))

    return list({key(entry): entry for entry in [*table, *entries]}.values())


def bench(
    options: argparse.Namespace,
    device: torch.device,
    measure: Measure,
    say: Callable[[str], None] = print,
    models: dict[str, Shape] = MODELS,
    router: dict[str, Shape] = ROUTER,
    limits: dict[str, int] | None = None,
) -> tuple[list[Row], list[dict[str, Any]], dict[str, float]]:
    """All figures, the entries of the table, and the ceilings. Sizes can be replaced: the tests run it in small on a CPU."""
    top = ceilings(measure, device, **(limits or {}))
    say(f"copy {top['copy'] / 1e12:.2f} TB/s, bfloat16 product {top['matmul'] / 1e12:.0f} TFLOP/s")
    recorded = load_recorded(options.recorded) if options.recorded else None
    rows, entries = [], []
    if "route" in options.ops:
        rows += bench_router("skewed", device, measure, top["copy"], router)
    for name in options.shape:
        for tokens in options.tokens:
            for kind in [*options.routing, *(["recorded"] if recorded is not None else [])]:
                try:
                    b = arms.make_batch(kind, models[name]._replace(T=tokens), device, recorded)
                    where = place(b, name, kind)
                    say(where)
                    rows += bench_moving(b, where, measure, top["copy"], [op for op in options.ops if op != "route"])
                    if "moe_mlp" in options.ops:
                        found, both = bench_experts(b, where, measure, top["matmul"], say)
                        rows += found
                        if "F.grouped_mm" in both and kind == options.routing[0]:
                            key = setting("moe_mlp", b.x_TD, b.w13, tokens * b.shape.K)._asdict()
                            entries.append(table_entry(key, device, both["ours"], both["F.grouped_mm"]))
                    if "grouped_gemm" in options.ops and kind == options.routing[0]:
                        entries += bench_products(b, measure, device.type == "cuda")
                except ValueError as error:
                    say(f"{name} T={tokens}, {kind} skipped: {error}")
                except torch.cuda.OutOfMemoryError:
                    say(f"{name} T={tokens}, {kind} skipped: more memory than the GPU has")
    return rows, entries, top


def load_recorded(path: Path) -> torch.Tensor:
    """Scores of a file of observe.record_scores. Raises SystemExit(2)."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["scores"])
    except (OSError, KeyError, ValueError) as error:
        sys.exit(_sentence(f"--recorded {path} has no scores ({error}): give a file that observe.record_scores wrote"))


def _sentence(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def markdown(rows: list[Row]) -> str:
    """The table, goals with pass or miss."""
    lines = ["| figure | where | found | goal | |", "|---|---|---|---|---|"]
    for row in rows:
        goal = GOALS.get(row.what)
        limit = "" if goal is None else (f">= {goal:g}" if goal > 0 else f"<= {-goal:g}")
        verdict = {None: "", True: "pass", False: "miss"}[row.passed]
        lines.append(f"| {row.what} | {row.where} | {row.value:.3g} {row.unit} | {limit} | {verdict} |")
    return "\n".join(lines)


def versions(device: torch.device) -> dict[str, Any]:
    """Where the figures are from."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    found = {"device": device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    return found | {"git": done.stdout.strip() or None, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16_384, 65_536])
    parser.add_argument("--routing", nargs="+", default=["skewed", "balanced"], choices=["skewed", "balanced"])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--recorded", type=Path, help="a file of observe.record_scores, as one more routing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench_kernels.json")
    parser.add_argument("--write-table", action="store_true")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """0: reported; 1: the tests are red; 2: no GPU, or a bad argument."""
    options = parsed(words)
    if not torch.cuda.is_available():
        return _sentence("there is no CUDA GPU, and these figures are of one: run it where torch.cuda.is_available()")
    if min(options.tokens) < 8 or options.repeats < 1:
        return _sentence(f"--tokens {options.tokens} --repeats {options.repeats}: give at least 8 tokens and 1 repeat")
    if importlib.util.find_spec("pytest") is None:
        return _sentence("pytest is not installed, and tests/gpu must pass first: pip install pytest")
    if reason := run_tests():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    rows, entries, top = bench(options, device, CudaTimer(options.repeats))
    about = versions(device)
    record = about | {"ceilings": top, "rows": [row._asdict() for row in rows], "products": entries}
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    if options.write_table:
        stamped = [entry | {name: about[name] for name in ("torch", "triton", "git")} for entry in entries]
        TABLE.write_text(json.dumps(merge(json.loads(TABLE.read_text()), stamped), indent=1) + "\n")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
