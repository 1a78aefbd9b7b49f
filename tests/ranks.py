"""`run_ranks(fn, n, *args)`: run `fn(ranks_rank, n, *args)` in n gloo processes and return what each returned."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, n: int, port: int, fn: Callable[..., Any], args: tuple, queue: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(n)}
    torch.set_num_threads(1)
    try:
        if n > 1:
            dist.init_process_group("gloo", rank=rank, world_size=n)
        queue.put((rank, fn(rank, n, *args), None))
        if n > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


def run_ranks(fn: Callable[..., Any], n: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """fn must be a module-level function, its results picklable (tensors are sent as numpy or lists)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_worker, args=(r, n, port, fn, args, queue)) for r in range(n)]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(n):
            rank, result, error = queue.get(timeout=timeout_s)
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = result
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [results[r] for r in range(n)]
