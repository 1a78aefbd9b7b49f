"""An operation of kernels/cases.py beside its reference: what the tests under the interpreter and on a GPU share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cases import OPS, TOLERANCE, Op

DTYPES = [torch.float32, torch.bfloat16]
ALL = [pytest.param(op, case, id=f"{name}-{case.name}") for name, op in OPS.items() for case in op.cases]
TWINS = [pytest.param(op, wrong, id=f"{name}-{wrong}") for name, op in OPS.items() for wrong in op.wrong]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is NaN, or a large number of integers: what a kernel forgets to write shows."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def with_gradients(fn, arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients of the floating arguments, for an upstream gradient that depends on the place alone and is
    exact in dtype."""
    leaves = [a.requires_grad_() for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    out = fn(*arguments)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor)]
    real = [o for o in outs if o.requires_grad]
    ramps = [torch.linspace(-1, 1, max(o.numel(), 2))[: o.numel()].view_as(o) for o in real]
    upstream = [ramp.to(dtype).to(o.dtype) for ramp, o in zip(ramps, real, strict=True)]
    return [*(o.detach() for o in outs), *torch.autograd.grad(real, leaves, upstream)]


def wide(value: Any) -> Any:
    """The same argument in float64."""
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def differences(fn, op: Op, arguments: tuple[Any, ...], dtype: torch.dtype) -> list[str]:
    """What is off between fn and the reference in float64, in words."""
    found = with_gradients(fn, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments), dtype)
    exact = with_gradients(op.reference, tuple(map(wide, arguments)), dtype)
    assert len(found) == len(exact)
    off = []
    for place, (f, e) in enumerate(zip(found, exact, strict=True)):
        if not e.is_floating_point():
            off += [f"output {place} differs"] if not torch.equal(f.long(), e.long()) else []
            continue
        assert f.shape == e.shape
        tolerance = TOLERANCE[torch.float32 if f.dtype == torch.float32 and dtype == torch.float32 else dtype]
        error = (f.double() - e).norm() / e.norm().clamp_min(1e-30)
        worst = (f.double() - e).abs().max() / e.abs().max().clamp_min(1e-30) if e.numel() else torch.tensor(0.0)
        if not (error <= tolerance and worst <= 20 * tolerance):
            off.append(f"{place}: {float(error):.2e} in norm, {float(worst):.2e} at worst, {tolerance:.2e} allowed")
    return off
