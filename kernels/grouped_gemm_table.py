"""Which product of the experts is faster, ours or F.grouped_mm: read from grouped_gemm_table.json, which
`python scripts/bench_kernels.py --write-table` fills. What was not measured runs on ours; an empty table is all ours.

An entry has a Setting, the device's name, the milliseconds of both (forward and backward) and the versions.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_suffix(".json")


class Setting(NamedTuple):
    """op: grouped_gemm (inner D, outer N) or moe_mlp (inner D, outer F). experts and rows: rounded up to a power of 2."""

    op: str
    dtype: str
    inner: int
    outer: int
    experts: int
    rows: int


def bucket(number: int) -> int:
    """The power of 2 at or above it. By comparison: torch.compile then keeps a range, not a number."""
    power = 1
    while power < number:
        power *= 2
    return power


def setting(op: str, rows_RD: Tensor, weight_eND: Tensor, rows: int) -> Setting:
    """Of a call: the first weight of the op, and the rows that it multiplies."""
    experts, outer, inner = weight_eND.shape
    outer = outer // 2 if op == "moe_mlp" else outer
    return Setting(op, str(rows_RD.dtype).removeprefix("torch."), inner, outer, bucket(experts), bucket(rows))


def device_name(device: torch.device) -> str:
    """As the table names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _slower() -> dict[str, tuple[tuple[Any, ...], ...]]:
    """By device: the settings in which ours is the slower."""
    found: dict[str, tuple[tuple[Any, ...], ...]] = {}
    for entry in json.loads(TABLE.read_text()) if TABLE.exists() else []:
        if entry["torch_ms"] < entry["triton_ms"]:
            one = tuple(entry[field] for field in Setting._fields)
            found[entry["device"]] = (*found.get(entry["device"], ()), one)
    return found


@torch.compiler.assume_constant_result
def _slower_on(device: str) -> tuple[tuple[Any, ...], ...]:
    return _slower().get(device_name(torch.device(device)), ()) if _slower() else ()


def faster(op: str, rows_RD: Tensor, weight_eND: Tensor, rows: int) -> Literal["triton", "torch"]:
    """What the table says for this call."""
    slower = _slower_on(str(rows_RD.device))
    # Compared and not looked up by hash: torch.compile can have sizes as symbols.
    return "torch" if slower and tuple(setting(op, rows_RD, weight_eND, rows)) in slower else "triton"
