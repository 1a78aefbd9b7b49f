"""Every kernel, at the shapes of the models, compiles for three generations without spills, within shared memory and within what
resources.json says of this version of Triton."""

from __future__ import annotations

import re

import pytest
import triton

from tests.kernels.compiled.lane import SHARED_LIMIT
from tests.kernels.compiled.launches import LAUNCHES, builds_of
from tests.kernels.compiled.resources import exceeded, read_table, resources


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("op", LAUNCHES)
def test_p28_compiles_without_spills_and_reads_of_the_host(op: str, capability: int):
    builds = [(setting, build) for setting, some in builds_of(op, capability).items() for build in some]
    assert len({build.kernel for _, build in builds}) >= 2
    for setting, build in builds:
        print(f"sm_{capability} {setting} {build.kernel}: {build.registers} registers, {build.shared} B shared")
        assert build.spilled == 0, (setting, build.kernel)
        assert build.shared <= SHARED_LIMIT[capability], (setting, build.kernel)
        assert f".target sm_{capability}" in build.ptx, (setting, build.kernel)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("op", LAUNCHES)
def test_takes_no_more_than_the_table_says(op: str, capability: int):
    known = read_table().get(triton.__version__)
    if known is not None:  # of another version only the limits above hold
        found = resources(builds_of(op, capability))
        assert not exceeded(found, known[f"sm_{capability}"][op])


def test_the_table_refuses_more_registers_spills_and_shared_memory():
    known = {"16B bf16": {"kernel": [[100, 0, 1000]]}}
    for one, wrong in (
        ([125, 0, 1000], 0),
        ([126, 0, 1000], 1),
        ([100, 8, 1000], 1),
        ([100, 0, 1001], 1),
        ([1, 0, 0], 0),
    ):
        assert len(exceeded({"16B bf16": {"kernel": [one]}}, known)) == wrong, one
    assert exceeded({"16B bf16": {"other": [[1, 0, 0]]}}, known) == ["16B bf16, other: not in the table"]
    assert exceeded({"16B bf16": {"kernel": [[1, 0, 0]] * 2}}, known) == ["16B bf16, kernel: 2 builds, 1 in the table"]
    assert exceeded({}, known) == ["16B bf16: in the table, not built"]


@pytest.mark.parametrize("op", ["permute", "combine"])
def test_p19_rows_are_addressed_in_64_bits(op: str):
    """T * K * D is beyond 32 bits for 65,536 tokens of V3: no product may be cut to 32 (a widening one is not)."""
    for setting, builds in builds_of(op, 90).items():
        for build in builds:
            assert not re.search(r"(mul|mad)\.lo\.[su]32", build.ptx), (setting, build.kernel)


TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCTS = {"_grouped_fwd_kernel", "_grouped_dw_kernel", "_moe_mlp_up_kernel", "_moe_mlp_down_bwd_kernel"}


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_products_run_on_tensor_cores_and_copy_asynchronously(capability: int):
    found = builds_of("moe_mlp", capability)
    builds = [(s, b) for s, some in found.items() for b in some if s.endswith("bf16") and b.kernel in PRODUCTS]
    assert {build.kernel for _, build in builds} == PRODUCTS
    for setting, build in builds:
        where = (setting, build.kernel)
        print(f"sm_{capability} {setting} {build.kernel}: {build.registers} registers, {build.shared} B shared")
        assert f".target sm_{capability}" in build.ptx and TENSOR_CORES[capability] in build.ptx, where
        assert build.spilled == 0 and build.shared <= SHARED_LIMIT[capability], where
        # Both operands, gathered or not, go to shared memory 16 bytes at a time; only the epilogue loads as wide itself.
        assert len(re.findall(r"cp\.async\.cg\.shared\.global.*0x10", build.ptx)) >= 8, where
        synchronous = len(re.findall(r"ld\.global\S*\.v4", build.ptx))
        assert synchronous == (8 if build.kernel == "_moe_mlp_down_bwd_kernel" else 0), where
