"""Attention with rotary positions: grouped-query (GQA) and multi-head latent (MLA).

Letters: B batch, S sequence, T = B*S tokens, H heads, D model dim, d head dim.

Packed documents: with `data.document_mask` a token attends only to its own document: variable-length attention on CUDA
(not run on a GPU yet), a dense mask on CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelSection
from moe.model.experts import Linear
from moe.model.norm import RMSNorm

# Of the norms inside MLA, whatever model.norm_eps is: so in DeepSeek's published code, and in transformers.
LATENT_EPS = 1e-6


class Positions(NamedTuple):
    """What attention needs to know about the places of the tokens: rotary cos, sin [S, 1, d] float32, d the dims that are
    turned (a head's, or qk_rope_head_dim), both halves alike but for the sign of sin: minus, then plus; and, only with a
    document mask, either mask_B1SS bool (CPU) or the cumulative document lengths of the flattened batch (CUDA)."""

    cos: Tensor
    sin: Tensor
    mask_B1SS: Tensor | None
    document_ends: Tensor | None


def positions(tokens_BS: Tensor, model: ModelSection, eos_id: int | None) -> Positions:
    """Rotary tables (arXiv:2104.09864) and the document mask; eos_id None: plain causal. Rotary angles are relative, so
    documents need no positions of their own. Computed here each time: no buffer that meta-initialisation could spoil."""
    batch, seq = tokens_BS.shape
    turned = model.qk_rope_head_dim or model.head_dim or model.dim // model.num_heads
    powers = torch.arange(0, turned, 2, device=tokens_BS.device, dtype=torch.float32) / turned
    angles = torch.outer(torch.arange(seq, device=tokens_BS.device, dtype=torch.float32), model.rope_theta**-powers)
    mask_B1SS = document_ends = None
    if eos_id is not None:
        is_end = tokens_BS == eos_id
        if tokens_BS.is_cuda:
            is_end = is_end.clone()
            is_end[:, -1] = True  # a sequence ends its last document
            ends = is_end.reshape(-1).nonzero()[:, 0] + 1  # sync: number of documents
            document_ends = F.pad(ends, (1, 0)).to(torch.int32)
        else:
            document_BS = is_end.cumsum(1) - is_end.long()  # the end token belongs to the document that it ends
            same = document_BS[:, :, None] == document_BS[:, None, :]
            causal = torch.ones(seq, seq, dtype=torch.bool, device=tokens_BS.device).tril()
            mask_B1SS = (same & causal)[:, None]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return Positions(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1), mask_B1SS, document_ends)


class _Rotate(torch.autograd.Function):
    """Rotary embedding of the two halves of each head, in float32: x cos + (its halves swapped) sin. Backward turns the
    gradient the other way, where autograd would go through ten operations one by one."""

    @staticmethod
    def forward(ctx, x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BSHd, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad_BSHd: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(grad_BSHd, cos, sin, -1), None, None


def _turn(x_BSHd: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    x, half = x_BSHd.float(), x_BSHd.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out.to(x_BSHd.dtype)


def rotate(x_BSHd: Tensor, where: Positions) -> Tensor:
    """x_BSHd turned by its positions (RoFormer, arXiv:2104.09864, eq. 34, the pairs half a head apart), same dtype."""
    return _Rotate.apply(x_BSHd, where.cos, where.sin)


class GQA(nn.Module):
    """o(softmax(q k^T / sqrt d) v), causal, keys and values shared by groups of query heads (arXiv:2305.13245)."""

    def __init__(self, model: ModelSection):
        super().__init__()
        self.head_dim = model.head_dim or model.dim // model.num_heads
        self.num_heads = model.num_heads
        self.num_kv_heads = model.num_kv_heads or model.num_heads
        self.wq = Linear(model.dim, self.num_heads * self.head_dim)
        self.wk = Linear(model.dim, self.num_kv_heads * self.head_dim)
        self.wv = Linear(model.dim, self.num_kv_heads * self.head_dim)
        self.wo = Linear(self.num_heads * self.head_dim, model.dim)

    def forward(self, x_BSD: Tensor, where: Positions) -> Tensor:
        """x_BSD -> [B, S, D], same dtype."""
        batch, seq, _ = x_BSD.shape
        q = rotate(self.wq(x_BSD).view(batch, seq, self.num_heads, self.head_dim), where)
        k = rotate(self.wk(x_BSD).view(batch, seq, self.num_kv_heads, self.head_dim), where)
        v = self.wv(x_BSD).view(batch, seq, self.num_kv_heads, self.head_dim)
        return self.wo(attend(q, k, v, where).flatten(2))


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values of all heads come from one
    normalised latent of kv_lora_rank per token; position is in qk_rope_head_dim further dims, whose key all heads share.

        q = [q_nope, rope(q_rope)]    k = [k_nope, rope(k_rope)]    o(softmax(q k^T / sqrt(nope + rope)) v)

    wkv_a [kv_lora_rank + rope, D]: the latent, then the shared key. wkv_b, head by head: k_nope, then v. wq, or wq_b behind
    wq_a with q_lora_rank, head by head: q_nope, then q_rope.
    """

    def __init__(self, model: ModelSection):
        super().__init__()
        self.num_heads, self.kv_lora_rank = model.num_heads, model.kv_lora_rank
        self.nope, self.rope, self.v_head_dim = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        assert self.kv_lora_rank and self.nope and self.rope and self.v_head_dim, "resolve() refuses MLA without them"
        queries = self.num_heads * (self.nope + self.rope)
        if model.q_lora_rank is None:
            self.wq = Linear(model.dim, queries)
        else:
            self.wq_a = Linear(model.dim, model.q_lora_rank)
            self.q_norm = RMSNorm(model.q_lora_rank, LATENT_EPS)
            self.wq_b = Linear(model.q_lora_rank, queries)
        self.compressed_queries = model.q_lora_rank is not None
        self.wkv_a = Linear(model.dim, self.kv_lora_rank + self.rope)
        self.kv_norm = RMSNorm(self.kv_lora_rank, LATENT_EPS)
        self.wkv_b = Linear(self.kv_lora_rank, self.num_heads * (self.nope + self.v_head_dim))
        self.wo = Linear(self.num_heads * self.v_head_dim, model.dim)

    def forward(self, x_BSD: Tensor, where: Positions) -> Tensor:
        """x_BSD -> [B, S, D], same dtype."""
        heads = (self.num_heads, -1)
        q = self.wq_b(self.q_norm(self.wq_a(x_BSD))) if self.compressed_queries else self.wq(x_BSD)
        q_nope, q_rope = q.unflatten(-1, heads).split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.wkv_a(x_BSD).split([self.kv_lora_rank, self.rope], dim=-1)
        k_nope, v = self.wkv_b(self.kv_norm(latent)).unflatten(-1, heads).split([self.nope, self.v_head_dim], dim=-1)
        k_rope = rotate(k_rope[:, :, None], where).expand(-1, -1, self.num_heads, -1)
        q = torch.cat([q_nope, rotate(q_rope, where)], dim=-1)
        return self.wo(attend(q, torch.cat([k_nope, k_rope], dim=-1), v, where).flatten(2))


ATTENTION = {"gqa": GQA, "mla": MLA}


def attend(q_BSHd: Tensor, k: Tensor, v: Tensor, where: Positions) -> Tensor:
    """softmax(q k^T / sqrt d) v, causal, inside documents where these are masked -> [B, S, H, value dim].

    k, v may have fewer heads, which groups of query heads share, and v a head dim of its own: the narrower are then padded
    with zeros, because the fused kernels want one width (on a CPU 2.7x at S = 1,024 and 96 and 64 dims in float32).
    """
    qk_dim, v_dim, gqa = q_BSHd.shape[-1], v.shape[-1], k.shape[2] != q_BSHd.shape[2]
    width = max(qk_dim, v_dim)
    q, k, v = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q_BSHd, k, v))
    scale = None if width == qk_dim else qk_dim**-0.5  # None: of the width that it sees
    if where.document_ends is not None:
        out = _attend_by_document(q, k, v, where.document_ends, gqa, scale)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = where.mask_B1SS
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        ).transpose(1, 2)
    return out[..., :v_dim]


def _attend_by_document(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, gqa: bool, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shape, longest = q.shape, q.shape[1]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    if gqa:  # repeated here: torch 2.11's varlen_attn has no enable_gqa
        repeat = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
    # window (-1, 0): everything to the left, nothing to the right
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor), "a tuple comes back only when return_aux is asked for"
    return out.view(shape)
