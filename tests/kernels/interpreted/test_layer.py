"""The sparse layer on its Triton path: routing, statistics, output and gradients are those of the torch path."""

from __future__ import annotations

import pytest
import torch

from kernels import backend
from moe.model.layer import MoELayer
from tests.tiny import ALONE, tiny_config


def run(layer: MoELayer, x_TD: torch.Tensor, mask_T: torch.Tensor | None):
    layer.zero_grad()
    x_TD = x_TD.clone().requires_grad_()
    out_TD, stats, losses = layer(x_TD, mask_T)
    (out_TD.square().sum() + losses.aux + losses.z).backward()
    assert x_TD.grad is not None
    return out_TD, x_TD.grad, {name: p.grad for name, p in layer.named_parameters()}, stats


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["coordinate", "quantile", "sign"])
def test_the_fused_layer_is_the_torch_layer(method: str, masked: bool, monkeypatch):
    config = tiny_config(balance__method=method, balance__rate=None, balance__phi_loss=0.1, balance__z_loss=1e-3)
    layer = MoELayer(config, ALONE, 1)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.router.expert_bias_E.uniform_(-0.1, 0.1)
    x, mask = torch.randn(24, 32), torch.arange(24) % 5 != 0
    found = run(layer, x, mask if masked else None)
    calls = []
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(layer.router, "_route_fused", calls.append)
    expected = run(layer, x, mask if masked else None)
    assert not calls
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    for name, gradient in expected[2].items():
        torch.testing.assert_close(
            found[2][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name
        )
    for name, statistic in expected[3]._asdict().items():
        if statistic is None:
            assert getattr(found[3], name) is None
        elif name == "prob_sum":  # summed in float64 by the kernel
            torch.testing.assert_close(getattr(found[3], name), statistic, rtol=1e-6, atol=0)
        else:
            assert torch.equal(getattr(found[3], name), statistic), name
