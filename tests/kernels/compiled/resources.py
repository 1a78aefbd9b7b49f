"""The committed table of what kernels take, and the comparison with it.

resources.json: {triton version: {"sm_90": {op: {"16B bf16": {kernel: [[registers, spilled bytes, bytes of shared memory], ...]}}}}}
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.kernels.compiled.lane import Build

TABLE = Path(__file__).with_name("resources.json")
SLACK = 1.25  # of the registers: the ptxas of a patch release may choose others
Resources = dict[str, dict[str, list[list[int]]]]


def read_table() -> dict[str, dict[str, dict[str, Resources]]]:
    """By version of Triton, architecture and operation."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def resources(builds: dict[str, list[Build]]) -> Resources:
    """By setting and kernel; the builds of a kernel in order of size."""
    found: Resources = {}
    for setting, some in builds.items():
        kernels = found.setdefault(setting, {})
        for build in some:
            kernels.setdefault(build.kernel, []).append([build.registers, build.spilled, build.shared])
        for numbers in kernels.values():
            numbers.sort()
    return found


def exceeded(found: Resources, known: Resources) -> list[str]:
    """What is beyond the table, in words: registers with slack, any spill, any more shared memory, kernels it does not know."""
    wrong = [f"{setting}: in the table, not built" for setting in known if setting not in found]
    for setting, kernels in found.items():
        for kernel, numbers in kernels.items():
            limits = known.get(setting, {}).get(kernel)
            if limits is None:
                wrong.append(f"{setting}, {kernel}: not in the table")
            elif len(limits) != len(numbers):
                wrong.append(f"{setting}, {kernel}: {len(numbers)} builds, {len(limits)} in the table")
            else:
                for (registers, spilled, shared), (most, _, most_shared) in zip(numbers, limits, strict=True):
                    if registers > SLACK * most or spilled or shared > most_shared:
                        wrong.append(
                            f"{setting}, {kernel}: {registers} registers ({most}), {spilled} B spilled, {shared} B ({most_shared})"
                        )
    return wrong
