"""What the machine is asked and told: determinism, peak rate, memory, signals, the profiler."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moe.parallel import Ranks

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def set_deterministic() -> list[str]:
    """Bitwise reproducible kernels; returns the flags it set, in words. Must run before the first CUDA matrix product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return [
        f"CUBLAS_WORKSPACE_CONFIG={os.environ['CUBLAS_WORKSPACE_CONFIG']}",
        "torch.use_deterministic_algorithms(True)",
        "torch.backends.cudnn.benchmark=False",
        "torch.backends.cuda.matmul.allow_tf32=False",
    ]


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, for the next step to use. By default it gives the end of its heap back to the
    system, which clears every page that it hands out again: 50 to 90 MiB a step at 10 M parameters, 5 to 15 % of its time.
    False, and nothing is done: with another C library, or where MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ is set."""
    decided = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if decided or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Larger tensors than 32 MiB, the highest limit there is, have pages of their own all the same.
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20) and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never


def measured_peak_tflops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """TFLOP/s of a square matrix product in this process: what MFU is measured against where no data sheet is known."""
    a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e12


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory of this process so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def free_memory_gib(device: torch.device) -> float:
    """Memory that is free now: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 and SIGINT; the loop asks once a step, so that all ranks stop at the same step."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Has one arrived at this rank?"""
        return self.name is not None


class Clock:
    """Seconds of whole steps and of the balancing machinery inside them, since the last `take`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.step_s = self.balance_s = self.regret_s = 0.0
        self.steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step."""
        start = time.perf_counter()
        yield
        self.step_s += time.perf_counter() - start
        self.steps += 1

    @contextmanager
    def balance(self) -> Iterator[None]:
        """Statistics, their all-reduce, the bias step, metrics. Includes the wait for the slowest rank."""
        start = time.perf_counter()
        yield
        self.balance_s += time.perf_counter() - start

    @contextmanager
    def regret(self) -> Iterator[None]:
        """Measuring the regret: probe and dual problems."""
        start = time.perf_counter()
        yield
        self.regret_s += time.perf_counter() - start

    def take(self) -> tuple[int, float, float, float]:
        """(steps, their seconds, seconds of balancing, seconds of measuring the regret), and start again."""
        taken = self.steps, self.step_s, self.balance_s, self.regret_s
        self.steps, self.step_s, self.balance_s, self.regret_s = 0, 0.0, 0.0, 0.0
        return taken


class Profiler:
    """A trace of steps 6 to 8 (and on CUDA a memory snapshot) under `<run>/profile`, one file a rank."""

    FIRST, LAST = 5, 7  # from 0: the first steps compile, allocate and connect

    def __init__(self, enabled: bool, run_dir: Path, ranks: Ranks):
        self.folder, self.ranks = run_dir / "profile", ranks
        self.profile = None
        if enabled:
            self.folder.mkdir(exist_ok=True)
            cuda = ranks.device.type == "cuda"
            activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
            self.profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)

    def before(self, step: int) -> None:
        """Start at the first profiled step."""
        if self.profile is not None and step == self.FIRST:
            if self.ranks.device.type == "cuda":
                torch.cuda.memory._record_memory_history()
            self.profile.start()

    def after(self, step: int) -> None:
        """Write the files after the last profiled step."""
        if self.profile is not None and step == self.LAST:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.folder / f"trace-rank{self.ranks.rank}.json.gz"))
            if self.ranks.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank{self.ranks.rank}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            self.profile = None
