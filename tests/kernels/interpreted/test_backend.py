"""Which path is taken: the setting, the table of measurements, and the check of ids on the Triton path."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

import kernels.grouped_gemm_table as table
from kernels.cases import MOE_MLP, OPS
from kernels.grouped_gemm import grouped_gemm
from kernels.grouped_gemm_table import Setting, bucket, faster
from kernels.moe_mlp import moe_mlp
from kernels.permute import count_tokens, sort_by_expert
from moe.model.layer import MoELayer
from tests.tiny import ALONE, tiny_config

ODD = MOE_MLP.cases[0]  # T = 37, D = 40, F = 24, E = 7, K = 3


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the kernels launched."""
    names: list[str] = []
    run = InterpretedFunction.run

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return names


@pytest.mark.parametrize("name", OPS)
def test_backend_torch_launches_no_kernel(name: str, launches: list[str]):
    arguments = OPS[name].cases[0].make("cpu", torch.float32, 0)
    launches.clear()
    OPS[name].run(*arguments)
    assert launches
    launches.clear()
    if name == "route":
        arguments = (arguments[0], *arguments[1])
        OPS[name].run.__globals__["route"](*arguments, backend="torch")
    else:
        OPS[name].run(*arguments, backend="torch")
    assert not launches


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_layer_told_to_take_torch_launches_no_kernel(backend: str, launches: list[str]):
    layer = MoELayer(tiny_config(train__kernels=backend), ALONE, 1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    out, _, losses = layer(torch.randn(24, 32, requires_grad=True))
    (out.sum() + losses.aux).backward()
    assert bool(launches) == (backend == "auto")


def entry(faster: str, **change: Any) -> dict[str, Any]:
    """Of the case ODD on the device of this lane."""
    setting = Setting("moe_mlp", "float32", 40, 24, 8, 128)._replace(**change)
    return setting._asdict() | {"device": "cpu", "triton_ms": 1.0, "torch_ms": 0.5 if faster == "torch" else 2.0}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Write this table."""

    def write(*entries: dict[str, Any]) -> None:
        path = tmp_path / "table.json"
        path.write_text(json.dumps(entries))
        monkeypatch.setattr(table, "TABLE", path)
        table._slower.cache_clear()

    yield write
    table._slower.cache_clear()


def run(arguments: tuple[Any, ...]) -> list[Tensor]:
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    out = moe_mlp(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), [a for a in leaves if isinstance(a, Tensor)])]


def test_what_was_measured_as_faster_is_taken_and_what_was_not_is_ours(fake, launches):
    arguments = ODD.make("cpu", torch.float32, 0)
    ours = run(arguments)
    for other in ({"dtype": "bfloat16"}, {"rows": 64}, {"experts": 16}, {"inner": 48}, {"op": "grouped_gemm"}):
        fake(entry("torch", **other))
        launches.clear()
        run(arguments)
        assert "_moe_mlp_up_kernel" in launches, other
    fake(entry("torch") | {"device": "Another card"}, entry("triton", rows=128))
    launches.clear()
    run(arguments)
    assert "_moe_mlp_up_kernel" in launches
    fake(entry("torch"))
    launches.clear()
    theirs = run(arguments)
    # The products are torch's, in order and back it is still Triton.
    assert set(launches) == {"_permute_fwd_kernel", "_permute_bwd_kernel", "_combine_fwd_kernel", "_combine_bwd_kernel"}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_grouped_product_has_entries_of_its_own_and_they_hold_in_a_compiled_graph(fake, launches):
    rows, weight, counts = torch.randn(20, 16), torch.randn(3, 24, 16), torch.tensor([7, 0, 13])
    fake(entry("torch", op="grouped_gemm", inner=16, outer=24, experts=4, rows=32))
    compiled = torch.compile(lambda *a: 2 * grouped_gemm(*a), fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(rows, weight, counts)
    grouped_gemm(rows, weight, counts)
    assert not launches
    compiled(torch.cat([rows, rows]), weight, 2 * counts)  # 40 rows: another entry
    assert launches
    launches.clear()
    grouped_gemm(rows, weight, counts, backend="triton")
    assert launches == ["_grouped_fwd_kernel"]


def test_the_table_in_the_repository_is_of_gpus_and_is_read():
    for one in json.loads(table.TABLE.read_text()):
        assert set(one) >= {"device", "triton_ms", "torch_ms", *Setting._fields} and one["device"] != "cpu"
    assert faster("moe_mlp", torch.zeros(4, 8), torch.zeros(3, 32, 8), 8) == "triton"
    assert [bucket(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


@pytest.mark.parametrize(("bad", "masked"), [(5, False), (-2, True), (-1, False), (2**31 - 1, True)])
def test_check_ids_refuses_what_the_kernels_leave_out(bad: int, masked: bool):
    ids = torch.tensor([[2, 0], [1, 4]], dtype=torch.int32)
    ids[1, 1] = bad
    found = sort_by_expert(ids, 5, masked)
    assert int(found.counts_E.sum()) == 3 and found.inverse_TK[1, 1] == -1
    with pytest.raises(ValueError, match=rf"topk_ids has {bad}: give {'-1' if masked else '0'} to 4"):
        sort_by_expert(ids, 5, masked, check_ids=True)
    if bad != -1:
        assert int(count_tokens(ids, 5).sum()) == 3
        with pytest.raises(ValueError, match=rf"topk_ids has {bad}: give -1 to 4"):
            count_tokens(ids, 5, check_ids=True)
