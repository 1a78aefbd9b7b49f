"""The whole model against its equations, written again in float64, token by token, with nothing of it in common."""

from __future__ import annotations

import pytest
import torch

from moe.model.transformer import Transformer
from tests.tiny import ALONE, random_tokens, tiny_config, tiny_mla

EOS = 5


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def mlp(h, w13, w2):
    gate, up = h @ w13[: len(w13) // 2].T, h @ w13[len(w13) // 2 :].T
    return (gate / (1 + (-gate).exp()) * up) @ w2.T


def turned(x_Sd, theta):
    """RoPE: coordinates i and i + d/2 are a complex number, turned by position * theta^(-2i/d)."""
    half = x_Sd.shape[1] // 2
    angles = torch.arange(len(x_Sd))[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x_Sd[:, :half], x_Sd[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=1)


def latent_attention(h_SD, p, m, visible_SS):
    """A head at a time, its rows cut out of the matrices."""
    nope, rope, v_dim = m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim
    queries = h_SD
    if m.q_lora_rank is not None:
        queries = norm(h_SD @ p["wq_a.weight"].T, p["q_norm.weight"], 1e-6)
    wq = p["wq.weight" if m.q_lora_rank is None else "wq_b.weight"]
    latent = norm(h_SD @ p["wkv_a.weight"][: m.kv_lora_rank].T, p["kv_norm.weight"], 1e-6)
    shared_key = turned(h_SD @ p["wkv_a.weight"][m.kv_lora_rank :].T, m.rope_theta)
    heads = []
    for head in range(m.num_heads):
        q = queries @ wq[head * (nope + rope) : (head + 1) * (nope + rope)].T
        kv = latent @ p["wkv_b.weight"][head * (nope + v_dim) : (head + 1) * (nope + v_dim)].T
        scores = q[:, :nope] @ kv[:, :nope].T + turned(q[:, nope:], m.rope_theta) @ shared_key.T
        weights = (scores / (nope + rope) ** 0.5).masked_fill(~visible_SS, float("-inf")).softmax(-1)
        heads.append(weights @ kv[:, nope:])
    return torch.cat(heads, dim=1) @ p["wo.weight"].T


def attention(h_SD, p, m, visible_SS):
    if m.attention == "mla":
        return latent_attention(h_SD, p, m, visible_SS)
    heads = []
    for head in range(m.num_heads):
        d, shared = m.head_dim, head // (m.num_heads // m.num_kv_heads)
        q = turned(h_SD @ p["wq.weight"][head * d : (head + 1) * d].T, m.rope_theta)
        k = turned(h_SD @ p["wk.weight"][shared * d : (shared + 1) * d].T, m.rope_theta)
        v = h_SD @ p["wv.weight"][shared * d : (shared + 1) * d].T
        heads.append((q @ k.T / d**0.5).masked_fill(~visible_SS, float("-inf")).softmax(-1) @ v)
    return torch.cat(heads, dim=1) @ p["wo.weight"].T


def sparse(h_SD, p, m):
    """The layer's output, its scores, and the chosen experts of each token."""
    logits = h_SD @ p["router.weight"].T
    scores = logits.softmax(-1) if m.score_function == "softmax" else 1 / (1 + (-logits).exp())
    rows, chosen = [], []
    for h, s in zip(h_SD, scores, strict=True):
        biased = (s + p["router.expert_bias_E"]).tolist()
        ids = sorted(range(m.num_experts), key=lambda k: -biased[k])[: m.top_k]
        total = sum(s[k] for k in ids) if m.renormalize else 1.0
        routed = sum(s[k] / total * mlp(h, p["experts.w13"][k], p["experts.w2"][k]) for k in ids)
        rows.append(
            m.routed_scaling_factor * routed + mlp(h, p["shared_experts.w13.weight"], p["shared_experts.w2.weight"])
        )
        chosen += ids
    return torch.stack(rows), logits, scores, chosen


def reference(config, p, tokens_BS, targets_BS):
    """Sums of cross-entropy, aux (one window: the whole batch) and z loss."""
    m = config.model
    ce, found = 0.0, [([], [], []) for _ in range(m.num_layers)]

    def below(prefix):
        return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}

    for tokens, targets in zip(tokens_BS, targets_BS, strict=True):
        seq = len(tokens)
        document = [int((tokens[:i] == EOS).sum()) for i in range(seq)]  # ends before the token
        visible = torch.tensor(
            [
                [j <= i and (not config.data.document_mask or document[i] == document[j]) for j in range(seq)]
                for i in range(seq)
            ]
        )
        x = p["embedding.weight"][tokens]
        for layer in range(m.num_layers):
            b = below(f"blocks.{layer}.")
            x = x + attention(
                norm(x, b["attention_norm.weight"], m.norm_eps), below(f"blocks.{layer}.attention."), m, visible
            )
            h = norm(x, b["mlp_norm.weight"], m.norm_eps)
            if layer < m.first_k_dense:
                x = x + mlp(h, b["mlp.w13.weight"], b["mlp.w2.weight"])
                continue
            out, *rest = sparse(h, below(f"blocks.{layer}.moe."), m)
            x = x + out
            for collected, part in zip(found[layer], rest, strict=True):
                collected.extend(part)
        head = p["embedding.weight"] if m.tie_embeddings else p["head.weight"]
        logits = norm(x, p["norm.weight"], m.norm_eps) @ head.T
        ce = ce - logits.log_softmax(-1)[torch.arange(seq), targets].sum()
    aux = z = 0.0
    for logits, scores, chosen in found[m.first_k_dense :]:
        s, z_T = torch.stack(scores), torch.stack(logits).logsumexp(-1)
        f = torch.tensor(chosen).bincount(minlength=m.num_experts) / len(chosen)
        aux = aux + config.balance.aux_loss * m.num_experts * (f * (s / s.sum(-1, keepdim=True)).sum(0)).sum()
        z = z + config.balance.z_loss * z_T.square().sum()
    return ce, aux, z


COMMON = {
    "model__norm_eps": 1e-2,
    "model__rope_theta": 100.0,
    "model__init_std": 0.2,
    "balance__aux_loss": 0.1,
    "balance__z_loss": 0.01,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data__document_mask": True, "model__routed_scaling_factor": 2.5},
        {"model__score_function": "softmax", "model__renormalize": False, "model__tie_embeddings": True},
        tiny_mla(),
        tiny_mla(model__q_lora_rank=24, data__document_mask=True),
        tiny_mla(model__v_head_dim=20),  # wider than queries and keys
    ],
    ids=["plain", "documents", "softmax", "mla", "mla compressed queries, documents", "mla wide values"],
)
def test_the_model_is_its_equations_in_value_and_gradient(settings):
    config = tiny_config(**COMMON, **settings)
    model = Transformer(config, ALONE, EOS)
    model.init_weights(0)
    for layer, router in model.routers.items():
        router.expert_bias_E.copy_(torch.randn(8, generator=torch.Generator().manual_seed(layer)) * 0.1)
    x, y = random_tokens(batch=2)
    x[0, 4] = x[0, 9] = x[1, 7] = EOS
    out = model(x, y)
    (out.ce + out.aux + out.z).backward()
    p = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}
    expected = reference(config, p, x, y)
    for found, want in zip((out.ce, out.aux, out.z), expected, strict=True):
        assert float(found) == pytest.approx(float(want), rel=1e-5)
    sum(expected).backward()
    for name, parameter in model.named_parameters():
        want = p[name].grad.float()
        assert (parameter.grad - want).norm() < 1e-4 * want.norm(), name
