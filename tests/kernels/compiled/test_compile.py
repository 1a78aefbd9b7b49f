"""Every kernel, at the shapes of the models, compiles for three generations without spills and within shared memory."""

from __future__ import annotations

import re

import pytest
import torch

from kernels.cases import MODELS, Shape
from kernels.combine import combine_backward, combine_forward
from kernels.permute import count_tokens_forward, permute_backward, permute_forward, sort_forward
from kernels.route import route_backward, route_forward
from kernels.router_topk import RESPONSE_BINS
from tests.kernels.compiled.lane import SHARED_LIMIT, Build, Recorder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_permute(s: Shape, dtype: torch.dtype) -> None:
    s = s._replace(T=65_536)
    x, rows = meta(s.T, s.D, dtype=dtype), meta(s.T * s.K, s.D, dtype=dtype)
    for index in (torch.int32, torch.int64):
        ids = meta(s.T, s.K, dtype=index)
        sort_forward(ids, s.E, 1)
        count_tokens_forward(ids.view(-1), s.E)
    order, inverse = meta(s.T * s.K, dtype=torch.int64), meta(s.T, s.K, dtype=torch.int64)
    permute_forward(x, order, inverse)
    permute_backward(rows, inverse)


def launch_combine(s: Shape, dtype: torch.dtype) -> None:
    rows, out = meta(s.T * s.K, s.D, dtype=dtype), meta(s.T, s.D, dtype=dtype)
    weights, inverse = meta(s.T, s.K, dtype=torch.float32), meta(s.T, s.K, dtype=torch.int64)
    order = meta(s.T * s.K, dtype=torch.int64)
    combine_forward(rows, weights, inverse)
    combine_backward(out, rows, weights, inverse, order)


def launch_route(s: Shape, dtype: torch.dtype) -> None:
    s = s._replace(T=65_536)
    logits, bias = meta(s.T, s.E, dtype=dtype), meta(s.E, dtype=torch.float32)
    grad, ids = meta(s.T, s.K, dtype=torch.float32), meta(s.T, s.K, dtype=torch.int32)
    none, every = [s.E, 0, 0, 0, 0], [s.E, 1, s.E, s.E, s.E * RESPONSE_BINS]
    for score in ("sigmoid", "softmax"):
        for mask, sizes, groups in ((None, none, (1, 1)), (meta(s.T, dtype=torch.bool), every, (8, 4))):
            route_forward(logits, bias, mask, s.K, score, True, 2.5, *groups, 0.1, sizes)
        route_backward(grad, logits, ids, score, True, 2.5)


LAUNCHES = {"route": launch_route, "permute": launch_permute, "combine": launch_combine}


def builds_of(op: str, capability: int) -> dict[str, list[Build]]:
    """By shape and dtype."""
    with Recorder(capability) as recorder:
        found = {}
        for name, shape in MODELS.items():
            for short, dtype in DTYPES.items():
                recorder.builds = []
                LAUNCHES[op](shape, dtype)
                found[f"{name} {short}"] = recorder.builds
    return found


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("op", LAUNCHES)
def test_compiles_without_spills_within_shared_memory(op: str, capability: int):
    builds = [(setting, build) for setting, some in builds_of(op, capability).items() for build in some]
    assert len({build.kernel for _, build in builds}) >= 2
    for setting, build in builds:
        print(f"sm_{capability} {setting} {build.kernel}: {build.registers} registers, {build.shared} B shared")
        assert build.spilled == 0, (setting, build.kernel)
        assert build.shared <= SHARED_LIMIT[capability], (setting, build.kernel)


@pytest.mark.parametrize("op", ["permute", "combine"])
def test_rows_are_addressed_in_64_bits(op: str):
    """T * K * D is beyond 32 bits for 65,536 tokens of V3: no product may be cut to 32 (a widening one is not)."""
    for setting, builds in builds_of(op, 90).items():
        for build in builds:
            assert not re.search(r"(mul|mad)\.lo\.[su]32", build.ptx), (setting, build.kernel)
