"""Model, layer and dispatch. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moe.model import loss as loss_module
from moe.model.attention import positions, rotate
from moe.model.loss import IGNORED, chunked_cross_entropy
from moe.model.transformer import Transformer
from moe.parallel import build_ranks
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, random_tokens, tiny_config, tiny_mla

MLA = tiny_mla(model__q_lora_rank=24)
both = pytest.mark.parametrize("attention", [{}, MLA], ids=["gqa", "mla"])


def model(eos_id=None, **settings):
    m = Transformer(tiny_config(**settings), ALONE, eos_id)
    m.init_weights(0)
    return m


def loss_and_grads(m, padded=False, targets=None):
    x, y = random_tokens()
    out = m(x, y if targets is None else targets, padded)
    (out.ce + out.aux + out.z).backward()
    return out, {name: p.grad.clone() for name, p in m.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_chunked_cross_entropy_equals_torch(chunk, dtype):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(50, 8, generator=g).to(dtype).requires_grad_()
    w = torch.randn(31, 8, generator=g).requires_grad_()
    t = torch.randint(0, 31, (50,), generator=g)
    t[[0, 7, 49]] = IGNORED
    loss = chunked_cross_entropy(h, w, t, chunk)
    loss.backward(torch.tensor(0.5))
    h2, w2 = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    expected = F.cross_entropy((h2 @ w2.to(dtype).T).float(), t, reduction="sum")
    expected.backward(torch.tensor(0.5))
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    assert torch.allclose(loss, expected, **close)
    assert torch.allclose(h.grad, h2.grad, **close) and torch.allclose(w.grad, w2.grad, **close)


def test_chunked_cross_entropy_keeps_no_logits():
    saved = []
    h, w = torch.randn(64, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(h, w, torch.zeros(64, dtype=torch.int64), 16)
    assert max(saved) < 64 * 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_chunk_change_no_bit(dtype, monkeypatch):
    def run(block):
        monkeypatch.setattr(loss_module, "BLOCK", block)
        g = torch.Generator().manual_seed(0)
        h = torch.randn(50, 8, generator=g).to(dtype).requires_grad_()
        w = torch.randn(31, 8, generator=g).requires_grad_()
        t = torch.randint(0, 31, (50,), generator=g).masked_fill(torch.arange(50) % 9 == 0, IGNORED)
        loss = chunked_cross_entropy(h, w, t, 20)
        loss.backward()
        return loss, h.grad, w.grad

    rows = 31 // torch.get_num_threads() + 1
    (loss, *grads), (other, *others) = run(2**30), run(3 * rows)  # whole chunks; a few rows, and fewer at the end
    assert torch.allclose(loss, other, rtol=1e-6)  # a sum in another order
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_a_second_backward_pass_through_the_loss_is_an_error():
    h, w = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = chunked_cross_entropy(h, w, torch.zeros(6, dtype=torch.int64), 4)
    torch.autograd.grad(2 * loss, (h, w), retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(loss, (h, w))


def test_the_loss_of_no_token_is_zero():
    h, w = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = chunked_cross_entropy(h, w, torch.zeros(0, dtype=torch.int64), 4)
    loss.backward()
    assert loss == 0 and h.grad.shape == (0, 4) and torch.equal(w.grad, torch.zeros(5, 4))


@both
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_p03_recompute_counts_once_and_changes_nothing(mode, attention):
    plain, grads = loss_and_grads(model(balance__aux_loss=0.1, **attention))
    out, again = loss_and_grads(model(train__activation_checkpointing=mode, balance__aux_loss=0.1, **attention))
    assert torch.equal(out.stats.tokens_per_expert, plain.stats.tokens_per_expert)
    assert int(out.stats.tokens_per_expert[0].sum()) == 8 * 16 * 2
    assert torch.equal(out.ce, plain.ce)
    for name in grads:
        assert torch.allclose(grads[name], again[name], rtol=1e-5, atol=1e-6), name


class Choices(TorchDispatchMode):
    """Counts the searches for the largest scores that are really computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.topk, torch.ops.aten.max)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("mode", "forwards", "choices"), [("none", 1, 0), ("selective", 2, 0), ("full", 2, 4)], ids=lambda x: str(x)
)
def test_p03_p15_recompute_happens_and_selective_keeps_the_choice_of_experts(mode, forwards, choices):
    m, calls = model(train__activation_checkpointing=mode), []
    m.blocks[1].moe.register_forward_pre_hook(lambda *_: calls.append(1))
    out = m(*random_tokens())
    with Choices() as backward:
        out.ce.backward()
    assert (
        len(calls) == forwards and backward.count == choices
    )  # two MoE layers choose two experts again only under full


def test_p23_aux_loss_alone_reaches_the_router_under_full_recompute():
    m = model(train__activation_checkpointing="full", balance__aux_loss=1.0)
    out = m(*random_tokens())
    out.aux.backward()
    for router in m.routers.values():
        assert router.weight.grad.abs().sum() > 0


def test_p06_router_stays_float32_under_bf16_conversion():
    m = model()
    for router in m.routers.values():
        router.expert_bias_E.fill_(0.3000001)
    m = m.to(torch.bfloat16).half()
    for router in m.routers.values():
        assert router.expert_bias_E.dtype == torch.float32 and router.weight.dtype == torch.float32
        assert torch.equal(router.expert_bias_E, torch.full((8,), 0.3000001))
    assert m.blocks[0].attention.wq.weight.dtype == torch.float16  # the conversion did happen elsewhere


@both
def test_p06_router_computes_in_float32_in_a_bfloat16_model(attention):
    m = model(train__compute_dtype="bfloat16", balance__aux_loss=0.1, **attention)
    router, seen = m.routers[1], []
    router.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    router.expert_bias_E.fill_(0.3)
    out, grads = loss_and_grads(m)
    x_TD, routing = seen[0]
    assert x_TD.dtype == torch.bfloat16 and routing.topk_weights_TK.dtype == torch.float32
    assert torch.equal(routing.scores_TE, (x_TD.float() @ router.weight.T).sigmoid())
    assert torch.equal(router.expert_bias_E, torch.full((8,), 0.3))  # float32's 0.3, not bfloat16's
    assert out.ce.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads.values())
    assert out.ce.item() == pytest.approx(loss_and_grads(model(**attention))[0].ce.item(), rel=1e-2)


@both
def test_p08_bias_is_zero_after_meta_initialisation(attention):
    with torch.device("meta"):
        m = Transformer(tiny_config(**attention), ALONE)
    m.to_empty(device="cpu")
    for router in m.routers.values():
        router.expert_bias_E.fill_(7.0)  # what to_empty leaves is anything
    m.init_weights(0)
    other = model(**attention)
    for (name, a), b in zip(m.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all((r.expert_bias_E == 0).all() for r in m.routers.values())


@both
def test_initial_weights_have_their_std_and_no_two_experts_are_equal(attention):
    m = model(model__num_experts=16, model__scale_residual_init=True, model__init_std=0.05, **attention)
    seen = set()
    for name, p in m.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
            continue
        residual = name.endswith(("wo.weight", "w2", "w2.weight"))
        assert p.std().item() == pytest.approx(0.05 / 6**0.5 if residual else 0.05, rel=0.15), name
        seen |= {part.numpy().tobytes() for part in (p.detach() if ".experts." in name else [p.detach()])}
    matrices = sum("norm" not in name for name, _ in m.named_parameters())
    assert len(seen) == matrices + 2 * 2 * (16 - 1)  # w13 and w2 of two layers hold 16 experts each


def test_p07_bias_is_in_the_state_dict():
    m = model()
    keys = [k for k in m.state_dict() if k.endswith("expert_bias_E")]
    assert len(keys) == 2
    m.routers[1].expert_bias_E.fill_(0.125)
    other = model()
    other.load_state_dict(m.state_dict())
    assert (other.routers[1].expert_bias_E == 0.125).all()


def test_p10_bias_has_no_gradient_and_is_no_parameter():
    m = model()
    loss_and_grads(m)
    assert not any("bias" in name for name, _ in m.named_parameters())
    assert all(not r.expert_bias_E.requires_grad and r.expert_bias_E.grad is None for r in m.routers.values())


@pytest.mark.parametrize("first_k_dense", [0, 1, 2])
def test_p13_mixed_dense_and_sparse_stacks(first_k_dense):
    out, grads = loss_and_grads(model(model__first_k_dense=first_k_dense))
    assert out.stats.tokens_per_expert.shape == (3 - first_k_dense, 8)
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_p13_all_dense_model_trains_without_balancing():
    out, grads = loss_and_grads(model(model__first_k_dense=3, balance__method="none", balance__rate=None))
    assert out.stats.tokens_per_expert.shape == (0, 8) and torch.isfinite(out.ce)


def test_p11_padding_equals_removal():
    x, y = random_tokens()
    y[3:] = IGNORED
    m = model(balance__aux_loss=0.1, balance__z_loss=0.1)
    out = m(x, y, padded=True)
    (out.ce + out.aux + out.z).backward()
    other = model(balance__aux_loss=0.1, balance__z_loss=0.1)
    expected = other(x[:3], y[:3])
    (expected.ce + expected.aux + expected.z).backward()
    assert torch.equal(out.stats.tokens_per_expert, expected.stats.tokens_per_expert)
    assert out.stats.tokens.tolist() == [48, 48]
    for (name, a), b in zip(m.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5), name


def test_p18_a_batch_of_padding_alone_has_zero_loss_and_zero_gradients():
    m = model(balance__aux_loss=0.1, balance__z_loss=0.1)
    out, grads = loss_and_grads(m, padded=True, targets=torch.full((8, 16), IGNORED))
    assert out.ce.item() == out.aux.item() == out.z.item() == 0.0
    assert out.stats.tokens.tolist() == [0, 0] and int(out.stats.tokens_per_expert.sum()) == 0
    assert all((grad == 0).all() for grad in grads.values()) and len(grads) == len(list(m.parameters()))


def test_p17_the_routers_counts_are_int64():
    out = model()(*random_tokens())
    assert out.stats.tokens_per_expert.dtype == out.stats.tokens.dtype == torch.int64


def test_p18_all_tokens_to_one_expert_trains_and_the_others_get_zero_gradients():
    m = model()
    for router in m.routers.values():
        router.expert_bias_E[:] = torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0])
    out, grads = loss_and_grads(m)
    assert out.stats.tokens_per_expert[0].tolist() == [128, 128, 0, 0, 0, 0, 0, 0]
    for name, grad in grads.items():
        assert torch.isfinite(grad).all()
        if ".experts." in name:
            assert (grad[2:] == 0).all() and grad[:2].abs().sum() > 0


@both
def test_document_mask_isolates_documents(attention):
    x, y = random_tokens(batch=1)
    x[0, 7] = 5  # the end-of-document token
    m = model(eos_id=5, data__document_mask=True, **attention)
    changed = x.clone()
    changed[0, :7] = (changed[0, :7] + 1) % 128
    changed[0, :7] = torch.where(changed[0, :7] == 5, 6, changed[0, :7])
    hidden = []
    m.norm.register_forward_hook(lambda _m, _i, out: hidden.append(out))
    m(x, y), m(changed, y)
    assert torch.allclose(hidden[0][0, 8:], hidden[1][0, 8:], atol=1e-6)
    assert not torch.allclose(hidden[0][0, :7], hidden[1][0, :7], atol=1e-3)
    plain = model(**attention)
    plain.norm.register_forward_hook(lambda _m, _i, out: hidden.append(out))
    plain(x, y), plain(changed, y)
    assert not torch.allclose(hidden[2][0, 8:], hidden[3][0, 8:], atol=1e-6)  # without the mask they do see it


@both
def test_evaluation_of_a_token_does_not_depend_on_later_tokens(attention):
    x, y = random_tokens(batch=2)
    m = model(**attention).eval()
    hidden = []
    m.norm.register_forward_hook(lambda _m, _i, out: hidden.append(out))
    changed = x.clone()
    changed[0, 9:] = 3
    changed[1] = 4
    m(x, y), m(changed, y)
    assert torch.allclose(hidden[0][0, :9], hidden[1][0, :9], atol=1e-6)


def test_rope_scores_depend_on_distance_only():
    where = positions(torch.zeros(1, 12, dtype=torch.int64), tiny_config().model, None)
    q, k = torch.randn(8), torch.randn(8)
    turned_q = rotate(q.expand(1, 12, 1, 8), where)[0, :, 0]
    turned_k = rotate(k.expand(1, 12, 1, 8), where)[0, :, 0]
    scores = turned_q @ turned_k.T
    assert torch.allclose(scores.diagonal(-3), scores[3, 0].expand(9), atol=1e-5)
    assert not torch.allclose(scores[3, 0], scores[4, 0], atol=1e-4)


def test_the_latents_of_mla_do_not_grow_with_the_heads_and_the_key_with_position_is_shared():
    m = model(model__num_heads=8, **MLA)
    shapes = {name: tuple(p.shape) for name, p in m.blocks[0].attention.named_parameters()}
    assert shapes == {
        "wq_a.weight": (24, 32),
        "q_norm.weight": (24,),
        "wq_b.weight": (8 * 16, 24),
        "wkv_a.weight": (16 + 4, 32),
        "kv_norm.weight": (16,),
        "wkv_b.weight": (8 * (12 + 8), 16),
        "wo.weight": (32, 8 * 8),
    }


def _layer_on_rank(rank, n, ep, skew):
    config = tiny_config(n, parallel__ep=ep)
    m = Transformer(config, build_ranks(rank, n, CPU, ep))
    m.init_weights(0)
    if skew:
        for router in m.routers.values():
            router.expert_bias_E[:2] = 9.0  # the ranks of the other experts receive nothing
    x, y = random_tokens()
    share = slice(rank * 8 // n, (rank + 1) * 8 // n)
    out = m(x[share], y[share])
    (out.ce / 128).backward()
    w13 = m.blocks[1].moe.experts.w13
    local = w13.grad.to_local() if hasattr(w13.grad, "to_local") else w13.grad
    return out.ce.item(), out.stats.tokens_per_expert.tolist(), local.double().square().sum().item()


@pytest.mark.parametrize("skew", [False, True])
def test_p18_p33_dispatch_over_ranks_equals_local(skew):
    (ce, counts, square), *_ = run_ranks(_layer_on_rank, 1, 1, skew)
    for ep in (2,):
        results = run_ranks(_layer_on_rank, 2, ep, skew)
        assert sum(r[0] for r in results) == pytest.approx(ce, rel=1e-6)
        assert (torch.tensor(results[0][1]) + torch.tensor(results[1][1])).tolist() == counts
        assert sum(r[2] for r in results) == pytest.approx(square, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "attention"), [("coordinate", {}), ("quantile", {}), ("sign", {}), ("sign", MLA)], ids=str
)
def test_a_compiled_block_is_one_graph_and_the_same_function(method, attention, dtype):
    settings = {"balance__method": method, "balance__rate": None, "train__compute_dtype": dtype, **attention}
    plain, grads = loss_and_grads(model(**settings))
    compiled = model(**settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.blocks:  # as training does: with fullgraph=True bincount passes, without it breaks the graph
        block.compile(backend="aot_eager")
    out, again = loss_and_grads(compiled)
    assert not torch._dynamo.utils.counters["graph_break"]
    # A compiled norm sums its squares in another order: bits apart in float32, rounded away in bfloat16.
    tolerance = 2e-6 if dtype == "float32" else 0
    assert out.ce.item() == pytest.approx(plain.ce.item(), rel=tolerance)
    for name, gradient in grads.items():
        assert (again[name] - gradient).norm() <= tolerance * gradient.norm(), name
    for name, statistic in plain.stats._asdict().items():
        assert statistic is None or torch.equal(getattr(out.stats, name), statistic), name
