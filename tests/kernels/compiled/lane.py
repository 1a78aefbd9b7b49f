"""Compile what a launch would compile, without a GPU: launchers run on meta tensors, and every launch is a compilation.

Registers, spills and shared memory come from the ptxas that triton brings. Triton 3.6 to 3.9.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory a block may have: 163 KiB and 227 KiB (CUDA C++ Programming Guide, table of compute capabilities)."""


class StubDriver(DriverBase):
    """Says that there is a GPU of this compute capability, and launches nothing."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.target.arch  # triton keeps what it compiled by device: one for every capability

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        return lambda *args, **kwargs: (0.0, 0.0, 0.0)

    def get_device_interface(self) -> Any:
        return torch.cpu


class Build(NamedTuple):
    """One compiled kernel: name, registers a thread, spilled bytes, bytes of shared memory, warps, its PTX."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    warps: int
    ptx: str


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes, from ptxas -v."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target[1]}",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    used = re.search(r"Used (\d+) registers", told)
    assert spills is not None and used is not None
    return int(used[1]), int(spills[1]) + int(spills[2])


class Recorder:
    """Inside the context every launch of a kernel compiles it for the capability; builds are collected once each."""

    def __init__(self, capability: int):
        self.capability, self.builds = capability, []
        self._seen: set[str] = set()

    def __enter__(self) -> Recorder:
        triton.runtime.driver.set_active(StubDriver(self.capability))
        self._run = JITFunction.run
        run, recorder = self._run, self

        def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            built = run(kernel, *args, grid=(1,), warmup=True, **kwargs)
            built = built.result() if hasattr(built, "result") else built
            if built.hash not in recorder._seen:
                recorder._seen.add(built.hash)
                used, spilled = assembled(built.asm["ptx"], recorder.capability)
                m = built.metadata
                recorder.builds.append(Build(kernel.__name__, used, spilled, m.shared, m.num_warps, built.asm["ptx"]))
            return built

        JITFunction.run = compile_only  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        JITFunction.run = self._run  # type: ignore[method-assign]
