"""Dispatch and combine against the bytes that must move, the overlap, and 1 -> 2 -> 4 processes; over gloo on the CPU.

    python scripts/bench_dispatch.py [--repeats 30] [--out docs/bench_dispatch.json]

1. Forward and backward of dispatch + combine without experts, exact and padded, beside bare all_to_all_single calls of the
   same bytes. Outputs of both are compared before anything is timed.
2. One sparse layer with its rows travelling while the shared expert runs, and waiting for every exchange at once.
3. The whole training step with the same tokens a process (weak scaling), and where its time goes: compute (as many processes
   that do not talk), waiting for the slowest (a barrier before each exchange), exchanges, gradient reduction (with and without).
Arms take turns; a repeat's time is the slowest rank's. Medians. Routing is that of random routers on random input; nothing is
forced.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from moe.config import Config, resolve, validate
from moe.model.dispatch import AllToAllDispatcher, PaddedDispatcher
from moe.model.layer import MoELayer
from moe.parallel import Ranks, _Flight, build_ranks
from moe.train.about import provenance
from moe.train.data import Batch
from moe.train.engines.native import NativeEngine
from tests.ranks import run_ranks

CPU = torch.device("cpu")
DIM, EXPERTS, TOP_K, TOKENS, SEQ, VOCAB = 256, 32, 4, 2048, 256, 4096
FACTOR = 1.25
Arms = dict[str, Callable[[], Any]]


def config_of(n: int, ep: int) -> Config:
    """Two sparse layers; as many sequences a process whatever n is."""
    model = {
        "vocab_size": VOCAB,
        "dim": DIM,
        "num_layers": 4,
        "num_heads": 4,
        "first_k_dense": 0,
        "num_experts": EXPERTS,
    }
    model |= {"top_k": TOP_K, "num_shared_experts": 1, "expert_hidden_dim": 128, "init_std": 0.02}
    tree = {"run": {"name": "bench"}, "model": model, "data": {"seq_len": SEQ}, "parallel": {"ep": ep}}
    tree |= {"optim": {"lr": 1e-4, "warmup_steps": 0}, "train": {"steps": 1, "batch_size": TOKENS // SEQ * n}}
    return resolve(validate(tree), n)


def take_turns(arms: Arms, repeats: int, n: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each arm: those of the slowest rank."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 2):
        for name, arm in arms.items():
            if n > 1:
                dist.barrier()
            start = time.perf_counter()
            arm()
            seconds = torch.tensor(time.perf_counter() - start)
            if n > 1:
                dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if repeat >= 2:
                found[name].append(seconds.item())
    return found


# -- 1: dispatch and combine -------------------------------------------------------------------------------------------


def exchange(rank: int, n: int, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Times, and bytes that leave this rank in one forward and backward pass."""
    ranks = build_ranks(rank, n, CPU, n)
    layer, x_TD = layer_of(ranks, n)
    routing = layer.router(x_TD)
    routing = routing._replace(topk_weights_TK=routing.topk_weights_TK.detach().requires_grad_())
    assert ranks.ep_group is not None
    exact, padded = AllToAllDispatcher(EXPERTS, ranks.ep_group), PaddedDispatcher(EXPERTS, ranks.ep_group, FACTOR)

    def there_and_back(dispatcher: AllToAllDispatcher) -> torch.Tensor:
        x = x_TD.clone().requires_grad_()
        rows_RD, plan = dispatcher.dispatch(x, routing).arrive()
        out_TD = dispatcher.combine(rows_RD, plan)
        out_TD.backward(x_TD)
        assert x.grad is not None
        return torch.cat([out_TD.detach(), x.grad])

    if not torch.equal(there_and_back(exact), there_and_back(padded)):
        raise SystemExit("padded dispatch differs from exact: nothing is timed")
    send = routing.stats.tokens_per_expert.view(n, -1).sum(1)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    rows, back = torch.randn(int(send.sum()), DIM), torch.empty(int(receive.sum()), DIM)

    def bare() -> None:
        for _ in range(2):  # forward: to the experts and back; backward: the gradients of both
            dist.all_to_all_single(back, rows, receive.tolist(), send.tolist())
            dist.all_to_all_single(rows, back, send.tolist(), receive.tolist())

    arms: Arms = {"bare": bare, "exact": lambda: there_and_back(exact), "padded": lambda: there_and_back(padded)}
    away = int(send.sum() - send[rank]) + int(receive.sum() - receive[rank])
    return take_turns(arms, repeats, n), 2 * away * DIM * rows.element_size()


def layer_of(ranks: Ranks, n: int) -> tuple[MoELayer, torch.Tensor]:
    """A sparse layer with normal weights and this rank's input."""
    torch.manual_seed(0)
    layer = MoELayer(config_of(n, n), ranks, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer, torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(ranks.rank))


# -- 2: overlap --------------------------------------------------------------------------------------------------------


def overlap(rank: int, n: int, repeats: int) -> dict[str, list[float]]:
    """One layer, forward and backward, with and without waiting for each exchange at once."""
    layer, x_TD = layer_of(build_ranks(rank, n, CPU, n), n)
    start = _Flight.start

    def at_once(flight: _Flight, *args: Any) -> torch.Tensor:
        received = start(flight, *args)
        assert flight.work is not None
        flight.work.wait()
        return received

    def forward_backward(departure: Any) -> None:
        _Flight.start = departure
        layer(x_TD.clone().requires_grad_())[0].backward(x_TD)
        _Flight.start = start

    return take_turns(
        {"while": lambda: forward_backward(start), "at once": lambda: forward_backward(at_once)}, repeats, n
    )


# -- 3: scaling --------------------------------------------------------------------------------------------------------


def scaling(rank: int, n: int, repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times of the step's arms, and median seconds that the instrumented one waited, by what for."""
    ranks = build_ranks(rank, n, CPU, n)
    engine, silent = NativeEngine(config_of(n, n), ranks, 0), NativeEngine(config_of(1, 1), Ranks(0, 1, CPU), 0)
    ids = torch.randint(0, VOCAB, (TOKENS // SEQ, SEQ + 1), generator=torch.Generator().manual_seed(rank))
    batch = [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    waited: dict[str, list[float]] = {"slowest": [], "exchange": []}

    def step(which: NativeEngine) -> None:
        which.forward_backward(batch)
        which.step()

    def without_reduction() -> None:
        assert engine.replicated is not None
        with engine.replicated.no_sync():
            step(engine)

    def instrumented() -> None:
        seconds = dict.fromkeys(waited, 0.0)
        counts, land = AllToAllDispatcher._exchange, _Flight.land

        def timed(kind: str, call: Callable, *args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            seconds[kind] += time.perf_counter() - start
            return result

        def exchange_counts(dispatcher: AllToAllDispatcher, send_pe: torch.Tensor) -> torch.Tensor:
            timed("slowest", dist.barrier, dispatcher.group)
            return timed("exchange", counts, dispatcher, send_pe)

        AllToAllDispatcher._exchange, _Flight.land = exchange_counts, lambda flight: timed("exchange", land, flight)
        step(engine)
        AllToAllDispatcher._exchange, _Flight.land = counts, land
        for kind, value in seconds.items():
            waited[kind].append(value)

    arms: Arms = {"step": lambda: step(engine), "silent": lambda: step(silent)}
    if n > 1:
        arms |= {"no reduction": without_reduction, "instrumented": instrumented}
    times = take_turns(arms, repeats, n)
    return times, {kind: statistics.median(values) if values else 0.0 for kind, values in waited.items()}


# -- the report --------------------------------------------------------------------------------------------------------


def median(values: list[float]) -> float:
    """In milliseconds."""
    return 1e3 * statistics.median(values)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, help="append the result to this JSON-lines file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = {"exchange": {}, "overlap": {}, "scaling": {}}
    print(
        f"T {TOKENS} a process, D {DIM}, E {EXPERTS}, K {TOP_K}, float32; {os.cpu_count()} cores, one thread a process"
    )
    for n in (n for n in options.processes if n > 1):
        found = run_ranks(exchange, n, options.repeats, timeout_s=1200)
        times, size = found[0][0], statistics.mean(size for _, size in found)
        results["exchange"][n] = {"seconds": times, "mib_per_rank": size / 2**20}
        base = median(times["bare"])
        print(f"\n{n} processes, {size / 2**20:.1f} MiB leave a rank; bare {base:.1f} ms")
        for name in ("exact", "padded"):
            print(f"  {name:<8} {median(times[name]):8.1f} ms, {median(times[name]) / base:.2f} of bare", flush=True)
    if 2 in options.processes:
        times = run_ranks(overlap, 2, options.repeats, timeout_s=1200)[0]
        results["overlap"] = times
        print(
            f"\none layer: at once {median(times['at once']):.1f} ms, rows travel meanwhile {median(times['while']):.1f} ms"
        )
    print(
        "\n| processes | step ms | tokens/s | efficiency | compute | slowest | exchange | reduction |\n"
        + "|---" * 8
        + "|"
    )
    single = None
    for n in options.processes:
        found = run_ranks(scaling, n, max(5, options.repeats // 3), timeout_s=1200)
        times = found[0][0]
        waits = {kind: 1e3 * statistics.mean(waited[kind] for _, waited in found) for kind in ("slowest", "exchange")}
        results["scaling"][n] = {"seconds": times, "waited_ms": waits}
        whole = median(times["step"])
        single = single or whole * n  # of one process, when 1 is the first
        reduction = whole - median(times["no reduction"]) if n > 1 else 0.0
        print(
            f"| {n} | {whole:.0f} | {1e3 * n * TOKENS / whole:.0f} | {single / whole:.2f} | {median(times['silent']):.0f} | "
            f"{waits['slowest']:.0f} | {waits['exchange']:.0f} | {reduction:.0f} |",
            flush=True,
        )
    if options.out:
        about = provenance() | {"device": "cpu", "cores": os.cpu_count(), "threads": 1, "factor": FACTOR}
        with options.out.open("a") as file:
            file.write(json.dumps({"about": about, "results": results}) + "\n")


if __name__ == "__main__":
    main()
