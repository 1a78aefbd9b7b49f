"""`route` under Triton's interpreter: statistics to the bit, extreme sizes and logits, errors, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.route as router_module
import kernels.router_topk as parts
from kernels import backend
from kernels.route import STATISTICS, Routed, route, route_reference
from kernels.router_topk import RESPONSE_BINS, router_scores

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and of overflow
ALL = frozenset(STATISTICS)


def logits_and_bias(
    tokens: int, experts: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator).to(dtype)
    return logits, 0.05 * torch.randn(experts, generator=generator)


def torch_path(monkeypatch, scores_TE: Tensor | None, *args: Any, **kwargs: Any) -> Routed:
    """`route` as on a CPU without the interpreter, on the scores given if there are any."""
    with monkeypatch.context() as patched:
        patched.setattr(backend, "INTERPRETED", False)
        if scores_TE is not None:
            patched.setattr(parts, "router_scores", lambda logits_TE, score_function: scores_TE)
        return route(*args, **kwargs)


def kernel_scores(logits: Tensor, score_function: str) -> Tensor:
    """The scores as the kernel computes them: numpy's exponential is not torch's to the last bit."""
    all_experts = route(logits, torch.zeros(logits.shape[1]), logits.shape[1], score_function, renormalize=False)
    scores = torch.empty(logits.shape).scatter_(1, all_experts.topk_ids_TK.long(), all_experts.topk_weights_TK)
    assert torch.allclose(scores, router_scores(logits, score_function), rtol=1e-6, atol=0)
    return scores


def same_but_the_weights(found: Routed, expected: Routed) -> None:
    for name, value in found._asdict().items():
        other = getattr(expected, name)
        assert (value is None) == (other is None), name
        if value is not None and name != "topk_weights_TK":
            assert value.dtype == other.dtype and torch.equal(value, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=["free", "groups"])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_statistics_equal_the_torch_path_to_the_bit(score_function, groups, masked, dtype, monkeypatch):
    logits, bias = logits_and_bias(27, 44, dtype)
    mask = torch.arange(27) % 4 != 2 if masked else None
    arguments = logits, bias, 5, score_function, True, 1.0, mask, *groups, ALL, 0.01
    found = route(*arguments)
    expected = torch_path(monkeypatch, kernel_scores(logits, score_function), *arguments)
    same_but_the_weights(found, expected)
    assert torch.allclose(found.topk_weights_TK, expected.topk_weights_TK, rtol=1e-6, atol=0)
    real = 27 if mask is None else int(mask.sum())
    assert int(found.tokens_per_expert_E.sum()) == 5 * real
    assert int(found.response_histogram_EB.sum()) == 44 * real
    assert 0 < int(found.boundary_count_E.sum()) < 2 * real  # the width tells tokens apart
    assert abs(int(found.prob_sum_E.sum()) / 2**32 - real) < 1e-4


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_does_not_depend_on_which_others_are_asked_for(name):
    logits, bias = logits_and_bias(9, 12)
    together = route(logits, bias, 3, "sigmoid", statistics=ALL, boundary_width=0.02)
    alone = route(logits, bias, 3, "sigmoid", statistics=frozenset({name}), boundary_width=0.02)
    filled = [field for field, value in alone._asdict().items() if value is not None][3:]
    assert len(filled) == 1 and filled[0].startswith(name)
    assert torch.equal(getattr(alone, filled[0]), getattr(together, filled[0]))


def test_the_boundary_is_counted_at_both_experts_and_up_to_the_width():
    logits = torch.tensor([[0.0, 0.0, -9.0, -9.0], [0.0, -9.0, 0.5, -9.0]])  # K-th and next: 0 and 0.12 apart
    for width, expected in ((0.0, [1, 1, 0, 0]), (0.13, [2, 1, 1, 0])):
        out = route(
            logits, torch.zeros(4), 1, "sigmoid", statistics=frozenset({"boundary_count"}), boundary_width=width
        )
        assert out.boundary_count_E.tolist() == expected


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(3, 1024, 32), (1, 1000, 31), (6, 33, 32), (70, 8, 7), (130, 8, 1), (3, 9, 9)]
)
def test_sizes_at_the_limits(tokens, experts, top_k, monkeypatch):
    logits, bias = logits_and_bias(tokens, experts)
    statistics = ALL if top_k < experts else ALL - router_module.NEED_NEXT
    arguments = logits, bias, top_k, "sigmoid", True, 1.0, None, 1, 1, statistics, 1e-3
    expected = torch_path(monkeypatch, kernel_scores(logits, "sigmoid"), *arguments)
    same_but_the_weights(route(*arguments), expected)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_p15_equal_logits_go_to_the_lowest_experts_and_every_sum_is_exact(score_function, monkeypatch):
    arguments = torch.zeros(19, 16), torch.zeros(16), 3, score_function, True, 1.0, None, 4, 2, ALL, 0.0
    found = route(*arguments)
    assert (found.topk_ids_TK == torch.tensor([0, 1, 2])).all()
    assert found.boundary_count_E.tolist() == [0, 0, 19, 19] + [0] * 12
    assert found.tokens_per_expert_E.tolist() == [19] * 3 + [0] * 13
    assert found.prob_sum_E.tolist() == [19 * 2**28] * 16
    assert (found.response_histogram_EB.sum(1) == 19).all() and found.response_histogram_EB.shape == (16, RESPONSE_BINS)
    same_but_the_weights(found, torch_path(monkeypatch, None, *arguments))


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=["free", "groups"])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_p34_infinite_and_nan_logits_give_distinct_experts(score_function, groups):
    logits, bias = logits_and_bias(10, 16)
    logits[0] = float("nan")
    logits[1, 3] = float("nan")
    logits[2] = float("-inf")
    logits[3, :14] = float("-inf")
    logits[4, 5] = float("inf")
    logits.requires_grad_()
    out = route(logits, bias, 6, score_function, True, 1.0, None, *groups, ALL, 0.1)
    assert ((out.topk_ids_TK >= 0) & (out.topk_ids_TK < 16)).all()
    assert all(len(set(row)) == 6 for row in out.topk_ids_TK.tolist())
    assert int(out.tokens_per_expert_E.sum()) == 60 and int(out.response_histogram_EB.sum()) == 160
    if score_function == "sigmoid":
        assert 3 in out.topk_ids_TK[1].tolist()  # NaN ranks first
    (grad,) = torch.autograd.grad(out.topk_weights_TK[3:].square().sum(), logits)
    finite = [3, 5, 6, 7, 8, 9]
    assert torch.isfinite(out.topk_weights_TK[finite]).all() and torch.isfinite(grad[finite]).all()


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_p11_nan_in_padding_reaches_nothing(score_function):
    logits, bias = logits_and_bias(10, 8)
    mask = torch.arange(10) % 2 == 0
    clean = route(logits, bias, 3, score_function, token_mask_T=mask, statistics=ALL)
    logits[~mask] = float("nan")
    logits.requires_grad_()
    out = route(logits, bias, 3, score_function, token_mask_T=mask, statistics=ALL)
    same_but_the_weights(out, clean)
    (grad,) = torch.autograd.grad(out.topk_weights_TK.square().sum(), logits)
    assert torch.isfinite(out.topk_weights_TK).all() and (out.topk_ids_TK[~mask] == -1).all()
    assert torch.isfinite(grad).all() and (grad[~mask] == 0).all() and (grad[mask] != 0).any()


def test_p34_scores_near_zero_have_finite_weights_and_gradients():
    logits = torch.full((4, 8), -200.0).requires_grad_()  # sigmoid underflows to 0
    out = route(logits, torch.zeros(8), 2, "sigmoid")
    (grad,) = torch.autograd.grad(1e4 * out.topk_weights_TK.sum(), logits)
    assert (out.topk_weights_TK == 0).all() and (grad == 0).all()


def test_more_tokens_than_a_block_and_a_last_block_that_is_not_full():
    logits, bias = logits_and_bias(131, 8)  # 64 tokens a block
    found, expected = route(logits, bias, 2, "softmax"), route_reference(logits.double(), bias, 2, "softmax")
    assert torch.equal(found.topk_ids_TK.long(), expected.topk_ids_TK)
    assert torch.equal(found.tokens_per_expert_E, expected.tokens_per_expert_E)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(tokens):
    logits, bias = logits_and_bias(tokens, 8)
    logits.requires_grad_()
    out = route(logits, bias, 2, "sigmoid", statistics=ALL)
    (grad,) = torch.autograd.grad(out.topk_weights_TK.sum(), logits)
    assert grad.shape == (tokens, 8) and int(out.tokens_per_expert_E.sum()) == 2 * tokens


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend):
    logits, bias = logits_and_bias(12, 16)
    mask = torch.arange(12) % 5 != 0

    def routed(x: Tensor) -> Routed:
        return route(2 * x, bias, 3, "softmax", True, 2.5, mask, 4, 2, ALL, 0.1)

    plain, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.compiler.reset()
    expected, found = routed(plain), torch.compile(routed, fullgraph=True, backend=backend)(compiled)
    same_but_the_weights(found, expected)
    assert torch.equal(found.topk_weights_TK, expected.topk_weights_TK)
    for out in (expected, found):
        out.topk_weights_TK.square().sum().backward()
    assert torch.equal(plain.grad, compiled.grad)


WRONG = {
    "top_k = 9 is not within 1 and the 8 experts": {"top_k": 9},
    "top_k = 0 is not within 1": {"top_k": 0},
    "top_k = 5 is not within 1 and the 4 experts in reach": {"top_k": 5, "num_groups": 4, "group_top_k": 2},
    "num_groups = 3 and group_top_k = 1 do not fit 8 experts": {"num_groups": 3},
    "num_groups = 8 leaves 1 expert a group": {"num_groups": 8},
    "score_function = 'relu' is not known": {"score_function": "relu"},
    r"logits_TE is torch.float64 \(4, 8\): give bfloat16": {"logits_TE": torch.zeros(4, 8, dtype=torch.float64)},
    r"logits_TE is torch.float32 \(8,\): give": {"logits_TE": torch.zeros(8)},
    r"expert_bias_E is torch.bfloat16 \(8,\) on cpu: give": {"expert_bias_E": torch.zeros(8, dtype=torch.bfloat16)},
    r"expert_bias_E is torch.float32 \(7,\) on cpu: give": {"expert_bias_E": torch.zeros(7)},
    "expert_bias_E is .* on meta: give .* on cpu": {"expert_bias_E": torch.zeros(8, device="meta")},
    r"token_mask_T is torch.int64 \(4,\) on cpu: give": {"token_mask_T": torch.ones(4, dtype=torch.int64)},
    r"token_mask_T is torch.bool \(3,\) on cpu: give": {"token_mask_T": torch.ones(3, dtype=torch.bool)},
    r"statistics = \['load'\] has unknown names: choose from dual_sum": {"statistics": frozenset({"load"})},
    r"statistics = \['boundary_count'\] .* top_k = 8": {"top_k": 8, "statistics": frozenset({"boundary_count"})},
}


@pytest.mark.parametrize("message", WRONG)
def test_p32_wrong_arguments_are_named(message):
    fine = {"logits_TE": torch.zeros(4, 8), "expert_bias_E": torch.zeros(8), "top_k": 2, "score_function": "sigmoid"}
    with pytest.raises(ValueError, match=message):
        route(**fine | WRONG[message])
