"""Our balancers on the real DeepSeek-V3 and GLM-4-MoE classes. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import copy

import pytest
import torch

from moe.balance import build_balancer
from moe.balance.stats import collect, stack
from moe.config import RATES, BalanceSection, ConfigError
from moe.interop.attached import checked
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'alf-moe[hf]'")
KINDS = ["DeepseekV3", "Glm4Moe"]
E, K, DENSE = 8, 2, 1


def build(kind="DeepseekV3", **settings):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32,
        moe_intermediate_size=16, n_routed_experts=E, num_experts_per_tok=K, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=DENSE, max_position_embeddings=64, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    if kind == "DeepseekV3":
        sizes |= dict(
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
    else:
        sizes |= dict(num_key_value_heads=2, head_dim=8)
    config = getattr(transformers, f"{kind}Config")(**(sizes | settings))
    return getattr(transformers, f"{kind}ForCausalLM")(config).train()


def ids(step=0, batch=4):
    return torch.randint(0, 64, (batch, 12), generator=torch.Generator().manual_seed(step))


def gates(model):
    return [layer.mlp.gate for layer in model.model.layers[DENSE:]]


def biases(model):
    return torch.stack([gate.e_score_correction_bias for gate in gates(model)])


def train(model, tokens, **more):
    model(input_ids=tokens, labels=tokens, **more).loss.backward()
    model.zero_grad()


def attach(*args, **more):
    from moe.interop.transformers import attach

    return attach(*args, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", sorted(RATES))
def test_p05_every_rule_moves_the_bias_as_on_our_own_router(kind, method):
    """Against the rule on statistics of the logits that the model itself returns, for three steps of two micro-batches."""
    model = build(kind, n_group=2, topk_group=1) if method == "coordinate" else build(kind)
    attached = attach(model, method)
    groups = (2, 1) if method == "coordinate" else (1, 1)
    rule = build_balancer(checked(method), [1, 2], E, K)
    for step in range(3):
        before = biases(model).clone()
        assert torch.equal(before, rule.bias_LE)
        whole = []
        for part in ids(step).chunk(2):
            whole.append(model(input_ids=part, output_router_logits=True).router_logits)
        stats = []
        for bias_E, logits in zip(before, zip(*whole, strict=True), strict=True):
            scores = torch.cat([part.reshape(-1, E) for part in logits]).sigmoid().detach()
            biased = scores + bias_E
            if groups == (2, 1):
                best = biased.view(-1, 2, E // 2).topk(2, -1).values.sum(-1)
                biased = (
                    biased.view(-1, 2, E // 2)
                    .masked_fill(best[..., None] < best.amax(-1)[:, None, None], -9)
                    .flatten(1)
                )
            chosen = biased.topk(K, -1).indices
            counts = torch.bincount(chosen.flatten(), minlength=E)
            stats.append(collect(rule.needs, scores, bias_E, chosen, counts, None, *groups))
        rule.step(stack(stats))
        attached.step()
        assert torch.equal(biases(model), rule.bias_LE) and not torch.equal(biases(model), before)
    assert attached.metrics()["moe/maxvio_batch/max"] == pytest.approx(
        max(float(s.tokens_per_expert.max() * E / (48 * K) - 1) for s in stats)
    )


def test_sign_balances_a_skewed_model():
    model = build()
    with torch.no_grad():
        for gate in gates(model):
            gate.weight[0] *= 3
    attached = attach(model, BalanceSection(method="sign", rate=0.02))
    found = []
    for _ in range(40):
        model(input_ids=ids())
        attached.step()
        found.append(attached.metrics()["moe/maxvio_batch/mean"])
    assert found[-1] < 0.5 * found[0] and found[0] > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_p02_p03_micro_batches_and_recomputation_count_once(kind, reentrant):
    results = []
    for checkpointing, parts in ((False, 1), (False, 4), (True, 1), (True, 2)):
        model = build(kind)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        attached = attach(model, "sign")
        for part in ids().chunk(parts):
            train(model, part, use_cache=False)
        attached.step()
        assert attached.last.tokens.tolist() == [48, 48]
        results.append((attached.last.tokens_per_expert, biases(model)))
    for counts, bias in results[1:]:
        assert torch.equal(counts, results[0][0]) and torch.equal(bias, results[0][1])


def test_p04_evaluation_and_no_grad_count_nothing_and_a_step_without_tokens_is_an_error():
    model = build()
    attached = attach(model, "sign")
    with torch.no_grad():
        model(input_ids=ids())
    model.eval()
    model(input_ids=ids())
    model.generate(ids()[:, :4], max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        attached.step()
    assert not biases(model).any()
    model.train()
    train(model, ids())
    attached.step()
    assert attached.last.tokens.tolist() == [48, 48]


@pytest.mark.parametrize("kind", KINDS)
def test_p11_padding_is_no_load(kind):
    model, seen = build(kind), []
    attached = attach(model, "coordinate")
    gates(model)[0].register_forward_hook(lambda _m, _a, out: seen.append(out[2]))
    mask = torch.ones_like(ids())
    mask[0, 5:] = mask[2, 1:] = 0
    train(model, ids(), attention_mask=mask)
    train(model, ids(1), attention_mask=torch.ones_like(mask))
    attached.step()
    chosen = torch.cat([seen[0][mask.flatten().bool()], seen[1]])
    assert attached.last.tokens.tolist() == [int(mask.sum()) + 48] * 2
    assert attached.last.tokens_per_expert[0].tolist() == torch.bincount(chosen.flatten(), minlength=E).tolist()
    assert attached.last.response_histogram.sum(-1).tolist() == [[int(mask.sum()) + 48] * E] * 2


def test_p06_p27_bias_stays_float32_and_survives_bfloat16_and_files(tmp_path):
    model = build()
    with torch.no_grad():
        for gate in gates(model):
            gate.e_score_correction_bias += 0.7
    attached = attach(model, BalanceSection(method="sign", rate=1e-3, centre=False))  # goes on from the model's bias
    model.bfloat16()
    train(model, ids())
    assert torch.equal(biases(model), torch.full((2, E), 0.7))  # what routed was not rounded
    attached.step()
    moved = biases(model)
    assert moved.dtype == torch.float32
    assert ((moved - 0.7).abs().sub(1e-3).abs() < 1e-6).logical_or(moved == 0.7).all() and moved.ne(0.7).any()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(biases(again), moved)
    assert torch.equal(attach(again, "sign").balancer.bias_LE, moved)


def test_p12_skipped_step_changes_nothing_and_forgets_its_counts():
    model = build()
    attached = attach(model, "smebu")
    train(model, ids())
    before = {k: v.clone() for k, v in attached.state_dict().items()}
    attached.step(applied=False)
    assert all(torch.equal(v, before[k]) for k, v in attached.state_dict().items()) and not biases(model).any()
    train(model, ids())
    attached.step()
    assert attached.last.tokens.tolist() == [48, 48]


def test_p14_frozen_layer_and_layer_in_eval_mode_stay():
    model = build()
    attached = attach(model, BalanceSection(method="sign", rate=1e-3, frozen_layers=[2]))
    train(model, ids())
    attached.step()
    assert biases(model)[0].any() and not biases(model)[1].any()
    model = build()
    attached = attach(model, "quantile")
    model.model.layers[2].eval()
    train(model, ids())
    attached.step()
    assert biases(model)[0].any() and not biases(model)[1].any()


@pytest.mark.parametrize("method", ["coordinate", "smebu"])
def test_p07_p36_state_goes_on_where_it_was(method):
    one = build()
    first = attach(one, method)
    for step in range(2):
        train(one, ids(step))
        first.step()
    saved = copy.deepcopy(first.state_dict())
    other = build()
    second = attach(other, method)
    second.load_state_dict(saved)
    assert torch.equal(biases(other), biases(one))
    for model, attached in ((one, first), (other, second)):
        for step in (2, 3):
            train(model, ids(step))
            attached.step()
    assert torch.equal(biases(other), biases(one)) and saved["bias"].ne(biases(one)).any()
    with pytest.raises(ValueError, match="is not that of"):
        attach(build(), "sign").load_state_dict(saved)


def _steps(rank, n):
    found = []
    for method in ("sign", "coordinate"):
        model = build()
        attached = attach(model, method)
        for step in range(3):
            for part in ids(step).chunk(n)[rank].chunk(2):
                train(model, part)
            attached.step(applied=step != 1 or rank != n - 1)  # one rank skips: all do
        found.append((attached.last.tokens_per_expert.tolist(), biases(model).tolist()))
    return found


def test_p01_ranks_agree_to_the_bit_and_with_one_process():
    alone, two = _steps(0, 1), run_ranks(_steps, 2, timeout_s=600)
    assert two[0] == two[1]
    for (counts, bias), (want_counts, want_bias) in zip(two[0], alone, strict=True):
        assert counts == want_counts
        torch.testing.assert_close(torch.tensor(bias), torch.tensor(want_bias), atol=1e-6, rtol=0)


def test_wrong_settings_are_one_sentence():
    model = build()
    for section, says in (
        ("signs", "balance.method = 'signs' is not known (did you mean sign?)"),
        ("sinkhorn", "balance.method = 'sinkhorn' assigns the batch itself"),
        (BalanceSection(method="sign", aux_loss=0.01), "balance.aux_loss = 0.01 is a loss"),
        (BalanceSection(method="sign", frozen_layers=[0]), "balance.frozen_layers has 0"),
        (BalanceSection(method="sign", rate=1e-3, schedule="linear"), "set balance.freeze_step"),
        (BalanceSection(method="sign", rate="auto"), "balance.rate = 'auto'"),
    ):
        with pytest.raises(ConfigError) as refused:
            attach(model, section)
        assert says in str(refused.value)
    with pytest.raises(ValueError, match="has no router to balance"):
        attach(torch.nn.Linear(2, 2), "sign")
