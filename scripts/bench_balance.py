"""Time of `Balancer.step` for every rule, of its statistics in the forward, and of `solve_dual` beside HiGHS.

    python scripts/bench_balance.py [--repeats 30] [--device cpu]

- step: L = 60 layers, E = 256, K = 8, statistics already summed; no collective. Beside it a top-K over one batch of the same
  experts (T = 2,048), and the bytes that the rule adds to the step's all-reduce.
- forward: the statistics of one layer over a router forward at the tiny preset (T = 1,024, D = 128, E = 16, K = 2).
- solve: one batch T = 65,536, E = 64, K = 6; and T = 2,048 beside scipy's HiGHS on the same linear program.
Medians (and minima) of the repeats, the candidates taking turns; one thread on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import eye as sparse_eye
from scipy.sparse import kron, vstack

from kernels.permute import count_tokens
from kernels.router_topk import topk_lowest_index
from moe.balance import BALANCERS, Balancer, build_balancer
from moe.balance.dual import solve_dual
from moe.balance.stats import collect, flatten, stack
from moe.balance.streams import stream
from moe.config import RATES, BalanceSection, load, resolve
from moe.model.router import Router
from moe.train.about import provenance

RULES = [name for name, kind in BALANCERS.items() if kind is not Balancer]


def times(candidates: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each candidate, in turns."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 3):
        for name, run in candidates.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:
                found[name].append(time.perf_counter() - start)
    return found


def ms(seconds: list[float]) -> str:
    """median (minimum) in milliseconds."""
    return f"{1e3 * statistics.median(seconds):9.3f} ({1e3 * min(seconds):.3f})"


def bench_step(repeats: int, device: str, layers: int = 60, experts: int = 256, top_k: int = 8) -> None:
    """Balancer.step of every rule."""
    scores_TE = next(stream("skewed", 2048, experts, "sigmoid", 1, seed=0)).to(device)
    candidates: dict[str, Callable[[], object]] = {"top-K, T = 2,048": lambda: topk_lowest_index(scores_TE, top_k)}
    bytes_of = {}
    for method in RULES:
        rule = build_balancer(BalanceSection(method=method, rate=RATES[method]), range(layers), experts, top_k)  # type: ignore[arg-type]
        rule.to(device)
        bias_E = rule.bias_LE[0]
        ids_TK = topk_lowest_index(scores_TE + bias_E, top_k)
        one = collect(rule.needs, scores_TE, bias_E, ids_TK, count_tokens(ids_TK, experts))
        stats = stack([one] * layers)
        bytes_of[method] = flatten(stats).numel() * 8
        candidates[method] = lambda rule=rule, stats=stats: rule.step(stats)
    print(f"\nBalancer.step, L = {layers}, E = {experts}: ms, median (minimum); bytes of the step's all-reduce")
    for name, seconds in times(candidates, repeats, device).items():
        print(f"  {name:<18} {ms(seconds)}   {bytes_of.get(name, 0):>12,}")


def bench_forward(repeats: int, device: str) -> None:
    """The statistics of a rule over the router forward at the tiny preset."""
    x_TD = torch.randn(1024, 128, device=device, dtype=torch.bfloat16)
    candidates = {}
    for method in RULES:
        config = resolve(load(["configs/tiny.toml"], ["--balance.method", method]), 2)
        router = Router(config, 0).to(device)
        torch.nn.init.normal_(router.weight, std=0.1)
        candidates[method] = lambda router=router: router(x_TD)
    found = times(candidates, 10 * repeats, device)
    base = statistics.median(found["sign"])
    print(
        "\nrouter forward, T = 1,024, D = 128, E = 16, K = 2: ms, median (minimum); over sign, which needs the counts alone"
    )
    for name, seconds in found.items():
        print(f"  {name:<18} {ms(seconds)}   {100 * (statistics.median(seconds) / base - 1):+8.1f} %")


def highs(scores_TE: np.ndarray, top_k: int) -> float:
    """The optimum of the assignment's linear program by HiGHS."""
    tokens, experts = scores_TE.shape
    rows = kron(sparse_eye(tokens), np.ones((1, experts)))
    columns = kron(np.ones((1, tokens)), sparse_eye(experts))
    right = np.concatenate([np.full(tokens, top_k), np.full(experts, top_k * tokens / experts)])
    done = linprog(-scores_TE.ravel(), A_eq=vstack([rows, columns]), b_eq=right, bounds=(0, 1), method="highs")
    return -done.fun


def bench_solve(repeats: int, device: str) -> None:
    """solve_dual alone and beside HiGHS."""
    print("\nsolve_dual: s, median (minimum)")
    for score in ("sigmoid", "softmax"):
        scores_TE = next(stream("skewed", 65_536, 64, score, 1, seed=0)).to(device)
        found = times({"solve": lambda scores_TE=scores_TE: solve_dual(scores_TE, 6)}, min(repeats, 5), device)["solve"]
        gap = solve_dual(scores_TE, 6)
        relative = float(gap.gap / gap.value.abs())
        print(
            f"  T = 65,536, E = 64, K = 6, {score}: {statistics.median(found):.2f} ({min(found):.2f}), relative gap {relative:.1e}"
        )
    scores_TE = next(stream("skewed", 2048, 64, "sigmoid", 1, seed=0))
    start = time.perf_counter()
    optimum = highs(scores_TE.double().numpy(), 6)
    theirs = time.perf_counter() - start
    found = times({"solve": lambda: solve_dual(scores_TE.to(device), 6)}, min(repeats, 10), device)["solve"]
    value = float(solve_dual(scores_TE, 6).value)
    ours = statistics.median(found)
    print(f"  T = 2,048: {ours:.3f} ({min(found):.3f}); HiGHS {theirs:.2f}, {theirs / ours:.0f} x")
    print(f"             relative difference of the optima {abs(value - optimum) / optimum:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU core"
    print(f"device: {name}; {', '.join(f'{k} {v}' for k, v in provenance().items() if v)}")
    bench_step(options.repeats, options.device)
    bench_forward(options.repeats, options.device)
    bench_solve(options.repeats, options.device)


if __name__ == "__main__":
    main()
